"""The slopes of loss against parameters and against training tokens, in log-log, over a grid of runs.

    python -m scripts.sweep --name grid --grid depth=2,4,6,8 num-iterations=250,500,1000 -- --total-batch-size 16384
    python -m dev.show_loss_grid ~/.cache/nanochat/sweeps/grid
    python -m scripts.sweep --name kinds --grid preset=plain,nanochat-jan26 depth=2,4,6 num-iterations=250,500

RESULTS is what dev.scaling_laws reads: a sweep's folder, a folder of runs, or a CSV file. Both slopes come from one fit
to all runs, ln L = c + a ln N + b ln D: in a grid of equal FLOPs larger models see fewer tokens, and a fit to one of
them alone would mix both effects. A power law has no floor, and loss has one: the slopes hold within the grid, not
beyond it. Models of several presets, or with other knobs, have a fit each, and one figure. Writes loss_grid.png, by
default to $NANOCHAT_BASE_DIR/figures.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dev.figures import (
    COLORS,
    FAINT,
    INK,
    MARKERS,
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
from dev.laws import INTERVAL_PCT, PowerLaw, draw_noise, fit_parametric, fit_power_law
from dev.results import CONVENTIONS, MAIN_CONVENTION, Results, group_near, load_results
from dev.timing import print_table
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, print0
from nanochat.report_render import format_count


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder of a sweep or of runs, or a CSV file")
    parser.add_argument("--counting", choices=CONVENTIONS, default=MAIN_CONVENTION, help="which parameters count")
    add_out(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    found = load_results(args.results)
    source, runs, notes = found.source, found.runs, found.notes
    if args.counting not in runs[0].params:
        raise UserError(f"{source} doesn't say its parameters {args.counting}; choose --counting "
                        + " or ".join(runs[0].params))
    kinds = {kind: np.array([(run.params[args.counting], run.tokens, run.loss) for run in runs if run.kind == kind]).T
             for kind in dict.fromkeys(run.kind for run in runs)}    # {kind of model: (3, runs)}
    fits = {}
    for kind, (params, tokens, losses) in kinds.items():
        laws = fit_slopes(params, tokens, losses)
        if laws:
            fits[kind] = laws
        else:
            named = f"{len(losses)} runs " + (f"of {kind}, " if len(kinds) > 1 else "")
            notes.append(f"{named}of {len(np.unique(params))} sizes and {len(np.unique(tokens))} horizons can't tell "
                         "two slopes; train at least 4, of two sizes and two horizons each")
    if not fits:
        raise UserError(notes[-1])
    print_table(["loss against", "slope", f"{INTERVAL_PCT}% interval", "twice as many give"],
                [[name + (f", {kind}" if len(kinds) > 1 else ""), f"{law.exponent:.4f}",
                  "{:.4f} to {:.4f}".format(*law.interval), f"{100 * (2**law.exponent - 1):+.2f}% loss"]
                 for kind, laws in fits.items() for name, law in laws.items()])
    slopes = {kind: {name: vars(law) for name, law in laws.items()} for kind, laws in fits.items()}
    results = {"num_runs": len(runs), "loss": found.loss_name, "counting": args.counting, "notes": notes}
    title = f"{len(runs)} runs of {source.name}, counting {args.counting}"
    if len(kinds) > 1:
        results["kinds"] = slopes
        figure = draw_kinds(kinds, fits, found.loss_name, title)
    else:
        results["slopes"] = slopes[runs[0].kind]
        if law := fit_parametric(params, tokens, losses):
            results["parametric"] = vars(law)
            misfit_pct = measure_misfit_pct(laws, params, tokens, losses)
            notes.append(f"With a floor, L = {law.E:.3g} + A / N^{law.alpha:.3f} + B / D^{law.beta:.3f} misses the "
                         f"runs by {law.error_pct:.2f}%; the two slopes, which have none, by {misfit_pct:.2f}%.")
        figure = draw_grid(found, params, laws, title)
    for note in notes:
        print0(f"note: {note}")
    return results | {"figure": str(save_figure(figure, "loss_grid", args.out))}


def fit_slopes(params: NDArray, tokens: NDArray, losses: NDArray, num_resamples: int = 2000,
               seed: int = 0) -> dict[str, PowerLaw] | None:
    """Loss against parameters at the mean tokens, and against tokens at the mean parameters (geometric means).

    (runs,) each. None where the runs don't tell the two apart. The intervals are a parametric bootstrap's.
    """
    logs = np.log([params, tokens])                                                     # (2, runs)
    powers = np.vstack([np.ones(len(losses)), logs - logs.mean(1, keepdims=True)]).T    # (runs, 3)
    freedom = len(losses) - 3
    if freedom < 1 or np.linalg.matrix_rank(powers, tol=1e-6 * np.linalg.norm(powers)) < 3:
        return None
    solve = np.linalg.pinv(powers).T                                                    # (runs, 3)
    log_losses = np.log(losses)
    fitted = powers @ (log_losses @ solve)
    draws = fitted + draw_noise([log_losses - fitted], freedom, num_resamples, seed)[0]    # (R, runs)
    laws = {}
    for name, x, other in (("parameters", params, 2), ("training tokens", tokens, 1)):
        # the effect of the other quantity is subtracted, by each draw's own slope
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
    """The fit at any point; `params` and `tokens` are those of the runs, at whose means the laws hold."""
    mean_tokens = math.exp(np.log(tokens).mean())
    return laws["parameters"].predict(x_params) * (x_tokens / mean_tokens) ** laws["training tokens"].exponent


@styled
def draw_grid(found: Results, params: NDArray, laws: dict[str, PowerLaw], title: str) -> Figure:
    """Above, the measured losses, joined where the other quantity is alike; below, the losses moved along the fit to
    one value of the other quantity, around the line whose slope is in the title."""
    tokens, losses, budgets = np.array([(run.tokens, run.loss, run.budget) for run in found.runs]).T
    horizons = {f"{format_count(tokens[near].min())} tokens": near for near in group_near(tokens)}
    if len(group_near(budgets)) < len(horizons):    # a grid of budgets: no two sizes have seen as many tokens
        horizons = {f"{format_flops(budgets[near].min())} FLOPs": near for near in group_near(budgets)}
    sizes = {f"{format_count(params[near].min())} parameters": near for near in group_near(params)}
    expected = predict_loss(laws, params, tokens, params, tokens)
    figure, axes = make_panels(2, 2, width=6.0, height=3.6, sharex="col", sharey="row")
    for column, (name, law), x, groups, other, what in zip(
            axes.T, laws.items(), (params, tokens), (horizons, sizes), (tokens, params), ("tokens", "parameters"),
            strict=True):
        for i, (label, near) in enumerate(groups.items()):
            near = near[np.argsort(x[near])]
            style = {"color": pick_shade(i, len(groups)), "marker": "o", "markersize": 5, "linewidth": 1.2}
            column[0].plot(x[near], losses[near], label=label, **style)
            column[1].plot(x[near], law.predict(x[near]) * losses[near] / expected[near], **style | {"linewidth": 0})
        line = span_log(x)
        column[1].plot(line, law.predict(line), color=INK, linewidth=1.4)
        column[0].set(title=f"loss against {name}")
        column[0].legend(loc="upper left", bbox_to_anchor=(1, 1))
        mean = format_count(math.exp(np.log(other).mean()))
        column[1].set(xscale="log", xlabel=name, title=f"at {mean} {what}: slope {law.exponent:.3f} "
                      f"({law.interval[0]:.3f} to {law.interval[1]:.3f})")
        label_counts(column[1].xaxis)
    for ax in axes[:, 0]:
        ax.set(yscale="log", ylabel=found.loss_name)
        label_values(ax.yaxis)
    figure.suptitle(title, fontsize=10, color=FAINT, x=0.01, ha="left")
    return figure


@styled
def draw_kinds(kinds: dict[str, NDArray], fits: dict[str, dict[str, PowerLaw]], loss_name: str, title: str) -> Figure:
    """The losses of each kind of model, moved along its fit to one value of the other quantity, the mean of all runs.

    kinds: {kind: (3, runs): parameters, tokens, losses}; fits: those of fit_slopes, of the kinds that have one
    """
    means = np.exp(np.log(np.concatenate([values[:2] for values in kinds.values()], axis=1)).mean(1))    # (2,)
    figure, axes = make_panels(1, 2, width=6.0, height=3.9, sharey="row")
    for k, name in enumerate(("parameters", "training tokens")):
        ax, other = axes[0, k], ("training tokens", "parameters")[k]
        for i, (kind, laws) in enumerate(fits.items()):
            x, others, losses = kinds[kind][k], kinds[kind][1 - k], kinds[kind][2]
            exponent, color = laws[other].exponent, COLORS[i % len(COLORS)]
            ax.plot(x, losses * (means[1 - k] / others) ** exponent, MARKERS[i % len(MARKERS)], color=color)
            line, shift = span_log(x), (means[1 - k] / math.exp(np.log(others).mean())) ** exponent
            ax.plot(line, laws[name].predict(line) * shift, color=color, linewidth=1.4,
                    label=f"{kind}: {laws[name].exponent:.3f}")
        ax.set(xscale="log", yscale="log", xlabel=name,
               title=f"slopes at {format_count(means[1 - k])} {('tokens', 'parameters')[k]}")
        label_counts(ax.xaxis)
        ax.legend()
    axes[0, 0].set(ylabel=loss_name)
    label_values(axes[0, 0].yaxis)
    figure.suptitle(title, fontsize=10, color=FAINT, x=0.01, ha="left")
    return figure


if __name__ == "__main__":
    run_script(main)
