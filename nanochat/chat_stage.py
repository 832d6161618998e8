"""Midtraining and SFT: one loop with two settings, which learns from conversations.

A run begins with the model of another stage. It takes over that stage's weights, optimizer state, batch and learning
rates, and prints what it changes.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_manager import (
    Checkpoint,
    find_checkpoint,
    find_saved,
    get_run_dir,
    load_run_tokenizer,
    locked_run,
)
from nanochat.choices import LR_NAMES, StageFlags, add_stage_args, add_words_flag, count_rows, read_flags
from nanochat.common import Ranks, expand_home, print0
from nanochat.config import estimate_flops, read_config
from nanochat.dataloader import ConversationGroups, Epoch, ValidationBatches, count_epoch, validation_conversations
from nanochat.devices import init_compute
from nanochat.optim import MuonAdamW
from nanochat.presets import find_rule
from nanochat.report import write_stage_section
from nanochat.run import StopSignal, TakenStep, decide, read_info
from nanochat.scaling import REFERENCE_BATCH_TOKENS, get_chat_momentum, get_lr_frac, make_chat_plan
from nanochat.stage import Recipe, Run, Setup, begin_run, evaluate, make_state, prepare_run, print_samples
from nanochat.train import take_step
from tasks.mixtures import MIXTURES, Mixture, make_mixture, parse_entries
from tasks.rows import check_file

QUESTIONS = ("Who are you?", "What is 34 * 27?", "How many r are in strawberry?", "What is the capital of France?")


@dataclass(frozen=True)
class ChatStage:
    """What one stage does otherwise than another."""
    name:       str
    section:    str     # of the report
    title:      str
    keep_whole: bool    # whether conversations are truncated and padded, each in one piece, rather than packed tightly
    scales_lr:  bool    # whether learning rates are scaled to the batch, as in pretraining


MIDTRAINING = ChatStage("mid", "mid_train", "Midtraining", keep_whole=False, scales_lr=True)
# SFT at toy scale: unscaled rates gave .98 bits per byte of answers, scaled ones 1.31 (dev/LOG.md, "Midtraining: all
# tokens or the assistant's")
SFT = ChatStage("sft", "chat_sft", "SFT", keep_whole=True, scales_lr=False)


@dataclass(frozen=True)
class ChatSettings:
    """What a run learns from, how long and how fast."""
    source:         Checkpoint     # model to begin with
    mixture:        Mixture
    num_epochs:     int
    num_iterations: int | None     # instead of whole epochs
    init_lr_frac:   float          # part of the base run's learning rates to begin with
    warmdown_ratio: float          # part of the run over which the rates fall to 0


def add_chat_args(parser: argparse.ArgumentParser) -> None:
    """The flags of the stages that learn from conversations, with those that every stage has."""
    add = parser.add_argument
    add("-g", "--model-tag", help="run to begin with (default: the latest)")
    add("-s", "--model-step", type=int, help="its checkpoint (default: the latest)")
    add("--out-tag", help="folder of this run (default: the tag of the run that it begins with)")
    # conversations
    either = parser.add_mutually_exclusive_group().add_argument
    either("--mixture", choices=MIXTURES, help="tasks to learn from, see tasks/mixtures.py (default: the stage's)")
    either("--tasks", nargs="+", metavar="NAME[:COUNT[:WEIGHT]]", help="instead of a mixture: these tasks, of each "
        "COUNT conversations (default: all), each used WEIGHT times (default: once)")
    add_words_flag(parser)
    add("--custom-json", action="append", default=[], metavar="FILE", help="your own conversations as well: a .jsonl, "
        ".json, .csv, .tsv or .parquet file, see tasks/customjson.py; may be repeated")
    # horizon and learning rates
    either = parser.add_mutually_exclusive_group().add_argument
    either("--num-epochs", type=int, default=1, help="times that each conversation is learned from")
    either("--num-iterations", type=int, help="optimizer steps, instead of whole epochs")
    add("--init-lr-frac", type=float, help="part of the base run's learning rates to begin with (default: the stage's)")
    add("--warmdown-ratio", type=float, help="part of the run over which the rates fall to 0 (default: the stage's)")
    add_stage_args(parser, eval_every=100, sample_every=100)


def read_chat_flags(args: argparse.Namespace, parser: argparse.ArgumentParser, argv: list[str] | None) -> StageFlags:
    """The parsed flags of these stages as values; what can't be learned from is refused."""
    parse_entries(args.tasks or ())
    for path in args.custom_json:
        check_file(expand_home(path))
    return read_flags(args, parser, argv)


def run_chat_stage(stage: ChatStage, source_stage: str, args: argparse.Namespace, flags: StageFlags) -> dict:
    """Begin or continue a run of a stage, as its flags say; writes its section of the report, and returns its results.
    Collective."""
    device, ranks = init_compute(args.device_type, args.deterministic)
    source = find_checkpoint(source_stage, args.model_tag, args.model_step)
    run_dir = get_run_dir(stage.name, args.out_tag or source.run_dir.name)
    with locked_run(run_dir):
        mixture = make_mixture(args.tasks or MIXTURES[args.mixture], args.custom_json, args.words)
        settings = ChatSettings(source, mixture, args.num_epochs, args.num_iterations, args.init_lr_frac,
                                args.warmdown_ratio)
        groups, epoch, recipe = make_recipe(stage, settings, flags, run_dir, ranks)
        setup = prepare_run(recipe, device, ranks)
        if setup:
            describe_changes(setup, settings)
            loader = setup.make_loader(groups, num_lanes=1,
                                       num_epochs=settings.num_epochs if recipe.plan.horizon == "epochs" else None)
            val_batches = validation_conversations(mixture.name, mixture.val, recipe.tokenizer, recipe.T,
                                                   setup.count_eval_rows(), ranks)
            run = begin_run(setup, make_state(setup), loader)
            if setup.first_step == 0:
                run.log.write("data", 0, **epoch.describe())
            info = train(run, val_batches, settings, epoch)
        else:
            info = read_info(run_dir)
        write_stage_section(stage.section, stage.title, run_dir, info,
                            metrics={"chat bpb": info["results"].get("val_bpb")},
                            values={"conversations": info["results"]["num_conversations"]})
        return {"run_dir": str(run_dir), **info["results"]}


def train(run: Run, val_batches: ValidationBatches | None, settings: ChatSettings, epoch: Epoch) -> dict:
    """The loop: save, stop?, evaluate, sample, set schedules, step, log. Returns run.json at its end."""
    state, log, saver, recipe, step, results = run.state, run.log, run.saver, run.setup.recipe, run.setup.first_step, {}
    plan, flags, tokenizer = recipe.plan, recipe.flags, recipe.tokenizer
    prompts = {question: tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]})
               for question in QUESTIONS}
    with StopSignal() as stop, run.loader, log, saver:
        while True:
            evaluating = run.is_due(step, flags.eval_every)
            sampling, is_last = run.is_due(step, flags.sample_every), step == run.setup.last_step
            saving, stopping = saver.due(step, stop.is_set(), evaluating)
            if saving or stopping or evaluating or sampling or is_last:
                run.steps.finish()
            if saving:
                saver.save(step, state.model, state.optimizer, run.get_meta())
            if stopping:
                run.stop(stop)
            if val_batches and (evaluating or step == 0 and flags.eval_every):
                results |= evaluate(run, step, val_batches)
            if sampling:
                print_samples(run, step, prompts, max_tokens=64)
            if is_last:
                return run.finish(step, results | epoch.describe())
            begin_time = time.perf_counter()
            lr_frac = set_schedules(state.optimizer, step, plan.num_iterations, settings.init_lr_frac,
                                    settings.warmdown_ratio)
            stats = take_step(state, run.loader.next_step(), step, log, stop)
            if stats is None:  # out of memory twice: save the steps before, and stop
                run.loader.give_back()
                continue
            step += 1
            values = {"lr_frac": lr_frac, "tokens": step * plan.batch_tokens, **run.loader.stats}
            run.steps.add(TakenStep(step, begin_time, stats, values))


def make_recipe(stage: ChatStage, settings: ChatSettings, flags: StageFlags, run_dir: Path,
                ranks: Ranks) -> tuple[ConversationGroups, Epoch, Recipe]:
    """The conversations, what an epoch of them is, and how they are learned from. Collective."""
    source, mixture = settings.source, settings.mixture
    saved, tokenizer = find_saved(stage.name, run_dir, flags.resume), load_run_tokenizer(source.meta)
    config, before = read_config(source.meta["model_config"]), source.meta["identity"]
    T = config.sequence_len
    for account in mixture.accounts:
        print0("\n".join(account.describe()))
    groups = ConversationGroups(mixture.name, mixture.train, tokenizer, T, keep_whole=stage.keep_whole)
    is_counted = saved and "epoch" in saved.meta and saved.meta["identity"]["conversations"] == groups.identity
    epoch = Epoch.from_json(saved.meta["epoch"]) if is_counted else count_epoch(groups, ranks)
    rule = before.get("rule", "july26")
    batch_tokens = before["plan"]["batch_tokens"] if flags.total_batch_size is None else flags.total_batch_size
    plan = make_chat_plan(config, estimate_flops(config), epoch_rows=epoch.num_rows, num_epochs=settings.num_epochs,
                          num_iterations=settings.num_iterations, batch_tokens=batch_tokens,
                          scales_lr=stage.scales_lr and find_rule(rule).scales_to_batch,
                          lr_batch_tokens=before["plan"].get("lr_batch_tokens", REFERENCE_BATCH_TOKENS))
    return groups, epoch, Recipe(
        stage.name, run_dir, flags, saved, source, tokenizer, source.meta["tokenizer"]["name"], config, plan, T,
        rows_per_step=count_rows(plan.batch_tokens, T, ranks.world_size), lrs={name: before[name] for name in LR_NAMES},
        data={"name": mixture.name, "hash": groups.identity["data"], "tasks": mixture.parts,
              **({"files": [account.to_json() for account in mixture.accounts]} if mixture.accounts else {})},
        identity={"source": source.describe(), "tasks": mixture.parts, "conversations": groups.identity},
        notes={"epoch": epoch.to_json()}, rule=rule)


def describe_changes(setup: Setup, settings: ChatSettings) -> None:
    """Print and record what isn't as in the stage before; everything else is taken over from there."""
    plan, source, before = setup.recipe.plan, settings.source, settings.source.meta["identity"]["plan"]
    name = f"{source.stage} {source.run_dir.name}, step {source.step}"
    pairs = (("tokens of a step", before["batch_tokens"], plan.batch_tokens),
             ("Muon's weight decay", before["weight_decay"], plan.weight_decay),
             ("learning rates", f"x{before['batch_lr_scale']:.3g} for the batch, its own schedule",
              f"x{settings.init_lr_frac:g} of those, x{plan.batch_lr_scale:.3g} for the batch, falling to 0 over the "
              f"last {settings.warmdown_ratio:.0%}"))
    print0(f"begun with {name}: its model, optimizer state, batch and learning rates, but for")
    for what, theirs, ours in pairs:
        if theirs != ours:
            decide(setup.decisions, what, ours, f"{name}: {theirs}")


def set_schedules(optimizer: MuonAdamW, step: int, num_iterations: int, init_lr_frac: float,
                  warmdown_ratio: float) -> float:
    """Set learning rates and momentum for a step; returns the learning rate's factor."""
    lr_frac = init_lr_frac * get_lr_frac(step, num_iterations, warmup_steps=0, warmdown_ratio=warmdown_ratio,
                                         final_lr_frac=0)
    optimizer.set_rates(lr_frac, get_chat_momentum(step))
    return lr_frac
