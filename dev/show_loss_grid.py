"""Loss against parameters and against training tokens over a grid of runs, and the slope of each in log-log.

    python -m scripts.sweep --name grid --grid depth=2,4,6,8 num-iterations=250,500,1000 -- --total-batch-size 16384
    python -m dev.show_loss_grid ~/.cache/nanochat/sweeps/grid

RESULTS is what scripts.scaling_laws reads: a sweep's folder, a folder of runs, or a CSV file. Both slopes come from one
fit through all runs, ln L = c + a ln N + b ln D, so that where larger models see fewer tokens, as in a grid of equal
FLOPs, the one isn't taken for the other. A power law has no floor, and loss has one: the slopes hold within the grid,
not beyond it. Writes loss_grid.png, by default to $NANOCHAT_BASE_DIR/figures.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dev.timing import print_table
from nanochat.card import format_count
from nanochat.common import UserError, print0, run_script
from nanochat.figures import (
    FAINT,
    INK,
    add_out,
    format_flops,
    label_counts,
    label_values,
    make_panels,
    pick_shade,
    save_figure,
    span_log,
    styled,
)
from nanochat.results import BUDGET_TOLERANCE, CONVENTIONS, Run, find_source, make_runs, read_csv, read_run_folders
from nanochat.scaling_laws import INTERVAL_PCT, PowerLaw, fit_parametric, fit_power_law


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of a sweep or of runs, or a CSV file")
    parser.add_argument("--counting", choices=CONVENTIONS, default="transformer + head", help="which parameters count")
    add_out(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    notes: list[str] = []
    source = find_source(args.results)
    rows, loss_name = (read_run_folders(source, notes), "val_bpb") if source.is_dir() else read_csv(source, notes)
    runs = make_runs(rows, source, notes)
    if args.counting not in runs[0].params:
        raise UserError(f"{source} doesn't say its parameters {args.counting}; choose --counting "
                        + " or ".join(runs[0].params))
    params, tokens, losses = np.array([(run.params[args.counting], run.tokens, run.loss) for run in runs]).T
    laws = fit_slopes(params, tokens, losses)
    if laws is None:
        raise UserError(f"{len(runs)} runs of {len(np.unique(params))} sizes and {len(np.unique(tokens))} horizons "
                        "can't tell two slopes; train at least 4, of two sizes and two horizons each")
    results = {"num_runs": len(runs), "loss": loss_name, "counting": args.counting, "notes": notes,
               "slopes": {name: vars(law) for name, law in laws.items()}}
    print_table(["loss against", "slope", f"{INTERVAL_PCT}% interval", "twice as many give"],
                [[name, f"{law.exponent:.4f}", "{:.4f} to {:.4f}".format(*law.interval),
                  f"{100 * (2**law.exponent - 1):+.2f}% loss"] for name, law in laws.items()])
    if law := fit_parametric(params, tokens, losses):
        results["parametric"] = vars(law)
        misfit_pct = measure_misfit_pct(laws, params, tokens, losses)
        notes.append(f"With a floor, L = {law.E:.3g} + A / N^{law.alpha:.3f} + B / D^{law.beta:.3f} misses the runs by "
                     f"{law.error_pct:.2f}%; the two slopes, which have none, by {misfit_pct:.2f}%.")
    for note in notes:
        print0(f"note: {note}")
    title = f"{len(runs)} runs of {source.name}, counting {args.counting}"
    figure = draw_grid(runs, params, laws, title, loss_name)
    return results | {"figure": str(save_figure(figure, "loss_grid", args.out))}


def fit_slopes(params: NDArray, tokens: NDArray, losses: NDArray, num_resamples: int = 2000,
               seed: int = 0) -> dict[str, PowerLaw] | None:
    """Loss against parameters at the mean tokens, and against tokens at the mean parameters (geometric means).

    (runs,) each. None where the runs don't tell the two apart. The intervals are a parametric bootstrap's: losses drawn
    again around the fit, with a deviation that is drawn too, as few runs leave it uncertain.
    """
    logs = np.log([params, tokens])                                                     # (2, runs)
    powers = np.vstack([np.ones(len(losses)), logs - logs.mean(1, keepdims=True)]).T    # (runs, 3)
    freedom = len(losses) - 3
    if freedom < 1 or np.linalg.matrix_rank(powers, tol=1e-6 * np.linalg.norm(powers)) < 3:
        return None
    solve = np.linalg.pinv(powers).T                                                    # (runs, 3)
    log_losses = np.log(losses)
    fitted = powers @ (log_losses @ solve)
    rng = np.random.default_rng(seed)
    deviations = np.sqrt(((log_losses - fitted) ** 2).sum() / rng.chisquare(freedom, (num_resamples, 1)))
    draws = fitted + deviations * rng.standard_normal((num_resamples, len(losses)))     # (R, runs)
    laws = {}
    for name, x, other in (("parameters", params, 2), ("training tokens", tokens, 1)):
        # what the other quantity does is taken out, by each draw's own slope
        actual, drawn = (np.exp(values - (values @ solve)[..., other, None] * powers[:, other])
                         for values in (log_losses, draws))
        laws[name] = fit_power_law(x, actual, drawn)
    return laws


def measure_misfit_pct(laws: dict[str, PowerLaw], params: NDArray, tokens: NDArray, losses: NDArray) -> float:
    """Root mean square of the residuals of both slopes together, in percent of the loss."""
    residuals = np.log(losses / predict_loss(laws, params, tokens, params, tokens))
    return 100 * math.sqrt((residuals**2).mean())


def predict_loss(laws: dict[str, PowerLaw], x_params: NDArray | float, x_tokens: NDArray | float, params: NDArray,
                 tokens: NDArray) -> NDArray:
    """The fit at any point; `params` and `tokens` are the runs', whose means the laws hold at."""
    mean_tokens = math.exp(np.log(tokens).mean())
    return laws["parameters"].predict(x_params) * (x_tokens / mean_tokens) ** laws["training tokens"].exponent


def group_near(values: NDArray) -> dict[float, NDArray]:
    """{the smallest of a group: which values are in it}, ascending; what is within BUDGET_TOLERANCE of it is in."""
    groups: dict[float, NDArray] = {}
    for value in np.unique(values):
        if not groups or value > max(groups) * (1 + BUDGET_TOLERANCE):
            groups[float(value)] = (values >= value) & (values <= value * (1 + BUDGET_TOLERANCE))
    return groups


@styled
def draw_grid(runs: list[Run], params: NDArray, laws: dict[str, PowerLaw], title: str, loss_name: str) -> Figure:
    """Above, losses as they are, joined where the other quantity is alike; below, moved along the fit to one value of
    it, around the line whose slope is in the title."""
    tokens, losses, budgets = np.array([(run.tokens, run.loss, run.budget) for run in runs]).T
    horizons, joined_by = group_near(tokens), "tokens"
    if len(group_near(budgets)) < len(horizons):    # a grid of budgets: no two sizes have seen as many tokens
        horizons, joined_by = group_near(budgets), "FLOPs"
    figure, axes = make_panels(2, 2, width=6.0, height=3.6, sharex="col", sharey="row")
    for column, (name, law) in zip(axes.T, laws.items(), strict=True):
        if name == "parameters":
            x, other, groups = params, tokens, {f"{format_quantity(v, joined_by)} {joined_by}": near
                                                for v, near in horizons.items()}
        else:
            x, other, groups = tokens, params, {f"{format_count(v)} parameters": near
                                                for v, near in group_near(params).items()}
        expected = predict_loss(laws, params, tokens, params, tokens)
        for i, (label, near) in enumerate(groups.items()):
            near = np.flatnonzero(near)[np.argsort(x[near])]
            style = {"color": pick_shade(i, len(groups)), "marker": "o", "markersize": 5, "linewidth": 1.2}
            column[0].plot(x[near], losses[near], label=label, **style)
            column[1].plot(x[near], law.predict(x[near]) * losses[near] / expected[near], **style | {"linewidth": 0})
        line = span_log(x)
        column[1].plot(line, law.predict(line), color=INK, linewidth=1.4)
        column[0].set(title=f"loss against {name}")
        column[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
        mean = format_count(math.exp(np.log(other).mean()))
        what = "tokens" if name == "parameters" else "parameters"
        column[1].set(xscale="log", xlabel=name, title=f"at {mean} {what}: slope {law.exponent:.3f} "
                      f"({law.interval[0]:.3f} to {law.interval[1]:.3f})")
        label_counts(column[1].xaxis)
    for ax in axes[:, 0]:
        ax.set(yscale="log", ylabel=loss_name)
        label_values(ax.yaxis)
    figure.suptitle(title, fontsize=10, color=FAINT, x=0.01, ha="left")
    return figure


def format_quantity(value: float, unit: str) -> str:
    return format_flops(value) if unit == "FLOPs" else format_count(value)


if __name__ == "__main__":
    run_script(main)
