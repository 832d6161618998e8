"""The cost of a checkpoint to the training: the pause for a save, the slower steps beside it, and the time of a load.

    python -m dev.bench_checkpoint                          depths 4, 6 and 12, compiled; some GB and minutes
    python -m dev.bench_checkpoint --depth 4 --compile off --json table.json

Saves are measured twice, beside ordinary steps of the same process: the first save allocates its copy in host memory,
later ones use it again. Loads come from the page cache, as they do right after a save, checksums included.
"""

import argparse
import gc
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from dev.timing import add_step_args, choose_device, make_training, print_rows, read_cpu_seconds
from nanochat.checkpoint_manager import Checkpointer, SaveRules, build_model, restore
from nanochat.command_line import Parser, run_script
from nanochat.common import get_base_dir
from nanochat.devices import synchronize
from nanochat.gpt import GPTConfig
from nanochat.scaling import check_counts, make_config
from nanochat.train import train_step


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 6, 12])
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=4, help="ordinary steps that are timed; their median counts")
    add_step_args(parser)
    args = parser.parse_args(argv)
    check_counts(rows=args.rows, steps=args.steps)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device, dtype, _ = choose_device(args)
    rows = []
    for depth in args.depth:
        run_dir = Path(tempfile.mkdtemp(prefix="bench_checkpoint-", dir=get_base_dir()))
        try:
            rows += measure_depth(args, depth, run_dir, device, dtype)
        finally:
            shutil.rmtree(run_dir)
            gc.collect()
    print_rows(rows, args.json)
    print("stop: the pause for the save; saving step: the pause and the step after it; x step: that in ordinary steps; "
          "whole cost: all added time until the save was on disk, in ordinary steps; others: cores in use by other "
          "processes")
    return {"rows": rows}


def measure_depth(args: argparse.Namespace, depth: int, run_dir: Path, device: torch.device,
                  dtype: torch.dtype) -> list[dict]:
    """The table's rows of one depth: the first save and a later one."""
    config = make_config(depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len)
    model, optimizer, batch = make_training(config, args, device, dtype)

    def time_step() -> float:
        start = time.perf_counter()
        train_step(model, optimizer, batch, args.rows)
        synchronize(device)
        return time.perf_counter() - start
    for _ in range(2):  # compiles; makes the optimizer's state
        time_step()
    saves = []
    before, start = read_cpu_seconds(), time.perf_counter()
    with Checkpointer(run_dir, SaveRules(keep_last=1)) as saver:
        for step in (1, 2):
            step_sec = median(time_step() for _ in range(args.steps))
            saves.append({"depth": depth, "save": "first" if step == 1 else "later", "step ms": 1e3 * step_sec,
                          **time_save(saver, step, model, optimizer, time_step, step_sec)})
    after, seconds = read_cpu_seconds(), time.perf_counter() - start
    others = ((after[0] - before[0]) - (after[1] - before[1])) / seconds if before and after else "unknown"
    folder = run_dir / "step_000002"
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    load_sec = time_load(config, run_dir, device, dtype)
    return [save | {"MB": num_bytes / 1e6, "load s": load_sec, "others": others} for save in saves]


def time_save(saver: Checkpointer, step: int, model, optimizer, time_step: Callable[[], float],
              step_sec: float) -> dict[str, float]:
    """The cost of a save beside the training, and its duration."""
    ends = []
    start = time.perf_counter()
    saver.save(step, model, optimizer, {"optimizer_steps": optimizer.num_steps})
    stop_sec = time.perf_counter() - start
    thread = saver.thread
    watcher = threading.Thread(target=lambda: (thread.join(), ends.append(time.perf_counter())))
    watcher.start()
    steps_sec = [time_step()]
    while thread.is_alive():
        steps_sec.append(time_step())
    saver.wait()
    watcher.join()
    saving_step_sec = stop_sec + steps_sec[0]
    cost_sec = stop_sec + sum(steps_sec) - len(steps_sec) * step_sec
    return {"stop ms": 1e3 * stop_sec, "saving step ms": 1e3 * saving_step_sec, "x step": saving_step_sec / step_sec,
            "whole cost": cost_sec / step_sec, "steps beside": len(steps_sec), "on disk s": ends[0] - start}


def time_load(config: GPTConfig, run_dir: Path, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds until a new model and optimizer are restored."""
    start = time.perf_counter()
    model = build_model(config, dtype, device)
    restore(run_dir, 2, model, model.setup_optimizer())
    synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    run_script(main)
