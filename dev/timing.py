"""Timing for the benchmarks here: variants take turns in one process, and rounds beside other load are thrown away."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from nanochat.common import synchronize

BUSY_CORES = 0.15  # cores that other processes may use during a measurement; one busy neighbour doubles medians


def read_cpu_seconds() -> tuple[float, float] | None:
    """CPU seconds of the whole machine and of this process so far; None where the system doesn't say."""
    if not Path("/proc/stat").exists():
        return None
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(fields[:3]) + sum(fields[5:8])  # user, nice, system, interrupts, stolen; not idle, not waiting for disks
    times = os.times()
    return busy / os.sysconf("SC_CLK_TCK"), times.user + times.system


def time_in_turn(variants: dict[str, Callable[[], object]], device: torch.device, *, rounds: int = 15,
                 warmup: int = 2) -> dict[str, float]:
    """Median milliseconds of each variant; all take one turn a round, and a round beside other load doesn't count.

    At most half of the rounds are thrown away; then it says so, and the rest count as they are.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    num_thrown = 0
    for round_idx in range(warmup + rounds):
        before, start = read_cpu_seconds(), time.perf_counter()
        turn = {}
        for name, run in variants.items():
            synchronize(device)
            turn_start = time.perf_counter()
            run()
            synchronize(device)
            turn[name] = (time.perf_counter() - turn_start) * 1e3
        after, seconds = read_cpu_seconds(), time.perf_counter() - start
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
    return {name: median(values) for name, values in samples.items()}


def print_table(columns: list[str], rows: list[list[object]]) -> None:
    """An aligned table, numbers on the right; without columns, a table that has no head."""
    lines = [list(columns), *rows] if columns else rows
    cells = [[f"{v:,.2f}" if isinstance(v, float) else str(v) for v in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line, values in zip(cells, lines, strict=True):
        print("  ".join(cell.ljust(width) if isinstance(value, str) else cell.rjust(width)
                        for cell, width, value in zip(line, widths, values, strict=True)).rstrip())


def print_rows(rows: list[dict]) -> None:
    """A table of rows that have the same keys."""
    print_table(list(rows[0]), [list(row.values()) for row in rows])
