"""A checkpoint's files: whole whatever instant the process died at, told apart from damaged ones, deleted by rule."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import (
    FORMAT_VERSION,
    MODEL_NAME,
    find_step,
    list_steps,
    load_meta,
    load_model,
    read_latest,
    restore,
    save_checkpoint,
)
from nanochat.command_line import run_script
from nanochat.common import Ranks, UserError, get_base_dir
from nanochat.run import RunLog, read_info, read_metrics
from tests.helpers import (
    BYTE_TOKENIZER,
    CPU,
    TINY,
    assert_same_weights,
    make_meta,
    make_model,
    make_trained,
    run_program,
    save_run,
)

pytestmark = pytest.mark.usefixtures("byte_base")


@pytest.mark.parametrize("keep_last, left", [(1, [5]), (2, [3, 5]), (None, [1, 3, 5]), (9, [1, 3, 5])])
def test_keep_last(keep_last, left):
    assert list_steps(save_run(steps=(1, 3, 5), keep_last=keep_last)) == left


def test_keep_last_never_deletes_what_latest_names():
    run_dir = save_run(steps=(8, 9))
    model, optimizer = make_trained(num_steps=4)
    save_checkpoint(run_dir, 4, model, optimizer, make_meta(optimizer), keep_last=1)
    assert read_latest(run_dir) == 4 and 4 in list_steps(run_dir)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("saved_step", [3, 2])  # a new one, and once more the one that is there
def test_killed_at_any_call_leaves_a_whole_checkpoint(saved_step):
    result = run_program("kill_save", saved_step)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line for line in lines if "error" in line] == []
    assert len(lines) > 10 and [line["status"] for line in lines[:-1]] == [9] * (len(lines) - 1)
    assert lines[0]["step"] == 2 and lines[-1] == {"n": len(lines) - 1, "status": 0, "step": saved_step}


def test_files_are_on_the_disk_before_they_have_their_names(monkeypatch):
    """A power cut may undo what isn't synced: the files and their folder before the rename, then its new name, and only
    then `latest`, which leads to it."""
    events, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda file: events.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(os, "rename", lambda *paths: events.append("rename") or rename(*paths))
    run_dir = save_run(steps=(1,))
    folder, place = run_dir / "step_000001", events.index("rename")
    assert {path.stat().st_ino for path in (folder, *folder.iterdir())} <= set(events[:place])
    assert events[place + 1:] == [path.stat().st_ino for path in (run_dir, run_dir / "latest", run_dir)]


def test_leftovers_of_a_kill_are_passed_over():
    run_dir = save_run(steps=(1,))
    shutil.copytree(run_dir / "step_000001", run_dir / "step_000007.tmp")
    assert list_steps(run_dir) == [1] and find_step(run_dir) == 1
    model, optimizer = make_trained(num_steps=7)
    save_checkpoint(run_dir, 7, model, optimizer, make_meta(optimizer))
    assert list_steps(run_dir) == [1, 7] and not (run_dir / "step_000007.tmp").exists()


@pytest.mark.parametrize("error", ["No space left on device (os error 28)", "Disk quota exceeded (os error 122)"])
def test_full_disk_is_told_and_loses_nothing(error, monkeypatch, capsys):
    run_dir = save_run(steps=(1,))

    def fill_disk(tensors, path, metadata):
        Path(path).write_bytes(b"part")
        raise SafetensorError(f"Error while serializing: I/O error: {error}")
    monkeypatch.setattr(checkpoint_manager, "save_file", fill_disk)
    with pytest.raises(SystemExit) as ending:
        run_script(lambda argv: save_run(steps=(2,)))
    assert ending.value.code == 2
    assert "the disk is full" in capsys.readouterr().err
    assert list_steps(run_dir) == [1] and not (run_dir / "step_000002.tmp").exists()
    assert load_model("base", CPU)[2]["step"] == 1


def mount_disk(folder):
    """What to put before a command so that it sees a disk of its own of 2 MB at `folder`."""
    folder.mkdir()
    command = ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=2m none '{folder}' && exec \"$@\"", "sh"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    return command


def test_a_disk_that_is_really_full(byte_base):
    """On a file system of 2 MB, all but 100 KB of it taken."""
    disk = byte_base / "disk"
    result = run_program("full_disk", disk, before=mount_disk(disk))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: the disk is full") and result.stderr.count("\n") == 1
    assert result.stdout.splitlines()[-1] == "['filling', 'latest', 'step_000001'] 1"


def test_read_only_folder_is_one_sentence(byte_base):
    disk = byte_base / "disk"
    result = run_program("read_only_disk", disk, before=mount_disk(disk))
    assert result.stdout.splitlines()[-2:] == ["2 1", "2 1"], result.stderr
    for line, name in zip(result.stderr.splitlines(), ("d2.lock", "d2/step_000002.tmp"), strict=True):
        assert line.startswith(f"error: no permission for {disk}/runs/base/{name} (Read-only file system); change it")


@pytest.mark.parametrize("name", ["model.safetensors", "optim_0.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_file_is_named_with_the_steps_left(name, damage):
    run_dir = save_run(steps=(1, 2))
    path = run_dir / "step_000002" / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data if damage == "flipped" else data[:-100])
    if damage == "missing":
        path.unlink()
    model = make_model(TINY)
    word = "missing" if damage == "missing" else "damaged"
    with pytest.raises(UserError, match=f"step_000002/{name} is {word}; use another step: 1"):
        restore(run_dir, 2, model, model.setup_optimizer())
    restore(run_dir, 1, model, model.setup_optimizer())


def test_damaged_meta_and_pointer_are_named():
    run_dir = save_run(steps=(1,))
    path = run_dir / "step_000001" / "meta.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="meta.json is damaged"):
        load_model("base", CPU)
    (run_dir / "latest").write_text("nonsense\n")
    with pytest.raises(UserError, match="latest doesn't name a step; give one yourself: its folder has 1"):
        load_model("base", CPU)


def test_no_flipped_bit_of_meta_goes_unnoticed():
    """A digit of the loader's place or of the optimizer's steps would be another run, without any error."""
    run_dir = save_run(steps=(1, 2))
    path = run_dir / "step_000002" / "meta.json"
    content, meta = path.read_bytes(), load_meta(run_dir, 2)
    num_refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        try:
            assert load_meta(run_dir, 2).items() >= meta.items()  # all but the name of the checksum
        except UserError as error:
            num_refused += 1
            assert "use another step: 1" in str(error) or "has format" in str(error)
    assert num_refused > 0.6 * len(content)  # the rest is space between the values


def test_newer_format_is_refused():
    run_dir = save_run(steps=(1,))
    path = run_dir / "step_000001" / "meta.json"
    newer = FORMAT_VERSION + 1
    path.write_text(path.read_text().replace(f'"format": {FORMAT_VERSION}', f'"format": {newer}'))
    model = make_model(TINY)
    for load in (lambda: load_model("base", CPU), lambda: restore(run_dir, 1, model, model.setup_optimizer())):
        with pytest.raises(UserError, match=f"{path.parent} has format {newer}, but this nanochat reads up to "
                                            f"{FORMAT_VERSION}; update nanochat"):
            load()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_not_saved(value):
    run_dir = save_run(steps=(1,))
    model, optimizer = make_trained()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = value
    with pytest.raises(UserError, match="lm_head.weight has values that are not finite at step 2, so this step was"):
        save_checkpoint(run_dir, 2, model, optimizer, make_meta(optimizer), keep_last=1)
    assert sorted(path.name for path in run_dir.iterdir()) == ["latest", "step_000001"]
    assert load_model("base", CPU)[2]["step"] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' file names are Unicode")
def test_base_folder_with_a_name_that_is_not_utf8(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", os.fsdecode(os.fsencode(tmp_path) + b"/l'\xe9t\xe9 d'avant"))
    BYTE_TOKENIZER.save(get_base_dir() / "tokenizer" / "default")
    run_dir = save_run()
    expected, optimizer = make_trained(num_steps=1)
    model, _, meta = load_model("base", CPU)
    assert_same_weights(model, expected)
    restore(run_dir, 1, model, optimizer)
    log = RunLog(run_dir, meta, Ranks())
    log.write("sample", 1, text=meta["run_dir"])
    log.close("finished")
    assert read_info(run_dir)["run_dir"] == read_metrics(run_dir)[0]["text"] == str(run_dir)


def test_no_pickle_on_disk():
    run_dir = save_run()
    assert {path.suffix for path in run_dir.rglob("*") if path.is_file()} == {".safetensors", ".json", ""}
    assert (run_dir / "step_000001" / MODEL_NAME).read_bytes()[8:9] == b"{"
