"""Data sets and tokenizers made by several processes at once, by processes that are killed, on a disk that is full or
read-only, and read by others meanwhile. Every writer is a process of its own.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from nanochat import corpus, dataset
from nanochat.command_line import run_script
from nanochat.common import UserError
from nanochat.corpus import Package
from nanochat.shards import iter_documents, load_shards
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from scripts import tok_train
from tests.data_helpers import NUM_IN_REPO, REPO, Server, make_hub_shard, make_package
from tests.warm import FORKS, start_warm_process

KINDS = ("files", "python-docs", "download", "tokenizer")
NUM_TIMED_KILLS = 15
RENAMES = ("os.rename",)
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What the data sets and tokenizers are made from, read by all tests: a folder, and the server's address."""
    start_warm_process()
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "texts").mkdir()
    random.seed(1)
    rows = [json.dumps({"text": f"Document {idx} " + random.randbytes(100).hex()}) for idx in range(3000)]
    (folder / "texts" / "rows.jsonl").write_text("\n".join(rows))
    make_package(folder / "package")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        dataset.main(["--source", "files", "--path", str(folder / "texts"), "--name", "texts"])
    with Server() as server:
        names = [*(f"shard_{idx:05d}.parquet" for idx in range(4)), f"shard_{NUM_IN_REPO - 1:05d}.parquet"]
        files = {f"/datasets/{REPO}/resolve/main/{name}": make_hub_shard(name) for name in names}
        server.content, server.delay_seconds = files.get, 0.01
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        (folder / "endpoint").write_text(f"http://127.0.0.1:{server.server_port}")
        server.folder = folder
        yield server
        server.shutdown()


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


# ---------------------------------------------------------------------------------------------------------------------
# The processes


def make(kind, inputs, version=0):
    """Make the data or the tokenizer under the name `made`; the versions 0 and 1 take each other's place."""
    if kind == "tokenizer":
        tok_train.main(["--data", str(inputs / "data" / "texts"), "--vocab-size", str(400 + version), "--name", "made",
                        *(["--force"] if version else [])])
    elif kind == "files":
        dataset.main(["--source", "files", "--path", str(inputs / "texts"), "--name", "made", "--seed", str(version)])
    elif kind == "python-docs":
        paths = [path.relative_to(inputs / "package").as_posix() for path in (inputs / "package").rglob("*")]
        corpus.find_packages = lambda: [Package("pkg", "1.0", inputs / "package", corpus.choose_paths(paths))]
        dataset.main(["--source", "python-docs", "--name", "made", "--seed", str(version)])
    else:
        dataset.main(["--source", "climbmix", "--name", "made", "-n", str(2 + 2 * version), "-w", "2"])


def make_in_child(kind, inputs, base_dir, log, version, kill_at, events):
    """A child's life: `make` as a script does it. It kills itself before operation number `kill_at` among `events`."""
    os.environ |= {"NANOCHAT_BASE_DIR": str(base_dir), "HF_ENDPOINT": (inputs / "endpoint").read_text(),
                   "NO_PROXY": "127.0.0.1"}
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 1)
    os.dup2(1, 2)
    numbers = itertools.count(1)

    def count(event, args):
        if event in events and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR)) and next(numbers) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if kill_at:
        sys.addaudithook(count)
    run_script(lambda argv: make(kind, inputs, version))


def start(kind, inputs, base_dir, version=0, kill_at=0, events=()):
    log = base_dir.with_name(f"log_{time.monotonic_ns()}")
    child = FORKS.Process(target=make_in_child, args=(kind, inputs.folder, base_dir, log, version, kill_at, events))
    child.log = log
    child.start()
    return child


def finish(child):
    """The child's exit code and everything it said."""
    child.join(60)
    assert child.exitcode is not None, child.log.read_text()
    return child.exitcode, child.log.read_text() if child.log.exists() else ""


def run(kind, inputs, base_dir, **options):
    return finish(start(kind, inputs, base_dir, **options))


def get_folder(kind, base_dir):
    return base_dir / ("tokenizer" if kind == "tokenizer" else "data") / "made"


def snapshot(folder):
    """File name -> sha256 of what must be the same each time; training.json tells how long it took."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())
            if path.name != "training.json"}


def read(kind):
    """What a reader of `made` sees: a hash, its content verified, or None for nothing. Anything torn raises."""
    try:
        if kind == "tokenizer":
            get_token_bytes("made")
            return get_tokenizer("made").hash
        return load_shards("made", verify=True).hash
    except UserError as error:
        if not any(phrase in str(error) for phrase in ("there is no data", "there is no tokenizer", "shard yet")):
            raise
        return None


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """(kind, version) -> (snapshot, hash, seconds) of a run that nobody disturbs."""
    results = {}

    def measure(kind, version=0):
        if (kind, version) not in results:
            base_dir = tmp_path_factory.mktemp("undisturbed")
            began = time.monotonic()
            code, output = run(kind, inputs, base_dir, version=version)
            seconds = time.monotonic() - began
            assert code == 0, output
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
                found = read(kind)
            results[kind, version] = snapshot(get_folder(kind, base_dir)), found, seconds
        return results[kind, version]

    return measure


# ---------------------------------------------------------------------------------------------------------------------
# Several at once


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_processes", [2, 4])
def test_processes_at_once(kind, num_processes, inputs, base_dir, undisturbed):
    expected, found, _ = undisturbed(kind)
    inputs.requests.clear()
    outputs = [finish(child) for child in [start(kind, inputs, base_dir) for _ in range(num_processes)]]
    assert [code for code, _ in outputs] == [0] * num_processes, outputs
    assert snapshot(get_folder(kind, base_dir)) == expected and read(kind) == found
    if kind == "download":
        assert len(inputs.requests) == 3, "each shard came once"
    else:
        begun = {"files": "files of", "python-docs": "collecting", "tokenizer": "training a tokenizer"}[kind]
        assert sum(begun in output for _, output in outputs) == 1, "one made it, the others found it done"


def poll(kind, base_dir, stop, seen):
    """A reader's life: look again and again; `seen` gets the set of what it saw, or the error."""
    os.environ["NANOCHAT_BASE_DIR"] = str(base_dir)
    found = set()
    try:
        while not stop.is_set():
            found.add(read(kind))
        seen.put(found)
    except Exception as error:
        seen.put(error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_sees_nothing_or_a_whole_one(kind, inputs, base_dir, undisturbed):
    hashes = [undisturbed(kind, version)[1] for version in range(2)]
    stop, seen = FORKS.Event(), FORKS.Queue()
    readers = [FORKS.Process(target=poll, args=(kind, base_dir, stop, seen)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for version in (0, 1) * (1 if kind in ("download", "tokenizer") else 2):
        assert run(kind, inputs, base_dir, version=version)[0] == 0
    stop.set()
    for found in [seen.get(timeout=60) for _ in readers]:
        assert not isinstance(found, Exception), found
        # A download may be used from its first training shard on
        assert found - {None} and (kind == "download" or found <= {None, *hashes})
    for reader in readers:
        reader.join(60)


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def require_mended(kind, inputs, base_dir, version, expected, found):
    """The next run succeeds, gives what an undisturbed one gives, and leaves nothing else behind."""
    before = read(kind)
    code, output = run(kind, inputs, base_dir, version=version)
    assert code == 0, output
    assert snapshot(get_folder(kind, base_dir)) == expected and read(kind) == found
    siblings = {path.name for path in get_folder(kind, base_dir).parent.iterdir()}
    assert siblings == {"made", "made.lock"}
    return before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("events", [RENAMES, pytest.param(WRITES, marks=pytest.mark.slow)], ids=["rename", "write"])
def test_killed_before_each(events, kind, inputs, base_dir, undisturbed):
    """Version 1 takes the place of version 0, and is killed once before each such file operation that it makes."""
    old, (expected, new, _) = undisturbed(kind), undisturbed(kind, 1)
    assert run(kind, inputs, base_dir)[0] == 0
    shutil.copytree(base_dir, base_dir.with_name("saved"))
    num_kills, seen = 0, set()
    while True:
        code, output = run(kind, inputs, base_dir, version=1, kill_at=num_kills + 1, events=events)
        if code == 0:
            break
        assert code == -signal.SIGKILL, output
        num_kills += 1
        seen.add(require_mended(kind, inputs, base_dir, 1, expected, new))
        shutil.rmtree(base_dir)
        shutil.copytree(base_dir.with_name("saved"), base_dir)
    assert num_kills >= (4 if events == RENAMES else 12) and old[1] in seen
    assert new in seen or events == RENAMES, "what follows the last rename"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_random_moments(kind, inputs, base_dir, undisturbed):
    expected, found, seconds = undisturbed(kind)
    moments, num_killed = random.Random(3), 0
    while num_killed < NUM_TIMED_KILLS:
        child = start(kind, inputs, base_dir)
        time.sleep(seconds * (num_killed + moments.random()) / NUM_TIMED_KILLS)
        child.kill()
        if finish(child)[0] == 0:
            seconds *= 0.8  # it was done before the kill: the first measurement was of a busier machine
        else:
            num_killed += 1
        assert require_mended(kind, inputs, base_dir, 0, expected, found) in (None, found) or kind == "download"
        shutil.rmtree(base_dir)


# ---------------------------------------------------------------------------------------------------------------------
# Full and read-only disks


@pytest.fixture
def small_disk(base_dir):
    """`base_dir` as a disk of its own of 2 MiB."""
    base_dir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", base_dir]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield base_dir
    subprocess.run(["umount", "-l", base_dir], check=True)


def fill(disk, free_bytes):
    """Leave this much room on the disk."""
    filler = disk / "filler"
    filler.write_bytes(bytes(filler.stat().st_size if filler.exists() else 0))
    with open(filler, "ab", buffering=0) as file:
        file.write(bytes(shutil.disk_usage(disk).free - free_bytes))


def require_one_sentence(code, output, *phrases):
    assert code == 2 and "Traceback" not in output, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and output.rstrip().endswith(errors[0]), output
    assert all(phrase in errors[0] for phrase in phrases), errors


@pytest.mark.parametrize("kind", KINDS)
def test_full_disk(kind, inputs, small_disk, undisturbed):
    """The new version fails for want of space at ever later moments; the old one stays whole."""
    old, (expected, new, _) = undisturbed(kind), undisturbed(kind, 1)
    assert run(kind, inputs, small_disk)[0] == 0
    num_failures = 0
    for free_kib in (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        fill(small_disk, free_kib * 1024)
        code, output = run(kind, inputs, small_disk, version=1)
        (small_disk / "filler").unlink()
        if code == 0:
            break
        require_one_sentence(code, output, "the disk is full")
        assert read(kind) == old[1] or kind == "download" and read(kind)
        num_failures += 1
    assert num_failures >= 3
    require_mended(kind, inputs, small_disk, 1, expected, new)


@pytest.mark.parametrize("kind", KINDS)
def test_read_only_disk(kind, inputs, small_disk, undisturbed):
    assert run(kind, inputs, small_disk)[0] == 0
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    require_one_sentence(*run(kind, inputs, small_disk, version=1), "Read-only", "NANOCHAT_BASE_DIR")
    assert read(kind) == undisturbed(kind)[1], "reading needs no permission to write"


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and replaced shards under a running reader


def test_a_flipped_byte_is_found_before_its_text_is_used(inputs, base_dir):
    assert run("files", inputs, base_dir)[0] == 0
    path = load_shards("made").train[0]
    assert len(list(iter_documents([path]))) > 2000
    content, positions = path.read_bytes(), random.Random(5)
    for _ in range(30):
        position = positions.randrange(len(content))
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1:])
        with pytest.raises(UserError, match=r"shard_00000\.parquet is damaged .*--source files --name made .*--verify"):
            next(iter_documents([path]))
    assert run("files", inputs, base_dir)[0] == 0  # same size, whole footer
    path.write_bytes(content)
    assert len(list(iter_documents([path]))) > 2000


def test_data_replaced_under_a_reader_is_refused(inputs, base_dir):
    assert run("files", inputs, base_dir)[0] == 0
    documents = iter_documents(load_shards("made").train)
    next(documents)
    assert run("files", inputs, base_dir, version=1)[0] == 0
    with pytest.raises(UserError, match=r"shard_00000\.parquet was replaced .* begin a new run"):
        list(documents)
    assert list(iter_documents(load_shards("made").train))


def test_unfinished_files_of_the_dead_go_and_a_download_goes_on(inputs, base_dir):
    assert run("download", inputs, base_dir)[0] == 0
    folder = get_folder("download", base_dir)
    for name in ("manifest.json.123.tmp", "shard_00002.parquet.copy"):
        (folder / name).write_text("half")
    source = inputs.content(f"/datasets/{REPO}/resolve/main/shard_00002.parquet")
    (folder / "shard_00002.parquet.part").write_bytes(source[:5000])
    (folder / "shard_00002.parquet.part.etag").write_text(inputs.etag)
    inputs.requests.clear()
    assert run("download", inputs, base_dir, version=1)[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == \
        ["manifest.json", *(f"shard_0000{idx}.parquet" for idx in range(4)), "val.parquet"]
    assert "bytes=5000-" in [request.get("Range") for request in inputs.requests]


@pytest.mark.parametrize("suffix", [".tmp", ".lock"])
def test_names_of_what_is_beside_a_folder(base_dir, suffix):
    with pytest.raises(UserError, match=f"--name 'mine{suffix}' must be a plain folder name"):
        dataset.main(["--source", "python-docs", "--name", "mine" + suffix])
    with pytest.raises(UserError, match=f"the tokenizer 'mine{suffix}' must be a plain folder name"):
        get_tokenizer("mine" + suffix)
