"""What a checkpoint costs the training: how long a save stops it, slows the steps after it, and how long a load takes.

    python -m dev.bench_checkpoint                          depths 4, 6 and 12, compiled; some GB and minutes
    python -m dev.bench_checkpoint --depth 4 --compile off --json table.json

Everything is measured in one process beside its own ordinary steps, twice: the first save allocates its copy in host
memory, later ones use it again. Loads come from the page cache, as they do right after a save; the checksums are read
and compared all the same.
"""

import argparse
import gc
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from dev.timing import print_table, read_cpu_seconds
from nanochat.checkpoint_manager import Checkpointer, SaveRules, build_model, restore
from nanochat.common import get_base_dir, get_compute_dtype, init_compute, run_script, synchronize
from nanochat.compilation import set_compile_kernels
from nanochat.flash_attention import choose_backend
from nanochat.gpt import GPTConfig
from nanochat.scaling import make_config
from nanochat.train import Batch, train_step


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 6, 12])
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--max-seq-len", type=int, default=512, help="context in tokens")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--steps", type=int, default=4, help="ordinary steps that are timed; their median counts")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", choices=("on", "off"), default="on")
    parser.add_argument("--device-type", default="")
    parser.add_argument("--json", help="write the table here, too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device, _ = init_compute(args.device_type)
    dtype, why = get_compute_dtype(args.dtype, device)
    backend, _ = choose_backend(device, dtype)
    print(f"{device.type}, {dtype} ({why}), attention {backend}, compile {args.compile}, {args.rows} rows of "
          f"{args.max_seq_len} tokens a step", flush=True)
    set_compile_kernels(args.compile == "on")
    rows = []
    for depth in args.depth:
        run_dir = Path(tempfile.mkdtemp(prefix="bench_checkpoint-", dir=get_base_dir()))
        try:
            rows += measure_depth(args, depth, run_dir, device, dtype)
        finally:
            shutil.rmtree(run_dir)
            gc.collect()
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    print("saving step: the save's stop and the step after it; x step: that in ordinary steps; whole cost: all that "
          "the save added until it was on disk, in ordinary steps; others: cores that other processes used meanwhile")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2) + "\n")
    return {"rows": rows}


def measure_depth(args: argparse.Namespace, depth: int, run_dir: Path, device: torch.device,
                  dtype: torch.dtype) -> list[dict]:
    """The table's rows of one depth: the first save and a later one."""
    config = make_config(depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len)
    torch.manual_seed(0)
    model = build_model(config, dtype, device)
    model.init_weights()
    optimizer = model.setup_optimizer()
    if args.compile == "on":
        model.compile_blocks()
    tokens = torch.randint(config.vocab_size, (args.rows, config.sequence_len + 1), device=device)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)

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
    """Save while the training goes on: what the save costs it, and when it is done."""
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
    """Seconds from nothing to a model and optimizer that can go on."""
    start = time.perf_counter()
    model = build_model(config, dtype, device)
    restore(run_dir, 2, model, model.setup_optimizer())
    synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    run_script(main)
