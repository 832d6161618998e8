"""Attention, loss and optimizer kernels of this device against plain versions in float64."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dev.gpu_setup import Candidate, Check, Setup, guarded, judge, measure_peak_bytes, relative_error
from dev.timing import time_in_turn
from nanochat import flash_attention
from nanochat.compilation import set_compile_kernels
from nanochat.cross_entropy import linear_cross_entropy, plain_cross_entropy
from nanochat.flash_attention import flash_attn, plain_attention, probe_report
from nanochat.optim import MuonRule, adamw_update, as_scalars, muon_update

# Relative errors against float64. bf16 keeps 8 bits: one rounding is 2e-3 on average, a wrong mask or layout over 0.3
ATTENTION_TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 2e-3}
ADAMW_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.01}
# Orthogonalisation in tf32 and bf16 is inexact by design: singular values only have to come near 1
MUON_TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.06}
HYPERS = {"adamw": (0.02, 0.8, 0.95, 1e-10, 0.1, 3), "muon": (0.02, 0.95, 0.9, 0.1)}


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def check_attention(setup: Setup) -> Iterator[Check]:
    """Every backend that this device has: windows, grouped heads, odd lengths, backward, and decoding from a cache."""
    for name, works, reason in probe_report(setup.device, setup.dtype, setup.make_config(setup.sizes.depths[0])):
        if not works:
            # a backend that isn't there, or isn't for this device, is no fault; one that is there and fails is
            yield Check(name, "absent" if works is None else "FAIL", reason)
            continue
        flash_attention._override_impl = name
        try:
            for what, check in (("train", _check_whole_sequences), ("decode", _check_decoding)):
                yield guarded(f"{name} {what}", setup.device, lambda check=check, name=name: check(setup, name))
        finally:
            flash_attention._override_impl = None


def _make_qkv(setup: Setup, B: int, T: int, H: int, Hk: int) -> list[Tensor]:
    """q (B, T, H, D), k, v (B, T, Hk, D), normed as the model norms them, and the gradient of the output."""
    D = setup.sizes.head_dim
    shapes = ((B, T, H, D), (B, T, Hk, D), (B, T, Hk, D), (B, T, H, D))
    tensors = [torch.randn(shape, device=setup.device) for shape in shapes]
    tensors[:2] = [1.2 * F.rms_norm(t, (D,)) for t in tensors[:2]]
    return [t.to(setup.dtype) for t in tensors]


def _run_attention(call: Callable, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output, dq, dk, dv."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    out = call(q, k, v)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad)


def _check_whole_sequences(setup: Setup, name: str) -> Check:
    torch.manual_seed(1)
    T, odd_T = setup.sizes.attention_T
    # (tokens, key/value heads, windows): few, since FlexAttention compiles each anew
    cases = ((T, 4, (-1, T // 4, T)), (T, 2, (-1, 128)), (odd_T, 4, (0, 128)), (odd_T, 2, (-1, odd_T // 4)))
    worst, worst_case, num_cases = 0.0, "", 0
    for num_tokens, Hk, windows in cases:
        torch.compiler.reset()  # or the limit of recompilations would turn later cases into eager ones
        tensors = _make_qkv(setup, 2, num_tokens, 4, Hk)
        for window in windows:
            num_cases += 1
            actual = _run_attention(lambda q, k, v, w=window: flash_attn.flash_attn_func(
                q, k, v, window_size=(w, 0)), *tensors)
            expected = _run_attention(lambda q, k, v, w=window: plain_attention(q, k, v, w),
                                      *(t.double() for t in tensors))
            for label, a, e in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
                # with a window of 0 a token sees only itself: dq and dk are zero, so they are compared with 1
                scale = e.norm() if e.norm() > 1e-6 * e.numel()**0.5 else e.numel()**0.5
                error = float((a.double() - e).norm() / scale)
                if not (math.isnan(worst) or error <= worst):  # NaN is the worst, and stays it
                    worst, worst_case = error, f"{label} at T {num_tokens}, window {window}, {Hk} of 4 heads"
    full_ms, window_ms = _time_training(setup)
    tolerance = ATTENTION_TOLERANCE[setup.dtype]
    return Check(f"{name} train", judge(worst < tolerance),
                 f"{num_cases} cases, worst error {worst:.1e} ({worst_case}); 4 x {setup.sizes.T} tokens, 6 heads, "
                 f"forward and backward: {full_ms:.2f} ms, window T/4 {window_ms:.2f} ms",
                 {"worst_error": worst, "tolerance": tolerance, "whole_ms": full_ms, "window_ms": window_ms},
                 # of four layers of the model's pattern, SSSL
                 Candidate("--attention, by the kernels", name, 3 * window_ms + full_ms, name == setup.backend))


def _time_training(setup: Setup) -> list[float]:
    """Milliseconds of forward and backward with the whole past and with the model's short window."""
    tensors = _make_qkv(setup, 4, setup.sizes.T, 6, 6)
    calls = {str(window): lambda w=window: _run_attention(lambda q, k, v: flash_attn.flash_attn_func(
        q, k, v, window_size=(w, 0)), *tensors) for window in (-1, setup.sizes.T // 4)}
    return list(time_in_turn(calls, setup.device, rounds=5).values())


@torch.inference_mode()
def _check_decoding(setup: Setup, name: str) -> Check:
    """New tokens on a cache whose rows hold different numbers of tokens."""
    torch.manual_seed(2)
    capacity, worst, worst_case, num_cases = setup.sizes.attention_T[0], 0.0, "", 0
    lengths = torch.tensor([0, 5, capacity // 2, capacity - 8], dtype=torch.int32, device=setup.device)
    for Hk in (4, 2):
        _, k_all, v_all, _ = _make_qkv(setup, len(lengths), capacity, 4, Hk)
        for num_new in (1, 7):
            q, k_new, v_new, _ = _make_qkv(setup, len(lengths), num_new, 4, Hk)
            for window in (-1, 128):
                k_cache, v_cache = k_all.clone(), v_all.clone()
                out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k=k_new, v=v_new, cache_seqlens=lengths,
                                                         window_size=(window, 0))
                for row, length in enumerate(lengths.tolist()):
                    num_cases += 1
                    end = length + num_new
                    keys = torch.cat((k_all[row, :length], k_new[row]))[None].double()
                    values = torch.cat((v_all[row, :length], v_new[row]))[None].double()
                    # only the last queries are new; what stands before them doesn't matter
                    queries = F.pad(q[row:row + 1].double(), (0, 0, 0, 0, length, 0))
                    expected = plain_attention(queries, keys, values, window)[0, length:]
                    error = relative_error(out[row], expected)
                    if not torch.equal(k_cache[row, length:end], k_new[row]):
                        error = float("inf")  # the new keys weren't written where they belong
                    if not (math.isnan(worst) or error <= worst):
                        worst, worst_case = error, f"{num_new} new on {length}, window {window}, {Hk} of 4 heads"
    tolerance = ATTENTION_TOLERANCE[setup.dtype]
    return Check(f"{name} decode", judge(worst < tolerance),
                 f"{num_cases} rows, worst error {worst:.1e}" + (f" ({worst_case})" if worst_case else ""),
                 {"worst_error": worst, "tolerance": tolerance})


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def check_cross_entropy(setup: Setup) -> Iterator[Check]:
    """The fused loss and its gradients against float64; its time and memory against the plain loss, eager."""
    torch.manual_seed(3)
    sizes, device = setup.sizes, setup.device
    N, C, V = sizes.loss_tokens, setup.make_config(sizes.depths[0]).n_embd, sizes.vocab_size
    x = torch.randn(N, C, device=device).to(setup.dtype).requires_grad_()
    # large enough that the softcap bends some logits
    weight = (torch.randn(-(-V // 64) * 64, C, device=device) * 5 / C**0.5).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    targets[::7] = -1

    def run(loss_function: Callable, num_tokens: int = N, math_dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        inputs = [t.detach().to(math_dtype or t.dtype).requires_grad_() for t in (x[:num_tokens], weight)]
        loss = loss_function(*inputs, targets[:num_tokens], V)
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    fused, plain = linear_cross_entropy, plain_cross_entropy.__wrapped__
    num_compared = min(N, 4096)  # float64 logits are large
    expected = run(plain, num_compared, torch.float64)
    errors, plain_errors = ([relative_error(a, e) for a, e in zip(run(function, num_compared), expected, strict=True)]
                            for function in (fused, plain))
    # as good as plain arithmetic in the same dtype, but for a factor
    passed = all(error < 3 * plain_error + 1e-4 for error, plain_error in zip(errors, plain_errors, strict=True))
    labels = ("loss", "dx", "dw")
    yield Check("against float64", judge(passed), ", ".join(
        f"{label} {error:.1e} (plain {plain_error:.1e})"
        for label, error, plain_error in zip(labels, errors, plain_errors, strict=True)),
        {f"{label}_error": error for label, error in zip(labels, errors, strict=True)})

    fused_ms, plain_ms = time_in_turn({"fused": lambda: run(fused), "plain": lambda: run(plain)}, device,
                                      rounds=5).values()
    figures = {"tokens": N, "fused_ms": fused_ms, "plain_ms": plain_ms}
    detail = f"{N} tokens, vocabulary {V}: {fused_ms:.1f} ms, plain {plain_ms:.1f} ms"
    passed = True
    if device.type == "cuda":
        fused_bytes, plain_bytes = (measure_peak_bytes(lambda f=function: run(f), device)
                                    for function in (fused, plain))
        figures |= {"fused_peak_bytes": fused_bytes, "plain_peak_bytes": plain_bytes}
        detail += f"; {fused_bytes / 2**30:.2f} GiB, plain {plain_bytes / 2**30:.2f} GiB"
        passed = fused_bytes < 0.6 * plain_bytes
    # no candidates of a choice: fused is the default for its memory, whichever is faster
    yield Check("time and memory", judge(passed), detail, figures)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


def check_optimizer(setup: Setup) -> Iterator[Check]:
    """Compiled and eager kernels against the same formulas in eager float64; new rates must not compile anew."""
    torch.manual_seed(4)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"adamw {str(dtype)[6:]}"
        yield guarded(name, setup.device, lambda name=name, dtype=dtype: _check_update(
            setup, name, _run_adamw, _make_adamw_state(setup, dtype), dtype, ADAMW_TOLERANCE[dtype]))
    matmul_dtype = setup.dtype if setup.dtype == torch.bfloat16 else torch.float32
    for shape in setup.sizes.matrices:
        name = "muon {}x{}x{}".format(*shape)
        yield guarded(name, setup.device, lambda name=name, shape=shape: _check_update(
            setup, name, _run_muon, _make_muon_state(setup, shape), matmul_dtype, MUON_TOLERANCE[matmul_dtype]))


def _make_adamw_state(setup: Setup, dtype: torch.dtype) -> list[Tensor]:
    """Parameter, gradient and moments of an embedding, most of whose rows have no gradient."""
    param, grad, moment = torch.randn(3, setup.sizes.vocab_size, 64, device=setup.device).to(dtype)
    grad[::2] = 0
    return [param, grad, 0.1 * moment, 0.01 * moment.square()]


def _make_muon_state(setup: Setup, shape: tuple[int, int, int]) -> list[Tensor]:
    """Stacked parameters, gradients and state as in the first steps: a row and a whole matrix without a gradient."""
    K, rows, cols = shape
    param, grad = torch.randn(2, *shape, device=setup.device)
    grad[0] = 0
    grad[1, 0] = 0
    second_moment = torch.zeros((K, rows, 1) if rows >= cols else (K, 1, cols), device=setup.device)
    return [0.02 * param, grad, torch.zeros_like(param), second_moment]


def _run_adamw(state: list[Tensor], matmul_dtype: torch.dtype, lr_factor: float) -> None:
    lr, *others = HYPERS["adamw"]
    adamw_update(*state, *as_scalars([lr * lr_factor, *others]))


def _run_muon(state: list[Tensor], matmul_dtype: torch.dtype, lr_factor: float) -> None:
    lr, *others = HYPERS["muon"]
    muon_update(*state, 5, matmul_dtype, *as_scalars([lr * lr_factor, *others]), MuonRule())


@torch.no_grad()
def _check_update(setup: Setup, name: str, run: Callable, state: list[Tensor], dtype: torch.dtype,
                  tolerance: float) -> Check:
    """Two updates in a row, at two learning rates; compares how far the parameter moved."""
    def move(tensors: list[Tensor], matmul_dtype: torch.dtype, use_compile: bool) -> tuple[Tensor, int]:
        tensors, start = [t.clone() for t in tensors], tensors[0].double()
        set_compile_kernels(use_compile)
        try:
            run(tensors, matmul_dtype, 1.0)
            num_graphs = count_compiled_graphs()
            run(tensors, matmul_dtype, 0.5)
        finally:
            set_compile_kernels(setup.use_compile)
        return tensors[0].double() - start, count_compiled_graphs() - num_graphs

    expected, _ = move([t.double() for t in state], torch.float64, False)
    eager, _ = move(state, dtype, False)
    compiled, num_recompiled = move(state, dtype, setup.use_compile)
    # bf16 parameters are rounded after each update, so what they moved is compared with their own size
    scale = expected.norm() if state[0].dtype == torch.float32 else state[0].double().norm()
    eager_error, error = (float((moved - expected).norm() / scale) for moved in (eager, compiled))
    still = moved_without_gradient(compiled, state) if run is _run_muon else False
    passed = error < tolerance and eager_error < tolerance and not num_recompiled and not still
    timed = [t.clone() for t in state]

    def keep_moving(use_compile: bool) -> None:
        set_compile_kernels(use_compile)
        run(timed, dtype, 0.1)
        set_compile_kernels(setup.use_compile)
    ms = time_in_turn({"eager": lambda: keep_moving(False), "compiled": lambda: keep_moving(setup.use_compile)},
                      setup.device, rounds=5)
    detail = f"error {error:.1e}, eager {eager_error:.1e}; {ms['compiled']:.2f} ms, eager {ms['eager']:.2f} ms"
    detail += f"; {num_recompiled} graphs compiled anew for another rate" if num_recompiled else ""
    detail += "; a matrix without gradient moved" if still else ""
    return Check(name, judge(passed), detail, {"error": error, "eager_error": eager_error, "tolerance": tolerance,
                                               "num_recompiled": num_recompiled, "ms": ms["compiled"],
                                               "eager_ms": ms["eager"]})


def moved_without_gradient(moved: Tensor, state: list[Tensor]) -> bool:
    """Whether Muon moved a matrix whose gradient is zero by more than its weight decay."""
    return float(moved[0].norm() / state[0][0].double().norm()) > 0.01


def count_compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
