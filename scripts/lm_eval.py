"""Evaluate a model with lm-evaluation-harness, by which published models are compared (pip install lm_eval).

    python -m scripts.lm_eval --source base --tasks hellaswag arc_easy     # tasks of the package, by network
    python -m scripts.lm_eval --source base --tasks mine --task-dir DIR    # YAML files of your own, with their data
    python -m scripts.lm_eval --source sft --tasks gsm8k --apply-chat-template
    python -m scripts.lm_eval --source base --core --limit 500             # CORE by both rules, and why they differ

--core writes the tasks of CORE as YAML to $NANOCHAT_BASE_DIR/lm_eval_core (with --limit 500 to lm_eval_core_500), with
their shots, for other models and exports, too (pip install "lm_eval[hf]"):
lm_eval run --model hf --model_args pretrained=NAME --tasks core_copa --include_path $NANOCHAT_BASE_DIR/lm_eval_core.
All results of a step are kept in $NANOCHAT_BASE_DIR/runs/<stage>/<tag>/lm_eval_<step>.json and in the report card:
tasks evaluated one by one, with other limits, shots or dtypes, too; the same task by the same settings replaces itself.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import mean

from nanochat.checkpoint_manager import MODEL_NAME, add_model_flags, load_for
from nanochat.command_line import Parser, add_compute_flags, int_or_all, run_script
from nanochat.common import UserError, expand_home, get_base_dir, get_ranks, print0, write_json
from nanochat.harness import CORE_PREFIX, compare_core, evaluate, import_package, load_tasks, make_lm, write_core_tasks
from nanochat.loss_eval import load_tasks as load_core_tasks
from nanochat.report import write_section

BOOTSTRAPS = 1000    # resamples for the deviation of metrics that are no means
SETTINGS = ("lm_eval", "model", "dtype", "limit", "num_fewshot", "chat", "core_tasks")    # results of one kind


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add_compute_flags(parser)
    add("--tasks", nargs="+", default=[], metavar="TASK", help="tasks, groups and tags by name")
    add("--task-dir", action="append", default=[], type=Path, help="folder with YAML files of tasks; may be repeated")
    add("--core", action="store_true", help="the tasks of CORE by the harness and by scripts.base_eval's rule")
    add("--bundle", type=Path, help="folder with the tasks of CORE (default: eval_bundle in the base folder)")
    add("--limit", type=int_or_all, help="items of each task, or all (default: all)")
    add("--num-fewshot", type=int, help="solved examples before each question (default: the task's)")
    add("--apply-chat-template", action="store_true", help="ask as in a conversation, as chat models are used")
    add("--batch-size", type=int, default=64, help="rows at once, at most")
    args = parser.parse_args(argv)
    args.tasks = [name for word in args.tasks for name in word.split(",") if name]
    for flag, value in (("--limit", args.limit), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value} must be at least 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise UserError(f"--num-fewshot {args.num_fewshot} must be 0 or more")
    if args.bundle and not args.core:
        raise UserError("--bundle has the tasks of CORE; evaluate them with --core, or leave it out")
    if args.core and args.apply_chat_template:
        raise UserError("the prompts of --core are plain text; leave --apply-chat-template out")
    if not args.tasks and not args.core:
        raise UserError("name the --tasks to evaluate, or --core")
    return args


def main(argv: list[str] | None = None) -> dict:
    args, start_time = parse_args(argv), time.perf_counter()
    lm_eval = import_package()
    if get_ranks().world_size > 1:
        raise UserError("scripts.lm_eval runs in one process; start it without torchrun")
    names, folders, core = args.tasks, [expand_home(folder) for folder in args.task_dir], []
    if args.core:
        core = load_core_tasks(args.bundle and expand_home(args.bundle))
        folder = get_base_dir() / ("lm_eval_core" if args.limit is None else f"lm_eval_core_{args.limit}")
        folder.mkdir(exist_ok=True)
        names, folders = names + write_core_tasks(core, folder, args.limit), [*folders, folder]
    tasks = load_tasks(names, folders)
    model, tokenizer, meta, place = load_for(args.source, args.model_tag, args.step, args.dtype, args.device_type)
    run_dir, step = Path(meta["run_dir"]), meta["step"]
    if args.apply_chat_template and meta["stage"] == "base":
        raise UserError("a base model knows no conversations; leave --apply-chat-template out, or name a chat model")
    path = run_dir / f"lm_eval_{step:06d}.json"
    read_records(path)    # a damaged file is refused before the work, not after it
    print0(f"{meta['stage']} {run_dir.name}, step {step}, {place}, lm_eval {lm_eval.__version__}")
    found = evaluate(make_lm(model, tokenizer, args.batch_size), tasks, num_fewshot=args.num_fewshot, limit=args.limit,
                     apply_chat_template=args.apply_chat_template, bootstrap_iters=BOOTSTRAPS, log_samples=False)
    print0(lm_eval.utils.make_table(found))
    if found.get("groups"):
        print0(lm_eval.utils.make_table(found, "groups"))
    record = {"lm_eval": lm_eval.__version__, "model": meta["files"][MODEL_NAME][:16],
              "dtype": str(model.compute_dtype).removeprefix("torch."), "limit": args.limit,
              "num_fewshot": args.num_fewshot, "chat": args.apply_chat_template,
              "core_tasks": [task.label for task in core],
              **{name: found[name] for name in ("results", "n-shot", "versions")}}
    if core:
        record |= report_both(model, tokenizer, core, args.limit, found["results"])
    records = join_records(read_records(path), record)
    write_json(path, records)
    report(records, run_dir, meta, sys.argv if argv is None else argv, time.perf_counter() - start_time)
    return {"run_dir": str(run_dir), "step": step, **record}


def read_records(path: Path) -> list[dict]:
    """The evaluations of a step so far, each by settings of its own."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        records = [saved] if isinstance(saved, dict) else saved    # an older file has one
        return [record | {"results": dict(record["results"]), "n-shot": dict(record["n-shot"])} for record in records]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}, the results so far, can't be read ({error}); move it away") from None


def join_records(records: list[dict], new: dict) -> list[dict]:
    """The new evaluation joins the one by its settings, if any, whose results of other tasks stay."""
    same = [record for record in records if all(record.get(name) == new[name] for name in SETTINGS)]
    for record in same:
        new = record | new | {name: record[name] | new[name] for name in ("results", "n-shot", "versions")}
    return [record for record in records if record not in same] + [new]


def report_both(model, tokenizer, core: list, limit: int | None, found: dict) -> dict:
    """Print CORE's tasks by both, and their means after centering."""
    rows = [compare_core(model, tokenizer, task, limit, found[CORE_PREFIX + task.label]) for task in core]
    print0(f"{'task':32s} {'items':>6s} {'CORE':>7s} {'by sum':>7s} {'acc':>7s} {'acc_norm':>8s}  why acc isn't CORE")
    for row in rows:
        print0(f"{row['task']:32s} {row['items']:6d} {row['CORE']:7.4f} {row['by sum']:7.4f} {row['acc']:7.4f} "
               f"{row['acc_norm']:8.4f}  {row['why']}")
    means = {rule: mean(task.center(row[rule]) for task, row in zip(core, rows, strict=True))
             for rule in ("CORE", "by sum", "acc", "acc_norm")}
    print0(f"{'mean, centered':32s} {'':6s} {means['CORE']:7.4f} {means['by sum']:7.4f} {means['acc']:7.4f} "
           f"{means['acc_norm']:8.4f}")
    return {"core": rows, "centered": means}


def report(records: list[dict], run_dir: Path, meta: dict, argv: list[str], wall_sec: float) -> None:
    """Write the section of the report card."""
    rows = []
    for record in records:
        how = ", ".join([f"{record.get('limit') or 'all'} items", record.get("dtype", "")]
                        + ["as a conversation"] * record.get("chat", False))
        for task, values in record["results"].items():
            for key, value in values.items():
                name, _, _ = key.partition(",")
                if "," in key and not name.endswith("_stderr") and isinstance(value, int | float):
                    deviation = values.get(key.replace(name, f"{name}_stderr", 1))
                    rows.append([task, name, value, deviation if isinstance(deviation, float) else "",
                                 record["n-shot"].get(task, ""), how])
    tables = [{"title": "Tasks", "columns": ["task", "metric", "value", "standard error", "shots", "how"],
               "rows": rows}]
    for record in records:
        if "core" in record:
            tables.append({"title": "CORE and the harness", "columns": list(record["core"][0]),
                           "rows": [list(row.values()) for row in record["core"]]})
    write_section(f"lm_eval_{meta['stage']}", {
        "title": f"lm-evaluation-harness: {meta['stage']}", "argv": argv, "wall_sec": wall_sec, "stage": meta["stage"],
        # not as its "run": curve and time of the training belong to the training's own section
        "values": {"model": run_dir.relative_to(get_base_dir()).as_posix(), "step": meta["step"],
                   "lm_eval": records[-1]["lm_eval"]}, "tables": tables})


if __name__ == "__main__":
    run_script(main)
