"""The training step that all stages share: the Batch, the step, the run's log, its progress and its stop signals."""

import contextlib
import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Ranks, UserError, is_out_of_memory, now, write_atomic, write_json
from nanochat.scaling import Plan


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and what to learn from them; this rank's part of one optimizer step, or a slice of it."""
    inputs:  Tensor          # (B, T) int64 token ids
    targets: Tensor          # (B, T) int64 next token, -1 where nothing is to be learned
    weights: Tensor | None   # (B, T) float32 factor on each target's loss; None means 1 everywhere

    def to(self, device: torch.device) -> "Batch":
        """The same rows on another device; from pinned memory the copy runs beside the computation."""
        weights = None if self.weights is None else self.weights.to(device, non_blocking=True)
        return Batch(self.inputs.to(device, non_blocking=True), self.targets.to(device, non_blocking=True), weights)

    def cut(self, row_tokens: int) -> "Batch":
        """The same tokens as shorter rows, (B * T / row_tokens, row_tokens).

        No target is lost: the last one of a piece is the first input of the next. A piece sees nothing of those
        before it and begins at position 0, in the middle of a document.
        """
        weights = None if self.weights is None else self.weights.view(-1, row_tokens)
        return Batch(self.inputs.view(-1, row_tokens), self.targets.view(-1, row_tokens), weights)

    def split(self, num_rows: int) -> Iterator["Batch"]:
        """Micro-batches of at most `num_rows` rows."""
        for start in range(0, len(self.inputs), num_rows):
            rows = slice(start, start + num_rows)
            yield Batch(self.inputs[rows], self.targets[rows], None if self.weights is None else self.weights[rows])


# ---------------------------------------------------------------------------------------------------------------------
# The step


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step did, over all ranks."""
    loss:        float   # sum(weights * nll) / num_targets, in nats
    grad_norm:   float   # before the update, over all parameters
    num_targets: int     # supervised tokens of the step
    skipped:     str     # why the optimizer was not stepped: '', 'no targets', 'no weights' or 'fp16 overflow'

    def check_finite(self, step: int) -> None:
        """Stop the run when the loss or the gradient is not a number: what follows could only be worse."""
        if not math.isfinite(self.loss) or not (self.skipped or math.isfinite(self.grad_norm)):
            raise UserError(f"the loss is {self.loss:g} and the gradient norm {self.grad_norm:g} at step {step}, so "
                            "the run stopped; the last checkpoint is intact, go on from it with --allow-mismatch and a "
                            "lower learning rate")


MIN_LOSS_SCALE = 2.0**-14  # a gradient that overflows even here is broken, not large


class LossScaler:
    """Keeps fp16 gradients in range: the loss is multiplied by a scale that halves on overflow, and doubles after
    `growth_steps` steps without one. The decision follows from the gradient norm over all ranks, so they agree."""

    def __init__(self, scale: float = 2.0**16, growth_steps: int = 2000):
        self.scale, self.growth_steps, self.num_good_steps = scale, growth_steps, 0

    def update(self, overflowed: bool) -> None:
        self.num_good_steps = 0 if overflowed else self.num_good_steps + 1
        if overflowed:
            self.scale /= 2
            if self.scale < MIN_LOSS_SCALE:
                raise UserError("fp16 gradients overflow at any scale of the loss, so the run stopped; the last "
                                "checkpoint is intact, go on with another --dtype")
        elif self.num_good_steps % self.growth_steps == 0:
            self.scale *= 2


class OutOfMemory(Exception):
    """A step didn't fit into the memory of some rank: no rank has taken it, and its gradients are gone."""


def train_step(model, optimizer, batch: Batch, micro_rows: int, scaler: LossScaler | None = None) -> StepStats:
    """One optimizer step on this rank's rows of it. Collective: all ranks call it.

    The loss is normalised once, by the targets of the whole step over all micro-batches and ranks, so it doesn't depend
    on how the step is cut. A step with nothing to learn leaves parameters and optimizer alone, on all ranks. So does
    one that runs out of memory before the optimizer's turn: all ranks raise OutOfMemory. In the optimizer's turn, which
    no cut makes smaller, the allocator's own error ends the rank, with some parameters updated and others not.
    """
    device = model.get_device()
    num_targets, num_weighted = count_targets(batch, device)
    if num_targets == 0 or num_weighted == 0:
        return StepStats(0.0, 0.0, num_targets, "no weights" if num_targets else "no targets")
    loss, problem = add_gradients(model, batch, micro_rows, (scaler.scale if scaler else 1.0) / num_targets)
    # Before the first gradient is sent: whoever sends one would wait for ever for the rank that ran out. With several
    # GPUs Python waits here for the backward pass; that this costs little beside it is an assumption, not studied
    if any_rank(problem is not None, device=device)[0]:
        optimizer.zero_grad()
        free_memory(device)
        raise OutOfMemory(problem or "another rank did")
    optimizer.reduce_gradients()
    scale, overflowed = 1.0, False
    if scaler:
        scale = scaler.scale
        torch._foreach_div_(optimizer.wait_gradients(), scale)
        grad_norm = optimizer.get_grad_norm()
        overflowed = not math.isfinite(grad_norm)
        scaler.update(overflowed)
    if overflowed:
        optimizer.zero_grad()
    else:
        grad_norm = optimizer.step()
    # read back last: a GPU must not run dry while Python waits for a number
    return StepStats(float(sum_over_ranks(loss)) / scale, float(grad_norm), num_targets,
                     "fp16 overflow" if overflowed else "")


def add_gradients(model, batch: Batch, micro_rows: int, factor: float) -> tuple[Tensor, str | None]:
    """Gradients of sum(factor * weights * nll) of this rank's rows, micro-batch by micro-batch, without other ranks.

    Returns that sum, and the first line of the allocator's error where memory ran out, else None.
    """
    device = model.get_device()
    loss_dtype = torch.float64 if model.compute_dtype == torch.float64 else torch.float32
    loss = torch.zeros((), device=device, dtype=loss_dtype)  # the same on a rank that has no rows
    try:
        for micro in batch.split(micro_rows):
            micro = micro.to(device)
            weights = torch.full(micro.targets.shape, factor, device=device, dtype=loss_dtype)
            if micro.weights is not None:
                weights *= micro.weights
            micro_loss = model(micro.inputs, micro.targets, loss_reduction="sum", weights=weights)
            micro_loss.backward()
            loss = loss + micro_loss.detach()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # no more than the text: the error holds the frames that it came through, and they hold activations
        return loss, (str(error).splitlines() or ["no details"])[0]
    return loss, None


def free_memory(device: torch.device) -> None:
    """Give back what a step that failed has left."""
    gc.collect()  # graphs may be parts of cycles
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def count_targets(batch: Batch, device: torch.device) -> tuple[int, int]:
    """(supervised tokens of the step, those with a weight), all ranks together; one rank doesn't ask the device."""
    is_target = batch.targets >= 0
    has_weight = is_target if batch.weights is None else is_target & (batch.weights != 0)
    counts = torch.stack((is_target.sum(), has_weight.sum()))
    num_targets, num_weighted = (sum_over_ranks(counts.to(device)) if dist.is_initialized() else counts).tolist()
    return num_targets, num_weighted


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; with one rank, the tensor."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(*flags: bool, device: torch.device) -> list[bool]:
    """For each flag, whether any rank has set it, so that all do the same. Collective: all ranks call it."""
    if not dist.is_initialized():
        return list(flags)
    return [count > 0 for count in sum_over_ranks(torch.tensor(flags, dtype=torch.int32, device=device)).tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# The log


class RunLog:
    """run.json (what the run is) and metrics.jsonl (what happened, a line an event); wandb too when a name is given.

    Only rank 0 writes. Reopened at a step, it drops the lines of later steps: they will be written again.
    """

    def __init__(self, run_dir: Path, info: dict, ranks: Ranks, *, resume_step: int | None = None,
                 wandb_name: str = ""):
        self.run_dir, self.active, self.info, self.wandb = run_dir, ranks.rank == 0, info, None
        if not self.active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        if wandb_name:
            self.wandb = init_wandb(wandb_name, info, run_dir)
        metrics_path = run_dir / "metrics.jsonl"
        if resume_step is not None:
            self.info = continue_info(info, run_dir, resume_step)
            # the line of the step itself stands, while what is evaluated after it is done again
            kept = [line for line in read_metrics(run_dir) if line["step"] < resume_step or
                    (line["step"] == resume_step and line["kind"] == "train")]
            write_atomic(metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = open(metrics_path, "a" if resume_step is not None else "w", buffering=1)
        self.update(status="running")

    def update(self, **info) -> None:
        """Change what run.json says."""
        self.info = self.info | info
        if self.active:
            write_json(self.run_dir / "run.json", self.info)

    def write(self, kind: str, step: int, **values) -> None:
        """Add a line to metrics.jsonl; units are in the keys."""
        if not self.active:
            return
        # JSON knows no infinity, which a skipped fp16 step's gradient norm is
        finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                  for key, value in values.items()}
        self.file.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
        if self.wandb and kind != "sample":
            self.wandb.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self.active and error is not None and self.info["status"] == "running":
            self.update(reason=f"{kind.__name__}: {error}")
            self.close("failed")

    def close(self, status: str) -> None:
        """Record how the run ended: 'finished', 'stopped' or 'failed'."""
        self.update(status=status, ended=now())
        if self.active:
            self.file.close()
            if self.wandb:
                self.wandb.finish()


def continue_info(info: dict, run_dir: Path, step: int) -> dict:
    """run.json of a run that goes on: it began when it began; each part keeps what was said when it began."""
    try:
        before = json.loads((run_dir / "run.json").read_text())
    except (FileNotFoundError, ValueError):
        return info
    own_keys = ("created", "argv", "decisions", "predicted", "environment")
    part = {"step": step, **{key: info[key] for key in own_keys if key in info}}
    return {**info, **{key: before[key] for key in own_keys if key in before},
            "resumed": [*before.get("resumed", []), part]}


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; a last line that a kill left half-written is passed over."""
    lines = []
    if not (run_dir / "metrics.jsonl").exists():
        return lines
    with open(run_dir / "metrics.jsonl", errors="replace") as file:
        for text in file:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def init_wandb(name: str, info: dict, run_dir: Path):
    """A wandb run, resumed when this run was logged there before; the package is asked for by name only."""
    try:
        import wandb
    except ImportError:
        raise UserError(f"--run {name} needs wandb, which isn't installed: pip install wandb, or drop --run") from None
    id_path = run_dir / "wandb_id"
    if not id_path.exists():
        id_path.write_text(wandb.util.generate_id())
    try:
        return wandb.init(project="nanochat", name=name, id=id_path.read_text(), resume="allow", config=info)
    except wandb.Error as error:
        raise UserError(f"--run {name}: wandb can't be used ({error}); log in, or drop --run") from None


class Progress:
    """Smoothed loss, speed and time of a run, and the line that shows them."""

    def __init__(self, plan: Plan, peak_flops: float | None, state: dict | None = None):
        self.plan, self.peak_flops = plan, peak_flops
        self.loss_ema, self.num_losses, self.elapsed_sec, self.num_skipped = 0.0, 0, 0.0, 0
        vars(self).update(state or {})
        self.recent_sec: list[float] = []

    def get_state(self) -> dict:
        """What a resumed run goes on with."""
        return {key: vars(self)[key] for key in ("loss_ema", "num_losses", "elapsed_sec", "num_skipped")}

    def update(self, stats: StepStats, step_sec: float, flops: float | None = None) -> dict:
        """The values to log for a step; flops: the step's, where its rows aren't whole."""
        if stats.skipped:
            self.num_skipped += 1
        else:
            self.num_losses += 1
            self.loss_ema = 0.9 * self.loss_ema + 0.1 * stats.loss
        self.elapsed_sec += step_sec
        self.recent_sec = [*self.recent_sec[-49:], step_sec]
        tokens_per_sec = self.plan.batch_tokens / step_sec
        flops = self.plan.batch_tokens * self.plan.flops_per_token if flops is None else flops
        mfu = flops / step_sec / self.peak_flops if self.peak_flops else None
        return {**asdict(stats), "loss_smooth": self.get_smooth_loss(), "num_skipped": self.num_skipped,
                "step_ms": step_sec * 1e3, "tokens_per_sec": tokens_per_sec,
                "mfu_pct": None if mfu is None else 100 * mfu, "elapsed_sec": self.elapsed_sec}

    def get_smooth_loss(self) -> float:
        """The running loss, debiased by the number of losses that it holds."""
        return self.loss_ema / (1 - 0.9**self.num_losses) if self.num_losses else 0.0

    def format_line(self, step: int, values: dict) -> str:
        median_sec = sorted(self.recent_sec)[len(self.recent_sec) // 2]
        left_min = (self.plan.num_iterations - step) * median_sec / 60
        mfu = "" if values["mfu_pct"] is None else f" | mfu {values['mfu_pct']:.1f}%"
        return (f"step {step:05d}/{self.plan.num_iterations:05d} | loss {values['loss_smooth']:.4f} "
                f"| grad {values['grad_norm']:.3f} | lr x{values['lr_frac']:.2f} | {values['step_ms']:.0f} ms "
                f"| {values['tokens_per_sec']:,.0f} tok/s{mfu} | mem {values['peak_memory_bytes'] / 2**30:.2f} GiB "
                f"| epoch {values['epoch']} | {left_min:.1f} min left" +
                (f" | SKIPPED: {values['skipped']}" if values["skipped"] else ""))


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


ECHO_SEC = 3  # a signal may come twice: to all processes of a terminal or a job, and once more from torchrun


class StopSignal:
    """Turns Ctrl-C or SIGTERM into a flag that the loop reads between steps; Ctrl-C once more stops at once."""

    def __enter__(self) -> "StopSignal":
        self.signum, self.first_time, self.error = 0, 0.0, None
        self.previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
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
        name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
        # not print: a signal may arrive inside one
        message = f"\n{name}: will save after this step and stop; Ctrl-C after {ECHO_SEC} s stops at once\n"
        os.write(sys.stderr.fileno(), message.encode())

    def fail(self, error: UserError) -> None:
        """Have the loop save and stop as if by a signal, because it can't go on."""
        self.error = error

    def is_set(self) -> bool:
        return self.signum > 0 or self.error is not None

    def end(self) -> None:
        """Leave with the exit code that the signal asks for, or with the error."""
        if self.error:
            raise self.error
        if self.signum == signal.SIGTERM:
            sys.exit(128 + signal.SIGTERM)
        raise KeyboardInterrupt
