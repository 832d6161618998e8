"""What marin's leaderboard asks of a pretraining run, and a leaderboard of one's own, for `nanochat.report ledger`.

Its count of FLOPs isn't ours, so an entry has both; losses are compared on one validation set and under one rule only.
The fields are those of speedrun_results.json (marin-community/marin), and a few more.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from nanochat.common import UserError
from nanochat.config import GPTConfig, count_marin_flops, read_config
from nanochat.report_render import Card, Section, Table, format_command, format_count

if TYPE_CHECKING:
    from nanochat.report import RunFiles

COLUMNS = ("Pareto front", "run", "bpb", "parameters", "tokens", "training FLOPs", "FLOPs as marin counts",
           "hardware FLOPs", "MFU_pct", "devices", "time_sec", "completed", "description")
NOTES = ("Pareto front: no other run of the table has as low a loss after as few training FLOPs, or after as few "
         "seconds on the same machine.",
         "Training FLOPs: as base_train counts them, attention by its windows.",
         "FLOPs as marin counts: the whole square of scores in every layer, and 3 for each score's mask and softmax.",
         "Hardware FLOPs: seconds x devices x peak, a GPU's by its maker, a CPU's measured by the run; MFU: training "
         "FLOPs over them.")


def find_fault(run: "RunFiles") -> str:
    """Why a run can't be compared with others by its final loss; '' where it can."""
    info, val = run.info, run.get_series("eval", "val_bpb")
    if info.get("stage") != "base":
        return "it isn't a pretraining run"
    if missing := sorted({"args", "model_config", "params", "plan"} - info.keys()):
        return f"its run.json has no {' and no '.join(missing)}"
    if info.get("status") != "finished":
        return f"it is {info.get('status', 'unknown')}, not finished"
    if not val or val[-1][0] != info["plan"]["num_iterations"]:
        return "it has no validation loss at its last step"
    try:
        read_config(info["model_config"])
    except UserError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# An entry


def make_entry(tag: str, run: "RunFiles", author: dict[str, str | None]) -> dict:
    """The run_info of a run without a fault, whose folder is `tag`: of a run that was set aside, not its own tag.

    model_flops is marin's count and training_flops ours; the key of the bits per byte names the set that they were
    measured on. wandb_run_link is null: a run doesn't record its address.
    """
    info, plan, evaluated = run.info, run.info["plan"], run.get_lines("eval")[-1]
    config, data, environment = read_config(info["model_config"]), info.get("data") or {}, info.get("environment") or {}
    model_flops, hardware_flops = count_model_flops(config, plan), measure_hardware_flops(run)
    return {
        "run": tag,
        "author": author,
        "description": describe_model(config, info["args"]),
        "command": format_command(info["argv"]) if info.get("argv") else None,
        "git_revision": environment.get("git_revision"),
        "model_config": info["model_config"],
        "train_config": {**info["args"], "plan": plan},
        "tokenized_dataset": {"name": data.get("name"), "hash": data.get("hash"), "tokenizer": info.get("tokenizer")},
        "resources": environment.get("hardware"),
        "model_size": info["params"]["total"],
        "total_tokens": plan["total_tokens"],
        "model_flops": model_flops,
        "model_flops_per_token": count_marin_flops(config),
        "training_flops": plan["total_flops"],
        "training_flops_per_token": plan["flops_per_token"],
        "num_devices": info.get("num_devices"),
        "num_chips": info.get("num_devices"),
        "device_flops": find_device_flops(info),
        "training_time": run.get_last("train", "elapsed_sec"),
        "training_hardware_flops": hardware_flops,
        "mfu_pct": hardware_flops and 100 * plan["total_flops"] / hardware_flops,
        "model_flops_mfu_pct": hardware_flops and 100 * model_flops / hardware_flops,
        **{f"eval/{data.get('name')}/{name}": evaluated.get(f"val_{name}") for name in ("bpb", "rule", "T", "bytes")},
        "run_completion_timestamp": format_utc(info.get("ended")),
        "wandb_run_link": None,
    }


def count_model_flops(config: GPTConfig, plan: dict) -> int:
    """marin's count for a whole run, three times forward, in rows as short as each step's."""
    stages = [(stage["end_step"], stage["row_tokens"]) for stage in plan.get("short_rows") or ()]
    flops = first_step = 0
    for end_step, row_tokens in [*stages, (plan["num_iterations"], config.sequence_len)]:
        flops += 3 * count_marin_flops(config, row_tokens) * plan["batch_tokens"] * (end_step - first_step)
        first_step = end_step
    return flops


def measure_hardware_flops(run: "RunFiles") -> float | None:
    """Seconds x devices x peak: each step's FLOPs over its MFU, so that a run which was continued on other devices is
    counted by each part's own. None where a part's peak isn't known."""
    plan, flops, mfus = run.info["plan"], dict(run.get_series("train", "flops")), run.get_series("train", "mfu_pct")
    if not mfus or len(mfus) < len(run.get_lines("train")):
        return None
    total = spent = 0.0
    for step, mfu_pct in mfus:
        before, spent = spent, flops.get(step, step * plan["batch_tokens"] * plan["flops_per_token"])
        total += (spent - before) / (mfu_pct / 100)
    return total


def find_device_flops(info: dict) -> float | None:
    """The peak of one device in FLOP/s, as the run found it when it began; None where none was known."""
    peaks = [decision["value"] for decision in info.get("decisions") or ()
             if decision["what"] == "peak FLOP/s of one device"]
    return float(peaks[0]) if peaks and peaks[0] != "None" else None


def describe_model(config: GPTConfig, args: dict) -> str:
    """The preset, the shape and the knobs of a run in one line."""
    shape = f"depth {config.n_layer}, width {config.n_embd}, context {config.sequence_len}, " \
            f"vocabulary {config.vocab_size:,}"
    return ", ".join(filter(None, [args.get("preset"), shape, *(args.get("knobs") or ())]))


def format_utc(time: str | None) -> str | None:
    """A time of run.json as marin writes it."""
    return time and datetime.fromisoformat(time).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


# ---------------------------------------------------------------------------------------------------------------------
# The leaderboard


def find_front(points: Sequence[tuple[float, float, str]]) -> list[bool]:
    """Whether each (cost, loss, machine) is on the Pareto front: no other of the machine has as little of both."""
    return [not any(other != point and other[0] <= point[0] and other[1] <= point[1] and other[2] == point[2]
                    for other in points) for point in points]


def build_leaderboard(entries: list[dict], left_out: dict[str, str]) -> Card:
    """One table for each validation set and rule, by training FLOPs. left_out: {run: why}"""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for entry in sorted(entries, key=lambda entry: entry["training_flops"]):
        name, data_hash = entry["tokenized_dataset"]["name"], entry["tokenized_dataset"]["hash"]
        groups[name, data_hash, entry[f"eval/{name}/rule"]].append(entry)
    sections = []
    for (name, data_hash, rule), group in groups.items():
        notes = [f"Data {data_hash}; {rule}."]
        if len({entry[f"eval/{name}/bytes"] for entry in group}) > 1:
            notes.append("The runs differ in validation bytes: as many rows of other tokens hold more or less text.")
        rows = make_rows(group, [entry[f"eval/{name}/bpb"] for entry in group])
        sections.append(Section(f"Bits per byte on {name}", tables=[Table("", list(COLUMNS), rows)], notes=notes))
    sections.append(Section("How to read it", notes=list(NOTES)))
    if left_out:
        sections.append(Section("Left out", notes=[f"{name}: {why}." for name, why in left_out.items()]))
    return Card("by training FLOPs, ascending", {}, sections, "nanochat leaderboard")


def make_rows(group: list[dict], losses: list[float]) -> list[list]:
    """The rows of a table, in COLUMNS, of runs whose losses are comparable."""
    machines = [json.dumps([entry["resources"], entry["num_devices"]]) for entry in group]
    flops, seconds = ([entry[key] for entry in group] for key in ("training_flops", "training_time"))
    fronts = {"FLOPs": find_front(list(zip(flops, losses, [""] * len(group), strict=True))),
              "seconds": find_front(list(zip(seconds, losses, machines, strict=True)))}
    rows = []
    for i, entry in enumerate(group):
        counts = [entry[key] for key in ("training_flops", "model_flops", "training_hardware_flops")]
        rows.append([", ".join(name for name, marks in fronts.items() if marks[i]), entry["run"], losses[i],
                     format_count(entry["model_size"]), format_count(entry["total_tokens"]),
                     *(value and f"{value:.4g}" for value in counts), entry["mfu_pct"], entry["num_devices"],
                     entry["training_time"], entry["run_completion_timestamp"], entry["description"]])
    return rows
