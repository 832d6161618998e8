"""The results of a sweep: from a folder of finished runs, or from a CSV table as this family's scripts write it."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanochat.common import UserError
from nanochat.config import GPTConfig, read_config
from nanochat.ledger import find_fault
from nanochat.presets import KNOBS, PRESETS, make_marin
from nanochat.report import read_json, read_run
from scripts.sweep import SWEEP_KEYS

# Names of a column, in this project and in others of its family; the first name that the table has is used
BUDGET_COLUMNS = ("flops_budget", "total_flops", "flops")
TOKENS_COLUMNS = ("tokens_trained", "tokens")
LOSS_COLUMNS = ("val_bpb", "val_loss", "loss")
# Parameter counts, each as the columns to add up; the first set that the table has is used
CONVENTIONS = {
    "all": (("params_total",), ("num_params",), ("params",)),
    "transformer + head": (("params_transformer", "params_lm_head"), ("num_scaling_params",)),
    # Kaplan et al., arXiv 2001.08361, count neither embeddings nor head
    "without embeddings": (("params_transformer", "params_scalars"), ("params_transformer",)),
}
MAIN_CONVENTION = "transformer + head"    # the count of --target-param-data-ratio
START_TOLERANCE = 0.05    # nats between the loss of the first step and ln V
BUDGET_TOLERANCE = 0.1    # budgets closer than this are one: whole steps never meet a budget exactly


@dataclass(frozen=True)
class Run:
    """One trained model of a sweep."""
    name:   str
    budget: float               # FLOPs
    params: dict[str, float]    # by convention
    tokens: float
    loss:   float
    kind:   str = ""            # of model, as name_kind has it; '' where a table doesn't tell


@dataclass(frozen=True)
class Results:
    """The usable runs of a folder or table."""
    source:    Path
    runs:      list[Run]
    loss_name: str          # column or metric
    notes:     list[str]    # what was left out, and why; what else is odd


def load_results(path: Path) -> Results:
    """The runs of a sweep's folder, a folder of runs, or a CSV file; UserError where there is none."""
    notes: list[str] = []
    source = find_source(path)
    rows, loss_name = (read_run_folders(source, notes), "val_bpb") if source.is_dir() else read_csv(source, notes)
    return Results(source, make_runs(rows, source, notes), loss_name, notes)


def find_source(path: Path) -> Path:
    """A folder that has runs, or a CSV file."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} doesn't exist; give the folder of a sweep's runs, or a CSV file")
    if (path / "sweep.json").is_file() or next(path.rglob("run.json"), None):
        return path
    if (path / "results.csv").is_file():
        return path / "results.csv"
    raise UserError(f"{path} has neither runs (a run.json in each run's folder) nor a results.csv")


def list_runs(folder: Path, notes: list[str]) -> list[tuple[str, Path]]:
    """(name, folder) of each run below a folder, or of those that scripts.sweep lists in its sweep.json."""
    if not (folder / "sweep.json").is_file():
        return [(path.parent.relative_to(folder).as_posix(), path.parent) for path in sorted(folder.rglob("run.json"))]
    sweep, runs = read_json(folder / "sweep.json", SWEEP_KEYS), []
    for point in sweep["points"]:
        run_dir = folder.parents[1] / "runs" / "base" / point["tag"]  # ordinary runs of the same base folder
        if (run_dir / "run.json").is_file():
            runs.append((point["tag"], run_dir))
        else:
            notes.append(f"{point['tag']} is left out: " + sweep["failed"].get(point["tag"], "it has not begun") + ".")
    return runs


def read_run_folders(folder: Path, notes: list[str]) -> list[tuple[str, dict]]:
    """(name, row in the columns of a CSV) of each finished run; a note for each other run."""
    rows, measured, starts = [], {}, {}
    for name, run_dir in list_runs(folder.resolve(), notes):
        run = read_run(run_dir)
        info = run.info
        if fault := find_fault(run):
            notes.append(f"{name} is left out: {fault}.")
        else:
            plan = info["plan"]
            budget = info["args"]["target_flops"] if plan["horizon"] == "flops" else plan["total_flops"]
            if abs(plan["total_flops"] / budget - 1) > 0.05:
                notes.append(f"{name} spent {plan['total_flops']:.3g} FLOPs of a budget of {budget:.3g}: its steps are "
                             "few and large; a smaller --total-batch-size comes closer.")
            measured[name] = find_measured(info)
            config = read_config(info["model_config"])
            if first_loss := dict(run.get_series("train", "loss")).get(1):
                starts[name] = (first_loss, config.vocab_size)
            params = {"params_transformer" if key == "transformer_matrices" else f"params_{key}": count
                      for key, count in info["params"].items()}
            rows.append((name, {"flops_budget": budget, "tokens_trained": plan["total_tokens"],
                                "val_bpb": run.get_last("eval", "val_bpb"), "kind": name_kind(config), **params}))
    notes += compare_measured(measured)
    notes += [f"{name} starts at a loss of {starts[name][0]:.3f}, {excess:+.3f} from ln V, that of guessing."
              for name, excess in find_odd_starts(starts).items()]
    return rows


def find_measured(info: dict) -> tuple[str | None, str | None]:
    """What the loss of a run.json was measured on: hash of the data, rule of the validation rows."""
    return (info.get("data") or {}).get("hash"), (info.get("results") or {}).get("val_rule")


def compare_measured(measured: dict[str, tuple]) -> list[str]:
    """A note where losses were measured on different text. measured: {run: find_measured of it}"""
    firsts: dict[tuple, str] = {}
    for name, what in measured.items():
        firsts.setdefault(what, name)
    names = list(firsts.values())
    return [f"The losses aren't comparable: {names[0]} and {names[1]} differ in data or validation rows."] \
        if len(names) > 1 else []


def find_odd_starts(starts: dict[str, tuple[float, int]], tolerance: float = START_TOLERANCE) -> dict[str, float]:
    """{run: its first loss less ln V} of the runs that don't start at the loss of guessing, as a small head makes them.

    starts: {run: (loss of its first step in nats per token, vocabulary)}
    """
    excess = {name: loss - math.log(vocab_size) for name, (loss, vocab_size) in starts.items()}
    return {name: value for name, value in excess.items() if not abs(value) <= tolerance}    # NaN is odd, too


def name_kind(config: GPTConfig) -> str:
    """The preset whose knobs a model has, marin for each of its sizes; "default" for the model of today; else the
    knobs that aren't those of today."""
    default = {key: getattr(GPTConfig, key) for key in ("window_pattern", *KNOBS)}
    own = {key: getattr(config, key) for key in default}
    for name, preset in {"marin": make_marin(config.n_layer, config.n_head), **PRESETS}.items():
        theirs = preset.shape | preset.flags | preset.knobs
        if own == default | {key: value for key, value in theirs.items() if key in default}:
            return name
    return " ".join(f"{key}={value}" for key, value in own.items() if value != default[key]) or "default"


def read_csv(path: Path, notes: list[str]) -> tuple[list[tuple[str, dict]], str]:
    """((name, row) of each line whose cells are numbers, the name of the loss); a note for each other line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file, skipinitialspace=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} isn't a CSV file ({error})") from None
    if not lines:
        raise UserError(f"{path} has no rows")
    columns = {column for column in lines[0] if column}
    needed = []
    for names in (BUDGET_COLUMNS, TOKENS_COLUMNS, LOSS_COLUMNS):
        needed.append(next((name for name in names if name in columns), None))
        if not needed[-1]:
            raise UserError(f"{path} has no column {' or '.join(names)}; it has {', '.join(sorted(columns))}")
    used = {c for sets in CONVENTIONS.values() for s in sets if set(s) <= columns for c in s}
    if not used:
        raise UserError(f"{path} has no column params_total, nor params_transformer and params_lm_head; "
                        f"it has {', '.join(sorted(columns))}")
    rows = []
    for number, line in enumerate(lines, 2):
        row, bad = {}, ""
        for column in (*needed, *sorted(used)):
            try:
                row[column] = float(line[column])
            except (TypeError, ValueError):
                bad = bad or column
        if bad:
            notes.append(f"Line {number} is left out: its {bad} is no number ({line[bad] or 'empty'}).")
        else:
            rows.append((f"line {number}", row))
    return rows, needed[2]


def make_runs(rows: list[tuple[str, dict]], source: Path, notes: list[str]) -> list[Run]:
    """Runs whose numbers are positive and finite, without duplicates."""
    runs, seen = [], {}
    for name, row in rows:
        budget, tokens, loss = (next(row[c] for c in names if c in row)
                                for names in (BUDGET_COLUMNS, TOKENS_COLUMNS, LOSS_COLUMNS))
        params = {}
        for convention, sets in CONVENTIONS.items():
            columns = next((s for s in sets if all(c in row for c in s)), None)
            if columns:
                params[convention] = float(sum(row[c] for c in columns))
        values = (budget, tokens, loss, *params.values())
        if not all(math.isfinite(value) and value > 0 for value in values):
            notes.append(f"{name} is left out: FLOPs, tokens, parameters and loss must be positive numbers, and one of "
                         f"{', '.join(f'{value:g}' for value in values)} isn't.")
        elif values in seen:
            notes.append(f"{name} is left out: it repeats {seen[values]}.")
        else:
            seen[values] = name
            runs.append(Run(name, budget, params, tokens, loss, str(row.get("kind", ""))))
    if not runs:
        raise UserError(f"{source} has no run that can be used" + (f": {notes[0]}" if notes else ""))
    return runs


def group_near(values: list[float] | np.ndarray) -> list[np.ndarray]:
    """The indices of each group of values within BUDGET_TOLERANCE of the group's smallest, ascending."""
    values = np.asarray(values, dtype=float)
    groups: list[np.ndarray] = []
    for value in np.unique(values):
        if not groups or value > values[groups[-1]].min() * (1 + BUDGET_TOLERANCE):
            groups.append(np.flatnonzero((values >= value) & (values <= value * (1 + BUDGET_TOLERANCE))))
    return groups


def group_budgets(runs: list[Run]) -> dict[float, list[Run]]:
    """{median budget: its runs}, ascending."""
    groups = ([runs[i] for i in indices] for indices in group_near([run.budget for run in runs]))
    return {float(np.median([run.budget for run in group])): group for group in groups}
