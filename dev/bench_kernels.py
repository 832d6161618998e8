"""The kernel sandbox: each operation of a step, all of our kernels for it, and your own, first right, then fast.

    python -m dev.bench_kernels                              depth 6 on a CPU, a few minutes; 12 and 24 on a GPU
    python -m dev.bench_kernels --list                       the operations, their arguments, their variants
    python -m dev.bench_kernels --op attention_train moe --depth 4
    python -m dev.bench_kernels --op linear --plugin my.py   with your own variants, which this file adds:

        import torch

        def variants(registry):
            registry.add("linear", "mine", lambda x, weight: x @ weight.T)
            registry.add("norm_rotary", "triton", my_kernel, needs="cuda")

Each variant gets a copy of the inputs. Its result, gradients and changed inputs are compared with the definition in
float64; what is wrong is said and not timed. Time: on CUDA the median by events, the L2 cache flushed before each call;
elsewhere the median of rounds in which all variants take turns, caches as they are, so that small operations may exceed
the roof of the memory. FLOPs are those of the products, recomputation not counted, or of all elements where there are
no products; bytes are the inputs read and the outputs written once. The roof of an operation is the lower of the peak
and of its intensity (FLOPs per byte) times the memory's rate: measured on a large product and a large copy in the same
run, and as the maker states them. fp8 is measured against the roof of bf16.

Writes kernels.json and a log-log roofline of each depth, kernels_d6.png, to --out, by default the folder kernels in the
base folder. A backend that isn't there is listed with the reason. The GPU's part has not run on a GPU of ours yet.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import torch

from dev.kernel_ops import (
    Inputs,
    Operation,
    Scale,
    Setting,
    Shape,
    Variant,
    clone,
    count_bytes,
    describe_error,
    find_expected,
    find_obstacle,
    judge_variant,
    run,
)
from dev.kernels import Registry
from dev.timing import print_table, sample_in_turn, sample_on_cuda
from nanochat.command_line import Parser, add_compute_flags, run_script
from nanochat.common import UserError, get_base_dir, is_out_of_memory, print0, write_json
from nanochat.compilation import choose_compile, set_compile_kernels
from nanochat.devices import find_gpu, get_compute_dtype, get_environment, get_peak_flops, init_compute, synchronize
from nanochat.scaling import make_config

CPU_DEPTHS, GPU_DEPTHS = (6,), (12, 24)
CPU_SIZES = {"rows": 2, "max_seq_len": 512, "decode_rows": 8}      # a few minutes on two cores
GPU_SIZES = {"rows": 16, "max_seq_len": 2048, "decode_rows": 64}
TOY = {"vocab_size": 320, "aspect_ratio": 32, "head_dim": 16}
TOY_SIZES = {"rows": 2, "max_seq_len": 128, "decode_rows": 3}
ROUNDS_SEC = 2      # of all variants of one shape together, on a CPU
PRODUCT_SIZES = {"cpu": 1024}    # of the square product that the peak is measured on; 8192 on a GPU
COPY_BYTES = {"cpu": 2**28}      # of the copy for the memory's rate; 2**30 on a GPU
# Bytes/s of memory as the makers state them, by the names of devices.GPUS
MEMORY_RATES = {"b200": 8e12, "gb200": 8e12, "h200": 4.8e12, "gh200": 4e12, "h100": 3.35e12, "h100 nvl": 3.9e12,
                "h100 pcie": 2e12, "a100": 2.039e12, "a10g": 600e9, "l40s": 864e9, "l4": 300e9, "v100": 900e9,
                "t4": 320e9, "5090": 1.792e12, "4090": 1.008e12, "3090": 936e9, "mi300x": 5.3e12}


@dataclass(frozen=True)
class Roof:
    """What a device can do at most; None where it isn't known."""
    flops_per_sec: float | None
    bytes_per_sec: float | None
    source:        str

    def at(self, intensity: float) -> float | None:
        """FLOP/s at so many FLOPs a byte."""
        if self.flops_per_sec is None or self.bytes_per_sec is None:
            return None
        return min(self.flops_per_sec, intensity * self.bytes_per_sec)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--op", nargs="+", metavar="NAME", help="operations (default: all)")
    add("--only", nargs="+", metavar="NAME", help="variants, by name (default: all)")
    add("--plugin", type=Path, nargs="+", default=[], metavar="FILE.py", help="files that add variants")
    add("--list", action="store_true", help="measure nothing, show the operations")
    add("--depth", type=int, nargs="+", help="models whose shapes are measured (default: 6; on a GPU 12 and 24)")
    add("--rows", type=int, help="sequences of a micro-batch (default: 2; on a GPU 16)")
    add("--max-seq-len", type=int, help="their tokens (default: 512; on a GPU 2048)")
    add("--vocab-size", type=int, default=32768)
    add("--toy", action="store_true", help="toy sizes, to see that all of it works")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="variants by torch.compile")
    add_compute_flags(parser)
    add("--out", type=Path, help="folder for kernels.json and pictures (default: kernels, in the base folder)")
    args = parser.parse_args(argv)
    if args.toy:
        parser.refuse_unused(args, ("vocab_size",), "--toy")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    registry = Registry()
    for path in args.plugin:
        registry.load_plugin(path)
    operations = choose_operations(args, registry)
    if args.list:
        list_operations(operations)
        return {}
    # imported here: matplotlib takes a second, which a mistake needn't wait for
    from dev.figures import draw_roofline, make_folder, save_figure
    out = make_folder(args.out or get_base_dir() / "kernels")
    device, _ = init_compute(args.device_type)
    scales = make_scales(args, device)
    dtype, why = get_compute_dtype(args.dtype, device)
    use_compile, compile_reason = choose_compile(args.compile, device, None)
    if use_compile:
        set_compile_kernels(True)    # for its limit of recompilations
    set_compile_kernels(False)       # variants switch it on
    setting = Setting(device, dtype, "" if use_compile else f"torch.compile: {compile_reason}")
    print0(f"{device.type}, {dtype} ({why}), torch.compile {'on' if use_compile else 'off'}: {compile_reason}")
    roofs = {"measured": measure_roof(setting), "datasheet": find_datasheet(setting)}
    for name, roof in roofs.items():
        print0(f"{name} roof: {describe_roof(roof)}")
    results = {"environment": get_environment(device), "device": device.type, "dtype": str(dtype)[6:],
               "roofs": {name: asdict(roof) for name, roof in roofs.items()}, "scales": {}, "points": []}
    for name, scale in scales.items():
        results["scales"][name] = asdict(scale)
        for operation in operations:
            for label, shape in operation.list_shapes(scale).items():
                points = measure_shape(operation, shape, setting, roofs)
                place = {"operation": operation.name, "family": operation.family, "scale": name, "label": label,
                         "shape": shape}
                results["points"] += [place | point for point in points]
                write_json(out / "kernels.json", results)    # whole after each, should it be killed
                print_points(f"{name} {operation.name}, {label}", points)
    print0(f"\nfigures in {out / 'kernels.json'}")
    results["figures"] = [str(save_figure(draw_roofline(results, scale), f"kernels_{scale}", out)) for scale in
                          dict.fromkeys(point["scale"] for point in results["points"] if point["ms"])]
    print_wrong(results)
    return results


def print_wrong(results: dict) -> None:
    """What is wrong is said once more at the end."""
    wrong = [point for point in results["points"] if point["status"] in ("WRONG", "error")]
    for point in wrong:
        print0(f"{point['status']}: {point['variant']} of {point['scale']} {point['operation']}, {point['label']}: "
               f"{point['detail']}")


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def choose_operations(args: argparse.Namespace, registry: Registry) -> list[Operation]:
    """Those that are asked for, each with the variants that are asked for."""
    known = registry.operations
    for name in args.op or ():
        if name not in known:
            raise UserError(f"--op {name} is not one of {', '.join(known)}")
    operations = [known[name] for name in args.op or known]
    if not args.only:
        return operations
    names = list(dict.fromkeys(variant.name for operation in operations for variant in operation.variants))
    for name in args.only:
        if name not in names:
            raise UserError(f"--only {name} is not one of the variants {'; '.join(names)}")
    chosen = ((operation, tuple(v for v in operation.variants if v.name in args.only)) for operation in operations)
    return [replace(operation, variants=variants) for operation, variants in chosen if variants]


def list_operations(operations: list[Operation]) -> None:
    for operation in operations:
        print0(f"{operation.name}: {operation.about}\n    "
               + "; ".join(variant.name for variant in operation.variants))


def make_scales(args: argparse.Namespace, device: torch.device) -> dict[str, Scale]:
    """By depth; a toy is narrower."""
    on_cpu = device.type == "cpu"
    sizes = dict(TOY_SIZES if args.toy else CPU_SIZES if on_cpu else GPU_SIZES)
    sizes |= {name: getattr(args, name) for name in ("rows", "max_seq_len") if getattr(args, name) is not None}
    for name, size in (sizes | {"vocab_size": args.vocab_size}).items():
        if size < 1:
            raise UserError(f"--{name.replace('_', '-')} {size} must be at least 1")
    shape = TOY if args.toy else {"vocab_size": args.vocab_size}
    depths = args.depth or ((2,) if args.toy else CPU_DEPTHS if on_cpu else GPU_DEPTHS)
    return {f"d{depth}": Scale(make_config(depth, sequence_len=sizes["max_seq_len"], **shape), sizes["rows"],
                               sizes["decode_rows"]) for depth in depths}


def measure_roof(setting: Setting) -> Roof:
    """Of a large square product and a large copy, the best of their calls."""
    device, size = setting.device, PRODUCT_SIZES.get(setting.device.type, 8192)
    left, right = (torch.randn(size, size, device=device).to(setting.dtype) for _ in range(2))
    source = torch.zeros(COPY_BYTES.get(device.type, 2**30), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds, out = {}, torch.empty_like(left)
    for name, call in (("product", lambda: torch.mm(left, right, out=out)), ("copy", lambda: target.copy_(source))):
        seconds[name] = min(sample({name: call}, device)[name]) / 1e3
    return Roof(2 * size**3 / seconds["product"], 2 * source.nbytes / seconds["copy"],
                f"a product of {size} x {size} in {str(setting.dtype)[6:]}, a copy of {source.nbytes / 2**20:.0f} MiB")


def find_datasheet(setting: Setting) -> Roof:
    """As the maker states them; of a CPU nothing is listed."""
    if setting.device.type != "cuda":
        return Roof(None, None, f"not known for {setting.device.type}")
    flops, source = get_peak_flops(setting.device, setting.dtype)
    gpu = find_gpu(torch.cuda.get_device_name(setting.device))
    if setting.dtype not in (torch.bfloat16, torch.float16):
        flops, source = None, f"{source}; this is {str(setting.dtype)[6:]}"
    return Roof(flops, MEMORY_RATES.get(gpu[0]) if gpu else None, source)


def describe_roof(roof: Roof) -> str:
    words = [f"{value / unit:,.3g} {name}" if value else f"{name} not known" for value, unit, name in
             ((roof.flops_per_sec, 1e12, "TFLOP/s"), (roof.bytes_per_sec, 1e9, "GB/s"))]
    return f"{', '.join(words)} ({roof.source})"


# ---------------------------------------------------------------------------------------------------------------------
# One shape


def measure_shape(operation: Operation, shape: Shape, setting: Setting, roofs: dict[str, Roof]) -> list[dict]:
    """A point for each variant: right or wrong first, then the time of those that are right."""
    tolerance = operation.tolerances.get(setting.dtype)
    points = [{"variant": variant.name, "status": "absent", "detail": find_obstacle(operation, variant, setting, shape),
               "errors": {}, "tolerance": tolerance, "ms": None, "speedup": None} for variant in operation.variants]
    present = {variant.name: (point, variant) for point, variant in zip(points, operation.variants, strict=True)
               if not point["detail"]}
    if not present:
        return points
    torch.manual_seed(0)
    try:
        inputs = operation.make_inputs(shape, setting)
        expected = find_expected(operation, inputs)
    except Exception as error:    # each allocator has a type of its own
        if not is_out_of_memory(error):
            raise
        return [point if point["detail"] else point | {"status": "no memory", "detail": "for its definition in float64"}
                for point in points]
    counts = operation.count_flops(shape), count_bytes(operation, shape, inputs, expected)

    def judge(point: dict, variant: Variant, own: Inputs | None = None) -> bool:
        point |= asdict(judge_variant(operation, variant, inputs, expected, tolerance, own))
        return point["status"] == "ok"
    right = {name: variant for name, (point, variant) in present.items() if judge(point, variant)}
    copies = {name: clone(inputs) for name in right}
    samples = time_variants(operation, right, copies, setting.device)
    if any(variant.plugin for variant in right.values()):    # who keeps a result, or a graph of the first inputs, is
        inputs = operation.make_inputs(shape, setting)       # right again on the same numbers
        expected = find_expected(operation, inputs)
    for name, measured in samples.items():
        point, variant = present[name]
        if isinstance(measured, BaseException):
            point |= {"status": "error", "detail": f"right at first, then {describe_error(measured, variant)}"}
        elif judge(point, variant, copies[name]):
            point |= describe_speed(measured, *counts, roofs)
        else:
            point["detail"] += " (after calls that were right)"
    base = next((point["ms"] for point in points if point["ms"]), None)
    for point in points:
        point["speedup"] = base / point["ms"] if point["ms"] else None
    return points


def time_variants(operation: Operation, variants: dict[str, Variant], copies: dict[str, Inputs],
                  device: torch.device) -> dict[str, list[float] | BaseException]:
    """Milliseconds of each variant's calls, on inputs of its own; or how a call failed."""
    failures: dict[str, BaseException] = {}

    def guard(variant: Variant, own: Inputs) -> Callable[[], None]:
        def call() -> None:
            if variant.name not in failures:
                try:
                    run(operation, variant.call, own)
                except (Exception, SystemExit) as error:    # of any kind, see judge_variant
                    failures[variant.name] = error
        return call
    return sample({name: guard(variant, copies[name]) for name, variant in variants.items()}, device) | failures


def sample(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of calls, none at all perhaps."""
    if device.type == "cuda":
        return {name: sample_on_cuda(call, device) for name, call in calls.items()}
    start = time.perf_counter()
    for call in calls.values():
        call()
    synchronize(device)
    rounds = int(ROUNDS_SEC / (time.perf_counter() - start))
    return sample_in_turn(calls, device, rounds=min(max(rounds, 3), 15), warmup=1)


def describe_speed(samples_ms: list[float], flops: int, num_bytes: int, roofs: dict[str, Roof]) -> dict:
    """What follows from the time: FLOP/s, bytes/s, and the part of each roof that is reached; None where it isn't
    known."""
    ms = median(samples_ms)
    low, *_, high = quantiles(samples_ms, n=5) if len(samples_ms) > 1 else samples_ms * 2
    roof_frac = {name: roof.at(flops / num_bytes) and flops / ms * 1e3 / roof.at(flops / num_bytes)
                 for name, roof in roofs.items()}
    return {"ms": ms, "min_ms": min(samples_ms), "p20_ms": low, "p80_ms": high, "flops": flops, "bytes": num_bytes,
            "flops_per_byte": flops / num_bytes, "flops_per_sec": flops / ms * 1e3,
            "bytes_per_sec": num_bytes / ms * 1e3, "roof_frac": roof_frac}


def print_points(title: str, points: list[dict]) -> None:
    """A table of one shape's variants; of those without a time the reason, once where it is the same."""
    timed = [point for point in points if point["ms"]]
    print0(f"\n{title}" + (f": {timed[0]['flops'] / 1e9:,.3g} GFLOP, {timed[0]['bytes'] / 1e6:,.3g} MB, "
                           f"{timed[0]['flops_per_byte']:,.3g} FLOPs a byte" if timed else ""))
    if timed:
        known = [name for name, frac in timed[0]["roof_frac"].items() if frac]
        print_table(["variant", "error", "ms", "TFLOP/s", "GB/s", *(f"% of {name} roof" for name in known), "speed"], [
            [point["variant"], f"{max(point['errors'].values()):.0e}", f"{point['ms']:.4g}",
             f"{point['flops_per_sec'] / 1e12:.3g}", f"{point['bytes_per_sec'] / 1e9:.3g}",
             *(f"{100 * point['roof_frac'][name]:.0f}" for name in known), f"{point['speedup']:.2f}"]
            for point in timed])
    reasons: dict[str, list[str]] = {}
    for point in points:
        if not point["ms"]:
            reasons.setdefault(f"{point['status']}: {point['detail']}", []).append(point["variant"])
    for reason, variants in reasons.items():
        print0(f"{'; '.join(variants)}: {reason}")


if __name__ == "__main__":
    run_script(main)
