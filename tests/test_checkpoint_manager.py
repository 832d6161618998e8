"""Checkpoints: what is saved comes back, whatever instant the process died at; damaged or foreign files are refused."""

import errno
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from nanochat import checkpoint_manager, common
from nanochat.checkpoint_manager import (
    Checkpointer,
    SaveRules,
    build_model,
    claim_folder,
    find_checkpoint,
    find_saved,
    find_step,
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
from nanochat.common import UserError
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
    run_on_ranks,
    run_program,
    save_run,
    start_script,
)

pytestmark = pytest.mark.usefixtures("byte_base")


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


def test_keep_every_keeps_milestones_too():
    run_dir = get_run_dir("base", "d2")
    model, optimizer = make_trained()
    with Checkpointer(run_dir, SaveRules(keep_last=1, keep_every=3)) as saver:
        for step in range(1, 8):
            saver.save(step, model, optimizer, make_meta(optimizer))
    assert list_steps(run_dir) == [3, 6, 7]


# ---------------------------------------------------------------------------------------------------------------------
# Saving beside the training


class Gate:
    """Stands before `save_file`: writing begins when the gate is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.reached, save_file = threading.Event(), threading.Event(), checkpoint_manager.save_file

        def wait_and_save(*args):
            self.reached.set()
            assert self.opened.wait(30)
            save_file(*args)
        monkeypatch.setattr(checkpoint_manager, "save_file", wait_and_save)


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
        patch.setattr(checkpoint_manager, "save_file", fail)
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


def test_a_save_is_due_so_many_minutes_after_the_last_one(monkeypatch):
    now_sec, run_dir = [0], get_run_dir("base", "d2")
    monkeypatch.setattr(checkpoint_manager, "time", SimpleNamespace(monotonic=lambda: now_sec[0]))
    model, optimizer = make_trained()
    saver, due = Checkpointer(run_dir, SaveRules(every_minutes=20), last_step=99), []
    for step in range(1, 60):    # each takes a minute
        now_sec[0] += 60
        if saver.due(step, stopping=False, evaluating=False)[0]:
            saver.save(step, model, optimizer, make_meta(optimizer))
            due.append(step)
    saver.wait()
    assert due == [21, 42]


def ask_when_due():
    """What a rank is told at four steps: at 2 one rank's clock alone is late, at 3 the other alone is to stop."""
    saver, told = Checkpointer(get_run_dir("base", "d2"), SaveRules(every_minutes=20)), []
    for step in range(1, 5):
        saver.last_save_time = time.monotonic() - 7200 * (step == 2 and dist.get_rank() == 0)
        told.append(saver.due(step, stopping=step == 3 and dist.get_rank() == 1, evaluating=False))
    return told


def test_ranks_save_and_stop_together(tmp_path):
    """A signal may reach one rank alone, and their clocks differ: the others would wait for it in the next step."""
    ((first, second),) = run_on_ranks([(2, ask_when_due, ())], tmp_path)
    assert first == second == [[False, False], [True, False], [True, True], [False, False]]


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
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(1.05 * num_bytes)))
    Checkpointer(run_dir).check_disk(model, optimizer)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(0.95 * num_bytes)))
    with pytest.raises(UserError, match=r"a checkpoint takes 0\.\d\d GB, but .*/runs/base has only 0\.\d\d GB free; "
                                        "make room, or set NANOCHAT_BASE_DIR"):
        Checkpointer(run_dir).check_disk(model, optimizer)


# ---------------------------------------------------------------------------------------------------------------------
# Damaged, missing, foreign


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


def test_most_recent_run_is_found():
    for age, tag in enumerate(("new", "old")):
        run_dir = save_run(tag=tag)
        os.utime(run_dir / "latest", (10**9 - age, 10**9 - age))
    assert find_checkpoint("base").run_dir.name == "new" and find_checkpoint("base", "old").run_dir.name == "old"


@pytest.mark.parametrize("tag", ["", ".", "..", "a/b", "/tmp", ".hidden", "d4/", "x" * 181, "é" * 91, "d.lock", "a\nb"])
def test_tag_must_be_a_folder_name(tag):
    with pytest.raises(UserError, match="the tag .* must be a plain folder name"):
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


def test_what_was_left_behind_neither_counts_nor_goes(capsys):
    """After a jump of the loss: back to 1, on to 4, while 2 and 3 are of the branch that jumped."""
    run_dir = save_run(steps=(1, 2, 3))
    (run_dir / "metrics.jsonl").write_text("of the first branch")
    claim_folder(run_dir, 1)
    kept = run_dir / "metrics_abandoned_000003.jsonl"
    assert "going back to step 1: the log of what came after it is kept as" in capsys.readouterr().out
    assert kept.read_text() == "of the first branch"
    save_run(steps=(4,), keep_last=2)
    assert list_steps(run_dir) == [1, 2, 3, 4]
    save_run(steps=(5,), keep_last=2)
    assert list_steps(run_dir) == [2, 3, 4, 5]
    (run_dir / "metrics.jsonl").write_text("of the second branch")
    claim_folder(run_dir, 5, is_asked_for=False)    # continued as ever
    claim_folder(run_dir, 4, is_asked_for=False)    # as a kill leaves it before `latest` is written
    assert kept.read_text() == "of the first branch" and not list(run_dir.glob("*_000005.jsonl"))
    claim_folder(run_dir, 3)    # and the other branch after all: it counts again, the second one no more
    save_run(steps=(6,), keep_last=1)
    assert list_steps(run_dir) == [2, 4, 5, 6]
    assert (run_dir / "metrics_abandoned_000005.jsonl").read_text() == "of the second branch"


def test_old_checkpoints_on_another_disk_or_busy_do_not_end_the_run(tmp_path, capsys, monkeypatch):
    run_dir = save_run(steps=(1, 2))
    moved = (run_dir / "step_000001").rename(tmp_path / "moved")
    (run_dir / "step_000001").symlink_to(moved)
    remove_old_checkpoints(run_dir, 1)
    assert list_steps(run_dir) == [2] and (moved / "meta.json").exists()
    save_run(steps=(3,))
    monkeypatch.setattr(common.shutil, "rmtree", refuse_busy)
    remove_old_checkpoints(run_dir, 1)
    assert list_steps(run_dir) == [2, 3] and "step_000002 can't be deleted" in capsys.readouterr().out


def refuse_busy(path):
    raise OSError(errno.EBUSY, "Device or resource busy", str(path))
