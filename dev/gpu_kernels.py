"""Attention, loss and optimizer kernels of this device against the definitions of the kernel bench, and what only these
need: odd lengths and grouped heads, new rates that must not compile anew, memory; then all other operations of it."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dev.gpu_setup import Candidate, Check, Setup, guarded, judge, measure_peak_bytes
from dev.kernel_attention import attend_to_cache, by_backend
from dev.kernel_ops import (
    Operation,
    Scale,
    Setting,
    Shape,
    Variant,
    clone,
    find_error,
    find_expected,
    find_obstacle,
    judge_variant,
    run,
)
from dev.kernels import Registry
from dev.timing import time_in_turn
from nanochat.flash_attention import probe_report

# What sections of their own check, at the same shapes or others
CHECKED_ELSEWHERE = ("attention", "attention_train", "attention_decode", "linear", "fp8_linear", "linear_cross_entropy",
                     "adamw_update")


def get_setting(setup: Setup) -> Setting:
    return Setting(setup.device, setup.dtype, "" if setup.use_compile else "nothing is compiled here")


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def check_attention(setup: Setup) -> Iterator[Check]:
    """Every backend that this device has: windows, grouped heads, odd lengths, backward, and decoding from a cache."""
    for name, works, reason in probe_report(setup.device, setup.dtype, setup.make_config(setup.sizes.depths[0])):
        if not works:
            # a backend that isn't there, or isn't for this device, is no fault; one that is there and fails is
            yield Check(name, "absent" if works is None else "FAIL", reason)
            continue
        for what, check in (("train", _check_whole_sequences), ("decode", _check_decoding)):
            yield guarded(f"{name} {what}", setup.device, lambda check=check, name=name: check(setup, name))


def _find_worst(operation: Operation, variant: Variant, cases: dict[str, Shape], setup: Setup) -> tuple[float, str]:
    """The largest error of all cases, and where it is; an exception of the variant ends it."""
    worst, worst_case = 0.0, ""
    for case, shape in cases.items():
        inputs = operation.make_inputs(shape, get_setting(setup))
        expected = find_expected(operation, inputs)
        for name, output in run(operation, variant.call, clone(inputs)).items():
            error = find_error(output, expected[name], inputs.get(name))
            if not (math.isnan(worst) or error <= worst):  # NaN is the worst, and stays it
                worst, worst_case = error, f"{name} at {case}"
    return worst, worst_case


def _check_whole_sequences(setup: Setup, name: str) -> Check:
    torch.manual_seed(1)
    operation, D = Registry().operations["attention_train"], setup.sizes.head_dim
    variant = next(variant for variant in operation.variants if variant.name == name)
    T, odd_T = setup.sizes.attention_T
    worst, worst_case, num_cases = 0.0, "", 0
    # (tokens, key/value heads, windows): few, since FlexAttention compiles each anew
    for num_tokens, Hk, windows in ((T, 4, (-1, T // 4, T)), (T, 2, (-1, 128)), (odd_T, 4, (0, 128)),
                                    (odd_T, 2, (-1, odd_T // 4))):
        torch.compiler.reset()  # or the limit of recompilations would turn later cases into eager ones
        cases = {f"T {num_tokens}, window {window}, {Hk} of 4 heads": {
            "B": 2, "T": num_tokens, "H": 4, "Hk": Hk, "D": D, "window": window} for window in windows}
        error, case = _find_worst(operation, variant, cases, setup)
        num_cases += len(cases)
        if not (math.isnan(worst) or error <= worst):
            worst, worst_case = error, case
    full_ms, window_ms = _time_training(setup, operation, variant)
    tolerance = operation.tolerances[setup.dtype]
    return Check(f"{name} train", judge(worst < tolerance),
                 f"{num_cases} cases, worst error {worst:.1e} ({worst_case}); 4 x {setup.sizes.T} tokens, 6 heads, "
                 f"forward and backward: {full_ms:.2f} ms, window T/4 {window_ms:.2f} ms",
                 {"worst_error": worst, "tolerance": tolerance, "whole_ms": full_ms, "window_ms": window_ms},
                 # of four layers of the model's pattern, SSSL
                 Candidate("--attention, by the kernels", name, 3 * window_ms + full_ms, name == setup.backend))


def _time_training(setup: Setup, operation: Operation, variant: Variant) -> list[float]:
    """Milliseconds of forward and backward with the whole past and with the model's short window."""
    T = setup.sizes.T
    inputs = operation.make_inputs({"B": 4, "T": T, "H": 6, "Hk": 6, "D": setup.sizes.head_dim, "window": -1},
                                   get_setting(setup))
    calls = {str(window): lambda window=window: run(operation, variant.call, inputs | {"window": window})
             for window in (-1, T // 4)}
    return list(time_in_turn(calls, setup.device, rounds=5).values())


def _check_decoding(setup: Setup, name: str) -> Check:
    """New tokens on a cache whose rows hold different numbers of tokens."""
    torch.manual_seed(2)
    operation, S = Registry().operations["attention_decode"], setup.sizes.attention_T[0]
    variant = Variant(name, by_backend(name, attend_to_cache))
    lengths = (0, 5, S // 2, S - 8)
    cases = {f"{T} new, window {window}, {Hk} of 4 heads": {
        "B": len(lengths), "T": T, "S": S, "H": 4, "Hk": Hk, "D": setup.sizes.head_dim, "lengths": lengths,
        "window": window} for Hk in (4, 2) for T in (1, 7) for window in (-1, 128)}
    with torch.inference_mode():
        worst, worst_case = _find_worst(operation, variant, cases, setup)
    tolerance, num_cases = operation.tolerances[setup.dtype], len(cases) * len(lengths)
    return Check(f"{name} decode", judge(worst < tolerance), f"{num_cases} rows, worst error {worst:.1e} "
                 f"({worst_case})", {"worst_error": worst, "tolerance": tolerance})


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def check_cross_entropy(setup: Setup) -> Iterator[Check]:
    """The fused loss and its gradients against float64; its time and memory against the plain loss, eager."""
    torch.manual_seed(3)
    operation = Registry().operations["linear_cross_entropy"]
    variants = {variant.name: variant for variant in operation.variants}
    fused, plain = variants["fused, compiled" if setup.use_compile else "fused"], variants["plain"]
    sizes, device = setup.sizes, setup.device
    N, C, V = sizes.loss_tokens, setup.make_config(sizes.depths[0]).n_embd, sizes.vocab_size
    inputs = operation.make_inputs({"N": N, "C": C, "V": V}, get_setting(setup))
    few = inputs | {name: inputs[name][:4096] for name in ("x", "targets")}    # float64 is slow on many GPUs
    expected, tolerance = find_expected(operation, few), operation.tolerances[setup.dtype]
    errors, plain_errors = ({name: find_error(output, expected[name])
                             for name, output in run(operation, variant.call, few).items()}
                            for variant in (fused, plain))
    yield Check("against float64", judge(all(error < tolerance for error in errors.values())), ", ".join(
        f"{name} {error:.1e} (plain {plain_errors[name]:.1e})" for name, error in errors.items()),
        {f"{name}_error": error for name, error in errors.items()} | {"tolerance": tolerance})

    calls = {name: lambda variant=variant: run(operation, variant.call, inputs)
             for name, variant in (("fused", fused), ("plain", plain))}
    fused_ms, plain_ms = time_in_turn(calls, device, rounds=5).values()
    figures = {"tokens": N, "fused_ms": fused_ms, "plain_ms": plain_ms}
    detail = f"{N} tokens, vocabulary {V}: {fused_ms:.1f} ms, plain {plain_ms:.1f} ms"
    passed = True
    if device.type == "cuda":
        fused_bytes, plain_bytes = (measure_peak_bytes(call, device) for call in calls.values())
        figures |= {"fused_peak_bytes": fused_bytes, "plain_peak_bytes": plain_bytes}
        detail += f"; {fused_bytes / 2**30:.2f} GiB, plain {plain_bytes / 2**30:.2f} GiB"
        passed = fused_bytes < 0.6 * plain_bytes
    # no candidates of a choice: fused is the default for its memory, whichever is faster
    yield Check("time and memory", judge(passed), detail, figures)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def check_optimizer(setup: Setup) -> Iterator[Check]:
    """Compiled and eager kernels against the same formulas in float64; new rates must not compile anew."""
    torch.manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"adamw {str(dtype)[6:]}"
        shape = {"V": setup.sizes.vocab_size, "C": 64}
        yield guarded(name, setup.device, lambda name=name, shape=shape, dtype=dtype: _check_update(
            setup, name, "adamw_update", shape, dtype))
    shapes = {f"muon {K}x{rows}x{cols}": {"K": K, "rows": rows, "cols": cols}
              for K, rows, cols in setup.sizes.matrices}
    # As queries and keys are: no GPU has run these yet
    shapes |= {f"{name}, half by heads": shape | {"num_by_head": shape["K"] // 2, "head_dim": setup.sizes.head_dim}
               for name, shape in shapes.items() if shape["rows"] == shape["cols"]}
    for name, shape in shapes.items():
        yield guarded(name, setup.device, lambda name=name, shape=shape: _check_update(
            setup, name, "muon_update", shape, setup.dtype))


def _check_update(setup: Setup, name: str, update: str, shape: Shape, dtype: torch.dtype) -> Check:
    """Two updates in a row, at two learning rates; compares how far the parameter moved."""
    operation = Registry().operations[update]
    inputs = operation.make_inputs(shape, Setting(setup.device, dtype))
    eager, compiled = (variant.call for variant in operation.variants)
    if not setup.use_compile:
        compiled = eager

    def move(call: Callable) -> tuple[Tensor, int]:
        state = clone(inputs)
        run(operation, call, state)
        num_graphs = count_compiled_graphs()
        run(operation, call, state | {"lr": state["lr"] / 2})
        return state["param"], count_compiled_graphs() - num_graphs
    expected = find_expected(operation, inputs)
    expected = find_expected(operation, inputs | expected | {"lr": inputs["lr"] / 2})["param"]
    (eager_param, _), (param, num_recompiled) = move(eager), move(compiled)
    start = inputs["param"]
    eager_error, error = (_compare(moved, expected, start) for moved in (eager_param, param))
    still = update == "muon_update" and moved_without_gradient(param.double() - start.double(), start)
    tolerance = operation.tolerances[dtype]
    passed = error < tolerance and eager_error < tolerance and not num_recompiled and not still
    timed = clone(inputs) | {"lr": inputs["lr"] / 10}
    ms = time_in_turn({"eager": lambda: run(operation, eager, timed),
                       "compiled": lambda: run(operation, compiled, timed)}, setup.device, rounds=5)
    detail = f"error {error:.1e}, eager {eager_error:.1e}; {ms['compiled']:.2f} ms, eager {ms['eager']:.2f} ms"
    detail += f"; {num_recompiled} graphs compiled anew for another rate" if num_recompiled else ""
    detail += "; a matrix without gradient moved" if still else ""
    return Check(name, judge(passed), detail, {"error": error, "eager_error": eager_error, "tolerance": tolerance,
                                               "num_recompiled": num_recompiled, "ms": ms["compiled"],
                                               "eager_ms": ms["eager"]})


def _compare(param: Tensor, expected: Tensor, start: Tensor) -> float:
    """bf16 parameters are rounded after each update, so what they moved is compared with their own size."""
    return find_error(param, expected, start if param.dtype == torch.float32 else None)


def moved_without_gradient(moved: Tensor, start: Tensor) -> bool:
    """Whether Muon moved a matrix whose gradient is zero by more than its weight decay."""
    return float(moved[0].norm() / start[0].double().norm()) > 0.01


def count_compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---------------------------------------------------------------------------------------------------------------------
# All other operations


def check_kernels(setup: Setup) -> Iterator[Check]:
    """The rest of the kernel bench at the first depth: each variant that is there, right or wrong, and its time."""
    sizes, setting = setup.sizes, get_setting(setup)
    scale = Scale(setup.make_config(sizes.depths[0]), sizes.step_rows[0], sizes.decode_rows[-1])
    for operation in Registry().operations.values():
        if operation.name in CHECKED_ELSEWHERE or setup.dtype not in operation.tolerances:
            continue
        for label, shape in operation.list_shapes(scale).items():
            name = f"{operation.name} {label}"
            yield guarded(name, setup.device, lambda name=name, operation=operation, shape=shape: _check_operation(
                setting, name, operation, shape))


def _check_operation(setting: Setting, name: str, operation: Operation, shape: Shape) -> Check:
    torch.manual_seed(10)
    inputs = operation.make_inputs(shape, setting)
    expected, tolerance = find_expected(operation, inputs), operation.tolerances[setting.dtype]
    present = [variant for variant in operation.variants if not find_obstacle(operation, variant, setting, shape)]
    verdicts = {variant.name: judge_variant(operation, variant, inputs, expected, tolerance) for variant in present}
    wrong = {variant: verdict for variant, verdict in verdicts.items() if verdict.status != "ok"}
    right = {variant.name: (variant.call, clone(inputs)) for variant in present if variant.name not in wrong}
    ms = time_in_turn({variant: lambda call=call, own=own: run(operation, call, own)
                       for variant, (call, own) in right.items()}, setting.device, rounds=5)
    parts = [f"{variant} {value:.2f} ms" for variant, value in ms.items()]
    parts += [f"{variant}: {verdict.detail}" for variant, verdict in wrong.items()]
    return Check(name, judge(not wrong), "; ".join(parts), {"tolerance": tolerance} | {
        f"{variant} ms": value for variant, value in ms.items()} | {
        f"{variant} error": max(verdict.errors.values()) for variant, verdict in verdicts.items() if verdict.errors})
