"""The training step that all stages share: its rows, its gradients, and what happens when memory runs out.

    Batch -> micro-batches -> nll (B, T) -> sum(weights * nll) / supervised targets of the WHOLE step -> backward
      -> optimizer (sum over ranks, update, gather) -> StepStats

B rows, T tokens.
"""

import contextlib
import gc
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.common import UserError, any_rank, get_first_line, is_out_of_memory, print0, sum_over_ranks
from nanochat.cross_entropy import LossScaler
from nanochat.gpt import GPT
from nanochat.memory import list_divisors
from nanochat.optim import MuonAdamW
from nanochat.run import PendingStats, RunLog, StepStats, StopSignal


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and their targets: this rank's part of one optimizer step, or a slice of it."""
    inputs:  Tensor          # (B, T) int64 token ids
    targets: Tensor          # (B, T) int64 next token, -1 where nothing is to be learned
    weights: Tensor | None   # (B, T) float32 factor on each target's loss; None means 1 everywhere

    def map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with each of its tensors changed alike."""
        return Batch(change(self.inputs), change(self.targets), None if self.weights is None else change(self.weights))

    def to(self, device: torch.device) -> "Batch":
        """The same rows on another device; from pinned memory the copy runs beside the computation."""
        # Only CUDA keeps the rows until they are copied; MPS reads them later, freed or not (pytorch, issue 139550)
        return self.map(lambda tensor: tensor.to(device, non_blocking=torch.device(device).type == "cuda"))

    def cut(self, row_tokens: int) -> "Batch":
        """The same tokens as shorter rows, (B * T / row_tokens, row_tokens), for the sequence-length warm-up.

        No target is lost: the last one of a piece is the first input of the next. A piece starts at position 0 in the
        middle of a document, and sees none of the tokens before it.
        """
        return self.map(lambda tensor: tensor.view(-1, row_tokens))

    def split(self, num_rows: int) -> Iterator["Batch"]:
        """Micro-batches of at most `num_rows` rows."""
        for start in range(0, len(self.inputs), num_rows):
            yield self.map(operator.itemgetter(slice(start, start + num_rows)))


def train_step(model: GPT, optimizer: MuonAdamW, batch: Batch, micro_rows: int,
               scaler: LossScaler | None = None) -> StepStats:
    """`queue_step`, waited for."""
    return queue_step(model, optimizer, batch, micro_rows, scaler).read()


def queue_step(model: GPT, optimizer: MuonAdamW, batch: Batch, micro_rows: int,
               scaler: LossScaler | None = None) -> PendingStats:
    """One optimizer step on this rank's rows of it. Collective: all ranks call it.

    On a GPU it is queued: Python waits for nothing but the other ranks' Python (fp16: for the gradient norm). So the
    GPU has work while Python logs the step before and prepares the rows of the next.

    The loss is normalised once, by the targets of the whole step over all micro-batches and ranks, so it doesn't depend
    on how the step is cut. A step with nothing to learn leaves parameters and optimizer alone, on all ranks. So does a
    step that runs out of memory before the optimizer's update: all ranks raise OutOfMemory. Running out in the update
    ends the process: smaller micro-batches wouldn't help, and some parameters are updated already.
    """
    is_target = batch.targets >= 0
    has_weight = is_target if batch.weights is None else is_target & (batch.weights != 0)
    num_targets, num_weighted = sum_over_ranks(torch.stack((is_target.sum(), has_weight.sum()))).tolist()
    if num_targets == 0 or num_weighted == 0:
        return PendingStats(torch.zeros(2), None, 1.0, num_targets, "no weights" if num_targets else "no targets")
    scale, overflowed = scaler.scale if scaler else 1.0, False
    loss, problem = add_gradients(model, optimizer, batch, micro_rows, scale / num_targets)
    try:
        if problem is None:
            optimizer.reduce_gradients()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        problem = get_first_line(error)
    if problem:  # the others may have begun to send, and would wait for this rank: it sends zeros
        model.zero_grad()
        free_memory(model.get_device())
        optimizer.reduce_gradients()
    if any_rank(problem is not None)[0]:
        optimizer.zero_grad()
        free_memory(model.get_device())
        raise OutOfMemory(problem or "another rank did")
    if scaler:
        torch._foreach_div_(optimizer.wait_gradients(), scale)
        grad_norm = optimizer.get_grad_norm()
        overflowed = not math.isfinite(grad_norm)
        scaler.update(overflowed)
    if overflowed:
        optimizer.zero_grad()
    else:
        grad_norm = optimizer.step()
    figures, copied = torch.stack((sum_over_ranks(loss), grad_norm.to(loss.dtype))), None
    if model.balance and not overflowed:
        figures = torch.cat((figures, model.balance.update().to(loss.dtype)))
    if figures.device.type in ("cuda", "xpu"):
        figures, copied = figures.to("cpu", non_blocking=True), torch.Event(figures.device)
        copied.record()
    return PendingStats(figures, copied, scale, num_targets, "fp16 overflow" if overflowed else "")


def add_gradients(model: GPT, optimizer: MuonAdamW, batch: Batch, micro_rows: int,
                  factor: float) -> tuple[Tensor, str | None]:
    """Gradients of sum(factor * weights * nll) of this rank's rows, micro-batch by micro-batch; in the last one the
    optimizer begins to sum them over the ranks. Returns this rank's sum of the loss, and the first line of the
    allocator's error where memory ran out, else None."""
    device = model.get_device()
    loss_dtype = torch.float64 if model.compute_dtype == torch.float64 else torch.float32
    loss = torch.zeros((), device=device, dtype=loss_dtype)  # the same on a rank that has no rows
    try:
        if model.balance:
            model.balance.begin()
        micros = list(batch.split(micro_rows))
        for i, micro in enumerate(micros):
            micro = micro.to(device)
            weights = torch.full(micro.targets.shape, factor, device=device, dtype=loss_dtype)  # (B, T)
            if micro.weights is not None:
                weights *= micro.weights
            micro_loss = model(micro.inputs, micro.targets, loss_reduction="sum", weights=weights)
            if model.balance:
                model.balance.count(micro.targets)
            with optimizer.reduce_in_backward() if i == len(micros) - 1 else contextlib.nullcontext():
                micro_loss.backward()
            loss = loss + micro_loss.detach()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # the text only: the error holds the frames that it came through, and these hold activations
        return loss, get_first_line(error)
    return loss, None


class OutOfMemory(Exception):
    """A step didn't fit into the memory of some rank: no rank has taken it, and its gradients are gone."""


def free_memory(device: torch.device) -> None:
    """Give back the memory of a step that failed."""
    gc.collect()  # autograd graphs may be parts of cycles
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


@dataclass
class TrainState:
    """What is trained, and how a rank's rows of a step are cut into micro-batches."""
    model:         GPT
    optimizer:     MuonAdamW
    scaler:        LossScaler | None   # with fp16
    rows_per_rank: int                 # of a step
    micro_rows:    int                 # of one forward pass, a divisor of these
    has_halved:    bool = False        # whether memory ran out once


def take_step(state: TrainState, batch: Batch, step: int, log: RunLog, stop: StopSignal) -> PendingStats | None:
    """One optimizer step of a run. Collective: all ranks call it.

    Where memory runs out, micro-batches get half their rows, from this very batch on, once if they can. After that
    `stop` is set, so that the loop saves and stops, and None says that nothing was learned from the batch.
    """
    # Sequence-length warm-up splits each row into several shorter rows; the tokens of a micro-batch stay the same
    micro_rows = state.micro_rows * len(batch.inputs) // state.rows_per_rank
    try:
        return queue_step(state.model, state.optimizer, batch, micro_rows, state.scaler)
    except OutOfMemory as error:
        problem = f"out of memory at step {step} with --device-batch-size {state.micro_rows}: {error}"
    smaller = [n for n in list_divisors(state.rows_per_rank) if n <= state.micro_rows // 2]
    if smaller and not state.has_halved:
        print0(f"warning: {problem}; going on with {smaller[-1]}, from this batch on")
        log.add_decision("rows of a micro-batch", smaller[-1], problem)
        state.micro_rows, state.has_halved = smaller[-1], True
        return take_step(state, batch, step, log, stop)
    advice = f"set --device-batch-size {smaller[-1]}" if smaller else "train a smaller model or on shorter rows"
    log.update(reason=problem)
    stop.fail(UserError(f"{problem}; {advice} and run again, nothing of the steps before is lost"))
    return None
