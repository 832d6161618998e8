"""The table of an ablation (dev/ablate.py): what each feature of the model is worth, from its runs' files alone.

delta bpb: bits per byte without the feature less those with it, of the same seed; above 0 the feature helps. (Of a
    variant those without it are the full model's.) Its
    standard error is that of the mean over the seeds. * is more than two standard errors, the feature's own and those
    pooled over all features. (By its own alone, three seeds of no effect would have a * in 18% of cases.)
compute multiplier: the FLOPs that training without the feature takes over those with it, for the same bpb. That is
    exp(delta / slope), where the slope is what the full model loses per e-fold of FLOPs, measured with further runs at
    half of them. dev/compare.py's, read off a run's curve while its learning rate still decays, would be nearer to 1,
    and say nothing of features that harm. The range is that of two standard errors of delta.
seconds multiplier: the same in seconds: the compute multiplier times the FLOP/s with the feature over those without,
    of the median seed each, since other work slows some runs.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from dev.results import START_TOLERANCE, compare_measured, find_measured, find_odd_starts
from dev.timing import print_table
from nanochat.checkpoint_manager import get_run_dir
from nanochat.common import print0, write_atomic, write_json
from nanochat.report import read_json, read_run

SLOPE_FRAC = 0.5           # of the FLOPs, in the runs that the slope is measured with
MOST = 1000.0              # of a multiplier
SAVED_KEYS = ("name", "mode", "seeds", "target_flops", "models", "comparisons", "features")    # of ablation.json


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""
    bpb:        float
    seconds:    float    # of all its steps at the median one's speed: the first may compile, others have had to wait
    start_loss: float    # of the first batch, in nats per token
    measured:   tuple    # on what text the loss was


def read_results(name: str, models: dict[str, dict], seeds: int) -> dict[str, dict[int, Result]]:
    """{model: {seed: its result}} of the finished runs."""
    results: dict[str, dict[int, Result]] = {model: {} for model in models}
    for model in models:
        for seed in range(1, seeds + 1):
            run = read_run(get_run_dir("base", f"{name}-{model}-seed{seed}"))
            values, losses = run.info.get("results") or {}, dict(run.get_series("train", "loss"))
            if run.info.get("status") == "finished" and "val_bpb" in values and 1 in losses:
                step_ms = statistics.median(ms for _, ms in run.get_series("train", "step_ms"))
                results[model][seed] = Result(values["val_bpb"], models[model]["steps"] * step_ms / 1e3, losses[1],
                                              find_measured(run.info))
    return results


def write_table(folder: Path) -> dict:
    """Compare what is finished; print the table and write it."""
    ablation = read_json(folder / "ablation.json", SAVED_KEYS)
    results = read_results(ablation["name"], ablation["models"], ablation["seeds"])
    ablation |= summarize(ablation, results)
    write_json(folder / "ablation.json", ablation)
    columns, rows = make_table(ablation)
    print_table(columns, rows)
    for note in ablation["notes"]:
        print0(f"note: {note}")
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    lines += ["", *(f"- {note}" for note in ablation["notes"])]
    write_atomic(folder / "ablation.md", "\n".join(lines).replace(" *", " \\*") + "\n")
    print0(f"ablation: {folder / 'ablation.md'}")
    return ablation


def summarize(ablation: dict, results: dict[str, dict[int, Result]]) -> dict:
    """The measured part of ablation.json: the slope, a row for each model and each feature, and the notes."""
    models = ablation["models"]
    slope = measure_slope(models, results)
    features = [measure_feature(comparison, models, results, slope) for comparison in ablation["comparisons"]]
    spreads = [row["std_error"] for row in features if row["std_error"] is not None]
    # runs of one number of seeds have one noise, if the features don't change it
    pooled = math.sqrt(statistics.mean(error**2 for error in spreads)) if spreads else None
    for row in features:
        row["is_clear"] = row["std_error"] is not None and abs(row["delta_bpb"]) > 2 * max(row["std_error"], pooled)
    means = {model: {key: average(getattr(result, key) for result in by_seed.values()) for key, average in
                     (("bpb", statistics.mean), ("seconds", statistics.median), ("start_loss", statistics.mean))}
             for model, by_seed in results.items() if by_seed}
    return {"slope": slope, "pooled_std_error": pooled, "rows": features, "means": means,
            "notes": describe_caveats(ablation, results, slope, features, pooled)}


def measure_slope(models: dict[str, dict], results: dict[str, dict[int, Result]]) -> float | None:
    """Bits per byte that the full model loses per e-fold of FLOPs; None where it isn't above 0, or not known yet."""
    pairs = [(results["half"][seed].bpb, full.bpb) for seed, full in results["full"].items() if seed in results["half"]]
    if not pairs:
        return None
    slope = statistics.mean(half - full for half, full in pairs) / math.log(models["full"]["flops"] /
                                                                            models["half"]["flops"])
    return slope if slope > 0 else None


def measure_feature(comparison: list[str], models: dict[str, dict], results: dict[str, dict[int, Result]],
                    slope: float | None) -> dict:
    """What a feature is worth; None: not known."""
    name, with_it, without = comparison
    seeds = sorted(results[with_it].keys() & results[without].keys())
    deltas = [results[without][seed].bpb - results[with_it][seed].bpb for seed in seeds]
    row = {"feature": name, "with": with_it, "without": without, "seeds": seeds,
           "deltas": deltas, "delta_bpb": None, "std_error": None, "compute_multiplier": None, "range": None,
           "seconds_multiplier": None}
    if not deltas:
        return row
    row["delta_bpb"] = delta = statistics.mean(deltas)
    if len(deltas) > 1:
        row["std_error"] = statistics.stdev(deltas) / math.sqrt(len(deltas))
    if slope:
        row["compute_multiplier"] = multiply(delta, slope)
        if row["std_error"] is not None:
            row["range"] = [multiply(delta + sign * 2 * row["std_error"], slope) for sign in (-1, 1)]
        speeds = [models[model]["flops"] / statistics.median(results[model][seed].seconds for seed in seeds)
                  for model in (with_it, without)]
        row["seconds_multiplier"] = row["compute_multiplier"] * speeds[0] / speeds[1]
    return row


def multiply(delta: float, slope: float) -> float:
    """The factor on FLOPs that is worth so many bits per byte, MOST where the slope is hardly more than noise."""
    return math.exp(max(-math.log(MOST), min(delta / slope, math.log(MOST))))


def describe_caveats(ablation: dict, results: dict[str, dict[int, Result]], slope: float | None, features: list[dict],
                     pooled: float | None) -> list[str]:
    """How the figures were got, and why they may mislead."""
    models, seeds = ablation["models"], ablation["seeds"]
    starts, measured = {}, {}
    for model, by_seed in results.items():
        for seed, result in by_seed.items():
            name = f"{model}, seed {seed}"
            starts[name], measured[name] = (result.start_loss, models[model]["vocab_size"]), result.measured
    notes = [f"{name} starts at a loss of {starts[name][0]:.3f}, not at ln V = {math.log(starts[name][1]):.3f}."
             for name in find_odd_starts(starts)]
    if starts and not notes:
        notes.append(f"All models start at a loss of ln V, within {START_TOLERANCE} nats.")
    notes += compare_measured(measured)
    if missing := [model for model, by_seed in results.items() if len(by_seed) < seeds]:
        notes.append(f"Runs that aren't finished, or have lost their log, are missing: of {', '.join(missing)}.")
    if slope:
        notes.append(f"The full model loses {slope:.4f} bits per byte per e-fold of FLOPs.")
        far = [row["feature"] for row in features if abs(row["delta_bpb"] or 0) > slope * -math.log(SLOPE_FRAC)]
        if far:
            notes.append(f"The compute multiplier of {', '.join(far)} lies beyond the FLOPs that the slope was "
                         "measured between.")
    elif results["half"].keys() & results["full"].keys():
        notes.append("Twice the FLOPs made the full model no better, so there are no multipliers; train for longer.")
    if pooled is None:
        notes.append("With one seed, nothing tells whether a difference is more than chance.")
    else:
        notes.append(f"Standard error of a delta, pooled over the features: {pooled:.4f}.")
    for model, about in models.items():
        target = ablation["target_flops"] * (SLOPE_FRAC if model == "half" else 1)
        if abs(about["flops"] / target - 1) > 0.01:
            notes.append(f"{model} has {about['flops'] / target - 1:+.1%} of the FLOPs that it should have: its steps "
                         "are few and large.")
    return notes


def make_table(ablation: dict) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each model: the one that is the reference, then those that are compared."""
    columns = ["model", "bpb", "delta bpb", "compute multiplier", "seconds multiplier", "parameters", "FLOPs/token",
               "steps", "seconds", "the feature"]
    is_drop = ablation["mode"] == "drop"
    rows = [make_row(ablation, "full" if is_drop else "none", {})]
    rows += [make_row(ablation, row["without" if is_drop and row["with"] == "full" else "with"], row)
             for row in ablation["rows"]]
    return columns, [*rows, make_row(ablation, "half", {})]


def make_row(ablation: dict, model: str, row: dict) -> list[str]:
    about, means, cells = ablation["models"][model], ablation["means"].get(model), ["", "", ""]
    if row and row["delta_bpb"] is not None:
        cells[0] = f"{round(row['delta_bpb'], 4) + 0.0:+.4f}"    # no -0.0000
        if row["std_error"] is not None:
            cells[0] += f" ± {row['std_error']:.4f}" + (" *" if row["is_clear"] else "")
        if row["compute_multiplier"]:
            cells[1] = f"{row['compute_multiplier']:.3f}"
            cells[1] += f" ({row['range'][0]:.3f} to {row['range'][1]:.3f})" if row["range"] else ""
            cells[2] = f"{row['seconds_multiplier']:.3f}"
    return [model, f"{means['bpb']:.4f}" if means else "", *cells, f"{about['parameters']:,}",
            f"{about['flops_per_token']:.4g}", f"{about['steps']:,}", f"{means['seconds']:,.0f}" if means else "",
            f"{row['feature']}: {ablation['features'][row['feature']]}" if row else ""]
