"""Run a command of this code base on a GPU that computes nothing, on a machine without one.

torch's own CUDA build runs on it: it allocates, copies, sends, captures graphs, compiles kernels with Triton and ptxas,
and launches them, but no kernel does anything. So it shows which paths of a GPU end in an error, which kernels can't be
compiled for it, what a capture would refuse, and how much memory torch allocates at the peak; not what is computed:
results are whatever the memory holds, probes of backends pass, and sampled tokens are letters by chance.

    python3 -m venv cuda && cuda/bin/pip install torch==2.11.0 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
    cuda/bin/pip install -r <(grep -v -E "^(torch|nvidia|triton)" requirements.lock)
    cuda/bin/python -m dev.null_gpu -- -m scripts.base_train --depth 12 --num-iterations 4 ...
    cuda/bin/python -m dev.null_gpu --gpus 2 -- -m torch.distributed.run --nproc-per-node 2 -m scripts.base_train -- ...

Needs Linux, g++ and CUDA 13's headers, as above. NULL_GPU_VERBOSE=1 tells of messages between ranks and of graphs.
"""

import argparse
import importlib.machinery
import os
import random
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

from nanochat.command_line import Parser, run_script
from nanochat.common import UserError

SOURCE = Path(__file__).with_name("null_gpu.cpp")
LETTERS = range(33, 120)    # ids of tokens that are one character, in every tokenizer of ours


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--gpus", type=int, default=1, help="GPUs of this machine")
    add("--gib", type=int, default=80, help="memory of each")
    add("--capability", type=int, default=90, help="times ten: 90 is an H100, 80 an A100, 86 a 3090, 120 a 5090")
    argv = sys.argv[1:] if argv is None else argv
    own, command = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    if not command:
        raise UserError("what Python is to run goes after --, as in python -m dev.null_gpu -- -m scripts.doctor")
    return argparse.Namespace(**vars(args), command=command)


def build(folder: Path) -> Path:
    """Compile the libraries into a folder; returns the file, which is libcuda and what is loaded before the others."""
    found = [path / "nvidia" / "cu13" / "include" for path in map(Path, sys.path)]
    include = next((path for path in found if (path / "crt").is_dir() and (path / "cccl").is_dir()), None)
    if include is None:
        raise UserError("this Python has no headers of CUDA 13: pip install torch==2.11.0 nvidia-cuda-crt==13.0.88 "
                        "nvidia-cuda-cccl==13.0.85")
    library = folder / "libcuda.so.1"
    subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", f"-I{include}", f"-I{include / 'cccl'}",
                    str(SOURCE), "-o", str(library), f"-Wl,-soname,{library.name}", "-ldl"], check=True)
    return library


def main(argv: list[str] | None = None) -> int:
    """Run the command in a process of its own, since libraries are found when a process begins; its exit code."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        Path(folder, "sitecustomize.py").write_text("from dev import null_gpu\nnull_gpu.replace_results()\n",
                                                    encoding="utf-8")
        paths = [folder, str(SOURCE.parent.parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "LD_PRELOAD": str(library), "LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)), "NULL_GPU_COUNT": str(args.gpus),
            "NULL_GPU_GIB": str(args.gib), "NULL_GPU_CAPABILITY": str(args.capability)}
        return subprocess.run([sys.executable, *args.command], env=environment).returncode


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
    module.PROBE_TOLERANCE = float("inf")


def accept_fp8(module: types.ModuleType) -> None:
    module.find_obstacle = lambda device: ""


def accept_grouped_products(module: types.ModuleType) -> None:
    module.probe_grouped = lambda device_type, dtype: ""


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
    run_script(lambda argv: sys.exit(main(argv)))
