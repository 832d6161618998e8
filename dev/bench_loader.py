"""The speed of the data: from text to batches, and the tokens that packing drops.

    python -m dev.bench_loader --data python-docs
    python -m dev.bench_loader --data path/to/folder --tables-dir path/to/tables

Rates count input tokens, on one core (best of --repeats); the plain packer of the comparison is timed in the same run,
since machines differ. Nothing else should be running.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dev.timing import print_rows
from nanochat.command_line import Parser, run_script
from nanochat.common import Ranks, UserError, count_cpus
from nanochat.dataloader import RowOrder, TextGroups, TrainLoader
from nanochat.packing import PackStats, cut_documents, pack_documents, place_best_fit
from nanochat.scaling import check_counts
from nanochat.shards import ShardList, load_shards, read_group
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

MIN_LOADER_TOKENS = 24e6   # more than the first groups of all lanes, which are prepared before the first step


def find_shards(name_or_folder: str) -> ShardList:
    """A dataset by name, or any folder of parquet files with a column `text`, the last of which is left out."""
    paths = sorted(Path(name_or_folder).glob("*.parquet"))
    if not paths or (Path(name_or_folder) / "manifest.json").is_file():
        return load_shards(name_or_folder)
    if len(paths) < 2:
        raise UserError(f"{name_or_folder} holds one parquet file only; at least two are needed")
    return ShardList(Path(name_or_folder).name, tuple(paths[:-1]), paths[-1], hash="")


def pack_plainly(docs: list[list[int]], row_tokens: int) -> np.ndarray:
    """Best fit by a scan of a buffer of 1,000 documents for every pick; the shortest is cropped, its rest lost."""
    waiting, rest, rows = docs[:1000], iter(docs[1000:]), []
    while waiting:
        row = []
        while len(row) < row_tokens and waiting:
            gap = row_tokens - len(row)
            fitting = [i for i, doc in enumerate(waiting) if len(doc) <= gap]
            chosen = max(fitting, key=lambda i: len(waiting[i])) if fitting else \
                min(range(len(waiting)), key=lambda i: len(waiting[i]))
            row += waiting.pop(chosen)[:gap]
            waiting += [doc for doc in [next(rest, None)] if doc]
        if len(row) == row_tokens:
            rows.append(row)
    return np.array(rows, np.int32)


def best_seconds(work: Callable[[], object], repeats: int) -> float:
    """The shortest of several timings, as the least disturbed one."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure_packing(groups: list[list[list[int]]], T: int, repeats: int) -> dict:
    """Rates and losses of packing these groups into rows of T+1."""
    num_tokens = sum(len(doc) for docs in groups for doc in docs)
    stats = [pack_documents(docs, T + 1)[1] for docs in groups]
    whole = best_seconds(lambda: [pack_documents(docs, T + 1) for docs in groups], repeats)
    lengths = [np.array([len(doc) for doc in docs]) for docs in groups]
    placing = best_seconds(lambda: [place_best_fit(cut_documents(sizes, T + 1)[1], T + 1) for sizes in lengths],
                           repeats)
    stream = best_seconds(lambda: [pack_documents(docs, T + 1, packing="stream") for docs in groups], repeats)
    sample = [doc for docs in groups[:3] for doc in docs]       # enough to keep its buffer full most of the time
    plain = best_seconds(lambda: pack_plainly(sample, T + 1), 1) / sum(map(len, sample)) * num_tokens
    tenth = max(1, len(stats) // 10)
    crops = [sum(part, PackStats()).fractions()["crop_frac"] for part in (stats[:tenth], stats[-tenth:])]
    return {"T": T, "pack_tokens_per_sec": num_tokens / whole, "placing_tokens_per_sec": num_tokens / placing,
            "stream_tokens_per_sec": num_tokens / stream, "times_plain": plain / whole,
            "crop_first_tenth_frac": crops[0], "crop_last_tenth_frac": crops[1],
            **sum(stats, PackStats()).fractions()}


def measure_loader(shards: ShardList, tokenizer, T: int, num_threads: int, step_ms: float) -> dict:
    """The loader end to end: its rate, then the wait for each step beside a training of `step_ms` a step."""
    rows_per_step, num_steps = 32, 100
    start = time.perf_counter()
    groups, order = TextGroups(shards, tokenizer, T), RowOrder(rows_per_step, seed=0)
    with TrainLoader(groups, order, Ranks(), num_threads=num_threads) as loader:
        loader.next_step()
        first_ms = 1e3 * (time.perf_counter() - start)
        num_fast_steps = int(MIN_LOADER_TOKENS / rows_per_step / T)
        for _ in range(num_fast_steps):
            loader.next_step()
        tokens_per_sec = (1 + num_fast_steps) * rows_per_step * T / (time.perf_counter() - start)
        waits_ms = []
        for _ in range(num_steps):
            time.sleep(step_ms / 1e3)
            start = time.perf_counter()
            loader.next_step()
            waits_ms.append(1e3 * (time.perf_counter() - start))
    return {"T": T, "first_step_ms": first_ms, "loader_tokens_per_sec": tokens_per_sec,
            "wait_median_ms": float(np.median(waits_ms)), "wait_max_ms": max(waits_ms)}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", default="python-docs", help="a dataset's name, or a folder of parquet files")
    parser.add_argument("--tables-dir", help="folder with cl100k_base.tiktoken; without it the trained tokenizer")
    parser.add_argument("--num-groups", type=int, default=24, help="row groups to measure packing on")
    parser.add_argument("--repeats", type=int, default=3, help="timings of which the best counts")
    parser.add_argument("--num-threads", type=int, default=1, help="of the loader")
    parser.add_argument("--step-ms", type=float, default=100.0, help="length of a training step to wait beside")
    args = parser.parse_args(argv)
    check_counts(num_groups=args.num_groups, repeats=args.repeats, num_threads=args.num_threads)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    shards = find_shards(args.data)
    tokenizer = RustBPETokenizer.from_pretrained("cl100k_base", args.tables_dir) if args.tables_dir else get_tokenizer()
    texts = [read_group(path, idx) for path, idx in TextGroups(shards, tokenizer, 1).places[:args.num_groups]]
    bos_id, start = tokenizer.get_bos_token_id(), time.perf_counter()
    groups = [tokenizer.encode(docs, prepend=bos_id, num_threads=1) for docs in texts]
    seconds = time.perf_counter() - start
    num_tokens, num_chars = (sum(len(doc) for docs in part for doc in docs) for part in (groups, texts))
    print(f"{shards.name}: {len(groups)} row groups, {num_tokens:,} tokens, {num_chars:,} characters; "
          f"{count_cpus()} cores")
    print(f"tokenizing, one thread: {num_tokens / seconds / 1e6:.1f} M tokens/s, {num_chars / seconds / 1e6:.1f} M "
          "characters/s")
    print("\npacking, one core, from Python lists; M tokens/s; x plain: times the rate of a plain scanning packer")
    packing = [measure_packing(groups, T, args.repeats) for T in (512, 1024, 2048)]
    print_rows([{"T": row["T"], "best-fit": row["pack_tokens_per_sec"] / 1e6, "x plain": row["times_plain"],
                 "placing only": row["placing_tokens_per_sec"] / 1e6, "stream": row["stream_tokens_per_sec"] / 1e6,
                 "crop %": 100 * row["crop_frac"], "first tenth": 100 * row["crop_first_tenth_frac"],
                 "last tenth": 100 * row["crop_last_tenth_frac"], "tail %": 100 * row["tail_frac"],
                 "piece %": 100 * row["piece_frac"], "pad %": 100 * row["pad_frac"]} for row in packing])
    print(f"\nloader end to end, {args.num_threads} threads, 32 rows a step; the wait is beside steps of "
          f"{args.step_ms:.0f} ms")
    loading = measure_loader(shards, tokenizer, 1024, args.num_threads, args.step_ms)
    print_rows([{"T": loading["T"], "M tokens/s": loading["loader_tokens_per_sec"] / 1e6,
                 "first step ms": loading["first_step_ms"], "median wait ms": loading["wait_median_ms"],
                 "longest wait ms": loading["wait_max_ms"]}])
    return {"tokenize_tokens_per_sec": num_tokens / seconds, "packing": packing, "loading": loading}


if __name__ == "__main__":
    run_script(main)
