"""Checkpoints: what is saved comes back, whatever instant the process died at; damaged or foreign files are refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from nanochat import checkpoint_files, checkpoint_manager
from nanochat.checkpoint_manager import (
    FORMAT_VERSION,
    MODEL_NAME,
    Checkpointer,
    SaveRules,
    build_model,
    claim_folder,
    find_saved,
    find_step,
    find_tag,
    get_run_dir,
    list_steps,
    load_meta,
    load_model,
    load_tensors,
    read_latest,
    remove_old_checkpoints,
    restore,
    save_checkpoint,
)
from nanochat.common import UserError, run_script
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer, get_tokenizer_dir
from nanochat.train import train_step
from tests.helpers import (
    BYTE_TOKENIZER,
    CPU,
    TINY,
    assert_same_weights,
    choose_port,
    make_batch,
    make_meta,
    make_model,
    make_trained,
    run_program,
    save_run,
    start_script,
)


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    BYTE_TOKENIZER.save(get_tokenizer_dir())
    return tmp_path


# ---------------------------------------------------------------------------------------------------------------------
# Round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_steps", [0, 3])  # stopped before the first step, or later
def test_training_goes_on_as_if_never_stopped(dtype, num_steps):
    model, optimizer = make_trained(dtype, num_steps)
    run_dir = get_run_dir("base", "d2")
    save_checkpoint(run_dir, num_steps, model, optimizer, make_meta(optimizer, loader={"lanes": [[0, 1, 2]]}))
    other = build_model(TINY, dtype, CPU)
    other_optimizer = other.setup_optimizer()
    restore(run_dir, num_steps, other, other_optimizer)
    meta = load_meta(run_dir, num_steps)
    assert meta["step"] == num_steps and meta["loader"] == {"lanes": [[0, 1, 2]]}
    assert meta["files"].keys() == {"model.safetensors", "optim_0.safetensors"}
    assert_same_weights(model, other)
    for step in range(10, 13):
        stats = [train_step(m, o, make_batch(step), 4) for m, o in ((model, optimizer), (other, other_optimizer))]
        assert stats[0] == stats[1]
    assert_same_weights(model, other)


def test_optimizer_state_is_named_after_parameters():
    model, _ = make_trained()
    run_dir = save_run()
    tensors = load_tensors(run_dir / "step_000001" / "optim_0.safetensors", CPU)
    params = dict(model.named_parameters())
    assert {name.rsplit(".", 1)[0] for name in tensors} == params.keys()
    name = "transformer.h.1.mlp.c_fc.weight"  # each matrix by itself, though the optimizer stacks them
    assert tensors[f"{name}.momentum"].shape == params[name].shape


@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_load_into_any_dtype(saved_dtype, dtype):
    model, optimizer = make_trained(saved_dtype)
    save_checkpoint(get_run_dir("base", "d2"), 2, model, optimizer, make_meta(optimizer))
    loaded, tokenizer, meta = load_model("base", CPU, dtype=dtype)
    assert not loaded.training and loaded.compute_dtype == dtype and meta["step"] == 2
    assert tokenizer.hash == BYTE_TOKENIZER.hash and meta["run_dir"] == str(get_run_dir("base", "d2"))
    expected = build_model(TINY, dtype, CPU)
    assert {p.dtype for p in loaded.parameters()} == {p.dtype for p in expected.parameters()}
    for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b.to(a.dtype)), name
    logits, tolerance = loaded(make_batch(0).inputs), 1e-5 if dtype == saved_dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits.float(), model(make_batch(0).inputs).float(), rtol=0, atol=tolerance)


def test_latest_wins_over_a_higher_step():
    run_dir = save_run(steps=(9, 4))  # a shorter run, made later under the same tag
    assert list_steps(run_dir) == [4, 9]
    assert find_step(run_dir) == read_latest(run_dir) == find_saved("base", run_dir, "auto").step == 4
    assert load_model("base", CPU)[2]["step"] == 4
    assert load_model("base", CPU, step=9)[2]["step"] == 9


def test_keep_none_is_refused():
    with pytest.raises(UserError, match="--keep-last 0 would leave nothing"):
        save_run(keep_last=0)


@pytest.mark.parametrize("keep_last, left", [(1, [5]), (2, [3, 5]), (None, [1, 3, 5]), (9, [1, 3, 5])])
def test_keep_last(keep_last, left):
    assert list_steps(save_run(steps=(1, 3, 5), keep_last=keep_last)) == left


def test_keep_every_keeps_milestones_too():
    run_dir = get_run_dir("base", "d2")
    model, optimizer = make_trained()
    with Checkpointer(run_dir, SaveRules(keep_last=1, keep_every=3)) as saver:
        for step in range(1, 8):
            saver.save(step, model, optimizer, make_meta(optimizer))
    assert list_steps(run_dir) == [3, 6, 7]


def test_keep_last_never_deletes_what_latest_names():
    run_dir = save_run(steps=(8, 9))
    model, optimizer = make_trained(num_steps=4)
    save_checkpoint(run_dir, 4, model, optimizer, make_meta(optimizer), keep_last=1)
    assert read_latest(run_dir) == 4 and 4 in list_steps(run_dir)


# ---------------------------------------------------------------------------------------------------------------------
# Dying while saving


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("saved_step", [3, 2])  # a new one, and once more the one that is there
def test_killed_at_any_call_leaves_a_whole_checkpoint(saved_step):
    result = run_program("kill_save", saved_step)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line for line in lines if "error" in line] == []
    assert len(lines) > 10 and [line["status"] for line in lines[:-1]] == [9] * (len(lines) - 1)
    assert lines[0]["step"] == 2 and lines[-1] == {"n": len(lines) - 1, "status": 0, "step": saved_step}


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
    monkeypatch.setattr(checkpoint_files, "save_file", fill_disk)
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


def test_a_disk_that_is_really_full(base_dir):
    """On a file system of 2 MB, all but 100 KB of it taken."""
    disk = base_dir / "disk"
    result = run_program("full_disk", disk, before=mount_disk(disk))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: the disk is full") and result.stderr.count("\n") == 1
    assert result.stdout.splitlines()[-1] == "['filling', 'latest', 'step_000001'] 1"


def test_read_only_folder_is_one_sentence(base_dir):
    disk = base_dir / "disk"
    result = run_program("read_only_disk", disk, before=mount_disk(disk))
    assert result.stdout.splitlines()[-2:] == ["2 1", "2 1"], result.stderr
    for line, name in zip(result.stderr.splitlines(), ("d2.lock", "d2/step_000002.tmp"), strict=True):
        assert line.startswith(f"error: no permission for {disk}/runs/base/{name} (Read-only file system); change it")


# ---------------------------------------------------------------------------------------------------------------------
# Saving beside the training


class Gate:
    """Stands before `save_file`: writing begins when the gate is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.reached, save_file = threading.Event(), threading.Event(), checkpoint_files.save_file

        def wait_and_save(*args):
            self.reached.set()
            assert self.opened.wait(30)
            save_file(*args)
        monkeypatch.setattr(checkpoint_files, "save_file", wait_and_save)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def test_what_changes_after_save_is_not_saved(gate):
    run_dir = get_run_dir("base", "d2")
    model, optimizer = make_trained()
    expected, expected_optimizer = make_trained()
    with Checkpointer(run_dir) as saver:
        saver.save(2, model, optimizer, make_meta(optimizer))
        assert gate.reached.wait(30) and list_steps(run_dir) == []
        for step in range(10, 13):
            train_step(model, optimizer, make_batch(step), 4)
        gate.opened.set()  # the end of the block waits
    loaded = make_model(TINY, seed=1)
    loaded_optimizer = loaded.setup_optimizer()
    restore(run_dir, 2, loaded, loaded_optimizer)
    assert_same_weights(loaded, expected)
    for name, piece in expected_optimizer.get_named_state().items():
        assert torch.equal(loaded_optimizer.get_named_state()[name].tensor, piece.tensor), name


def test_one_save_at_a_time(gate):
    """The second waits for the first, whose copy in host memory it takes over."""
    run_dir = get_run_dir("base", "d2")
    trained = {step: make_trained(num_steps=step) for step in (1, 2)}
    returned = threading.Event()
    with Checkpointer(run_dir) as saver:
        saver.save(1, *trained[1], make_meta(trained[1][1]))

        def save_second():
            saver.save(2, *trained[2], make_meta(trained[2][1]))
            returned.set()
        second = threading.Thread(target=save_second)
        second.start()
        assert gate.reached.wait(30) and not returned.wait(0.3) and list_steps(run_dir) == []
        gate.opened.set()
        second.join()
    assert list_steps(run_dir) == [1, 2]
    for step, (model, _) in trained.items():
        assert_same_weights(load_model("base", CPU, step=step)[0], model)


@pytest.mark.parametrize("error", [RuntimeError("CUDA is gone"), SystemExit(143)])
def test_a_run_that_ends_badly_ends_its_save(gate, error):
    run_dir = get_run_dir("base", "d2")
    model, optimizer = make_trained()
    timer = threading.Timer(0.2, gate.opened.set)
    with pytest.raises(type(error)), Checkpointer(run_dir) as saver:
        saver.save(2, model, optimizer, make_meta(optimizer))
        timer.start()
        raise error
    assert list_steps(run_dir) == [2] and load_model("base", CPU)[2]["step"] == 2


def test_failed_save_is_known_and_raised_once(monkeypatch):
    run_dir = save_run(steps=(1,))
    model, optimizer = make_trained()

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error", "disk")
    with monkeypatch.context() as patch, Checkpointer(run_dir) as saver:
        patch.setattr(checkpoint_files, "save_file", fail)
        saver.save(2, model, optimizer, make_meta(optimizer))
        saver.thread.join()
        with pytest.raises(OSError, match="Input/output error"):
            saver.due(3, stopping=False, evaluating=False)
        assert saver.error is None and list_steps(run_dir) == [1] and not list(run_dir.glob("*.tmp"))
        patch.undo()
        saver.save(2, model, optimizer, make_meta(optimizer))
    assert list_steps(run_dir) == [1, 2]


def test_when_a_save_is_due(monkeypatch):
    """At steps and times, at the end, before a stop and before the first evaluation; never what is on disk already."""
    model, optimizer = make_trained()
    def list_due(saver, first_step, evals=(), stops=()):
        due = []
        for step in range(first_step, 10):
            saving, stopping = saver.due(step, step in stops, step in evals)
            assert stopping == (step in stops)
            if saving:
                saver.save(step, model, optimizer, make_meta(optimizer))
                due.append(step)
        saver.wait()
        return due
    run_dir = get_run_dir("base", "d2")
    assert list_due(Checkpointer(run_dir, last_step=9), 0, evals=(0, 3, 6)) == [3, 9]
    assert list_due(Checkpointer(run_dir, SaveRules(every=4), last_step=9, saved_step=4), 4, evals=(6,)) == [8, 9]
    assert list_due(Checkpointer(run_dir, last_step=20, saved_step=2), 2, evals=(3,), stops=(2, 5)) == [5]
    assert list_due(Checkpointer(run_dir, SaveRules(every_minutes=0), last_step=20), 0) == list(range(10))


def test_second_ctrl_c_does_not_wait_for_a_save():
    with start_script("tests.programs.slow_save") as process:
        try:
            for said in ("saving", "stopping"):
                assert said in list(iter(process.stdout.readline, f"{said}\n")) + [said] and process.poll() is None
                process.send_signal(signal.SIGINT)
            start = time.monotonic()
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130 and time.monotonic() - start < 10, stderr
    assert stderr.splitlines()[-1] == "stopped by Ctrl-C" and "Traceback" not in stderr
    assert list_steps(get_run_dir("base", "d2")) == [1] and load_model("base", CPU)[2]["step"] == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_full_disk_of_one_rank_stops_all():
    result = run_program("two_rank_save", choose_port(), "full")
    assert result.stdout.splitlines()[-1] == "[2, 2]", result.stderr
    run_dir = get_run_dir("base", "d2")
    path = run_dir / "step_000002.tmp" / "optim_1.safetensors"
    assert result.stderr.splitlines() == [f"error: the disk is full while writing {path}; what was saved before is "
                                          "intact, free some space and run again"] * 2
    assert sorted(path.name for path in run_dir.iterdir()) == ["latest", "step_000001"]
    assert load_model("base", CPU)[2]["world_size"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_stalled_save_of_one_rank_stops_all():
    """Rank 0 waits for it no longer than for anything else."""
    result = run_program("two_rank_save", choose_port(), "stalled")
    assert result.stdout.splitlines()[-1] == "[1, 1]", result.stderr
    assert "rank 0 can't reach the other ranks any more" in result.stderr and "for 3 s" in result.stderr
    assert read_latest(get_run_dir("base", "d2")) == 1


def test_disk_too_small_for_a_checkpoint(monkeypatch):
    run_dir = save_run()
    model, optimizer = make_trained()
    num_bytes = sum(tensor.nbytes for path in run_dir.glob("*/*.safetensors")
                    for tensor in load_tensors(path, CPU).values())
    monkeypatch.setattr(checkpoint_manager, "get_free_disk_bytes", lambda path: int(1.05 * num_bytes))
    Checkpointer(run_dir).check_disk(model, optimizer)
    monkeypatch.setattr(checkpoint_manager, "get_free_disk_bytes", lambda path: int(0.95 * num_bytes))
    with pytest.raises(UserError, match=r"a checkpoint takes 0\.\d\d GB, but .*/runs/base has only 0\.\d\d GB free; "
                                        "make room, or set NANOCHAT_BASE_DIR"):
        Checkpointer(run_dir).check_disk(model, optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged, missing, foreign


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


def test_pointer_to_a_deleted_step_is_an_error_not_a_crash():
    run_dir = save_run(steps=(1, 2))
    shutil.rmtree(run_dir / "step_000002")
    with pytest.raises(UserError, match="no checkpoint of step 2 in .*; it has 1"):
        load_model("base", CPU)
    with pytest.raises(UserError, match="no checkpoint of step 2 in .*; it has 1"):
        find_saved("base", run_dir, "auto")


def test_without_a_pointer_the_newest_step_counts():
    """A kill just before the first pointer was written, or a person, left none."""
    run_dir = save_run(steps=(1, 2))
    (run_dir / "latest").unlink()
    assert read_latest(run_dir) == find_saved("base", run_dir, "auto").step == 2
    assert load_model("base", CPU, tag="d2")[2]["step"] == 2
    claim_folder(run_dir, 2)
    assert (run_dir / "latest").read_text() == "step_000002\n"


@pytest.mark.parametrize("latest", [None, b"step_0000\xff1"])
def test_resume_none_keeps_a_run_whose_pointer_is_bad(latest):
    run_dir = save_run(steps=(1,))
    (run_dir / "latest").unlink()
    if latest:
        (run_dir / "latest").write_bytes(latest)
    claim_folder(run_dir, None)
    assert not run_dir.exists() and list_steps(run_dir.with_name("d2~1")) == [1]


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


def test_what_is_not_there_is_named():
    with pytest.raises(UserError, match="no base model in .*scripts.base_train"):
        load_model("base", CPU)
    with pytest.raises(UserError, match="no sft model in .*scripts.chat_sft"):
        load_model("sft", CPU)
    run_dir = save_run(tag="one", steps=(3,))
    with pytest.raises(UserError, match="no base run 'two'.* has one"):
        load_model("base", CPU, tag="two")
    with pytest.raises(UserError, match="no checkpoint of step 7 in .*; it has 3"):
        load_model("base", CPU, step=7)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        find_saved("base", run_dir, "7")
    with pytest.raises(UserError, match="--resume soon must be auto, none or a step"):
        find_saved("base", run_dir, "soon")


def test_most_recent_run_is_found(base_dir):
    for age, tag in enumerate(("new", "old")):
        run_dir = save_run(tag=tag)
        os.utime(run_dir / "latest", (10**9 - age, 10**9 - age))
    assert find_tag("base") == "new" and find_tag("base", "old") == "old"


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "/tmp", ".hidden", "d4/"])
def test_tag_must_be_a_folder_name(tag):
    with pytest.raises(UserError, match="--model-tag .* must be a plain folder name"):
        get_run_dir("base", tag)


def test_another_tokenizer_of_the_same_size_is_refused():
    save_run()
    ranks = {bytes([(first + 1) % 256]): first for first in range(256)}
    other = RustBPETokenizer(SPLIT_PATTERN, ranks, BYTE_TOKENIZER.special_tokens)
    other.save(get_tokenizer_dir())
    with pytest.raises(UserError) as error:
        load_model("base", CPU)
    assert BYTE_TOKENIZER.hash in str(error.value) and other.hash in str(error.value)
    shutil.rmtree(get_tokenizer_dir())
    with pytest.raises(UserError, match="there is no tokenizer at"):
        load_model("base", CPU)


def test_resume_none_keeps_the_old_run():
    run_dir = save_run(steps=(1,))
    for kept in ("d2~1", "d2~2"):
        assert find_saved("base", run_dir, "none") is None and run_dir.exists()
        claim_folder(run_dir, None)
        assert not run_dir.exists()
        assert list_steps(run_dir.with_name(kept)) == [1]
        save_run(steps=(1,))
    assert find_saved("base", run_dir.with_name("fresh"), "none") is None
    claim_folder(run_dir.with_name("fresh"), None)  # nothing to keep


def test_going_back_makes_the_later_steps_another_run():
    run_dir = save_run(steps=(1, 2, 3))
    assert find_saved("base", run_dir, "1").step == 1 and read_latest(run_dir) == 3  # looking changes nothing
    claim_folder(run_dir, 1)
    assert read_latest(run_dir) == find_saved("base", run_dir, "auto").step == 1
    remove_old_checkpoints(run_dir, 1)
    assert list_steps(run_dir) == [1, 2, 3]  # the abandoned ones are the person's to delete


def test_no_pickle_on_disk():
    run_dir = save_run()
    assert {path.suffix for path in run_dir.rglob("*") if path.is_file()} == {".safetensors", ".json", ""}
    assert (run_dir / "step_000001" / MODEL_NAME).read_bytes()[8:9] == b"{"
