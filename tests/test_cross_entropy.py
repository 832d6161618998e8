"""The plain loss against its definition, the fused one against the plain one: values, gradients, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import compilation, cross_entropy
from nanochat.config import GPTConfig
from nanochat.cross_entropy import LOSSES, linear_cross_entropy, plain_cross_entropy, softcap
from nanochat.memory import Machine, count_loss_bytes
from tests.helpers import measure_peak_bytes

V, PADDED_V, C = 70, 128, 32


def make_inputs(N=100, dtype=torch.float64, logit_std=8.0, seed=0):
    """x (N, C), master weight (padded V, C), targets (N,) of which some are ignored, factors (N,) of either sign."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(PADDED_V, C, generator=rng, dtype=torch.float64) * logit_std / C**0.5
    master = torch.float64 if dtype == torch.float64 else torch.float32
    weight = weight.to(dtype).to(master).requires_grad_()  # exact in the lower dtype, so that only the loss is compared
    targets = torch.randint(0, V, (N,), generator=rng)
    targets[torch.rand(N, generator=rng) < 0.2] = -1
    return x, weight, targets, torch.randn(N, generator=rng, dtype=torch.float64).to(master)


def reduce_plain(x, weight, targets, reduction, factors, cap=GPTConfig.softcap):
    weights = factors if reduction == "sum" else None
    loss = plain_cross_entropy(x, weight, targets, V, cap=cap, reduction=reduction, weights=weights)
    return (loss * factors).sum() if reduction == "none" else loss


def reduce_fused(x, weight, targets, reduction, factors, cap=GPTConfig.softcap):
    weights = factors if reduction == "sum" else None
    loss = linear_cross_entropy(x, weight, targets, V, cap=cap, reduction=reduction, weights=weights)
    return (loss * factors).sum() if reduction == "none" else loss


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the plain version


def test_softcap_is_15_tanh():
    logits = torch.linspace(-300, 300, 1001, dtype=torch.float64)
    torch.testing.assert_close(softcap(logits), 15 * torch.tanh(logits / 15), rtol=1e-14, atol=1e-14)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        capped = softcap(logits.to(dtype))
        assert capped.dtype == torch.float32
        torch.testing.assert_close(capped, 15 * torch.tanh(logits.to(dtype).float() / 15), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("cap", [15.0, 20.0, 0.0])
def test_plain_is_the_definition(cap):
    x, weight, targets, factors = make_inputs()
    logits = (x @ weight.T)[:, :V]
    capped = cap * torch.tanh(logits / cap) if cap else logits
    nll = F.cross_entropy(capped, targets, ignore_index=-1, reduction="none")
    for reduction, expected in (("none", nll), ("mean", nll.sum() / (targets >= 0).sum()),
                                ("sum", (nll * factors).sum())):
        weights = factors if reduction == "sum" else None
        actual = plain_cross_entropy(x, weight, targets, V, cap=cap, reduction=reduction, weights=weights)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [7, 16, 100, 2048])  # 100 tokens: not divisible, one chunk, less than a chunk
@pytest.mark.parametrize("cap", [15.0, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_equals_torch_in_fp64(reduction, cap, chunk_tokens, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", {"cpu": chunk_tokens})
    x, weight, targets, factors = make_inputs()
    expected = reduce_plain(x, weight, targets, reduction, factors, cap)
    actual = reduce_fused(x, weight, targets, reduction, factors, cap)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.tensor(-2.5, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(actual, (x, weight), upstream),
                               torch.autograd.grad(expected, (x, weight), upstream), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 33])
def test_chunk_boundaries(N, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", {"cpu": 16})
    x, weight, targets, factors = make_inputs(N)
    actual = linear_cross_entropy(x, weight, targets, V, reduction="none")
    torch.testing.assert_close(actual, plain_cross_entropy(x, weight, targets, V, reduction="none"), rtol=1e-12,
                               atol=1e-12)
    assert actual.shape == (N,)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [15.0, 0.0])
def test_low_precision_is_as_near_the_truth_as_the_plain_version(cap, dtype, reduction):
    """Errors against fp64 on the same inputs: at most twice those of the plain version in the same dtype."""
    x, weight, targets, factors = make_inputs(512, dtype)
    scale = 1024 if dtype == torch.float16 else 1  # what a gradient scaler would multiply by

    def get_errors(loss, inputs):
        values = (loss / scale, *torch.autograd.grad(loss, inputs))
        return [((a.double() - e).norm() / e.norm()).item() for a, e in zip(values, truth, strict=True)]
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    loss64 = reduce_plain(x64, weight64, targets, reduction, factors.double(), cap)
    truth = (loss64, *torch.autograd.grad(loss64 * scale, (x64, weight64)))
    plain = get_errors(reduce_plain(x, weight, targets, reduction, factors, cap) * scale, (x, weight))
    fused = get_errors(reduce_fused(x, weight, targets, reduction, factors, cap) * scale, (x, weight))
    rounding = torch.finfo(dtype).eps / 2
    assert all(ours <= 2 * theirs + rounding for ours, theirs in zip(fused, plain, strict=True)), (fused, plain)


@pytest.mark.parametrize("cap", [15.0, 0.0])
def test_fp16_holds_the_gradients_of_a_vocabulary_beyond_its_range(cap):
    """As marin's of 128,256: at the start all logits are alike, and their exponentials sum to its size."""
    x = torch.randn(4, 8).half().requires_grad_()
    weight, targets = (torch.randn(70_000, 8) * 1e-3).requires_grad_(), torch.tensor([0, 1, 69_999, -1])
    grads = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 70_000, cap=cap) * 64, (x, weight))
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = torch.autograd.grad(plain_cross_entropy(x64, weight64, targets, 70_000, cap=cap) * 64, (x64, weight64))
    for grad, wanted in zip(grads, expected, strict=True):
        assert (grad.double() - wanted).norm() < 0.01 * wanted.norm()


def test_a_cap_whose_exp_overflows_is_computed_plainly():
    x = (torch.randn(4, 8) * 1000).requires_grad_()
    weight, targets = torch.randn(V, 8, requires_grad=True), torch.tensor([0, 1, 2, -1])
    grads = torch.autograd.grad(linear_cross_entropy(x, weight, targets, V, cap=100.0), (x, weight))
    expected = torch.autograd.grad(plain_cross_entropy(x, weight, targets, V, cap=100.0), (x, weight))
    torch.testing.assert_close(grads, expected)
    assert all(grad.isfinite().all() for grad in grads)


def test_inputs_of_any_leading_shape():
    x, weight, targets, factors = make_inputs(12)
    flat = linear_cross_entropy(x, weight, targets, V, reduction="none")
    shaped = linear_cross_entropy(x.view(3, 4, C), weight, targets.view(3, 4), V, reduction="none")
    assert torch.equal(shaped, flat.view(3, 4))
    assert plain_cross_entropy(x.view(3, 4, C), weight, targets.view(3, 4), V, reduction="none").shape == (3, 4)
    by_sum = linear_cross_entropy(x.view(3, 4, C), weight, targets.view(3, 4), V, reduction="sum",
                                  weights=factors.view(3, 4))
    torch.testing.assert_close(by_sum, (flat * factors).sum())


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_reduction_and_misplaced_weights_are_refused(loss):
    x, weight, targets, factors = make_inputs(4)
    for reduction, weights in (("median", None), ("mean", factors), ("none", factors)):
        with pytest.raises(ValueError, match="reduction"):
            LOSSES[loss](x, weight, targets, V, reduction=reduction, weights=weights)


# ---------------------------------------------------------------------------------------------------------------------
# The edges


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("reduce", [reduce_fused, reduce_plain])
def test_nothing_to_learn_is_zero_not_nan(reduce, reduction, dtype):
    x, weight, targets, factors = make_inputs(20, dtype)
    loss = reduce(x, weight, torch.full_like(targets, -1), reduction, factors)
    dx, dw = torch.autograd.grad(loss, (x, weight))
    assert loss.item() == 0 and torch.equal(dx, torch.zeros_like(dx)) and torch.equal(dw, torch.zeros_like(dw))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("reduce", [reduce_fused, reduce_plain])
def test_ignored_targets_and_padding_get_no_gradient(reduce, reduction):
    x, weight, targets, factors = make_inputs()
    dx, dw = torch.autograd.grad(reduce(x, weight, targets, reduction, factors), (x, weight))
    assert not dx[targets < 0].any() and dx[targets >= 0].any(-1).all()
    assert not dw[V:].any() and dw[:V].any(-1).all()
    with torch.no_grad():
        weight[V:] = 1e4  # padding must not enter the sum either
    changed = reduce(x, weight, targets, reduction, factors)
    assert changed == reduce(*make_inputs()[:3], reduction, factors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_huge_logits_stay_finite(reduction, dtype):
    """Logits far beyond the softcap, of the target and of all the others, on either side."""
    weight = torch.linspace(-1, 1, V).repeat(2)[:PADDED_V, None].repeat(1, C).to(dtype)
    weight = weight.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    x = torch.full((6, C), 200 / C).to(dtype).requires_grad_()  # logits from -200 to 200
    targets = torch.tensor([0, 1, V // 2, V - 2, V - 1, -1])
    expected = plain_cross_entropy(x.detach().double(), weight.detach().double(), targets, V, reduction="none")
    nll = linear_cross_entropy(x, weight, targets, V, reduction="none")
    tolerance = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    torch.testing.assert_close(nll.double(), expected, rtol=tolerance, atol=tolerance)
    loss = linear_cross_entropy(x, weight, targets, V, reduction=reduction)
    for grad in torch.autograd.grad(loss.sum(), (x, weight)):
        assert grad.isfinite().all()


def test_without_a_softcap_large_logits_stay_finite():
    """exp(1,000) overflows fp32; the maximum is taken first."""
    x, weight, targets, _ = make_inputs(dtype=torch.float32, logit_std=1000.0)
    loss = linear_cross_entropy(x, weight, targets, V, cap=0.0)
    torch.testing.assert_close(loss, plain_cross_entropy(x, weight, targets, V, cap=0.0))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, weight)))


def test_rational_tanh_keeps_its_stated_bounds():
    z = torch.linspace(-200, 200, 400_001, dtype=torch.float64)
    error = (cross_entropy._rational_tanh(z) - z.tanh()).abs()
    assert 1e-5 < error.max() < 1.1e-4 and error[z.abs() < 2].max() < 1e-7
    t = cross_entropy._rational_tanh(z.float())
    assert t.abs().max() <= 1 and (t.float() - z.tanh()).abs().max() < 1.1e-4
    exact = cross_entropy._scaled_tanh(z, 15.0, is_fast=True)
    assert torch.equal(exact, (z / 15).tanh())  # only bf16 on a CPU takes the fraction


# ---------------------------------------------------------------------------------------------------------------------
# What it costs


class RecordSizes(TorchDispatchMode):
    """Notes the shape and dtype of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.tensors += [(tuple(t.shape), t.dtype) for t in (out if isinstance(out, tuple | list) else (out,))
                         if isinstance(t, torch.Tensor)]
        return out

    def largest(self):
        return max(torch.Size(shape).numel() for shape, _ in self.tensors)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_exist_a_chunk_at_a_time(dtype, reduction, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", {"cpu": 40})
    x, weight, targets, factors = make_inputs(400, dtype)
    with RecordSizes() as plain:
        plain_cross_entropy(x, weight, targets, V).backward()
    assert plain.largest() == 400 * V  # the recorder sees what it should
    with RecordSizes() as fused:
        if reduction == "none":  # as evaluation calls it; with gradients it is the plain loss
            with torch.no_grad():
                reduce_fused(x, weight, targets, reduction, factors)
        else:
            reduce_fused(x, weight, targets, reduction, factors).backward()
    assert 40 * V <= fused.largest() <= max(40 * V, 400 * C)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_gradients_are_made_under_no_grad(reduction):
    x, weight, targets, factors = make_inputs()
    with torch.no_grad(), RecordSizes() as recorder:
        linear_cross_entropy(x, weight, targets, V, reduction=reduction)
    assert (tuple(weight.shape), weight.dtype) not in recorder.tensors


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_head_that_stays_as_it_is_gets_no_gradient(reduction):
    """As in RL, which trains the blocks' matrices alone; that of the activations is the same."""
    x, weight, targets, factors = make_inputs()
    expected, _ = torch.autograd.grad(reduce_fused(x, weight, targets, reduction, factors), (x, weight))
    weight.requires_grad_(False)
    with RecordSizes() as recorder:
        reduce_fused(x, weight, targets, reduction, factors).backward()
    assert torch.equal(x.grad, expected) and weight.grad is None
    assert (tuple(weight.shape), weight.dtype) not in recorder.tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_equal_eager_ones(dtype, monkeypatch):
    reason = compilation.probe_compiler(torch.device("cpu"))
    if reason:
        pytest.skip(f"torch.compile doesn't work here: {reason}")
    x, weight, targets, factors = make_inputs(64, dtype)

    def run():
        losses = [reduce(x, weight, targets, reduction, factors)
                  for reduce, reductions in ((reduce_fused, ("sum", "none")), (reduce_plain, ("sum",)))
                  for reduction in reductions]
        return *losses, *(grad for loss in losses for grad in torch.autograd.grad(loss, (x, weight)))
    eager = run()
    monkeypatch.setattr(compilation, "_compile_kernels", False)  # put back afterwards
    compilation.set_compile_kernels(True)
    for compiled, expected in zip(run(), eager, strict=True):
        error = (compiled.double() - expected.double()).norm() / expected.double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_compiled_losses_take_what_memory_predicts(loss, monkeypatch):
    """On a CPU the compiler keeps exp in fp32 beside the logits: of a few tokens in the fused loss, else of all."""
    reason = compilation.probe_compiler(torch.device("cpu"))
    if reason:
        pytest.skip(f"torch.compile doesn't work here: {reason}")
    monkeypatch.setattr(compilation, "_compile_kernels", False)  # put back afterwards
    compilation.set_compile_kernels(True)
    N, V, C = 1024, 4096, 64
    config = GPTConfig(vocab_size=V, n_layer=1, n_head=1, n_kv_head=1, n_embd=C)
    x, weight = torch.randn(N, C).bfloat16().requires_grad_(), torch.randn(V, C, requires_grad=True)
    targets, factors = torch.randint(0, V, (N,)), torch.ones(N)

    def run():
        LOSSES[loss](x, weight, targets, V, reduction="sum", weights=factors).backward()
        x.grad = weight.grad = None
    run()
    machine = Machine("bfloat16", is_compiled=True, device_type="cpu", loss=loss)
    assert count_loss_bytes(config, N, machine) == pytest.approx(measure_peak_bytes(run), rel=0.1)
