"""A run beside its checkpoints: the log, the progress, the identity, the signals."""

import errno
import json
import math
import os
import signal
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from nanochat import run
from nanochat.common import Ranks, UserError, print0
from nanochat.run import (
    PendingStats,
    Progress,
    RunLog,
    StepLog,
    StepStats,
    StopSignal,
    TakenStep,
    compare_with_saved,
    read_metrics,
)
from nanochat.scaling import make_config, make_plan
from tests.helpers import start_script
from tests.warm import WarmProcess

# ---------------------------------------------------------------------------------------------------------------------
# The log


def test_log_keeps_what_a_resumed_run_will_not_write_again(tmp_path):
    """Step N's training line was written before checkpoint N was; what came after that is made anew."""
    log = RunLog(tmp_path, {"tag": "x"}, Ranks())
    for step in range(1, 6):
        log.write("train", step, loss=float(step))
    log.write("eval", 2, val_bpb=1.0)
    log.close("stopped")
    log = RunLog(tmp_path, {"tag": "x"}, Ranks(), resume_step=3)
    log.write("train", 4, loss=40.0)
    log.close("finished")
    train = [(line["step"], line["loss"]) for line in read_metrics(tmp_path) if line["kind"] == "train"]
    assert train == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [line["step"] for line in read_metrics(tmp_path) if line["kind"] == "eval"] == [2]


@pytest.mark.parametrize("is_repeated", [False, True])
def test_log_keeps_the_evaluation_of_the_last_step_unless_it_is_made_again(tmp_path, is_repeated):
    """A run that was stopped at a step where no evaluation is due evaluates there, once."""
    log = RunLog(tmp_path, {}, Ranks())
    for kind in ("train", "eval", "sample"):
        log.write(kind, 5, value=1)
    log.close("stopped")
    log = RunLog(tmp_path, {}, Ranks(), resume_step=5)
    if is_repeated:
        log.write("eval", 5, value=2)
        log.write("sample", 5, value=2)
        log.write("sample", 5, value=3)
    log.write("train", 6, value=4)
    log.close("finished")
    lines = [(line["kind"], line["step"], line["value"]) for line in read_metrics(tmp_path)]
    made = [("eval", 5, 2), ("sample", 5, 2), ("sample", 5, 3)] if is_repeated else [("eval", 5, 1), ("sample", 5, 1)]
    assert lines == [("train", 5, 1), *made, ("train", 6, 4)]


@pytest.mark.parametrize(("is_killed", "earlier_sec"), [(False, 90), (True, 70)])
def test_continued_runs_know_what_the_parts_before_took(tmp_path, is_killed, earlier_sec):
    log = RunLog(tmp_path, {}, Ranks(), start_time=time.perf_counter() - 90)
    log.write("train", 1, elapsed_sec=70.0)
    if not is_killed:
        log.close("stopped")
    log = RunLog(tmp_path, {}, Ranks(), resume_step=1, start_time=time.perf_counter() - 30)
    assert log.info["earlier_sec"] == pytest.approx(earlier_sec, abs=5)
    log.close("finished")
    assert log.info["wall_sec"] == pytest.approx(earlier_sec + 30, abs=5)


def test_log_of_a_resumed_run_tells_what_was_predicted_when_it_began(tmp_path):
    """And what each part after that decided and predicted, such as with half the rows."""
    RunLog(tmp_path, {"predicted": 10, "decisions": ["a"], "params": 1}, Ranks()).close("stopped")
    RunLog(tmp_path, {"predicted": 5, "decisions": ["b"], "params": 1}, Ranks(), resume_step=3).close("finished")
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["predicted"] == 10 and info["decisions"] == ["a"]
    assert info["resumed"] == [{"step": 3, "decisions": ["b"], "predicted": 5}]


def test_log_survives_a_torn_last_line(tmp_path):
    log = RunLog(tmp_path, {}, Ranks())
    log.write("train", 1, loss=1.0)
    log.close("stopped")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    log = RunLog(tmp_path, {}, Ranks(), resume_step=1)
    log.write("train", 2, loss=2.0)
    log.close("finished")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_log_is_strict_json(tmp_path):
    """Infinity and NaN, as a skipped fp16 step has them, are not JSON: other readers would choke on the whole file."""
    def refuse(name):
        raise AssertionError(f"{name} in metrics.jsonl")
    log = RunLog(tmp_path, {}, Ranks())
    log.write("train", 1, grad_norm=float("inf"), loss=float("nan"), tokens=3)
    log.close("finished")
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["tokens"] == 3


def test_log_new_run_starts_empty_and_says_how_it_ended(tmp_path):
    for status in ("stopped", "finished"):
        log = RunLog(tmp_path, {"tag": "x"}, Ranks())
        assert json.loads((tmp_path / "run.json").read_text()) == {"status": "running", "tag": "x"}
        log.write("train", 1, loss=1.0)
        log.update(results={"a": 1})
        log.close(status)
        info = json.loads((tmp_path / "run.json").read_text())
        assert info["status"] == status and info["results"] == {"a": 1} and info["ended"]
    assert len(read_metrics(tmp_path)) == 1


def test_only_rank_0_writes(tmp_path):
    log = RunLog(tmp_path / "run", {}, Ranks(1, 1, 2))
    log.write("train", 1, loss=1.0)
    log.update(a=1)
    log.close("finished")
    assert not (tmp_path / "run").exists()


def test_missing_wandb_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import fails, installed or not
    with pytest.raises(UserError, match="--run mine needs wandb.*pip install wandb"):
        RunLog(tmp_path, {}, Ranks(), wandb_name="mine")


# ---------------------------------------------------------------------------------------------------------------------
# Progress and stopping


def make_progress(state=None):
    config = make_config(2, vocab_size=80, sequence_len=16, head_dim=32)
    plan = make_plan(config, 1e6, num_iterations=10, batch_tokens=1000)
    return Progress(plan, 1e12, torch.device("cpu"), state)


def test_progress_is_debiased():
    losses = [5.0, 3.0, 4.0, 1.0, 2.5]
    progress = make_progress()
    for count in range(1, len(losses) + 1):
        values = progress.update(StepStats(losses[count - 1], 1.0, 9, ""), 0.5)
        factors = [0.9**age for age in range(count)][::-1]
        expected = sum(f * x for f, x in zip(factors, losses[:count], strict=True)) / sum(factors)
        assert values["loss_smooth"] == pytest.approx(expected, rel=1e-12)
    assert values["tokens_per_sec"] == 2000 and values["step_ms"] == 500 and values["elapsed_sec"] == 2.5
    assert values["mfu_pct"] == pytest.approx(100 * 2000 * 1e6 / 1e12)


def test_progress_passes_over_skipped_steps_and_resumes():
    progress, other = make_progress(), make_progress()
    for loss in (5.0, 3.0):
        progress.update(StepStats(loss, 1.0, 9, ""), 0.5)
    progress.update(StepStats(0.0, 0.0, 0, "no targets"), 0.5)
    assert progress.num_skipped == 1 and progress.num_losses == 2
    other = make_progress(json.loads(json.dumps(progress.get_state())))
    expected, actual = (p.update(StepStats(4.0, 1.0, 9, ""), 0.5) for p in (progress, other))
    assert actual == expected


def make_losses(noise, num=200):
    """A loss that falls from 7 to 2.5 with a tenth of noise, as a small model's does."""
    generator = torch.Generator().manual_seed(3)
    return [2.5 + 4.5 * math.exp(-step / 30) + noise * torch.randn((), generator=generator).item()
            for step in range(num)]


def learn(progress, losses):
    """The steps, from 0, whose losses are jumps; None in place of a loss is a skipped step."""
    jumps = []
    for i, loss in enumerate(losses):
        if loss is not None and progress.find_jump(loss) is not None:
            jumps.append(i)
        progress.update(StepStats(loss or 0.0, 1.0, 9, "no targets" if loss is None else ""), 0.5)
    return jumps


def raise_losses(losses, rises):
    """The losses, those of some steps higher: {step: nats}."""
    return [loss + rises.get(i, 0.0) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(("noise", "step", "rise", "jumps"), [
    (0.1, 0, 0.0, []), (0.4, 0, 0.0, []), (0.0, 0, 0.0, []),                    # noise alone, much of it, none
    (0.1, 80, 1.2, [81]), (0.1, 190, 0.8, [191]), (0.02, 100, 0.8, [101]),
    (0.02, 100, 0.4, []), (0.1, 80, 0.4, []), (0.3, 80, 0.8, []),               # small; no more than the noise makes
    (0.1, 10, 9.0, []),                                                         # too early to know
    (0.1, 80, 9.0, [80])])                                                      # known at once
def test_a_loss_that_jumps_is_counted_once(noise, step, rise, jumps):
    """Though it falls back slowly, as a model that learns anew."""
    rises = {i: rise * math.exp(-(i - step) / 10) for i in range(step, 200)}
    assert learn(make_progress(), raise_losses(make_losses(noise), rises)) == jumps


@pytest.mark.parametrize(("rises", "jumps"), [
    ({100: 2.5, 150: 2.5, 152: 2.5}, []), ({100: 1.5, 101: 0.2}, []),    # no two in a row
    ({100: 14.0}, [100]), ({100: 1.5, 101: 1.2}, [101])])
def test_one_step_of_odd_text_is_no_jump(rises, jumps):
    """But what no text makes is one, though the step after it is as those before."""
    assert learn(make_progress(), raise_losses(make_losses(0.1), rises)) == jumps


def test_mixtures_of_easy_and_odd_rows_make_few_jumps():
    """In small batches: a loss of .05 on sums, 3 to 5 where a step is of other text."""
    generator = torch.Generator().manual_seed(5)
    hard = torch.rand(3000, generator=generator) < 0.08
    losses = [3.0 + 2 * torch.rand((), generator=generator).item() if is_hard else 0.05 for is_hard in hard]
    assert len(learn(make_progress(), losses)) < 10    # of 246 such steps; 201 are by 3 nats alone


def test_skipped_steps_are_no_part_of_a_jump():
    losses = raise_losses(make_losses(0.1), {100: 1.5, 101: 1.2})
    assert learn(make_progress(), [*losses[:101], None, *losses[101:]]) == [102]
    assert learn(make_progress(), [*losses[:60], None, None, *losses[60:100]]) == []


def test_the_warning_says_from_where_and_to_what(tmp_path, capsys):
    log = RunLog(tmp_path, {}, Ranks())
    steps = StepLog(log, make_progress(), first_step=0, predicted_bytes=None)
    for i, loss in enumerate([*[2.0, 2.2] * 20, 4.0, 0.0, 3.5, 9.0]):
        steps.add(take_step(i + 1, None, loss=loss, skipped="" if loss else "no targets"))
    log.close("finished")
    lines = [line.partition(";")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert lines == ["warning: the loss has jumped from 2.105 to 3.500"]    # 9 is within the changes since
    assert [line["num_jumps"] for line in read_metrics(tmp_path)][-4:] == [0, 0, 1, 1]    # a skipped step is none
    assert steps.progress.get_results()["num_jumps"] == 1


@pytest.mark.parametrize("end", [60, 100, 101, 102])
def test_a_continued_run_sees_the_same_jumps(end):
    """Wherever it was stopped: before a jump, in its midst, after it."""
    losses = raise_losses(make_losses(0.2), {100: 2.0, 101: 1.7, 140: 2.5, 141: 2.5})
    whole, first = make_progress(), make_progress()
    jumps, before = learn(whole, losses), learn(first, losses[:end])
    state = json.loads(json.dumps(first.get_state()))
    second = make_progress(state)
    assert vars(second)["change_ema"] == first.change_ema and second.num_changes == first.num_changes
    assert jumps == before + [end + i for i in learn(second, losses[end:])] and len(jumps) == 2
    assert {key: value for key, value in second.get_state().items() if key != "elapsed_sec"} == {
        key: value for key, value in whole.get_state().items() if key != "elapsed_sec"}
    older = make_progress({key: state[key] for key in ("loss_ema", "num_losses", "elapsed_sec", "num_skipped")})
    assert learn(older, make_losses(0.8)[-30:]) == []    # of before there was such a rule: it knows no changes yet


def take_step(step, copied, loss=2.0, skipped=""):
    """A step whose loss was scaled by 4."""
    stats = PendingStats(torch.tensor((4 * loss, 0.5)), copied, 4.0, 9, skipped)
    return TakenStep(step, time.perf_counter(), stats, {"lr_frac": 1.0, "epoch": 0})


@pytest.mark.parametrize("is_late", [False, True])
def test_step_of_a_gpu_is_logged_when_the_next_one_is_queued(is_late, tmp_path, capsys):
    """And waited for then; a CPU's at once. The last one is logged before anything else happens, and once."""
    waits = []
    log = RunLog(tmp_path, {}, Ranks())
    steps = StepLog(log, make_progress(), first_step=0, predicted_bytes=3 * 2**30)
    for step in (1, 2, 3):
        steps.add(take_step(step, types.SimpleNamespace(synchronize=lambda step=step: waits.append(step))
                            if is_late else None))
        assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, step + (not is_late)))
        assert waits == (list(range(1, step)) if is_late else [])
    steps.finish()
    steps.finish()
    log.close("finished")
    lines = read_metrics(tmp_path)
    assert [(line["step"], line["loss"], line["grad_norm"], line["kind"]) for line in lines] == [
        (step, 2.0, 0.5, "train") for step in (1, 2, 3)]
    assert capsys.readouterr().out.count("at the peak of the first step, 3.00 predicted") == 1


def fail(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize(("query", "logged"), [(lambda: True, [1, 2]), (lambda: False, [1]), (fail, [1])])
def test_last_step_before_an_error_is_logged_where_its_figures_are_there(query, logged, tmp_path, monkeypatch):
    """They never come where the GPU failed, or waits for a rank that has died."""
    monkeypatch.setattr(run, "LATE_SEC", 0.02)
    with pytest.raises(ValueError, match="of the next step"), RunLog(tmp_path, {}, Ranks()) as log:
        steps = StepLog(log, make_progress(), first_step=0, predicted_bytes=None)
        for step in (1, 2):
            steps.add(take_step(step, types.SimpleNamespace(synchronize=lambda: None, query=query)))
        raise ValueError("of the next step")
    assert [line["step"] for line in read_metrics(tmp_path)] == logged
    assert json.loads((tmp_path / "run.json").read_text())["reason"] == "ValueError: of the next step"


def test_step_that_is_not_finite_stops_the_run_before_it_is_logged(tmp_path):
    log = RunLog(tmp_path, {}, Ranks())
    steps = StepLog(log, make_progress(), first_step=0, predicted_bytes=None)
    with pytest.raises(UserError, match="the loss is nan and the gradient norm 0.5 at step 6"):
        steps.add(take_step(7, None, loss=float("nan")))
    steps.finish()
    log.close("failed")
    assert not read_metrics(tmp_path)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, None), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_sets_the_flag_and_names_the_exit_code(signum, code):
    before = signal.getsignal(signum)
    with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit) as ending, StopSignal() as stop:
        os.kill(os.getpid(), signum)
        assert stop.signum == signum  # and the program goes on
        stop.end()
    assert signal.getsignal(signum) is before
    if code:
        assert ending.value.code == code


def test_hang_up_that_nohup_ignores_stays_ignored(monkeypatch):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_rank_that_another_ranks_signal_stops_does_not_speak_of_ctrl_c():
    with pytest.raises(SystemExit) as ending, StopSignal() as stop:
        stop.end()
    assert ending.value.code == 143


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_lost_output_stops_a_loop_as_a_hang_up_does(number, monkeypatch, tmp_path):
    """A closed terminal fails each write, the signal may come later or never; elsewhere the script just ends."""
    def fail(text):
        raise OSError(number, os.strerror(number))
    with open(tmp_path / "stdout", "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(write=fail, flush=lambda: None, fileno=file.fileno))
        with StopSignal() as stop:
            print0("step 1")
            assert stop.signum == signal.SIGHUP
        with pytest.raises(BrokenPipeError):
            print0("step 1")


def test_terminal_that_closes(tmp_path):
    """As when an SSH session ends: a signal, and no output any more; what is done until the end must not fail."""
    ours, theirs = os.openpty()
    words = ["tests.programs.stop_signal", str(tmp_path / "saved")]
    process = WarmProcess(words, dict(os.environ), terminal=theirs)
    os.close(theirs)
    assert os.read(ours, 5) == b"ready"
    os.close(ours)
    assert process.wait(timeout=30) == 129
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("signum, code, said", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_signal_in_a_process_of_its_own(signum, code, said):
    with start_script("tests.programs.stop_signal") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code and stdout == "saved\n"
    assert said in stderr and "Traceback" not in stderr


def test_second_ctrl_c_stops_at_once(monkeypatch):
    """But not one that comes with the first, nor a second SIGTERM: torchrun and job systems pass on what they got."""
    with StopSignal() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(run.time, "monotonic", lambda: stop.first_time + run.ECHO_SEC + 1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)  # where it arrives at the latest


# ---------------------------------------------------------------------------------------------------------------------
# Identity


def compare(saved, current, defaults=None, allow_mismatch=False, revision="a", stage="base", code=("c", "c")):
    environment = {"git_revision": "a", "python": "3", "packages": {"torch": "2"}}
    before, now = ({"code": text} if text else {} for text in code)
    return compare_with_saved({"identity": saved, "environment": environment | before},
                              {"identity": current, "environment": environment | now | {"git_revision": revision}},
                              defaults or {}, Path("runs") / stage / "d2", allow_mismatch)


def test_other_settings_are_refused_with_both_sides():
    assert compare({"seed": 1, "more": 2}, {"seed": 1}) == []
    with pytest.raises(UserError, match=r"seed: saved 1, now 2; data: saved None, now x\).*--resume none"):
        compare({"seed": 1}, {"seed": 2, "data": "x"})
    for stage, flag in (("base", "--model-tag"), ("sft", "--out-tag")):    # which names the run's own folder
        with pytest.raises(UserError, match=f"start anew with --resume none or another {flag}, or add"):
            compare({"seed": 1}, {"seed": 2}, stage=stage)
    assert compare({"seed": 1}, {"seed": 2}, allow_mismatch=True, code=("c", "d")) == [
        {"what": "settings that don't match", "value": "seed: saved 1, now 2", "why": "--allow-mismatch"},
        {"what": "another version", "value": "code: saved c, now d", "why": "the run goes on with it"}]


def test_other_code_is_told():
    """By its files, not by the commit: that changes with a README, and an edit may not be committed."""
    assert compare({}, {}, revision="b") == []
    assert [decision["value"] for decision in compare({}, {}, revision="b", code=("", "d"))] == [
        "git_revision: saved a, now b"]    # a run from before the files were known


def test_flag_that_the_checkpoint_does_not_know_had_its_default():
    assert compare({"seed": 1}, {"seed": 1, "loss": "fused"}, {"loss": "fused", "seed": 42}) == []
    with pytest.raises(UserError, match="loss: saved fused, now plain"):
        compare({"seed": 1}, {"seed": 1, "loss": "plain"}, {"loss": "fused", "seed": 42})
