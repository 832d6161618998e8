"""The training step against plain autograd, however it is cut; the log, the signals and the choices of a run."""

import json
import os
import re
import signal
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import out_of_memory_at
from safetensors.torch import load_file, save_file

from nanochat import train
from nanochat.common import Ranks, UserError, end_process
from nanochat.gpt import GPT, GPTConfig
from nanochat.memory import CPU_MFU, GIB, PUBLISHED_MFU, Compute, get_usable_frac, predict_memory
from nanochat.scaling import make_config, make_plan
from nanochat.stage import Machine, choose_micro_rows, count_rows, predict_run, take_minimum
from nanochat.train import (
    Batch,
    LossScaler,
    OutOfMemory,
    Progress,
    RunLog,
    StepStats,
    StopSignal,
    any_rank,
    read_metrics,
    train_step,
)

CPU = torch.device("cpu")
CONFIG = GPTConfig(sequence_len=16, vocab_size=80, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
B, T, V = 8, CONFIG.sequence_len, CONFIG.vocab_size
NUM_STEPS = 20


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    model = GPT(CONFIG, dtype)
    model.init_weights()
    return model


def make_batch(seed=0, ignored_frac=0.3, weighted=False):
    """Random tokens; some targets are ignored, in rows 2 and 3 all of them."""
    rng = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randint(0, V, (B, T), generator=rng) for _ in range(2))
    targets[torch.rand((B, T), generator=rng) < ignored_frac] = -1
    targets[2:4] = -1
    return Batch(inputs, targets, torch.randn((B, T), generator=rng) if weighted else None)


class GradRecorder:
    """Stands in for the optimizer and keeps the gradients it is given."""

    def __init__(self, model):
        self.model, self.grads = model, None

    def reduce_gradients(self):
        self.grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def wait_gradients(self):
        return list(self.grads.values())

    def get_grad_norm(self):
        return torch.linalg.vector_norm(torch.stack([grad.norm() for grad in self.grads.values()]))

    def step(self):
        self.model.zero_grad()
        return self.get_grad_norm()


def copy_params(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def copy_state(optimizer):
    return {name: piece.tensor.clone() for name, piece in optimizer.get_named_state().items()}


def assert_equal(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}",
                                   **tolerance)


def run_steps(model, micro_rows, num_steps=NUM_STEPS, ranks=Ranks()):  # noqa: B008 (frozen)
    optimizer = model.setup_optimizer()
    stats = []
    for step in range(num_steps):
        batch = make_batch(step)
        mine = Batch(batch.inputs[ranks.rank::ranks.world_size], batch.targets[ranks.rank::ranks.world_size], None)
        stats.append(train_step(model, optimizer, mine, micro_rows))
    return stats


# ---------------------------------------------------------------------------------------------------------------------
# The step


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_are_those_of_the_plain_loss(weighted):
    model, batch = make_model(), make_batch(weighted=weighted)
    num_targets = int((batch.targets >= 0).sum())
    nll = model(batch.inputs, batch.targets, loss_reduction="none")
    loss = (nll if batch.weights is None else nll * batch.weights).sum() / num_targets
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected_norm = torch.cat([grad.flatten() for grad in expected.values()]).norm().item()
    for micro_rows in (8, 4, 3, 1):  # with 1 and 2, some micro-batches have nothing to learn
        model.zero_grad(set_to_none=True)
        recorder = GradRecorder(model)
        stats = train_step(model, recorder, batch, micro_rows)
        assert_equal(recorder.grads, expected, rtol=0, atol=1e-12)
        assert stats.loss == pytest.approx(loss.item(), abs=1e-12)
        assert stats.grad_norm == pytest.approx(expected_norm, abs=1e-12)
        assert stats.num_targets == num_targets and stats.skipped == ""


@pytest.mark.parametrize("weighted", [False, True])
def test_cut_rows_train_like_pieces_on_their_own(weighted):
    """Each piece is a sequence of its own; together they have every target of the rows once."""
    model, batch, row_tokens = make_model(), make_batch(weighted=weighted), 4
    for block in model.transformer.h:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.1)  # at zero, no token would see another
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(B):
        for start in range(0, T, row_tokens):
            piece = row, slice(start, start + row_tokens)
            nll = model(batch.inputs[piece][None], batch.targets[piece][None], loss_reduction="none")[0]
            loss = loss + (nll if batch.weights is None else nll * batch.weights[piece]).sum()
    num_targets = int((batch.targets >= 0).sum())
    loss = loss / num_targets
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    recorder = GradRecorder(model)
    stats = train_step(model, recorder, batch.cut(row_tokens), 2 * T // row_tokens)
    assert (stats.loss, stats.num_targets) == (pytest.approx(loss.item(), abs=1e-12), num_targets)
    assert_equal(recorder.grads, expected, rtol=0, atol=1e-12)
    assert abs(stats.loss - train_step(model, GradRecorder(model), batch, 2).loss) > 1e-6  # whole rows see more
    whole = batch.cut(T)
    assert torch.equal(whole.inputs, batch.inputs) and torch.equal(whole.targets, batch.targets)


def test_unweighted_loss_is_the_mean():
    model, batch = make_model(), make_batch()
    assert train_step(model, GradRecorder(model), batch, 2).loss == pytest.approx(
        model(batch.inputs, batch.targets).item(), abs=1e-12)


def test_training_does_not_depend_on_the_cut():
    runs = {}
    for micro_rows in (8, 3, 1):
        model = make_model()
        stats = run_steps(model, micro_rows)
        runs[micro_rows] = copy_params(model), [s.loss for s in stats]
    start = copy_params(make_model())
    assert all(not torch.equal(start[name], param) for name, param in runs[8][0].items())  # every one was trained
    for micro_rows in (3, 1):
        assert_equal(runs[micro_rows][0], runs[8][0], rtol=0, atol=1e-6)
        assert runs[micro_rows][1] == pytest.approx(runs[8][1], abs=1e-6)


@pytest.mark.parametrize("what", ["targets", "weights"])
def test_nothing_to_learn_changes_nothing(what):
    model = make_model()
    optimizer = model.setup_optimizer()
    train_step(model, optimizer, make_batch(), 4)  # momentum that a wrong step would apply
    params = copy_params(model)
    state = copy_state(optimizer)
    batch = make_batch()
    nothing = {"targets": torch.full_like(batch.targets, -1), "weights": torch.zeros(batch.targets.shape)}
    stats = train_step(model, optimizer, replace(batch, **{what: nothing[what]}), 4)
    num_targets = 0 if what == "targets" else int((batch.targets >= 0).sum())
    assert stats == StepStats(0.0, 0.0, num_targets, f"no {what}")
    stats.check_finite(3)
    assert_equal(copy_params(model), params, rtol=0, atol=0)
    assert_equal(copy_state(optimizer), state, rtol=0, atol=0)
    assert optimizer.num_steps == 1


@pytest.mark.parametrize("where", ["lm_head.weight", "transformer.wte.weight"])
def test_non_finite_loss_stops_the_run(where):
    model = make_model(torch.float32)
    with torch.no_grad():
        model.get_parameter(where).fill_(float("nan"))
    stats = train_step(model, model.setup_optimizer(), make_batch(), 4)
    with pytest.raises(UserError, match=r"loss is nan .* at step 17.*checkpoint"):
        stats.check_finite(17)


def test_non_finite_gradient_stops_the_run():
    with pytest.raises(UserError, match="gradient norm inf at step 5"):
        StepStats(1.0, float("inf"), 10, "").check_finite(5)
    StepStats(1.0, 2.0, 10, "").check_finite(5)
    StepStats(1.0, float("inf"), 10, "fp16 overflow").check_finite(5)  # the scaler deals with it


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory


@pytest.mark.parametrize(("kind", "text"), [
    (torch.OutOfMemoryError, "CUDA out of memory.\nmore"), (MemoryError, ""),
    (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
    (RuntimeError, "MPS backend out of memory (MPS allocated: 5 GB)"),
    (RuntimeError, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")])  # as torch's compiler wraps it
def test_step_without_memory_changes_nothing(kind, text):
    """In the third of four micro-batches; what the first two have left is gone, and the step can be taken again."""
    model, other = make_model(), make_model()
    optimizer, kept = model.setup_optimizer(), []
    forward = model.forward

    def fail(*args, **settings):
        loss = forward(*args, **settings)
        kept.append(weakref.ref(loss))
        if len(kept) == 3:
            raise kind(text)
        return loss
    model.forward = fail
    with pytest.raises(OutOfMemory) as raised:
        train_step(model, optimizer, make_batch(), 2)
    assert str(raised.value) == (text.split("\n")[0] or "no details")
    assert [ref() for ref in kept] == [None] * 3
    assert optimizer.num_steps == 0 and all(param.grad is None for param in model.parameters())
    assert_equal(copy_params(model), copy_params(other), rtol=0, atol=0)
    model.forward = forward
    other_optimizer = other.setup_optimizer()
    for step in range(3):
        stats, expected = (train_step(m, o, make_batch(step), 1) for m, o in ((model, optimizer),
                                                                            (other, other_optimizer)))
        assert stats == expected
    assert_equal(copy_params(model), copy_params(other), rtol=0, atol=0)
    assert_equal(copy_state(optimizer), copy_state(other_optimizer), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# fp16


def test_loss_scaler_halves_and_grows():
    scaler = LossScaler(scale=16.0, growth_steps=3)
    scales = []
    for overflowed in (False, False, False, True, False, False, True, False, False, False):
        scaler.update(overflowed)
        scales.append(scaler.scale)
    assert scales == [16, 16, 32, 16, 16, 16, 8, 8, 8, 16]


def test_loss_scale_cancels():
    """A power of two changes exponents only: in fp32 gradients and loss are the same but for rounding."""
    results = []
    for scaler in (None, LossScaler(2.0**12)):
        model = make_model(torch.float32)
        recorder = GradRecorder(model)
        results.append((train_step(model, recorder, make_batch(), 3, scaler), recorder.grads))
    torch.testing.assert_close(results[1][0].loss, results[0][0].loss, rtol=1e-6, atol=0)
    assert_equal(results[1][1], results[0][1], rtol=1e-5, atol=1e-9)


def test_fp16_overflow_skips_and_recovers():
    model, scaler = make_model(torch.float16), LossScaler(2.0**40)
    optimizer, start = model.setup_optimizer(), copy_params(model)
    stats = train_step(model, optimizer, make_batch(), 4, scaler)
    assert stats.skipped == "fp16 overflow" and scaler.scale == 2.0**39
    assert optimizer.num_steps == 0 and all(p.grad is None for p in model.parameters())
    assert_equal(copy_params(model), start, rtol=0, atol=0)
    losses = []
    for _ in range(40):
        stats = train_step(model, optimizer, make_batch(), 4, scaler)
        stats.check_finite(0)
        losses += [] if stats.skipped else [stats.loss]
    assert 10 < len(losses) < 40 and losses[-1] < losses[0] - 0.3


def test_fp16_nan_in_the_forward_pass_stops_the_run():
    """A smaller scale can't cure it: skipping would go on for ever."""
    model, scaler = make_model(torch.float16), LossScaler()
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    stats = train_step(model, model.setup_optimizer(), make_batch(), 4, scaler)
    with pytest.raises(UserError, match="loss is nan"):
        stats.check_finite(0)


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


def run_rank(rank, folder):
    """What each of two processes does; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = make_model()
    stats = run_steps(model, 2, ranks=Ranks(rank, rank, 2))
    facts = {"losses": [s.loss for s in stats], "num_targets": [s.num_targets for s in stats],
             "any": [*any_rank(rank == 1, False, device=CPU)]}
    save_file(copy_params(model), f"{folder}/params_{rank}.safetensors")

    # One rank without targets takes part; without any on both, all skip; one rank's overflow is everybody's
    optimizer, batch = model.setup_optimizer(), make_batch()
    nothing = replace(batch, targets=torch.full_like(batch.targets, -1))
    facts["one empty"] = train_step(model, optimizer, nothing if rank else batch, 4).num_targets
    facts["both empty"] = train_step(model, optimizer, nothing, 4).skipped
    weights = torch.full((B, T), float("inf") if rank else 1.0)
    facts["overflow"] = train_step(model, optimizer, replace(batch, weights=weights), 4, LossScaler()).skipped
    facts["num_steps"] = optimizer.num_steps
    # One rank's lack of memory is everybody's, before the first gradient is sent; then both go on
    params = copy_params(model)
    with out_of_memory_at(*([1] if rank else [])), pytest.raises(OutOfMemory) as raised:
        train_step(model, optimizer, batch, 2)
    assert str(raised.value).startswith("CUDA out of memory" if rank else "another rank did")
    assert_equal(copy_params(model), params, rtol=0, atol=0)
    facts["after"] = train_step(model, optimizer, batch, 2).grad_norm
    facts["minimum"] = take_minimum(10 - rank), take_minimum(None if rank else 10)
    with open(f"{folder}/facts_{rank}.json", "w") as file:
        json.dump(facts, file)
    dist.destroy_process_group()
    end_process()


def test_two_ranks_equal_one(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    model = make_model()
    stats = run_steps(model, 4)
    facts = [json.loads((tmp_path / f"facts_{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0] == facts[1]
    assert facts[0]["losses"] == pytest.approx([s.loss for s in stats], abs=1e-6)
    assert facts[0]["num_targets"] == [s.num_targets for s in stats]
    assert facts[0]["any"] == [True, False]
    params = [load_file(tmp_path / f"params_{rank}.safetensors") for rank in (0, 1)]
    assert_equal(params[1], params[0], rtol=0, atol=0)
    assert_equal(params[0], copy_params(model), rtol=0, atol=1e-6)
    assert facts[0]["one empty"] == int((make_batch().targets >= 0).sum())
    assert facts[0]["both empty"] == "no targets" and facts[0]["overflow"] == "fp16 overflow"
    assert facts[0]["num_steps"] == 1
    assert facts[0]["after"] > 0 and facts[0]["minimum"] == [9, None]


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
    plan = make_plan(CONFIG, 1e6, num_iterations=10, batch_tokens=1000)
    return Progress(plan, 1e12, state)


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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_sets_the_flag_and_names_the_exit_code(signum):
    before = signal.getsignal(signum)
    with pytest.raises(KeyboardInterrupt if signum == signal.SIGINT else SystemExit) as ending, StopSignal() as stop:
        os.kill(os.getpid(), signum)
        assert stop.signum == signum  # and the program goes on
        stop.end()
    assert signal.getsignal(signum) is before
    if signum == signal.SIGTERM:
        assert ending.value.code == 143


@pytest.mark.parametrize("signum, code, said", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_signal_in_a_process_of_its_own(signum, code, said):
    program = ("import time\nfrom nanochat.common import run_script\nfrom nanochat.train import StopSignal\n"
               "def main(argv):\n"
               "    with StopSignal() as stop:\n"
               "        print('ready', flush=True)\n"
               "        while not stop.signum:\n"
               "            time.sleep(0.01)\n"
               "        print('saved', flush=True)\n"
               "        stop.end()\n"
               "run_script(main)\n")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
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
        monkeypatch.setattr(train.time, "monotonic", lambda: stop.first_time + train.ECHO_SEC + 1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)  # where it arrives at the latest


# ---------------------------------------------------------------------------------------------------------------------
# Choices


def test_count_rows():
    assert count_rows(512, 64, 2) == 8
    for batch_tokens, world_size in ((500, 1), (64, 2), (0, 1), (32, 1), (-512, 1)):
        with pytest.raises(UserError, match=f"--total-batch-size {batch_tokens} must be a multiple of"):
            count_rows(batch_tokens, 64, world_size)


MIB = 2**20
SMALL = make_config(2, vocab_size=300, sequence_len=512, head_dim=64)
COMPUTE = Compute("float32", "sdpa", is_compiled=False, device_type="cpu")


def choose(wanted, rows_per_rank, free_bytes, kept=None, device_type="cpu", T=512):
    rows, why, needed = choose_micro_rows(wanted, kept, "as the run began", rows_per_rank, SMALL, T,
                                          replace(COMPUTE, device_type=device_type), free_bytes)
    assert needed == predict_memory(SMALL, T, rows, replace(COMPUTE, device_type=device_type),
                                    rows_per_rank // rows).needed
    return rows, why


def predict(rows, rows_per_rank):
    return predict_memory(SMALL, 512, rows, COMPUTE, rows_per_rank // rows).needed


def test_micro_rows_are_what_fits_and_pays():
    room = predict(4, 12) / get_usable_frac(COMPUTE)
    assert choose("auto", 12, room + 1) == (4, f"largest that fits: {predict(4, 12) / GIB:.2f} of {room / GIB:.2f} GiB "
                                               "predicted; 3 a step")
    assert choose("auto", 12, room - 1)[0] == 3
    assert choose("auto", 12, 100 * GIB)[1].startswith("all of a step: ")
    assert choose("auto", 48, 100 * GIB)[0] == 16 and "at most 8,192 tokens: " in choose("auto", 48, 100 * GIB)[1]
    rows, why = choose("auto", 256, 200 * GIB, device_type="cuda")
    assert rows == 128 and re.fullmatch(r"at most 65,536 tokens: [\d.]+ of 200.00 GiB predicted; 2 a step", why)
    for rows in (1, 7, 12, 100, 257):
        chosen, why = choose("auto", rows, None)
        assert rows % chosen == 0 and chosen <= 16 and "of an unknown number GiB predicted" in why
    assert choose("auto", 4, None, T=10**6)[0] == 1  # one row always has to fit
    rows, why = choose("auto", 8, MIB)
    assert rows == 1
    assert re.fullmatch(r"the fewest there are: [\d.]+ of 0.00 GiB predicted and may not fit; 8 a step", why)


def test_micro_rows_that_are_asked_for_or_kept():
    assert choose(3, 12, 100 * GIB)[1].startswith("asked for: ")
    assert "and may not fit; 4 a step" in choose(3, 12, MIB, kept=4)[1]
    assert choose("auto", 12, 100 * GIB, kept=2)[1].startswith("as the run began: ")
    assert choose("auto", 12, predict(2, 12), kept=2)[0] == 2  # what has run needs no headroom
    rows, why = choose("auto", 12, predict(2, 12) - 1, kept=2)
    assert rows == 1 and why.startswith(f"2 as the run began would need {predict(2, 12) / GIB:.2f} GiB: ")
    assert choose("auto", 12, 100 * GIB, kept=5)[0] == 12  # on as many ranks as have 12 rows that cut can't be made
    for wanted in (5, 13, -1, 0):
        with pytest.raises(UserError, match=f"--device-batch-size {wanted} must divide the 12 rows .* 12, or auto"):
            choose(wanted, 12, None)


def test_prediction_of_a_run(monkeypatch):
    """Time where an MFU is known, or else why not; the report card compares it with what the run took."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    plan = make_plan(SMALL, 1e9, num_iterations=10, batch_tokens=8192)
    on_cpu = Machine(CPU, Ranks(), torch.float32, "sdpa", True, 1e12, 16, 16, MIB)
    on_gpu = replace(on_cpu, device=torch.device("cuda", 0), peak_flops=8e15)
    for machine, mfu in ((on_cpu, CPU_MFU), (on_gpu, PUBLISHED_MFU[0][1])):
        predicted = predict_run("base", machine, SMALL, plan)
        assert predicted["peak_memory_bytes"] == MIB and predicted["mfu_pct"] == pytest.approx(100 * mfu)
        assert predicted["train_sec"] == pytest.approx(1e9 * 81920 / (mfu * machine.peak_flops))
        assert predicted["tokens_per_sec"] == pytest.approx(81920 / predicted["train_sec"])
    for stage, machine, why in (
            ("base", replace(on_cpu, use_compile=False), "nothing was measured without compilation"),
            ("sft", replace(on_gpu, peak_flops=None), "nothing was measured on cuda devices"),
            ("rl", on_gpu, "most of a step is sampling")):
        predicted = predict_run(stage, machine, SMALL, plan)
        assert predicted["mfu_source"] == f"unknown, for {why}" and "train_sec" not in predicted
