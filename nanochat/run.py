"""A run's log, its steps' figures, progress, identity and stop signals."""

import contextlib
import gc
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat import common, devices
from nanochat.common import Ranks, UserError, gather, get_ranks, now, print0
from nanochat.memory import GIB
from nanochat.scaling import Plan

if TYPE_CHECKING:
    import torch


class RunLog:
    """run.json (what the run is) and metrics.jsonl (what happened, one line per event); wandb too when a name is given.
    Only rank 0 writes. A log that is reopened at a step drops the lines of later steps, which are written again."""

    def __init__(self, run_dir: Path, info: dict, ranks: Ranks, *, resume_step: int | None = None,
                 wandb_name: str | None = None, start_time: float | None = None):
        """start_time: of the program, by perf_counter; None: now"""
        self.run_dir, self.active, self.info, self.wandb = run_dir, ranks.rank == 0, info, None
        self.steps: StepLog | None = None   # which may owe the last step's line
        self.start_time = time.perf_counter() if start_time is None else start_time
        if not self.active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        if wandb_name:
            self.wandb = init_wandb(wandb_name, info, run_dir)
        lines = []
        if resume_step is not None:
            self.info = continue_info(info, run_dir, resume_step)
            lines = [line for line in read_metrics(run_dir) if line["step"] <= resume_step]
        self._start_file(lines)
        # Evaluations of the step come after its checkpoint, and some are done again
        self.repeatable = {(line["kind"], line["step"]) for line in lines
                           if line["step"] == resume_step and line["kind"] != "train"}
        self.update(status="running")

    def _start_file(self, lines: list[dict]) -> None:
        """metrics.jsonl with these lines, to add others to."""
        path = self.run_dir / "metrics.jsonl"
        common.write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.file = open(path, "a", buffering=1, encoding="utf-8")

    def update(self, **info) -> None:
        """Change entries of run.json."""
        self.info = self.info | info
        if self.active:
            common.write_json(self.run_dir / "run.json", self.info)

    def add_decision(self, what: str, value: object, why: str) -> None:
        """Record a decision that is made while the run is under way."""
        self.update(decisions=[*self.info["decisions"], {"what": what, "value": str(value), "why": why}])

    def write(self, kind: str, step: int, **values) -> None:
        """Add a line to metrics.jsonl; units are in the keys."""
        if not self.active:
            return
        if (kind, step) in self.repeatable:
            self.repeatable.remove((kind, step))
            self.file.close()
            lines = read_metrics(self.run_dir)
            self._start_file([line for line in lines if (line["kind"], line["step"]) != (kind, step)])
        # the gradient norm of a skipped fp16 step is infinite, for which JSON has no number
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}
        self.file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        if self.wandb and kind != "sample":
            self.wandb.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.active and error is not None and self.info["status"] == "running":
            if self.steps:
                self.steps.finish_after_error()
            self.update(reason=f"{kind.__name__}: {error}")
            self.close("failed")

    def close(self, status: str) -> None:
        """Record how the run ended, 'finished', 'stopped' or 'failed', and the seconds that all its parts took."""
        wall_sec = self.info.get("earlier_sec", 0.0) + time.perf_counter() - self.start_time
        self.update(status=status, ended=now(), wall_sec=wall_sec)
        if self.active:
            self.file.close()
            if self.wandb:
                self.wandb.finish()


def decide(decisions: list[dict], what: str, value: object, why: str) -> object:
    """Print an automatic decision and add it to those of run.json; returns the value."""
    decisions.append({"what": what, "value": str(value), "why": why})
    print0(f"{what}: {value} ({why})")
    return value


def read_info(run_dir: Path) -> dict:
    """run.json of a run; {} where there is none, or a damaged one."""
    try:
        return json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def continue_info(info: dict, run_dir: Path, step: int) -> dict:
    """run.json of a run that is continued: the beginning stays as it was, this process's part is added to `resumed`."""
    if not (before := read_info(run_dir)):
        return info
    own_keys = ("created", "argv", "decisions", "predicted", "environment")
    part = {"step": step, **{key: info[key] for key in own_keys if key in info}}
    last_sec = max((line.get("elapsed_sec") or 0.0 for line in read_metrics(run_dir)), default=0.0)
    return {**info, **{key: before[key] for key in own_keys if key in before},
            # A killed part leaves its training's seconds alone
            "earlier_sec": max(before.get("wall_sec") or 0.0, before.get("earlier_sec") or 0.0, last_sec),
            "resumed": [*before.get("resumed", []), part]}


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, each with its kind and step; [] without the file.
    Lines that can't be read are left out, such as the last one of a run that was killed while it wrote."""
    path, lines = run_dir / "metrics.jsonl", []
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            lines.append({**line, "kind": str(line["kind"]), "step": int(line.get("step", 0))})
    return lines


def import_wandb(name: str):
    """The module, which is optional: it is imported here only."""
    try:
        import wandb
    except ImportError:
        raise UserError(f"--run {name} needs wandb, which isn't installed: pip install wandb, or drop --run") from None
    return wandb


def init_wandb(name: str, info: dict, run_dir: Path):
    """A wandb run, resumed when this run was logged there before."""
    wandb = import_wandb(name)
    id_path = run_dir / "wandb_id"
    if not id_path.exists():
        common.write_atomic(id_path, wandb.util.generate_id())
    wandb_id = id_path.read_text(encoding="utf-8")
    try:
        return wandb.init(project="nanochat", name=name, id=wandb_id, resume="allow", config=info)
    except wandb.Error as error:
        raise UserError(f"--run {name}: wandb can't be used ({error}); log in, or drop --run") from None


# Of a step of a mixture of experts, all ranks together (moe.Balance): the load's coefficient of variation, mean of the
# layers and worst one, the most loaded expert over the mean, experts without a token in all layers, the entropy of a
# token's normalised scores, the largest bias
ROUTING_FIGURES = ("moe_load_cv", "moe_worst_load_cv", "moe_most_loaded", "moe_idle_experts", "moe_router_nats",
                   "moe_max_bias")


@dataclass(frozen=True)
class StepStats:
    """The figures of one optimizer step, over all ranks."""
    loss:        float   # sum(weights * nll) / num_targets, in nats
    grad_norm:   float   # before the update, over all parameters
    num_targets: int     # supervised tokens of the step
    skipped:     str     # why the optimizer was not stepped: '', 'no targets', 'no weights' or 'fp16 overflow'
    routing:     dict = field(default_factory=dict)    # by ROUTING_FIGURES; {} of a dense model

    def check_finite(self, step: int) -> None:
        """Stop the run when the loss or the gradient is not a number: no later step could mend that."""
        if not math.isfinite(self.loss) or not (self.skipped or math.isfinite(self.grad_norm)):
            raise UserError(f"the loss is {self.loss:g} and the gradient norm {self.grad_norm:g} at step {step}, so "
                            "the run stopped; the last checkpoint is intact, go on from it with --allow-mismatch and a "
                            "lower learning rate")


@dataclass(frozen=True)
class PendingStats:
    """The figures of a step that a GPU may still be computing: Python is ahead of it."""
    figures:     "torch.Tensor"         # loss, times its scale, gradient norm, ROUTING_FIGURES or none; in host memory
    copied:      "torch.Event | None"   # when the figures are there; None: they are
    loss_scale:  float
    num_targets: int
    skipped:     str                    # as in StepStats

    def read(self) -> StepStats:
        """Wait for the step's end."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, grad_norm, *routing = self.figures.tolist()
        return StepStats(loss / self.loss_scale, grad_norm, self.num_targets, self.skipped,
                         dict(zip(ROUTING_FIGURES, routing, strict=False)))


@dataclass(frozen=True)
class TakenStep:
    """A step whose line of the log isn't written yet."""
    step:       int
    begin_time: float                 # of time.perf_counter
    stats:      PendingStats
    values:     dict                  # to log beside its figures
    flops:      float | None = None   # where its rows are shorter than the context


# How far a loss is above the running mean when it has jumped, in nats and in root mean squares (RMS) of its changes
# from step to step: twice in a row, or at once. A fault that turned the model's sign made 14 nats, 47 and 82 RMS; odd
# text in healthy runs up to 11 (dev/LOG.md, "A loss that jumps")
JUMP_NATS, JUMP_RMS = 0.5, 4.0
JUMP_NATS_AT_ONCE, JUMP_RMS_AT_ONCE = 3.0, 16.0
JUMP_STEPS = 20    # from which the mean and the changes are known


class Progress:
    """Smoothed loss, speed, memory and time of a run, and the console line that shows them.

    peak_flops: FLOP/s of all ranks together, against which MFU is measured; None where no figure is known
    state:      of the run that is continued
    """

    def __init__(self, plan: Plan, peak_flops: float | None, device: "torch.device", state: dict | None = None):
        self.plan, self.peak_flops, self.device = plan, peak_flops, device
        self.loss_ema, self.num_losses, self.elapsed_sec, self.num_skipped = 0.0, 0, 0.0, 0
        # Squared changes of the loss from step to step, and their number; what the next loss is compared with, if the
        # last one may have been a jump's first: [mean before it, bound]
        self.last_loss, self.change_ema, self.num_changes, self.suspected, self.num_jumps = None, 0.0, 0, None, 0
        vars(self).update(state or {})
        self.recent_sec: list[float] = []
        self.end_time = -math.inf   # when the last step's figures were there

    def get_state(self) -> dict:
        """The state that a continued run starts from."""
        return {key: vars(self)[key] for key in (
            "loss_ema", "num_losses", "elapsed_sec", "num_skipped", "last_loss", "change_ema", "num_changes",
            "suspected", "num_jumps")}

    def update(self, stats: "StepStats", step_sec: float, flops: float | None = None) -> dict:
        """The values to log for a step; flops: those of the step, where its rows are shorter than the context."""
        if stats.skipped:
            self.num_skipped += 1
        else:
            if self.last_loss is not None:
                self.num_changes += 1
                self.change_ema = 0.9 * self.change_ema + 0.1 * (stats.loss - self.last_loss)**2
            self.last_loss = stats.loss
            self.num_losses += 1
            self.loss_ema = 0.9 * self.loss_ema + 0.1 * stats.loss
        self.elapsed_sec += step_sec
        self.recent_sec = [*self.recent_sec[-49:], step_sec]
        flops = self.plan.batch_tokens * self.plan.flops_per_token if flops is None else flops
        values = asdict(stats)
        routing = values.pop("routing")
        return {**values, **routing, "loss_smooth": self.get_smooth_loss(), "num_skipped": self.num_skipped,
                "num_jumps": self.num_jumps, "step_ms": step_sec * 1e3,
                "tokens_per_sec": self.plan.batch_tokens / step_sec,
                "mfu_pct": 100 * (flops / step_sec / self.peak_flops) if self.peak_flops else None,
                "elapsed_sec": self.elapsed_sec, "peak_memory_bytes": devices.get_peak_memory_bytes(self.device)}

    def find_jump(self, loss: float) -> float | None:
        """The mean before a jump where this step's loss is one: very far above it at once, or far above it as the last
        loss was. For the next step, before `update`. A jump's own change raises the bound for some 20 steps after it,
        so that it counts once."""
        mean, suspected, self.suspected = self.get_smooth_loss(), self.suspected, None
        if suspected:
            has_jumped, mean = loss > suspected[1], suspected[0]
        elif self.num_changes < JUMP_STEPS:
            return None
        else:
            rms = math.sqrt(self.change_ema / (1 - 0.9**self.num_changes))
            has_jumped = loss > mean + max(JUMP_NATS_AT_ONCE, JUMP_RMS_AT_ONCE * rms)
            bound = mean + max(JUMP_NATS, JUMP_RMS * rms)
            self.suspected = [mean, bound] if loss > bound and not has_jumped else None
        self.num_jumps += has_jumped
        return mean if has_jumped else None

    def measure_sec(self, begin_time: float) -> float:
        """Seconds of a step whose figures are there now: since it was begun, or since the end of the one before, where
        it was queued behind that. Times are of time.perf_counter."""
        begin_time, self.end_time = max(begin_time, self.end_time), time.perf_counter()
        return self.end_time - begin_time

    def get_smooth_loss(self) -> float:
        """The running mean of the loss, debiased by the number of losses in it."""
        return self.loss_ema / (1 - 0.9**self.num_losses) if self.num_losses else 0.0

    def get_results(self) -> dict:
        """What a finished run is known by, for run.json."""
        return {"train_loss": self.get_smooth_loss(), "train_sec": self.elapsed_sec, "num_jumps": self.num_jumps,
                "peak_memory_bytes": devices.get_peak_memory_bytes(self.device)}

    def estimate_left_min(self, step: int) -> float:
        """Minutes to the end of the plan, by the median of the last steps."""
        return (self.plan.num_iterations - step) * statistics.median_high(self.recent_sec) / 60

    def format_line(self, step: int, values: dict) -> str:
        mfu = "" if values["mfu_pct"] is None else f" | mfu {values['mfu_pct']:.1f}%"
        load = f" | load cv {values['moe_load_cv']:.2f}" if "moe_load_cv" in values else ""    # over the experts
        return (f"step {step:05d}/{self.plan.num_iterations:05d} | loss {values['loss_smooth']:.4f} "
                f"| grad {values['grad_norm']:.3f} | lr x{values['lr_frac']:.2f} | {values['step_ms']:.0f} ms "
                f"| {values['tokens_per_sec']:,.0f} tok/s{mfu} | mem {values['peak_memory_bytes'] / GIB:.2f} GiB{load} "
                f"| epoch {values['epoch']} | {self.estimate_left_min(step):.1f} min left" +
                (f" | SKIPPED: {values['skipped']}" if values["skipped"] else ""))


LATE_SEC = 5    # that a run which failed waits for the figures of its last step (assumption, not studied)


class StepLog:
    """The lines of a run's steps: a CPU's at once, a GPU's when the step after it is queued. The GPU would idle while
    Python waits for a step's figures and writes them.

    first_step:      where this process begins
    predicted_bytes: memory that a step was predicted to need, told beside the first one's measured peak; None: untold
    """

    def __init__(self, log: RunLog, progress: Progress, first_step: int, predicted_bytes: int | None):
        gc.unfreeze()  # what an earlier run of this process froze
        self.log, self.progress, self.first_step, self.predicted_bytes = log, progress, first_step, predicted_bytes
        self.late: TakenStep | None = None
        log.steps = self

    def add(self, taken: TakenStep) -> None:
        """Log a step, or the one before it where a GPU may still be computing this one."""
        self.finish()
        self.late = taken
        if taken.stats.copied is None:  # not asked whether it is there by now: ranks would answer differently
            self.finish()

    def finish(self) -> None:
        """Log the step that isn't logged yet; called before anything but a step happens."""
        taken, self.late = self.late, None
        if taken:
            stats = taken.stats.read()
            stats.check_finite(taken.step - 1)
            before = None if stats.skipped else self.progress.find_jump(stats.loss)
            values = self.progress.update(stats, self.progress.measure_sec(taken.begin_time), taken.flops)
            values |= taken.values
            self.write(taken.step, values, self.progress.format_line(taken.step, values))
            if before is not None:
                print0(f"warning: the loss has jumped from {before:.3f} to {stats.loss:.3f}; where it stays so high, "
                       "what was learned is lost. From a checkpoint before it, --resume STEP --allow-mismatch with a "
                       "lower learning rate goes another way")

    def finish_after_error(self) -> None:
        """Log the last step though the one after it failed, if its figures are there soon. They never come where the
        GPU has failed, or waits for a rank that has died."""
        deadline = time.monotonic() + LATE_SEC
        with contextlib.suppress(RuntimeError, OSError, UserError):    # a GPU that failed answers with its error
            while self.late and not self.late.stats.copied.query():
                if time.monotonic() > deadline:
                    return
                time.sleep(0.01)
            self.finish()

    def write(self, step: int, values: dict, line: str) -> None:
        """Log a step and print its line; after the first one, the measured memory beside the predicted."""
        self.log.write("train", step, **values)
        print0(line)
        if step > self.first_step + 1:
            return
        # All that exists by now stays to the end. To go through it takes the garbage collector a tenth of a second, in
        # the midst of some rank's step, which all others then wait for
        gc.collect()
        gc.freeze()
        if self.predicted_bytes is not None:
            print0(f"memory: {values['peak_memory_bytes'] / GIB:.2f} GiB at the peak of the first step, "
                   f"{self.predicted_bytes / GIB:.2f} predicted")


def check_ranks(run_dir: Path, settings: dict) -> None:
    """Refuse ranks that were started with other settings than rank 0, or don't see its folder. Collective."""
    if not common.get_process_group():
        return
    rank, folder = get_ranks().rank, run_dir.parent
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp") if rank == 0 else contextlib.nullcontext() as probe:
        name, expected = gather((probe and Path(probe.name).name, settings))[0]
        sides = describe_differences(expected, settings, "rank 0", f"rank {rank}").split("; ")[0]  # the first is enough
        answers = gather((sides, (folder / name).exists()))
    for other, (sides, sees_folder) in enumerate(answers):
        if not sees_folder:
            raise UserError(f"rank {other} doesn't see the folder {folder} of rank 0; set NANOCHAT_BASE_DIR to a disk "
                            "that all nodes share")
        if sides:
            raise UserError(f"the ranks were started with different settings ({sides}); start all with the same "
                            "command, code and data")


def compare_with_saved(saved: dict, meta: dict, defaults: dict, run_dir: Path, allow_mismatch: bool) -> list[dict]:
    """Compare a run's identity (stage.Recipe.get_meta) and its environment with those of the checkpoint it continues.

    Another identity (data, model, schedule, flags) is refused, both sides named, unless it is allowed. Returns the
    differences that are not refused, printed, as decisions for run.json. A flag that the checkpoint doesn't know had
    its default.
    """
    sides = describe_differences(defaults | saved["identity"], meta["identity"])
    if sides and not allow_mismatch:
        raise UserError(f"the run in {run_dir} can't continue with other settings ({sides}); go back to the saved "
                        "ones, start anew with --resume none or another "
                        f"{'--model-tag' if run_dir.parent.name == 'base' else '--out-tag'}, or add --allow-mismatch")
    changes = [("settings that don't match", "--allow-mismatch", sides)]
    before, current = saved.get("environment", {}), meta["environment"]
    # Warned, not refused: other code may be another model, or a fault mended. Older runs know their commit alone
    for key in ("code" if "code" in before else "git_revision", "python", "packages"):
        sides = describe_differences({key: before.get(key)}, {key: current[key]})
        changes.append(("another version", "the run goes on with it", sides))
    decisions = [{"what": what, "value": sides, "why": why} for what, why, sides in changes if sides]
    for decision in decisions:
        print0(f"warning: {decision['what']}: {decision['value']} ({decision['why']})")
    return decisions


def describe_differences(saved: dict, current: dict, then: str = "saved", now: str = "now") -> str:
    """'key: saved 1, now 2; ...' for the entries of `current` that `saved` has otherwise."""
    saved, current = flatten(saved), flatten(current)

    def show(value: object, other: object) -> str:    # six digits of a number, where they tell it from the other
        short = f"{value:.6g}" if isinstance(value, float) else str(value)
        return short if not isinstance(other, float) or short != f"{other:.6g}" else str(value)
    return "; ".join(f"{key}: {then} {show(saved.get(key), value)}, {now} {show(value, saved.get(key))}"
                     for key, value in current.items() if saved.get(key) != value)


def flatten(settings: dict) -> dict:
    """{"plan": {"a": 1}} as {"plan.a": 1}."""
    return {f"{key}.{name}" if name else key: inner for key, value in settings.items()
            for name, inner in (value if isinstance(value, dict) else {"": value}).items()}


ECHO_SEC = 3  # a signal may come twice: to all processes of a terminal or a job, and once more from torchrun
# What ends a session: a person, a job system or a shut-down, a terminal that closes (Windows has no SIGHUP)
STOP_SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM",
                **({signal.SIGHUP: "SIGHUP"} if hasattr(signal, "SIGHUP") else {})}


class StopSignal:
    """STOP_SIGNALS as a flag that the loop reads between steps; a second Ctrl-C stops at once.
    A SIGHUP that this process was started to ignore, as by nohup, stays ignored."""

    def __enter__(self) -> "StopSignal":
        self.signum, self.first_time, self.error = 0, 0.0, None
        self.previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS
                         if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame) -> None:
        if self.signum:
            if signum == signal.SIGINT and time.monotonic() - self.first_time > ECHO_SEC:
                raise KeyboardInterrupt
            return
        self.signum, self.first_time = signum, time.monotonic()
        message = (f"\n{STOP_SIGNALS[signum]}: will save after this step and stop; Ctrl-C after {ECHO_SEC} s stops at "
                   "once\n")
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(sys.stderr.fileno(), message.encode())  # not print: a signal may arrive inside one

    def fail(self, error: UserError) -> None:
        """Make the loop save and stop as if by a signal, because it can't go on."""
        self.error = error

    def is_set(self) -> bool:
        return self.signum > 0 or self.error is not None

    def end(self) -> None:
        """End with the error, or with the signal's exit code: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
        A rank that stops because another one was told to has no signal of its own, and ends as by SIGTERM."""
        if self.error:
            raise self.error
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + (self.signum or signal.SIGTERM))
