"""The parts of a training step, each against the obvious version, as ratios measured in one run.

    python -m dev.bench_kernels                       attention, loss and optimizer at depth 6's sizes
    python -m dev.bench_kernels --only loss --vocab-size 32768
"""

import argparse
import subprocess
import sys

import torch

from dev.timing import print_table, time_in_turn
from nanochat import flash_attention
from nanochat.checkpoint_manager import build_model
from nanochat.common import run_script
from nanochat.compilation import set_compile_kernels
from nanochat.cross_entropy import LOSSES, linear_cross_entropy, plain_cross_entropy
from nanochat.devices import get_compute_dtype, get_peak_memory_bytes, init_compute
from nanochat.optim import POLAR_EXPRESS, orthogonalize
from nanochat.scaling import make_config


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(BENCHMARKS))
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--max-seq-len", type=int, default=512, help="context in tokens")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device-type", default="")
    parser.add_argument("--memory-of", choices=LOSSES, help=argparse.SUPPRESS)  # in its own process
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device, _ = init_compute(args.device_type)
    dtype, _ = get_compute_dtype(args.dtype, device)
    set_compile_kernels(True)
    if args.memory_of:
        return measure_step_memory(args, device, dtype)
    print(f"{device.type}, {dtype}, depth {args.depth}, {args.rows} rows of {args.max_seq_len}, "
          f"vocabulary {args.vocab_size}")
    results = {}
    for name, benchmark in BENCHMARKS.items():
        if args.only in (None, name):
            print(f"\n{name}")
            results[name] = benchmark(args, device, dtype)
            base = next(iter(results[name].values()))
            print_table(["variant", "ms", "speed"], [[key, ms, base / ms] for key, ms in results[name].items()])
    if device.type == "cpu" and args.only in (None, "loss"):
        results["memory"] = compare_memory(sys.argv[1:] if argv is None else argv)
    return results


def bench_attention(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Forward and backward of one layer: torch's own, the chosen backend, and its window against the whole past."""
    config = make_config(args.depth, vocab_size=512, sequence_len=args.max_seq_len)
    shape = (args.rows, args.max_seq_len, config.n_head, config.head_dim)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    grad = torch.randn(shape, device=device).to(dtype)
    backend, _ = flash_attention.choose_backend(device, dtype, config)
    window = config.window(0) if config.n_layer > 1 else -1

    def run(call, window: int):
        compiled = call if backend == "flex" and call is not flash_attention._sdpa else \
            torch.compile(call, dynamic=False)
        return lambda: torch.autograd.grad(compiled(q, k, v, window), (q, k, v), grad)
    chosen = flash_attention._TRAIN_CALLS[backend]
    return time_in_turn({"sdpa, whole past": run(flash_attention._sdpa, -1),
                         f"sdpa, window {window}": run(flash_attention._sdpa, window),
                         f"{backend}, whole past": run(chosen, -1),
                         f"{backend}, window {window}": run(chosen, window)}, device)


def bench_loss(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Head and loss, forward and backward."""
    config = make_config(args.depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len)
    x = torch.randn(args.rows, args.max_seq_len, config.n_embd, device=device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(args.vocab_size, config.n_embd, device=device)).requires_grad_()
    targets = torch.randint(args.vocab_size, (args.rows, args.max_seq_len), device=device)

    def run(loss):
        return lambda: torch.autograd.grad(loss(x, weight, targets, args.vocab_size), (x, weight))
    return time_in_turn({"plain, eager": run(plain_cross_entropy.__wrapped__), "plain": run(plain_cross_entropy),
                         "fused": run(linear_cross_entropy)}, device)


def bench_optimizer(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """One step of all parameters, eager and compiled; Muon's orthogonalisation alone, matrix by matrix and stacked."""
    model = build_model(make_config(args.depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len), dtype,
                        device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    for param in model.parameters():
        param.grad = 1e-3 * torch.randn_like(param)

    def step(compiled: bool):
        def run() -> None:
            set_compile_kernels(compiled)
            optimizer.step()
        return run
    stacks = [torch.randn(len(g["params"]), *g["params"][0].shape, device=device).to(optimizer.matmul_dtype or dtype)
              for g in optimizer.param_groups if g["kind"] == "muon"]
    ms = time_in_turn({"step, eager": step(False), "step, compiled": step(True),
                       "orthogonalize, one by one": lambda: [orthogonalize(m[None], len(POLAR_EXPRESS))
                                                             for stack in stacks for m in stack],
                       "orthogonalize, stacked": lambda: [orthogonalize(s, len(POLAR_EXPRESS)) for s in stacks]},
                      device)
    set_compile_kernels(True)
    return ms


def compare_memory(argv: list[str]) -> dict[str, float]:
    """Peak resident MiB of a process that trains, for each loss, compiled: each in a process of its own."""
    peaks = {}
    for loss in LOSSES:
        done = subprocess.run([sys.executable, "-m", "dev.bench_kernels", *argv, "--memory-of", loss],
                              capture_output=True, encoding="utf-8", check=True)
        peaks[loss] = float(done.stdout.split()[-1])
    print("\npeak resident memory of a process that trains")
    print_table(["loss", "MiB", "part"], [[loss, mib, mib / peaks["plain"]] for loss, mib in peaks.items()])
    return peaks


def measure_step_memory(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict:
    """Print the peak resident MiB of whole steps, optimizer included, with one of the losses."""
    model = build_model(make_config(args.depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len), dtype,
                        device)
    model.init_weights()
    model.loss = args.memory_of
    optimizer = model.setup_optimizer()
    flash_attention.choose_backend(device, dtype, model.config)
    model.compile_blocks()
    idx = torch.randint(args.vocab_size, (args.rows, args.max_seq_len))
    for _ in range(3):
        model(idx, idx).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    print(get_peak_memory_bytes(device) / 2**20)
    return {}


BENCHMARKS = {"attention": bench_attention, "loss": bench_loss, "optimizer": bench_optimizer}

if __name__ == "__main__":
    run_script(main)
