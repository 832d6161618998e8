"""fp8: the product and its gradients against those of the dequantised operands, CUDA's rules, what training changes.

CPUs compute fp8 products exactly, to fp32's rounding; nothing here has run on a GPU.
"""

import copy
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import fp8
from nanochat.choices import StepRows, Wanted, choose_how
from nanochat.common import UserError
from nanochat.cross_entropy import LOSSES
from nanochat.decoding import copy_for_decoding
from nanochat.fp8 import E4M3, Float8, Fp8Linear, choose_fp8, quantize_weight, use_fp8
from nanochat.gpt import Linear, norm
from nanochat.train import Batch, train_step
from tests.helpers import CONFIG, CPU, TINY, assert_same_weights, make_model

N, K, M = 40, 64, 96
UNIT = torch.ones(())


def make_layer(dtype=torch.float32, seed=0):
    """A layer (K) -> (M), normed input (2, N / 2, K), gradient of its output; weights exact in bf16."""
    rng = torch.Generator().manual_seed(seed)
    linear = Linear(K, M, torch.float32)
    linear.weight.data = (0.1 * torch.randn(M, K, generator=rng)).bfloat16().float()
    x = norm(torch.randn(2, N // 2, K, generator=rng)).to(dtype).requires_grad_()
    return Fp8Linear(linear, torch.bfloat16), x, torch.randn(2, N // 2, M, generator=rng).to(dtype)


def make_trained(is_fp8, config=CONFIG, loss="fused", num_steps=0, micro_rows=4):
    model = make_model(config, torch.bfloat16, as_initialised=True)
    model.loss = loss
    optimizer = model.setup_optimizer()
    if is_fp8:
        use_fp8(model, optimizer)
    return model, optimizer, [take_step(model, optimizer, step, micro_rows) for step in range(num_steps)]


def take_step(model, optimizer, step, micro_rows=4):
    ids = torch.randint(0, 64, (8, model.config.sequence_len + 1), generator=torch.Generator().manual_seed(step))
    return train_step(model, optimizer, Batch(ids[:, :-1], ids[:, 1:], None), micro_rows).loss


# ---------------------------------------------------------------------------------------------------------------------
# One product


def test_product_and_gradients_are_those_of_the_dequantised_operands():
    layer, x, dy = make_layer()
    x8 = layer.prepare(x).x8
    plain_x, plain_weight = x8.dequantize(torch.float32), layer.fp8.dequantize(torch.float32)
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), dy)
    for actual, expected in ((y, plain_x @ plain_weight.T), (dx, dy @ plain_weight),
                             (dw, dy.flatten(0, 1).T @ plain_x.flatten(0, 1))):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (y - F.linear(x, layer.weight)).norm() < 0.06 * y.norm()    # 3 bits of mantissa
    assert torch.equal(layer(x), layer(layer.prepare(x)))


def test_dequantised_operands_are_exact_in_bf16():
    layer, x, dy = make_layer(torch.bfloat16)
    for tensor in (layer.fp8, layer.prepare(x).x8):
        assert torch.equal(tensor.dequantize(torch.bfloat16).float(), tensor.dequantize(torch.float32))
        assert torch.frexp(tensor.unit)[0] == 0.5    # a power of two
    y = layer(x)
    dx, dw = torch.autograd.grad(y, (x, layer.weight), dy)
    assert y.dtype == dx.dtype == torch.bfloat16 and dw.dtype == torch.float32


@pytest.mark.parametrize("C", [16, 48, 256, 768, 1536, 4096])
def test_largest_normed_value_fits(C):
    """All of a token's energy in one channel, which bf16 may round up to above sqrt(C)."""
    for sign in (1, -1):
        x = norm(torch.zeros(1, C, dtype=torch.bfloat16).index_fill_(1, torch.tensor(3), sign * 100.0))
        assert x.abs().max() >= C**0.5 * (1 - 2**-9)
        x8 = Float8(x, UNIT).quantize_input(x)
        assert 448 / 2.1 < x8.data.float().abs().max() <= 448
        torch.testing.assert_close(x8.dequantize(torch.float32), x.float(), rtol=2**-4, atol=0)
    # what no norm has bounded is clamped: the cast of some devices would make NaN of it
    assert Float8(x, UNIT).quantize_input(1000 * x).data.float().abs().max() == 448


def test_small_activations_keep_their_bits():
    x = torch.full((1, 1536), 2e-3, dtype=torch.bfloat16)
    x8 = Float8(x, UNIT).quantize_input(x)
    torch.testing.assert_close(x8.dequantize(torch.float32), x.float(), rtol=2**-4, atol=0)


@pytest.mark.parametrize("largest", [1e-9, 1e-3, 0.999, 1.0, 448.0, 1e6])
def test_weights_fill_the_range(largest):
    weight = largest * torch.linspace(-1, 1, 256).view(16, 16)
    w8 = quantize_weight(weight, torch.float32)
    assert 224 <= w8.data.float().abs().max() <= 448
    torch.testing.assert_close(w8.dequantize(torch.float32), weight, rtol=2**-4, atol=largest / 2**14)
    assert not quantize_weight(torch.zeros(16, 16), torch.bfloat16).data.float().any()


def make_zeros(rows, cols, dtype=E4M3):
    return torch.zeros(rows, cols).to(dtype)


@pytest.mark.parametrize(("changes", "rule"), [
    ({"a": make_zeros(N, K + 8), "b": make_zeros(M, K + 8)},               "multiples of 16"),
    ({"b": make_zeros(M + 8, K)},                                          "multiples of 16"),
    ({"a": make_zeros(K, N).T},                                            "row-major"),
    ({"b": make_zeros(K, M).T},                                            "row-major"),
    ({"a": make_zeros(N, 2 * K)[:, :K]},                                   "row-major"),
    ({"a": make_zeros(N, K, torch.float8_e5m2), "b": make_zeros(M, K, torch.float8_e5m2)}, "one must be e4m3"),
    ({"a_unit": torch.ones((), dtype=torch.float64)},                      "fp32 scalars"),
    ({"a_unit": torch.ones(N)},                                            "fp32 scalars"),
    ({"b_unit": torch.ones((), device="meta")},                            "on the device"),
])
def test_what_cuda_refuses_is_refused_here(changes, rule):
    parts = {"a": make_zeros(N, K), "b": make_zeros(M, K), "a_unit": UNIT, "b_unit": UNIT} | changes
    with pytest.raises(ValueError, match=rule):
        Float8(parts["b"], parts["b_unit"]).multiply(Float8(parts["a"], parts["a_unit"]), torch.bfloat16)


def test_gradients_may_be_e5m2():
    dy = torch.randn(N, K).to(torch.float8_e5m2)
    weight = quantize_weight(torch.randn(M, K), torch.float32)
    torch.testing.assert_close(weight.multiply(Float8(dy, UNIT), torch.float32),
                               dy.float() @ weight.dequantize(torch.float32).T, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The model


def test_layers_are_those_with_normed_inputs(monkeypatch):
    """Each of them, no other; and what they read is bounded, whatever the weights are."""
    model = make_model(CONFIG, torch.bfloat16)
    use_fp8(model, model.setup_optimizer())
    names = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    in_block = ("attn.c_q", "attn.c_k", "attn.c_v", "mlp.c_fc")
    assert names == {f"transformer.h.{i}.{name}" for i in range(4) for name in in_block} | {"lm_head"}
    largest, quantize_input = [], Float8.quantize_input

    def watch(self, x):
        largest.append(float(x.detach().abs().max()) / x.size(-1) ** 0.5)
        return quantize_input(self, x)
    monkeypatch.setattr(Float8, "quantize_input", watch)
    ids = torch.randint(0, 265, (2, 64))
    model(ids, ids)
    assert len(largest) == 4 * 2 + 1 and 0 < max(largest) <= 1 + 2**-8


class CastCounter(TorchDispatchMode):
    """Elements cast to e4m3, by the shape of the tensor."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype == E4M3:
            self.shapes[tuple(result.shape)] += 1
        return result


def test_casts_of_a_step_are_as_few_as_can_be():
    """One of x for q, k and v, one for the MLP, one for the head; of each weight one, however many micro-batches."""
    model, optimizer, _ = make_trained(is_fp8=True, config=TINY)
    with CastCounter() as counter:
        take_step(model, optimizer, 0, micro_rows=2)
    assert counter.shapes == {(2, 16, 32): 4 * 2 * 2, (32, 32): 4 * 1,    # 4 micro-batches of the head's (N, C)
                              **{(32, 32): 4 + 3 * 2, (128, 32): 2, (320, 32): 1}}


def test_copies_are_renewed_by_each_step():
    model, optimizer, _ = make_trained(is_fp8=True, config=TINY)
    layers = [module for module in model.modules() if isinstance(module, Fp8Linear)]
    before, addresses = [layer.fp8.data.clone() for layer in layers], [layer.data.data_ptr() for layer in layers]
    for step in range(2):    # at first the projections are zero, so that only the head learns
        take_step(model, optimizer, step)
    for layer, data, address in zip(layers, before, addresses, strict=True):
        assert not torch.equal(layer.data.float(), data.float()) and layer.data.data_ptr() == address
        for actual, expected in zip(layer.fp8, quantize_weight(layer.weight, torch.bfloat16), strict=True):
            assert torch.equal(actual.float(), expected.float())


def test_parameters_and_checkpoints_are_as_before():
    plain, fp8_model = (make_trained(is_fp8)[0] for is_fp8 in (False, True))
    assert [name for name, _ in fp8_model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert_same_weights(fp8_model, plain)
    assert fp8_model.estimate_flops() == plain.estimate_flops()
    assert fp8_model.num_scaling_params() == plain.num_scaling_params()


def test_evaluation_and_decoding_are_those_of_the_masters():
    ids = torch.randint(0, 265, (2, 64), generator=torch.Generator().manual_seed(0))
    model = make_model(CONFIG, torch.bfloat16)
    fp8_model = copy.deepcopy(model)
    use_fp8(fp8_model, fp8_model.setup_optimizer())
    assert not torch.equal(model(ids, ids), fp8_model(ids, ids))
    assert not torch.equal(model(ids), fp8_model(ids))
    with torch.no_grad():
        for compute in (lambda m: m(ids), lambda m: m(ids, ids), lambda m: m(ids, ids, loss_reduction="none"),
                        lambda m: copy_for_decoding(m)(ids)):
            assert torch.equal(compute(model), compute(fp8_model))


def test_on_off_on_is_exact_for_the_masters():
    """Steps in fp8, one without on a model that takes over weights and state, as resume does, and fp8 again: what the
    fp8 copies were leaves no trace."""
    model, optimizer, _ = make_trained(is_fp8=True, config=TINY, num_steps=2)

    def resume(model, optimizer, is_fp8):
        other, other_optimizer, _ = make_trained(False, TINY)
        other.load_state_dict(model.state_dict())
        for name, piece in optimizer.get_named_state().items():
            other_optimizer.get_named_state()[name].tensor.copy_(piece.tensor)
        other_optimizer.num_steps = optimizer.num_steps
        if is_fp8:
            use_fp8(other, other_optimizer)
        return other, other_optimizer
    twins = [resume(model, optimizer, is_fp8=False) for _ in range(2)]
    losses = [take_step(*twin, step=2) for twin in twins]
    assert losses[0] == losses[1]
    assert_same_weights(twins[0][0], twins[1][0])
    on_again = [resume(*twins[0], is_fp8=True) for _ in range(2)]
    assert take_step(*on_again[0], step=3) == take_step(*on_again[1], step=3)
    assert_same_weights(on_again[0][0], on_again[1][0])


def test_products_do_not_depend_on_the_cut():
    """To the bit: a token's result is the same, whatever stands beside it."""
    layer, x, _ = make_layer(torch.bfloat16)
    for rows in (1, 5, 20):
        pieces = [layer(piece * factor) for factor in (1, 0) for piece in x.flatten(0, 1).split(rows)][:N // rows]
        assert torch.equal(torch.cat(pieces), layer(x).flatten(0, 1))


@pytest.mark.parametrize("loss", LOSSES)
def test_training_does_not_depend_on_the_cut(loss):
    """But for the order in which bf16 gradients are summed."""
    gradients = {}
    for rows in (1, 4):
        model, _, _ = make_trained(True, TINY, loss)
        ids = torch.randint(0, 265, (8, 16), generator=torch.Generator().manual_seed(0))
        for piece in ids.split(rows):
            model(piece, piece, loss_reduction="sum").backward()
        gradients[rows] = model.lm_head.weight.grad
    assert (gradients[1] - gradients[4]).norm() < 0.02 * gradients[4].norm()


def test_head_of_the_fused_loss_is_that_of_the_plain_one():
    results = {}
    for loss in LOSSES:
        model = make_model(CONFIG, torch.bfloat16)
        model.loss = loss
        use_fp8(model, model.setup_optimizer())
        x = norm(torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
        targets = torch.randint(-1, 265, (3, 50), generator=torch.Generator().manual_seed(1)).clamp(min=-1)
        value = LOSSES[loss](x, model.lm_head.weight, targets, 265, fp8=model.lm_head.fp8)
        results[loss] = [value, *torch.autograd.grad(value, (x, model.lm_head.weight))]
    for fused, plain in zip(*results.values(), strict=True):
        assert (fused.float() - plain.float()).norm() < 0.01 * plain.float().norm()
    assert not results["fused"][2][265:].any()


def test_losses_fall_as_in_bf16():
    """Where they fall steeply, and rounding alone shifts them by hundredths; for the end see the slow test."""
    losses = {is_fp8: make_trained(is_fp8, TINY, num_steps=30)[2] for is_fp8 in (False, True)}
    assert losses[True][-1] < losses[True][0] - 1
    assert sum(losses[True][-10:]) / 10 == pytest.approx(sum(losses[False][-10:]) / 10, abs=0.15)


def make_chain(num_rows, seed):
    """Rows of a Markov chain of 64 tokens, each with four likely successors."""
    table = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    rng = torch.Generator().manual_seed(seed)
    columns = [torch.randint(0, 64, (num_rows,), generator=rng)]
    for _ in range(CONFIG.sequence_len):
        columns.append(torch.multinomial(table[columns[-1]], 1, generator=rng)[:, 0])
    return torch.stack(columns, dim=1)    # (B, T + 1)


@pytest.mark.slow
def test_final_loss_is_that_of_bf16(num_steps=150):
    """At depth 4, over 3 seeds."""
    held_out, differences = make_chain(64, seed=1000), []
    for seed in range(3):
        losses = []
        for is_fp8 in (False, True):
            model = make_model(CONFIG, torch.bfloat16, seed, as_initialised=True)
            optimizer = model.setup_optimizer(matrix_lr=0.005)
            if is_fp8:
                use_fp8(model, optimizer)
            for step in range(num_steps):
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * min(1, (step + 1) / 20, 2 * (1 - step / num_steps))
                ids = make_chain(8, seed=1 + step + num_steps * seed)
                train_step(model, optimizer, Batch(ids[:, :-1], ids[:, 1:], None), 8)
            with torch.no_grad():
                losses.append(float(model(held_out[:, :-1], held_out[:, 1:])))
        differences.append(losses[1] - losses[0])
    assert losses[0] < 2.5
    assert abs(sum(differences)) / 3 < 0.005


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones():
    """Nothing of it breaks the graph."""
    torch._dynamo.reset()
    models = []
    for is_compiled in (False, True):
        model, optimizer, _ = make_trained(is_fp8=True, config=TINY)
        if is_compiled:
            for block in model.transformer.h:
                block.compile(dynamic=False, fullgraph=True)
        models.append((model, [take_step(model, optimizer, step) for step in range(2)]))
    assert models[0][1] == pytest.approx(models[1][1], abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# The choice


def test_off_unless_asked_for():
    for wanted, why in (("auto", "no GPU has shown yet that it pays"), ("off", "asked for")):
        is_fp8, reason = choose_fp8(wanted, torch.device("cuda", 0), torch.float16, CONFIG)
        assert not is_fp8 and why in reason
    is_fp8, reason = choose_fp8("on", CPU, torch.bfloat16, CONFIG)
    assert is_fp8 and reason == "asked for; slow on a CPU, where it only shows the loss"


@pytest.mark.parametrize(("device", "dtype", "config", "message"), [
    ("cuda", torch.bfloat16, CONFIG,                                      "compute capability 8.9 or more"),
    ("mps",  torch.bfloat16, CONFIG,                                      "it needs an NVIDIA GPU"),
    ("cpu",  torch.float16,  CONFIG,                                      "it goes with --dtype bfloat16 only"),
    ("cpu",  torch.float32,  CONFIG,                                      "it goes with --dtype bfloat16 only"),
    ("cpu",  torch.bfloat16, replace(CONFIG, n_head=5, n_kv_head=5, n_embd=40), "40 channels, 40 of queries"),
    ("cpu",  torch.bfloat16, replace(CONFIG, n_head=16),                  "8 of keys must be multiples of 16"),
    ("cpu",  torch.bfloat16, replace(CONFIG, mlp_dim=200),                "200 of the MLP must be multiples of 16"),
])
def test_refused_in_one_sentence(device, dtype, config, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match=f"--fp8 on can't be had here: .*{message}.*; --fp8 off goes without"):
        choose_fp8("on", torch.device(device), dtype, config)


def test_refused_where_the_product_fails_or_is_wrong(monkeypatch):
    def fail(*args, **settings):
        raise RuntimeError("_scaled_mm is not for this build\nmore")
    for product, reason in ((fail, "_scaled_mm is not for this build"),
                            (lambda a, b, *args, **settings: (2 * a.float() @ b.float()).bfloat16(), "are wrong")):
        monkeypatch.setattr(torch, "_scaled_mm", product)
        with pytest.raises(UserError, match=f"--fp8 on can't be had here: .*{reason}; "):
            choose_fp8("on", CPU, torch.bfloat16, CONFIG)
    monkeypatch.setattr(torch.version, "hip", "6.4")    # whose capability reads 9.4
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert "needs an NVIDIA GPU" in fp8.find_obstacle(torch.device("cuda", 0))


def test_choice_is_recorded_and_kept():
    rows = StepRows(CONFIG, 64, 8)
    wanted = Wanted(dtype="bfloat16", attention="sdpa", compile="off", fp8="on")
    decisions = []
    choices = choose_how(wanted, rows, 1e9, CPU, decisions)
    assert choices.machine.is_fp8 and choices.to_json(8)["fp8"] == "on"
    assert ("fp8", "True") in [(decision["what"], decision["value"]) for decision in decisions]
    saved = SimpleNamespace(meta={"choices": choices.to_json(8)})
    for asked, expected in (("auto", True), ("off", False)):
        again = choose_how(replace(wanted, fp8=asked).keep(saved, None, CPU), rows, 1e9, CPU, [])
        assert again.machine.is_fp8 is expected
    del saved.meta["choices"]["fp8"]    # of a run that is older than fp8
    assert not choose_how(replace(wanted, fp8="auto").keep(saved, None, CPU), rows, 1e9, CPU, []).machine.is_fp8
