"""Reinforce the answers that earn a reward (RL), on tasks that grade an answer.

    python -m scripts.chat_rl                                    # the latest SFT model on GSM8K
    python -m scripts.chat_rl -a Arithmetic:2000 SpellingBee:500 # tasks that need no download
    torchrun --nproc_per_node=8 -m scripts.chat_rl -i mid        # straight from a midtrained model, on 8 GPUs

Begins with that run's weights and learning rate, but not with its optimizer state, and trains the blocks' matrices
alone. Each step asks some questions, has each answered several times, and learns from all the answers at once. The same
command again continues a run that was stopped or killed. State: $NANOCHAT_BASE_DIR/runs/rl/<tag>/.
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat.chat_stage import LR_NAMES, inherit_choices, set_schedules
from nanochat.checkpoint_manager import Checkpoint, Checkpointer, find_checkpoint, get_run_dir, locked_run
from nanochat.common import (
    Ranks,
    UserError,
    get_environment,
    get_peak_memory_bytes,
    init_compute,
    print0,
    run_script,
)
from nanochat.dataloader import hash_conversations
from nanochat.gpt import GPT, GPTConfig, estimate_flops
from nanochat.identity import check_ranks, compare_with_saved
from nanochat.optim import MuonAdamW
from nanochat.rl import (
    DEFAULT_SAMPLE_ROWS,
    SAMPLE_ROWS,
    Question,
    Rollouts,
    evaluate_answers,
    get_length_multiple,
    keep_matrices,
    make_questions,
    round_up,
)
from nanochat.scaling import Plan, make_rl_plan
from nanochat.stage import (
    Machine,
    add_stage_args,
    check_stage_args,
    choose_last_step,
    choose_machine,
    describe_run,
    get_finished_info,
    get_run_results,
    get_state,
    make_model,
    print_plan,
    take_step,
    write_report,
)
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import LossScaler, Progress, RunLog, StopSignal, any_rank
from tasks.mixtures import GENERATED, make_task, parse_entry

IDENTITY_ARGS = ("seed", "deterministic", "examples_per_step", "num_samples", "init_lr_frac")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-i", "--source", choices=("sft", "mid"), default="sft",
        help="stage of the model to begin with (default: %(default)s)")
    add("-g", "--model-tag", help="run to begin with (default: the latest)")
    add("-s", "--model-step", type=int, help="its checkpoint (default: the latest)")
    add("--out-tag", help="folder of this run (default: the tag of the run that it begins with)")
    # questions and answers
    add("-a", "--tasks", nargs="+", metavar="NAME[:COUNT]", default=["GSM8K"],
        help="tasks with a reward, of each COUNT questions (default: all of GSM8K)")
    add("--examples-per-step", type=int, default=16, help="questions of a step, all ranks together")
    add("--num-samples", type=int, default=16, help="answers to each question")
    add("--max-new-tokens", type=int, help="tokens of an answer, the calculator's included (default: 256, but at most "
        "half of the context)")
    add("--sample-rows", type=int, help="answers that a rank writes at once; fewer take less memory (default: "
        f"{SAMPLE_ROWS['cpu']} on a CPU, else {DEFAULT_SAMPLE_ROWS})")
    # horizon and learning rates
    add("--num-epochs", type=int, default=1, help="times that each question is asked")
    add("--num-iterations", type=int, help="optimizer steps, instead of whole epochs")
    add("--init-lr-frac", type=float, default=0.05, help="part of the source's learning rate, without its own such "
        "part, to begin with; it falls to 0")
    add("--eval-examples", type=int, default=200, help="held-out questions of each task in an evaluation")
    add("--eval-samples", type=int, default=4, help="answers to each of them at temperature 1, beside the greedy one")
    add_stage_args(parser, eval_every=60, sample_every=10, has_rows=False)
    # Eager unless asked for: each length of rows is compiled anew, and most of a step is sampling
    parser.set_defaults(compile="off")
    args = check_stage_args(parser.parse_args(argv))
    for flag, value in (("--max-new-tokens", args.max_new_tokens), ("--sample-rows", args.sample_rows),
                        ("--eval-examples", args.eval_examples), ("--eval-samples", args.eval_samples)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    if not 0 < args.init_lr_frac < math.inf:
        raise UserError(f"--init-lr-frac {args.init_lr_frac:g} must be above 0")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Beginning


def load_questions(entries: list[str], num_held_out: int, tokenizer,
                   max_prompt_tokens: int) -> tuple[list[Question], list[Question]]:
    """The questions to learn from, and so many of each task that are held out."""
    train, held_out = {}, {}
    for entry in entries:
        name, count, weight = parse_entry(entry)
        if weight != 1 or name in train:
            raise UserError(f"--tasks {entry}: name each task once, as NAME or NAME:COUNT")
        train[name] = make_task(name, "train", count)
        held_out[name] = make_task(name, "test", num_held_out if name in GENERATED else None)
    questions, tested = (make_questions(tasks, tokenizer, max_prompt_tokens) for tasks in (train, held_out))
    chosen = []
    for name in train:  # spread evenly over each task
        of_task = [question for question in tested if question.task_name == name]
        num = min(num_held_out, len(of_task))
        chosen += [of_task[i * len(of_task) // num] for i in range(num)]
    num_left_out = sum(map(len, train.values())) - len(questions)
    print0(f"questions: {len(questions):,} to learn from, {len(chosen):,} held out" +
           (f"; {num_left_out:,} left out, with prompts over {max_prompt_tokens} tokens" if num_left_out else ""))
    return questions, chosen


def choose_max_new_tokens(wanted: int | None, T: int) -> int:
    """Tokens of an answer: as asked if a question fits beside it, by default as the record has it in long contexts."""
    if wanted is not None and wanted >= T:
        raise UserError(f"--max-new-tokens {wanted} leaves no room for a question in a context of {T}; give at most "
                        f"{T // 2}")
    return min(256, T // 2) if wanted is None else wanted


@dataclass
class RLRun:
    """What the loop works on."""
    step:       int              # where this process goes on
    last_step:  int              # and where it stops
    saved:      dict             # meta.json of that step; {} where the run is new
    plan:       Plan
    machine:    Machine
    tokenizer:  RustBPETokenizer
    rollouts:   Rollouts
    held_out:   list[Question]
    model:      GPT
    optimizer:  MuonAdamW
    scaler:     LossScaler | None
    meta:       dict             # what each checkpoint says of the run
    saver:      Checkpointer
    log:        RunLog
    progress:   Progress
    start_time: float            # by time.perf_counter


def begin(args: argparse.Namespace, argv: list[str], device: torch.device, ranks: Ranks, source: Checkpoint,
          run_dir: Path) -> RLRun | dict:
    """Choose, load and announce everything; or run.json of a run that has nothing left to do. Collective."""
    start_time = time.perf_counter()
    step = checkpoints.find_resume_step(run_dir, args.resume)
    saved = {} if step is None else checkpoints.load_meta(run_dir, step)
    tokenizer, config = checkpoints.load_run_tokenizer(source.meta), GPTConfig(**source.meta["model_config"])
    max_new_tokens = choose_max_new_tokens(args.max_new_tokens, config.sequence_len)
    # rows of one token more than the context are what a stage learns from
    questions, held_out = load_questions(args.tasks, args.eval_examples, tokenizer,
                                         config.sequence_len + 1 - max_new_tokens)
    plan = make_rl_plan(config, estimate_flops(config), num_questions=len(questions), num_epochs=args.num_epochs,
                        num_iterations=args.num_iterations, examples_per_step=args.examples_per_step,
                        num_samples=args.num_samples, max_new_tokens=max_new_tokens,
                        batch_lr_scale=source.meta["identity"]["plan"]["batch_lr_scale"])
    if args.examples_per_step % ranks.world_size:
        raise UserError(f"--examples-per-step {args.examples_per_step} must be a multiple of the {ranks.world_size} "
                        "ranks")
    rows_per_rank = args.examples_per_step * args.num_samples // ranks.world_size
    data = {"name": ", ".join(args.tasks), "hash": hash_conversations([q.conversation for q in questions]),
            "questions": len(questions)}
    identity = {"source": source.describe(), "tokenizer": tokenizer.hash, "data": data, "model": asdict(config),
                "plan": asdict(plan), "max_new_tokens": max_new_tokens,
                **{name: source.meta["identity"][name] for name in LR_NAMES},
                **{name: getattr(args, name) for name in IDENTITY_ARGS}}
    check_ranks(run_dir, {"step": step, "flags": vars(args), **identity})
    environment, decisions = get_environment(device), []
    if saved:
        decisions += compare_with_saved(saved, identity, environment, run_dir, args.allow_mismatch)
        if info := get_finished_info(run_dir, step, plan):
            return info
    step = step or 0
    last_step = choose_last_step(args.stop_at, plan, step, run_dir)
    longest = max(len(question.prompt) for question in questions) + max_new_tokens - 1
    machine = choose_machine(args, device, ranks, rows_per_rank=rows_per_rank, config=config,
                             T=round_up(longest, get_length_multiple(device, use_compile=False)),
                             flops=(last_step - step) * plan.batch_tokens * plan.flops_per_token,
                             saved=saved["choices"] if saved else inherit_choices(source, device), decisions=decisions,
                             kept_why="as the run began" if saved else f"as the {source.stage} run")
    check_ranks(run_dir, machine.get_choices())
    sample_rows = args.sample_rows or saved.get("sample_rows") or SAMPLE_ROWS.get(device.type, DEFAULT_SAMPLE_ROWS)
    rollouts = Rollouts(questions, tokenizer, num_questions=args.examples_per_step, num_samples=args.num_samples,
                        max_new_tokens=max_new_tokens, seed=args.seed, ranks=ranks, sample_rows=sample_rows,
                        micro_rows=machine.micro_rows, state=saved.get("loader"),
                        length_multiple=get_length_multiple(device, machine.use_compile))
    model, optimizer, scaler = load_policy(config, machine, args.seed, plan, identity, source,
                                           Checkpoint("rl", run_dir, step, saved) if saved else None)
    info = describe_run("rl", args, argv, run_dir, model, plan, data=data, tokenizer=tokenizer,
                        tokenizer_name=source.meta["tokenizer"]["name"], environment=environment,
                        decisions=decisions, machine=machine, source=source.describe())
    meta = {"stage": "rl", "model_config": asdict(config), "identity": identity, "data": data,
            "tokenizer": info["tokenizer"], "environment": environment, "sample_rows": sample_rows}
    saver = Checkpointer(run_dir, keep_last=args.keep_last, keep_every=args.keep_every)
    saver.check_disk(model, optimizer)
    checkpoints.begin_run(run_dir, step if saved else None)
    log = RunLog(run_dir, info, ranks, resume_step=step if saved else None,
                 wandb_name="" if args.run == "dummy" else args.run)
    print_plan(info, run_dir, step)
    print0(f"begun with {source.stage} {source.run_dir.name}, step {source.step}: its model and x{args.init_lr_frac:g} "
           f"of its learning rates, falling to 0; only the blocks' matrices learn\n"
           f"a step: {args.examples_per_step} questions x {args.num_samples} answers of up to {max_new_tokens} tokens")
    return RLRun(step, last_step, saved, plan, machine, tokenizer, rollouts, held_out, model, optimizer, scaler, meta,
                 saver, log, Progress(plan, machine.peak_flops, saved.get("progress")), start_time)


def load_policy(config: GPTConfig, machine: Machine, seed: int, plan: Plan, identity: dict, source: Checkpoint,
                checkpoint: Checkpoint | None) -> tuple[GPT, MuonAdamW, LossScaler | None]:
    """Model, optimizer and loss scaler as RL's own checkpoint left them; or the source's weights. Collective.

    A new run's optimizer is new, too: Muon would make of the source's momentum a step of full size in its direction.
    """
    settings = {"weight_decay": plan.weight_decay, "batch_lr_scale": plan.batch_lr_scale,
                **{name: identity[name] for name in LR_NAMES}}
    model, optimizer, scaler = make_model(config, machine, seed, settings, None)
    optimizer = keep_matrices(optimizer)
    optimizer.get_named_state()  # made now, as make_model does: an update that runs out of memory can't be survived
    if checkpoint is None:
        checkpoints.load_weights(model, source.run_dir, source.step)
        return model, optimizer, scaler
    checkpoints.restore(checkpoint.run_dir, checkpoint.step, model, optimizer)
    if scaler and checkpoint.meta["scaler"]:
        vars(scaler).update(checkpoint.meta["scaler"])
    return model, optimizer, scaler


# ---------------------------------------------------------------------------------------------------------------------
# The run


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device, ranks = init_compute(args.device_type, args.deterministic)
    source = find_checkpoint(args.source, args.model_tag, args.model_step)
    run_dir = get_run_dir("rl", args.out_tag or source.run_dir.name)
    with locked_run(run_dir):
        run = begin(args, sys.argv if argv is None else argv, device, ranks, source, run_dir)
        info = run if isinstance(run, dict) else train(args, run)
        report(run_dir, info)
        return {"run_dir": str(run_dir), **info["results"]}


def train(args: argparse.Namespace, run: RLRun) -> dict:
    """The loop: save, stop?, evaluate, set schedules, step, log, sample. Returns run.json at its end."""
    model, optimizer, machine, plan, log, saver = run.model, run.optimizer, run.machine, run.plan, run.log, run.saver
    device, step, results, is_saved = machine.device, run.step, {}, bool(run.saved)

    def is_due(every: int) -> bool:
        return every > 0 and step > 0 and (step == run.last_step or step % every == 0)

    with StopSignal() as stop, log, saver:
        while True:
            # save before an evaluation, which may fail; after the first one, at most --save-every-minutes are at stake
            stopping, late, failed = any_rank(stop.is_set(), saver.is_late(args.save_every_minutes),
                                              saver.has_failed(), device=device)
            if failed:
                saver.wait()
            is_new = not (run.saved and step == run.step)  # what was loaded is on disk already
            unsaved = not is_saved and is_due(args.eval_every)
            if is_new and (is_due(args.save_every) or step == run.last_step or stopping or late or unsaved):
                saver.save(step, model, optimizer,
                           run.meta | get_state(machine, run.rollouts, optimizer, run.scaler, run.progress))
                is_saved = True
            if stopping:
                saver.wait()
                log.close("stopped")
                stop.end()
            if is_due(args.eval_every) or (step == 0 and args.eval_every > 0):
                results |= evaluate(args, run, step)
            if step == run.last_step:
                break
            step_start = time.perf_counter()
            lr_frac = set_schedules(optimizer, step, plan.num_iterations, args.init_lr_frac, warmdown_ratio=1.0)
            batch = run.rollouts.next_step(model, step)
            stats, machine = take_step(model, optimizer, batch, machine, step, run.scaler, log, stop)
            if stats is None:  # out of memory: save what was there before, and stop
                run.rollouts.give_back()
                continue
            run.rollouts.micro_rows = machine.micro_rows
            stats.check_finite(step)
            run.rollouts.measure_step(model)
            step += 1
            values = run.progress.update(stats, time.perf_counter() - step_start) | {"lr_frac": lr_frac}
            values |= run.rollouts.get_values(values["step_ms"] / 1e3)
            values["peak_memory_bytes"] = get_peak_memory_bytes(device)
            log.write("train", step, **values)
            print0(format_line(step, plan, run.progress, values))
            if is_due(args.sample_every):
                log.write("sample", step, **run.rollouts.sample)
                print0("sample | reward {reward:g}: {prompt!r} -> {text!r}".format(**run.rollouts.sample))

    results |= get_run_results(run.progress, step, plan, device) | {
        "tokens": run.rollouts.num_tokens, "num_skipped": run.progress.num_skipped,
        "reward": run.rollouts.stats.get("reward")}
    log.update(results=results, wall_sec=time.perf_counter() - run.start_time)
    log.close("finished" if step == plan.num_iterations else "stopped")
    return log.info


def evaluate(args: argparse.Namespace, run: RLRun, step: int) -> dict:
    """Held-out questions, greedily and at temperature 1. Collective."""
    start = time.perf_counter()
    values = evaluate_answers(run.model, run.tokenizer, run.held_out, num_samples=args.eval_samples,
                              max_new_tokens=run.rollouts.max_new_tokens, seed=args.seed, ranks=run.machine.ranks,
                              sample_rows=run.rollouts.sample_rows)
    run.log.write("eval", step, **values, eval_sec=time.perf_counter() - start)
    for name in dict.fromkeys(question.task_name for question in run.held_out):
        print0(f"step {step:05d} | {name}: {values[f'{name}_greedy_frac']:.1%} of {values[f'{name}_problems']} "
               f"held-out questions answered greedily, {values[f'{name}_pass_at_1']:.1%} at temperature 1")
    return values


def format_line(step: int, plan: Plan, progress: Progress, values: dict) -> str:
    median_sec = sorted(progress.recent_sec)[len(progress.recent_sec) // 2]
    left_min = (plan.num_iterations - step) * median_sec / 60
    pass_at = " | ".join(f"pass@{key.removeprefix('pass_at_')} {value:.3f}" for key, value in values.items()
                         if key.startswith("pass_at_"))
    return (f"step {step:05d}/{plan.num_iterations:05d} | reward {values['reward']:.3f} | {pass_at} "
            f"| {values['answer_tokens']:.0f} tokens an answer | entropy {values['entropy_nats']:.3f} "
            f"| moved {values['kl_nats']:.3f} | cut {values['truncated_frac']:.1%} "
            f"| even {values['zero_variance_frac']:.1%} | grad {values['grad_norm']:.3f} "
            f"| lr x{values['lr_frac']:.3f} | {values['step_ms']:.0f} ms, "
            f"{values['sample_sec'] * 1e3:.0f} of them sampling at {values['sample_tokens_per_sec']:,.0f} tok/s "
            f"| {left_min:.1f} min left" + (f" | SKIPPED: {values['skipped']}" if values["skipped"] else ""))


def report(run_dir: Path, info: dict) -> None:
    """The section of the report card."""
    results, source = info["results"], info["source"]
    names = [key.removesuffix("_greedy_frac") for key in results if key.endswith("_greedy_frac")]
    metrics = {f"{name} (greedy, {results[f'{name}_problems']} questions)": results[f"{name}_greedy_frac"]
               for name in names}
    write_report("chat_rl", "RL", run_dir, info, metrics=metrics,
                 values={"begun with": f"{source['stage']} {source['tag']}, step {source['step']}",
                         "questions": info["data"]["questions"], "steps skipped": results["num_skipped"],
                         "reward of the last step": results.get("reward")})


if __name__ == "__main__":
    run_script(main)
