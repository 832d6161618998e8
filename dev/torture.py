"""Kill training with SIGKILL at random times, continue it by the same command, and compare it with a run left alone.

    python dev/torture.py --kills 50                           both series, 50 kills each
    python -m dev.torture --kills 5 --series elastic --seed 7

The bitwise series always continues on the same number of ranks, and must end bit for bit as the undisturbed run:
parameters, optimizer state, loader state, metrics but for times. The elastic series continues on 1, 2 or 4 ranks, drawn
each time, and must end within float64's rounding. Both train in float64 at depth 2 on generated text. After each kill
the newest checkpoint must be whole and no older than before; after the kill of one rank the others must end by
themselves. A series has as many runs as its kills need: a run that reaches its end is compared, and the next begins.

Half of the kills come at any time after the start of the processes, half during a save. Ranks are forks of this
process, which has imported everything: imports are most of torchrun's start-up time, and aren't tested here. Writes
survive SIGKILL in the system's cache: a power failure, for which the files are synced to disk, is not simulated.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python dev/torture.py` where nothing is installed

import torch

from nanochat import dataset
from nanochat.checkpoint_manager import (
    MODEL_NAME,
    SavedState,
    get_step_name,
    list_steps,
    load_meta,
    load_tensors,
    read_latest,
    verify_files,
)
from nanochat.command_line import Parser, exit_with, run_script
from nanochat.common import UserError, get_base_dir
from nanochat.run import read_metrics
from scripts import base_train, tok_train

SERIES = ("bitwise", "elastic")
WORLD_SIZES = (1, 2, 4)             # of the elastic series
NUM_STEPS, SAVE_EVERY = 40, 2
TRAIN_ARGS = ("--data", "toy", "--depth", "2", "--aspect-ratio", "32", "--head-dim", "32", "--max-seq-len", "64",
              "--num-iterations", str(NUM_STEPS), "--total-batch-size", "512", "--save-every", str(SAVE_EVERY),
              "--eval-every", "8", "--eval-tokens", "1024", "--sample-every", "-1",
              "--device-type", "cpu", "--dtype", "float64", "--compile", "off")
NUM_DOCS = 60                       # so few that the lanes come to a second epoch
TIMEOUT_SEC = 20                    # of collective operations, for a rank that died before it joined
MAX_LIFE_SEC = 600                  # of processes; longer ones count as hung
SAVE_DELAYS_LOG10_SEC = (-4, -0.8)  # from the beginning of a save to the kill, log-uniform
MAX_LOSS_GAP, MAX_PARAM_GAP = 1e-9, 1e-6
# Metrics that differ between two runs of the same steps, and those of rank 0's lanes alone
PER_PROCESS_KEYS = {"step_ms", "tokens_per_sec", "mfu_pct", "elapsed_sec", "eval_sec", "peak_memory_bytes"}
PER_LANE_KEYS = {"crop_frac", "tail_frac", "piece_frac", "pad_frac", "epoch", "repeated_groups"}


@dataclass(frozen=True)
class Kill:
    """The end of one start of a run: its processes were killed."""
    series:      str
    run:         int         # of the series
    world_size:  int
    victim:      int | None  # the rank that was killed, None for all at once
    in_save:     bool        # a save was in flight
    latest_step: int         # of the newest checkpoint after it, 0 where there is none
    life_sec:    float       # start to kill
    dying_sec:   float       # kill to the end of the last rank


class Fault(Exception):
    """A run hung, lost a checkpoint, or differs from the undisturbed one."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of each series")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=SERIES)
    parser.add_argument("--ranks", type=int, default=2, choices=WORLD_SIZES,
                        help="of the undisturbed run and the bitwise series")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of times and ranks")
    args = parser.parse_args(argv)
    if args.kills < 1:
        raise UserError(f"--kills {args.kills} must be at least 1")
    if not hasattr(os, "fork"):
        raise UserError("dev/torture.py needs an operating system with fork and SIGKILL, such as Linux")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    torch.set_num_threads(1)  # a fork has no thread of its parent's pool, and would wait for it
    start = time.monotonic()
    base_dir = Path(tempfile.mkdtemp(prefix="torture-", dir=get_base_dir()))
    Life(base_dir, "data", make_data, 1).end_well()
    undisturbed = Life(base_dir, "undisturbed", train_rank, args.ranks)
    undisturbed.end_well()
    life_sec = time.monotonic() - undisturbed.start
    print(f"undisturbed: {NUM_STEPS} steps on {args.ranks} ranks in {life_sec:.1f} s", flush=True)
    kills, faults = [], []
    for series in args.series:
        rng = random.Random(f"{args.seed} {series}")
        try:
            for number, kill in enumerate(torture(undisturbed, series, args, rng, life_sec), 1):
                kills.append(kill)
                print_kill(number, args.kills, kill)
        except Fault as fault:
            faults.append(f"{series}: {fault}")
            print(f"FAULT in the {series} series: {fault}", flush=True)
    summary = summarize(args, kills, faults, time.monotonic() - start)
    print(json.dumps(summary), flush=True)
    if faults:
        exit_with(1, f"torture: {len(faults)} of {len(args.series)} series failed; all files are in {base_dir}")
    shutil.rmtree(base_dir)
    return summary


def summarize(args: argparse.Namespace, kills: list[Kill], faults: list[str], seconds: float) -> dict:
    """The verdict and the counts."""
    return {"verdict": "failed" if faults else "passed", "faults": faults, "seed": args.seed, "ranks": args.ranks,
            "kills": dict(Counter(kill.series for kill in kills)),
            "runs": dict(Counter(series for series, _ in {(kill.series, kill.run) for kill in kills})),
            "kills_in_save": sum(kill.in_save for kill in kills),
            "kills_of_one_rank": sum(kill.victim is not None for kill in kills),
            "max_dying_sec": max((round(kill.dying_sec, 1) for kill in kills), default=0), "sec": round(seconds)}


def print_kill(number: int, num_kills: int, kill: Kill) -> None:
    who = "all" if kill.victim is None else f"rank {kill.victim}"
    print(f"{kill.series} {number:2}/{num_kills} | run {kill.run} | killed {who:6} of {kill.world_size} after "
          f"{kill.life_sec:4.1f} s | {'in a save' if kill.in_save else '         '} | newest checkpoint: step "
          f"{kill.latest_step:2} | all ended {kill.dying_sec:4.1f} s later", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


class Life:
    """The processes of one start of a run, a rank each, and their folder."""

    def __init__(self, base_dir: Path, tag: str, work: Callable[[str], object], world_size: int):
        self.base_dir, self.run_dir, self.log_path = base_dir, base_dir / "runs" / "base" / tag, base_dir / f"{tag}.log"
        self.start, self.start_ns = time.monotonic(), time.time_ns()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        context = multiprocessing.get_context("fork")
        self.processes: list[BaseProcess] = []
        for rank in range(world_size):
            env = {"NANOCHAT_BASE_DIR": str(base_dir), "NANOCHAT_TIMEOUT_SEC": str(TIMEOUT_SEC),
                   "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            process = context.Process(target=run_rank, args=(work, tag, env, self.log_path), daemon=True)
            process.start()
            self.processes.append(process)

    def is_whole(self) -> bool:
        """Whether all processes live."""
        return all(process.is_alive() for process in self.processes)

    def is_saving(self) -> bool:
        """Whether these processes have begun a checkpoint that isn't complete, or isn't `latest` yet."""
        newer = [path for path in self.run_dir.glob("step_*") if was_changed(path, self.start_ns)]
        latest = read_latest(self.run_dir) or 0
        return any(path.suffix == ".tmp" or int(path.name.removeprefix("step_")) > latest for path in newer)

    def kill(self, victims: list[int]) -> None:
        for rank in victims:
            os.kill(self.processes[rank].pid, signal.SIGKILL)

    def wait(self, max_sec: float) -> None:
        """Wait for the end of all ranks; Fault if one takes longer."""
        deadline = time.monotonic() + max_sec
        for rank, process in enumerate(self.processes):
            process.join(max(0, deadline - time.monotonic()))
            if process.is_alive():
                self.kill([rank for rank, process in enumerate(self.processes) if process.is_alive()])
                raise Fault(f"rank {rank} of {len(self.processes)} hung; see {self.log_path}")

    def end_well(self) -> None:
        """Wait for the end of undisturbed processes; Fault if one fails."""
        self.wait(MAX_LIFE_SEC)
        codes = [process.exitcode for process in self.processes]
        if any(codes):
            raise Fault(f"ranks ended with {codes}; {self.log_path} ends:\n"
                        + self.log_path.read_text(encoding="utf-8")[-2000:])


def was_changed(path: Path, since_ns: int) -> bool:
    """Whether a folder exists and it, or its list of entries, has changed since then."""
    try:
        return path.stat().st_ctime_ns > since_ns
    except FileNotFoundError:
        return False


def run_rank(work: Callable[[str], object], tag: str, env: dict[str, str], log_path: Path) -> None:
    """The main of a forked process: become a rank, and end as a script does."""
    os.environ.update(env)
    with open(log_path, "a", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    run_script(lambda argv: work(tag))


def train_rank(tag: str) -> None:
    base_train.main(["--model-tag", tag, *TRAIN_ARGS])


def write_texts(folder: Path, seed: int, num_docs: int) -> None:
    """Documents of random words under a grammar simple enough that a tiny model learns some of it."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(80)]
    folder.mkdir()
    for doc in range(num_docs):
        sentences = [f"The {rng.choice(words)} {rng.choice(words)}s the {rng.choice(words)}." for _ in range(20)]
        (folder / f"{doc:03d}.txt").write_text(" ".join(sentences), encoding="utf-8")


def make_data(tag: str) -> None:
    """A toy corpus and a tokenizer."""
    folder = get_base_dir() / "texts"
    write_texts(folder, 0, NUM_DOCS)
    dataset.main(["--source", "files", "--path", str(folder), "--name", "toy"])
    tok_train.main(["--data", "toy", "--vocab-size", "320"])


# ---------------------------------------------------------------------------------------------------------------------
# Kills


def torture(undisturbed: Life, series: str, args: argparse.Namespace, rng: random.Random,
            life_sec: float) -> Iterator[Kill]:
    """Yield args.kills kills; each run is continued to its end and compared, Fault if it differs."""
    num_killed, run = 0, 0
    while num_killed < args.kills:
        run += 1
        is_finished = False
        while not is_finished:
            world_size = args.ranks if series == "bitwise" else rng.choice(WORLD_SIZES)
            life = Life(undisturbed.base_dir, f"{series}-{run}", train_rank, world_size)
            latest_step = read_latest(life.run_dir) or 0
            is_finished = num_killed == args.kills or not wait_for_kill(life, latest_step, rng, life_sec)
            if is_finished:
                life.end_well()
            else:
                num_killed += 1
                yield kill_ranks(life, series, run, latest_step, rng)
        differences = compare_runs(life.run_dir, undisturbed.run_dir, series == "bitwise")
        if differences:
            raise Fault(f"{life.run_dir} is not the undisturbed run: " + "; ".join(differences))
        print(f"{series} run {run} is the undisturbed run" +
              (", bit for bit" if series == "bitwise" else " but for rounding"), flush=True)
        shutil.rmtree(life.run_dir)


def wait_for_kill(life: Life, latest_step: int, rng: random.Random, life_sec: float) -> bool:
    """Wait for a random time; False if the processes have ended before it."""
    delay_sec = rng.uniform(0, life_sec)
    if rng.random() < 0.5:
        delay_sec = 10 ** rng.uniform(*SAVE_DELAYS_LOG10_SEC)
        aimed = get_step_name(min(latest_step + SAVE_EVERY * rng.randint(1, 4), NUM_STEPS)) + ".tmp"
        while life.is_whole() and not was_changed(life.run_dir / aimed, life.start_ns):
            if time.monotonic() > life.start + MAX_LIFE_SEC:
                life.wait(0)
            time.sleep(2e-4)
    deadline = time.monotonic() + delay_sec
    while life.is_whole() and time.monotonic() < deadline:
        time.sleep(min(1e-2, max(0, deadline - time.monotonic())))
    return life.is_whole()


def kill_ranks(life: Life, series: str, run: int, latest_step: int, rng: random.Random) -> Kill:
    """Kill all ranks or one, and check the newest checkpoint."""
    ranks = list(range(len(life.processes)))
    victim = rng.choice(ranks) if len(ranks) > 1 and rng.random() < 1 / 3 else None
    rng.shuffle(ranks)
    kill_time, in_save = time.monotonic(), life.is_saving()
    life.kill(ranks if victim is None else [victim])
    life.wait(2 * TIMEOUT_SEC + 60)
    dying_sec = time.monotonic() - kill_time
    step = read_latest(life.run_dir) or 0
    if step < latest_step:
        raise Fault(f"the newest checkpoint of {life.run_dir} was of step {latest_step}, now of {step}")
    if step:
        try:
            verify_files(life.run_dir, step, list(load_meta(life.run_dir, step)["files"]))
        except (UserError, OSError) as error:
            raise Fault(f"after a kill, {error}") from error
    return Kill(series, run, len(ranks), victim, in_save or life.is_saving(), step, kill_time - life.start, dying_sec)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def compare_runs(run_dir: Path, expected_dir: Path, is_exact: bool) -> list[str]:
    """The differences between two runs' last checkpoints and logs, a sentence each."""
    return [f"{kind}: {text}" for kind, compare in (("checkpoint", compare_checkpoints), ("metrics", compare_metrics))
            for text in compare(run_dir, expected_dir, is_exact)]


def compare_checkpoints(run_dir: Path, expected_dir: Path, is_exact: bool) -> list[str]:
    steps = [read_latest(folder) for folder in (run_dir, expected_dir)]
    if steps[0] != steps[1] or steps[0] != list_steps(run_dir)[-1]:
        return [f"step {steps[0]} instead of {steps[1]}"]
    metas = [load_meta(folder, steps[0]) for folder in (run_dir, expected_dir)]
    differences = [f"{key} {metas[0][key]} instead of {metas[1][key]}"
                   for key in ("loader", "optimizer_steps", "scaler") if metas[0][key] != metas[1][key]]
    folders = [folder / get_step_name(steps[0]) for folder in (run_dir, expected_dir)]
    if is_exact:
        if metas[0]["files"].keys() != metas[1]["files"].keys():
            return [*differences, f"files {list(metas[0]['files'])} instead of {list(metas[1]['files'])}"]
        return differences + [name for name in metas[0]["files"]
                              if (folders[0] / name).read_bytes() != (folders[1] / name).read_bytes()]
    tensors, expected = (load_whole_state(folder, meta) for folder, meta in zip(folders, metas, strict=True))
    if tensors.keys() != expected.keys():
        return [*differences, f"tensors {sorted(tensors.keys() ^ expected.keys())}"]
    gaps = {name: float((tensors[name] - expected[name]).abs().max()) for name in tensors}
    return differences + [f"{name} differs by {gap:.1e}" for name, gap in gaps.items() if not gap < MAX_PARAM_GAP]


def load_whole_state(folder: Path, meta: dict) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state, from the files of any number of ranks."""
    state = SavedState(folder, [name for name in meta["files"] if name != MODEL_NAME])
    whole = {name: state.read(name, 0, num_rows, num_rows) for name, num_rows in state.num_rows.items()}
    return whole | load_tensors(folder / MODEL_NAME, torch.device("cpu"))


def compare_metrics(run_dir: Path, expected_dir: Path, is_exact: bool) -> list[str]:
    left_out = PER_PROCESS_KEYS if is_exact else PER_PROCESS_KEYS | PER_LANE_KEYS
    all_lines, expected = ([{key: value for key, value in line.items() if key not in left_out}
                            for line in read_metrics(folder)] for folder in (run_dir, expected_dir))
    places = [[(line["kind"], line["step"]) for line in lines] for lines in (all_lines, expected)]
    if places[0] != places[1]:
        return [f"lines {places[0]} instead of {places[1]}"]
    return [f"{line['kind']} line of step {line['step']}: {key} {line.get(key)} instead of {wanted.get(key)}"
            for line, wanted in zip(all_lines, expected, strict=True) for key in line.keys() | wanted.keys()
            if not is_same(line.get(key), wanted.get(key), is_exact)]


def is_same(value: object, expected: object, is_exact: bool) -> bool:
    """Whether two values are equal, or (not is_exact) equal but for rounding."""
    if is_exact or not isinstance(value, float):
        return value == expected
    return abs(value - expected) < MAX_LOSS_GAP


if __name__ == "__main__":
    run_script(main)
