"""Pretrain a base model. One dial, --depth; width, horizon, batch, learning rates and decay follow from it.

    python -m scripts.base_train --depth 4 --max-seq-len 512 --total-batch-size 16384 --num-iterations 500    # a laptop
    torchrun --standalone --nproc-per-node 8 -m scripts.base_train -- --depth 24 --target-param-data-ratio 8  # a node

The same command again continues a run that was stopped or killed. State: $NANOCHAT_BASE_DIR/runs/base/<tag>/.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.common import (
    Ranks,
    UserError,
    get_environment,
    get_peak_memory_bytes,
    init_compute,
    print0,
    run_script,
)
from nanochat.config import estimate_flops
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import TextGroups, TrainLoader, validation_batches
from nanochat.dataset import default_source
from nanochat.flash_attention import FLEX_BLOCK
from nanochat.gpt import GPT, GPTConfig
from nanochat.identity import check_ranks, compare_with_saved
from nanochat.optim import MuonAdamW
from nanochat.scaling import Plan, get_lr_frac, get_muon_momentum, get_weight_decay_frac, make_config, make_plan
from nanochat.shards import load_shards
from nanochat.stage import (
    DEFAULT_EVAL_TOKENS,
    EVAL_TOKENS,
    Machine,
    add_stage_args,
    check_stage_args,
    choose_last_step,
    choose_machine,
    count_rows,
    describe_run,
    evaluate,
    get_finished_info,
    get_run_results,
    get_state,
    make_model,
    print_plan,
    print_samples,
    take_step,
    write_report,
)
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from nanochat.train import Progress, RunLog, StopSignal, any_rank

SAMPLE_PROMPTS = ("The capital of France is", "If yesterday was Friday, then tomorrow will be",
                  "The opposite of hot is", "def add(a, b):")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-tag", help="folder of the run (default: d<depth>)")
    add("--data", help="a source or a folder that nanochat.dataset made (default: climbmix on a GPU, else python-docs)")
    add("--tokenizer", default="default", help="name of the tokenizer that scripts.tok_train made")
    # model
    add("--depth", type=int, default=20, help="layers: the one dial")
    add("--aspect-ratio", type=int, default=64, help="width in channels per layer")
    add("--head-dim", type=int, default=128, help="channels of an attention head")
    add("--max-seq-len", type=int, default=2048, help="context in tokens")
    add("--window-pattern", default="SSSL", help="attention windows, tiled over the layers: L whole, S a quarter")
    # horizon: the first that is given
    add("--num-iterations", type=int, help="optimizer steps")
    add("--target-flops", type=float, help="training FLOPs")
    add("--target-param-data-ratio", type=float, default=12, help="tokens per scaling parameter")
    # optimization
    add("--embedding-lr", type=float, default=0.3)
    add("--unembedding-lr", type=float, default=0.008)
    add("--matrix-lr", type=float, default=0.02)
    add("--scalar-lr", type=float, default=0.5)
    add("--weight-decay", type=float, default=0.28, help="Muon's, before scaling to the horizon")
    add("--warmup-steps", type=int, default=40, help="at most; a tenth of a short run")
    add("--warmdown-ratio", type=float, default=0.65, help="part of the run over which the rate falls")
    add("--final-lr-frac", type=float, default=0.05, help="part of the rate that is left at the end")
    add("--seq-len-warmup", metavar="START:STEPS", help="rows of START tokens, doubled until they are whole after so "
        "many steps (default: whole from the first)")
    # data order
    add("--packing", choices=("best-fit", "stream"), default="best-fit")
    add("--long-docs", choices=("split", "crop"), default="split", help="what best-fit does with long documents")
    # evaluation
    add("--core-metric-every", type=int, default=-1, help="steps between CORE evaluations; -1 = never")
    add("--core-metric-max-per-task", type=int, default=500, help="items of each CORE task; -1 = all")
    add_stage_args(parser, eval_every=250, sample_every=2000)
    return check_stage_args(parser.parse_args(argv))


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device, ranks = init_compute(args.device_type, args.deterministic)
    run_dir = checkpoints.get_run_dir("base", args.model_tag or f"d{args.depth}")
    with checkpoints.locked_run(run_dir):
        return train(args, sys.argv if argv is None else argv, device, ranks, run_dir)


def train(args: argparse.Namespace, argv: list[str], device: torch.device, ranks: Ranks, run_dir: Path) -> dict:
    """Start or continue the run in `run_dir`; returns its results."""
    start_time = time.perf_counter()
    step = checkpoints.find_resume_step(run_dir, args.resume)
    saved = {} if step is None else checkpoints.load_meta(run_dir, step)
    shards = load_shards(args.data or default_source(), train_files=saved.get("data", {}).get("train_files"))
    tokenizer = get_tokenizer(args.tokenizer)
    config, plan = plan_run(args, tokenizer.get_vocab_size())
    T, rows_per_step = config.sequence_len, count_rows(plan.batch_tokens, config.sequence_len, ranks.world_size)
    identity = {"tokenizer": tokenizer.hash, "data": shards.hash, "model": asdict(config), "plan": asdict(plan),
                **{name: getattr(args, name) for name in IDENTITY_ARGS}}
    check_ranks(run_dir, {"step": step, "flags": vars(args), **identity})
    environment, decisions = get_environment(device), []
    if saved:
        decisions += compare_with_saved(saved, identity, environment, run_dir, args.allow_mismatch)
        if info := get_finished_info(run_dir, step, plan):
            report(run_dir, info)
            return {"run_dir": str(run_dir), **info["results"]}
    step = step or 0
    last_step = choose_last_step(args.stop_at, plan, step, run_dir)
    machine = choose_machine(args, device, ranks, rows_per_rank=rows_per_step // ranks.world_size, config=config, T=T,
                             flops=plan.count_flops(last_step) - plan.count_flops(step),
                             saved=saved.get("choices", {}), decisions=decisions)
    if plan.short_rows:
        decisions.append(describe_short_rows(plan, T, machine))
    check_ranks(run_dir, machine.get_choices())
    groups = TextGroups(shards, tokenizer, T, packing=args.packing, long_docs=args.long_docs)
    loader = TrainLoader(groups, rows_per_step, args.seed, ranks, state=saved.get("loader"),
                         allow_mismatch=args.allow_mismatch, pin_memory=device.type == "cuda")
    model, optimizer, scaler = make_model(
        config, machine, args.seed,
        {"unembedding_lr": args.unembedding_lr, "embedding_lr": args.embedding_lr, "matrix_lr": args.matrix_lr,
         "scalar_lr": args.scalar_lr, "weight_decay": plan.weight_decay, "batch_lr_scale": plan.batch_lr_scale},
        checkpoints.Checkpoint("base", run_dir, step, saved) if saved else None)
    eval_tokens = args.eval_tokens or EVAL_TOKENS.get(device.type, DEFAULT_EVAL_TOKENS)
    val_batches = validation_batches(shards, tokenizer, T, -(-eval_tokens // T), batch_rows=machine.micro_rows,
                                     ranks=ranks)
    data = {"name": shards.name, "hash": shards.hash, "folder": str(shards.val.parent),
            "train_files": [path.name for path in shards.train]}
    info = describe_run("base", args, argv, run_dir, model, plan, data=data, tokenizer_name=args.tokenizer,
                        tokenizer=tokenizer, environment=environment, decisions=decisions, machine=machine)
    meta = {"stage": "base", "model_config": asdict(config), "identity": identity, "tokenizer": info["tokenizer"],
            "data": data, "environment": environment}
    saver = checkpoints.Checkpointer(run_dir, keep_last=args.keep_last, keep_every=args.keep_every)
    saver.check_disk(model, optimizer)
    checkpoints.begin_run(run_dir, step if saved else None)
    log = RunLog(run_dir, info, ranks, resume_step=step if saved else None,
                 wandb_name="" if args.run == "dummy" else args.run)
    print_plan(info, run_dir, step)
    prompts = {prompt: tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id()) for prompt in SAMPLE_PROMPTS}
    progress = Progress(plan, machine.peak_flops, saved.get("progress"))

    # ----- the loop: save, stop?, evaluate, sample, set schedules, step, log
    first_step, results, is_saved = step, {}, bool(saved)

    def is_due(every: int) -> bool:
        return every > 0 and step > 0 and (step == last_step or step % every == 0)

    with StopSignal() as stop, loader, log, saver:
        while True:
            # save before an evaluation, which may fail; after the first one, at most --save-every-minutes are at stake
            stopping, late, failed = any_rank(stop.is_set(), saver.is_late(args.save_every_minutes),
                                              saver.has_failed(), device=device)
            if failed:
                saver.wait()
            is_new = not (saved and step == first_step)  # what was loaded is on disk already
            unsaved = not is_saved and (is_due(args.eval_every) or is_due(args.core_metric_every))
            if is_new and (is_due(args.save_every) or step == last_step or stopping or late or unsaved):
                saver.save(step, model, optimizer, meta | get_state(machine, loader, optimizer, scaler, progress))
                is_saved = True
            if stopping:
                saver.wait()
                log.close("stopped")
                stop.end()
            if is_due(args.eval_every):
                results |= evaluate(model, val_batches, tokenizer, log, step, batch_rows=machine.micro_rows)
            if is_due(args.core_metric_every):
                results |= evaluate_core_metric(model, tokenizer, log, step, args.core_metric_max_per_task)
            if is_due(args.sample_every) and ranks.rank == 0:
                print_samples(model, tokenizer, prompts, 24, log, step)
            if step == last_step:
                break
            if step == first_step and machine.use_compile:
                print0("compiling the step: up to a minute the first time, a few seconds after that ...")
            step_start = time.perf_counter()
            lr_frac = set_schedules(optimizer, step, plan.num_iterations, args)
            row_tokens = plan.get_row_tokens(step, T)
            batch = loader.next_step().cut(row_tokens)
            stats, machine = take_step(model, optimizer, batch, machine, step, scaler, log, stop)
            if stats is None:  # out of memory: save what was there before, and stop
                loader.give_back()
                continue
            stats.check_finite(step)
            step += 1
            flops = plan.count_flops(step)
            values = progress.update(stats, time.perf_counter() - step_start, flops - plan.count_flops(step - 1))
            values |= {"lr_frac": lr_frac, "row_tokens": row_tokens, "tokens": step * plan.batch_tokens, "flops": flops,
                       **loader.stats, "peak_memory_bytes": get_peak_memory_bytes(device)}
            log.write("train", step, **values)
            print0(progress.format_line(step, values))

    results |= get_run_results(progress, step, plan, device)
    log.update(results=results, wall_sec=time.perf_counter() - start_time)
    log.close("finished" if step == plan.num_iterations else "stopped")
    report(run_dir, log.info)
    return {"run_dir": str(run_dir), **results}


# Arguments that must be the same when a run is continued; the rest of the identity follows from others
IDENTITY_ARGS = ("seed", "deterministic", "packing", "long_docs", "embedding_lr", "unembedding_lr", "matrix_lr",
                 "scalar_lr", "warmup_steps", "warmdown_ratio", "final_lr_frac", "seq_len_warmup")


def plan_run(args: argparse.Namespace, vocab_size: int) -> tuple[GPTConfig, Plan]:
    """The model, and how long and how fast it is trained."""
    config = make_config(args.depth, vocab_size=vocab_size, sequence_len=args.max_seq_len,
                         aspect_ratio=args.aspect_ratio, head_dim=args.head_dim, window_pattern=args.window_pattern)
    plan = make_plan(config, estimate_flops(config), num_iterations=args.num_iterations,
                     target_flops=args.target_flops, target_param_data_ratio=args.target_param_data_ratio,
                     batch_tokens=args.total_batch_size, weight_decay=args.weight_decay,
                     seq_len_warmup=args.seq_len_warmup)
    return config, plan


def describe_short_rows(plan: Plan, T: int, machine: Machine) -> dict:
    """The stages of the sequence length warm-up, printed and as run.json keeps them."""
    stages = ", ".join(f"{stage.row_tokens} to step {stage.end_step}" for stage in plan.short_rows)
    why = "asked for" + ("; the first step of each length compiles" if machine.use_compile else "")
    if machine.attention == "flex" and plan.short_rows[0].row_tokens % FLEX_BLOCK:
        why += f"; rows that are no multiple of {FLEX_BLOCK} tokens use sdpa"
    print0(f"tokens of a row: {stages}, then {T} ({why})")
    return {"what": "tokens of a row", "value": f"{stages}, then {T}", "why": why}


def set_schedules(optimizer: MuonAdamW, step: int, num_iterations: int, args: argparse.Namespace) -> float:
    """Set learning rates, momentum and weight decay for a step; returns the learning rate's factor."""
    lr_frac = get_lr_frac(step, num_iterations, warmup_steps=args.warmup_steps, warmdown_ratio=args.warmdown_ratio,
                          final_lr_frac=args.final_lr_frac)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_frac
        if group["kind"] == "muon":
            group["momentum"] = get_muon_momentum(step, num_iterations, warmdown_ratio=args.warmdown_ratio)
            group["weight_decay"] = group["initial_weight_decay"] * get_weight_decay_frac(step, num_iterations)
    return lr_frac


def evaluate_core_metric(model: GPT, tokenizer: RustBPETokenizer, log: RunLog, step: int, max_per_task: int) -> dict:
    """The CORE metric, where its data is on disk; an evaluation never costs the run."""
    try:
        values = evaluate_core(model, tokenizer, max_per_task=max_per_task)
    except UserError as error:
        print0(f"CORE was not evaluated: {error}")
        return {}
    log.write("core", step, **values)
    print0(f"step {step:05d} | CORE {values['core_metric']:.4f}")
    return {"core_metric": values["core_metric"]}


def report(run_dir: Path, info: dict) -> None:
    """The section of the report card."""
    results = info["results"]
    write_report("base_train", "Base model: training", run_dir, info,
                 metrics={"val_bpb": results.get("val_bpb"), "CORE": results.get("core_metric")}, values={})


if __name__ == "__main__":
    run_script(main)
