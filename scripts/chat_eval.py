"""Accuracy of a chat model on tasks; ChatCORE is the mean centered accuracy of six of them, 0 = guessing.

    python -m scripts.chat_eval -i sft                              # the six tasks of ChatCORE, all problems
    python -m scripts.chat_eval -i rl -a GSM8K SpellingBee -x 200   # two tasks, the same 200 problems each time
    python -m scripts.chat_eval -i sft -a GSM8K -n 8 -t 1.0         # pass@1 from 8 samples, and whether any is right
    torchrun --standalone --nproc-per-node 8 -m scripts.chat_eval -i sft

A record of each problem (answers, scores) is kept in $NANOCHAT_BASE_DIR/runs/<stage>/<tag>/chat_eval/<step>_<settings>:
the same command continues from there, and other tasks join the finished ones. A task that can't be evaluated is
reported, and the evaluation goes on with the others.
"""

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from nanochat.chat_eval import AnswerSettings, Solver, check_task_names, compute_chatcore, evaluate_task
from nanochat.checkpoint_manager import MODEL_NAME, add_model_flags, load_for
from nanochat.choices import add_words_flag
from nanochat.command_line import Parser, add_compute_flags, int_or_all, run_script
from nanochat.common import UserError, get_base_dir, get_ranks, print0, write_json
from nanochat.report import write_section
from tasks.catalog import CHATCORE_TASKS


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(parser, help="stage of the model", required=True)
    add_compute_flags(parser)
    add("-a", "--task-name", nargs="+", default=list(CHATCORE_TASKS), metavar="TASK",
        help="tasks by name (default: the six of ChatCORE)")
    add_words_flag(parser)
    add("-x", "--max-problems", type=int_or_all, help="problems of each task, or all (default: all)")
    add("-t", "--temperature", type=float, default=AnswerSettings.temperature, help="0 takes the likeliest token")
    add("-k", "--top-k", type=int, default=AnswerSettings.top_k, help="sample among the k likeliest tokens; 0 = all")
    add("-n", "--num-samples", type=int, default=AnswerSettings.num_samples, help="answers to each problem")
    add("-m", "--max-new-tokens", type=int, default=AnswerSettings.max_new_tokens, help="of an answer, in tokens")
    add("-b", "--batch-size", type=int, default=64, help="sequences at once, on each rank")
    add("--allow-unsafe", action="store_true", help="run programs that the model wrote (HumanEval) even where this "
        "machine can't isolate them")
    add("--fresh", action="store_true", help="evaluate again what has been evaluated before")
    args = parser.parse_args(argv)
    for flag, value in (("--max-problems", args.max_problems), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} leaves nothing to evaluate; give at least 1")
    check_task_names(args.task_name)
    make_settings(args)
    return args


def make_settings(args: argparse.Namespace) -> AnswerSettings:
    """How answers are sampled; UserError for settings that give none."""
    return AnswerSettings(args.num_samples, args.temperature, args.top_k, args.max_new_tokens)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    start_time, settings = time.perf_counter(), make_settings(args)
    model, tokenizer, meta, place = load_for(args.source, args.model_tag, args.step, args.dtype, args.device_type)
    run_dir, step = Path(meta["run_dir"]), meta["step"]
    print0(f"{args.source} model {run_dir.name}, step {step}, {place}")

    # Other weights or settings give other answers, so each combination has records of its own
    made_with = {"model": meta["files"][MODEL_NAME], "dtype": str(model.compute_dtype).removeprefix("torch."),
                 **asdict(settings), **({"words": args.words} if args.words else {})}
    key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:8]
    records_dir = run_dir / "chat_eval" / f"{step:06d}_{key}"
    if get_ranks().rank == 0:
        for name in args.task_name if args.fresh else ():    # what other tasks have answered stays
            for path in (records_dir / f"{name}.jsonl", *records_dir.glob(f"{name}.part*.jsonl")):
                path.unlink(missing_ok=True)
        records_dir.mkdir(parents=True, exist_ok=True)
        write_json(records_dir / "settings.json", made_with)
    solver = Solver(model, tokenizer, settings, args.batch_size, args.allow_unsafe, args.words)
    results, missing = {}, {}
    print0(f"{'task':16s} {'accuracy':>8s} {'95% interval':>16s} {'centered':>8s} {'problems':>8s} {'cut':>5s} "
           f"{'seconds':>8s}")
    for name in args.task_name:
        task_start = time.perf_counter()
        try:
            results[name] = evaluate_task(solver, name, args.max_problems, records_dir)
        except UserError as error:
            missing[name] = str(error)
            print0(f"{name:16s} was not evaluated: {error}")
            continue
        print0(format_result(name, results[name]) + f" {time.perf_counter() - task_start:8.1f}")

    if not results:
        raise UserError(f"none of the tasks could be evaluated; the first, {args.task_name[0]}: "
                        f"{missing[args.task_name[0]]}")
    max_problems = -1 if args.max_problems is None else args.max_problems   # as results.json has it
    earlier = read_earlier(records_dir / "results.json", args.task_name, max_problems)
    for name, result in earlier.items():
        print0(format_result(name, result) + f" {'before':>8s}")
    chat = compute_chatcore(earlier | results, missing)
    what = describe_metric(chat)
    if chat["chatcore"] is not None:
        print0(f"{what:34s} {chat['chatcore']:16.4f}")
    if get_ranks().rank == 0:
        write_json(records_dir / "results.json", chat | {"max_problems": max_problems})
        report_answers(chat, args.source, run_dir, step, made_with, sys.argv if argv is None else argv,
                     time.perf_counter() - start_time)
    return {"run_dir": str(run_dir), "step": step, "records_dir": str(records_dir), **chat}


def read_earlier(path: Path, task_names: list[str], max_problems: int) -> dict[str, dict]:
    """Earlier results of other tasks with as many problems: tasks evaluated one by one are one evaluation."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return {name: result for name, result in saved["tasks"].items()
                if saved["max_problems"] == max_problems and name not in task_names}
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):  # none, or one that is damaged
        return {}


def format_result(name: str, result: dict) -> str:
    """A line of the table; with several samples also the share of problems with a right one."""
    interval = f"{result['low']:.4f} - {result['high']:.4f}"
    line = (f"{name:16s} {result['accuracy']:8.4f} {interval:>16s} {result['centered']:8.4f} "
            f"{result['num_problems']:8d} {result['num_cut']:5d}")
    return line + (f" any {result['pass_any']:.4f}" if "pass_any" in result else "")


def describe_metric(chat: dict) -> str:
    """The name of the mean: over fewer tasks it isn't ChatCORE."""
    return "ChatCORE" + (f", only {chat['num_tasks']} of {len(CHATCORE_TASKS)} tasks" if chat["is_partial"] else "")


def report_answers(chat: dict, stage: str, run_dir: Path, step: int, made_with: dict, argv: list[str],
                 wall_sec: float) -> None:
    """Write the section of the report card; each stage has its own."""
    what = describe_metric(chat)
    metrics = {what: chat["chatcore"]} | {name: result["accuracy"] for name, result in chat["tasks"].items()}
    rows = [[name, result["accuracy"], result["low"], result["high"], result["centered"], result["num_problems"],
             result["num_cut"], result.get("pass_any")] for name, result in chat["tasks"].items()]
    notes = [f"{name} was not evaluated: {reason}" for name, reason in chat["missing"].items()]
    if chat["num_tasks"]:
        notes.insert(0, "ChatCORE is the mean of the centered accuracies: 0 is guessing, 1 is all right.")
    write_section(f"chat_eval_{stage}", {
        "title": f"Chat model after {stage}: answers to tasks", "stage": stage, "argv": argv, "wall_sec": wall_sec,
        "metrics": metrics, "notes": notes,
        # not as its "run": curve and time of the training belong to the training's own section
        "values": {what: chat["chatcore"], "model": run_dir.relative_to(get_base_dir()).as_posix(), "step": step,
                   "samples of each": made_with["num_samples"], "temperature": made_with["temperature"],
                   "dtype": made_with["dtype"]},
        "tables": [{"title": "Tasks", "columns": ["task", "accuracy", "95% from", "to", "centered", "problems",
                                                  "answers cut short", "any sample right"], "rows": rows}]})


if __name__ == "__main__":
    run_script(main)
