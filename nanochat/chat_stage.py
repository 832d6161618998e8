"""What midtraining and SFT share: they learn from conversations, and begin where another stage has ended.

A run takes over that stage's model, tokenizer, optimizer state, batch and learning rates, and says what it changes.
"""

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.checkpoint_manager import Checkpoint, Checkpointer
from nanochat.common import Ranks, UserError, get_environment, print0
from nanochat.dataloader import (
    ConversationGroups,
    Epoch,
    TrainLoader,
    ValidationBatches,
    count_epoch,
    validation_conversations,
)
from nanochat.gpt import GPT, GPTConfig, estimate_flops
from nanochat.identity import check_ranks, compare_with_saved
from nanochat.optim import MuonAdamW
from nanochat.scaling import Plan, get_chat_momentum, get_lr_frac, make_chat_plan
from nanochat.stage import (
    DEFAULT_EVAL_TOKENS,
    EVAL_TOKENS,
    Machine,
    add_stage_args,
    choose_last_step,
    choose_machine,
    count_rows,
    describe_run,
    make_model,
    print_plan,
    write_report,
)
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import LossScaler, Progress, RunLog
from tasks.mixtures import Mixture

LR_NAMES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")   # taken over from the stage before
IDENTITY_ARGS = ("seed", "deterministic", "init_lr_frac", "warmdown_ratio")   # must be the same when a run is continued
QUESTIONS = ("Who are you?", "What is 34 * 27?", "How many r are in strawberry?", "What is the capital of France?")


def add_chat_args(parser: argparse.ArgumentParser, mixtures: Iterable[str]) -> None:
    """The flags of the stages that learn from conversations, with those that every stage has."""
    add = parser.add_argument
    add("-g", "--model-tag", help="run to begin with (default: the latest)")
    add("-s", "--model-step", type=int, help="its checkpoint (default: the latest)")
    add("--out-tag", help="folder of this run (default: the tag of the run that it begins with)")
    # conversations
    add("--mixture", choices=mixtures, help="tasks to learn from, see tasks/mixtures.py (default: the stage's)")
    add("--tasks", nargs="+", metavar="NAME[:COUNT[:WEIGHT]]", help="instead of a mixture: these tasks, of each COUNT "
        "conversations (default: all), each used WEIGHT times (default: once)")
    add("--custom-json", action="append", default=[], metavar="FILE", help="your own conversations as well, a .jsonl "
        "file with one per line; may be repeated")
    # horizon and learning rates
    add("--num-epochs", type=int, default=1, help="times that each conversation is learned from")
    add("--num-iterations", type=int, help="optimizer steps, instead of whole epochs")
    add("--init-lr-frac", type=float, help="part of the base run's learning rates to begin with (default: the stage's)")
    add("--warmdown-ratio", type=float, help="part of the run over which the rates fall to 0 (default: the stage's)")
    add_stage_args(parser, eval_every=100, sample_every=100)


@dataclass(frozen=True)
class ChatStart:
    """What a run is to do, known before anything is loaded: where it goes on, on which rows, how long."""
    stage:     str
    run_dir:   Path
    source:    Checkpoint               # of the stage before
    step:      int                      # where this process goes on
    saved:     dict                     # meta.json of that step; {} where the run is new
    tokenizer: RustBPETokenizer
    config:    GPTConfig
    mixture:   Mixture
    groups:    ConversationGroups
    epoch:     Epoch
    plan:      Plan
    identity:  dict                     # what must be the same when it is continued
    environment: dict
    decisions: list[dict]
    start_time: float                   # by time.perf_counter


def plan_chat_run(stage: str, args: argparse.Namespace, source: Checkpoint, run_dir: Path, mixture: Mixture,
                  device: torch.device, ranks: Ranks, *, keep_whole: bool, scales_lr: bool) -> ChatStart:
    """Choose the rows and the horizon, and compare them with those of the run that is continued, if any. Collective."""
    start_time = time.perf_counter()
    if not 0 < args.init_lr_frac < math.inf or not 0 <= args.warmdown_ratio <= 1:
        raise UserError(f"--init-lr-frac {args.init_lr_frac:g} must be above 0 and --warmdown-ratio "
                        f"{args.warmdown_ratio:g} from 0 to 1")
    step = checkpoints.find_resume_step(run_dir, args.resume)
    saved = {} if step is None else checkpoints.load_meta(run_dir, step)
    tokenizer = checkpoints.load_run_tokenizer(source.meta)
    config = GPTConfig(**source.meta["model_config"])
    groups = ConversationGroups(mixture.name, mixture.train, tokenizer, config.sequence_len, keep_whole=keep_whole)
    is_counted = saved and saved["identity"]["conversations"] == groups.identity
    epoch = Epoch.from_json(saved["epoch"]) if is_counted else count_epoch(groups, ranks, device)
    before = source.meta["identity"]
    plan = make_chat_plan(config, estimate_flops(config), epoch_rows=epoch.num_rows, num_epochs=args.num_epochs,
                          num_iterations=args.num_iterations, scales_lr=scales_lr,
                          batch_tokens=before["plan"]["batch_tokens"] if args.total_batch_size is None else
                          args.total_batch_size)
    count_rows(plan.batch_tokens, config.sequence_len, ranks.world_size)     # refuses what can't be divided
    identity = {"source": source.describe(), "tokenizer": tokenizer.hash, "tasks": mixture.parts,
                "conversations": groups.identity, "model": asdict(config), "plan": asdict(plan),
                **{name: before[name] for name in LR_NAMES}, **{name: getattr(args, name) for name in IDENTITY_ARGS}}
    check_ranks(run_dir, {"step": step, "flags": vars(args), **identity})
    environment, decisions = get_environment(device), []
    if saved:
        decisions = compare_with_saved(saved, identity, environment, run_dir, args.allow_mismatch)
    return ChatStart(stage, run_dir, source, step or 0, saved, tokenizer, config, mixture, groups, epoch, plan,
                     identity, environment, decisions, start_time)


@dataclass
class ChatRun:
    """What the loop of a run works on."""
    last_step:   int                        # where this process stops
    machine:     Machine
    loader:      TrainLoader
    model:       GPT
    optimizer:   MuonAdamW
    scaler:      LossScaler | None
    val_batches: ValidationBatches | None   # None: no conversation is held out
    prompts:     dict[str, list[int]]       # to sample from
    meta:        dict                       # what each checkpoint says of the run
    saver:       Checkpointer
    log:         RunLog
    progress:    Progress


def begin_chat_run(start: ChatStart, args: argparse.Namespace, argv: list[str], device: torch.device,
                   ranks: Ranks) -> ChatRun:
    """Load the model, open the log, and say what is about to happen. Collective."""
    source, saved, plan, config, tokenizer = start.source, start.saved, start.plan, start.config, start.tokenizer
    T, rows_per_step = config.sequence_len, count_rows(plan.batch_tokens, config.sequence_len, ranks.world_size)
    last_step = choose_last_step(args.stop_at, plan, start.step, start.run_dir)
    decisions = start.decisions + describe_changes(source, plan, args.init_lr_frac, args.warmdown_ratio)
    machine = choose_machine(args, device, ranks, rows_per_rank=rows_per_step // ranks.world_size, config=config, T=T,
                             flops=(last_step - start.step) * plan.batch_tokens * plan.flops_per_token,
                             saved=saved["choices"] if saved else inherit_choices(source, device), decisions=decisions,
                             kept_why="as the run began" if saved else f"as the {source.stage} run")
    check_ranks(start.run_dir, machine.get_choices())
    loader = TrainLoader(start.groups, rows_per_step, args.seed, ranks, num_lanes=1, state=saved.get("loader"),
                         num_epochs=args.num_epochs if plan.horizon == "epochs" else None,
                         allow_mismatch=args.allow_mismatch, pin_memory=device.type == "cuda")
    model, optimizer, scaler = make_model(
        config, machine, args.seed, {"weight_decay": plan.weight_decay, "batch_lr_scale": plan.batch_lr_scale,
                                     **{name: start.identity[name] for name in LR_NAMES}},
        Checkpoint(start.stage, start.run_dir, start.step, saved) if saved else source)
    eval_tokens = args.eval_tokens or EVAL_TOKENS.get(device.type, DEFAULT_EVAL_TOKENS)
    val_batches = validation_conversations(start.mixture.name, start.mixture.val, tokenizer, T, -(-eval_tokens // T),
                                           batch_rows=machine.micro_rows, ranks=ranks)
    data = {"name": start.mixture.name, "hash": start.groups.identity["data"], "tasks": start.mixture.parts}
    info = describe_run(start.stage, args, argv, start.run_dir, model, plan, data=data, tokenizer=tokenizer,
                        tokenizer_name=source.meta["tokenizer"]["name"], environment=start.environment,
                        decisions=decisions, machine=machine, source=source.describe())
    meta = {"stage": start.stage, "model_config": asdict(config), "identity": start.identity, "data": data,
            "tokenizer": info["tokenizer"], "environment": start.environment, "epoch": start.epoch.to_json()}
    saver = Checkpointer(start.run_dir, keep_last=args.keep_last, keep_every=args.keep_every)
    saver.check_disk(model, optimizer)
    checkpoints.begin_run(start.run_dir, start.step if saved else None)
    log = RunLog(start.run_dir, info, ranks, resume_step=start.step if saved else None,
                 wandb_name="" if args.run == "dummy" else args.run)
    if start.step == 0:
        log.write("data", 0, **start.epoch.describe())
    print_plan(info, start.run_dir, start.step)
    prompts = {question: tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]})
               for question in QUESTIONS}
    return ChatRun(last_step, machine, loader, model, optimizer, scaler, val_batches, prompts, meta, saver, log,
                   Progress(plan, machine.peak_flops, saved.get("progress")))


def inherit_choices(source: Checkpoint, device: torch.device) -> dict:
    """What a stage's machine keeps of the stage before: the dtype, on the same kind of device."""
    is_same = source.meta["environment"]["hardware"]["device"] == device.type
    return {"dtype": source.meta["choices"]["dtype"]} if is_same else {}


def describe_changes(source: Checkpoint, plan: Plan, init_lr_frac: float, warmdown_ratio: float) -> list[dict]:
    """What isn't as in the stage before, printed and returned as decisions; all else is taken over from there."""
    before = source.meta["identity"]["plan"]
    name = f"{source.stage} {source.run_dir.name}, step {source.step}"
    pairs = (("tokens of a step", before["batch_tokens"], plan.batch_tokens),
             ("Muon's weight decay", before["weight_decay"], plan.weight_decay),
             ("learning rates", f"x{before['batch_lr_scale']:.3g} for the batch, its own schedule",
              f"x{init_lr_frac:g} of those, x{plan.batch_lr_scale:.3g} for the batch, falling to 0 over the last "
              f"{warmdown_ratio:.0%}"))
    changes = [{"what": what, "value": str(ours), "why": f"{name}: {theirs}"}
               for what, theirs, ours in pairs if theirs != ours]
    print0(f"begun with {name}: its model, optimizer state, batch and learning rates, but for")
    for change in changes:
        print0(f"  {change['what']}: {change['value']} ({change['why']})")
    return changes


def set_schedules(optimizer: MuonAdamW, step: int, num_iterations: int, init_lr_frac: float,
                  warmdown_ratio: float) -> float:
    """Set learning rates and momentum for a step; returns the learning rate's factor."""
    lr_frac = init_lr_frac * get_lr_frac(step, num_iterations, warmup_steps=0, warmdown_ratio=warmdown_ratio,
                                         final_lr_frac=0)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_frac
        if group["kind"] == "muon":
            group["momentum"] = get_chat_momentum(step)
    return lr_frac


def report_chat_run(section: str, title: str, run_dir: Path, info: dict) -> None:
    """The section of the report card."""
    results, source = info["results"], info["source"]
    write_report(section, title, run_dir, info, metrics={"chat bpb": results.get("val_bpb")},
                 values={"begun with": f"{source['stage']} {source['tag']}, step {source['step']}",
                         "conversations": results["num_conversations"]})
