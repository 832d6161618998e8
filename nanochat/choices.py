"""The flags that all training stages share, and the choices that a run makes where these are auto: dtype, attention,
compilation, fp8, micro-batch. Each choice is printed, recorded in run.json, and kept when the run is continued.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch

from nanochat import common, devices, memory, moe
from nanochat.checkpoint_manager import Checkpoint, SaveRules
from nanochat.command_line import add_compute_flags, int_or_all, int_or_never
from nanochat.common import UserError, gather
from nanochat.compilation import choose_compile
from nanochat.config import GPTConfig
from nanochat.cross_entropy import LOSSES
from nanochat.devices import get_peak_flops
from nanochat.flash_attention import BACKENDS, FLEX_BLOCK, choose_backend
from nanochat.fp8 import choose_fp8
from nanochat.memory import GIB, Machine, list_divisors, measure_free_bytes
from nanochat.presets import choose_knobs
from nanochat.run import decide, import_wandb
from nanochat.scaling import Plan, make_config, make_short_rows

# Each flag is part of a run's identity, which a continued run must have as before, unless it stands in FREE_FLAGS
MACHINE_FLAGS = {"device_type", "dtype", "fp8", "attention", "compile", "device_batch_size", "sample_rows"}  # rounding
# Flags that don't change what is learned: the one list, which resume, comparisons and sweeps read
FREE_FLAGS = MACHINE_FLAGS | {
    "run", "model_tag", "model_step", "out_tag", "resume", "stop_at", "allow_mismatch", "eval_every", "eval_tokens",
    "eval_examples", "eval_samples", "sample_every", "core_metric_every", "core_metric_max_per_task", "save_every",
    "save_every_minutes", "keep_last", "keep_every"}
# Flags whose outcome is part of the identity in their place: data, tokenizer, model, plan, rule, source
OUTCOME_FLAGS = {"data", "tokenizer", "preset", "depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern",
                 "knobs", "num_iterations", "target_flops", "target_param_data_ratio", "total_batch_size",
                 "weight_decay", "source", "num_epochs", "mixture", "tasks", "custom_json", "words", "max_new_tokens"}
LR_NAMES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")    # later stages take over the base run's


# The least and the most of a flag's number, where a stage has it and it is given
POSITIVE = math.ulp(0.0)
FLAG_RANGES = (
    dict.fromkeys(("num_iterations", "num_epochs", "total_batch_size", "examples_per_step"), (1, math.inf))
    | dict.fromkeys((*LR_NAMES, "weight_decay", "save_every_minutes", "warmup_steps", "seed"), (0, math.inf))
    | dict.fromkeys(("eval_tokens", "stop_at", "core_metric_max_per_task", "max_new_tokens"), (1, math.inf))
    | dict.fromkeys(("device_batch_size", "keep_last"), (1, math.inf))
    | dict.fromkeys(("sample_rows", "eval_examples", "eval_samples"), (1, 10**6))
    | dict.fromkeys(("warmdown_ratio", "final_lr_frac"), (0, 1))
    | dict.fromkeys(("init_lr_frac", "target_flops", "target_param_data_ratio"), (POSITIVE, math.inf)))


def take_identity(flags: dict[str, object]) -> dict[str, object]:
    """The flags that resume compares by value."""
    return {name: value for name, value in flags.items() if name not in FREE_FLAGS | OUTCOME_FLAGS}


def add_stage_args(parser: argparse.ArgumentParser, eval_every: int, sample_every: int, has_rows: bool = True) -> None:
    """The flags that every stage has; has_rows: it learns from rows of data, and is evaluated on them."""
    add = parser.add_argument
    add("--run", default="none", help="log to wandb under this name (default: %(default)s, no wandb)")
    add("--seed", type=int, default=42, help="of all that is random")
    if has_rows:
        add("--total-batch-size", type=int, help="tokens of a step, all ranks together (default: chosen)")
        add("--eval-tokens", type=int, help="tokens of a validation loss (default: chosen)")
    add("--device-batch-size", type=memory.rows_or_auto, default="auto", metavar="ROWS",
        help="rows of a forward pass; auto: the largest micro-batch that is predicted to fit, up to the size beyond "
             "which more rows gain nothing")
    # evaluation and saving
    add("--eval-every", type=int_or_never, default=eval_every, help="steps between evaluations, or never")
    add("--sample-every", type=int_or_never, default=sample_every, help="steps between samples, or never")
    add("--save-every", type=int_or_never, help="steps between checkpoints; never: by time and at the end only")
    add("--save-every-minutes", type=float, default=20, help="minutes between checkpoints")
    add("--keep-last", type=int_or_all, default=2, help="newest checkpoints to keep, or all")
    add("--keep-every", type=int_or_never, help="keep also the checkpoints of every so many steps, or never")
    add("--resume", default="auto", help="auto: continue if this tag has a run; none: start anew; or a step")
    add("--resume-from-step", dest="resume", help="the same as --resume STEP")
    add("--stop-at", type=int, help="save and stop at this step of the same horizon")
    add("--allow-mismatch", action="store_true",
        help="go on though tokenizer, data or settings aren't those of the saved run (recorded in run.json)")
    # machine
    add_compute_flags(parser)
    add("--compile", choices=("auto", "on", "trunk", "off"), default="auto",
        help="on: each block; trunk: all blocks as one, which starts more slowly, and on several ranks sends gradients "
             "only when all are there; auto: off or on, by the run's length")
    add("--attention", default="auto", help="auto, or one backend of nanochat.flash_attention")
    add("--fp8", choices=("auto", "on", "off"), default="auto",
        help="compute in 8 bits what reads normed activations, on NVIDIA GPUs of compute capability 8.9 or more (a CPU "
             "does it slowly, for studies); a run may change it whenever it is continued; auto is off, for no GPU has "
             "shown the gain yet")
    add("--loss", choices=tuple(LOSSES), default="fused", help="fused saves memory, plain is easy to change")
    add("--deterministic", action="store_true", help="only algorithms that repeat bit for bit on a GPU, slower")


def add_words_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of all that learns from tasks or evaluates them."""
    parser.add_argument("--words", metavar="DATA", help="dataset whose words are spelled (default: the published list "
                        "where it is on disk, else words_found.txt, else those of the first dataset there)")


@dataclass(frozen=True)
class Wanted:
    """What a person asked for. Where that is auto, what the run began with is kept, or the run decides."""
    dtype:         str       = "auto"
    attention:     str       = "auto"
    compile:       str       = "auto"    # or on, trunk, off
    fp8:           str       = "auto"    # or on, off
    loss:          str       = "fused"   # a key of cross_entropy.LOSSES
    micro_rows:    int | str = "auto"
    deterministic: bool      = False
    kept:          dict      = field(default_factory=dict)   # choices from before: see Choices.to_json
    kept_why:      str       = ""

    def keep(self, saved: Checkpoint | None, source: Checkpoint | None, device: torch.device) -> "Wanted":
        """With the choices of the run that is continued, or with the dtype of the stage before."""
        if saved:
            return replace(self, kept=saved.meta["choices"], kept_why="as the run began")
        dtype = source and source.meta["choices"].get("dtype")    # an import has none
        if dtype and source.meta["environment"]["hardware"]["device"] == device.type:
            return replace(self, kept={"dtype": dtype}, kept_why=f"as the {source.stage} run")
        return self


@dataclass(frozen=True)
class StageFlags:
    """What a person asked for with the flags of every stage."""
    given:            dict[str, object]    # all flags of the stage by name, for run.json
    defaults:         dict[str, object]
    argv:             list[str]
    saving:           SaveRules
    wanted:           Wanted
    wandb_name:       str | None
    seed:             int
    eval_every:       int | None           # steps; None: never
    sample_every:     int | None
    resume:           str
    stop_at:          int | None
    allow_mismatch:   bool
    total_batch_size: int | None = None    # tokens; None: chosen, or those of the stage before
    eval_tokens:      int | None = None    # None: chosen by device
    start_time:       float = field(default_factory=time.perf_counter)    # when the flags were read

    def check_together(self) -> None:
        """Refuse a base model that can't be, for flags that are all there: parsing may be asked of a part of them. A
        vocabulary stands in until the tokenizer is there."""
        given = self.given
        if "depth" not in given:
            return
        config = make_config(given["depth"], vocab_size=GPTConfig.vocab_size, sequence_len=given["max_seq_len"],
                             aspect_ratio=given["aspect_ratio"], head_dim=given["head_dim"],
                             window_pattern=given["window_pattern"],
                             **choose_knobs(given["preset"], given["knobs"], None))
        if given["seq_len_warmup"] is not None:
            make_short_rows(given["seq_len_warmup"], config)
        if self.total_batch_size is not None:
            count_rows(self.total_batch_size, config.sequence_len, 1)


def read_flags(args: argparse.Namespace, parser: argparse.ArgumentParser, argv: list[str] | None) -> StageFlags:
    """The parsed flags as values; numbers and names that mean nothing are refused."""
    given = vars(args)
    for name, (least, most) in FLAG_RANGES.items():
        value = given.get(name)
        if value not in (None, "auto") and not least <= value <= most:
            bounds = "above 0" if least == POSITIVE else f"at least {least}"
            bounds += "" if most == math.inf else f" and at most {most}"
            said = f"{value:g}" if isinstance(value, float) else value
            raise UserError(f"--{name.replace('_', '-')} {said} must be {bounds}")
    if args.attention not in ("auto", *BACKENDS):
        raise UserError(f"--attention {args.attention} is not one of auto, {', '.join(BACKENDS)}")
    if args.resume not in ("auto", "none") and not args.resume.isdecimal():
        raise UserError(f"--resume {args.resume} must be auto, none or a step")
    wandb_name = None if args.run in ("none", "dummy") else args.run
    if wandb_name:
        import_wandb(wandb_name)    # now, while nothing on disk has changed
    return StageFlags(
        given, {name: parser.get_default(name) for name in given}, sys.argv if argv is None else argv,
        SaveRules(args.save_every, args.save_every_minutes, args.keep_last, args.keep_every),
        Wanted(args.dtype, args.attention, args.compile, args.fp8, args.loss, args.device_batch_size,
               args.deterministic),
        wandb_name,
        **{f.name: given[f.name] for f in fields(StageFlags) if f.name in given})


# Only to tell short runs from long ones: 30% were measured at depth 4 (dev/LOG.md, "The whole step"), 5% at depth 2
# on a CPU with matrix units (dev/LOG.md, "The quickstart in 62% of the time")
EAGER_MFU = 0.1


def count_rows(batch_tokens: int, T: int, world_size: int) -> int:
    """Rows of one step over all ranks."""
    rows = batch_tokens // T
    if batch_tokens % T or rows % world_size or rows < 1:
        raise UserError(f"--total-batch-size {batch_tokens} must be a multiple of {T * world_size}: a row of {T} "
                        f"tokens on each of {world_size} ranks")
    return rows


@dataclass(frozen=True)
class StepRows:
    """The rows that a rank has of each step."""
    config: GPTConfig
    T:      int    # tokens of the longest
    num:    int
    beside: int = 0    # bytes that the stage keeps beside a step's
    has_muon: bool = True    # whether Muon updates the matrices, or AdamW

    def predict(self, micro_rows: int, machine: Machine) -> int:
        """Bytes that a step needs in micro-batches of so many rows."""
        predicted = memory.predict_memory(self.config, self.T, micro_rows, machine, self.num // micro_rows)
        return predicted.needed + self.beside


@dataclass(frozen=True)
class Choices:
    """What a run has decided."""
    machine:      Machine
    peak_flops:   float | None   # of all ranks together, against which MFU is measured; None where no figure is known
    micro_rows:   int            # of a forward pass, a divisor of the rank's rows of a step
    memory_bytes: int            # predicted peak, as get_peak_memory_bytes will measure it
    is_one_trunk: bool = False   # compiled as one graph, not block by block

    def to_json(self, micro_rows: int) -> dict:
        """What a continued run must keep, or it wouldn't continue bit for bit; the rows may have been halved."""
        return {"dtype": self.machine.dtype, "attention": self.machine.attention, "micro_rows": micro_rows,
                "use_compile": "trunk" if self.is_one_trunk else self.machine.is_compiled,
                "fp8": "on" if self.machine.is_fp8 else "off"}


def choose_how(wanted: Wanted, rows: StepRows, num_flops: float, device: torch.device,
               decisions: list[dict]) -> Choices:
    """Decide how a run computes, each choice printed and kept in `decisions`. Collective.
    num_flops: model FLOPs that the run still has before it, all ranks together"""
    kept = dict(wanted.kept)
    if "use_compile" in kept:
        kept["compile"] = {True: "on", False: "off"}.get(kept["use_compile"], "trunk")

    def choose(name: str, find: Callable[[str], tuple]) -> object:
        """One choice: kept, or as `find` has it: (value, why). Ranks may measure differently, so rank 0's counts."""
        asked = getattr(wanted, name)
        is_kept = asked == "auto" and name in kept
        value, why = gather(find(kept[name] if is_kept else asked))[0]
        return decide(decisions, name, value, wanted.kept_why if is_kept else why)

    world_size = common.get_ranks().world_size
    dtype = choose("dtype", lambda name: devices.get_compute_dtype(name, device))
    # the backward pass of fa3 and flex doesn't repeat bit for bit; fa2's should (by torch's source), not shown yet
    auto = "sdpa" if wanted.deterministic and device.type == "cuda" else "auto"
    attention = choose("attention", lambda name: choose_backend(
        device, dtype, rows.config, rows.T, wanted=auto if name == "auto" else name,
        is_traced=wanted.compile != "off"))
    peak_flops = decide(decisions, "peak FLOP/s of one device", *get_peak_flops(device, dtype))
    peak_flops = peak_flops and peak_flops * world_size
    eager_sec = num_flops / (EAGER_MFU * peak_flops) if peak_flops else None
    use_compile = choose("compile", lambda name: choose_compile(name, device, eager_sec))
    is_fp8 = choose("fp8", lambda name: choose_fp8(name, device, dtype, rows.config))
    machine = Machine(str(dtype).removeprefix("torch."), attention, use_compile, device.type, world_size, wanted.loss,
                      is_fp8, rows.has_muon)
    free_bytes = gather(measure_free_bytes(device))
    micro_rows, why = choose_micro_rows(wanted, rows, machine, None if None in free_bytes else min(free_bytes))
    decide(decisions, "rows of a micro-batch", micro_rows, why)
    decide(decisions, "loss", machine.loss, ", ".join(
        f"{rows.predict(micro_rows, replace(machine, loss=loss)) / GIB:.2f} GiB with {loss}" for loss in LOSSES))
    if rows.config.num_experts:
        decide(decisions, "experts' products", *moe.describe_products(device, dtype))
    if rows.config.middle_layer == rows.config.n_layer - 1:
        decide(decisions, "backout", "of the last layer", "where a step moves its factor past 1 the sign of the output "
               "turns, and what was learned is lost; new models of one or two layers have none, as with "
               "--knobs backout_layer=-1")
    # a CPU's measured peak is that of the whole process, with Python and all libraries
    loaded_bytes = devices.get_peak_memory_bytes(device) if device.type == "cpu" else 0
    is_one_trunk = "trunk" in (wanted.compile, kept.get("compile") if wanted.compile == "auto" else "")
    return Choices(machine, peak_flops, micro_rows, rows.predict(micro_rows, machine) + loaded_bytes, is_one_trunk)


def choose_micro_rows(wanted: Wanted, rows: StepRows, machine: Machine, free_bytes: int | None) -> tuple[int, str]:
    """Rows of a micro-batch, a divisor of the rank's rows, and why.

    As asked for; else as kept, where that is possible; else the largest that fits, up to the tokens beyond which more
    gain nothing.
    """
    divisors, max_tokens = list_divisors(rows.num), memory.get_max_micro_tokens(machine.device_type)
    room_bytes = None if free_bytes is None else max(0, free_bytes - rows.beside)
    fitting = memory.largest_micro_rows(rows.config, rows.T, machine, room_bytes, rows.num)
    kept, chosen = wanted.kept.get("micro_rows"), fitting or 1
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
    needed_bytes, free, warning = rows.predict(chosen, machine), "unknown", ""
    if free_bytes is not None:
        if needed_bytes > 10 * (free_bytes + 8 * GIB):    # no error of the prediction, and no swap, makes up for that
            raise UserError(f"a step needs {needed_bytes / GIB:,.0f} GiB with {chosen} rows at a time, and "
                            f"{free_bytes / GIB:,.0f} GiB are free; take a smaller model, or fewer or shorter rows")
        free, warning = f"{free_bytes / GIB:.2f} GiB", " and may not fit" if needed_bytes > free_bytes else ""
    return chosen, (f"{why}: {needed_bytes / GIB:.2f} GiB predicted, {free} free{warning}; "
                    f"{rows.num // chosen} a step")


def describe_short_rows(plan: Plan, T: int, machine: Machine, decisions: list[dict]) -> None:
    """Print and record the stages of a sequence-length warm-up."""
    if not plan.short_rows:
        return
    stages = ", ".join(f"{stage.row_tokens} to step {stage.end_step}" for stage in plan.short_rows)
    why = "asked for" + ("; the first step of each length compiles" if machine.is_compiled else "")
    if machine.attention == "flex" and plan.short_rows[0].row_tokens % FLEX_BLOCK:
        why += f"; rows that are no multiple of {FLEX_BLOCK} tokens use sdpa"
    decide(decisions, "tokens of a row", f"{stages}, then {T}", why)


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
    mfu, source = devices.expect_mfu((devices.find_gpu(name) or (name,))[0], config.n_layer)
    train_sec = plan.total_flops / (mfu * choices.peak_flops)
    return predicted | {"mfu_source": source, "mfu_pct": 100 * mfu, "train_sec": train_sec,
                        "tokens_per_sec": plan.total_tokens / train_sec}
