"""Checks and timings of this code on this GPU, each against a plain version: guarded sections, then one table that says
which backends, kernels and flags win here.

    bash dev/gpu_check.sh 1              kernels, ceilings, memory: at most nine minutes, on one GPU, offline
    bash dev/gpu_check.sh 2              steps: the same
    bash dev/gpu_check.sh 3              fp8, decoding, resume: the same
    bash dev/gpu_check.sh 4              mixtures of experts: the same, and the table of all four
    bash dev/gpu_check.sh                one after the other
    bash dev/gpu_check.sh --only step resume     some sections
    bash dev/gpu_check.sh --toy          the same code at toy size, on a CPU too, eager unless --compile on
    python -m dev.gpu_check --table      the table of what is there, also after a command was killed

Results are in gpu_check.json, whole after each check, proposed defaults in gpu_check_defaults.json. A check that fails,
runs out of memory or of time is a line of the table, and the others still run; but after an error that poisons CUDA in
this process ("illegal memory access") they fail too: repeat them with --only. Exit code 0 only if every check passed.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dev.bench_memory import check_memory
from dev.gpu_ceilings import check_ceilings, check_chunks
from dev.gpu_decoding import check_decoding, check_inference
from dev.gpu_fp8 import check_fp8
from dev.gpu_kernels import check_attention, check_cross_entropy, check_kernels, check_optimizer
from dev.gpu_moe import check_moe
from dev.gpu_record import Record, print_results, read_results
from dev.gpu_setup import (
    FULL,
    TINY,
    Check,
    Setup,
    Sizes,
    TimeUp,
    describe_failure,
    free_memory,
    make_synthetic_rows,
    time_limit,
)
from dev.gpu_steps import check_backends, check_resume, check_saves, check_steps
from nanochat.command_line import Parser, add_compute_flags, exit_with, run_script
from nanochat.common import Ranks, UserError
from nanochat.compilation import choose_compile, set_compile_kernels
from nanochat.devices import get_compute_dtype, get_environment, init_compute
from nanochat.flash_attention import choose_backend

# By command, the most important first, should time run out
PARTS: dict[int, dict[str, Callable[[Setup], Iterator[Check]]]] = {
    1: {"attention": check_attention, "ceilings": check_ceilings, "loss": check_cross_entropy, "chunks": check_chunks,
        "optimizer": check_optimizer, "memory": check_memory, "kernels": check_kernels},
    2: {"step": check_steps, "backends": check_backends},
    3: {"fp8": check_fp8, "decoding": check_decoding, "resume": check_resume, "inference": check_inference,
        "save": check_saves},
    4: {"moe": check_moe},
}
SECTIONS = {name: check for sections in PARTS.values() for name, check in sections.items()}
DATA_ROWS = 512     # rows of tokens, repeated as often as the steps need
PART_SEC = 500      # of a command; with the start of Python and the table under nine minutes
CHECK_SEC = 240     # of a check, so that one that hangs leaves time for the others


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("part", type=int, nargs="?", choices=list(PARTS), help="the sections of that command (default: all)")
    add("--only", nargs="+", choices=list(SECTIONS), help="sections to run")
    add("--table", action="store_true", help="run nothing, print what the file of results has")
    add("--out", type=Path, default=Path("."), help="folder for the results and short-lived checkpoints")
    add("--earlier", type=Path, nargs="+", default=[], help="results of other commands, where --out is another folder")
    add("--budget-sec", type=float, help=f"seconds after which no further check is begun, and the one that runs is cut "
        f"off (default: {PART_SEC} for each part)")
    add("--toy", "--tiny", dest="tiny", action="store_true", help="toy sizes")
    add("--data", help="a source or folder that nanochat.dataset made (default: synthetic tokens)")
    add("--tokenizer", default="default", help="name of the tokenizer for --data")
    add_compute_flags(parser)
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: where it works, but not with --toy")
    args = parser.parse_args(argv)
    if args.only and args.part:
        raise UserError(f"{args.part} and --only name sections twice; give one of them")
    parts = [args.part] if args.part else list(PARTS)
    args.only = args.only or [name for part in parts for name in PARTS[part]]
    args.budget_sec = PART_SEC * len(parts) if args.budget_sec is None else args.budget_sec
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    start = time.perf_counter()
    path = args.out / "gpu_check.json"
    if args.table:
        results = read_results(path)
        if "choices" not in results:
            raise UserError(f"{path} holds no results; run bash dev/gpu_check.sh first, or name its folder with --out")
        print_results(results, path)
        return results
    device, _ = init_compute(args.device_type)
    if device.type == "cpu" and not args.tiny and args.device_type == "auto":
        raise UserError("torch finds no GPU here, and a CPU takes hours at these sizes; --toy runs the same code there")
    args.out.mkdir(parents=True, exist_ok=True)
    setup, decisions = make_setup(args, device)
    for what, value in decisions.items():
        print(f"{what}: {value}", flush=True)
    environment = get_environment(device)
    machine = {"hardware": environment["hardware"], "git_revision": environment["git_revision"],
               "torch": torch.__version__, "dtype": str(setup.dtype), "compile": setup.use_compile}
    record = Record(path, {"machine": machine, "sizes": asdict(setup.sizes), "decisions": decisions,
                           "environment": environment}, args.only, args.earlier)
    set_compile_kernels(setup.use_compile)
    try:
        for name in args.only:
            run_section(name, setup, record, start + args.budget_sec)
    finally:
        set_compile_kernels(False)
    results = record.finish()
    print_results(results, path)
    return results


def make_setup(args: argparse.Namespace, device: torch.device) -> tuple[Setup, dict[str, str]]:
    """The setup of the checks, and its decisions with their reasons."""
    sizes = TINY if args.tiny else FULL
    dtype, dtype_reason = get_compute_dtype(args.dtype, device)
    use_compile, compile_reason = choose_compile(args.compile, device, eager_sec=0 if args.tiny else None)
    sizes, rows = read_rows(args, sizes) if args.data else (sizes, make_synthetic_rows(sizes, DATA_ROWS))
    setup = Setup(sizes, device, dtype, use_compile, "auto", args.out, rows)
    backend, backend_reason = choose_backend(device, dtype, setup.make_config(sizes.depths[0]))
    decisions = {"device": str(device), "dtype": f"{dtype} ({dtype_reason})", "attention":
                 f"{backend} ({backend_reason})", "compile": f"{use_compile} ({compile_reason})",
                 "tokens": args.data or "synthetic, with frequencies by Zipf's law", "torch": torch.__version__}
    return replace(setup, backend=backend), decisions


def read_rows(args: argparse.Namespace, sizes: Sizes) -> tuple[Sizes, torch.Tensor]:
    """Rows of real text, and the sizes with its tokenizer's vocabulary."""
    # imported here: only real text needs the tokenizer's packages
    from nanochat.dataloader import RowOrder, TextGroups, TrainLoader
    from nanochat.shards import load_shards
    from nanochat.tokenizer import get_tokenizer
    tokenizer = get_tokenizer(args.tokenizer)
    with TrainLoader(TextGroups(load_shards(args.data), tokenizer, sizes.T), RowOrder(DATA_ROWS, 0), Ranks()) as loader:
        batch = loader.next_step()
    # a target of -1 is padding after the end of the text, which these checks train on as if it were token 0
    rows = torch.cat((batch.inputs, batch.targets[:, -1:]), dim=1).clamp(min=0)
    return replace(sizes, vocab_size=tokenizer.get_vocab_size()), rows.long()


def run_section(name: str, setup: Setup, record: Record, deadline: float) -> None:
    """Record each check of a section; an exception that isn't a check's own becomes a failed check, and ends it."""
    print(f"\n{name}", flush=True)
    record.begin(name)
    checks = SECTIONS[name](setup)
    while True:
        start = time.perf_counter()
        if start > deadline:
            check = Check("the rest", "skipped", "no time left; run it with --only, or set a larger --budget-sec")
        else:
            try:
                with time_limit(min(CHECK_SEC, deadline - start)):
                    check = next(checks, None)
            except (TimeUp, Exception) as error:  # of any kind: what goes wrong on this machine is the result
                check = describe_failure("the rest", error)
        if check is None:
            break
        record.add(name, check, time.perf_counter() - start)
        print(f"  {check.status:9} {check.name}: {check.detail}", flush=True)
        if check.name == "the rest":
            break
    checks.close()
    with contextlib.suppress(RuntimeError):    # after an error of CUDA all its calls fail, and the next checks say so
        free_memory(setup.device)


def run_and_exit(argv: list[str] | None) -> None:
    """Run the checks and end with code 1 unless all passed."""
    results = main(argv)
    if not results["passed"]:
        exit_with(1, "gpu_check: " + ", ".join(f"{num} {status}" for status, num in results["counts"].items()))


if __name__ == "__main__":
    run_script(run_and_exit)
