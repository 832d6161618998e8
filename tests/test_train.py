"""The training step against plain autograd, however it is cut."""

import contextlib
import hashlib
import json
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from nanochat.command_line import end_process, explain_ending
from nanochat.common import Ranks, UserError, any_rank, gather, sum_over_ranks
from nanochat.cross_entropy import LossScaler
from nanochat.gpt import GPTConfig
from nanochat.run import StepStats
from nanochat.train import Batch, OutOfMemory, TrainState, take_step, train_step
from tests.helpers import make_model, out_of_memory_at
from tests.warm import start_warm_process

CPU = torch.device("cpu")
CONFIG = GPTConfig(sequence_len=16, vocab_size=80, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
B, T, V = 8, CONFIG.sequence_len, CONFIG.vocab_size
NUM_STEPS = 20


@pytest.mark.parametrize(("device", "expected"), [("cuda", True), ("mps", False), ("cpu", False)])
def test_rows_are_copied_before_they_can_be_freed(monkeypatch, device, expected):
    calls = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append((args, kwargs)) or self)
    Batch(torch.zeros(1, 2), torch.zeros(1, 2), None).to(torch.device(device))
    assert calls == [((torch.device(device),), {"non_blocking": expected})] * 2


def make_fresh(dtype=torch.float64):
    return make_model(CONFIG, dtype, as_initialised=True)


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

    def reduce_in_backward(self):
        return contextlib.nullcontext()

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
    model, batch = make_fresh(), make_batch(weighted=weighted)
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
    model, batch, row_tokens = make_fresh(), make_batch(weighted=weighted), 4
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


def test_micro_batches_of_short_rows_have_as_many_tokens():
    """Many small ones would take longer."""
    model, shapes = make_fresh(), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    state = TrainState(model, model.setup_optimizer(), None, rows_per_rank=B, micro_rows=2)
    for row_tokens in (4, 8, T):
        take_step(state, make_batch().cut(row_tokens), 0, None, None)
    assert shapes == [(8, 4)] * 4 + [(4, 8)] * 4 + [(2, 16)] * 4


def test_unweighted_loss_is_the_mean():
    model, batch = make_fresh(), make_batch()
    assert train_step(model, GradRecorder(model), batch, 2).loss == pytest.approx(
        model(batch.inputs, batch.targets).item(), abs=1e-12)


def test_training_does_not_depend_on_the_cut():
    runs = {}
    for micro_rows in (8, 3, 1):
        model = make_fresh()
        stats = run_steps(model, micro_rows)
        runs[micro_rows] = copy_params(model), [s.loss for s in stats]
    start = copy_params(make_fresh())
    assert all(not torch.equal(start[name], param) for name, param in runs[8][0].items())  # every one was trained
    for micro_rows in (3, 1):
        assert_equal(runs[micro_rows][0], runs[8][0], rtol=0, atol=1e-6)
        assert runs[micro_rows][1] == pytest.approx(runs[8][1], abs=1e-6)


@pytest.mark.parametrize("what", ["targets", "weights"])
def test_nothing_to_learn_changes_nothing(what):
    model = make_fresh()
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
    model = make_fresh(torch.float32)
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
    model, other = make_fresh(), make_fresh()
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


def test_gradients_without_memory_to_gather_them_change_nothing(monkeypatch):
    """Where memory runs out between the backward pass and the update, in the copies that are sent."""
    model, other = make_fresh(), make_fresh()
    optimizer, other_optimizer = model.setup_optimizer(), other.setup_optimizer()
    reduce_next, calls = optimizer._reduce_next, []

    def fail_once():
        calls.append(len(calls))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        reduce_next()
    monkeypatch.setattr(optimizer, "_reduce_next", fail_once)
    with pytest.raises(OutOfMemory, match="CUDA out of memory"):
        train_step(model, optimizer, make_batch(), 2)
    assert len(calls) > 3   # the rest is sent all the same, for the other ranks wait for it
    assert train_step(model, optimizer, make_batch(), 2) == train_step(other, other_optimizer, make_batch(), 2)
    assert_equal(copy_params(model), copy_params(other), rtol=0, atol=0)


def test_a_rank_without_memory_for_zeros_either_ends_in_one_sentence(monkeypatch):
    """The others end, too, in any_rank, which finds this one gone (test_ranks.py)."""
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
    model = make_fresh()
    optimizer = model.setup_optimizer()
    monkeypatch.setattr(optimizer, "_reduce_next", fail)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        train_step(model, optimizer, make_batch(), 2)
    code, sentence = explain_ending(raised.value)
    assert code == 2 and sentence.startswith("error: out of memory (CUDA out of memory.); set a smaller --device-batch")


# ---------------------------------------------------------------------------------------------------------------------
# fp16


def test_loss_scaler_halves_and_grows():
    scaler = LossScaler(scale=16.0, growth_steps=3)
    scales = []
    for overflowed in (False, False, False, True, False, False, True, False, False, False):
        scaler.update(overflowed)
        scales.append(scaler.scale)
    assert scales == [16, 16, 32, 16, 16, 16, 8, 8, 8, 16]


def test_gradients_that_overflow_at_any_scale_stop_the_run():
    scaler = LossScaler(scale=2.0**-12)
    for _ in range(2):
        scaler.update(overflowed=True)
    assert scaler.scale == 2.0**-14    # the least normal number of fp16
    with pytest.raises(UserError, match="fp16 gradients overflow at any scale of the loss, so the run stopped"):
        scaler.update(overflowed=True)


def test_loss_scale_cancels():
    """A power of two changes exponents only: in fp32 gradients and loss are the same but for rounding."""
    results = []
    for scaler in (None, LossScaler(2.0**12)):
        model = make_fresh(torch.float32)
        recorder = GradRecorder(model)
        results.append((train_step(model, recorder, make_batch(), 3, scaler), recorder.grads))
    torch.testing.assert_close(results[1][0].loss, results[0][0].loss, rtol=1e-6, atol=0)
    assert_equal(results[1][1], results[0][1], rtol=1e-5, atol=1e-9)


def test_fp16_overflow_skips_and_recovers():
    model, scaler = make_fresh(torch.float16), LossScaler(2.0**40)
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
    model, scaler = make_fresh(torch.float16), LossScaler()
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    stats = train_step(model, model.setup_optimizer(), make_batch(), 4, scaler)
    with pytest.raises(UserError, match="loss is nan"):
        stats.check_finite(0)


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


def train_in_bf16(rank, is_exact):
    """Losses, and a hash of all parameters as a checkpoint has them. is_exact: all matrices are sent in fp32."""
    model = make_fresh(torch.bfloat16)
    optimizer, losses, num_rounded = model.setup_optimizer(), [], 0
    for step in range(5):
        batch = make_batch(step)
        losses.append(train_step(model, optimizer, Batch(batch.inputs[rank::2], batch.targets[rank::2], None), 2).loss)
        if is_exact:
            optimizer.gather_masters()
        matrices = [block.mlp.c_fc.weight for block in model.transformer.h]
        num_rounded = sum(torch.equal(matrix, matrix.bfloat16().float()) for matrix in matrices)
    assert num_rounded == (0 if is_exact else 1)  # the other rank's of the two layers
    optimizer.gather_masters()
    digest = hashlib.sha256(b"".join(param.float().numpy().tobytes() for param in copy_params(model).values()))
    return losses, digest.hexdigest()


def run_rank(rank, folder):
    """What each of two processes does; its results go to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = make_fresh()
    stats = run_steps(model, 2, ranks=Ranks(rank, rank, 2))
    facts = {"losses": [s.loss for s in stats], "num_targets": [s.num_targets for s in stats],
             "any": any_rank(rank == 1, False)}
    save_file(copy_params(model), f"{folder}/params_{rank}.safetensors")

    # One rank without targets takes part; without any on both, all skip; one rank's overflow is everybody's
    optimizer, batch = model.setup_optimizer(), make_batch()
    nothing = replace(batch, targets=torch.full_like(batch.targets, -1))
    facts["one empty"] = train_step(model, optimizer, nothing if rank else batch, 4).num_targets
    facts["both empty"] = train_step(model, optimizer, nothing, 4).skipped
    weights = torch.full((B, T), float("inf") if rank else 1.0)
    facts["overflow"] = train_step(model, optimizer, replace(batch, weights=weights), 4, LossScaler()).skipped
    facts["num_steps"] = optimizer.num_steps
    # One rank's lack of memory is everybody's, in the last of four micro-batches, when the other has begun to send, and
    # before; then both go on
    params = copy_params(model)
    for call in (1, 3):
        with out_of_memory_at(*([call] if rank else [])), pytest.raises(OutOfMemory) as raised:
            train_step(model, optimizer, batch, 2)
        assert str(raised.value).startswith("CUDA out of memory" if rank else "another rank did")
        assert_equal(copy_params(model), params, rtol=0, atol=0)
    facts["after"] = train_step(model, optimizer, batch, 2).grad_norm
    facts["gathered"] = gather(10 - rank), sum_over_ranks(torch.tensor([rank, 5])).tolist()
    facts["bf16"] = [train_in_bf16(rank, is_exact) for is_exact in (False, True)]
    with open(f"{folder}/facts_{rank}.json", "w") as file:
        json.dump(facts, file)
    dist.destroy_process_group()
    end_process()


def test_two_ranks_equal_one(tmp_path):
    start_warm_process()
    mp.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="forkserver")
    model = make_fresh()
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
    assert facts[0]["after"] > 0 and facts[0]["gathered"] == [[10, 9], [1, 10]]
    sent_in_bf16, sent_in_fp32 = facts[0]["bf16"]
    assert sent_in_bf16 == sent_in_fp32  # not one bit: the forward pass rounds them anyway, their owner keeps them
