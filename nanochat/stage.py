"""What the scripts of all training stages share besides the step: flags, the machine's choices, records, evaluations.

No trainer: each script spells out its own loop, and calls these.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import checkpoint_manager as checkpoints
from nanochat.common import (
    Ranks,
    UserError,
    get_base_dir,
    get_compute_dtype,
    get_peak_flops,
    get_peak_memory_bytes,
    now,
    print0,
)
from nanochat.compilation import choose_compile, set_compile_kernels
from nanochat.dataloader import TrainLoader, ValidationBatches
from nanochat.engine import Engine
from nanochat.flash_attention import choose_backend
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_loss
from nanochat.memory import (
    GIB,
    Compute,
    expect_mfu,
    find_gpu,
    get_max_micro_tokens,
    largest_micro_rows,
    list_divisors,
    measure_free_bytes,
    predict_memory,
    rows_or_auto,
)
from nanochat.optim import MuonAdamW
from nanochat.report import write_section
from nanochat.scaling import Plan
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import Batch, LossScaler, OutOfMemory, Progress, RunLog, StepStats, StopSignal, train_step

EVAL_TOKENS = {"cpu": 2**17}      # tokens of an evaluation where nobody says better, by device
DEFAULT_EVAL_TOKENS = 20 * 2**19


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def add_stage_args(parser: argparse.ArgumentParser, *, eval_every: int, sample_every: int,
                   has_rows: bool = True) -> None:
    """The flags that every stage has; has_rows: it learns from rows of data, and is evaluated on them."""
    add = parser.add_argument
    add("--run", default="dummy", help="log to wandb under this name (%(default)s: no wandb)")
    add("--seed", type=int, default=42)
    if has_rows:
        add("--total-batch-size", type=int, help="tokens of a step, all ranks together (default: chosen)")
        add("--eval-tokens", type=int, help="tokens of a validation loss (default: chosen)")
    add("--device-batch-size", type=rows_or_auto, default="auto", metavar="ROWS",
        help="rows of a forward pass; auto: as many as fit and pay (default: %(default)s)")
    # evaluation and saving
    add("--eval-every", type=int, default=eval_every, help="steps between evaluations; -1 = never")
    add("--sample-every", type=int, default=sample_every, help="steps between samples, also at the end; -1 = never")
    add("--save-every", type=int, default=-1, help="steps between checkpoints; -1 = by time and at the end only")
    add("--save-every-minutes", type=float, default=20, help="minutes between checkpoints")
    add("--keep-last", type=int, default=2, help="checkpoints to keep; -1 = all")
    add("--keep-every", type=int, default=-1, help="keep also the checkpoints of every so many steps; -1 = none")
    add("--resume", default="auto", help="auto: continue if this tag has a run; none: start anew; or a step")
    add("--resume-from-step", dest="resume", help="the same as --resume STEP")
    add("--stop-at", type=int, help="save and stop at this step of the same horizon")
    add("--allow-mismatch", action="store_true",
        help="go on though tokenizer, data or settings aren't those of the saved run (recorded in run.json)")
    # machine
    add("--device-type", default="", help="cuda, cpu, mps, xpu (default: the best that is there)")
    add("--dtype", default="auto", help="auto, bfloat16, float16, float32 or float64")
    add("--compile", choices=("auto", "on", "off"), default="auto")
    add("--attention", default="auto", help="auto, or one backend of nanochat.flash_attention")
    add("--deterministic", action="store_true", help="only algorithms that repeat bit for bit on a GPU, slower")


def check_stage_args(args: argparse.Namespace) -> argparse.Namespace:
    """Refuse numbers that mean nothing; returns the arguments."""
    for flag, value, least in (("--seed", args.seed, 0), ("--eval-tokens", getattr(args, "eval_tokens", None), 1),
                               ("--stop-at", args.stop_at, 1)):
        if value is not None and value < least:
            raise UserError(f"{flag} {value} must be at least {least}")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The machine: what a run decides for itself, and keeps when it is resumed

EAGER_MFU = 0.3    # measured at depth 4 (dev/LOG.md, 2026-11-21); only to tell short runs from long ones


@dataclass(frozen=True)
class Machine:
    """How this rank computes."""
    device:        torch.device
    ranks:         Ranks
    dtype:         torch.dtype    # of the activations
    attention:     str            # backend of flash_attention
    use_compile:   bool
    peak_flops:    float | None   # of all ranks together, what MFU is measured against
    rows_per_rank: int            # of a step
    micro_rows:    int            # of one forward pass, a divisor of these
    memory_bytes:  int            # predicted peak, as get_peak_memory_bytes will measure it
    has_halved:    bool = False   # whether micro_rows is half of what was chosen, because memory ran out

    def get_choices(self) -> dict:
        """What a resumed run must keep, or it wouldn't continue bit for bit."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "attention": self.attention,
                "micro_rows": self.micro_rows, "use_compile": self.use_compile}


def choose_machine(args, device: torch.device, ranks: Ranks, *, rows_per_rank: int, config: GPTConfig, T: int,
                   flops: float, saved: dict, decisions: list[dict], kept_why: str = "as the run began") -> Machine:
    """Decide dtype, attention, compilation and micro-batch, each printed and kept in `decisions`. Collective.

    args:  dtype, attention, device_batch_size and compile as the person gave them
    T:     tokens of the longest rows
    flops: model FLOPs that the run still has before it, all ranks together
    saved: the choices of the run that is resumed, or of the stage before, or {}; kept where nobody asks for others
    """
    def decide(what: str, value_and_why: tuple, kept: bool = False) -> object:
        value, why = value_and_why[0], kept_why if kept else value_and_why[1]
        decisions.append({"what": what, "value": str(value), "why": why})
        print0(f"{what}: {value} ({why})")
        return value

    def is_kept(name: str, wanted: object) -> bool:
        return name in saved and wanted == "auto"
    dtype_name = saved["dtype"] if is_kept("dtype", args.dtype) else args.dtype
    dtype, why = get_compute_dtype(dtype_name, device)
    dtype = decide("dtype", (take_from_rank0(dtype), why), is_kept("dtype", args.dtype))
    attention_name = saved["attention"] if is_kept("attention", args.attention) else args.attention
    if attention_name == "auto" and args.deterministic and device.type == "cuda":
        attention_name = "sdpa"  # the only backend there whose backward pass repeats bit for bit
    attention = decide("attention", choose_backend(device, dtype, T, wanted=attention_name),
                       is_kept("attention", args.attention))
    peak_flops = decide("peak FLOP/s of one device", get_peak_flops(device, dtype))
    peak_flops = peak_flops and peak_flops * ranks.world_size
    wanted_compile = args.compile
    if is_kept("use_compile", args.compile):
        wanted_compile = "on" if saved["use_compile"] else "off"
    eager_sec = flops / (EAGER_MFU * peak_flops) if peak_flops else None
    use_compile, why = choose_compile(wanted_compile, device, eager_sec)
    use_compile = decide("compile", (take_from_rank0(use_compile), why), is_kept("use_compile", args.compile))
    compute = Compute(str(dtype).removeprefix("torch."), attention, use_compile, device.type, ranks.world_size)
    free_bytes = take_minimum(measure_free_bytes(device))
    micro_rows, why, memory_bytes = choose_micro_rows(
        args.device_batch_size, saved.get("micro_rows"), kept_why, rows_per_rank, config, T, compute, free_bytes)
    decide("rows of a micro-batch", (micro_rows, why))
    if device.type == "cpu":  # where what will be measured is the whole process, with Python and all libraries
        memory_bytes += get_peak_memory_bytes(device)
    return Machine(device, ranks, dtype, attention, use_compile, peak_flops, rows_per_rank, micro_rows, memory_bytes)


def take_from_rank0(value: object) -> object:
    """Rank 0's value on every rank: what each measures by itself may differ. Collective: all ranks call it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def take_minimum(value: int | None) -> int | None:
    """The least value of all ranks, None if one of them has none. Collective: all ranks call it."""
    values = [value]
    if dist.is_initialized():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value)
    return None if None in values else min(values)


def count_rows(batch_tokens: int, T: int, world_size: int) -> int:
    """Rows of one step over all ranks."""
    rows = batch_tokens // T
    if batch_tokens % T or rows % world_size or rows < 1:
        raise UserError(f"--total-batch-size {batch_tokens} must be a multiple of {T * world_size}: a row of {T} "
                        f"tokens on each of {world_size} ranks")
    return rows


def choose_micro_rows(wanted: int | str, kept: int | None, kept_why: str, rows_per_rank: int, config: GPTConfig, T: int,
                      compute: Compute, free_bytes: int | None) -> tuple[int, str, int]:
    """Rows of a micro-batch, a divisor of the rank's rows; why; and the bytes that the rank will need with them.

    wanted: a number, or auto: those that are `kept` from before where they can be, else the most that fit and pay
    """
    def predict(rows: int) -> int:
        return predict_memory(config, T, rows, compute, rows_per_rank // rows).needed
    divisors, max_tokens = list_divisors(rows_per_rank), get_max_micro_tokens(compute.device_type)
    fitting = largest_micro_rows(config, T, compute, free_bytes, rows_per_rank)
    rows = fitting or 1
    if wanted != "auto":
        if wanted not in divisors:
            raise UserError(f"--device-batch-size {wanted} must divide the {rows_per_rank} rows of a step on each rank;"
                            f" it may be {', '.join(map(str, divisors))}, or auto")
        rows, why = wanted, "asked for"
    # on another number of ranks the cut may not be possible; where it is, it needs no headroom: it has run before
    elif kept in divisors and (free_bytes is None or predict(kept) <= free_bytes):
        rows, why = kept, kept_why
    elif kept in divisors:
        why = f"{kept} {kept_why} would need {predict(kept) / GIB:.2f} GiB"
    elif not fitting:
        why = "the fewest there are"
    elif rows == rows_per_rank:
        why = "all of a step"
    elif divisors[divisors.index(rows) + 1] * T > max_tokens:
        why = f"at most {max_tokens:,} tokens"
    else:
        why = "largest that fits"
    needed_bytes = predict(rows)
    free = "an unknown number" if free_bytes is None else f"{free_bytes / GIB:.2f}"
    warning = " and may not fit" if free_bytes is not None and needed_bytes > free_bytes else ""
    return rows, (f"{why}: {needed_bytes / GIB:.2f} of {free} GiB predicted{warning}; {rows_per_rank // rows} a step"
                  ), needed_bytes


def take_step(model: GPT, optimizer: MuonAdamW, batch: Batch, machine: Machine, step: int, scaler: LossScaler | None,
              log: RunLog, stop: StopSignal) -> tuple[StepStats | None, Machine]:
    """One optimizer step. The first time that memory runs out, micro-batches are halved, from this very batch on; the
    second time `stop` is set, and nothing was learned from the batch: None. Collective: all ranks call it.

    Returns the machine as well, which is another one after halving: as if the run had been begun with that.
    """
    # rows that the loop has cut into shorter ones are more rows of as many tokens
    micro_rows = machine.micro_rows * len(batch.inputs) // machine.rows_per_rank
    try:
        return train_step(model, optimizer, batch, micro_rows, scaler), machine
    except OutOfMemory as error:
        problem = f"out of memory at step {step} with --device-batch-size {machine.micro_rows}: {error}"
    smaller = [n for n in list_divisors(machine.rows_per_rank) if n <= machine.micro_rows // 2]
    if machine.has_halved or not smaller:
        advice = f"set --device-batch-size {smaller[-1]}" if smaller else "train a smaller model or on shorter rows"
        log.update(reason=problem)
        stop.fail(UserError(f"{problem}; {advice} and run again, nothing of the steps before is lost"))
        return None, machine
    print0(f"warning: {problem}; going on with {smaller[-1]}, from this batch on")
    log.update(decisions=[*log.info["decisions"],
                          {"what": "rows of a micro-batch", "value": str(smaller[-1]), "why": problem}])
    machine = replace(machine, micro_rows=smaller[-1], has_halved=True)
    return take_step(model, optimizer, batch, machine, step, scaler, log, stop)


# ---------------------------------------------------------------------------------------------------------------------
# A run, from its beginning to its end


def choose_last_step(stop_at: int | None, plan: Plan, step: int, run_dir: Path) -> int:
    """Where this process stops: the plan's end, or before."""
    last_step = min(stop_at or plan.num_iterations, plan.num_iterations)
    if last_step < step:
        raise UserError(f"--stop-at {last_step} is behind the run in {run_dir}, which is at step {step}")
    return last_step


def make_model(config: GPTConfig, machine: Machine, seed: int, optimizer_settings: dict,
               checkpoint: checkpoints.Checkpoint | None) -> tuple[GPT, MuonAdamW, LossScaler | None]:
    """Model, optimizer and (fp16) loss scaler: initialised from the seed, or as a checkpoint left them. Collective."""
    torch.manual_seed(seed)
    model = checkpoints.build_model(config, machine.dtype, machine.device)
    model.init_weights()
    optimizer = model.setup_optimizer(**optimizer_settings)
    optimizer.get_named_state()  # makes it now: memory that runs out in the midst of the first update can't be survived
    scaler = LossScaler() if machine.dtype == torch.float16 else None
    if checkpoint:
        checkpoints.restore(checkpoint.run_dir, checkpoint.step, model, optimizer)
        if scaler and checkpoint.meta["scaler"]:
            vars(scaler).update(checkpoint.meta["scaler"])
    set_compile_kernels(machine.use_compile)
    if machine.use_compile:
        model.compile_blocks()
    return model, optimizer, scaler


def describe_run(stage: str, args: argparse.Namespace, argv: list[str], run_dir: Path, model: GPT, plan: Plan, *,
                 machine: Machine, data: dict, tokenizer_name: str, tokenizer: RustBPETokenizer, **more) -> dict:
    """What run.json says of a run before it begins."""
    return {"stage": stage, "tag": run_dir.name, "created": now(), "argv": argv, "args": vars(args),
            "model_config": asdict(model.config), "params": model.num_scaling_params(), "plan": asdict(plan),
            "predicted": predict_run(stage, machine, model.config, plan),
            "data": data, "tokenizer": {"name": tokenizer_name, "hash": tokenizer.hash,
                                        "vocab_size": tokenizer.get_vocab_size()}, **more}


def predict_run(stage: str, machine: Machine, config: GPTConfig, plan: Plan) -> dict:
    """What the run will take as far as anyone knows, for the report card to compare with what it took."""
    device, predicted = machine.device, {"peak_memory_bytes": machine.memory_bytes}
    if device.type == "cpu":
        predicted["memory_source"] = "live tensors beside the process before them, not what malloc keeps of freed ones"
    if stage == "rl":
        return predicted | {"mfu_source": "unknown, for most of a step is sampling"}
    if not machine.use_compile or not machine.peak_flops:
        why = "without compilation" if machine.peak_flops else f"on {device.type} devices"
        return predicted | {"mfu_source": f"unknown, for nothing was measured {why}"}
    name = "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    mfu, source = expect_mfu((find_gpu(name) or (name,))[0], config.n_layer)
    train_sec = plan.total_flops / (mfu * machine.peak_flops)
    return predicted | {"mfu_source": source, "mfu_pct": 100 * mfu, "train_sec": train_sec,
                        "tokens_per_sec": plan.total_tokens / train_sec}


def get_state(machine: Machine, loader: TrainLoader, optimizer: MuonAdamW, scaler: LossScaler | None,
              progress: Progress) -> dict:
    """What a checkpoint holds of a run beside its weights, and what never changes. Collective."""
    return {"choices": machine.get_choices(), "loader": loader.state_dict(), "optimizer_steps": optimizer.num_steps,
            "scaler": scaler and vars(scaler), "progress": progress.get_state()}


def get_finished_info(run_dir: Path, step: int, plan: Plan) -> dict | None:
    """run.json of a run that has nothing left to do, else None."""
    try:
        info = json.loads((run_dir / "run.json").read_text())
    except (FileNotFoundError, ValueError):
        return None
    if step < plan.num_iterations or info.get("status") != "finished":
        return None
    print0(f"the run in {run_dir} is finished; --resume none or another --model-tag starts a new one")
    return info


def print_plan(info: dict, run_dir: Path, step: int) -> None:
    """What is about to happen, in four lines."""
    plan, params, config = info["plan"], info["params"], info["model_config"]
    print0(f"model: depth {config['n_layer']}, width {config['n_embd']}, {config['n_head']} heads, context "
           f"{config['sequence_len']}, vocabulary {config['vocab_size']:,}: {params['total']:,} parameters")
    print0(f"plan: {plan['num_iterations']:,} steps of {plan['batch_tokens']:,} tokens = {plan['total_tokens']:,} "
           f"({plan['tokens_per_param']:.1f} per scaling parameter, horizon by {plan['horizon']}), "
           f"{plan['total_flops']:.2e} FLOPs")
    print0(f"data: {info['data']['name']} ({info['data']['hash']}), tokenizer: {info['tokenizer']['name']} "
           f"({info['tokenizer']['hash']})")
    print0(f"run: {run_dir}" + (f", continued at step {step}" if step else ""))


def evaluate(model: GPT, val_batches: ValidationBatches, tokenizer: RustBPETokenizer, log: RunLog, step: int, *,
             batch_rows: int) -> dict:
    """Validation bits per byte; the rule and the context are part of what the figure means. Collective."""
    start = time.perf_counter()
    result = evaluate_loss(model, val_batches.cut(batch_rows), tokenizer.count_token_bytes())
    values = {"val_bpb": result.bpb, "val_bytes": result.num_bytes, "val_T": model.config.sequence_len,
              "val_rule": val_batches.rule}
    log.write("eval", step, **values, eval_sec=time.perf_counter() - start)
    print0(f"step {step:05d} | validation: {result.bpb:.4f} bits per byte over {result.num_bytes:,} bytes")
    return values


def print_samples(model: GPT, tokenizer: RustBPETokenizer, prompts: dict[str, list[int]], max_tokens: int, log: RunLog,
                  step: int) -> None:
    """Greedy continuations of a few prompts, given as their text and their tokens. Rank 0 calls it alone."""
    engine = Engine(model, tokenizer)
    for prompt, ids in prompts.items():
        try:
            rows, _ = engine.generate_batch(ids, num_samples=1, max_tokens=max_tokens, temperature=0)
        except UserError as error:  # too long for a tiny context: that must not cost the run
            print0(f"sample | {prompt!r}: {error}")
            continue
        text = tokenizer.decode(rows[0][1:])
        log.write("sample", step, prompt=prompt, text=text)
        print0(f"sample | {text!r}")


def get_run_results(progress: Progress, step: int, plan: Plan, device: torch.device) -> dict:
    """What a run's end says of it, beside its evaluations."""
    return {"train_loss": progress.get_smooth_loss(), "train_sec": progress.elapsed_sec, "step": step,
            "tokens": step * plan.batch_tokens, "peak_memory_bytes": get_peak_memory_bytes(device)}


def write_report(section: str, title: str, run_dir: Path, info: dict, metrics: dict, values: dict) -> None:
    """The section of the report card.

    metrics: compared with other stages'; values: shown after those that all stages have
    """
    plan, params, results = info["plan"], info["params"], info["results"]
    write_section(section, {
        "title": title, "stage": info["stage"], "argv": info["argv"], "created": info["ended"],
        "run": str(run_dir.relative_to(get_base_dir())), "metrics": metrics,
        "values": {"parameters": params["total"], "steps": results["step"], "tokens": results["tokens"],
                   "tokens per scaling parameter": plan["tokens_per_param"], "training FLOPs": plan["total_flops"],
                   "validation bits per byte": results.get("val_bpb"), "minutes": results["train_sec"] / 60,
                   "peak memory in GiB": results["peak_memory_bytes"] / 2**30, **values}})
