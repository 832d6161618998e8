"""The mixture of experts against a loop over tokens; its balance against sorted lists; training, state, resume."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanochat import moe
from nanochat.common import UserError
from nanochat.config import GPTConfig
from nanochat.gpt import MLP
from nanochat.moe import Balance, MoE, make_balance
from tests.helpers import CONFIG, make_model

WIDE = GPTConfig(sequence_len=16, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L",
                 mlp_dim=256)


def make_layer(num_experts, top_k, dtype=torch.float64, seed=0):
    """A layer of 32 channels with random weights, gates and biases."""
    config = replace(WIDE, num_experts=num_experts, top_k=top_k)
    torch.manual_seed(seed)
    layer = MoE(config, MLP(config, config.expert_dim, dtype), dtype)
    with torch.no_grad():
        for param in layer.parameters():
            param.normal_(std=0.2)
        layer.router.weight.mul_(3)
        layer.expert_bias.normal_(std=0.1)
    return layer


def make_tokens(num=24, dtype=torch.float64, seed=1):
    tokens = torch.randn(2, num // 2, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return tokens.to(dtype).requires_grad_()


def slow_moe(layer, x):
    """Token by token, expert by expert."""
    out = []
    for token in x.flatten(0, 1):
        scores = [1 / (1 + torch.exp(-(row @ token))) for row in layer.router.weight]
        ranking = sorted(range(len(scores)), key=lambda j: -(scores[j] + layer.expert_bias[j]).item())
        y = layer.shared.c_proj.weight @ (layer.shared.c_fc.weight @ token).clamp(min=0) ** 2
        for j in ranking[:layer.top_k]:
            y = y + scores[j] * (layer.down.weight[j] @ (layer.up.weight[j] @ token).clamp(min=0) ** 2)
        out.append(y)
    return torch.stack(out).view_as(x)


def take_gradients(function, layer, x):
    """Output, and the gradients of its weighted sum, the input's first."""
    y = function(layer, x) if function is slow_moe else layer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names, params = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * weights).sum(), [x, *params], allow_unused=True)
    return {"y": y.detach(), **dict(zip(("x", *names), grads, strict=True))}


@pytest.mark.parametrize("few_rows", [0, 1000])    # padded batches, gathered weights
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (4, 4), (1, 1), (7, 3)])
def test_layer_equals_the_slow_version_with_all_gradients(num_experts, top_k, few_rows, monkeypatch):
    monkeypatch.setattr(moe, "FEW_ROWS", few_rows)
    layer, x = make_layer(num_experts, top_k), make_tokens()
    expected, actual = take_gradients(slow_moe, layer, x), take_gradients(None, layer, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-11, atol=1e-11, msg=name)


def test_expert_without_tokens_has_no_gradient():
    layer, x = make_layer(4, 2), make_tokens()
    layer.expert_bias[1] = -5
    expected, actual = take_gradients(slow_moe, layer, x), take_gradients(None, layer, x)
    assert not actual["up.weight"][1].any() and not actual["down.weight"][1].any() and actual["up.weight"][0].any()
    for name in ("y", "x", "router.weight", "down.weight"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize(("capability", "grouped"), [((8, 0), [128]), ((12, 0), [128]), ((9, 0), [8, 128])])
def test_few_rows_are_not_grouped_where_that_waits_for_the_gpu(capability, grouped, monkeypatch):
    """A decoding step could not be captured there; many rows, as of training, are grouped all the same."""
    sizes = []

    def group(x, weight, offs):
        sizes.append(len(x))
        return x.new_zeros(len(x), weight.size(2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    waits = moe.waits_for_counts.__wrapped__(torch.device("cuda"))
    monkeypatch.setattr(moe, "waits_for_counts", lambda device: waits)
    monkeypatch.setattr(moe, "probe_grouped", lambda *_: "")
    monkeypatch.setattr(moe.F, "grouped_mm", group, raising=False)
    for num_rows in (8, 128):
        moe.grouped_product(torch.ones(num_rows, 32), torch.ones(2, 32, 16), torch.tensor([3, num_rows]))
    assert sizes == grouped
    assert ("one after the other" in moe.describe_products(torch.device("cpu"), torch.float32)[1]) == waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_products_are_those_of_each_expert(dtype):
    """torch's own where this machine has them, with experts of no rows at either end and in the middle."""
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 32, generator=rng), torch.randn(5, 16, 32, generator=rng)
    grad, ends = torch.randn(40, 16, generator=rng), torch.tensor([0, 13, 13, 40, 40], dtype=torch.int32)
    groups = [slice(0, 0), slice(0, 13), slice(13, 13), slice(13, 40), slice(40, 40)]
    x, weight, grad = (t.to(dtype) for t in (x, weight, grad))
    products = torch.cat([x.float()[group] @ matrix.float().T for group, matrix in zip(groups, weight, strict=True)])
    outer = torch.stack([grad.float()[group].T @ x.float()[group] for group in groups])
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}[dtype]
    for can_group in (moe.can_group, lambda *_: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(moe, "can_group", can_group)
            for actual, expected in ((moe.grouped_product(x, weight.mT, ends), products),
                                     (moe.grouped_outer(grad, x, ends), outer)):
                assert actual.dtype == dtype and actual.shape == expected.shape
                assert (actual.float() - expected).norm() < tolerance * expected.norm()
                assert torch.isfinite(actual).all()


def test_grouped_products_that_are_wrong_are_not_used(monkeypatch, capsys):
    monkeypatch.setattr(F, "grouped_mm", lambda a, b, offs: torch.zeros(len(a), b.size(-1)) if b.dim() == 3 else
                        torch.zeros(len(offs), len(a), b.size(-1)), raising=False)
    moe.probe_grouped.cache_clear()
    try:
        layer, x = make_layer(4, 2, torch.float32), make_tokens(dtype=torch.float32)
        torch.testing.assert_close(layer(x), slow_moe(layer, x), rtol=1e-4, atol=1e-4)
        layer(x)
        said = capsys.readouterr().out
        assert said.count("one by one or in padded batches") == 1 and "its results are wrong" in said
        value, why = moe.describe_products(torch.device("cpu"), torch.float32)
        assert value == "padded" and "its results are wrong" in why
    finally:
        moe.probe_grouped.cache_clear()


def test_copies_of_the_dispatch_have_exact_gradients():
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    inverse = order.argsort()
    tokens = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: moe._Permute.apply(t, order, inverse, 2), tokens)
    assert torch.autograd.gradcheck(lambda r: moe._Permute.apply(r, inverse, order, 1), rows)
    there_and_back = moe._Permute.apply(moe._Permute.apply(tokens, order, inverse, 2), inverse, order, 1)
    assert torch.equal(there_and_back, tokens.repeat_interleave(2, 0))


def test_scores_are_fp32_beside_activations_of_16_bits():
    layer, x = make_layer(4, 2, torch.float32), make_tokens(dtype=torch.bfloat16)
    layer.keeps_scores = True
    assert layer(x).dtype == torch.bfloat16 and layer.scores.dtype == torch.float32
    expected = torch.sigmoid(x.detach().float().flatten(0, 1) @ layer.router.weight.detach().T)
    torch.testing.assert_close(layer.scores, expected, rtol=1e-5, atol=1e-6)


def test_one_expert_that_is_always_open_is_the_dense_mlp():
    layer, x = make_layer(1, 1), make_tokens()
    dense = MLP(WIDE, layer.up.weight.size(1), torch.float64)
    with torch.no_grad():
        dense.c_fc.weight.copy_(layer.up.weight[0])
        dense.c_proj.weight.copy_(layer.down.weight[0])
        layer.router.weight.zero_()    # a gate of one half
        layer.shared.c_proj.weight.zero_()
    torch.testing.assert_close(2 * layer(x), dense(x), rtol=1e-12, atol=1e-12)


def test_order_of_the_tokens_does_not_matter():
    layer, x = make_layer(4, 2), make_tokens()
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    expected = layer(x).flatten(0, 1)[shuffled]
    actual = layer(x.flatten(0, 1)[shuffled].view_as(x)).flatten(0, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_repeat_bit_for_bit(dtype):
    layer, x = make_layer(4, 2, torch.float32), make_tokens(dtype=dtype)
    first, second = ([x.grad, *(p.grad for p in layer.parameters())]
                     for _ in range(2) if not (layer.zero_grad() or setattr(x, "grad", None))
                     if not layer(x).float().square().sum().backward())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiled_layer_equals_the_eager_one():
    """Opaque products, traced copies; one graph, or fullgraph would fail."""
    layer, x = make_layer(4, 2, torch.float32), make_tokens(dtype=torch.float32)
    layer.keeps_scores = True
    expected = layer(x)
    expected.square().sum().backward()
    grads, scores = [p.grad for p in layer.parameters()], layer.scores
    layer.zero_grad()
    layer.scores = None
    layer.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    actual = layer(x)
    actual.square().sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(layer.scores, scores)
    for param, grad in zip(layer.parameters(), grads, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Balance


def slow_quantiles(scores, bias, k):
    """The k/E quantile of r, expert by expert, from sorted lists."""
    E = len(bias)
    alpha = [sorted((scores[i] + bias).tolist(), reverse=True)[k] for i in range(len(scores))]
    values = [sorted(alpha[i] - float(scores[i, j]) for i in range(len(scores)))[math.ceil(len(scores) * k / E) - 1]
              for j in range(E)]
    return torch.tensor(values) - sum(values) / E


@pytest.mark.parametrize("loads", [[300, 100, 90, 110], [0, 0, 600, 0], [1, 598, 0, 1], [599, 0, 0, 1], [65, 0, 0, 0]])
def test_products_in_few_shapes_are_those_of_padded_batches(loads):
    """Neighbours' rows, or rows of zeros, change nothing; an expert without rows has a gradient of 0."""
    generator, num_rows = torch.Generator().manual_seed(3), sum(loads)
    ends = torch.tensor(loads).cumsum(0).int()
    x, grad = (torch.randn(num_rows, size, generator=generator).bfloat16() for size in (32, 64))
    weight = torch.randn(4, 32, 64, generator=generator).bfloat16()
    for actual, expected in (
            (moe.bucketed_product(x, weight, ends), moe.padded_product(x.double(), weight.double(), ends)),
            (moe.bucketed_outer(grad, x, ends), moe.padded_outer(grad.double(), x.double(), ends)),
            (moe.bucketed_outer(x, grad, ends), moe.padded_outer(x.double(), grad.double(), ends))):
        torch.testing.assert_close(actual.double(), expected, rtol=0.02, atol=0.05)


def test_sixteen_bits_on_a_cpu_have_few_shapes(monkeypatch):
    """Of any loads, with little waste: a kernel for each would take longer than the products."""
    used = []
    for name in ("bucketed_product", "bucketed_outer"):
        monkeypatch.setattr(moe, name, lambda *args, name=name: used.append(name))
    ends = torch.tensor([100], dtype=torch.int32)
    for dtype, num_rows, expected in ((torch.bfloat16, 100, True), (torch.float16, 100, True),
                                      (torch.bfloat16, 64, False), (torch.float32, 100, False)):
        used.clear()
        x, weight = torch.zeros(num_rows, 16, dtype=dtype), torch.zeros(1, 16, 16, dtype=dtype)
        moe.grouped_product(x, weight, ends.clamp(max=num_rows))
        moe.grouped_outer(x, x, ends.clamp(max=num_rows))
        assert used == ["bucketed_product", "bucketed_outer"] * expected
    assert moe.describe_products(torch.device("cpu"), torch.bfloat16)[0] == "bucketed"
    assert moe.describe_products(torch.device("cpu"), torch.float32)[0] != "bucketed"
    generator = torch.Generator().manual_seed(0)
    for num_rows, step in ((600, 32), (4096, 32), (16384, 128)):
        lengths = set()
        for _ in range(100):
            loads = torch.bincount(torch.randint(8, (num_rows,), generator=generator), minlength=8)
            for expert, own, more in moe.find_buckets(loads.cumsum(0).int(), num_rows):
                assert own.stop - own.start == loads[expert]
                assert max(0, more.start) <= own.start < own.stop <= more.stop <= num_rows
                assert (more.stop - more.start) - (own.stop - own.start) < step
                lengths.add(more.stop - more.start)
        assert len(lengths) < 12


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (8, 2), (16, 3)])
def test_biases_are_quantiles(num_experts, top_k):
    layer = make_layer(num_experts, top_k, torch.float32)
    bias = layer.expert_bias.clone()
    balance = Balance([layer])
    layer(make_tokens(2000, torch.float32))
    scores = layer.scores
    balance.begin()
    balance.count(torch.zeros(2, 1000, dtype=torch.long))
    balance.update()
    bin_width = float(bias.max() - bias.min() + 2) / moe.NUM_BINS
    assert (layer.expert_bias - slow_quantiles(scores, bias, top_k)).abs().max() < 2 * bin_width
    assert abs(float(layer.expert_bias.mean())) < 1e-6


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (16, 2), (32, 2)])
def test_load_is_even_after_a_few_updates(num_experts, top_k):
    """To about the noise of so few tokens, sqrt(E / N k)."""
    layer = make_layer(num_experts, top_k, torch.float32)
    balance = Balance([layer])
    for step in range(6):
        layer(make_tokens(2000, torch.float32, seed=step))
        balance.begin()
        balance.count(torch.zeros(2, 1000, dtype=torch.long))
        cv, _, most, num_idle, nats, max_bias = balance.update().tolist()
    assert cv < 0.2 and 1 < most < 1.6 and num_idle == 0
    assert 0 < nats < math.log(num_experts) and max_bias == layer.expert_bias.abs().max()


def count_twice(layer, x, targets, cuts):
    """The sums of a step in micro-batches of the rows between `cuts`."""
    balance = Balance([layer])
    balance.begin()
    for start, stop in itertools.pairwise(cuts):
        layer(x[start:stop])
        balance.count(targets[start:stop])
    return balance


def test_padding_does_not_count_and_micro_batches_add_up():
    layer, x = make_layer(4, 2), make_tokens(400).view(10, 40, 32)
    targets = torch.zeros(10, 40, dtype=torch.long)
    targets[:, 25:] = -1
    whole, cut = (count_twice(layer, x, targets, cuts) for cuts in ([0, 10], [0, 2, 4, 6, 8, 10]))
    assert torch.equal(whole.sums, cut.sums)
    alone = count_twice(layer, x[:, :25], targets[:, :25], [0, 10])
    assert torch.equal(whole.sums[:, :-1], alone.sums[:, :-1])    # the last holds what isn't counted
    assert whole.sums[0, 4 * moe.NUM_BINS:-2].sum() == 10 * 25 * 2


def test_a_step_that_is_tried_again_counts_once():
    layer, x = make_layer(4, 2), make_tokens(40)
    targets = torch.zeros(2, 20, dtype=torch.long)
    balance = count_twice(layer, x, targets, [0, 2])
    once = balance.sums.clone()
    layer(x)
    balance.begin()
    balance.count(targets)
    assert torch.equal(balance.sums, once)


def test_figures_are_those_of_the_load():
    """Two experts with all tokens, two with none."""
    layer, x = make_layer(4, 2), make_tokens(40)
    layer.expert_bias.copy_(torch.tensor([5.0, 5, 0, 0]))
    balance = count_twice(layer, x, torch.zeros(2, 20, dtype=torch.long), [0, 2])
    cv, worst, most, num_idle, nats, _ = balance.update().tolist()
    assert (cv, worst, most, num_idle) == (1, 1, 2, 2)
    scores = torch.sigmoid(x.flatten(0, 1) @ layer.router.weight.T)
    share = scores / scores.sum(1, keepdim=True)
    assert nats == pytest.approx(-(share * share.log()).sum(1).mean().item(), abs=1e-5)


def test_figures_of_several_layers():
    """Means of the variation and the entropy, the worst layer's variation and load, all idle experts."""
    def count(biases):
        layers, x = [], make_tokens(40)
        for seed, bias in biases:
            layers.append(make_layer(4, 2, seed=seed))
            layers[-1].expert_bias.copy_(torch.tensor(bias))
        balance = Balance(layers)
        balance.begin()
        for layer in layers:
            layer(x)
        balance.count(torch.zeros(2, 20, dtype=torch.long))
        return balance.update().tolist()
    uneven, plain = (0, [5.0, 5.0, 0.0, 0.0]), (1, [0.0, 0.0, 0.0, 0.0])
    cvs, _, mosts, idles, nats, biases = zip(count([uneven]), count([plain]), strict=True)
    assert cvs[1] < cvs[0] and mosts[1] < mosts[0] and biases[1] < biases[0]
    assert count([plain, uneven]) == pytest.approx(
        [sum(cvs) / 2, max(cvs), max(mosts), sum(idles), sum(nats) / 2, max(biases)])


def test_models_that_need_no_balance():
    assert make_balance(make_model()) is None
    assert make_balance(make_model(replace(CONFIG, num_experts=4, top_k=4))) is None
    assert len(make_balance(make_model(replace(CONFIG, num_experts=4, moe_every=2))).layers) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The model


def test_layers_with_experts_are_those_without_value_embeddings():
    for depth in (3, 4):
        config = replace(CONFIG, n_layer=depth, num_experts=4, moe_every=2)
        model = make_model(config)
        for layer, block in enumerate(model.transformer.h):
            assert isinstance(block.mlp, MoE) == config.has_experts(layer) != config.has_value_embed(layer)
    assert all(replace(CONFIG, num_experts=2).has_experts(layer) for layer in range(4))


def test_initial_weights_of_experts_are_the_dense_ones():
    model = make_model(replace(CONFIG, n_embd=128, num_experts=4), as_initialised=True).requires_grad_(False)
    layer, bound = model.transformer.h[0].mlp, math.sqrt(3 / 128)
    assert layer.up.weight.abs().max() <= 0.4 * bound
    for weight in layer.up.weight:
        assert weight.std().item() == pytest.approx(0.4 * bound / math.sqrt(3), rel=0.03)
    assert not layer.down.weight.any() and not layer.expert_bias.any()
    assert 0.9 * bound < layer.router.weight.abs().max() <= bound


@pytest.mark.parametrize("batch_lr_scale", [1.0, 0.25])
def test_routers_learn_by_their_own_rate(batch_lr_scale):
    """AdamW without decay, by the record's rate at 768 channels; scaled to width and batch as the head's, its betas."""
    model = make_model(replace(CONFIG, n_embd=192, num_experts=4, moe_every=2))
    optimizer = model.setup_optimizer(batch_lr_scale=batch_lr_scale)
    groups = {group["name"]: group for group in optimizer.param_groups if group["kind"] == "adamw"}
    routers, head = groups["routers"], groups["lm_head"]
    assert [optimizer.names[id(param)] for param in routers["params"]] == [
        f"transformer.h.{layer}.mlp.router.weight" for layer in (0, 2)]
    assert routers["lr"] == pytest.approx(0.01 * batch_lr_scale)    # a quarter of the width: twice the rate
    assert routers["betas"] == head["betas"] and routers["weight_decay"] == 0
    assert "routers" not in {group["name"] for group in make_model().setup_optimizer().param_groups}


@pytest.mark.parametrize(("knobs", "message"), [
    ({"num_experts": 2, "top_k": 3}, "--knobs top_k=3 must be from 1 to the 2 experts of num_experts"),
    ({"num_experts": 2, "top_k": 0}, "top_k=0 must be from 1 to the 2 experts"),
    ({"top_k": 2}, "top_k=2 goes with num_experts, which is 0"),
    ({"num_experts": -1}, "num_experts can.t be -1"),
    ({"moe_every": 2}, "moe_every=2 goes with num_experts, which is 0"),
    ({"num_experts": 2, "moe_every": 5}, "moe_every=5 must be from 1 to 4 layers"),
    ({"num_experts": 2, "mlp_act": "swiglu"}, "num_experts=2 goes with mlp_act=relu2, not swiglu")])
def test_impossible_experts_are_refused(knobs, message):
    with pytest.raises(UserError, match=message):
        replace(CONFIG, **knobs)
