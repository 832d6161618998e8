"""Is this machine ready to train? One line per check: the finding, and the remedy.

    python -m scripts.doctor [--quick] [--json] [--device-type cpu]

Exit code 0 if training can start, else 2. Missing and broken packages are findings too: torch, and every module that
needs it, is therefore imported inside the checks.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

try:
    from nanochat import command_line, common, devices
except Exception:    # a half-installed package may raise any error
    command_line = common = None

PACKAGES = ("torch", "numpy", "tiktoken", "rustbpe", "pyarrow", "datasets", "safetensors", "requests", "filelock",
            "yaml", "matplotlib", "fastapi", "starlette", "pydantic", "uvicorn")
OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 9)
SET_UP = "bash runs/setup.sh"
# Assumptions, not studied: the first is enough for depth 4 on a CPU, the second for a part of climbmix and checkpoints
LOW_MEMORY_BYTES, LOW_DISK_BYTES, NO_DISK_BYTES = 4 * 2**30, 10 * 2**30, 2**30
NETWORK_TIMEOUT_SEC = 2.0


@dataclass(frozen=True)
class Finding:
    """The result of one check."""
    name:   str
    state:  str         # "ok" | "note": costs speed or comfort | "FAIL": training can't start
    what:   str
    advice: str = ""    # the remedy


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    make_parser = command_line.Parser if command_line else argparse.ArgumentParser
    parser = make_parser(prog="python -m scripts.doctor", description="Is this machine ready to train?")
    parser.add_argument("--quick", action="store_true", help="skip the trial of torch.compile, 10-60 s")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--device-type", default="auto", help="cuda, cpu, mps, xpu; auto: the best that is there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    findings = []
    for finding in examine(args.device_type, args.quick):
        findings.append(finding)
        if not args.json:
            advice = finding.advice and f"  -> {finding.advice}"
            print(f"{finding.state:<4}  {finding.name:<9}  {finding.what}{advice}", flush=True)
    num_fails = [finding.state for finding in findings].count("FAIL")
    result = {"ready": num_fails == 0, "checks": [asdict(finding) for finding in findings]}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print("\nready to train" if result["ready"] else f"\nnot ready: see the FAIL above, {num_fails} in all")
    return result


def examine(device_type: str, quick: bool) -> Iterator[Finding]:
    """All checks in order, each finding as soon as it is known; checks that need a failed one are left out."""
    yield check_python(sys.version_info[:2])
    yield (packages := check_packages())
    yield (disk := guard("disk", check_disk))
    if packages.state == "FAIL":
        return
    from nanochat.execution import check_isolation
    from nanochat.shards import load_shards
    from nanochat.tokenizer import get_tokenizer
    try:
        device = devices.get_device(device_type, common.get_ranks())
    except common.UserError as error:
        yield Finding("device", "FAIL", str(error))
        return
    dtype, why = devices.get_compute_dtype("auto", device)
    yield guard("device", lambda: check_device(device))
    yield guard("matmul", lambda: check_matmul(device, dtype, why))
    yield guard("memory", lambda: check_memory(device))
    yield guard("attention", lambda: check_attention(device, dtype))
    yield guard("fp8", lambda: check_fp8(device, quick), broken="note")
    yield guard("compile", lambda: check_compile(device, quick))
    # the isolation of model-written code, which only HumanEval needs
    yield guard("sandbox", lambda: Finding("sandbox", "ok", check_isolation()), broken="note")
    yield guard("network", check_network)
    if disk.state != "FAIL":
        yield guard("data", lambda: check_saved(
            "data", "*/manifest.json", lambda name: f"{len(load_shards(name).train)} shards + validation",
            "python -m nanochat.dataset --source python-docs"))
        yield guard("tokenizer", lambda: check_saved(
            "tokenizer", "*/tokenizer.json", lambda name: f"{get_tokenizer(name).get_vocab_size():,} tokens",
            "python -m scripts.tok_train"))


def guard(name: str, check: Callable[[], Finding], broken: str = "FAIL") -> Finding:
    """A check's finding; an exception in the check is a finding too, in the state `broken`."""
    try:
        return check()
    except Exception as error:
        return Finding(name, broken, describe_error(error))


def describe_error(error: Exception) -> str:
    """The first line of an error, with its type unless that is UserError."""
    message = (str(error).strip().splitlines() or ["no message"])[0][:300]
    return message if type(error).__name__ == "UserError" else f"{type(error).__name__}: {message}"


def check_python(version: tuple[int, int]) -> Finding:
    if version < OLDEST_PYTHON:
        return Finding("python", "FAIL", f"{version[0]}.{version[1]} is too old", "install Python 3.10 or newer")
    return Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")


def check_packages() -> Finding:
    """Import every package: an installed one can still be broken."""
    broken = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except Exception as error:
            broken.append(name if isinstance(error, ModuleNotFoundError) else f"{name} ({describe_error(error)})")
    if broken:
        return Finding("packages", "FAIL", f"missing or broken: {', '.join(broken)}", SET_UP)
    torch_version = importlib.import_module("torch").__version__
    if tuple(map(int, torch_version.split(".")[:2])) < OLDEST_TORCH:
        return Finding("packages", "FAIL", f"torch {torch_version} is older than 2.9", SET_UP)
    return Finding("packages", "ok", f"all {len(PACKAGES)}, torch {torch_version}")


def check_compile(device, quick: bool) -> Finding:
    """A C++ compiler, and a tiny function through torch.compile: training works without, but slower."""
    if not (compilers := [name for name in ("g++", "clang++", "c++", "cl") if shutil.which(name)]):
        return Finding("compile", "note", "no C++ compiler, so training runs eager and slower",
                       "install one (Debian, Ubuntu: apt install g++)")
    if quick:
        return Finding("compile", "ok", f"{compilers[0]} is there; torch.compile not tried (--quick)")
    from nanochat.compilation import probe_compiler
    with contextlib.redirect_stdout(sys.stderr):  # its warnings are no part of --json
        devices.init_compute(device.type)  # as a run would, so that the kernels are kept for it
    start = time.perf_counter()
    if reason := probe_compiler(device):
        return Finding("compile", "note", f"torch.compile fails, so training runs eager and slower: {reason}",
                       "delete the folder 'compiled' in the base folder and try again")
    return Finding("compile", "ok", f"torch.compile works with {compilers[0]}, {time.perf_counter() - start:.0f} s")


def check_attention(device, dtype) -> Finding:
    import torch

    from nanochat.config import GPTConfig
    from nanochat.flash_attention import probe_report
    with contextlib.redirect_stdout(sys.stderr):  # what it says while it waits is no part of --json
        probes = probe_report(device, dtype, GPTConfig())
    working = [name for name, works, _ in probes if works]
    others = "; ".join(f"{name}: {reason}" for name, works, reason in probes if not works)
    if not working:
        return Finding("attention", "FAIL", f"no backend works: {others}", SET_UP)
    what = f"uses {working[0]}; works: {', '.join(working)}" + (f"; not: {others}" if others else "")
    if device.type == "cuda" and working[0] != "fa3" and torch.cuda.get_device_capability(device) == (9, 0):
        index = f"https://download.pytorch.org/whl/cu{(torch.version.cuda or '').replace('.', '')}"
        return Finding("attention", "note", f"{what}; FlashAttention 3 is made for this Hopper GPU",
                       f"pip install 'kernels>=0.15', or pip install flash-attn-3 --index-url {index}")
    return Finding("attention", "ok", what)


def check_fp8(device, quick: bool) -> Finding:
    """Whether --fp8 on can be had, and the speed of the MLP's first product, cast included. Never run on a GPU."""
    import torch

    from nanochat.fp8 import Fp8Linear, find_obstacle
    from nanochat.gpt import Linear
    if reason := find_obstacle(device):
        return Finding("fp8", "ok", f"not here: {reason}")
    if device.type == "cpu":
        return Finding("fp8", "ok", "doesn't pay: a CPU computes it slowly; --fp8 on shows what it does to the loss")
    if quick:
        return Finding("fp8", "ok", "--fp8 on works; whether it pays was not timed (--quick)")
    gains = []
    for depth in (12, 24):
        channels = 64 * depth
        with device:
            linear = Linear(channels, 4 * channels, torch.bfloat16)
            x = torch.randn(2**15, channels, dtype=torch.bfloat16, requires_grad=True)
            layers = [torch.compile(layer, dynamic=False) for layer in (linear, Fp8Linear(linear, torch.bfloat16))]
        bf16_sec, fp8_sec = (measure_sec(device, lambda layer=layer, x=x: layer(x)) for layer in layers)
        gains.append(f"{bf16_sec / fp8_sec:.2f}x the speed of bf16 at depth {depth}")
    return Finding("fp8", "ok", f"the MLP's first product: {', '.join(gains)}; --fp8 on pays if that is well above 1")


def measure_sec(device, call: Callable[[], object], num_calls: int = 10) -> float:
    """Seconds of a call; the first round warms up."""
    for _ in range(2):
        devices.synchronize(device)
        start = time.perf_counter()
        for _ in range(num_calls):
            call()
        devices.synchronize(device)
    return (time.perf_counter() - start) / num_calls


def check_device(device) -> Finding:
    import torch
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        names = tuple(map(module.get_device_name, range(module.device_count())))
        if len(set(names)) > 1:
            return Finding("device", "note", f"{devices.count_names(names)}: several ranks wait for the slowest GPU",
                           "name GPUs of one kind in CUDA_VISIBLE_DEVICES")
        return Finding("device", "ok", f"{len(names)} x {names[0]}")
    if device.type != "cpu":
        return Finding("device", "ok", device.type)
    what, driver = f"{devices.get_cpu_name()}, {common.count_cpus()} cores", devices.find_driver()
    if driver.names:
        return Finding("device", "ok", f"{what}; not used, as asked: {devices.count_names(driver.names)}")
    if devices.has_pci_gpu():
        return Finding("device", "note", f"{what}; an NVIDIA GPU is there, and no driver that lists it"
                       + (f" ({driver.problem})" if driver.problem else ""),
                       f"install NVIDIA's driver, or restart after an update of it; then {SET_UP}")
    return Finding("device", "ok", what)


def check_matmul(device, dtype, why: str) -> Finding:
    """The dtype that training would choose, and the rate of a large matrix product with it."""
    import torch
    peak_flops, source = devices.get_peak_flops(device, dtype)
    rate = peak_flops
    if device.type != "cpu":
        size = 4096
        matrix = torch.randn(size, size, device=device, dtype=dtype)
        rate = 2 * size**3 / measure_sec(device, lambda: torch.mm(matrix, matrix))
        why += f"; {source}, {peak_flops / 1e12:.0f} TFLOP/s" if peak_flops else f"; {source}"
    return Finding("matmul", "ok", f"{rate / 1e12:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}: {why}")


def check_memory(device) -> Finding:
    import torch
    ram_bytes = devices.get_ram_bytes()
    what = f"{ram_bytes / 2**30:.0f} GiB of RAM" if ram_bytes else "RAM unknown"
    lowest, advice = ram_bytes or LOW_MEMORY_BYTES, "choose a small --depth and --device-batch-size"
    if device.type in ("cuda", "xpu"):
        free_bytes, total_bytes = torch.get_device_module(device).mem_get_info(device)
        what += f", {free_bytes / 2**30:.0f} of {total_bytes / 2**30:.0f} GiB free on the GPU"
        lowest = min(lowest, free_bytes)
        if free_bytes < devices.FREE_GPU_FRAC * total_bytes:
            return Finding("memory", "note", f"{what}: another process uses it",
                           f"nvidia-smi shows which; CUDA_VISIBLE_DEVICES names another GPU, else {advice}")
    if lowest < LOW_MEMORY_BYTES:
        return Finding("memory", "note", f"{what}, which is little", advice)
    return Finding("memory", "ok", what)


def check_disk() -> Finding:
    """Whether the base folder can be written, and its disk has room."""
    if common is None:
        return Finding("disk", "note", "not checked, packages are missing", SET_UP)
    base_dir = common.get_base_dir()
    try:
        with tempfile.TemporaryFile(dir=base_dir) as file:
            file.write(b"x")
    except OSError as error:
        return Finding("disk", "FAIL", f"{base_dir} can't be written ({error.strerror})",
                       "set NANOCHAT_BASE_DIR to a folder that can")
    free_bytes = shutil.disk_usage(base_dir).free
    what = f"{free_bytes / 2**30:.1f} GiB free in {base_dir}"
    if free_bytes < LOW_DISK_BYTES:
        return Finding("disk", "FAIL" if free_bytes < NO_DISK_BYTES else "note", f"{what}, which is little",
                       "free some space, or set NANOCHAT_BASE_DIR to a larger disk")
    return Finding("disk", "ok", what)


def check_network() -> Finding:
    """Whether the hub answers; only downloads need it."""
    if common.get_mirror_dir():
        return Finding("network", "ok", f"not needed: the hub's files come from {common.get_mirror_dir()}")
    endpoint, _ = common.get_hub()
    answers = threading.Event()

    def connect() -> None:
        import requests
        with contextlib.suppress(requests.RequestException, ValueError):
            requests.head(endpoint, timeout=NETWORK_TIMEOUT_SEC)
            answers.set()
    # in a thread: the timeout of requests doesn't cover the look-up of the name
    threading.Thread(target=connect, daemon=True).start()
    host = urllib.parse.urlsplit(endpoint).netloc or endpoint
    if answers.wait(NETWORK_TIMEOUT_SEC):
        return Finding("network", "ok", f"{host} answers")
    return Finding("network", "note", f"{host} doesn't answer within {NETWORK_TIMEOUT_SEC:.0f} s",
                   "not needed for --source python-docs and your own files; for downloads see HF_ENDPOINT")


def check_saved(kind: str, pattern: str, describe: Callable[[str], str], advice: str) -> Finding:
    """Everything of a kind in the base folder: described by its name, or damaged."""
    found, damaged = [], []
    for path in sorted((common.get_base_dir() / kind).glob(pattern)):
        name = path.parent.name
        try:
            found.append(f"{name} ({describe(name)})")
        except common.UserError as error:
            damaged.append(f"{name}: {error}")
    if not found:
        return Finding(kind, "FAIL", "; ".join(damaged) or "none yet", advice)
    return Finding(kind, "note" if damaged else "ok", "; ".join(found + damaged))


if __name__ == "__main__":
    try:
        sys.exit(0 if main()["ready"] else 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:    # the reader of our output has ended, as in `... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # for what is still to be flushed
        sys.exit(128 + signal.SIGPIPE)
