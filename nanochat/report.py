"""The report card of a chain of runs, made again at any time from files alone: report.md and report.html.

    python -m nanochat.report generate [--out DIR] [--price-per-hour DOLLARS]
    python -m nanochat.report reset         delete the sections of earlier runs; the runs themselves stay
    python -m nanochat.report ledger [RUN ...] [--author NAME] [--affiliation NAME] [--url URL] [--out DIR]
                                            what marin's leaderboard asks of a run, and a leaderboard of all runs here

Scripts leave sections behind with `write_section`. A section that names its run is completed from the run's run.json
and metrics.jsonl. Of a stage none of whose runs has a section yet, because the first trains or was stopped, the
newest run is shown from its files alone. This module gathers what is shown; report_render.py turns it into text.
"""

import argparse
import contextlib
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

if __name__ == "__main__":    # as scripts/__init__.py: before torch is loaded, so that Ctrl-C ends in one sentence
    from nanochat.command_line import prepare_process
    prepare_process()

from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, get_base_dir, get_ranks, now, print0, write_json
from nanochat.config import count_active
from nanochat.devices import GPU_PRICES, find_gpu
from nanochat.ledger import build_leaderboard, find_fault, make_entry
from nanochat.report_render import (
    Card,
    Curve,
    Section,
    Table,
    format_command,
    format_count,
    format_value,
    render_markdown,
    smooth,
    thin,
    write_card,
    write_files,
)
from nanochat.run import read_metrics
from nanochat.shards import hash_shards, read_manifest

STAGES = {"base": "BASE", "mid": "MID", "sft": "SFT", "rl": "RL"}  # in the order in which a model passes through them
SECTION_ORDER = ("tok_train", "tok_eval", "base_train", "base_loss", "base_eval", "mid", "chat_sft", "sft", "chat_rl",
                 "rl", "chat_eval", "lm_eval")
MAX_EVAL_ROWS = 12    # in the table of a run's evaluations
AUTHOR_FIELDS = ("name", "affiliation", "url")    # of an entry of the ledger
REPO_DIR = Path(__file__).resolve().parents[1]


def write_section(name: str, section: dict) -> None:
    """Leave one section for the report card; a later call with the same name replaces it. Rank 0 writes.

    section: title, values {label: number | str}, tables [{title, columns, rows}], samples [{prompt, text}],
             notes [str], argv, created, order (number), run (path of the run directory below the base folder),
             wall_sec, and for the comparison of stages: stage (a key of STAGES) and metrics {name: number}.
             All are optional. Labels end in their unit (_bytes, _sec, _ms, _pct, _frac, _dollars), where they have one.
    """
    if not re.fullmatch(r"[a-z0-9_-]+", name):
        raise ValueError(f"{name!r} can't name a section")
    if get_ranks().rank == 0:
        folder = get_base_dir() / "report"
        folder.mkdir(exist_ok=True)
        write_json(folder / f"{name}.json", {"created": now()} | section)


def write_stage_section(name: str, title: str, run_dir: Path, info: dict, metrics: dict, values: dict) -> None:
    """Leave the section of a training stage, from its run.json.
    metrics: compared with other stages'; values: shown after those that all stages have"""
    plan, params, results, source = info["plan"], info["params"], info["results"], info.get("source")
    active = {"active parameters": count_active(params)} if "inactive_experts" in params else {}
    jumps = {"steps in which the loss jumped": results["num_jumps"]} if results.get("num_jumps") else {}
    begun = {"begun with": f"{source['stage']} {source['tag']}, step {source['step']}"} if source else {}
    write_section(name, {
        "title": title, "stage": info["stage"], "argv": info["argv"], "created": info["ended"],
        "run": str(run_dir.relative_to(get_base_dir())), "metrics": metrics,
        "notes": [line for file in info["data"].get("files", ()) for line in file["lines"]],    # of a person's own
        "values": {"parameters": params["total"], **active, "steps": results["step"], "tokens": results["tokens"],
                   "tokens per scaling parameter": plan["tokens_per_param"], "training FLOPs": plan["total_flops"],
                   "validation bits per byte": results.get("val_bpb"), "minutes": results["train_sec"] / 60,
                   "peak memory in GiB": results["peak_memory_bytes"] / 2**30, **jumps, **begun, **values}})


def read_json(path: Path, keys: Sequence[str] = ()) -> dict:
    """A JSON object with all of these keys, from a file that this project wrote."""
    value = None
    with contextlib.suppress(ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
    problems = [f"no {key}" for key in keys if key not in value] if isinstance(value, dict) else ["not a JSON object"]
    if problems:
        raise UserError(f"{path} is damaged ({', '.join(problems)}); delete it, or repeat the command that wrote it")
    return value


def read_time(text: str | None, missing: float = 0.0) -> float:
    """Seconds since 1970 of a time in our files; machines that share a base folder may have different zones."""
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return missing


@dataclass(frozen=True)
class RunFiles:
    """A run as its folder tells it; empty where there is no run."""
    info:    dict = field(default_factory=dict)                               # run.json
    metrics: dict[str, dict[int, list[dict]]] = field(default_factory=dict)   # metrics.jsonl as {kind: {step: lines}}

    def get_lines(self, kind: str) -> list[dict]:
        """The last line of each step."""
        return [rows[-1] for rows in self.metrics.get(kind, {}).values()]

    def get_series(self, kind: str, key: str) -> list[tuple[int, float]]:
        """(step, value) of one logged quantity, finite numbers only."""
        return [(line["step"], float(line[key])) for line in self.get_lines(kind)
                if isinstance(line.get(key), int | float) and math.isfinite(line[key])]

    def get_last(self, kind: str, key: str) -> float | None:
        """The last value of one logged quantity."""
        series = self.get_series(kind, key)
        return series[-1][1] if series else None


def read_run(run_dir: Path) -> RunFiles:
    """The files of a run, without the steps that a resumed run has repeated; UserError where run.json is damaged.

    A train line whose step isn't beyond the last one starts a resumed run: everything that the earlier attempt logged
    after that step is dropped.
    """
    if not (run_dir / "run.json").is_file():
        return RunFiles()
    metrics: dict[str, dict[int, list[dict]]] = defaultdict(dict)
    for line in read_metrics(run_dir):
        kind, step = line["kind"], line["step"]
        if kind == "train" and step <= next(reversed(metrics["train"]), -1):
            metrics |= {name: {s: rows for s, rows in steps.items() if s <= step} for name, steps in metrics.items()}
        # The last line of a step counts; but all its samples do, each once, though a resumed run draws them again
        others = [other for other in metrics[kind].get(step, ()) if kind == "sample" and other != line]
        metrics[kind][step] = [*others, line]
    metrics = {kind: dict(sorted(steps.items())) for kind, steps in metrics.items()}
    return RunFiles(read_json(run_dir / "run.json"), metrics)


def build_card(base_dir: Path, price_per_hour: float | None) -> Card:
    """The card of all sections and runs below `base_dir`.

    price_per_hour: of the machine, US dollars; None: as GPU_PRICES has it for the runs' hardware
    """
    saved = {path.stem: read_json(path) for path in sorted((base_dir / "report").glob("*.json"))}
    runs = {path.parent.relative_to(base_dir).as_posix(): read_json(path)
            for path in sorted((base_dir / "runs").glob("*/*/run.json"))}
    chain = choose_chain(saved, runs)
    if not chain:
        raise UserError(f"nothing to report yet: no section and no run in {base_dir}; start with: "
                        "bash runs/quickstart.sh")
    sections, shown, tiles, commands, created, wall_sec = compare_stages(chain, runs), set(), {}, {}, [], 0.0
    environments: dict[str, tuple[str, dict]] = {}    # as JSON -> (the first run with it, environment)
    for record in chain:
        run_path = record.get("run") or ""
        run = read_run(base_dir / run_path) if run_path in runs.keys() - shown else RunFiles()
        section = Section(str(record.get("title", run_path)), dict(record.get("values") or record.get("metrics") or {}),
                          [Table(t.get("title", ""), t["columns"], t["rows"]) for t in record.get("tables") or ()],
                          list(record.get("samples") or ()), [str(note) for note in record.get("notes") or ()])
        if run.info:
            complete_section(section, run, price_per_hour)
            if environment := run.info.get("environment"):
                environments.setdefault(json.dumps(environment), (run_path, environment))
            tokens = run.get_last("train", "tokens")
            facts = {"validation bpb": run.get_last("eval", "val_bpb"),
                     "layers": (run.info.get("model_config") or {}).get("n_layer"),
                     "tokens trained on": tokens and format_count(tokens)}
            # the first stage's figures: a chat has other bits per byte
            tiles = {key: value for key, value in facts.items() if value} | tiles
        elif run_path and run_path not in shown:
            section.notes.append(f"{run_path} isn't there any more, so its curve and settings are missing here")
        shown.add(run_path)    # a run belongs to the first section that names it
        # the time of an evaluation, in its own section, and the time of the run where the run is shown
        run_sec = max(run.info.get("wall_sec") or 0.0, run.info.get("earlier_sec") or 0.0,
                      run.get_last("train", "elapsed_sec") or 0.0)
        wall_sec += (record.get("wall_sec") or 0.0) + run_sec
        sections += [section, *describe_data(run.info.get("data") or {})]
        created += [record.get("created"), run.info.get("created")]
        if argv := record.get("argv") or run.info.get("argv"):
            commands[format_command(argv)] = None    # each once, in order
    others = [[path, info.get("status"), info.get("created")] for path, info in runs.items() if path not in shown]
    if others:
        sections.append(Section("Other runs on this disk", tables=[Table("", ["run", "status", "created"], others)]))
    price, why = find_price([environment for _, environment in environments.values()], price_per_hour)
    tiles["wall-clock time"] = format_value("_sec", wall_sec)
    tiles["cost"] = "unknown" if price is None else format_value("_dollars", wall_sec / 3600 * price)
    sections += [describe_code(), describe_environments(list(environments.values()))]
    sections[-1].notes.append(f"Cost: {why}." if price is None else f"Cost: at ${price:,.2f} per hour, {why}.")
    if commands:
        sections.append(Section("Commands", code="\n".join(commands)))
    return Card(max(map(str, filter(None, created)), default="", key=read_time), tiles, sections)


def choose_chain(saved: dict[str, dict], runs: dict[str, dict]) -> list[dict]:
    """Sections in reading order: the saved ones, and one for each other stage's newest run."""
    def place(item: tuple[str, dict]) -> tuple[int, int, float]:
        name, section = item
        rank = next((10 * i for i, prefix in enumerate(SECTION_ORDER, 1) if name.startswith(prefix)), 1000)
        stage = {stage: i for i, stage in enumerate(STAGES, 1)}.get(section.get("stage"), 0)    # 0: comes first
        return section.get("order", rank), stage, read_time(section.get("created"), math.inf)

    run_paths = [section.get("run") or "" for section in saved.values()]
    told_stages = {path.split("/")[1] for path in run_paths if path.count("/") == 2}
    newest = {path.split("/")[1]: path for path in sorted(runs, key=lambda path: read_time(runs[path].get("created")))}
    untold = {f"{stage}_train, not saved": {
        "title": f"{STAGES.get(stage, stage)} {runs[path].get('tag', '')} ({runs[path].get('status', 'unknown')})",
        "run": path} for stage, path in newest.items() if stage not in told_stages}
    return [section for _, section in sorted((saved | untold).items(), key=place)]


def complete_section(section: Section, run: RunFiles, price_per_hour: float | None) -> None:
    """Add to a section what its run has on disk; the section's own values stay."""
    train, val = run.get_series("train", "loss"), run.get_series("eval", "val_bpb")
    reward = run.get_series("train", "reward")
    facts = {"status": run.info.get("status"), "last step": train and train[-1][0],
             "train loss": train and not reward and smooth(train)[-1][1], "val bpb": val and val[-1][1],
             "best val bpb": val and min(value for _, value in val),
             **{key: value for key, value in measure_run(run).items() if key != "train_sec"}}
    if section.values:  # the stage has told the rest in its own words
        facts = {key: facts.get(key) for key in ("status", "train loss", "best val bpb", "tokens_per_sec", "mfu_pct")}
    section.values |= {key: value for key, value in facts.items() if value and key not in section.values}
    curve = Curve(reward, get_held_out_reward(run), ("reward", "held-out reward"), has_one_scale=True) if reward \
        else Curve(train, val)
    section.curve = curve if len(curve.train) > 1 or len(curve.val) > 1 else None
    if run.info.get("predicted") and run.metrics.get("train"):
        compare_with_plan(section, run, price_per_hour)
    if evals := run.get_lines("eval"):
        columns = list(dict.fromkeys(key for line in evals for key in line if key != "kind"))
        rows = [[line.get(key) for key in columns] for line in thin(evals, MAX_EVAL_ROWS)]
        section.tables.append(Table("Evaluations", columns, rows))
    packing = {key: value for line in run.get_lines("data")[-1:] for key, value in line.items() if key != "kind"}
    folded = {"Packing of the data": packing, "Model": run.info.get("model_config"), "Plan": run.info.get("plan"),
              "Data": {key: value for key, value in (run.info.get("data") or {}).items() if key != "files"},
              "Tokenizer": run.info.get("tokenizer")}
    section.tables += [Table(title, [], list(facts.items()), folded=True) for title, facts in folded.items() if facts]
    rows = [[d.get("what"), d.get("value"), d.get("why")] for d in run.info.get("decisions") or ()]
    if rows:
        section.tables.append(Table("Decided automatically", ["what", "value", "why"], rows, folded=True))
    if not section.samples and run.metrics.get("sample"):
        step, section.samples = list(run.metrics["sample"].items())[-1]
        section.notes.append(f"The samples are from step {step:,}.")


def describe_data(data: dict) -> list[Section]:
    """What of a person's files became a run's data and what was left out, where the data's manifest tells."""
    folder = Path(data.get("folder") or "nowhere")
    manifest = None
    with contextlib.suppress(UserError):    # its damage is told where the data is used
        manifest = read_manifest(folder) if (folder / "manifest.json").is_file() else None
    if not manifest or not (account := manifest.account):
        return []
    section = Section(f"Data: {data.get('name')}", {
        "files read": account.files["read"], "files left out": account.files["left out"],
        "documents kept": account.documents["kept"], "characters kept": account.characters["kept"]})
    rows = [[why, number, account.characters[why]] for why, number in account.documents.items() if why != "kept"]
    section.tables += [Table("Documents left out", ["why", "documents", "characters"], rows)] if rows else []
    rows = [[", ".join(entry["names"]), entry["files"], why] for why, entry in account.reasons.items()]
    section.tables += [Table("Files left out or skipped", ["files", "number", "why"], rows)] if rows else []
    section.notes += account.get_warnings()
    if manifest.val and hash_shards([*manifest.train, manifest.val]) != data.get("hash"):
        section.notes.append("The data was made again since this run: this tells of the new data.")
    return [section]


def measure_run(run: RunFiles) -> dict[str, float]:
    """Tokens, speed, memory and time of the training as a whole, under the keys of run.json's predictions."""
    choices = {"tokens": max, "tokens_per_sec": statistics.median, "mfu_pct": statistics.median,
               "peak_memory_bytes": max, "elapsed_sec": max}
    series = {key: [value for _, value in run.get_series("train", key)] for key in choices}
    return {key.replace("elapsed", "train"): choices[key](values) for key, values in series.items() if values}


def get_held_out_reward(run: RunFiles) -> list[tuple[int, float]]:
    """(step, mean reward over the held-out questions of all tasks) of each evaluation of RL, sampled as in training."""
    rewards, questions = Counter(), Counter()    # {step: number}
    for key in sorted({key for line in run.get_lines("eval") for key in line if key.endswith("_reward")}):
        counts = dict(run.get_series("eval", key.removesuffix("_reward") + "_problems"))
        for step, reward in run.get_series("eval", key):
            rewards[step] += reward * counts.get(step, 0)
            questions[step] += counts.get(step, 0)
    return [(step, rewards[step] / questions[step]) for step in sorted(questions) if questions[step]]


def compare_with_plan(section: Section, run: RunFiles, price_per_hour: float | None) -> None:
    """Add the predictions that the run made at its start, beside the measured figures."""
    predicted, actual, num_steps = dict(run.info["predicted"]), measure_run(run), max(run.metrics["train"])
    if "train_sec" in predicted:  # of the whole plan, while the run may not have reached its end
        predicted["train_sec"] *= num_steps / run.info["plan"]["num_iterations"]
    price, _ = find_price([run.info.get("environment") or {}], price_per_hour)
    for values in (predicted, actual):
        if price is not None and "train_sec" in values:
            values["train_dollars"] = values["train_sec"] / 3600 * price
    labels = {"peak_memory_bytes": "peak memory", "train_sec": f"time of {num_steps:,} steps",
              "tokens_per_sec": "tokens per sec", "mfu_pct": "MFU", "train_dollars": "cost of that time"}
    pairs = {key: (predicted.get(key), actual.get(key)) for key in labels}
    rows = [[labels[key], *("" if value is None else format_value(key, value) for value in pair),
             f"{pair[1] / pair[0]:.2f}" if all(pair) else ""] for key, pair in pairs.items() if pair != (None, None)]
    section.tables.append(Table("Plan against actual", ["", "predicted", "actual", "actual / predicted"], rows))
    sources = {"MFU": predicted.get("mfu_source"), "memory": predicted.get("memory_source")}
    notes = ["Predicted when the run began", *(f"{what}: {source}" for what, source in sources.items() if source)]
    section.notes.append("; ".join(notes) + ".")


def find_price(environments: list[dict], price_per_hour: float | None) -> tuple[float | None, str]:
    """US dollars per hour of the machine that the runs used, and its source; None where the price is unknown."""
    if price_per_hour is not None:
        return price_per_hour, "as given"
    hardwares = [environment.get("hardware") or {} for environment in environments]
    machines = {(hardware.get("gpu"), hardware.get("num_gpus") or 1) for hardware in hardwares}
    if len(machines) != 1:
        return None, "give --price-per-hour, for " + ("several machines were used" if machines else "no run says where")
    gpu, num_gpus = machines.pop()
    if found := find_gpu(str(gpu), GPU_PRICES):
        return found[1] * num_gpus, f"assumed for {num_gpus} x {found[0]} (another: --price-per-hour)"
    return None, f"give --price-per-hour, for no price is known for {gpu or 'a CPU'}"


def compare_stages(records: list[dict], runs: dict[str, dict]) -> list[Section]:
    """One table of all metrics over the stages, and over the runs where these have several names. Where two sections of
    a run state a metric, the later one counts; one of an earlier step, or from before the training's end, tells of
    other weights."""
    columns: dict[tuple[str, str], dict] = {}
    older = []
    for stage in STAGES:
        of_stage = [record for record in records if record.get("stage") == stage]
        default = next((record["run"] for record in of_stage if record.get("run")), "")
        for record in of_stage:
            values = record.get("values") or {}
            run = str(record.get("run") or values.get("model") or default)
            info = runs.get(run, {})
            last_step = (info.get("results") or {}).get("step")
            is_early = last_step is not None and values.get("step", last_step) != last_step
            metrics = {name: value for name, value in (record.get("metrics") or {}).items() if value is not None}
            if is_early or read_time(record.get("created"), math.inf) < read_time(info.get("ended")):
                older.append(str(record.get("title")))
            elif metrics:
                columns.setdefault((stage, run), {}).update(metrics)
    rows = [[name, *(metrics.get(name) for metrics in columns.values())]
            for name in dict.fromkeys(name for metrics in columns.values() for name in metrics)]
    is_one = len({Path(run).name for _, run in columns}) == 1
    heads = ["metric", *(STAGES[stage] + ("" if is_one else f" {Path(run).name}") for stage, run in columns)]
    notes = [f"Of weights from before the training's end, and left out here: {', '.join(older)}."] if older else []
    return [Section("Stage by stage", tables=[Table("", heads, rows)], notes=notes)] if rows else []


def describe_code() -> Section:
    """The size of the code base, by folder."""
    rows = []
    for folder in ("nanochat", "scripts", "tasks", "runs", "tests", "dev"):
        texts = [path.read_text(encoding="utf-8") for path in sorted((REPO_DIR / folder).rglob("*"))
                 if path.suffix in (".py", ".sh", ".html")]
        rows += [[folder, len(texts), sum(text.count("\n") for text in texts), sum(map(len, texts))]] if texts else []
    rows.append(["all", *(sum(row[i] for row in rows) for i in (1, 2, 3))])
    section = Section("Code", tables=[Table("", ["folder", "files", "lines", "characters"], rows)])
    lock, project = REPO_DIR / "requirements.lock", REPO_DIR / "pyproject.toml"
    if lock.is_file() and project.is_file():  # not where nanochat is installed as a package
        packages, text = lock.read_text(encoding="utf-8").split(), project.read_text(encoding="utf-8")
        declared = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
        section.values["dependencies declared"] = declared[1].count('"') // 2 if declared else None
        section.values["packages locked, theirs and the tests' included"] = len(packages)
    return section


def describe_environments(environments: list[tuple[str, dict]]) -> Section:
    """Hardware and versions; one table for all runs that agree."""
    tables = []
    for run_path, environment in environments:
        flat = environment | {"hardware": None, "host": None} | (environment.get("hardware") or {})
        rows = [[key, value] for key, value in flat.items() if value is not None]
        tables.append(Table("" if len(environments) == 1 else f"from {run_path} on", [], rows))
    return Section("Environment", tables=tables, notes=[] if tables else ["No run has recorded one yet."])


def write_ledger(base_dir: Path, tags: Sequence[str], author: dict[str, str | None], out: Path) -> dict:
    """Write ledger.json, of these pretraining runs or of all, and leaderboard.md, of all."""
    entries, left_out = {}, {}
    for path in sorted((base_dir / "runs").glob("*/*/run.json")):
        stage, tag = path.parts[-3:-1]
        try:
            run = read_run(path.parent)
            fault = find_fault(run)
        except UserError as error:    # a damaged run.json
            fault = str(error)
        if not fault:
            entries[tag] = make_entry(tag, run, author)
        else:
            left_out[tag if stage == "base" else f"{stage}/{tag}"] = fault
    for tag in tags:
        if tag in left_out:
            raise UserError(f"{tag} can't enter the ledger: {left_out[tag]}")
        if tag not in entries:
            raise UserError(f"there is no run {tag}: {base_dir / 'runs' / 'base'} has {', '.join(entries) or 'none'}")
    for name, why in left_out.items():
        print0(f"left out: {name}: {why}")
    if not entries:
        raise UserError(f"{base_dir} has no finished pretraining run for the ledger; make one with scripts.base_train")
    ledger = {"runs": [{"run_info": entries[tag]} for tag in dict.fromkeys(tags or entries)], "left_out": left_out}
    board = render_markdown(build_leaderboard(list(entries.values()), left_out))
    write_files(out, {"ledger.json": json.dumps(ledger, indent=2) + "\n", "leaderboard.md": board})
    print0(f"ledger: {out / 'ledger.json'}\nleaderboard: {out / 'leaderboard.md'}")
    return ledger | {"json": str(out / "ledger.json"), "markdown": str(out / "leaderboard.md")}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m nanochat.report", description="The report card of a chain of runs")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="write report.md and report.html")
    generate.add_argument("--out", type=Path, help="folder to write to (default: report/ in the base folder)")
    generate.add_argument("--price-per-hour", type=float,
                          help="rent of the machine, US dollars per hour (default: by its GPUs, where known)")
    commands.add_parser("reset", help="delete the sections of earlier runs; the runs themselves stay")
    ledger = commands.add_parser("ledger", help="write ledger.json and leaderboard.md")
    ledger.add_argument("runs", nargs="*", metavar="RUN",
                        help="tags of pretraining runs, for ledger.json (default: all)")
    ledger.add_argument("--out", type=Path, help="folder to write to (default: ledger/ in the base folder)")
    for name in AUTHOR_FIELDS:
        ledger.add_argument(f"--{'author' if name == 'name' else name}", dest=name, help=f"the author's {name}")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    base_dir = get_base_dir()
    if args.command == "reset":
        sections = list((base_dir / "report").glob("*.json*"))    # and temporary files of killed processes
        for path in sections:
            path.unlink()
        print0(f"report: {len(sections)} sections deleted")
        return {"removed": len(sections)}
    if args.command == "ledger":
        author = {name: getattr(args, name) for name in AUTHOR_FIELDS}
        return write_ledger(base_dir, args.runs, author, args.out or base_dir / "ledger")
    if args.price_per_hour is not None and not 0 <= args.price_per_hour < math.inf:
        raise UserError(f"--price-per-hour {args.price_per_hour} must be 0 or more US dollars")
    card = build_card(base_dir, args.price_per_hour)
    markdown, page = write_card(card, args.out or base_dir / "report")
    print0(f"report: {markdown}\nreport: {page}")
    return {"markdown": str(markdown), "html": str(page), "sections": len(card.sections)}


if __name__ == "__main__":
    run_script(main)
