"""Many pretraining runs from one command: every combination of a grid, resumable at any point.

    python -m scripts.sweep --name laws --grid depth=4,6,8 target-flops=1e14,3e14 -- --max-seq-len 512
    python -m scripts.sweep --name mini --grid depth=10,12,14 --nproc 8         # each run on 8 GPUs
    python -m scripts.sweep --name lr --grid matrix-lr=.01,.02,.04 --parallel 8 -- --depth 12    # 8 runs, a GPU each

The flags after -- go to scripts.base_train in every run. The same command again continues the sweep: finished runs are
skipped, unfinished ones continue from their checkpoints, failed ones are skipped unless --retry-failed is given. Each
run is an ordinary one, runs/base/<name>-<point>; $NANOCHAT_BASE_DIR/sweeps/<name>/ holds sweep.json (the grid) and each
run's output. `python -m dev.scaling_laws` reads that folder.
"""

import argparse
import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from nanochat.checkpoint_manager import check_tag, get_run_dir, locked_run, read_latest
from nanochat.choices import FREE_FLAGS
from nanochat.command_line import Parser, check_flags, run_script
from nanochat.common import MAX_PROCESSES, UserError, file_lock, get_base_dir, get_worker_env, now, print0, write_json
from nanochat.config import GPTConfig, estimate_flops
from nanochat.presets import Preset
from nanochat.report import RunFiles, read_json, read_run
from nanochat.run import StopSignal
from nanochat.scaling import check_counts, make_config, make_plan

SWEEP_KEYS = ("grid", "flags", "created", "failed", "points")  # of sweep.json
OWN_FLAGS = {"model_tag", "resume", "resume_from_step"}    # of base_train, set by the sweep itself
POLL_SEC, DRAW_SEC = 0.2, 2.0


@dataclass(frozen=True)
class Point:
    """One combination of the grid."""
    tag:   str
    flags: list[str]    # of scripts.base_train
    flops: float        # of the whole run; 1 where the flags don't tell


@dataclass
class Worker:
    """A training process."""
    point:   Point
    process: subprocess.Popen
    before:  dict    # run.json at the process's start


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--name", required=True, help="of the sweep, the first part of its runs' tags")
    add("--grid", nargs="+", required=True, metavar="FLAG=VALUE,VALUE", help="flags of scripts.base_train to combine")
    args = parse_run_args(parser, argv)
    args.grid = parse_grid(args.grid, args.flags)
    args.points = make_points(args.name, args.grid, args.flags)
    check_sweep(args.points, args)
    return args


def parse_run_args(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The parser's flags; how many runs at a time, and on how many GPUs; behind --, scripts.base_train's: `flags`."""
    add = parser.add_argument
    add("--parallel", type=int, default=1, help="runs at a time, each on GPUs of its own")
    add("--nproc", type=int, default=1, help="processes of a run, a GPU each, started by torchrun")
    add("--retry-failed", action="store_true", help="repeat the runs that failed")
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:split], argparse.Namespace(flags=argv[split + 1:]))


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with open_sweep(args.points, args.grid, args) as sweep:
        sweep.run()
        return sweep.summarize()


def check_sweep(points: list[Point], args: argparse.Namespace) -> None:
    """UserError, or argparse's end, where a mistake would end the sweep or each of its runs."""
    check_counts(parallel=args.parallel, nproc=args.nproc)
    if args.parallel * args.nproc > MAX_PROCESSES:
        raise UserError(f"--parallel {args.parallel} --nproc {args.nproc} would be {args.parallel * args.nproc} "
                        f"processes; start at most {MAX_PROCESSES}")
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < args.parallel * args.nproc:
        raise UserError(f"--parallel {args.parallel} --nproc {args.nproc} needs {args.parallel * args.nproc} GPUs, and "
                        f"there are {num_gpus}")
    for name in (args.name, *(point.tag for point in points)):
        check_tag(name)
    for point in points:
        check_flags("scripts.base_train", point.flags)


@contextlib.contextmanager
def open_sweep(points: list[Point], grid: dict[str, list[str]], args: argparse.Namespace) -> Iterator["Sweep"]:
    """A sweep that no other process runs. grid: what a continued sweep must have as before
    args: name, flags (of scripts.base_train, the same in all runs), parallel, nproc, retry_failed"""
    check_sweep(points, args)
    folder = get_base_dir() / "sweeps" / args.name
    try:
        with file_lock(folder).acquire(blocking=False):
            yield Sweep(folder, points, grid, args)
    except filelock.Timeout:
        raise UserError(f"another process runs the sweep {args.name}; wait for it, or choose another --name") from None


# ---------------------------------------------------------------------------------------------------------------------
# The grid


def parse_grid(words: list[str], flags: list[str]) -> dict[str, list[str]]:
    """{flag: its values} from words like depth=4,6."""
    grid: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        name, values = name.lstrip("-").replace("_", "-"), values.split(",")
        if not name or not all(values):
            raise UserError(f"--grid {word} must be a flag of scripts.base_train and its values, such as depth=4,6")
        if name in grid or len(set(values)) < len(values):
            raise UserError(f"--grid names {word if name not in grid else name} twice")
        grid[name] = values
    in_grid, fixed = {name.replace("-", "_") for name in grid}, parse_flags(flags).keys()
    check_own(OWN_FLAGS, fixed | in_grid, "the sweep")
    if both := fixed & in_grid:
        raise UserError(f"--{min(both).replace('_', '-')} is in the grid and behind --; leave it out of one of them")
    return grid


def check_own(own: set[str], given: set[str], what: str) -> None:
    """UserError where a flag is given that its `what` sets; a prefix is one: base_train takes --resum for --resume."""
    if taken := {flag for flag in own for name in given if name and flag.startswith(name)}:
        raise UserError(f"--{min(taken).replace('_', '-')} is set by {what} itself; leave it out")


def parse_flags(words: list[str]) -> dict[str, list[str]]:
    """{flag: its values} of a command line: --a-b=1 and --a-b 1 are {"a_b": ["1"]}, and -d is --dtype."""
    flags: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("-d"):
            word = f"--dtype={word[2:].lstrip('=')}" if word[2:] else "--dtype"
        if word.startswith("--"):
            name, *values = word[2:].split("=", 1)
            name = name.replace("-", "_")
            flags[name] = [*flags.get("knobs", []), *values] if name == "knobs" else values    # which add up
        else:
            flags.setdefault(name, []).append(word)
    return flags


def get_identity(words: list[str]) -> dict[str, list[str]]:
    """The flags of a command line that change what is learned."""
    return {name: values for name, values in parse_flags(words).items() if name not in FREE_FLAGS}


def make_points(name: str, grid: dict[str, list[str]], flags: list[str]) -> list[Point]:
    """Every combination, the one with the fewest FLOPs first."""
    points = []
    for values in itertools.product(*grid.values()):
        words = [f"{key}{re.sub(r'[^A-Za-z0-9.+]', '_', value)}" for key, value in zip(grid, values, strict=True)]
        tag = "-".join([name, *words])
        own = [f"--{key}={value}" for key, value in zip(grid, values, strict=True)]
        flags_of_run = ["--model-tag", tag, *own, *flags]
        points.append(Point(tag, flags_of_run, estimate_run_flops(flags_of_run)))
    if len({point.tag for point in points}) < len(points):
        raise UserError("two points of the grid would have the same name; write their values differently")
    return sorted(points, key=lambda point: point.flops)


def estimate_run_flops(words: list[str]) -> float:
    """Model FLOPs of a run, for the order of the runs and the time left; 1 where the flags don't tell."""
    flags = parse_flags(words)

    def read(*names: str) -> dict[str, float]:
        return {name: float(flags[name][0]) for name in names if name in flags}
    try:
        config = make_config(int(flags["depth"][0]), vocab_size=GPTConfig.vocab_size,
                             sequence_len=int(read("max_seq_len").get("max_seq_len", GPTConfig.sequence_len)),
                             **{name: int(value) for name, value in read("aspect_ratio", "head_dim").items()})
        return make_plan(config, estimate_flops(config), batch_tokens=read("total_batch_size").get("total_batch_size"),
                         **read("num_iterations", "target_flops", "target_param_data_ratio")).total_flops
    except (LookupError, ValueError, OverflowError, UserError):  # no depth, or a value that base_train will refuse
        return 1.0


def format_grid(info: dict) -> str:
    """A grid and its flags as a command line."""
    words = [f"{key}={','.join(values)}" for key, values in info["grid"].items()]
    return " ".join([*words, *(["--", *info["flags"]] if info["flags"] else [])])


# ---------------------------------------------------------------------------------------------------------------------
# Running


class Sweep:
    """The points of a grid, their states, and the processes that train some of them."""

    def __init__(self, folder: Path, points: list[Point], grid: dict[str, list[str]], args: argparse.Namespace):
        self.folder, self.points, self.args = folder, points, args
        self.info = {"name": args.name, "grid": grid, "flags": args.flags, "created": now(), "failed": {},
                     "rule": Preset.rule, "key_offset": GPTConfig.key_offset,
                     "points": [{"tag": point.tag, "flags": point.flags} for point in points]}
        self.load()
        if args.retry_failed:
            self.info["failed"] = {}
        self.pending = [point for point in points
                        if point.tag not in self.info["failed"] and self.read_status(point) != "finished"]
        self.workers: list[Worker | None] = [None] * args.parallel
        self.num_lines = 0    # of the table on the screen, which the next one overwrites
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self.save()

    def load(self) -> None:
        """Continue sweep.json; UserError where it has runs of another grid."""
        if not (self.folder / "sweep.json").is_file():
            return
        saved = read_json(self.folder / "sweep.json", SWEEP_KEYS)
        if saved["grid"] == self.info["grid"] and get_identity(saved["flags"]) == get_identity(self.info["flags"]):
            older = {key for key in ("rule", "key_offset") if saved.get(key) != self.info[key]}
            # Those with a checkpoint go on as they began
            if older and any(read_latest(get_run_dir("base", point.tag)) is None for point in self.points):
                raise UserError(f"the sweep {self.args.name} was begun when the model, or batch and rates of small "
                                "ones, were others, and not all of its runs have a checkpoint; choose another --name, "
                                "or finish it with the nanochat that began it")
            self.info |= {"created": saved["created"], "failed": saved["failed"]}
            for key in older:    # nor are more points added later
                del self.info[key]
            self.info |= {key: saved[key] for key in older & saved.keys()}
        elif any((get_run_dir("base", point["tag"]) / "run.json").exists() for point in saved["points"]):
            raise UserError(f"the sweep {self.args.name} has the grid {format_grid(saved)}, and this command says "
                            f"{format_grid(self.info)}; go back to that grid, or choose another --name")

    def save(self) -> None:
        write_json(self.folder / "sweep.json", self.info)

    def run(self) -> None:
        """Train the pending points, args.parallel at a time; a signal stops the runs, which save, then this process."""
        try:
            with StopSignal() as stop:
                told, drawn = False, 0.0
                while any(self.workers) or (self.pending and not stop.signum):
                    if stop.signum and not told:
                        self.signal_workers(signal.SIGTERM)
                        told = True
                    for slot, worker in enumerate(self.workers):
                        if worker and worker.process.poll() is not None:
                            self.workers[slot] = None
                            self.settle(worker, told)
                        if not self.workers[slot] and not stop.signum:
                            self.start_next(slot)
                    if time.monotonic() > drawn + DRAW_SEC:
                        self.draw()
                        drawn = time.monotonic()
                    time.sleep(POLL_SEC)
                if stop.signum:
                    print0(f"stopped; the same command goes on with the {len(self.pending)} runs that are left")
                    stop.end()
        finally:
            self.signal_workers(signal.SIGKILL)  # some are left only after a bug, or Ctrl-C once more

    def start_next(self, slot: int) -> None:
        """Start the first pending run that no other process trains, such as one that outlived a killed sweep."""
        for point in self.pending:
            with contextlib.suppress(UserError), locked_run(get_run_dir("base", point.tag)):
                break
        else:
            return
        self.pending.remove(point)
        if self.read_status(point) == "finished":
            return self.report(point, "finished")
        module, env = "scripts.base_train", get_worker_env(slot, self.args.parallel, self.args.nproc)
        command = [sys.executable, "-u", "-m", module, *point.flags]
        if self.args.nproc > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                       f"--nproc-per-node={self.args.nproc}", "-m", module, "--", *point.flags]
        before = self.read_run(point).info
        with open(self.folder / "logs" / f"{point.tag}.log", "ab") as log:
            # a session of its own: Ctrl-C reaches this process alone, which then stops the runs
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        self.workers[slot] = Worker(point, process, before)
        self.report(point, "started")

    def settle(self, worker: Worker, told: bool) -> None:
        """Record the end of a run; told: it was asked to stop."""
        point = worker.point
        if worker.process.returncode == 0:
            self.report(point, self.read_status(point))
        elif told:
            self.pending.append(point)
        else:
            self.info["failed"][point.tag] = self.find_reason(worker)
            self.save()
            self.report(point, f"failed: {self.info['failed'][point.tag]}")

    def find_reason(self, worker: Worker) -> str:
        """The reason of a failure: the one that the run recorded this time, else its exit code and last line."""
        tag, code, info = worker.point.tag, worker.process.returncode, self.read_run(worker.point).info
        if info.get("status") == "failed" and info != worker.before:
            return info["reason"]
        lines = (self.folder / "logs" / f"{tag}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how} ({last[:300]})"

    def signal_workers(self, signum: int) -> None:
        """Send a signal to each run; SIGKILL to all of its processes."""
        for worker in filter(None, self.workers):
            if worker.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    if signum == signal.SIGKILL:
                        os.killpg(worker.process.pid, signum)
                    else:
                        worker.process.send_signal(signum)

    # ----- the runs' own files

    def read_run(self, point: Point) -> RunFiles:
        return read_run(get_run_dir("base", point.tag))

    def read_status(self, point: Point) -> str:
        """waiting, running, stopped, failed or finished, from run.json."""
        info = self.read_run(point).info
        made_by = [word for word in info.get("argv", [])[1:] if word != "--"]
        if info.get("status") == "finished" and get_identity(made_by) != get_identity(point.flags):
            raise UserError(f"the run {point.tag} was made by another command ({' '.join(made_by)}); delete "
                            f"{get_run_dir('base', point.tag)}, or choose another --name")
        return info.get("status", "waiting")

    def read_progress(self, point: Point) -> dict:
        """The state of a run; None for each value that isn't known yet."""
        run = self.read_run(point)
        status = "failed" if point.tag in self.info["failed"] else run.info.get("status", "waiting")
        if status == "running" and point not in [worker.point for worker in self.workers if worker]:
            status = "unfinished"
        return {"tag": point.tag, "status": status, "step": max(run.metrics.get("train", {}), default=0),
                "num_iterations": run.info.get("plan", {}).get("num_iterations"),
                "val_bpb": run.get_last("eval", "val_bpb"), "train_loss": run.get_last("train", "loss_smooth"),
                "train_sec": run.get_last("train", "elapsed_sec")}

    # ----- showing

    def report(self, point: Point, event: str) -> None:
        """One line an event, where there is no terminal with a table."""
        if not sys.stdout.isatty():
            print0(f"{point.tag}: {event} ({self.describe_rest([self.read_progress(p) for p in self.points])})")

    def describe_rest(self, rows: list[dict]) -> str:
        """How many runs are finished, and the minutes left at the speed measured so far."""
        text = f"{sum(row['status'] == 'finished' for row in rows)} of {len(rows)} finished"
        text += f", {len(self.info['failed'])} failed" if self.info["failed"] else ""
        done_flops = left_flops = 0.0
        for point, row in zip(self.points, rows, strict=True):
            done_frac = min(1, row["step"] / (row["num_iterations"] or 1))
            done_flops += point.flops * done_frac
            left_flops += point.flops * (1 - done_frac) * (row["status"] not in ("finished", "failed"))
        if not done_flops or not left_flops:
            return text
        seconds = left_flops / done_flops * sum(row["train_sec"] or 0 for row in rows)
        minutes = seconds / min(self.args.parallel, len(self.pending) + 1) / 60
        return f"{text}, about {minutes:.1f} min of training left"

    def draw(self, final: bool = False) -> None:
        """The table of all runs, over the one before on a terminal; elsewhere only at the end."""
        on_screen = sys.stdout.isatty()
        if not on_screen and not final:
            return
        rows = [self.read_progress(point) for point in self.points]
        width = max(len(point.tag) for point in self.points)
        lines = [f"{'run':{width}}  {'status':10}  {'step':>13}  {'val bpb':>8}  {'train loss':>10}  {'minutes':>8}"]
        for row in rows:
            steps = f"{row['step']}/{row['num_iterations']}" if row["num_iterations"] else "-"
            bpb, loss = (f"{row[key]:.4f}" if row[key] else "-" for key in ("val_bpb", "train_loss"))
            minutes = f"{row['train_sec'] / 60:.1f}" if row["train_sec"] else "-"
            lines.append(f"{row['tag']:{width}}  {row['status']:10}  {steps:>13}  {bpb:>8}  {loss:>10}  {minutes:>8}")
        lines.append(self.describe_rest(rows))
        erase = f"\033[{self.num_lines}A\033[J" if on_screen and self.num_lines else ""
        self.num_lines = len(lines)
        print0(erase + "\n".join(lines))

    def summarize(self) -> dict:
        """The final table and the failures; UserError where all runs failed."""
        self.draw(final=True)
        failed = self.info["failed"]
        for tag, reason in failed.items():
            print0(f"{tag} failed: {reason}")
        if failed:
            print0("failed runs were left out; --retry-failed runs them once more")
        if len(failed) == len(self.points):
            raise UserError(f"all {len(self.points)} runs of the sweep {self.args.name} failed; {self.folder / 'logs'} "
                            "has what they printed")
        print0(f"sweep: {self.folder}")
        return {"folder": str(self.folder), "failed": failed,
                "runs": [self.read_progress(point) for point in self.points]}


if __name__ == "__main__":
    run_script(main)
