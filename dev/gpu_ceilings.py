"""What this device can do at most: products at the model's shapes for some seconds each, a large copy; and the size of
the loss's chunks, which follows from the first.

Untested on a GPU: a CPU runs the same code at toy size.
"""

import subprocess
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dev.gpu_setup import Candidate, Check, Setup, guarded, judge, relative_error
from dev.kernel_training import FP8_TOLERANCE
from dev.timing import time_in_turn
from nanochat.cross_entropy import linear_cross_entropy
from nanochat.devices import get_peak_flops, synchronize
from nanochat.fp8 import find_obstacle
from nanochat.memory import CHUNK_TOKENS

BF16_TOLERANCE = 0.01     # relative error of a product, or of what two ways of adding make of it
CLOCK_FIELDS = "clocks.sm,power.draw,temperature.gpu"    # of nvidia-smi: MHz, W, degrees


# ---------------------------------------------------------------------------------------------------------------------
# Products and copies


def check_ceilings(setup: Setup) -> Iterator[Check]:
    """Sustained TFLOP/s in bf16 and fp8 at the shapes of the first two depths, and GB/s of a large copy."""
    yield guarded("copy", setup.device, lambda: _measure_copy(setup))
    for depth in setup.sizes.depths[:2]:
        for name, (rows, cols) in list_matrices(setup, depth).items():
            for dtype in ("bf16", "fp8"):
                label = f"d{depth} {name} {dtype}"
                yield guarded(label, setup.device, lambda label=label, dtype=dtype, rows=rows, cols=cols:
                              _measure_product(setup, label, dtype, rows, cols))


def list_matrices(setup: Setup, depth: int) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linear layers of a depth."""
    C = setup.make_config(depth).n_embd
    return {"q": (C, C), "c_fc": (4 * C, C), "c_proj": (C, 4 * C), "head": (setup.sizes.vocab_size, C)}


def _measure_copy(setup: Setup) -> Check:
    source = torch.empty(setup.sizes.copy_bytes, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    ms = time_in_turn({"copy": lambda: target.copy_(source)}, setup.device, rounds=5)["copy"]
    rate = 2 * source.nbytes / ms * 1e3  # read and written
    return Check("copy", "ok", f"{source.nbytes / 2**30:.1f} GiB in {ms:.2f} ms: {rate / 1e9:,.0f} GB/s, both ways",
                 {"ms": ms, "bytes_per_sec": rate})


def _measure_product(setup: Setup, label: str, dtype: str, M: int, K: int) -> Check:
    """x (N, K) @ weight (M, K).T: first against float64 on some rows, then again and again, with the clocks."""
    torch.manual_seed(5)
    N = min(setup.sizes.micro_tokens, 8192) if M == setup.sizes.vocab_size else setup.sizes.micro_tokens
    x, weight = (torch.randn(shape, device=setup.device).bfloat16() for shape in ((N, K), (M, K)))
    expected = x[:64].double() @ weight.double().T
    if dtype == "fp8":
        if obstacle := find_obstacle(setup.device):
            return Check(label, "absent", obstacle)
        multiply = make_fp8_product(x, weight)
    else:
        def multiply() -> Tensor:
            return x @ weight.T
    error = relative_error(multiply()[:64], expected)
    if not error < (tolerance := FP8_TOLERANCE if dtype == "fp8" else BF16_TOLERANCE):
        return Check(label, "FAIL", f"error {error:.1e} against float64", {"error": error, "tolerance": tolerance})
    ms, clocks = sustain(multiply, setup.device, setup.sizes.sustain_sec)
    rate = 2 * N * M * K / ms * 1e3
    peak_flops, _ = get_peak_flops(setup.device, torch.bfloat16) if setup.device.type == "cuda" else (None, "")
    return Check(label, "ok", f"{N} x {K} x {M}: {rate / 1e12:,.3g} TFLOP/s"
                 + (f" ({100 * rate / peak_flops:.0f}% of the bf16 peak)" if peak_flops else "")
                 + f", error {error:.1e}" + (f", {clocks}" if clocks else ""),
                 {"ms": ms, "flops_per_sec": rate, "error": error, "clocks": clocks, "clock_fields": CLOCK_FIELDS})


def make_fp8_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """x @ weight.T of both in e4m3, each with one scale; torch's product alone, whatever nanochat makes of it."""
    units = [t.abs().amax().float() / 448 for t in (x, weight)]
    x8, w8 = ((t / unit).clamp(-448, 448).to(torch.float8_e4m3fn) for t, unit in zip((x, weight), units, strict=True))
    return lambda: torch._scaled_mm(x8, w8.T, scale_a=units[0], scale_b=units[1], out_dtype=torch.bfloat16,
                                    use_fast_accum=True)


def sustain(run: Callable[[], object], device: torch.device, seconds: float) -> tuple[float, str]:
    """Milliseconds of a call that is repeated for so long, and what nvidia-smi says in the midst of it.

    Boost clocks last for a fraction of a second: a shorter measurement shows what no training run reaches.
    """
    run()
    synchronize(device)
    start, num_calls, clocks = time.perf_counter(), 0, None
    while num_calls == 0 or time.perf_counter() - start < seconds:
        for _ in range(20 if device.type == "cuda" else 1):
            run()
            num_calls += 1
        if not clocks and device.type == "cuda" and time.perf_counter() - start > seconds / 2:
            clocks = read_clocks(torch.cuda.get_device_properties(device).uuid)
        synchronize(device)
    ms = (time.perf_counter() - start) / num_calls * 1e3
    return ms, clocks.communicate()[0].strip() if clocks else ""


def read_clocks(uuid: object) -> subprocess.Popen | None:
    """nvidia-smi asked for clock, power and temperature, which takes it a while; None where there is none."""
    name = str(uuid) if str(uuid).startswith("GPU-") else f"GPU-{uuid}"
    try:
        return subprocess.Popen(["nvidia-smi", f"--query-gpu={CLOCK_FIELDS}", "--format=csv,noheader", "-i", name],
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8")
    except OSError:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The loss's chunks


def check_chunks(setup: Setup) -> Iterator[Check]:
    """The fused loss with chunks of several sizes: the same loss and gradients, and the time."""
    torch.manual_seed(6)
    sizes, device = setup.sizes, setup.device
    N, C, V = sizes.micro_tokens, setup.make_config(sizes.depths[1]).n_embd, sizes.vocab_size
    x = torch.randn(N, C, device=device).to(setup.dtype).requires_grad_()
    weight = (torch.randn(-(-V // 64) * 64, C, device=device) * 5 / C**0.5).requires_grad_()
    targets = torch.randint(V, (N,), device=device)

    def run() -> tuple[Tensor, ...]:
        loss = linear_cross_entropy(x, weight, targets, V)
        return loss.detach(), *torch.autograd.grad(loss, (x, weight))

    default = CHUNK_TOKENS[device.type]
    expected = run()

    def measure(name: str, chunk_tokens: int) -> Check:
        CHUNK_TOKENS[device.type] = chunk_tokens
        try:
            errors = [relative_error(a, e) for a, e in zip(run(), expected, strict=True)]
            ms = time_in_turn({name: run}, device, rounds=5)[name]
        finally:
            CHUNK_TOKENS[device.type] = default
        candidate = Candidate(f"CHUNK_TOKENS[{device.type}] of nanochat/memory.py", str(chunk_tokens), ms,
                              chunk_tokens == default)
        return Check(name, judge(max(errors) < BF16_TOLERANCE), f"{N} tokens, {C} channels: {ms:.2f} ms, "
                     f"{max(errors):.1e} from chunks of {default}", {"ms": ms, "errors": errors}, candidate)
    for chunk_tokens in sorted({*sizes.chunk_tokens, default}):
        name = f"chunks of {chunk_tokens}"
        yield guarded(name, device, lambda name=name, n=chunk_tokens: measure(name, n))
