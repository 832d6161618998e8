"""Copies of the weights in the compute dtype: training with them is training without, bit for bit."""

import copy
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dev.bench_memory import LiveBytes, fake_step, join_phases, list_kept
from dev.gpu_copies import CopiedLinear, predict_peak, use_copies
from nanochat import gpt
from nanochat.checkpoint_manager import restore, save_checkpoint
from nanochat.decoding import copy_for_decoding
from nanochat.fp8 import use_fp8
from nanochat.memory import Machine, predict_memory
from nanochat.scaling import make_config
from nanochat.train import Batch, LossScaler, add_gradients, train_step
from tests.helpers import CONFIG, TINY, assert_same_weights, make_meta, make_model, run_on_ranks

NUM_ROWS = 8    # of a step, all ranks together


def make_training(has_copies, dtype=torch.bfloat16, config=TINY):
    """A model and its optimizer, of a seed; gradients reach everything from the first step on."""
    model = make_model(config, dtype, as_initialised=True)
    for block in model.transformer.h:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.02)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=0.02)
    optimizer = model.setup_optimizer(batch_lr_scale=0.1)
    if has_copies:
        use_copies(model, optimizer)
    return model, optimizer


def take_steps(model, optimizer, steps, micro_rows=NUM_ROWS, scaler=None, rank=0, world_size=1):
    stats = []
    for step in steps:
        ids = torch.randint(0, 256, (NUM_ROWS, 17), generator=torch.Generator().manual_seed(step))[rank::world_size]
        stats.append(train_step(model, optimizer, Batch(ids[:, :-1], ids[:, 1:], None), micro_rows, scaler))
    return [(s.loss, s.grad_norm, s.skipped) for s in stats]


def list_copied(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, CopiedLinear)}


def assert_same_training(trained, other):
    """Weights and optimizer state, bit for bit."""
    assert_same_weights(trained[0], other[0])
    for (name, piece), (_, expected) in zip(*(optimizer.get_named_state().items() for _, optimizer in (trained, other)),
                                            strict=True):
        assert torch.equal(piece.tensor, expected.tensor), name


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_all_linear_layers_but_the_head_have_copies():
    model, _ = make_training(True, config=CONFIG)
    in_block = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    gates = {f"transformer.h.{i}.attn.ve_gate" for i in range(4) if CONFIG.has_value_embed(i)}
    assert set(list_copied(model)) == {f"transformer.h.{i}.{n}" for i in range(4) for n in in_block} | gates | {
        "smear_gate"}
    plain = make_training(False, config=CONFIG)[0]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert_same_weights(model, plain)    # of the state_dict, which checkpoints are made of
    assert model.num_scaling_params() == plain.num_scaling_params()
    assert model.estimate_flops() == plain.estimate_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_need_no_cast_have_no_copies(dtype):
    trained = make_training(True, dtype)
    assert not list_copied(trained[0])
    take_steps(*trained, range(1))


@pytest.mark.parametrize("micro_rows", [8, 2])
def test_training_is_the_same_bit_for_bit(micro_rows):
    trainings = [make_training(has_copies, config=CONFIG) for has_copies in (False, True)]
    figures = [take_steps(*training, [0] * 4, micro_rows) for training in trainings]
    assert figures[0] == figures[1] and figures[0][-1][0] < figures[0][0][0]
    assert_same_training(*trainings)


def test_fp16_with_its_scaler_is_the_same():
    """From a scale that overflows: the steps that are skipped leave the copies alone. Bit for bit by itself; in a
    process that has run many other tests the last bits of the embeddings have differed, for a reason not found."""
    trainings = [make_training(has_copies, torch.float16) for has_copies in (False, True)]
    figures = [take_steps(*training, range(6), 4, LossScaler(2.0**24)) for training in trainings]
    assert figures[0][0][2] and not figures[0][-1][2]
    assert [f[0] for f in figures[0]] == [f[0] for f in figures[1]] and figures[0][-1] == figures[1][-1]
    for (name, a), (_, b) in zip(*(model.state_dict().items() for model, *_ in trainings), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def train_on_ranks(micro_rows):
    """Figures and weights without copies and with; whether these are the cast weights, gathered in bf16 or fp32."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    results, are_right = [], []
    for has_copies in (False, True):
        model, optimizer = make_training(has_copies)
        figures = take_steps(model, optimizer, range(3), micro_rows, rank=rank, world_size=world_size)
        for gather in (lambda: None, optimizer.gather_masters):
            gather()
            are_right += [torch.equal(layer.copy, layer.weight.bfloat16()) for layer in list_copied(model).values()]
        weights = {name: weight.double().flatten().tolist() for name, weight in model.state_dict().items()}
        results.append({"figures": figures, "weights": weights})
    return {"results": results, "num_copies": len(are_right) // 2, "are_right": all(are_right)}


def test_many_ranks_train_the_same_bit_for_bit(tmp_path):
    """With one micro-batch and with several."""
    jobs = [(world_size, train_on_ranks, (micro_rows,)) for world_size in (1, 2, 4)
            for micro_rows in (NUM_ROWS // world_size, 1)]
    for ranks in run_on_ranks(jobs, tmp_path):
        for told in ranks:
            assert told["results"][0] == told["results"][1] and told["num_copies"] == 14 and told["are_right"]


def test_a_resume_with_and_without_is_exact(tmp_path):
    whole = make_training(False)
    take_steps(*whole, range(6), 4)
    model, optimizer = make_training(True)
    for has_copies, steps in ((False, range(2, 4)), (True, range(4, 6))):
        before = make_meta(optimizer)
        take_steps(model, optimizer, range(steps.start - 2, steps.start), 4)
        save_checkpoint(tmp_path, steps.start, model, optimizer, {**before, "optimizer_steps": optimizer.num_steps})
        model, optimizer = make_training(False)
        restore(tmp_path, steps.start, model, optimizer)
        if has_copies:
            use_copies(model, optimizer)
    take_steps(model, optimizer, range(4, 6), 4)
    assert_same_training((model, optimizer), whole)


# ---------------------------------------------------------------------------------------------------------------------
# What else reads the weights


def test_evaluation_and_decoding_read_the_masters():
    """Also of weights that changed since the last step, which no hook saw."""
    model, optimizer = make_training(True, config=CONFIG)
    with torch.no_grad():
        for layer in list_copied(model).values():
            layer.weight.mul_(1.5)
    plain = make_training(False, config=CONFIG)[0]
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, 265, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for compute in (lambda m: m(ids), lambda m: m(ids, ids), lambda m: m(ids, ids, loss_reduction="none"),
                        lambda m: copy_for_decoding(m)(ids), lambda m: m.unembed(m.forward_trunk(ids), ids[0])):
            assert torch.equal(compute(model), compute(plain))


def test_a_copied_model_has_copies_of_its_own():
    model, _ = make_training(True)
    other = copy.deepcopy(model)
    for layer, copied in zip(list_copied(model).values(), list_copied(other).values(), strict=True):
        assert layer.copy is not copied.copy and torch.equal(layer.copy, copied.copy)


def test_layers_in_fp8_keep_their_copies_in_8_bits():
    model, optimizer = make_training(False)
    use_fp8(model, optimizer)
    use_copies(model, optimizer)
    names = {name.rpartition(".")[2] for name in list_copied(model)}
    assert names == {"c_proj", "ve_gate", "smear_gate"}
    take_steps(model, optimizer, range(2))
    assert all(torch.equal(layer.copy, layer.weight.bfloat16()) for layer in list_copied(model).values())


# ---------------------------------------------------------------------------------------------------------------------
# Cost


class CastCounter(TorchDispatchMode):
    """Elements cast to bf16 by the shape of the tensor."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16:
            self.shapes[tuple(result.shape)] += 1
        return result


def test_no_micro_batch_casts_a_matrix():
    counts = {}
    for has_copies in (False, True):
        model, optimizer = make_training(has_copies)
        with CastCounter() as counter:
            ids = torch.zeros(8, 17, dtype=torch.int64)
            add_gradients(model, optimizer, Batch(ids[:, :-1], ids[:, 1:], None), 2, 1.0)
        counts[has_copies] = counter.shapes[128, 32]    # of c_fc
    assert counts == {False: 2 * 4, True: 0}    # layers, micro-batches


@pytest.mark.parametrize(("depth", "rows", "T"), [(4, 4, 2048), (8, 2, 128)])    # worst at the loss, at the update
def test_prediction_of_the_peak(depth, rows, T):
    config, machine = make_config(depth, vocab_size=2048, sequence_len=T), Machine("bfloat16", "sdpa", False, "cpu")
    memory = predict_memory(config, T, rows, machine, 2)
    with fake_step(config, machine) as (model, optimizer):
        use_copies(model, optimizer)
        with LiveBytes(list_kept(model, optimizer)) as live:
            tokens = torch.zeros((rows * 2, T + 1), dtype=torch.int64)
            add_gradients(model, optimizer, Batch(tokens[:, :-1], tokens[:, 1:], None), rows, 1.0)
            optimizer.reduce_gradients()
            optimizer.step()
    assert predict_peak(memory) == pytest.approx(live.peak_bytes, rel=0.02)
    phases = join_phases(memory)
    assert (phases["update"] > phases["loss, backward"]) == (depth == 8)


@pytest.mark.slow
@pytest.mark.parametrize("is_trunk", [False, True])
def test_compiled_training_is_the_same_and_compiles_once(is_trunk, monkeypatch):
    """By all of the compiler but its last stage, which makes C++: nothing breaks the graph, no later step compiles."""
    how = {"dynamic": False, "fullgraph": True, "backend": "aot_eager"}
    monkeypatch.setattr(gpt, "compile_trunk", lambda: trunk)
    figures = []
    for has_copies in (False, True):
        torch._dynamo.reset()
        trunk = torch.compile(gpt.GPT.forward_trunk, **how)
        model, optimizer = make_training(has_copies)
        model.is_trunk_compiled = is_trunk
        for block in () if is_trunk else model.transformer.h:
            block.compile(**how)
        figures.append(take_steps(model, optimizer, range(2), 4))
        with torch.compiler.set_stance("fail_on_recompile"):
            figures[-1] += take_steps(model, optimizer, range(2, 4), 4)
    torch._dynamo.reset()
    assert figures[0] == figures[1]
