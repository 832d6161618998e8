"""The optimizer's kernels against slow versions, one matrix at a time, and its groups against the public record."""

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nanochat import compilation, memory
from nanochat.gpt import GPTConfig
from nanochat.optim import POLAR_EXPRESS, MuonAdamW, MuonRule, adamw_update, as_scalars, muon_update, orthogonalize
from nanochat.presets import PRESETS, RULES
from tests.helpers import make_model

LR, MU, BETA2, DECAY = (float(s) for s in as_scalars([0.02, 0.95, 0.9, 0.28]))  # as fp32 holds them
CONFIG = GPTConfig(sequence_len=16, vocab_size=70, n_layer=4, n_head=4, n_kv_head=2, n_embd=64)


def make_fresh(dtype=torch.float32, seed=0):
    return make_model(CONFIG, dtype, seed, as_initialised=True)


def take_steps(model, optimizer, num_steps, first=0):
    for step in range(first, first + num_steps):
        rng = torch.Generator().manual_seed(step)
        idx = torch.randint(0, CONFIG.vocab_size, (2, 17), generator=rng)
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------------------------------------------------------
# Muon


def slow_muon(param, grad, momentum, second_moment, lr, num_heads=1):
    """(param, momentum, second_moment) after one step of one fp64 matrix: the recipe's six steps, in its words."""
    rows, cols = param.shape
    momentum = MU * momentum + (1 - MU) * grad                                  # 1. Nesterov
    X = (1 - MU) * grad + MU * momentum
    norms = [math.sqrt(sum(x * x for x in row)) for row in X.tolist()]          # 2. MuonEq
    frobenius = math.sqrt(sum(norm * norm for norm in norms))
    X = torch.stack([X[i] * (frobenius / math.sqrt(rows) / max(norms[i], 1e-6)) for i in range(rows)])
    X, heads = X / (1.01 * X.norm() + 1e-6), []                                 # 3. Polar Express
    for head in X.chunk(num_heads):
        X = head
        for a, b, c in POLAR_EXPRESS:
            A = X.T @ X if len(X) > cols else X @ X.T
            B = b * A + c * A @ A
            X = a * X + (X @ B if len(X) > cols else B @ X)
        heads.append(X)
    X = torch.cat(heads)
    g = X * math.sqrt(min(rows, cols)) / max(float(X.norm()), 1e-6)             # 4. Muon+
    mean_square = g.square().mean(1 if rows >= cols else 0)                     # 5. NorMuon
    second_moment = BETA2 * second_moment + (1 - BETA2) * mean_square
    scale = second_moment.clamp(min=1e-10) ** -0.5
    scaled = g * (scale[:, None] if rows >= cols else scale[None, :])
    g = scaled * float(g.norm()) / max(float(scaled.norm()), 1e-10)
    return param - lr * (g + DECAY * param * (g * param >= 0)), momentum, second_moment  # 6. cautious decay


def slow_jan26(param, grad, momentum, second_moment, lr):
    """The Muon of January: steps 1, 3, 5 and 6, a margin of 1.02, beta2 .95."""
    rows, cols = param.shape
    momentum = MU * momentum + (1 - MU) * grad
    X = (1 - MU) * grad + MU * momentum
    X = X / (1.02 * X.norm() + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        A = X.T @ X if rows > cols else X @ X.T
        B = b * A + c * A @ A
        X = a * X + (X @ B if rows > cols else B @ X)
    beta2 = float(as_scalars([0.95])[0])
    second_moment = beta2 * second_moment + (1 - beta2) * X.square().mean(1 if rows >= cols else 0)
    scale = second_moment.clamp(min=1e-10) ** -0.5
    scaled = X * (scale[:, None] if rows >= cols else scale[None, :])
    g = scaled * float(X.norm()) / max(float(scaled.norm()), 1e-10)
    return param - lr * (g + DECAY * param * (g * param >= 0)), momentum, second_moment


def slow_marin(param, grad, momentum, second_moment, lr):
    """marin's Muon: steps 1 and 3 alone, with five quintics, eps 1e-5 and plain decay."""
    rows, cols = param.shape
    momentum = MU * momentum + (1 - MU) * grad
    X = (1 - MU) * grad + MU * momentum
    X = X / (X.norm() + 1e-5)
    for a, b, c in ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
                    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012)):
        A = X.T @ X if rows > cols else X @ X.T
        X = a * X + (X @ (b * A + c * A @ A) if rows > cols else (b * A + c * A @ A) @ X)
    return param - lr * (X + DECAY * param), momentum, second_moment


@pytest.mark.parametrize(("rule", "slow_update"), [("july26", slow_muon), ("jan26", slow_jan26), ("marin", slow_marin)])
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12), (2, 12)])
def test_muon_equals_slow_version(shape, rule, slow_update):
    """Three matrices over four steps: dense; zero, then half of its rows zero (as c_proj's gradients); tiny."""
    rows, cols = shape
    rng = torch.Generator().manual_seed(0)
    params = torch.randn(3, rows, cols, generator=rng, dtype=torch.float64)
    momentum = torch.zeros_like(params)
    second_moment = params.new_zeros((3, rows, 1) if rows >= cols else (3, 1, cols))
    slow = [(params[i].clone(), momentum[i].clone(), second_moment[i].flatten().clone()) for i in range(3)]
    hyper = as_scalars([LR, MU, RULES[rule].beta2, DECAY])
    for step in range(4):
        grads = torch.randn(3, rows, cols, generator=rng, dtype=torch.float64)
        grads[1, :rows // 2] *= step > 1
        grads[1] *= step > 0
        grads[2] *= 1e-7
        slow = [slow_update(*state[:1], grad, *state[1:], LR) for state, grad in zip(slow, grads, strict=True)]
        muon_update(params, grads, momentum, second_moment, 5, torch.float64, *hyper, MuonRule(**RULES[rule].muon))
        for i in range(3):
            actual = params[i], momentum[i], second_moment[i].flatten()
            for ours, theirs in zip(actual, slow[i], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (8, 12)])
def test_queries_and_keys_are_orthogonalised_by_heads(shape):
    """The first two of three matrices, in heads of 4 rows; one has a head without a gradient for a while."""
    rng = torch.Generator().manual_seed(0)
    params = torch.randn(3, *shape, generator=rng, dtype=torch.float64)
    momentum, rule = torch.zeros_like(params), MuonRule(**RULES["dec26"].muon)
    second_moment = params.new_zeros((3, shape[0], 1) if shape[0] >= shape[1] else (3, 1, shape[1]))
    slow = [(params[i].clone(), momentum[i].clone(), second_moment[i].flatten().clone()) for i in range(3)]
    for step in range(4):
        grads = torch.randn(3, *shape, generator=rng, dtype=torch.float64)
        grads[1, :4] *= step > 1
        slow = [slow_muon(*state[:1], grad, *state[1:], LR, num_heads)
                for state, grad, num_heads in zip(slow, grads, (shape[0] // 4, shape[0] // 4, 1), strict=True)]
        muon_update(params, grads, momentum, second_moment, 5, torch.float64,
                    *as_scalars([LR, MU, BETA2, DECAY]), rule, 2, 4)
        for i in range(3):
            for ours, theirs in zip((params[i], second_moment[i].flatten()), (slow[i][0], slow[i][2]), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_which_matrices_have_heads(n_kv_head):
    """Queries and keys of more heads than one, first of their shape; by older rules none."""
    config = GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=32)
    model = make_model(config)
    queries, keys = ([getattr(block.attn, name).weight for block in model.transformer.h] for name in ("c_q", "c_k"))
    groups = [group for group in model.setup_optimizer(rule=RULES["dec26"]).param_groups if group["kind"] == "muon"]
    by_head = {param for group in groups for param in group["params"][:group["num_by_head"]]}
    assert by_head == {*queries, *(keys if n_kv_head > 1 else ())} and {group["head_dim"] for group in groups} == {8}
    assert not any(group["num_by_head"] for group in model.setup_optimizer(rule=RULES["nov26"]).param_groups
                   if group["kind"] == "muon")


def test_polar_express_moves_singular_values_into_its_band():
    values = torch.logspace(-2.5, math.log10(1 / 1.01), 200, dtype=torch.float64)
    moved = values
    for a, b, c in POLAR_EXPRESS:
        moved = a * moved + b * moved**3 + c * moved**5
    assert 0.7 < moved.min() and moved.max() < 1.2
    rng = torch.Generator().manual_seed(0)
    for rows, cols in ((200, 200), (200, 300), (300, 200)):
        U = torch.linalg.qr(torch.randn(rows, 200, generator=rng, dtype=torch.float64)).Q
        W = torch.linalg.qr(torch.randn(cols, 200, generator=rng, dtype=torch.float64)).Q
        out = orthogonalize((U * values @ W.T)[None], 5)[0]
        torch.testing.assert_close(out, U * moved @ W.T, rtol=0, atol=1e-9)
        in_bf16 = orthogonalize((U * values @ W.T)[None].bfloat16(), 5)[0].double()
        assert (in_bf16 - out).norm() / out.norm() < 0.1


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (32, 8), (8, 32)])
def test_muon_step_has_a_known_length_and_direction(rows, cols):
    """|step| = lr * sqrt(max(1, rows / cols)) * sqrt(min(rows, cols)), whatever the gradient's length."""
    for size in (1e-4, 1.0, 1e4):
        param = torch.nn.Parameter(torch.zeros(rows, cols))
        grad = param.grad = size * torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))
        group = {"kind": "muon", "params": [param], "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9,
                 "weight_decay": 0.28}
        MuonAdamW([group]).step()
        expected = 0.02 * max(1, rows / cols) ** 0.5 * min(rows, cols) ** 0.5
        assert param.norm().item() == pytest.approx(expected, rel=1e-4)
        assert (param * grad).sum() < 0


def test_zero_gradient_with_zero_state_changes_nothing_but_decay():
    def make_groups(decay):
        matrices = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
        vector = torch.nn.Parameter(torch.randn(5))
        matrices[0].grad = torch.zeros(6, 4)  # the other's is None
        return [{"kind": "muon", "params": matrices, "lr": 0.5, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9,
                 "weight_decay": decay},
                {"kind": "adamw", "params": [vector], "lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-10,
                 "weight_decay": decay}]
    for decay in (0.0, 0.25):
        groups = make_groups(decay)
        before = [[p.detach().clone() for p in group["params"]] for group in groups]
        MuonAdamW(groups).step()
        muon_lr = 0.5 * (6 / 4) ** 0.5
        for group, olds, lr in zip(groups, before, (muon_lr, 0.5), strict=True):
            for param, old in zip(group["params"], olds, strict=True):
                torch.testing.assert_close(param.detach(), old * (1 - lr * decay), rtol=1e-6, atol=0)


@pytest.mark.parametrize("slice_bytes", [1, 2**28])    # one expert at a time, all at once
@pytest.mark.parametrize("rule", RULES)
def test_experts_are_matrices_and_idle_ones_stay_where_they_are(rule, slice_bytes, monkeypatch):
    """Each expert moves as a matrix by itself would that has no step where the expert has no token."""
    if not RULES[rule].has_muon:
        pytest.skip("AdamW updates the matrices of this rule")
    monkeypatch.setattr(memory, "EXPERT_BYTES", slice_bytes)
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(3, 12, 5, generator=rng, dtype=torch.float64)
    experts, alone = torch.nn.Parameter(start.clone()), [torch.nn.Parameter(matrix.clone()) for matrix in start]

    def make(params):
        return MuonAdamW([{"kind": "muon", "params": params, "lr": 0.02, "momentum": 0.95, "ns_steps": 5,
                           "beta2": RULES[rule].beta2, "weight_decay": 0.28, "rule": MuonRule(**RULES[rule].muon)}])
    optimizer, others = make([experts]), [make([matrix]) for matrix in alone]
    for step in range(5):
        experts.grad = torch.randn(3, 12, 5, generator=rng, dtype=torch.float64)
        idle = {0: (0, 1, 2), 2: (1,), 3: (1, 2)}.get(step, ())
        experts.grad[list(idle)] = 0
        before = [tensor.clone() for tensor in (experts, *optimizer._get_state(optimizer.parts[0]).values())]
        for e in set(range(3)) - set(idle):
            alone[e].grad = experts.grad[e].clone()
            others[e].step()
        optimizer.step()
        after = (experts, *optimizer._get_state(optimizer.parts[0]).values())
        for e in range(3):
            assert all(torch.equal(new[e], old[e]) for new, old in zip(after, before, strict=True)) == (e in idle)
            torch.testing.assert_close(experts[e], alone[e], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# AdamW


@pytest.mark.parametrize("grad_size", [1.0, 1e-9])  # with the second, where eps goes decides the step
def test_adamw_equals_torch(grad_size):
    hyper = dict(lr=2**-7, betas=(0.75, 0.9375), weight_decay=0.125)  # exact in fp32, as 1 - lr * decay is
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(40, 7, generator=rng, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = MuonAdamW([{"kind": "adamw", "params": [ours], "eps": 1e-8, **hyper}])
    reference = torch.optim.AdamW([theirs], eps=1e-8, **hyper)
    for step in range(8):
        grad = grad_size * torch.randn(40, 7, generator=rng, dtype=torch.float64)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 2**-7 / 2**step
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)  # of steps of 1e-3 and more
    assert (theirs - start).abs().max() > 1e-3


def test_adamw_on_bf16_storage_computes_in_fp32():
    """One rounding per stored value and step, nothing rounded between."""
    rng = torch.Generator().manual_seed(0)
    stored = [torch.randn(300, generator=rng).bfloat16(), torch.zeros(300).bfloat16(), torch.zeros(300).bfloat16()]
    lr, beta1, beta2, eps, decay = 0.3, 0.8, 0.995, 1e-10, 0.01
    for step in range(1, 6):
        grad = torch.randn(300, generator=rng).bfloat16()
        p, m, v, g = (t.double() for t in (*stored, grad))
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        direction = m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps)
        expected = [p * (1 - lr * decay) - lr * direction, m, v]
        adamw_update(stored[0], grad, *stored[1:], *as_scalars([lr, beta1, beta2, eps, decay, step]))
        for actual, wide in zip(stored, expected, strict=True):
            assert actual.dtype == torch.bfloat16
            # 2^-8 is bf16's rounding; double rounding may add the error of fp32
            assert ((actual.double() - wide).abs() <= wide.abs() * 2**-8 * 1.001 + 1e-6).all()


@pytest.mark.parametrize("density", [1.0, 0.01])  # of the steps in which a token occurs
def test_bf16_moments_make_steps_a_few_percent_longer(density):
    """Increments of the second moment are partly rounded away (dev/LOG.md, "Moments of bf16 embeddings: bf16")."""
    step_sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        rng = torch.Generator().manual_seed(0)
        moments = torch.zeros(4000, dtype=dtype), torch.zeros(4000, dtype=dtype)
        total = 0.0
        for step in range(1, 801):
            grad = 1e-4 * torch.randn(4000, generator=rng) * (torch.rand(4000, generator=rng) < density)
            moved = torch.zeros(4000)
            adamw_update(moved, grad.to(dtype), *moments, *as_scalars([1.0, 0.8, 0.995, 1e-10, 0.0, step]))
            total += float(moved.square().mean()) * (step > 400)
        step_sizes[dtype] = total ** 0.5
    assert 1.0 < step_sizes[torch.bfloat16] / step_sizes[torch.float32] < 1.08


# ---------------------------------------------------------------------------------------------------------------------
# The groups of a model


@pytest.mark.parametrize("batch_lr_scale", [1.0, 0.5])
def test_groups_of_the_public_record(batch_lr_scale):
    model = make_fresh()
    optimizer = model.setup_optimizer(batch_lr_scale=batch_lr_scale)
    s, width = batch_lr_scale, (64 / 768) ** -0.5
    scalars = {"smear_gate.weight", "smear_lambda", "backout_lambda"}
    expected = [  # names, lr, betas, weight decay
        ({"lm_head.weight"},                                   0.008 * width * s, (0.8, 0.96),   0.01),
        ({"transformer.wte.weight"},                           0.3 * width * s,   (0.8, 0.995),  0.001),
        ({"value_embeds.1.weight", "value_embeds.3.weight"},   0.15 * width * s,  (0.8, 0.995),  0.01),
        ({"resid_lambdas"},                                    0.005 * s,         (0.8, 0.95),   0.05),
        ({"x0_lambdas"},                                       0.5 * s,           (0.96, 0.95),  0.0),
        (scalars,                                              0.2,               (0.8, 0.95),   0.0),
    ]
    name_of = {param: name for name, param in model.named_parameters()}
    groups = {frozenset(name_of[p] for p in group["params"]): group for group in optimizer.param_groups}
    for names, lr, betas, decay in expected:
        group = groups.pop(frozenset(names))
        assert (group["kind"], group["betas"], group["eps"], group["weight_decay"]) == ("adamw", betas, 1e-10, decay)
        assert group["lr"] == group["initial_lr"] == pytest.approx(lr), names
    shapes = []
    for group in groups.values():  # what is left is Muon's
        assert (group["kind"], group["ns_steps"], group["beta2"], group["weight_decay"]) == ("muon", 5, 0.9, 0.28)
        assert group["lr"] == group["initial_lr"] == pytest.approx(0.02 * s)
        shape, = {tuple(param.shape) for param in group["params"]}
        shapes.append((shape, len(group["params"])))
    # c_q and attn.c_proj, c_k and c_v, c_fc, mlp.c_proj, and the gates of the two layers that have value embeddings
    assert sorted(shapes) == sorted([((64, 64), 8), ((32, 64), 8), ((256, 64), 4), ((64, 256), 4), ((2, 12), 2)])
    grouped = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("knobs", [{}, {"num_experts": 4}])
def test_each_parameter_has_one_group(rule, knobs):
    """Also in parts that the rule's own models don't have, and that a knob adds."""
    model = make_model(replace(CONFIG, **knobs), as_initialised=True)
    params = [param for group in model.setup_optimizer(rule=RULES[rule]).param_groups for param in group["params"]]
    assert sorted(map(id, params)) == sorted(map(id, model.parameters()))


def test_groups_of_other_rules():
    """marin: 6.4e-3 for embedding, head and lambdas, unscaled. AdamW alone: no Muon. January: no decay but Muon's."""
    model = make_model(CONFIG, as_initialised=True)
    lrs = {name: lr for name, lr in PRESETS["marin-150m"].flags.items() if name.endswith("_lr")}
    for group in model.setup_optimizer(**lrs, weight_decay=0.0, rule=RULES["marin"]).param_groups:
        assert group["lr"] == (0.02 if group["kind"] == "muon" else 0.0064) and group["weight_decay"] == 0.0
        assert group["kind"] == "muon" or (group["betas"], group["eps"], group["max_norm"]) == ((0.8, 0.95), 1e-15, 1.0)
    adam = model.setup_optimizer(matrix_lr=1e-3, rule=RULES["adam"]).param_groups
    assert {group["kind"] for group in adam} == {"adamw"} and adam[-1]["name"] == "matrices" and adam[-1]["lr"] == 1e-3
    jan26 = model.setup_optimizer(embedding_lr=0.3, batch_lr_scale=0.5, rule=RULES["jan26"]).param_groups
    assert {group["weight_decay"] for group in jan26 if group["kind"] == "adamw"} == {0.0}
    assert [group["lr"] for group in jan26 if group["name"] in ("wte", "value_embeds")] == \
        pytest.approx([0.3 * (CONFIG.n_embd / 768) ** -0.5 * 0.5] * 2)


@pytest.mark.parametrize("grad_size", [1e-3, 10.0])    # below the norm of 1, and far above it
def test_clipping_equals_torch(grad_size):
    """Gradients of AdamW's groups together; Muon's matrix isn't clipped, and the norm returned is that before."""
    rng = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in ((6, 4), (3,))]
                    for _ in range(2))
    matrix = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    hyper = {"lr": 0.0625, "betas": (0.75, 0.9375), "weight_decay": 0.0}
    optimizer = MuonAdamW([{"kind": "adamw", "params": [param], "eps": 1e-8, "max_norm": 1.0, **hyper}
                           for param in ours] + [{"kind": "muon", "params": [matrix], "lr": 0.02, "momentum": 0.95,
                                                  "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.0}])
    expected = torch.optim.AdamW(theirs, eps=1e-8, **hyper)
    for step in range(3):
        grads = [torch.randn(param.shape, generator=rng, dtype=torch.float64) * grad_size for param in (*ours, matrix)]
        for param, grad in zip((*ours, matrix), grads, strict=True):
            param.grad = grad.clone()
        for param, grad in zip(theirs, grads, strict=False):
            param.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        expected.step()
        norm = optimizer.step()
        assert norm.item() == pytest.approx(torch.cat([grad.flatten() for grad in grads]).norm().item(), rel=1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7), step


def test_clipping_waits_for_the_sum_over_the_ranks():
    """A rank other than the first doesn't measure what all hold, and may still wait for it when it clips."""
    model = make_fresh()
    optimizer = model.setup_optimizer(rule=RULES["marin"])
    optimizer.rank, waited = 1, []
    parts = [part for part in optimizer.parts if part.group.get("max_norm")]
    for part in optimizer.parts:
        part.grad = torch.ones_like(part.params[0])
    for part in parts:
        part.messages.append((SimpleNamespace(wait=lambda part=part: waited.append(part)), part.grad))
    optimizer._clip(parts)
    assert len(waited) == len(parts) > 1


def test_rates_that_a_person_chose_reach_their_groups():
    model = make_fresh()
    optimizer = model.setup_optimizer(unembedding_lr=1.0, embedding_lr=2.0, matrix_lr=3.0, scalar_lr=4.0,
                                      weight_decay=5.0)
    width = (64 / 768) ** -0.5
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[:6] == pytest.approx([width, 2 * width, width, 0.04, 4.0, 0.2]) and set(rates[6:]) == {3.0}
    assert {group["weight_decay"] for group in optimizer.param_groups if group["kind"] == "muon"} == {5.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_steps_of_a_fresh_model_are_finite_and_learn(dtype):
    """c_proj starts at zero, so most gradients are exactly zero at step 1 and some rows still are at step 2."""
    model = make_fresh(dtype)
    optimizer = model.setup_optimizer(batch_lr_scale=0.1)
    idx = torch.arange(2 * 17).view(2, 17) % CONFIG.vocab_size
    losses = []
    for _ in range(6):
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        if not losses:
            assert not model.transformer.h[0].attn.c_q.weight.grad.any()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        assert all(param.isfinite().all() for param in model.parameters())
    assert losses[0] == pytest.approx(math.log(CONFIG.vocab_size), abs=0.1) and losses[-1] < losses[0] - 0.5
    assert all(param.any() for param in model.parameters())  # each was reached


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks; what they compute together is tested in test_train.py and test_ranks.py


@pytest.fixture
def fake_ranks():
    """Rank 0 of two, whose collectives send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_gradients_are_sent_during_the_backward_pass(fake_ranks):
    """In one order on all ranks, which is that in which they come: head first, then layer by layer from the last."""
    model = make_fresh()
    optimizer, num_sent = model.setup_optimizer(), {}
    for name, param in model.named_parameters():
        param.register_post_accumulate_grad_hook(lambda _, name=name: num_sent.update({name: optimizer.num_sent}))
    idx = torch.arange(2 * 17).view(2, 17) % CONFIG.vocab_size
    for is_last in (False, True):
        with optimizer.reduce_in_backward() if is_last else contextlib.nullcontext():
            model(idx[:, :-1], idx[:, 1:]).backward()
        assert optimizer.num_sent == (len(optimizer.pieces) if is_last else 0)
    # what had been sent when the gradient of a layer's value embeddings came: that of the head, of the layers above
    layers = [[optimizer.names[id(param)].split(".")[2] for param in piece.params]
              for piece in optimizer.pieces if piece.part.is_stacked and piece.params[0].shape == (64, 64)]
    assert layers == [["3", "3"], ["2", "2"], ["1", "1"], ["0", "0"]]
    assert 0 < num_sent["value_embeds.3.weight"] < num_sent["value_embeds.1.weight"] < len(optimizer.pieces) - 5
    assert all(param.grad is None for param in model.parameters())
    optimizer.zero_grad()
    assert optimizer.num_sent == 0 and all(part.grad is None for part in optimizer.parts)


def test_frozen_parameters_hold_nothing_up(fake_ranks):
    """One of a message's matrices, and a parameter of its own; their gradients count as zero, as on one rank."""
    model = make_fresh()
    optimizer = model.setup_optimizer()
    for param in (model.lm_head.weight, model.transformer.h[1].attn.c_q.weight):
        param.requires_grad_(False)
    idx = torch.arange(2 * 17).view(2, 17) % CONFIG.vocab_size
    with optimizer.reduce_in_backward():
        model(idx[:, :-1], idx[:, 1:]).backward()
    assert optimizer.num_sent == len(optimizer.pieces) and not optimizer.parts[0].wait().any()


# ---------------------------------------------------------------------------------------------------------------------
# Saved state


def copy_state(optimizer):
    return {name: piece.tensor.clone() for name, piece in optimizer.get_named_state().items()}


def make_reader(state):
    """As a checkpoint reads: rows of a tensor, which must have as many rows as the model's."""
    def read(name, start, stop, num_rows):
        if len(state[name]) != num_rows:
            raise ValueError(name)
        return state[name][start:stop]
    return read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_continues_bitwise(dtype):
    model = make_fresh(dtype)
    optimizer = model.setup_optimizer()
    take_steps(model, optimizer, 3)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved = copy_state(optimizer)
    take_steps(model, optimizer, 3, first=3)
    resumed = make_fresh(dtype, seed=1)
    resumed.load_state_dict(weights)
    resumed_optimizer = resumed.setup_optimizer()
    resumed_optimizer.load_named_state(make_reader(saved), num_steps=3)
    take_steps(resumed, resumed_optimizer, 3, first=3)
    for (name, param), other in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(param, other), name
    resumed_state = copy_state(resumed_optimizer)
    for name, tensor in copy_state(optimizer).items():
        assert torch.equal(tensor, resumed_state[name]), name


def test_saved_state_is_named_after_the_parameters_matrix_by_matrix():
    model = make_fresh()
    optimizer = model.setup_optimizer()
    take_steps(model, optimizer, 1)
    state, expected = copy_state(optimizer), {}
    for name, param in model.named_parameters():
        if name.startswith("transformer.h."):
            rows, cols = param.shape
            expected |= {f"{name}.momentum": (rows, cols),
                         f"{name}.second_moment": (rows, 1) if rows >= cols else (1, cols)}
        else:
            expected |= {f"{name}.exp_avg": tuple(param.shape), f"{name}.exp_avg_sq": tuple(param.shape)}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert optimizer.count_state_bytes() == sum(tensor.nbytes for tensor in state.values())


def test_state_that_is_missing_or_does_not_fit_is_refused():
    model = make_fresh()
    optimizer = model.setup_optimizer()
    take_steps(model, optimizer, 1)
    state = copy_state(optimizer)
    for changed in ({name: tensor for name, tensor in state.items() if name != "x0_lambdas.exp_avg"},
                    state | {"x0_lambdas.exp_avg": torch.zeros(5)},    # of a deeper model
                    state | {"x0_lambdas.exp_avg": torch.zeros(1)}):   # copy_ would spread it over all layers
        with pytest.raises((KeyError, RuntimeError, ValueError)):
            make_fresh().setup_optimizer().load_named_state(make_reader(changed), num_steps=1)


def test_compiled_kernels_equal_eager_ones(monkeypatch):
    reason = compilation.probe_compiler(torch.device("cpu"))
    if reason:
        pytest.skip(f"torch.compile doesn't work here: {reason}")

    def run():
        rng = torch.Generator().manual_seed(0)
        matrices = [torch.nn.Parameter(torch.randn(48, 32, generator=rng)) for _ in range(2)]
        embedding = torch.nn.Parameter(torch.randn(64, 32, generator=rng))
        optimizer = MuonAdamW([
            {"kind": "muon", "params": matrices, "lr": 0.02, "momentum": 0.95, "ns_steps": 5, "beta2": 0.9,
             "weight_decay": 0.28},
            {"kind": "adamw", "params": [embedding], "lr": 0.02, "betas": (0.8, 0.96), "eps": 1e-10,
             "weight_decay": 0.01}])
        for step in range(3):
            for param in (*matrices, embedding):
                param.grad = torch.randn(param.shape, generator=rng)
            for group in optimizer.param_groups:
                group["lr"] = 0.02 / (step + 1)  # a new value must not mean a new program
            optimizer.step()
        return [param.detach() for param in (*matrices, embedding)]
    eager = run()
    monkeypatch.setattr(compilation, "_compile_kernels", False)  # put back afterwards
    compilation.set_compile_kernels(True)
    torch._dynamo.utils.counters.clear()
    compiled = run()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
