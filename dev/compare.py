"""The compute multiplier: two or more ways of training side by side, and the compute that one saves over another.

    python -m dev.compare d12 d12-wide             # tags of runs, or their folders; all are compared to the first
    python -m dev.compare a-1 a-2 wide-1 wide-2    # runs that differ only in their seed are one group

The compute multiplier of B over A is the FLOPs of A over the FLOPs that B needs to reach A's final metric: 1.2 means
that A would need 20% more compute than B for the same result. The same is measured in seconds, which depend on the
machine. With several seeds it is the median over all pairs, with the lowest and the highest. B is measured in the midst
of its schedule, at a high learning rate; a run planned to end there would be better: the multiplier is a lower bound.
Writes compare.png and compare.json, by default to $NANOCHAT_BASE_DIR/compare/<tags>.
"""

import argparse
import math
import os.path
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dev.figures import draw_comparison, make_folder, save_png
from dev.timing import print_table
from nanochat.choices import FREE_FLAGS, MACHINE_FLAGS
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, get_base_dir, print0, write_json
from nanochat.report import read_run
from nanochat.report_render import format_rows

# The kind and key of a line of metrics.jsonl; the loss is the running mean, as a single step's is noise
METRICS = {"val_bpb": ("eval", "val_bpb"), "train_loss": ("train", "loss_smooth")}
LABELS = {"val_bpb": "validation bits per byte", "train_loss": "train loss, nats per token"}
NAMES = {"model_tag", "seed"}    # of a run: runs of one kind differ in them


@dataclass(frozen=True)
class Run:
    """One run's metric along all four axes."""
    name:    str
    seed:    object
    kind:    dict                     # its settings but for NAMES and FREE_FLAGS of the run: {setting: value}
    rules:   tuple                    # the text that its metric was measured on
    machine: object                   # the hardware that its seconds were measured on
    axes:    dict[str, np.ndarray]    # steps, tokens, flops, seconds and values: (points,)
    ended:   bool                     # it reached its horizon

    @property
    def final(self) -> float:
        return float(self.axes["values"][-1])


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="tag or folder of a run; the first is the base")
    parser.add_argument("--metric", choices=METRICS, default="val_bpb")
    parser.add_argument("--out", type=Path, help="folder to write to")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    folders = [find_run(run) for run in args.runs]
    if repeated := [folder for i, folder in enumerate(folders) if folder in folders[:i]]:
        raise UserError(f"{repeated[0]} is given twice")
    runs = [load_run(folder, args.metric) for folder in folders]
    groups = group_seeds(runs)
    if len(groups) < 2:
        raise UserError("there is nothing to compare: " + (f"{runs[0].name} is the only run" if len(runs) == 1 else
                        "these runs differ only in their seed") + "; name a run that was trained differently")
    (base_name, base), *others = groups.items()
    results = {"metric": args.metric, "base": base_name, "notes": describe_caveats(runs, groups),
               "groups": {name: summarize(group, base) for name, group in groups.items()},
               "differences": list_differences(groups)}
    out = make_folder(args.out or get_base_dir() / "compare" / "-".join(folder.name for folder in folders)[:100])
    target = statistics.mean(run.final for run in base)
    axes = {name: [run.axes for run in group] for name, group in groups.items()}
    save_png(draw_comparison(axes, LABELS[args.metric], target), out / "compare.png")
    write_json(out / "compare.json", results)
    print_results(results)
    print0(f"compare: {out / 'compare.png'}")
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def find_run(name: str) -> Path:
    """The folder of a run, from its path or its tag."""
    if (Path(name) / "run.json").is_file():
        return Path(name).resolve()
    runs_dir = get_base_dir() / "runs"
    known = {path.parent for path in runs_dir.glob("*/*/run.json")}
    found = sorted(folder for folder in known if name in (folder.name, f"{folder.parent.name}/{folder.name}"))
    if len(found) > 1:
        raise UserError(f"{name} is a run of several stages; say which: "
                        + " or ".join(f"{folder.parent.name}/{folder.name}" for folder in found))
    if not found:
        raise UserError(f"there is no run {name}: no folder with a run.json, and {runs_dir} has "
                        f"{', '.join(sorted(folder.name for folder in known)) or 'none'}")
    return found[0].resolve()


def load_run(folder: Path, metric: str) -> Run:
    """A run's curve, from its files alone."""
    run = read_run(folder)
    info, plan = run.info, run.info.get("plan") or {}
    if not {"batch_tokens", "flops_per_token"} <= plan.keys():
        raise UserError(f"{folder} doesn't say its tokens and FLOPs (no plan in run.json), so it can't be compared")
    series = [point for point in run.get_series(*METRICS[metric]) if point[0] > 0]    # step 0 has cost nothing
    clock = run.get_series("train", "elapsed_sec")
    if not series or not clock:
        raise UserError(f"{folder} has logged no {metric}; " + ("train it with --eval-every, or compare --metric "
                        "train_loss" if clock else "let it train first"))
    steps, values = np.array(series, dtype=float).T

    def at_steps(points: list[tuple[int, float]]) -> np.ndarray:
        """A running total at the steps of the series."""
        return np.interp(steps, *np.array([(0, 0.0), *points], dtype=float).T)
    tokens, spent = steps * plan["batch_tokens"], run.get_series("train", "flops")
    # pretraining logs its FLOPs, since short rows cost less; the other stages' rows have one length
    flops = at_steps(spent) if spent else tokens * plan["flops_per_token"]
    axes = {"steps": steps, "tokens": tokens, "flops": flops, "seconds": at_steps(clock), "values": values}
    args, environment = info.get("args") or {}, info.get("environment") or {}
    data, tokenizer = ((info.get(key) or {}).get("hash") for key in ("data", "tokenizer"))
    kind = {**{key: value for key, value in args.items() if key not in FREE_FLAGS - MACHINE_FLAGS | NAMES},
            **plan, **(info.get("model_config") or {}), "data": data, "tokenizer": tokenizer,
            "revision": environment.get("git_revision")}
    last_eval = run.metrics["eval"][steps[-1]][-1] if metric == "val_bpb" else {}
    rules = (data, last_eval.get("val_rule"), last_eval.get("val_bytes")) if last_eval else (data, tokenizer)
    return Run(folder.name, args.get("seed"), kind, rules, environment.get("hardware"), axes,
               info.get("status") == "finished")


def group_seeds(runs: list[Run]) -> dict[str, list[Run]]:
    """{name: the runs of one kind}, in the order given.

    A repeated seed opens a new group: the runs differ in something that they don't record, such as uncommitted changes.
    """
    groups: list[list[Run]] = []
    for run in runs:
        group = next((g for g in groups if g[0].kind == run.kind and run.seed not in {r.seed for r in g}), None)
        if group:
            group.append(run)
        else:
            groups.append([run])
    named: dict[str, list[Run]] = {}
    for group in groups:
        name = group[0].name
        if len(group) > 1:
            shared = re.sub(r"[-_.](s|seed)?$", "", os.path.commonprefix([run.name for run in group]))
            name = f"{shared or name} ({len(group)} seeds)"
        named[name if name not in named else f"{name} #{len(named) + 1}"] = group
    return named


# ---------------------------------------------------------------------------------------------------------------------
# The multiplier


def find_cost(run: Run, target: float, axis: str) -> float | None:
    """The point of `axis` at which the metric first falls to `target`, interpolated linearly; None if it never does."""
    values, costs = run.axes["values"], run.axes[axis]
    reached = np.flatnonzero(values <= target)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0:
        return float(costs[0])
    frac = (values[i - 1] - target) / (values[i - 1] - values[i])
    return float(costs[i - 1] + frac * (costs[i] - costs[i - 1]))


def measure_multiplier(group: list[Run], base: list[Run], axis: str) -> dict:
    """The cost for `group` to reach the final metric of `base`, over all pairs of their runs.

    needed: in the unit of the axis; multiplier: the base's cost over it; both of the median pair, None: not reached
    """
    pairs = [(find_cost(run, other.final, axis), float(other.axes[axis][-1])) for run in group for other in base]
    multipliers = sorted(base_cost / cost if cost else 0.0 for cost, base_cost in pairs)
    middle = statistics.median_low(multipliers)    # of a real pair, where the other half never reaches the target
    needed = statistics.median_high([cost or math.inf for cost, _ in pairs])
    return {"needed": needed if middle else None, "multiplier": middle or None, "lowest": multipliers[0] or None,
            "highest": multipliers[-1] or None, "num_pairs": len(pairs), "num_reached": sum(map(bool, multipliers))}


def summarize(group: list[Run], base: list[Run]) -> dict:
    """A group's own figures and, for all but the base, its multipliers."""
    finals = [run.final for run in group]
    summary = {"runs": [run.name for run in group], "seeds": [run.seed for run in group], "final": finals,
               "final_mean": statistics.mean(finals),
               "final_std": statistics.stdev(finals) if len(finals) > 1 else None,
               **{axis: statistics.mean(float(run.axes[axis][-1]) for run in group)
                  for axis in ("tokens", "flops", "seconds")}}
    if group is not base:
        summary |= {f"{axis}_to_reach": measure_multiplier(group, base, axis) for axis in ("flops", "seconds")}
        # the base's cost of reaching the group: the damage, where the group is worse
        summary["base_flops_to_reach"] = measure_multiplier(base, group, "flops")
    return summary


def list_differences(groups: dict[str, list[Run]]) -> dict[str, dict]:
    """{setting: {group: value}} of the settings that differ between the groups."""
    kinds = {name: group[0].kind for name, group in groups.items()}
    settings = dict.fromkeys(key for kind in kinds.values() for key in kind)
    found = {key: {name: kind.get(key) for name, kind in kinds.items()} for key in settings}
    return {key: values for key, values in found.items() if len(set(map(str, values.values()))) > 1}


def describe_caveats(runs: list[Run], groups: dict[str, list[Run]]) -> list[str]:
    """The reasons why the figures may mislead."""
    notes = [f"{run.name} has not reached its horizon; its last point stands for its result." for run in runs
             if not run.ended]
    notes += [f"{run.name} was measured {len(run.axes['values'])} times only; where it reaches a value is read off a "
              "straight line between them." for run in runs if len(run.axes["values"]) < 5]
    if len({run.rules for run in runs}) > 1:
        notes.append("The metric was not measured on the same text in all runs, so it isn't comparable between them.")
    if len({str(run.machine) for run in runs}) > 1:
        notes.append("The runs used different machines, so their seconds aren't comparable.")
    if min(map(len, groups.values())) < 2:
        notes.append("With one seed a side, nothing tells whether the difference is more than chance.")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Showing


def print_results(results: dict) -> None:
    """The table, what differs, and the caveats."""
    columns = ["run", f"final {results['metric']}", "std", "FLOPs", "seconds", "FLOPs to reach the first",
               "multiplier", "in seconds"]
    rows = []
    for name, group in results["groups"].items():
        row = [name, f"{group['final_mean']:.4f}", group["final_std"] and f"{group['final_std']:.4f}",
               f"{group['flops']:.3g}", f"{group['seconds']:,.0f}"]
        if "flops_to_reach" in group:
            needed = group["flops_to_reach"]["needed"]
            row += [f"{needed:.3g}" if needed else "not reached",
                    *(format_multiplier(group[f"{axis}_to_reach"]) for axis in ("flops", "seconds"))]
        rows.append(row + [None] * (len(columns) - len(row)))
    print_table(columns, format_rows(columns, rows))
    for name, group in results["groups"].items():
        inverse = group.get("base_flops_to_reach")
        if inverse and not group["flops_to_reach"]["multiplier"] and inverse["multiplier"]:
            frac = inverse["needed"] / results["groups"][results["base"]]["flops"]
            print0(f"{results['base']} reaches the final {results['metric']} of {name} with {frac:.0%} of its FLOPs")
    for key, values in results["differences"].items():
        print0(f"differs: {key}: " + ", ".join(f"{name} {value}" for name, value in values.items()))
    for note in results["notes"]:
        print0(f"note: {note}")


def format_multiplier(measured: dict) -> str:
    """1.21 (1.1 to 1.3), or the number of pairs that don't reach the base."""
    num_pairs, num_missed = measured["num_pairs"], measured["num_pairs"] - measured["num_reached"]
    missed = f"not reached in {num_missed} of {num_pairs}" if num_missed < num_pairs else "not reached"
    if not measured["multiplier"]:
        return missed
    text = f"{measured['multiplier']:.3f}"
    if num_missed:
        return f"{text} ({missed})"
    return text + (f" ({measured['lowest']:.3f} to {measured['highest']:.3f})" if num_pairs > 1 else "")


if __name__ == "__main__":
    run_script(main)
