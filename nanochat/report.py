"""The report card of a chain of runs, made again at any time from files alone: report.md and report.html.

    python -m nanochat.report generate [--out DIR] [--price-per-hour DOLLARS]
    python -m nanochat.report reset         forget the sections of earlier runs; the runs themselves stay

Scripts leave sections behind with `write_section`. A section that names its run is completed from the run's run.json
and metrics.jsonl; a stage whose run has left no section yet (it trains, or was stopped) is shown from its run alone.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from nanochat.card import Card, Curve, Section, Table, format_count, format_value, render_html, render_markdown, smooth
from nanochat.common import UserError, get_base_dir, get_ranks, print0, run_script, write_atomic, write_json

STAGES = {"base": "BASE", "mid": "MID", "sft": "SFT", "rl": "RL"}  # in the order in which a model passes through them
SECTION_ORDER = ("tok_train", "tok_eval", "base_train", "base_loss", "base_eval", "mid", "chat_sft", "sft", "chat_rl",
                 "rl", "chat_eval")
MAX_EVAL_ROWS = 12  # in the table of a run's evaluations
LEFTOVER_SEC = 60  # a temporary file this old is in nobody's hands, if its process is dead
# What renting one GPU costs, US dollars per hour: assumptions, rounded from list prices of 2026; a name that isn't
# listed, and every CPU, has no price unless the person gives one
GPU_PRICES = (("b300", 6.0), ("b200", 5.0), ("h200", 3.5), ("h100", 3.0), ("a100", 1.8), ("l40s", 1.0), ("4090", 0.5),
              ("t4", 0.35))
REPO_DIR = Path(__file__).resolve().parents[1]

# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_section(name: str, section: dict) -> None:
    """Leave one section for the report card; a later call with the same name replaces it. Rank 0 writes.

    section: title, values {label: number | str}, tables [{title, columns, rows}], samples [{prompt, text}],
             notes [str], argv, created, order (number), run (path of the run directory below the base folder),
             wall_sec, and for the comparison of stages: stage (a key of STAGES) and metrics {name: number}.
             All are optional. Labels end in their unit (_bytes, _sec, _ms, _pct, _frac), where they have one.
    """
    if not re.fullmatch(r"[a-z0-9_-]+", name):
        raise ValueError(f"{name!r} can't name a section")
    if get_ranks().rank == 0:
        folder = get_base_dir() / "report"
        folder.mkdir(exist_ok=True)
        remove_leftovers(folder)
        write_json(folder / f"{name}.json", {"created": time.strftime("%Y-%m-%d %H:%M:%S")} | section)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files (<name>.<process>.tmp, see write_atomic) of processes that were killed."""
    for path in folder.glob("*.*.tmp"):
        process = path.name.split(".")[-2]
        with contextlib.suppress(OSError):
            if process.isdigit() and not is_alive(int(process)) and time.time() - path.stat().st_mtime > LEFTOVER_SEC:
                path.unlink()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another person's
        pass
    return True


def read_json(path: Path, keys: Sequence[str] = ()) -> dict:
    """A JSON object from a file of ours, with all of these keys."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    problem = "not a JSON object" if not isinstance(value, dict) else \
        ", ".join(f"no {key}" for key in keys if key not in value)
    if problem:
        raise UserError(f"{path} is damaged ({problem}); delete it, or repeat the command that wrote it")
    return value


def group_metrics(path: Path) -> dict[str, dict[int, list[dict]]]:
    """metrics.jsonl as {kind: {step: lines}}, without what a resumed run has done again.

    A line that can't be read (a run killed while writing) is passed over. A training line that goes back in steps
    is a resumed run: everything that an earlier attempt logged after that step is forgotten.
    """
    metrics: dict[str, dict[int, list[dict]]] = {}
    last_step = -1
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            kind, step = str(row["kind"]), int(row.get("step", 0))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if kind == "train":
            if step <= last_step:
                metrics = {key: {s: rows for s, rows in steps.items() if s <= step} for key, steps in metrics.items()}
            last_step = step
        rows = metrics.setdefault(kind, {}).setdefault(step, [])
        # One line per step, the last; but samples stand side by side, once each where a resumed run draws them again
        rows[:] = [old for old in rows if kind == "sample" and old != row] + [row]
    return {kind: dict(sorted(steps.items())) for kind, steps in metrics.items()}


def get_series(metrics: dict, kind: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of one logged quantity, finite numbers only."""
    return [(step, float(rows[-1][key])) for step, rows in metrics.get(kind, {}).items()
            if isinstance(rows[-1].get(key), int | float) and math.isfinite(rows[-1][key])]


# ---------------------------------------------------------------------------------------------------------------------
# From files to a card


def build_card(base_dir: Path, price_per_hour: float | None) -> Card:
    """Everything that is to be shown, from the sections and the runs below `base_dir`.

    price_per_hour: of the machine, US dollars; None takes GPU_PRICES for the runs' hardware, if it is there
    """
    saved = {path.stem: read_json(path) for path in sorted((base_dir / "report").glob("*.json"))}
    runs = {path.parent.relative_to(base_dir).as_posix(): read_json(path)
            for path in sorted((base_dir / "runs").glob("*/*/run.json"))}
    chain = choose_chain(saved, runs)
    if not chain:
        raise UserError(f"nothing to report yet: no section and no run in {base_dir}; start with: "
                        "bash runs/quickstart.sh")
    sections, tiles, commands, environments, wall_sec = [], {}, [], {}, 0.0
    for record, run_path in chain:
        run = runs.get(run_path, {})
        metrics = group_metrics(base_dir / run_path / "metrics.jsonl") if run else {}
        section = Section(str(record.get("title", run_path)), dict(record.get("values") or record.get("metrics") or {}),
                          [Table(t.get("title", ""), t["columns"], t["rows"]) for t in record.get("tables") or ()],
                          list(record.get("samples") or ()), [str(note) for note in record.get("notes") or ()])
        if run:
            add_run(section, run, metrics, price_per_hour)
            environments.setdefault(json.dumps(run.get("environment")), (run_path, run.get("environment")))
            tiles = describe_model(run, metrics) | tiles  # of the first stage: a chat has other bits per byte
        elif run_path:
            section.notes.append(f"{run_path} isn't there any more, so its curve and settings are missing here")
        # an evaluation tells its own time, and a run that has no section of its own is counted where it is shown
        wall_sec += (record.get("wall_sec") or 0.0) + (measure_wall_sec(run, metrics) if run else 0.0)
        sections.append(section)
        commands += [format_command(argv) for argv in (record.get("argv") or run.get("argv"),) if argv]
    shown = {run_path for _, run_path in chain}
    sections[:0] = compare_stages([record for record, _ in chain])
    sections += list_other_runs({path: run for path, run in runs.items() if path not in shown})
    tiles["wall-clock time"] = format_value("_sec", wall_sec)
    known = [pair for pair in environments.values() if pair[1]]
    price, why = (price_per_hour, "as given") if price_per_hour is not None else find_price([env for _, env in known])
    tiles["cost"] = "unknown" if price is None else f"${wall_sec / 3600 * price:,.2f}"
    sections += [describe_code(), describe_environments(known)]
    sections[-1].notes.append(f"Cost: {why}." if price is None else f"Cost: at ${price:,.2f} per hour, {why}.")
    records = [record for record, _ in chain] + [runs.get(run_path, {}) for _, run_path in chain]
    latest = max((str(record["created"]) for record in records if record.get("created")), default="")
    return Card(latest, tiles, sections, list(dict.fromkeys(commands)))


def choose_chain(saved: dict[str, dict], runs: dict[str, dict]) -> list[tuple[dict, str]]:
    """(section, path of its run or '') in reading order: the saved ones, and each other stage's newest run."""
    def rank(name: str) -> int:
        return next((10 * i for i, prefix in enumerate(SECTION_ORDER, 1) if name.startswith(prefix)), 1000)

    chain = [(record.get("order", rank(name)), record, record.get("run") or "") for name, record in saved.items()]
    told_stages = {run_path.split("/")[1] for _, _, run_path in chain if run_path.count("/") == 2}
    newest = {}
    for run_path in sorted(runs, key=lambda path: str(runs[path].get("created"))):
        newest[run_path.split("/")[1]] = run_path
    for stage, run_path in newest.items():
        if stage not in told_stages:
            tag, status = runs[run_path].get("tag", ""), runs[run_path].get("status", "unknown")
            chain.append((rank(f"{stage}_train"), {"title": f"{STAGES.get(stage, stage)} {tag} ({status})"}, run_path))
    stages = list(STAGES)
    chain.sort(key=lambda item: (item[0], stages.index(item[1]["stage"]) if item[1].get("stage") in stages else -1,
                                 str(item[1].get("created"))))
    seen: set[str] = set()  # a run belongs to the first section that names it
    return [(record, "" if run_path in seen else seen.add(run_path) or run_path) for _, record, run_path in chain]


def add_run(section: Section, run: dict, metrics: dict, price_per_hour: float | None) -> None:
    """Complete a section with what its run has on disk; what the section says itself goes first."""
    train, val = get_series(metrics, "train", "loss"), get_series(metrics, "eval", "val_bpb")
    reward = get_series(metrics, "train", "reward")
    facts = {"status": run.get("status"), "last step": train and train[-1][0],
             "train loss": train and not reward and smooth(train)[-1][1], "val bpb": val and val[-1][1],
             "best val bpb": val and min(value for _, value in val)}
    for key, choose in (("tokens", max), ("tokens_per_sec", statistics.median), ("mfu_pct", statistics.median),
                        ("peak_memory_bytes", max)):
        values = [value for _, value in get_series(metrics, "train", key)]
        facts[key] = values and choose(values)
    if section.values:  # it has told the rest in its own words
        facts = {key: facts[key] for key in ("status", "train loss", "best val bpb", "tokens_per_sec", "mfu_pct")}
    section.values |= {key: value for key, value in facts.items() if value and key not in section.values}
    curve = Curve(reward, get_held_out_reward(metrics), ("reward", "held-out reward"), has_one_scale=True) if reward \
        else Curve(train, val)
    section.curve = curve if len(curve.train) > 1 or len(curve.val) > 1 else None
    add_predictions(section, run, metrics, price_per_hour)
    section.tables += tabulate_evals(metrics)
    data = [rows[-1] for rows in metrics.get("data", {}).values()][-1:]
    for title, facts in (("Packing of the data", {k: v for row in data for k, v in row.items() if k != "kind"}),
                         ("Model", run.get("model_config")), ("Plan", run.get("plan")), ("Data", run.get("data")),
                         ("Tokenizer", run.get("tokenizer"))):
        if facts:
            section.tables.append(Table(title, [], [[k, v] for k, v in facts.items()], folded=True))
    if run.get("decisions"):
        rows = [[d.get("what"), d.get("value"), d.get("why")] for d in run["decisions"]]
        section.tables.append(Table("Decided automatically", ["what", "value", "why"], rows, folded=True))
    if not section.samples and metrics.get("sample"):
        step, section.samples = list(metrics["sample"].items())[-1]
        section.notes.append(f"The samples are from step {step:,}.")


def get_held_out_reward(metrics: dict) -> list[tuple[int, float]]:
    """(step, mean reward over the held-out questions of all tasks) of each evaluation of RL, sampled as in training."""
    tasks = {key.removesuffix("_reward") for rows in metrics.get("eval", {}).values() for key in rows[-1]
             if key.endswith("_reward")}
    sums: dict[int, tuple[float, float]] = {}    # {step: (rewards, questions)}
    for task in tasks:
        counts = dict(get_series(metrics, "eval", f"{task}_problems"))
        for step, reward in get_series(metrics, "eval", f"{task}_reward"):
            total, num_questions = sums.get(step, (0.0, 0.0))
            sums[step] = total + reward * counts.get(step, 0.0), num_questions + counts.get(step, 0.0)
    return [(step, total / num_questions) for step, (total, num_questions) in sorted(sums.items()) if num_questions]


def add_predictions(section: Section, run: dict, metrics: dict, price_per_hour: float | None) -> None:
    """What the run said that it would take, when it began, beside what it took."""
    predicted, train = run.get("predicted"), metrics.get("train")
    if not predicted or not train:
        return
    predicted, num_steps = dict(predicted), max(train)
    if "train_sec" in predicted:  # of the whole plan, which the run may not have come to the end of
        predicted["train_sec"] *= num_steps / run["plan"]["num_iterations"]
    actual = {}
    for key, name, choose in (("peak_memory_bytes", "peak_memory_bytes", max), ("train_sec", "elapsed_sec", max),
                              ("tokens_per_sec", "tokens_per_sec", statistics.median),
                              ("mfu_pct", "mfu_pct", statistics.median)):
        if values := [value for _, value in get_series(metrics, "train", name)]:
            actual[key] = choose(values)
    price, _ = (price_per_hour, "") if price_per_hour is not None else find_price([run.get("environment") or {}])
    for values in (predicted, actual):
        if price is not None and "train_sec" in values:
            values["dollars"] = values["train_sec"] / 3600 * price
    rows = []
    for key, label in (("peak_memory_bytes", "peak memory"), ("train_sec", f"time of {num_steps:,} steps"),
                       ("tokens_per_sec", "tokens per sec"), ("mfu_pct", "MFU"), ("dollars", "cost of that time")):
        pair = [values.get(key) for values in (predicted, actual)]
        if pair != [None, None]:
            cells = ["" if value is None else f"${value:,.2f}" if key == "dollars" else format_value(key, value)
                     for value in pair]
            rows.append([label, *cells, f"{pair[1] / pair[0]:.2f}" if all(pair) else ""])
    section.tables.append(Table("Plan against actual", ["", "predicted", "actual", "actual / predicted"], rows))
    sources = (f"{what}: {predicted[key]}" for what, key in (("MFU", "mfu_source"), ("memory", "memory_source"))
               if key in predicted)
    section.notes.append("; ".join(("Predicted when the run began", *sources)) + ".")


def tabulate_evals(metrics: dict) -> list[Table]:
    """The evaluations of a run: every key that was logged, at most MAX_EVAL_ROWS steps, spread evenly."""
    evals = [rows[-1] for rows in metrics.get("eval", {}).values()]
    columns = list(dict.fromkeys(key for row in evals for key in row if key != "kind"))
    count = min(len(evals), MAX_EVAL_ROWS)
    chosen = [evals[round(i * (len(evals) - 1) / max(1, count - 1))] for i in range(count)]
    return [Table("Evaluations", columns, [[row.get(key) for key in columns] for row in chosen])] if evals else []


def describe_model(run: dict, metrics: dict) -> dict:
    """The figures that head the card."""
    val = get_series(metrics, "eval", "val_bpb")
    tokens = get_series(metrics, "train", "tokens")
    config = run.get("model_config") or {}
    facts = {"validation bpb": val and val[-1][1], "layers": config.get("n_layer"),
             "tokens trained on": tokens and format_count(tokens[-1][1])}
    return {key: value for key, value in facts.items() if value}


def measure_wall_sec(run: dict, metrics: dict) -> float:
    """What the run says that it took; if it was killed, what its log has seen."""
    logged = get_series(metrics, "train", "elapsed_sec")
    return max(run.get("wall_sec") or 0.0, logged[-1][1] if logged else 0.0)  # wall_sec: of the last process only


def find_price(environments: list[dict]) -> tuple[float | None, str]:
    """US dollars per hour of the machine that the runs were made on, None where it isn't known, and why."""
    machines = {(hardware.get("gpu"), hardware.get("num_gpus")) for hardware in
                (environment.get("hardware") or {} for environment in environments)}
    if len(machines) != 1:
        return None, "give --price-per-hour, for " + ("several machines were used" if machines else "no run says where")
    gpu, num_gpus = machines.pop()
    for key, price in GPU_PRICES if gpu else ():
        if re.search(rf"\b{key}\b", str(gpu).lower()):
            return price * (num_gpus or 1), f"assumed for {num_gpus or 1} x {key} (another: --price-per-hour)"
    return None, f"give --price-per-hour, for no price is known for {gpu or 'a CPU'}"


def compare_stages(records: list[dict]) -> list[Section]:
    """One table of all metrics over the stages of the chain; where two sections state one, the later counts."""
    columns: dict[str, dict] = {}
    for record in records:
        metrics = {name: value for name, value in (record.get("metrics") or {}).items() if value is not None}
        if record.get("stage") in STAGES and metrics:
            columns.setdefault(record["stage"], {}).update(metrics)
    stages = [stage for stage in STAGES if stage in columns]
    names = list(dict.fromkeys(name for stage in stages for name in columns[stage]))
    rows = [[name, *(columns[stage].get(name) for stage in stages)] for name in names]
    heads = ["metric", *(STAGES[stage] for stage in stages)]
    return [Section("Stage by stage", tables=[Table("", heads, rows)])] if stages else []


def list_other_runs(runs: dict[str, dict]) -> list[Section]:
    """The runs that the card doesn't show, so that none is lost from sight."""
    rows = [[path, run.get("status"), run.get("created")] for path, run in runs.items()]
    return [Section("Other runs on this disk", tables=[Table("", ["run", "status", "created"], rows)])] if rows else []


def describe_code() -> Section:
    """The size of the code base, by folder."""
    rows = []
    for folder in ("nanochat", "scripts", "tasks", "runs", "tests", "dev"):
        texts = [path.read_text(encoding="utf-8") for path in sorted((REPO_DIR / folder).rglob("*"))
                 if path.suffix in (".py", ".sh", ".html")]
        if texts:
            rows.append([folder, len(texts), sum(text.count("\n") for text in texts), sum(map(len, texts))])
    rows.append(["all", *(sum(row[i] for row in rows) for i in (1, 2, 3))])
    section = Section("Code", tables=[Table("", ["folder", "files", "lines", "characters"], rows)])
    lock, project = REPO_DIR / "requirements.lock", REPO_DIR / "pyproject.toml"
    if lock.is_file() and project.is_file():  # else installed as a package
        declared = re.search(r"^dependencies = \[(.*?)^\]", project.read_text(), re.DOTALL | re.MULTILINE)
        section.values["dependencies declared"] = declared[1].count('"') // 2 if declared else None
        section.values["packages locked, theirs and the tests' included"] = len(lock.read_text().split())
    return section


def describe_environments(environments: list[tuple[str, dict]]) -> Section:
    """Hardware and versions; one table for all runs that agree."""
    section = Section("Environment")
    for run_path, environment in environments:
        flat = environment | {"hardware": None, "host": None} | (environment.get("hardware") or {})
        rows = [[key, value] for key, value in flat.items() if value is not None]
        section.tables.append(Table("" if len(environments) == 1 else f"from {run_path} on", [], rows))
    if not environments:
        section.notes.append("No run has recorded one yet.")
    return section


def format_command(argv: list) -> str:
    """A command line that repeats what was run from any checkout: modules by name, not by their path."""
    words = [str(word) for word in argv]
    path = Path(words[0])
    if path.suffix == ".py":
        words[:1] = ["python", "-m", f"{path.parent.name}.{path.stem}"]
    return shlex.join(words)


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nanochat.report", description="The report card of a chain of runs")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="write report.md and report.html")
    generate.add_argument("--out", type=Path, help="folder to write to (default: report/ in the base folder)")
    generate.add_argument("--price-per-hour", type=float,
                          help="what the machine costs, US dollars per hour (default: by its GPUs, if they are known)")
    commands.add_parser("reset", help="forget the sections of earlier runs; the runs themselves stay")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    base_dir = get_base_dir()
    remove_leftovers(base_dir / "report")
    if args.command == "reset":
        sections = sorted((base_dir / "report").glob("*.json"))
        for path in sections:
            path.unlink()
        print0(f"report: {len(sections)} sections forgotten")
        return {"removed": len(sections)}
    if args.price_per_hour is not None and not 0 <= args.price_per_hour < math.inf:
        raise UserError(f"--price-per-hour {args.price_per_hour} must be 0 or more US dollars")
    card = build_card(base_dir, args.price_per_hour)
    out = args.out or base_dir / "report"
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "report.md", render_markdown(card))
        write_atomic(out / "report.html", render_html(card))
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"the report can't be written to {out} ({error.strerror}); "
                        "choose a folder with --out") from None
    print0(f"report: {out / 'report.md'}\nreport: {out / 'report.html'}")
    return {"markdown": str(out / "report.md"), "html": str(out / "report.html"), "sections": len(card.sections)}


if __name__ == "__main__":
    run_script(main)
