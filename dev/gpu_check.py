"""Checks and timings of this code on this GPU, against float64 and the CPU: guarded sections, then one table.

    bash dev/gpu_check.sh                                  all sections, on one GPU, offline, under 8 minutes
    python -m dev.gpu_check --only step resume             some of them
    python -m dev.gpu_check --tiny --device-type cpu       the same code at toy size, eager unless --compile on

A section that fails is a line of the table, and the others still run; but after an error that poisons CUDA in this
process ("illegal memory access") they fail too: repeat them with --only. Exit code 0 only if every check passed.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dev.bench_memory import check_memory
from dev.gpu_kernels import check_attention, check_cross_entropy, check_optimizer
from dev.gpu_setup import FULL, TINY, Check, Setup, Sizes, free_memory, make_synthetic_rows
from dev.gpu_steps import check_backends, check_resume, check_saves, check_steps
from dev.timing import print_table
from nanochat.common import Ranks, exit_with, get_compute_dtype, get_environment, init_compute, run_script, write_json
from nanochat.compilation import choose_compile, set_compile_kernels
from nanochat.flash_attention import choose_backend

# The most important first, should time run out
SECTIONS: dict[str, Callable[[Setup], Iterator[Check]]] = {
    "attention": check_attention,
    "loss":      check_cross_entropy,
    "optimizer": check_optimizer,
    "step":      check_steps,
    "resume":    check_resume,
    "save":      check_saves,
    "backends":  check_backends,
    "memory":    check_memory,
}
DATA_ROWS = 512   # rows of tokens, repeated as often as the steps need


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run (default: all)")
    add("--out", type=Path, default=Path("."), help="folder for gpu_check.json and short-lived checkpoints")
    add("--budget-sec", type=float, default=420, help="seconds after which no further check is begun")
    add("--tiny", action="store_true", help="toy sizes")
    add("--data", help="a source or folder that nanochat.dataset made (default: synthetic tokens)")
    add("--tokenizer", default="default", help="name of the tokenizer for --data")
    add("--device-type", default="", help="cuda, cpu, xpu (default: the best that is there)")
    add("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    add("--compile", choices=("auto", "on", "off"), default="auto", help="auto: where it works, but not with --tiny")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    start = time.perf_counter()
    device, _ = init_compute(args.device_type)
    args.out.mkdir(parents=True, exist_ok=True)
    setup, decisions = make_setup(args, device)
    for what, value in decisions.items():
        print(f"{what}: {value}", flush=True)
    set_compile_kernels(setup.use_compile)
    try:
        lines = [line for name in args.only for line in run_section(name, setup, start + args.budget_sec)]
    finally:
        set_compile_kernels(False)
    print()
    print_table(["section", "check", "result", "s", "measured"],
                [[name, check.name, check.status, sec, check.detail] for name, check, sec in lines])
    counts = {status: sum(check.status == status for _, check, _ in lines)
              for status in ("ok", "FAIL", "skipped", "absent")}
    results = {"passed": not counts["FAIL"] and not counts["skipped"] and counts["ok"] > 0, "counts": counts,
               "wall_sec": time.perf_counter() - start, "decisions": decisions, "sizes": asdict(setup.sizes),
               "environment": get_environment(device),
               "checks": [{"section": name, "sec": sec, **asdict(check)} for name, check, sec in lines]}
    write_json(args.out / "gpu_check.json", results)
    print(f"\n{counts['ok']} ok, {counts['FAIL']} failed, {counts['skipped']} skipped, {counts['absent']} absent in "
          f"{results['wall_sec']:.0f} s; figures in {args.out / 'gpu_check.json'}")
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


def run_section(name: str, setup: Setup, deadline: float) -> list[tuple[str, Check, float]]:
    """(section, check, its seconds) for each check of a section; an exception becomes a failed check."""
    print(f"\n{name}", flush=True)
    lines = []
    checks = SECTIONS[name](setup)
    while True:
        start = time.perf_counter()
        if start > deadline:
            check = Check("the rest", "skipped", "no time left; run it with --only, or set a larger --budget-sec")
        else:
            try:
                check = next(checks, None)
            except Exception as error:  # of any kind: what goes wrong on this machine is the result
                message = (str(error).strip().splitlines() or ["no message"])[0][:200]
                check = Check("the rest", "FAIL", f"{type(error).__name__}: {message}")
        if check is None:
            break
        lines.append((name, check, time.perf_counter() - start))
        print(f"  {check.status:7} {check.name}: {check.detail}", flush=True)
        if check.name == "the rest":
            break
    checks.close()
    free_memory(setup.device)
    return lines


def run_and_exit(argv: list[str] | None) -> None:
    """Run the checks and end with code 1 unless all passed."""
    results = main(argv)
    if not results["passed"]:
        exit_with(1, f"gpu_check: {results['counts']['FAIL']} failed, {results['counts']['skipped']} skipped")


if __name__ == "__main__":
    run_script(run_and_exit)
