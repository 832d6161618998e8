"""How a run computes: dtype, attention, compilation, loss, micro-batch. Each choice is printed, recorded and kept."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from nanochat.common import UserError, gather, get_compute_dtype, get_peak_flops, get_peak_memory_bytes, get_ranks
from nanochat.compilation import choose_compile
from nanochat.cross_entropy import LOSSES
from nanochat.flash_attention import choose_backend
from nanochat.gpt import GPTConfig
from nanochat.gpus import expect_mfu, find_gpu
from nanochat.memory import (
    GIB,
    Machine,
    get_max_micro_tokens,
    largest_micro_rows,
    list_divisors,
    measure_free_bytes,
    predict_memory,
)
from nanochat.run import decide
from nanochat.scaling import Plan

EAGER_MFU = 0.3    # measured at depth 4 (dev/LOG.md, 2026-11-21); only to tell short runs from long ones


@dataclass(frozen=True)
class Wanted:
    """What a person asked for. Where that is auto, what the run began with is kept, or the run decides."""
    dtype:         str       = "auto"
    attention:     str       = "auto"
    compile:       str       = "auto"    # or on, off
    loss:          str       = "fused"   # a key of cross_entropy.LOSSES
    micro_rows:    int | str = "auto"
    deterministic: bool      = False
    kept:          dict      = field(default_factory=dict)   # choices from before: see Choices.to_json
    kept_why:      str       = ""


@dataclass(frozen=True)
class StepRows:
    """The rows that a rank has of each step."""
    config: GPTConfig
    T:      int    # tokens of the longest
    num:    int

    def predict(self, micro_rows: int, machine: Machine) -> int:
        """Bytes that a step needs in micro-batches of so many rows."""
        return predict_memory(self.config, self.T, micro_rows, machine, self.num // micro_rows).needed


@dataclass(frozen=True)
class Choices:
    """What a run has decided."""
    machine:      Machine
    peak_flops:   float | None   # of all ranks together, against which MFU is measured; None where no figure is known
    micro_rows:   int            # of a forward pass, a divisor of the rank's rows of a step
    memory_bytes: int            # predicted peak, as get_peak_memory_bytes will measure it

    def to_json(self, micro_rows: int) -> dict:
        """What a continued run must keep, or it wouldn't continue bit for bit; the rows may have been halved."""
        return {"dtype": self.machine.dtype, "attention": self.machine.attention, "micro_rows": micro_rows,
                "use_compile": self.machine.is_compiled}


def choose_how(wanted: Wanted, rows: StepRows, num_flops: float, device: torch.device,
               decisions: list[dict]) -> Choices:
    """Decide how a run computes, each choice printed and kept in `decisions`. Collective.

    num_flops: model FLOPs that the run still has before it, all ranks together
    """
    kept = dict(wanted.kept)
    if "use_compile" in kept:
        kept["compile"] = "on" if kept["use_compile"] else "off"

    def choose(name: str, find: Callable[[str], tuple]) -> object:
        """One choice: kept, or as `find` has it: (value, why). Ranks may measure differently, so rank 0's counts."""
        asked = getattr(wanted, name)
        is_kept = asked == "auto" and name in kept
        value, why = gather(find(kept[name] if is_kept else asked))[0]
        return decide(decisions, name, value, wanted.kept_why if is_kept else why)

    def find_attention(name: str) -> tuple[str, str]:
        if name == "auto" and wanted.deterministic and device.type == "cuda":
            name = "sdpa"  # the only backend there whose backward pass repeats bit for bit
        return choose_backend(device, dtype, rows.T, wanted=name)
    world_size = get_ranks().world_size
    dtype = choose("dtype", lambda name: get_compute_dtype(name, device))
    attention = choose("attention", find_attention)
    peak_flops = decide(decisions, "peak FLOP/s of one device", *get_peak_flops(device, dtype))
    peak_flops = peak_flops and peak_flops * world_size
    eager_sec = num_flops / (EAGER_MFU * peak_flops) if peak_flops else None
    use_compile = choose("compile", lambda name: choose_compile(name, device, eager_sec))
    machine = Machine(str(dtype).removeprefix("torch."), attention, use_compile, device.type, world_size, wanted.loss)
    free_bytes = gather(measure_free_bytes(device))
    micro_rows, why = choose_micro_rows(wanted, rows, machine, None if None in free_bytes else min(free_bytes))
    decide(decisions, "rows of a micro-batch", micro_rows, why)
    decide(decisions, "loss", machine.loss, ", ".join(
        f"{rows.predict(micro_rows, replace(machine, loss=loss)) / GIB:.2f} GiB with {loss}" for loss in LOSSES))
    # a CPU's measured peak is that of the whole process, with Python and all libraries
    loaded_bytes = get_peak_memory_bytes(device) if device.type == "cpu" else 0
    return Choices(machine, peak_flops, micro_rows, rows.predict(micro_rows, machine) + loaded_bytes)


def choose_micro_rows(wanted: Wanted, rows: StepRows, machine: Machine, free_bytes: int | None) -> tuple[int, str]:
    """Rows of a micro-batch, a divisor of the rank's rows, and why.

    As asked for; else as kept, where that is possible; else the largest that fits, up to the tokens beyond which more
    gain nothing.
    """
    divisors, max_tokens = list_divisors(rows.num), get_max_micro_tokens(machine.device_type)
    kept, fitting = wanted.kept.get("micro_rows"), largest_micro_rows(rows.config, rows.T, machine, free_bytes, rows.num)
    chosen = fitting or 1
    if wanted.micro_rows != "auto":
        chosen, why = wanted.micro_rows, "asked for"
        if chosen not in divisors:
            raise UserError(f"--device-batch-size {chosen} must divide the {rows.num} rows of a step on each rank;"
                            f" it may be {', '.join(map(str, divisors))}, or auto")
    # another number of ranks may not allow these rows; where they are possible they need no headroom: they have run
    elif kept in divisors and (free_bytes is None or rows.predict(kept, machine) <= free_bytes):
        chosen, why = kept, wanted.kept_why
    elif kept in divisors:
        why = f"{kept} {wanted.kept_why} would need {rows.predict(kept, machine) / GIB:.2f} GiB"
    elif not fitting:
        why = "the fewest there are"
    elif chosen == rows.num:
        why = "all of a step"
    elif divisors[divisors.index(chosen) + 1] * rows.T > max_tokens:
        why = f"at most {max_tokens:,} tokens"
    else:
        why = "largest that fits"
    needed_bytes = rows.predict(chosen, machine)
    free = "an unknown number" if free_bytes is None else f"{free_bytes / GIB:.2f}"
    warning = " and may not fit" if free_bytes is not None and needed_bytes > free_bytes else ""
    return chosen, f"{why}: {needed_bytes / GIB:.2f} of {free} GiB predicted{warning}; {rows.num // chosen} a step"


def predict_run(stage: str, choices: Choices, config: GPTConfig, plan: Plan) -> dict:
    """Memory of the run, and its time and speed where an MFU is known, for the report card to compare with."""
    machine, predicted = choices.machine, {"peak_memory_bytes": choices.memory_bytes}
    if machine.device_type == "cpu":
        predicted["memory_source"] = "live tensors beside the process before them, not what malloc keeps of freed ones"
    if stage == "rl":
        return predicted | {"mfu_source": "unknown, for most of a step is sampling"}
    if not machine.is_compiled or not choices.peak_flops:
        why = "without compilation" if choices.peak_flops else f"on {machine.device_type} devices"
        return predicted | {"mfu_source": f"unknown, for nothing was measured {why}"}
    name = "cpu" if machine.device_type == "cpu" else torch.get_device_module(machine.device_type).get_device_name(None)
    mfu, source = expect_mfu((find_gpu(name) or (name,))[0], config.n_layer)
    train_sec = plan.total_flops / (mfu * choices.peak_flops)
    return predicted | {"mfu_source": source, "mfu_pct": 100 * mfu, "train_sec": train_sec,
                        "tokens_per_sec": plan.total_tokens / train_sec}
