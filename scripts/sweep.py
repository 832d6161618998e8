"""Many pretraining runs, one command: every combination of a grid, resumable at any point.

    python -m scripts.sweep --name laws --grid depth=4,6,8 target-flops=1e14,3e14 -- --max-seq-len 512
    python -m scripts.sweep --name mini --grid depth=10,12,14 --nproc 8         # each run on 8 GPUs
    python -m scripts.sweep --name lr --grid matrix-lr=.01,.02,.04 --parallel 8 -- --depth 12    # 8 runs, a GPU each

What stands behind -- goes to scripts.base_train in every run. The same command again goes on: finished runs are
skipped, an unfinished one continues from its checkpoint, one that failed is left alone unless --retry-failed is given.
Each run is an ordinary one, runs/base/<name>-<point>; $NANOCHAT_BASE_DIR/sweeps/<name>/ holds sweep.json (the grid) and
what each run printed. `python -m scripts.scaling_laws` reads that folder.
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
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch

from nanochat.checkpoint_manager import get_run_dir, locked_run
from nanochat.common import UserError, file_lock, get_base_dir, get_worker_env, now, print0, run_script, write_json
from nanochat.config import GPTConfig, estimate_flops
from nanochat.report import get_series, group_metrics, read_json
from nanochat.results import SWEEP_KEYS
from nanochat.run import StopSignal
from nanochat.scaling import make_config, make_plan

OWN_FLAGS = {"model-tag", "resume"}    # of base_train, which the sweep sets itself
POLL_SEC, DRAW_SEC = 0.2, 2.0


@dataclass(frozen=True)
class Point:
    """One combination of the grid."""
    tag:   str
    flags: list[str]    # of scripts.base_train


@dataclass
class Worker:
    """A process that trains."""
    point:   Point
    process: subprocess.Popen
    before:  dict    # the run's run.json when the process was started


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", required=True, help="of the sweep, the first part of its runs' tags")
    add("--grid", nargs="+", required=True, metavar="FLAG=VALUE,VALUE", help="flags of scripts.base_train to combine")
    add("--parallel", type=int, default=1, help="runs at a time, each on GPUs of its own")
    add("--nproc", type=int, default=1, help="processes of a run, a GPU each, started by torchrun")
    add("--retry-failed", action="store_true", help="run what failed once more")
    args = parser.parse_args(argv[:split])
    args.flags = argv[split + 1:]
    for flag, value in (("--parallel", args.parallel), ("--nproc", args.nproc)):
        if value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    grid = parse_grid(args.grid, args.flags)
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < args.parallel * args.nproc:
        raise UserError(f"--parallel {args.parallel} --nproc {args.nproc} needs {args.parallel * args.nproc} GPUs, and "
                        f"there are {num_gpus}")
    get_run_dir("base", args.name)  # whether a folder can have this name
    folder = get_base_dir() / "sweeps" / args.name
    try:
        with file_lock(folder).acquire(blocking=False):
            sweep = Sweep(folder, make_points(args.name, grid, args.flags), grid, args)
            sweep.run()
            return sweep.summarize()
    except filelock.Timeout:
        raise UserError(f"another process runs the sweep {args.name}; wait for it, or choose another --name") from None


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
    fixed = {flag.partition("=")[0].lstrip("-").replace("_", "-") for flag in flags if flag.startswith("--")}
    if taken := {own for own in OWN_FLAGS for name in fixed | set(grid) if name and own.startswith(name)}:
        raise UserError(f"--{min(taken)} is set by the sweep itself; leave it out")
    if both := (fixed & set(grid)):
        raise UserError(f"--{min(both)} is in the grid and behind --; leave it out of one of them")
    return grid


def make_points(name: str, grid: dict[str, list[str]], flags: list[str]) -> list[Point]:
    """Every combination, the one with the fewest FLOPs first."""
    points = []
    for values in itertools.product(*grid.values()):
        words = [f"{key}{re.sub(r'[^A-Za-z0-9.+]', '_', value)}" for key, value in zip(grid, values, strict=True)]
        tag = "-".join([name, *words])
        own = [f"--{key}={value}" for key, value in zip(grid, values, strict=True)]
        points.append(Point(tag, ["--model-tag", tag, *own, *flags]))
    if len({point.tag for point in points}) < len(points):
        raise UserError("two points of the grid would have the same name; write their values differently")
    return sorted(points, key=lambda point: estimate_work(point.flags))


def estimate_work(flags: list[str]) -> float:
    """Model FLOPs of a run, to order the runs and to say how long the rest takes; 1 where the flags don't tell."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    shape, horizon = ("aspect-ratio", "head-dim"), ("num-iterations", "target-flops", "target-param-data-ratio")
    for name in ("depth", "max-seq-len", "total-batch-size", *shape, *horizon):
        parser.add_argument(f"--{name}", dest=name)
    given, _ = parser.parse_known_args(flags)
    try:
        values = {name: float(value) for name, value in vars(given).items()}

        def pick(names: tuple[str, ...]) -> dict:
            return {name.replace("-", "_"): values[name] for name in names if name in values}
        config = make_config(int(values["depth"]), vocab_size=GPTConfig.vocab_size,
                             sequence_len=int(values.get("max-seq-len", GPTConfig.sequence_len)),
                             **{name: int(value) for name, value in pick(shape).items()})
        return make_plan(config, estimate_flops(config), batch_tokens=values.get("total-batch-size"),
                         **pick(horizon)).total_flops
    except (KeyError, ValueError, UserError):  # no depth; or what base_train will refuse in its own words
        return 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Running


class Sweep:
    """The points of a grid, what became of each, and the processes that train some of them."""

    def __init__(self, folder: Path, points: list[Point], grid: dict[str, list[str]], args: argparse.Namespace):
        self.folder, self.points, self.args = folder, points, args
        self.info = {"name": args.name, "grid": grid, "flags": args.flags, "created": now(), "failed": {},
                     "points": [{"tag": point.tag, "flags": point.flags} for point in points]}
        self.load()
        if args.retry_failed:
            self.info["failed"] = {}
        self.pending = [point for point in points
                        if point.tag not in self.info["failed"] and self.read_status(point) != "finished"]
        self.workers: list[Worker | None] = [None] * args.parallel
        self.num_lines = 0    # of the table on the screen, to be drawn over
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self.save()

    def load(self) -> None:
        """Take over what sweep.json says, unless it is of another grid."""
        path = self.folder / "sweep.json"
        if not path.is_file():
            return
        saved = read_json(path, SWEEP_KEYS)
        if any(saved.get(key) != self.info[key] for key in ("grid", "flags")):
            if any((get_run_dir("base", point["tag"]) / "run.json").exists() for point in saved["points"]):
                raise UserError(f"the sweep {self.args.name} has the grid {format_grid(saved)}, and this command says "
                                f"{format_grid(self.info)}; go back to that grid, or choose another --name")
            return  # nothing came of it, perhaps a mistyped flag
        self.info |= {"created": saved["created"], "failed": saved["failed"]}

    def save(self) -> None:
        write_json(self.folder / "sweep.json", self.info)

    def run(self) -> None:
        """Train what is pending, as many at a time as there are workers; a signal ends the runs in order, then this."""
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
            self.signal_workers(signal.SIGKILL)  # none is left but after a bug, or Ctrl-C once more

    def start_next(self, slot: int) -> None:
        """Start the first pending run that no other process trains, such as one that outlived a killed sweep."""
        for point in self.pending:
            run_dir = get_run_dir("base", point.tag)
            with contextlib.suppress(UserError), locked_run(run_dir):
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
        before = self.read_info(point)
        with open(self.folder / "logs" / f"{point.tag}.log", "ab") as log:
            # a session of its own: Ctrl-C reaches this process alone, which then ends the runs in order
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
        self.workers[slot] = Worker(point, process, before)
        self.report(point, "started")

    def settle(self, worker: Worker, told: bool) -> None:
        """Record how a run ended."""
        point, code = worker.point, worker.process.returncode
        if code == 0:
            self.report(point, self.read_status(point))
        elif told:
            self.pending.append(point)
        else:
            self.info["failed"][point.tag] = self.find_reason(worker)
            self.save()
            self.report(point, f"failed: {self.info['failed'][point.tag]}")

    def find_reason(self, worker: Worker) -> str:
        """Why a run failed: what it recorded this time, else how its process ended and its last words."""
        point, code, info = worker.point, worker.process.returncode, self.read_info(worker.point)
        if info.get("status") == "failed" and info != worker.before:
            return info["reason"]
        lines = (self.folder / "logs" / f"{point.tag}.log").read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how} ({last[:300]})"

    def signal_workers(self, signum: int) -> None:
        """Send a signal to each run, for SIGKILL with all of its processes."""
        for worker in filter(None, self.workers):
            if worker.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    if signum == signal.SIGKILL:
                        os.killpg(worker.process.pid, signum)
                    else:
                        worker.process.send_signal(signum)

    # ----- what the runs' own files say

    def read_info(self, point: Point) -> dict:
        """A run's run.json, {} where there is none."""
        path = get_run_dir("base", point.tag) / "run.json"
        return read_json(path) if path.is_file() else {}

    def read_status(self, point: Point) -> str:
        """waiting, running, stopped, failed or finished; as its run.json says."""
        info = self.read_info(point)
        made_by = [word for word in info.get("argv", [])[1:] if word != "--"]
        if info.get("status") == "finished" and made_by != point.flags:
            raise UserError(f"the run {point.tag} was made by another command ({' '.join(made_by)}); delete "
                            f"{get_run_dir('base', point.tag)}, or choose another --name")
        return info.get("status", "waiting")

    def read_progress(self, point: Point) -> dict:
        """Where a run is; None where nothing is known yet."""
        info = self.read_info(point)
        metrics = group_metrics(get_run_dir("base", point.tag) / "metrics.jsonl")

        def last(kind: str, key: str) -> float | None:
            series = get_series(metrics, kind, key)
            return series[-1][1] if series else None
        status = "failed" if point.tag in self.info["failed"] else info.get("status", "waiting")
        if status == "running" and point not in [worker.point for worker in self.workers if worker]:
            status = "unfinished"
        return {"tag": point.tag, "status": status, "step": max(metrics.get("train", {}), default=0),
                "num_iterations": info.get("plan", {}).get("num_iterations"), "val_bpb": last("eval", "val_bpb"),
                "train_loss": last("train", "loss_smooth"), "train_sec": last("train", "elapsed_sec")}

    # ----- showing

    def report(self, point: Point, event: str) -> None:
        """One line an event, where the table can't be drawn over."""
        if not sys.stdout.isatty():
            print0(f"{point.tag}: {event} ({self.describe_rest()})")

    def describe_rest(self) -> str:
        """How many runs are done, and how long the rest takes at the speed measured so far."""
        rows = [self.read_progress(point) for point in self.points]
        num_done = sum(row["status"] == "finished" for row in rows)
        text = f"{num_done} of {len(rows)} finished" + (f", {len(self.info['failed'])} failed"
                                                        if self.info["failed"] else "")
        seconds = sum(row["train_sec"] or 0 for row in rows)
        done_work = sum(estimate_work(point.flags) * min(1, row["step"] / (row["num_iterations"] or 1))
                        for point, row in zip(self.points, rows, strict=True))
        left = sum(estimate_work(point.flags) * (1 - min(1, row["step"] / (row["num_iterations"] or 1)))
                   for point, row in zip(self.points, rows, strict=True) if row["status"] not in ("finished", "failed"))
        if not done_work or not left:
            return text
        minutes = left * seconds / done_work / min(self.args.parallel, len(self.pending) + 1) / 60
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
        lines.append(self.describe_rest())
        erase = f"\033[{self.num_lines}A\033[J" if on_screen and self.num_lines else ""
        self.num_lines = len(lines)
        print0(erase + "\n".join(lines))

    def summarize(self) -> dict:
        """The end: the table, what failed and why, and where to go on."""
        self.draw(final=True)
        for tag, reason in self.info["failed"].items():
            print0(f"{tag} failed: {reason}")
        if self.info["failed"]:
            print0("failed runs were left out; --retry-failed runs them once more")
        if len(self.info["failed"]) == len(self.points):
            raise UserError(f"all {len(self.points)} runs of the sweep {self.args.name} failed; {self.folder / 'logs'} "
                            "has what they printed")
        print0(f"sweep: {self.folder}")
        return {"folder": str(self.folder), "failed": self.info["failed"],
                "runs": [self.read_progress(point) for point in self.points]}


def format_grid(info: dict) -> str:
    """A grid and its flags as one types them."""
    words = [f"{key}={','.join(values)}" for key, values in info["grid"].items()]
    return " ".join([*words, *(["--", *info["flags"]] if info["flags"] else [])])


if __name__ == "__main__":
    run_script(main)
