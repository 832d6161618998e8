"""Reinforce the answers that earn a reward (RL), on tasks that grade an answer.

    python -m scripts.chat_rl                                    # the latest SFT model on GSM8K
    python -m scripts.chat_rl -a Arithmetic:2000 SpellingBee:500 # tasks that need no download
    torchrun --nproc_per_node=8 -m scripts.chat_rl -i mid        # straight from a midtrained model, on 8 GPUs

Begins with the weights and learning rate of the run that --source and --model-tag name, but not with its optimizer
state, and trains the blocks' matrices alone. Each step asks some questions, has each answered several times, and learns
from all the answers at once. The same command again continues a run that was stopped or killed. State:
$NANOCHAT_BASE_DIR/runs/rl/<tag>/.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from nanochat.chat_stage import set_schedules
from nanochat.checkpoint_manager import (
    Checkpoint,
    find_checkpoint,
    find_saved,
    get_run_dir,
    load_run_tokenizer,
    locked_run,
)
from nanochat.choices import LR_NAMES, StageFlags, add_stage_args, add_words_flag, read_flags
from nanochat.command_line import Parser, run_script
from nanochat.common import Ranks, UserError, print0
from nanochat.config import GPTConfig, estimate_flops, read_config
from nanochat.dataloader import hash_conversations
from nanochat.devices import init_compute
from nanochat.report import write_stage_section
from nanochat.rl import (
    SAMPLE_ROWS,
    Question,
    Rollouts,
    RolloutSettings,
    count_engine_bytes,
    evaluate_answers,
    get_length_multiple,
    keep_matrices,
    make_questions,
    round_up,
)
from nanochat.run import StopSignal, read_info
from nanochat.scaling import make_rl_plan
from nanochat.stage import Recipe, Run, Setup, begin_run, make_state, prepare_run
from nanochat.train import take_step
from tasks.catalog import REWARD_TASKS
from tasks.mixtures import GENERATED, make_task, parse_entries


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, StageFlags]:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("-i", "--source", choices=("sft", "mid"), default="sft",
        help="stage of the model to begin with")
    add("-g", "--model-tag", help="run to begin with (default: the latest)")
    add("-s", "--model-step", type=int, help="its checkpoint (default: the latest)")
    add("--out-tag", help="folder of this run (default: the tag of the run that it begins with)")
    # questions and answers
    add("-a", "--tasks", nargs="+", metavar="NAME[:COUNT]", default=["GSM8K"],
        help="tasks with a reward, of each COUNT questions (default: all of GSM8K)")
    add_words_flag(parser)
    add("--examples-per-step", type=int, default=16, help="questions of a step, all ranks together")
    add("--num-samples", type=int, default=16, help="answers to each question")
    add("--max-new-tokens", type=int, help="tokens of an answer, the calculator's included (default: 256, but at most "
        "half of the context)")
    add("--sample-rows", type=int, help="answers that a rank samples at once; fewer take less memory (default: "
        f"{SAMPLE_ROWS['cpu']} on a CPU, else {SAMPLE_ROWS['cuda']})")
    # horizon and learning rates
    either = parser.add_mutually_exclusive_group().add_argument
    either("--num-epochs", type=int, default=1, help="times that each question is asked")
    either("--num-iterations", type=int, help="optimizer steps, instead of whole epochs")
    add("--init-lr-frac", type=float, default=0.05, help="part of the source's learning rate, without its own such "
        "part, to begin with; it falls to 0")
    add("--eval-examples", type=int, default=200, help="held-out questions of each task in an evaluation")
    add("--eval-samples", type=int, default=4, help="answers to each of them at temperature 1, beside the greedy one")
    add_stage_args(parser, eval_every=60, sample_every=10, has_rows=False)
    # Eager by default: each length of rows is compiled anew, and most of a step is sampling
    parser.set_defaults(compile="off")
    args = parser.parse_args(argv)
    parse_tasks(args.tasks)
    flags = read_flags(args, parser, argv)
    # What no plan can have is refused now; a model and a single question stand in until they are there
    make_rl_plan(GPTConfig(), 1.0, num_questions=1, num_epochs=args.num_epochs, num_iterations=args.num_iterations,
                 examples_per_step=args.examples_per_step, num_samples=args.num_samples,
                 max_new_tokens=args.max_new_tokens or 1, batch_lr_scale=1.0)
    return args, flags


def main(argv: list[str] | None = None) -> dict:
    args, flags = parse_args(argv)
    device, ranks = init_compute(args.device_type, args.deterministic)
    source = find_checkpoint(args.source, args.model_tag, args.model_step)
    run_dir = get_run_dir("rl", args.out_tag or source.run_dir.name)
    with locked_run(run_dir):
        recipe, questions, held_out = make_recipe(args, flags, source, run_dir, device, ranks)
        setup = prepare_run(recipe, device, ranks)
        if setup:
            rollouts = make_rollouts(args, setup, questions, held_out if flags.eval_every else [])
            run = begin_run(setup, make_state(setup, keep_matrices), rollouts)
            print0(f"begun with {source.stage} {source.run_dir.name}, step {source.step}: its model and "
                   f"x{args.init_lr_frac:g} of its learning rates, falling to 0; only the blocks' matrices learn\n"
                   f"a step: {args.examples_per_step} questions x {args.num_samples} answers of up to "
                   f"{rollouts.sampling.max_new_tokens} tokens")
            info = train(run, held_out, args)
        else:
            info = read_info(run_dir)
        report(run_dir, info)
        return {"run_dir": str(run_dir), **info["results"]}


def train(run: Run, held_out: list[Question], args: argparse.Namespace) -> dict:
    """The loop: save, stop?, evaluate, sample, set schedules, step, log. Returns run.json at its end."""
    state, log, saver, recipe, step, results = run.state, run.log, run.saver, run.setup.recipe, run.setup.first_step, {}
    plan, flags, rollouts = recipe.plan, recipe.flags, run.loader
    with StopSignal() as stop, log, saver:
        while True:
            evaluating = run.is_due(step, flags.eval_every)
            saving, stopping = saver.due(step, stop.is_set(), evaluating)
            if saving:
                saver.save(step, state.model, state.optimizer, run.get_meta())
            if stopping:
                run.stop(stop)
            if evaluating or step == 0 and flags.eval_every:
                results |= evaluate(run, step, held_out, args.eval_samples)
            if run.is_due(step, flags.sample_every):
                print_sample(run, step)
            if step == run.setup.last_step:
                return run.finish(step, results | {
                    "tokens": rollouts.num_tokens, "num_skipped": run.progress.num_skipped,
                    "reward": rollouts.stats.get("reward")})
            step_start = time.perf_counter()
            lr_frac = set_schedules(state.optimizer, step, plan.num_iterations, args.init_lr_frac, warmdown_ratio=1.0)
            pending = take_step(state, rollouts.next_step(state.model, step, state.micro_rows), step, log, stop)
            if pending is None:  # out of memory twice: save the steps before, and stop
                rollouts.give_back()
                continue
            stats = pending.read()  # the next step begins with answers of the model that it has made
            stats.check_finite(step)
            rollouts.measure_step(state.model, state.micro_rows)
            step += 1
            values = run.progress.update(stats, time.perf_counter() - step_start)
            values |= {"lr_frac": lr_frac, **rollouts.get_values(values["step_ms"] / 1e3)}
            run.steps.write(step, values, format_line(run, step, values))


# ---------------------------------------------------------------------------------------------------------------------
# Beginning


def parse_tasks(entries: list[str]) -> dict[str, int | None]:
    """Entries NAME[:COUNT] as {name: count}."""
    parsed = parse_entries(entries)
    for name, (_, weight) in parsed.items():
        if weight != 1:
            raise UserError(f"--tasks {name} has a WEIGHT, which RL doesn't know; give NAME or NAME:COUNT")
        if name not in REWARD_TASKS:
            raise UserError(f"the task {name} has no reward, so there is nothing to reinforce; choose from "
                            f"{', '.join(REWARD_TASKS)}")
    return {name: count for name, (count, _) in parsed.items()}


def load_questions(entries: list[str], words: str | None, num_held_out: int, tokenizer,
                   max_prompt_tokens: int) -> tuple[list[Question], list[Question]]:
    """The questions to learn from, and so many of each task that are held out."""
    train, held_out = {}, {}
    for name, count in parse_tasks(entries).items():
        train[name] = make_task(name, "train", count, words)
        held_out[name] = make_task(name, "test", num_held_out if name in GENERATED else None, words)
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


def make_recipe(args: argparse.Namespace, flags: StageFlags, source: Checkpoint, run_dir: Path, device: torch.device,
                ranks: Ranks) -> tuple[Recipe, list[Question], list[Question]]:
    """What is learned and how fast, the questions to learn from, and those that are held out."""
    saved, tokenizer = find_saved("rl", run_dir, flags.resume), load_run_tokenizer(source.meta)
    config, before = read_config(source.meta["model_config"]), source.meta["identity"]
    max_new_tokens = choose_max_new_tokens(args.max_new_tokens, config.sequence_len)
    # a stage learns from rows of one token more than the context
    questions, held_out = load_questions(args.tasks, args.words, args.eval_examples, tokenizer,
                                         config.sequence_len + 1 - max_new_tokens)
    plan = make_rl_plan(config, estimate_flops(config), num_questions=len(questions), num_epochs=args.num_epochs,
                        num_iterations=args.num_iterations, examples_per_step=args.examples_per_step,
                        num_samples=args.num_samples, max_new_tokens=max_new_tokens,
                        batch_lr_scale=before["plan"]["batch_lr_scale"])
    if args.examples_per_step % ranks.world_size:
        raise UserError(f"--examples-per-step {args.examples_per_step} must be a multiple of the {ranks.world_size} "
                        "ranks")
    data = {"name": ", ".join(args.tasks), "hash": hash_conversations([q.conversation for q in questions]),
            "questions": len(questions)}
    longest = find_longest_prompt(questions) + max_new_tokens - 1
    answered = find_longest_prompt(questions + (held_out if flags.eval_every else [])) + max_new_tokens
    sample_rows = args.sample_rows or (saved and saved.meta.get("sample_rows")) or SAMPLE_ROWS[device.type]
    return Recipe(
        "rl", run_dir, flags, saved, source=source, tokenizer=tokenizer,
        tokenizer_name=source.meta["tokenizer"]["name"], config=config, plan=plan,
        T=round_up(longest, get_length_multiple(device, use_compile=False)),
        rows_per_step=args.examples_per_step * args.num_samples, lrs={name: before[name] for name in LR_NAMES},
        data=data, identity={"source": source.describe(), "data": data, "max_new_tokens": max_new_tokens},
        notes={"sample_rows": sample_rows},
        beside_bytes=count_engine_bytes(config, sample_rows, answered) if device.type == "cuda" else 0,
        rule=before.get("rule", "july26")), questions, held_out


def find_longest_prompt(questions: list[Question]) -> int:
    """In tokens."""
    return max(len(question.prompt) for question in questions)


def make_rollouts(args: argparse.Namespace, setup: Setup, questions: list[Question],
                  held_out: list[Question]) -> Rollouts:
    """What stands in for a loader: the model's own answers."""
    recipe = setup.recipe
    sampling = RolloutSettings(args.num_samples, recipe.identity["max_new_tokens"], args.seed,
                               recipe.notes["sample_rows"])
    return Rollouts(questions, recipe.tokenizer, sampling, args.examples_per_step, setup.ranks,
                    get_length_multiple(setup.device, setup.choices.machine.is_compiled),
                    find_longest_prompt(questions + held_out),
                    **(recipe.get_saved("loader") or {}))


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def evaluate(run: Run, step: int, held_out: list[Question], num_samples: int) -> dict:
    """Held-out questions, greedily and at temperature 1. Collective."""
    start = time.perf_counter()
    with run.loader.refreshed_engine(run.state.model) as engine:
        values = evaluate_answers(engine, held_out, replace(run.loader.sampling, num_samples=num_samples),
                                  run.setup.ranks)
    run.log.write("eval", step, **values, eval_sec=time.perf_counter() - start)
    for name in dict.fromkeys(question.task_name for question in held_out):
        print0(f"step {step:05d} | {name}: {values[f'{name}_greedy_frac']:.1%} of {values[f'{name}_problems']} "
               f"held-out questions answered greedily, {values[f'{name}_pass_at_1']:.1%} at temperature 1")
    return values


def print_sample(run: Run, step: int) -> None:
    """The first answer of the last step; a continued run has none before its own first step."""
    if sample := run.loader.sample:
        run.log.write("sample", step, **sample)
        print0("sample | reward {reward:g}: {prompt!r} -> {text!r}".format(**sample))


def format_line(run: Run, step: int, values: dict) -> str:
    pass_at = " | ".join(f"pass@{key.removeprefix('pass_at_')} {value:.3f}" for key, value in values.items()
                         if key.startswith("pass_at_"))
    return (f"step {step:05d}/{run.setup.recipe.plan.num_iterations:05d} | reward {values['reward']:.3f} | {pass_at} "
            f"| {values['answer_tokens']:.0f} tokens an answer | entropy {values['entropy_nats']:.3f} "
            f"| kl {values['kl_nats']:.3f} | truncated {values['truncated_frac']:.1%} "
            f"| zero-variance {values['zero_variance_frac']:.1%} | grad {values['grad_norm']:.3f} "
            f"| lr x{values['lr_frac']:.3f} | {values['step_ms']:.0f} ms, "
            f"{values['sample_sec'] * 1e3:.0f} of them sampling at {values['sample_tokens_per_sec']:,.0f} tok/s "
            f"| {run.progress.estimate_left_min(step):.1f} min left" +
            (f" | SKIPPED: {values['skipped']}" if values["skipped"] else ""))


def report(run_dir: Path, info: dict) -> None:
    """The section of the report card."""
    results = info["results"]
    names = [key.removesuffix("_greedy_frac") for key in results if key.endswith("_greedy_frac")]
    metrics = {f"{name} (greedy, {results[f'{name}_problems']} questions)": results[f"{name}_greedy_frac"]
               for name in names}
    write_stage_section("chat_rl", "RL", run_dir, info, metrics=metrics,
                        values={"questions": info["data"]["questions"], "steps skipped": results["num_skipped"],
                                "reward of the last step": results.get("reward")})


if __name__ == "__main__":
    run_script(main)
