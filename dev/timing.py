"""Shared by the benchmarks: variants timed in turn, tables, flags of the device, and models of random weights."""

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from nanochat.command_line import add_compute_flags, json_file
from nanochat.common import write_json
from nanochat.compilation import set_compile_kernels
from nanochat.devices import get_compute_dtype, init_compute, synchronize
from nanochat.flash_attention import choose_backend
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.train import Batch

FLUSH_BYTES = 2**28    # more than the L2 cache of any GPU
BUSY_CORES = 0.15  # cores that other processes may use during a measurement; one busy neighbour doubles medians

# ---------------------------------------------------------------------------------------------------------------------
# The device and the model


def add_step_args(parser: argparse.ArgumentParser) -> None:
    """The flags that make_training and choose_device read, of the benchmarks of whole steps."""
    parser.add_argument("--max-seq-len", type=int, default=512, help="context in tokens")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--compile", choices=("on", "off"), default="on")
    parser.add_argument("--json", type=json_file, help="file for the table, too")
    add_compute_flags(parser)


def choose_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype and attention backend, as a training run would choose them."""
    device, _ = init_compute(args.device_type)
    dtype, why = get_compute_dtype(args.dtype, device)
    backend, _ = choose_backend(device, dtype, GPTConfig())
    print(f"{device.type}, {dtype} ({why}), attention {backend}", flush=True)
    return device, dtype, backend


def make_random_model(config: GPTConfig, dtype: torch.dtype, device: torch.device) -> GPT:
    """A seeded model; its projections aren't zero as in training's first step, where most products would be trivial."""
    torch.manual_seed(0)
    with device:
        model = GPT(config, dtype)
    model.init_weights()
    for param in model.transformer.h.parameters():
        if not param.any():
            torch.nn.init.normal_(param, std=0.02)
    return model


def make_random_batch(config: GPTConfig, num_rows: int, device: torch.device) -> Batch:
    """Rows of random tokens."""
    tokens = torch.randint(config.vocab_size, (num_rows, config.sequence_len + 1), device=device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def make_training(config: GPTConfig, args: argparse.Namespace, device: torch.device,
                  dtype: torch.dtype) -> tuple[GPT, MuonAdamW, Batch]:
    """A random model, its optimizer, and a step's batch; compiled as --compile says."""
    set_compile_kernels(args.compile == "on")
    model = make_random_model(config, dtype, device)
    optimizer = model.setup_optimizer()
    if args.compile == "on":
        model.compile_blocks()
    return model, optimizer, make_random_batch(config, args.rows, device)


# ---------------------------------------------------------------------------------------------------------------------
# Time


def read_cpu_seconds() -> tuple[float, float] | None:
    """CPU seconds of the whole machine and of this process so far; None where the system has no /proc/stat."""
    if not Path("/proc/stat").exists():
        return None
    fields = [int(word) for word in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]]
    busy = sum(fields[:3]) + sum(fields[5:8])  # user, nice, system, interrupts, stolen; not idle, not waiting for disks
    times = os.times()
    return busy / os.sysconf("SC_CLK_TCK"), times.user + times.system


def time_in_turn(variants: dict[str, Callable[[], object]], device: torch.device, *, rounds: int = 15,
                 warmup: int = 2) -> dict[str, float]:
    """Median milliseconds of each variant, see sample_in_turn."""
    return {name: median(samples) for name, samples in
            sample_in_turn(variants, device, rounds=rounds, warmup=warmup).items()}


def sample_in_turn(variants: dict[str, Callable[[], object]], device: torch.device, *, rounds: int = 15,
                   warmup: int = 2) -> dict[str, list[float]]:
    """Milliseconds of each variant in each round, in which all take one turn; each is the first in turn, whose caches
    are cold.

    Rounds in which other processes used the cores are thrown away, at most half of them; beyond that, a warning.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    num_thrown, order = 0, list(variants)
    for round_idx in range(warmup + rounds):
        before, start = read_cpu_seconds(), time.perf_counter()
        turn = {}
        for name in order:
            synchronize(device)
            turn_start = time.perf_counter()
            variants[name]()
            synchronize(device)
            turn[name] = (time.perf_counter() - turn_start) * 1e3
        after, seconds, order = read_cpu_seconds(), time.perf_counter() - start, order[1:] + order[:1]
        if round_idx < warmup:
            continue
        if before and after:
            others = ((after[0] - before[0]) - (after[1] - before[1])) / max(seconds, 0.05)
            if others > BUSY_CORES and num_thrown < rounds // 2:
                num_thrown += 1
                continue
        for name, ms in turn.items():
            samples[name].append(ms)
    if num_thrown and num_thrown == rounds // 2:
        print("warning: other processes used this machine's cores; run again when it is idle")
    return samples


def sample_on_cuda(run: Callable[[], object], device: torch.device, *, warmup_ms: float = 25,
                   measure_ms: float = 100) -> list[float]:
    """Milliseconds of a call by CUDA events, by the rules of triton.testing.do_bench: FLUSH_BYTES are written before
    each call, so that it finds none of its data in the L2 cache, as in a training step."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def record(num_calls: int) -> list[float]:
        events = []
        for _ in range(num_calls):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        synchronize(device)
        return [start.elapsed_time(end) for start, end in events]
    run()    # compiles
    estimate_ms = max(median(record(3)), 1e-3)
    for _ in range(math.ceil(warmup_ms / estimate_ms)):
        run()
    return record(max(5, math.ceil(measure_ms / estimate_ms)))


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def print_table(columns: list[str], rows: list[list[object]]) -> None:
    """An aligned table, numbers on the right; without columns, a table that has no head."""
    lines = [list(columns), *rows] if columns else rows
    cells = [[f"{v:,.2f}" if isinstance(v, float) else str(v) for v in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line, values in zip(cells, lines, strict=True):
        print("  ".join(cell.ljust(width) if isinstance(value, str) else cell.rjust(width)
                        for cell, width, value in zip(line, widths, values, strict=True)).rstrip())


def print_rows(rows: list[dict], json_path: Path | None = None) -> None:
    """A table of rows that have the same keys, also as a JSON file."""
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    if json_path:
        write_json(json_path, rows)
