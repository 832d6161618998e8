"""Run a command of this code base on a simulated GPU that computes nothing, on a machine without one.

torch's own CUDA build runs on it: it allocates, copies, captures graphs, compiles kernels with Triton and ptxas, and
launches them, but no kernel does anything, and nothing is sent between ranks. So it shows which paths of a GPU end in
an error, which kernels can't be compiled for it, most of what a capture would refuse, and how much memory torch
allocates at the peak. It doesn't show what is computed, how fast, or a deadlock: results are whatever the memory holds,
so probes of wrong results pass, and sampled tokens are letters by chance. What such a run saves is garbage.

    python3 -m venv ~/cuda
    ~/cuda/bin/pip install torch==2.11.0 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
    ~/cuda/bin/pip install -r <(grep -v -E "^(torch|nvidia|triton)" requirements.lock)
    ~/cuda/bin/python -m dev.null_gpu -- -m scripts.base_train --depth 12 --model-tag null --save-every never ...
    ~/cuda/bin/python -m dev.null_gpu --gpus 2 -- -m torch.distributed.run --nproc-per-node 2 -m scripts.base_train \\
        -- --depth 12 --model-tag null --save-every never ...

Needs Linux, g++ and CUDA 13's headers, as above; written for torch 2.11. NULL_GPU_VERBOSE=1 tells of graphs and of
messages between ranks.
"""

import argparse
import importlib.machinery
import os
import random
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

from nanochat.command_line import Parser, run_script
from nanochat.common import NVIDIA_DIR, UserError, get_base_dir

SOURCE = Path(__file__).with_name("null_gpu.cpp")
LIBRARY = "libcuda.so.1"    # by which name others look for the driver
CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
LETTERS = range(33, 120)    # ids of tokens that are one character, in every tokenizer of ours


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog="What Python is to run goes after --.")
    add = parser.add_argument
    add("--gpus", type=int, choices=range(1, 17), default=1, metavar="N", help="GPUs of this machine (default: 1)")
    add("--gib", type=int, choices=range(1, 1025), default=80, metavar="N", help="memory of each (default: 80)")
    add("--capability", type=int, choices=CAPABILITIES, default=90,
        help="times ten: 90 is an H100 (the default), 80 an A100, 86 a 3090, 120 a 5090")
    argv = sys.argv[1:] if argv is None else argv
    own, command = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    if not command and not {"-h", "--help"} & set(own):
        raise UserError("what Python is to run goes after --, as in python -m dev.null_gpu -- -m scripts.doctor")
    return argparse.Namespace(**vars(parser.parse_args(own)), command=command)


def build(folder: Path) -> None:
    """Compile the libraries into one file of a folder."""
    if not sys.platform.startswith("linux"):
        raise UserError("the simulated GPU takes the place of Linux libraries; run it there")
    if NVIDIA_DIR.exists():
        raise UserError("this machine has an NVIDIA driver, which the simulated GPU would mix with; use the real GPU")
    found = [path / "nvidia" / "cu13" / "include" for path in map(Path, sys.path)]
    include = next((path for path in found if (path / "crt").is_dir() and (path / "cccl").is_dir()), None)
    if include is None:
        raise UserError("this Python has no headers of CUDA 13: pip install torch==2.11.0 nvidia-cuda-crt==13.0.88 "
                        "nvidia-cuda-cccl==13.0.85")
    if not shutil.which("g++"):
        raise UserError("the simulated GPU is compiled by g++, which isn't there; install it")
    made = folder / f"{LIBRARY}.{os.getpid()}"
    done = subprocess.run([
        "g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{include}", f"-I{include / 'cccl'}", str(SOURCE),
        "-o", str(made), f"-Wl,-soname,{LIBRARY}", "-ldl"])
    if done.returncode:
        raise UserError(f"g++ can't compile {SOURCE.name}; it is written for the headers of CUDA 13.0")
    made.replace(folder / LIBRARY)


def make_environment(folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """The variables of a process on the simulated GPU, whose libraries and caches of kernels are in a folder."""
    (folder / "sitecustomize.py").write_text("from dev import null_gpu\nnull_gpu.replace_results()\n", encoding="utf-8")
    own = os.environ
    return own | {
        # By a bare name, since a path may hold blanks
        "LD_PRELOAD": LIBRARY, "LD_LIBRARY_PATH": join_paths(folder, own.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": join_paths(folder, SOURCE.parent.parent, own.get("PYTHONPATH")),
        "TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder / "triton"),    # tuned by no real time
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        "PYTORCH_ALLOC_CONF": own.get("PYTORCH_ALLOC_CONF", "expandable_segments:True"),    # as where a driver is
        "NULL_GPU_COUNT": str(args.gpus), "NULL_GPU_GIB": str(args.gib), "NULL_GPU_CAPABILITY": str(args.capability)}


def join_paths(*paths: str | Path | None) -> str:
    return os.pathsep.join(str(path) for path in paths if path)


def main(argv: list[str] | None = None) -> None:
    """Become the command, so that its signals and exit code are its own."""
    args = parse_args(argv)
    folder = get_base_dir() / "null_gpu"
    folder.mkdir(parents=True, exist_ok=True)
    build(folder)
    environment = make_environment(folder, args)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *args.command], environment)


class Finder:
    """Finds modules as Python does, and changes some of them when they are loaded."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in CHANGES else None
        if spec is not None:
            load = spec.loader.exec_module

            def load_and_change(module: types.ModuleType) -> None:
                load(module)
                CHANGES[name](module)
            spec.loader.exec_module = load_and_change
        return spec


def replace_results() -> None:
    """In this process and its children, let what depends on results go on."""
    sys.meta_path.insert(0, Finder)


def accept_attention(module: types.ModuleType) -> None:
    probe_backend = module.probe_backend

    def probe(*args):
        works, reason = probe_backend(*args)
        return (True, "its results don't count here") if works is False and "is off by" in reason else (works, reason)
    module.probe_backend = probe


def accept_fp8(module: types.ModuleType) -> None:
    find_obstacle = module.find_obstacle
    module.find_obstacle = lambda device: find_obstacle(device).replace("its products are wrong", "")


def accept_grouped_products(module: types.ModuleType) -> None:
    """Those of bf16, which is what torch has on GPUs; the probe compares with batches as long as a kernel says."""
    probe_grouped = module.probe_grouped
    module.probe_grouped = lambda device_type, dtype: (
        "" if (device_type, str(dtype)) == ("cuda", "torch.bfloat16") else probe_grouped(device_type, dtype))


def sample_letters(module: types.ModuleType) -> None:
    sample_rows = module.sample_rows

    def sample(*args):
        tokens = sample_rows(*args)
        letters = [random.choice(LETTERS) for _ in range(len(tokens))]
        return tokens.new_tensor(letters)
    module.sample_rows = sample


def keep_logprobs(module: types.ModuleType) -> None:
    """RL divides by the number of a probe's tokens, which a kernel finds."""
    compute_logprobs = module.compute_logprobs

    def compute(*args):
        logprobs = compute_logprobs(*args)
        return logprobs if len(logprobs) else logprobs.new_zeros(1)
    module.compute_logprobs = compute


CHANGES: dict[str, Callable[[types.ModuleType], None]] = {
    "nanochat.flash_attention": accept_attention, "nanochat.fp8": accept_fp8, "nanochat.moe": accept_grouped_products,
    "nanochat.sampling": sample_letters, "nanochat.rl": keep_logprobs}


if __name__ == "__main__":
    run_script(main)
