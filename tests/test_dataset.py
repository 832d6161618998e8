"""nanochat/dataset.py: shards on disk, the sources, and the command with its exit codes."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import corpus, dataset, devices, download
from nanochat.common import UserError
from nanochat.corpus import Package
from nanochat.dataset import main
from nanochat.shards import count_groups, iter_documents, load_shards, read_group, read_manifest
from tests.data_helpers import (
    NUM_IN_REPO,
    REPO,
    Server,
    compress_zst,
    hash_shards,
    make_files,
    make_hub_shard,
    make_loader,
    make_package,
    write_documents,
)

VAL_NAME = f"shard_{NUM_IN_REPO - 1:05d}.parquet"
REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "pretrain"


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HF_ENDPOINT", "NANOCHAT_MIRROR_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.01)
    return tmp_path / "base"


@pytest.fixture
def texts(tmp_path):
    return write_documents(tmp_path / "texts")


# ---------------------------------------------------------------------------------------------------------------------
# files


def test_a_persons_own_files_are_not_replaced(texts, base_dir):
    folder = base_dir / "data" / "mine"
    shutil.copytree(texts, folder)
    before = sorted(os.listdir(folder))
    for path in (folder, texts):
        with pytest.raises(UserError, match="mine holds files that aren't nanochat's .*choose another --name"):
            make_files(path)
    assert sorted(os.listdir(folder)) == before
    shutil.rmtree(folder)
    make_files(texts)
    with pytest.raises(UserError, match="is where the data would be written; choose another --name"):
        make_files(folder)


def test_backups_beside_the_data_stay(texts, base_dir):
    folder = Path(make_files(texts)["folder"])
    for name in ("mine.old", "mine.new"):
        shutil.copytree(folder, folder.with_name(name))
    (texts / "more.txt").write_text("One more document.")
    make_files(texts)
    assert {path.name for path in folder.parent.iterdir()} >= {"mine", "mine.old", "mine.new"}
    shutil.rmtree(folder)
    make_files(texts)
    assert (folder.parent / "mine.old").is_dir()


def test_data_on_another_disk_stays_there(texts, base_dir, tmp_path):
    folder = Path(make_files(texts)["folder"])
    folder.rename(tmp_path / "big")
    folder.symlink_to(tmp_path / "big")
    (texts / "more.txt").write_text("One more document.")
    made = make_files(texts)
    assert folder.is_symlink() and load_shards(str(tmp_path / "big")).hash == made["hash"]
    assert not [path for path in (*tmp_path.iterdir(), *folder.parent.iterdir()) if path.name.startswith(".")]


def test_link_to_a_disk_that_is_not_there(texts, base_dir, tmp_path):
    (base_dir / "data").mkdir(parents=True)
    (base_dir / "data" / "mine").symlink_to(tmp_path / "gone" / "mine")
    with pytest.raises(UserError, match="mine leads to .*gone/mine, which isn't there; mount its disk"):
        make_files(texts)


def test_files_content(texts, base_dir, capsys):
    result = make_files(texts)
    assert "left out 2 of 3,003 documents" in capsys.readouterr().out
    shards = load_shards("mine")
    train, val = list(iter_documents(shards.train)), list(iter_documents([shards.val]))
    expected = {f"Document {part}-{idx}. " + "word " * (idx % 50) for part in range(3) for idx in range(1000)}
    assert sorted(train + val) == sorted(expected | {"the same thing"})
    assert not set(train) & set(val)
    assert 0.08 < sum(map(len, val)) / sum(map(len, train + val)) < 0.12
    parts = [doc[9] for doc in train if doc.startswith("Doc")]
    assert all(250 < parts[:1000].count(part) < 420 for part in "012"), "documents must be shuffled"
    assert [len(read_group(shards.train[0], idx)) for idx in range(2)] == [1024, 1024]
    manifest = json.loads((Path(result["folder"]) / "manifest.json").read_text())
    assert manifest["source"] == "files" and manifest["train"][0]["rows"] == len(train)
    assert sorted(os.listdir(result["folder"])) == ["manifest.json", "shard_00000.parquet", "val.parquet"]


def test_shuffle_is_the_same_for_any_number_of_buckets(texts, base_dir, monkeypatch):
    first = make_files(texts)["hash"]
    monkeypatch.setattr(dataset, "BUCKET_BYTES", 5_000)
    (base_dir / "data" / "mine" / "manifest.json").unlink()
    assert make_files(texts)["hash"] == first


def test_files_are_made_again_only_when_they_change(texts, base_dir):
    folder = Path(make_files(texts)["folder"])
    stamp = (folder / "manifest.json").stat().st_ino
    make_files(texts)
    assert (folder / "manifest.json").stat().st_ino == stamp
    (texts / "new.txt").write_text("something new")
    make_files(texts)
    assert "something new" in list(iter_documents([*load_shards("mine").train, load_shards("mine").val]))


def test_a_failed_build_leaves_the_old_data(texts, base_dir):
    before = make_files(texts)
    (texts / "broken.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"broken\.jsonl:1"):
        make_files(texts)
    assert load_shards("mine").hash == before["hash"]
    assert sorted(path.name for path in (base_dir / "data").iterdir()) == ["mine", "mine.lock"]


@pytest.mark.parametrize(("contents", "message"), [
    ([], r"0 different documents \(it is empty\)"), (["  \n"], "holds 0 different documents;"),
    (["one"], "holds 1 different documents;"), (["same"] * 5, "holds 1 different documents;"),
])
def test_too_little_text(tmp_path, base_dir, contents, message):
    folder = tmp_path / "few"
    folder.mkdir()
    for idx, content in enumerate(contents):
        (folder / f"{idx}.txt").write_text(content)
    with pytest.raises(UserError, match=message):
        main(["--source", "files", "--path", str(folder)])


def test_two_documents_are_enough(tmp_path, base_dir):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    for name in ("two", "again"):    # the base folder is among what is read, but for what is made there
        main(["--source", "files", "--path", str(tmp_path), "--name", name])
        shards = load_shards(name)
        assert sorted(iter_documents([*shards.train, shards.val])) == ["one", "two"]
    assert read_manifest(base_dir / "data" / "again").account.reasons == {
        "holds what nanochat has made": {"outcome": "skipped", "files": 1, "names": ["base"]}}


def make_folder(folder, contents):
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_validation_is_a_tenth_of_the_distinct_text(tmp_path, base_dir):
    rows = [json.dumps({"text": f"Document {idx}. " + "word " * (idx % 50)}) + "\n" for idx in range(400)]
    vals = []
    for times in (1, 3, 12):
        make_folder(tmp_path / f"{times}", {"rows.jsonl": "".join(rows * times)})
        main(["--source", "files", "--path", str(tmp_path / f"{times}"), "--name", "mine"])
        shards = load_shards("mine")
        vals.append(list(iter_documents([shards.val])))
        train = list(iter_documents(shards.train))
        assert len(train) + len(vals[-1]) == 400 and not set(train) & set(vals[-1])
        assert 0.1 < sum(map(len, vals[-1])) / sum(map(len, vals[-1] + train)) < 0.12
    assert vals[0] == vals[1] == vals[2]


def test_the_account_adds_up(tmp_path, base_dir, capsys):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("one", None, "two", " ", "one", "three"))
    folder = make_folder(tmp_path / "mixed", {
        "a.txt": "four", "b.txt.gz": gzip.compress(b"five"), "c.jsonl": rows, "e.md": "one",
        "d.jsonl.zst": compress_zst(rows.encode() * 900)[:-3],    # damaged after some of its rows
        "page.html": "<p>six", "data.bin": "x" * 100, ".hidden": ""})
    make_files(folder)
    account, told = read_manifest(base_dir / "data" / "mine").account, capsys.readouterr().out
    assert account.files == {"read": 4, "left out": 3, "skipped": 1}
    assert account.formats == {".txt": 2, ".jsonl": 1, ".md": 1}
    assert sum(account.bytes.values()) == sum(path.stat().st_size for path in folder.iterdir())
    assert account.documents == {"kept": 5, "without text": 1, "blank": 1, "exact repeats of others": 2}
    assert account.characters == {"kept": 19, "without text": 0, "blank": 1, "exact repeats of others": 6}
    shards = load_shards("mine")
    assert sorted(iter_documents([*shards.train, shards.val])) == ["five", "four", "one", "three", "two"]
    for line in ("read 4 of 7 files (1 .jsonl, 1 .md, 2 .txt)", "left out d.jsonl.zst: is not a whole zstd file",
                 "left out page.html: is markup", "left out data.bin: has none of the formats", "skipped .hidden",
                 "left out 4 of 9 documents: ", "kept 5 documents of 19 characters", "WARNING: 42.9% of the files",
                 "WARNING: 44.4% of the documents", "WARNING: 26.9% of the characters"):
        assert f"\n{line}" in told, line
    (folder / ".another").touch()
    make_files(folder)    # nothing to do, but said again
    assert capsys.readouterr().out.startswith("read 4 of 7 files")
    (folder / "page.html").unlink()
    make_files(folder)
    assert read_manifest(base_dir / "data" / "mine").account.files["left out"] == 2


@pytest.mark.parametrize("path", ["", "part1.jsonl"])
def test_a_dataset_of_before_is_not_made_again(texts, base_dir, path):
    """Data that was made before accounts were kept is valid, if no file of the folder is left out."""
    (texts / "part1").mkdir()
    (texts / "part1" / "a.txt").write_text("more")
    manifest = Path(make_files(texts / path)["folder"]) / "manifest.json"
    content = json.loads(manifest.read_text())
    names = ["part0.jsonl", "part1.jsonl", "part1/a.txt", "part2.jsonl"] if not path else ["."]
    stats = [(texts / path / name).stat() for name in names]
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in zip(names, stats, strict=True)]
    assert content["settings"] == {"corpus_version": 1, "seed": 42, "text_column": "text", "path": str(texts / path),
                                   "files": hashlib.sha256(json.dumps(stats).encode()).hexdigest()}
    del content["account"]
    manifest.write_text(json.dumps(content))
    stamp, result = manifest.stat().st_ino, make_files(texts / path)
    assert manifest.stat().st_ino == stamp and load_shards("mine").hash == result["hash"]


@pytest.mark.parametrize("name", ["mit Blank und 'Apostroph'", "café", b"caf\xe9", "two\nlines"])
def test_any_name_of_a_folder(tmp_path, base_dir, name, capfd):
    folder = make_folder(tmp_path / os.fsdecode(name), {
        "a.txt": "one", os.fsdecode(b"b\xff.txt"): "two", os.fsdecode(b"\xff.bin"): "three"})
    result = make_files(folder)
    manifest = (Path(result["folder"]) / "manifest.json").read_bytes().decode("utf-8")    # must be valid
    assert "\\\\xff.bin" in manifest and result["num_chars"] == 3
    command = json.loads(manifest)["command"]
    words = subprocess.run(["bash", "-c", command.replace("python -m nanochat.dataset", "printf '%s\\0'")],
                           capture_output=True, check=True).stdout.split(b"\0")
    assert words[words.index(b"--path") + 1] == os.fsencode(folder)
    stamp = (Path(result["folder"]) / "manifest.json").stat().st_ino
    make_files(folder)
    assert (Path(result["folder"]) / "manifest.json").stat().st_ino == stamp
    assert r"left out \xff.bin" in capfd.readouterr().out


def test_a_path_that_is_no_folder(tmp_path, base_dir):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "self").symlink_to("self")
    for path, message in (("pipe.txt", "is a named pipe; copy"), ("self", "can't be read"), ("no", "can't be read"),
                          ("/dev/null", "is a device")):
        with pytest.raises(UserError, match=message):
            make_files(tmp_path / path)


def test_another_locale(tmp_path):
    """Everything is UTF-8 in a locale that isn't, and what was made in one locale is valid in another."""
    folder = make_folder(tmp_path / "données", {"é.txt": "un", "b.txt": "deux", "ñ.bin": ""})
    env = {name: value for name, value in os.environ.items() if not name.startswith("LC_")} | {
        "NANOCHAT_BASE_DIR": str(tmp_path / "état"), "OMP_NUM_THREADS": "1"}
    words = ["--source", "files", "--path", str(folder), "--name", "été"]
    told = [run_command(*words, env=env | extra) for extra in (
        {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONIOENCODING": "utf-8"}, {})]
    assert [(result.returncode, result.stderr) for result in told] == [(0, "")] * 2
    assert "reading" in told[0].stdout and "reading" not in told[1].stdout
    manifest = json.loads((tmp_path / "état" / "data" / "été" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["path"] == str(folder)


@pytest.mark.skipif(not REAL_DATA.exists(), reason="needs ../shared/data/pretrain")
def test_real_prose(base_dir):
    main(["--source", "files", "--path", str(REAL_DATA), "--name", "prose"])
    shards = load_shards("prose")
    count = sum(1 for _ in iter_documents([*shards.train, shards.val]))
    assert count == 3 * 8082 + 2048  # every document, none twice


# ---------------------------------------------------------------------------------------------------------------------
# The source where none is named


@pytest.mark.parametrize(("names", "visible", "works", "source"), [
    ((), None, False, "python-docs"), (("NVIDIA H100",), None, True, "climbmix"),
    (("NVIDIA H100",), None, False, "climbmix"),    # the driver is too old for this torch, say
    (("NVIDIA H100",), "", False, "python-docs"),   # hidden
    ((), None, True, "climbmix")])                  # of AMD
def test_source_of_a_machine(names, visible, works, source, monkeypatch, capsys):
    """It follows from the GPU that is there, not from whether this torch can use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: works)
    monkeypatch.setattr(devices, "find_driver", lambda: devices.Driver("470.1", names))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert dataset.parse_args([]).source == source
    there = "a GPU is there" if source == "climbmix" else "no GPU is there"
    assert capsys.readouterr().out == f"source: {source} ({there}; see --source)\n"


# ---------------------------------------------------------------------------------------------------------------------
# python-docs


def test_python_docs_is_deterministic(tmp_path, base_dir, monkeypatch, capsys):
    made = []
    for idx in range(2):
        paths = make_package(tmp_path / f"tree{idx}")
        package = Package("pkg", "1.0", tmp_path / f"tree{idx}", corpus.choose_paths(paths))
        monkeypatch.setattr(corpus, "find_packages", lambda package=package: [package])
        folder = Path(main(["--source", "python-docs", "--name", f"docs{idx}"])["folder"])
        made.append((hash_shards(folder), json.loads((folder / "manifest.json").read_text())["settings"]))
    assert made[0] == made[1]
    assert made[0][1]["versions"] == {"pkg": "1.0"}
    stamp = (folder / "manifest.json").stat().st_ino
    main(["--source", "python-docs", "--name", "docs1"])
    assert (folder / "manifest.json").stat().st_ino == stamp, "nothing to do"
    monkeypatch.setattr(corpus, "find_packages", lambda: [Package("pkg", "1.1", package.root, package.paths)])
    main(["--source", "python-docs", "--name", "docs1"])
    assert (folder / "manifest.json").stat().st_ino != stamp, "other versions"
    assert capsys.readouterr().out.count("building it again: it was made with other pkg; runs that began on") == 1


@pytest.mark.slow
def test_python_docs_for_real(base_dir):
    result = main(["--source", "python-docs"])
    assert 25e6 < result["num_chars"] < 90e6
    shards = load_shards("python-docs")
    val_chars = sum(map(len, iter_documents([shards.val])))
    assert 0.01 < val_chars / result["num_chars"] < 0.02
    for doc in iter_documents([*shards.train, shards.val]):
        assert sysconfig.get_path("stdlib") not in doc and sysconfig.get_path("purelib") not in doc
        assert corpus.MIN_DOC_CHARS <= len(doc) <= corpus.MAX_DOC_CHARS


# ---------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(monkeypatch):
    """A local server in the place of the hub; `hub.files` is what it has."""
    with Server() as server:
        server.files = {name: make_hub_shard(name)
                        for name in [*(f"shard_{idx:05d}.parquet" for idx in range(4)), VAL_NAME]}
        prefix = f"/datasets/{REPO}/resolve/main/"
        server.content = lambda path: server.files.get(path.removeprefix(prefix))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


def fetch_shards(*extra):
    return main(["--source", "climbmix", "-w", "2", *extra])


def test_token_with_a_newline_and_one_that_is_none(hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "secret\n")    # as a mounted file has it
    fetch_shards("-n", "1")
    assert all(request["Authorization"] == "Bearer secret" for request in hub.requests)
    monkeypatch.setenv("HF_TOKEN", "secr\u2026et")
    with pytest.raises(UserError, match="HF_TOKEN holds characters that no token has") as error:
        fetch_shards("-n", "2")
    assert "secr" not in str(error.value) + capsys.readouterr().out


def test_hub_download_and_growth(hub, base_dir, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    folder = Path(fetch_shards("-n", "2")["folder"])
    assert any(request["path"].endswith(VAL_NAME) for request in hub.requests[:2]), "validation comes first"
    assert all(request["Authorization"] == "Bearer secret" for request in hub.requests)
    assert sorted(os.listdir(folder)) == ["manifest.json", "shard_00000.parquet", "shard_00001.parquet", "val.parquet"]
    shards = load_shards("climbmix")
    assert shards.val.read_bytes() == hub.files[VAL_NAME] and count_groups(shards.val) == 3
    assert [path.read_bytes() for path in shards.train] == [hub.files[f"shard_0000{idx}.parquet"] for idx in range(2)]
    entry = json.loads((folder / "manifest.json").read_text())["train"][0]
    assert entry["rows"] == 300 and entry["groups"] == 3 and entry["chars"] > 300 * 600
    num_requests = len(hub.requests)
    fetch_shards()
    assert len(hub.requests) == num_requests, "as many as the last time are there"
    fetch_shards("-n", "4")
    assert len(hub.requests) == num_requests + 2
    assert [path.name for path in load_shards("climbmix").train] == [f"shard_0000{idx}.parquet" for idx in range(4)]
    (folder / "shard_00002.parquet").write_bytes(b"PAR1")
    fetch_shards()
    assert load_shards("climbmix", verify=True).train[2].read_bytes() == hub.files["shard_00002.parquet"]


def test_hub_verify_fetches_damaged_shards_again(hub, base_dir):
    folder = Path(fetch_shards("-n", "2")["folder"])
    content = hub.files["shard_00001.parquet"]
    (folder / "shard_00001.parquet").write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    fetch_shards()
    assert (folder / "shard_00001.parquet").read_bytes() != content
    fetch_shards("--verify")
    assert (folder / "shard_00001.parquet").read_bytes() == content


def test_hub_accidents(hub, base_dir):
    hub.script = ["drop", "500", "truncate", "429", "drop"]
    fetch_shards("-n", "3")
    assert load_shards("climbmix", verify=True).train[2].read_bytes() == hub.files["shard_00002.parquet"]


@pytest.mark.parametrize("bad", [VAL_NAME, "shard_00001.parquet"])
def test_a_corrupt_shard_is_named_and_the_others_kept(hub, base_dir, bad):
    hub.files[bad], good = b"PAR1" + b"\0" * 5000 + b"PAR1", hub.files[bad]
    with pytest.raises(UserError, match=f"1 of 3 shards could not be fetched .*{bad}.*corrupt"):
        fetch_shards("-n", "2")
    kept = json.loads((base_dir / "data" / "climbmix" / "manifest.json").read_text())
    assert len(kept["train"]) + bool(kept["val"]) == 2
    if bad == VAL_NAME:
        with pytest.raises(UserError, match="no validation shard"):
            load_shards("climbmix")
    hub.files[bad] = good
    num_requests = len(hub.requests)
    fetch_shards()
    assert len(hub.requests) == num_requests + 1 and len(load_shards("climbmix").train) == 2


def test_other_columns_and_empty_shards_are_refused(hub, base_dir):
    for table in (pa.table({"body": ["x"]}), pa.table({"text": [""]}), pa.table({"text": ["x", None]}),
                  pa.table({"text": [1, 2]})):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        hub.files["shard_00000.parquet"] = sink.getvalue().to_pybytes()
        with pytest.raises(UserError, match="shard_00000.parquet: .*corrupt"):
            fetch_shards("-n", "1")


def test_offline_mirror(hub, base_dir, tmp_path, monkeypatch):
    mirror = tmp_path / "mirror" / REPO
    mirror.mkdir(parents=True)
    for name, content in hub.files.items():
        (mirror / name).write_bytes(content)
    monkeypatch.setenv("NANOCHAT_MIRROR_DIR", str(tmp_path / "mirror"))
    fetch_shards("-n", "3")
    assert not hub.requests and len(load_shards("climbmix", verify=True).train) == 3
    (mirror / "shard_00003.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="shard_00003.parquet is corrupt"):
        fetch_shards("-n", "4")
    (mirror / "shard_00003.parquet").unlink()
    with pytest.raises(UserError, match="shard_00003.parquet isn't there"):
        fetch_shards("-n", "4")
    assert len(load_shards("climbmix").train) == 3


STORIES = dataset.HUB_SOURCES["tinystories"]


def test_a_source_with_names_of_its_own(hub, base_dir, monkeypatch):
    """Its validation is the hub's own split; it has fewer shards than are fetched by default; one document is empty."""
    files = {name: make_hub_shard(name) for name in (*STORIES.train, STORIES.val)}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["", *(f"Once upon a time there was a cat, {i}." for i in range(400))]}), sink)
    files[STORIES.train[1]] = sink.getvalue().to_pybytes()
    prefix = f"/datasets/{STORIES.repo}/resolve/main/"
    hub.content, hub.script = lambda path: files.get(path.removeprefix(prefix)), ["500", "drop", "truncate"]
    folder = Path(main(["--source", "tinystories", "-n", "1"])["folder"])
    assert sorted(os.listdir(folder)) == ["manifest.json", "shard_00000.parquet", "val.parquet"]
    assert (folder / "val.parquet").read_bytes() == files[STORIES.val]
    (folder / "shard_00000.parquet").write_bytes(b"PAR1")
    main(["--source", "tinystories", "-n", "2"])
    shards = load_shards("tinystories", verify=True)
    assert [path.read_bytes() for path in shards.train] == [files[name] for name in STORIES.train[:2]]
    assert make_loader(shards).next_step()
    with pytest.raises(UserError, match="roneneldan/TinyStories has 4 training shards"):
        main(["--source", "tinystories", "-n", "5"])
    assert main(["--source", "tinystories", "--name", "all"])["num_shards"] == 4
    del files[STORIES.val]
    with pytest.raises(UserError, match=r"1 of 2 shards could not be fetched .*\(validation\): .*404"):
        main(["--source", "tinystories", "-n", "1", "--name", "third"])


# ---------------------------------------------------------------------------------------------------------------------
# The command


def run_command(*words, **options):
    return subprocess.run([sys.executable, "-m", "nanochat.dataset", *words], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1], timeout=120, **options)


def test_exit_codes(hub, base_dir, texts):
    good = run_command("--source", "climbmix", "-n", "1")
    assert good.returncode == 0, good.stderr
    del hub.files[VAL_NAME]
    missing = run_command("--source", "climbmix", "-n", "1", "--name", "other")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: 1 of 2 shards") and VAL_NAME in missing.stderr and "404" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert run_command("--source", "nowhere").returncode == 2


@pytest.mark.parametrize(("words", "message"), [
    (["--source", "files"], "needs --path"),
    (["--source", "python-docs", "-n", "3"], "--num-shards means nothing for --source python-docs"),
    (["--source", "climbmix", "--seed", "3"], "--seed means nothing"),
    (["--source", "climbmix", "-n", "0"], "--num-shards 0 is out of range"),
    (["--source", "climbmix", "-n", "6543"], "6,542 training shards"),
    (["--source", "python-docs", "--name", "../up"], "plain folder name"),
    (["--source", "python-docs", "--name", "x" * 300], "plain folder name"),
    (["--source", "python-docs", "--name", "up.lock"], "plain folder name"),
])
def test_flags_that_do_not_fit(base_dir, words, message):
    with pytest.raises(UserError, match=message):
        main(words)


def test_a_name_has_one_source(texts, hub, base_dir):
    make_files(texts)
    with pytest.raises(UserError, match="holds data from files; choose another --name"):
        main(["--source", "climbmix", "--name", "mine"])


def start_command(*words):
    return subprocess.Popen([sys.executable, "-m", "nanochat.dataset", *words], cwd=Path(__file__).parents[1],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_is_continued(hub, base_dir, number):
    hub.files["shard_00000.parquet"] = pad_shard(hub.files["shard_00000.parquet"])
    hub.delay_seconds = 0.2
    process = start_command("--source", "climbmix", "-n", "1", "-w", "1")
    part = base_dir / "data" / "climbmix" / "shard_00000.parquet.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 2**20):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else -9), output
    assert part.exists() and not part.with_suffix("").exists()
    hub.delay_seconds = 0.0
    fetch_shards()
    assert int(hub.requests[-1]["Range"][6:-1]) > 2**20, "it went on from the .part"
    assert load_shards("climbmix", verify=True).train[0].read_bytes() == hub.files["shard_00000.parquet"]


def pad_shard(content):
    """The same shard with a column of 8 MB more, so that it takes a while to come."""
    sink = pa.BufferOutputStream()
    table = pq.read_table(pa.BufferReader(content))
    pq.write_table(table.append_column("padding", pa.array([os.urandom(28_000)] * len(table))), sink,
                   compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


def test_two_processes_at_once(hub, base_dir):
    hub.delay_seconds = 0.05
    processes = [start_command("--source", "climbmix", "-n", "4") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(hub.requests) == 5, "each shard came once"
    assert len(load_shards("climbmix", verify=True).train) == 4
