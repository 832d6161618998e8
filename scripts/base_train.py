"""Pretrain a base model. One dial, --depth; width, horizon, batch, learning rates and decay follow from it.

    python -m scripts.base_train --depth 4 --max-seq-len 512 --target-param-data-ratio 0.6                    # a laptop
    torchrun --standalone --nproc-per-node 8 -m scripts.base_train -- --depth 24 --target-param-data-ratio 8  # a node

The same command again continues a run that was stopped or killed. State: $NANOCHAT_BASE_DIR/runs/base/<tag>/.
"""

import argparse
import time
from pathlib import Path

from nanochat import scaling
from nanochat.checkpoint_manager import find_saved, get_run_dir, locked_run
from nanochat.choices import LR_NAMES, StageFlags, add_stage_args, count_rows, read_flags
from nanochat.command_line import Parser, int_or_all, int_or_never, run_script
from nanochat.common import Ranks
from nanochat.config import estimate_flops
from nanochat.dataloader import TextGroups, ValidationBatches, validation_batches
from nanochat.dataset import default_source
from nanochat.devices import init_compute
from nanochat.loss_eval import log_core
from nanochat.optim import MuonAdamW
from nanochat.presets import add_plan_args, choose_knobs, choose_rule, find_rule, parse_preset_args
from nanochat.report import write_stage_section
from nanochat.run import StopSignal, TakenStep, read_info
from nanochat.scaling import TrainingRule, get_lr_frac, get_muon_momentum, get_weight_decay_frac, make_config, make_plan
from nanochat.shards import ShardList, load_shards
from nanochat.stage import Recipe, Run, begin_run, evaluate, make_state, prepare_run, print_samples
from nanochat.tokenizer import get_tokenizer
from nanochat.train import take_step

SAMPLE_PROMPTS = ("The capital of France is", "If yesterday was Friday, then tomorrow will be",
                  "The opposite of hot is", "def add(a, b):")


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, StageFlags]:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model-tag", help="folder of the run (default: d<depth>, <preset> or <preset>-d<depth>)")
    add("--data", help="a source or a folder that nanochat.dataset made (default: climbmix on a GPU, else python-docs)")
    add("--tokenizer", default="default", help="name of the tokenizer that scripts.tok_train made")
    # model and horizon
    add("--preset", metavar="NAME", help="a model of the family with its training, such as marin-150m (see presets.py)")
    add("--depth", type=int, default=20, help="layers: the one dial")
    add("--knobs", nargs="+", action="extend", default=[], metavar="KNOB=VALUE",
        help="other parts, such as smear=off (see config.py)")
    add_plan_args(parser)
    # optimization
    add("--embedding-lr", type=float, default=scaling.EMBEDDING_LR, help="of the token and value embeddings")
    add("--unembedding-lr", type=float, default=scaling.UNEMBEDDING_LR, help="of the head")
    add("--matrix-lr", type=float, default=scaling.MATRIX_LR, help="of the matrices, which Muon updates")
    add("--scalar-lr", type=float, default=scaling.SCALAR_LR, help="of the scalars")
    add("--weight-decay", type=float, default=scaling.WEIGHT_DECAY, help="Muon's, before scaling to the horizon")
    add("--warmup-steps", type=int, default=scaling.WARMUP_STEPS, help="warm-up steps, at most a tenth of the run")
    add("--warmdown-ratio", type=float, default=scaling.WARMDOWN_RATIO, help="part of the run spent decaying")
    add("--final-lr-frac", type=float, default=scaling.FINAL_LR_FRAC, help="final rate as a part of the peak")
    add("--packing", choices=("best-fit", "stream"), default="best-fit", help="how documents fill rows")
    add("--long-docs", choices=("split", "crop"), default="split", help="what best-fit does with long documents")
    # evaluation
    add("--core-metric-every", type=int_or_never, help="steps between CORE evaluations, or never")
    add("--core-metric-max-per-task", type=int_or_all, default=500, help="items of each CORE task, or all")
    add_stage_args(parser, eval_every=250, sample_every=2000)
    args = parse_preset_args(parser, argv)
    return args, read_flags(args, parser, argv)


def main(argv: list[str] | None = None) -> dict:
    args, flags = parse_args(argv)
    device, ranks = init_compute(args.device_type, args.deterministic)
    run_dir = get_run_dir("base", args.model_tag or f"d{args.depth}")
    with locked_run(run_dir):
        recipe, shards = make_recipe(args, flags, run_dir, ranks)
        setup = prepare_run(recipe, device, ranks)
        if setup:
            groups = TextGroups(shards, recipe.tokenizer, recipe.T, packing=args.packing, long_docs=args.long_docs)
            loader = setup.make_loader(groups)
            val_batches = validation_batches(shards, recipe.tokenizer, recipe.T, setup.count_eval_rows(), ranks)
            info = train(begin_run(setup, make_state(setup), loader), val_batches, args)
        else:
            info = read_info(run_dir)
        write_stage_section("base_train", "Base model: training", run_dir, info, values={}, metrics={
            "val_bpb": info["results"].get("val_bpb"), "CORE": info["results"].get("core_metric")})
        return {"run_dir": str(run_dir), **info["results"]}


def train(run: Run, val_batches: ValidationBatches, args: argparse.Namespace) -> dict:
    """The loop: save, stop?, evaluate, sample, set schedules, step, log. Returns run.json at its end."""
    state, log, saver, recipe, step, results = run.state, run.log, run.saver, run.setup.recipe, run.setup.first_step, {}
    plan, flags, tokenizer = recipe.plan, recipe.flags, recipe.tokenizer
    prompts = {prompt: tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id()) for prompt in SAMPLE_PROMPTS}
    with StopSignal() as stop, run.loader, log, saver:
        while True:
            evaluating, scoring = run.is_due(step, flags.eval_every), run.is_due(step, args.core_metric_every)
            sampling, is_last = run.is_due(step, flags.sample_every), step == run.setup.last_step
            saving, stopping = saver.due(step, stop.is_set(), evaluating or scoring)
            if saving or stopping or evaluating or scoring or sampling or is_last:
                run.steps.finish()
            if saving:
                saver.save(step, state.model, state.optimizer, run.get_meta())
            if stopping:
                run.stop(stop)
            if evaluating:
                results |= evaluate(run, step, val_batches)
            if scoring:
                results |= log_core(state.model, tokenizer, log, step, args.core_metric_max_per_task)
            if sampling:
                print_samples(run, step, prompts, max_tokens=24)
            if is_last:
                return run.finish(step, results)
            begin_time = time.perf_counter()
            lr_frac = set_schedules(state.optimizer, step, plan.num_iterations, args, find_rule(recipe.rule))
            row_tokens = plan.get_row_tokens(step, recipe.T)
            stats = take_step(state, run.loader.next_step().cut(row_tokens), step, log, stop)
            if stats is None:  # out of memory, and no smaller micro-batch to try: save, and stop
                run.loader.give_back()
                continue
            step += 1
            flops = plan.count_flops(step)
            values = {"lr_frac": lr_frac, "row_tokens": row_tokens, "tokens": step * plan.batch_tokens, "flops": flops,
                      **run.loader.stats}
            run.steps.add(TakenStep(step, begin_time, stats, values, flops - plan.count_flops(step - 1)))


def make_recipe(args: argparse.Namespace, flags: StageFlags, run_dir: Path, ranks: Ranks) -> tuple[Recipe, ShardList]:
    """The model, how long and how fast it is trained, and the text it is trained on."""
    saved, tokenizer = find_saved("base", run_dir, flags.resume), get_tokenizer(args.tokenizer)
    shards = load_shards(args.data or default_source(args.device_type),
                         train_files=saved and saved.meta["data"]["train_files"])
    before = saved.meta["identity"] if saved else None
    rule = choose_rule(args.preset, before)
    config = make_config(args.depth, vocab_size=tokenizer.get_vocab_size(), sequence_len=args.max_seq_len,
                         aspect_ratio=args.aspect_ratio, head_dim=args.head_dim, window_pattern=args.window_pattern,
                         **choose_knobs(args.preset, args.knobs, saved and saved.meta))
    plan = make_plan(config, estimate_flops(config), num_iterations=args.num_iterations,
                     target_flops=args.target_flops, target_param_data_ratio=args.target_param_data_ratio,
                     batch_tokens=before["plan"]["batch_tokens"] if before and args.total_batch_size is None else
                     args.total_batch_size, step_multiple=config.sequence_len * ranks.world_size,
                     weight_decay=args.weight_decay,
                     seq_len_warmup=args.seq_len_warmup, rule=find_rule(rule))
    data = {"name": shards.name, "hash": shards.hash, "folder": str(shards.val.parent),
            "train_files": [path.name for path in shards.train]}
    rows_per_step = count_rows(plan.batch_tokens, config.sequence_len, ranks.world_size)
    return Recipe(
        "base", run_dir, flags, saved, source=None, tokenizer=tokenizer, tokenizer_name=args.tokenizer, config=config,
        plan=plan, T=config.sequence_len, rows_per_step=rows_per_step, data=data, identity={"data": shards.hash},
        lrs={name: getattr(args, name) for name in LR_NAMES}, notes={}, rule=rule), shards


def set_schedules(optimizer: MuonAdamW, step: int, n: int, args: argparse.Namespace, rule: TrainingRule) -> float:
    """Set learning rates, momentum and weight decay for a step of n; returns the learning rate's factor."""
    lr_frac = get_lr_frac(step, n, warmup_steps=args.warmup_steps, warmdown_ratio=args.warmdown_ratio,
                          final_lr_frac=args.final_lr_frac, warmdown=rule.warmdown)
    optimizer.set_rates(lr_frac, get_muon_momentum(step, n, warmdown_ratio=args.warmdown_ratio, rule=rule),
                        get_weight_decay_frac(step, n, rule.decay_fall))
    return lr_frac


if __name__ == "__main__":
    run_script(main)
