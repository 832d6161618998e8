"""A mixture of experts on this device: grouped products, the dispatch's share of a layer, the time tax of whole steps.

By estimate, copies and grouped products at 80% of a dense one's rate make a step of depth 18 take 1.25 to 1.3 times as
long with k = 2, 1.15 with k = 1; nanochat's branch of February 2026 fell from 46 to 35% of the peak. Not run on a GPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dev.gpu_setup import Check, Setup, guarded, judge, relative_error
from dev.gpu_steps import StepCase, TimedRun
from dev.timing import time_in_turn
from nanochat import moe
from nanochat.gpt import MLP

KNOBS = {"num_experts": 8, "top_k": 1}
# Of whole steps: the dense one first, which the others are compared with
VARIANTS = {"dense": {}, "k = 1": KNOBS, "k = 1, every other layer": KNOBS | {"moe_every": 2},
            "k = 2": KNOBS | {"top_k": 2}}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.01, torch.float16: 0.002}    # relative, against float64
SKEW = 4    # of the most loaded expert over the mean, in the uneven case


def check_moe(setup: Setup) -> Iterator[Check]:
    """The probe, then of each depth products and layer, then steps: of all depths the first variants first."""
    yield guarded("grouped products", setup.device, lambda: _probe(setup))
    for depth in setup.sizes.depths:
        for is_even in (True, False):
            label = f"d{depth} {'even' if is_even else 'uneven'} load"
            yield guarded(label, setup.device, lambda label=label, depth=depth, is_even=is_even:
                          _check_products(setup, label, depth, is_even))
        yield guarded(f"d{depth} layer", setup.device, lambda depth=depth: _check_layer(setup, depth))
    dense_ms: dict[int, float] = {}
    for names in (list(VARIANTS)[:2], list(VARIANTS)[2:]):
        for depth in setup.sizes.depths:
            for name in (name for name in names if VARIANTS[name].get("moe_every", 1) <= depth):
                yield guarded(f"d{depth} step, {name}", setup.device, lambda depth=depth, name=name:
                              _check_step(setup, depth, name, dense_ms))


def _probe(setup: Setup) -> Check:
    reason = moe.probe_grouped(setup.device.type, setup.dtype)
    return Check("grouped products", "absent" if reason else "ok", f"{setup.dtype}: " + (
        f"padded batches instead ({reason})" if reason else "torch's own"))


def make_ends(num_rows: int, is_even: bool, device: torch.device) -> Tensor:
    """(E,) rows of the experts before and with each: alike, or one with SKEW times the mean and one without."""
    E = KNOBS["num_experts"]
    shares = torch.ones(E) / E
    if not is_even:
        shares[0], shares[1], shares[2:] = SKEW / E, 0, (1 - SKEW / E) / (E - 2)
    ends = (shares.cumsum(0) * num_rows).round()
    ends[-1] = num_rows
    return ends.to(device, torch.int32)


def _check_products(setup: Setup, label: str, depth: int, is_even: bool) -> Check:
    """Forward and both gradients of one matrix of the experts, against float64 on some rows; their time beside that of
    one dense product of as many FLOPs, and beside padded batches."""
    torch.manual_seed(8)
    config, N, device = replace(setup, knobs=KNOBS).make_config(depth), setup.sizes.micro_tokens, setup.device
    E, C, H = config.num_experts, config.n_embd, config.expert_dim
    x, grad = (torch.randn(N, size, device=device).to(setup.dtype) for size in (C, H))
    weight, ends = (torch.randn(E, H, C, device=device) / C**0.5).to(setup.dtype), make_ends(N, is_even, device)

    def run() -> tuple[Tensor, ...]:
        return (moe.grouped_product(x, weight.mT, ends), moe.grouped_product(grad, weight, ends),
                moe.grouped_outer(grad, x, ends))

    def run_dense() -> None:
        return x @ weight[0].T, grad @ weight[0], grad.T @ x
    y, dx, dw = run()
    start, stop = int(ends[-2]), N    # of the last expert
    few = slice(stop - min(64, stop - start), stop)
    wide = weight[-1].double()
    errors = {"y": relative_error(y[few], x[few].double() @ wide.T),
              "dx": relative_error(dx[few], grad[few].double() @ wide),
              "dw": relative_error(dw[-1], grad[start:stop].double().T @ x[start:stop].double())}
    ms = time_in_turn({"grouped": run, "padded": lambda: without_grouped(run), "dense": run_dense}, device, rounds=5)
    passed = max(errors.values()) < TOLERANCES[setup.dtype]
    return Check(label, judge(passed), f"{N} rows, {E} x {C} x {H}: {ms['grouped']:.2f} ms, padded {ms['padded']:.2f}, "
                 f"one dense {ms['dense']:.2f}: {100 * ms['dense'] / ms['grouped']:.0f}% of its rate; errors "
                 + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
                 {f"{name}_ms": value for name, value in ms.items()} | {f"{n}_error": e for n, e in errors.items()})


def without_grouped(run: Callable[[], object]) -> object:
    """As where torch's grouped products are missing."""
    can_group, moe.can_group = moe.can_group, lambda *_: False
    try:
        return run()
    finally:
        moe.can_group = can_group


def _check_layer(setup: Setup, depth: int) -> Check:
    """Forward and backward of a layer, of its products alone, and of the dense MLP that computes as much."""
    torch.manual_seed(9)
    config, device = replace(setup, knobs=KNOBS).make_config(depth), setup.device
    N, C = setup.sizes.micro_tokens, config.n_embd
    with device:
        layer = moe.MoE(config, MLP(config, config.expert_dim, torch.float32), torch.float32)
        dense = MLP(config, config.hidden_dim, torch.float32)
    for param in (*layer.parameters(), *dense.parameters()):
        torch.nn.init.normal_(param, std=C**-0.5)
    layer.expert_bias.zero_()
    x = F.rms_norm(torch.randn(N, C, device=device), (C,)).to(setup.dtype)
    ends = make_ends(N, True, device)

    def multiply(tokens: Tensor) -> Tensor:
        """The products of the layer, without the dispatch."""
        return layer.shared(tokens) + layer.down(F.relu(layer.up(tokens, ends)).square(), ends)

    def train(module: Callable[[Tensor], Tensor]) -> None:
        module(x.detach().requires_grad_()).sum().backward()
    compile = torch.compile if setup.use_compile else lambda module: module
    variants = {name: compile(module) for name, module in (("layer", layer), ("products", multiply), ("dense", dense))}
    ms = time_in_turn({name: lambda module=module: train(module) for name, module in variants.items()}, device,
                      rounds=5)
    share = 1 - ms["products"] / ms["layer"]
    return Check(f"d{depth} layer", "ok", f"{N} tokens: {ms['layer']:.2f} ms, {ms['layer'] / ms['dense']:.2f} of the "
                 f"dense MLP's {ms['dense']:.2f}; dispatch {100 * share:.0f}% of it",
                 {f"{name}_ms": value for name, value in ms.items()} | {"dispatch_frac": share})


def _check_step(setup: Setup, depth: int, name: str, dense_ms: dict[int, float]) -> Check:
    """Whole steps, balance and optimizer included; the tax is their time over the dense model's."""
    setup = replace(setup, knobs=VARIANTS[name])
    run = TimedRun(setup, StepCase(depth, setup.sizes.step_rows[0]))
    check = run.measure_speed()
    if name == "dense":
        dense_ms[depth] = run.step_ms
    tax = run.step_ms / dense_ms[depth] if depth in dense_ms else None
    return replace(check, name=f"d{depth} step, {name}", figures=check.figures | {"time_tax": tax}, candidate=None,
                   detail=check.detail + (f"; time tax {tax:.3f}" if tax and name != "dense" else ""))
