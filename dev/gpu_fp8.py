"""Training in fp8 against bf16: the linear layers alone, and whole steps. Untested on a GPU.

Where the device has no units for it, that is what the line says.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dev.gpu_ceilings import list_matrices
from dev.gpu_setup import Check, Setup, guarded, judge, relative_error
from dev.gpu_steps import StepCase, TimedRun
from dev.kernel_training import FP8_TOLERANCE
from dev.timing import time_in_turn
from nanochat import fp8
from nanochat.gpt import Linear

FP8_LAYERS = ("q", "c_fc", "head")    # the other layers' inputs aren't RMS-normed


def check_fp8(setup: Setup) -> Iterator[Check]:
    """Layers at the shapes of the first two depths, then steps at these depths, in bf16 and in fp8."""
    setup = replace(setup, dtype=torch.bfloat16)
    if reason := fp8.find_obstacle(setup.device):
        yield Check("fp8", "absent", reason)
        return
    for depth in setup.sizes.depths[:2]:
        for name in FP8_LAYERS:
            label = f"d{depth} {name}"
            shape = list_matrices(setup, depth)[name]
            yield guarded(label, setup.device, lambda label=label, shape=shape: _check_layer(setup, label, shape))
    for depth in setup.sizes.depths[:2]:
        yield from _check_steps(setup, depth)


def _check_layer(setup: Setup, label: str, shape: tuple[int, int]) -> Check:
    """Output and gradients against float64, and the time of forward and backward against the bf16 layer."""
    torch.manual_seed(7)
    M, K = shape
    # an eighth for the head, whose outputs are large: the loss computes it in chunks
    N = setup.sizes.micro_tokens // (8 if M == setup.sizes.vocab_size else 1)
    with setup.device:
        plain = Linear(K, M, torch.float32)
        x, grad = F.rms_norm(torch.randn(N, K), (K,)).bfloat16(), torch.randn(N, M).bfloat16()
    quantized = fp8.Fp8Linear(plain, torch.bfloat16)

    def run(layer: torch.nn.Module) -> tuple[Tensor, ...]:
        inputs = x.detach().requires_grad_()
        y = layer(inputs)
        return y.detach(), *torch.autograd.grad(y, (inputs, layer.weight), grad)
    few, weight = slice(0, 256), plain.weight.detach().double()
    y, dx, dw = run(quantized)
    expected = (x[few].double() @ weight.T, grad[few].double() @ weight, run(plain)[2])
    errors = {name: relative_error(a, e) for name, a, e in zip(
        ("y", "dx", "dw"), (y[few], dx[few], dw), expected, strict=True)}
    compile = torch.compile if setup.use_compile else lambda layer: layer
    variants = {name: compile(layer) for name, layer in (("bf16", plain), ("fp8", quantized))}
    ms = time_in_turn({name: lambda layer=layer: run(layer) for name, layer in variants.items()}, setup.device,
                      rounds=5)
    passed = all(error < FP8_TOLERANCE for error in errors.values())
    return Check(label, judge(passed), f"{N} x {K} x {M}: {ms['fp8']:.2f} ms, bf16 {ms['bf16']:.2f} ms; errors "
                 + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
                 {"fp8_ms": ms["fp8"], "bf16_ms": ms["bf16"]} | {f"{n}_error": error for n, error in errors.items()})


def _check_steps(setup: Setup, depth: int) -> Iterator[Check]:
    """The same steps in bf16 and in fp8: what one choice offers, so both are timed here, one after the other."""
    losses: list[list[float]] = []

    def measure(case: StepCase) -> Check:
        run = TimedRun(setup, case)
        check = run.measure_speed(losses[0] if losses else None)
        losses.append(run.losses)
        option = "on" if case.build == "fp8" else "off"
        return replace(check, candidate=replace(check.candidate, choice=f"--fp8 at depth {depth}", option=option,
                                                is_default=option == "off"))
    for build in ("blocks", "fp8"):
        case = StepCase(depth, setup.sizes.step_rows[0], build)
        yield guarded(case.name, setup.device, lambda case=case: measure(case))
