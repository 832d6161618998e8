"""Scaling laws of a sweep over model sizes and FLOP budgets: the best model and its tokens for each budget.

    python -m dev.scaling_laws RESULTS          # a folder with a run.json and metrics.jsonl in each run's folder
    python -m dev.scaling_laws results.csv      # or a table, one row a run

The runs must have a validation loss at their last step. A table needs columns for the FLOP budget (flops_budget), the
tokens (tokens_trained), the loss (val_bpb) and parameters: params_total, and params_transformer and params_lm_head.
Writes laws.html (a page with everything), laws.json and PNG figures, by default to RESULTS/laws.
"""

import argparse
import base64
import math
from pathlib import Path

import numpy as np

from dev.figures import draw_isoflops, draw_laws, draw_parametric, format_flops, make_folder, save_png
from dev.laws import INTERVAL_PCT, MIN_PARAMETRIC_RUNS, Law, ParametricLaw, fit_law, fit_parametric
from dev.results import CONVENTIONS, MAIN_CONVENTION, group_budgets, load_results
from dev.timing import print_table
from nanochat.command_line import Parser, run_script
from nanochat.common import now, print0, write_atomic, write_json
from nanochat.report_render import Section, Table, format_count, format_rows, html_page, html_section, html_values


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder of runs, or a CSV file")
    parser.add_argument("--out", type=Path, help="folder to write to (default: laws, beside the results)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    results = load_results(args.results)
    source, runs, loss_name, notes = results.source, results.runs, results.loss_name, results.notes
    budgets = group_budgets(runs)
    laws = {name: fit_law(budgets, name) for name in CONVENTIONS if name in runs[0].params}
    main_name = MAIN_CONVENTION if MAIN_CONVENTION in laws else next(iter(laws))
    params, tokens, losses = np.array([(run.params[main_name], run.tokens, run.loss) for run in runs]).T
    parametric = fit_parametric(params, tokens, losses)
    flops_per_param_token = float(np.exp(np.mean([math.log(r.budget / r.params[main_name] / r.tokens) for r in runs])))
    if len(kinds := dict.fromkeys(run.kind for run in runs)) > 1:
        notes.append(f"The runs are of {len(kinds)} kinds of model ({', '.join(kinds)}), and one law doesn't tell them "
                     "apart.")
    notes += describe_gaps(laws[main_name], parametric, len(runs))

    out = make_folder(args.out or (source if source.is_dir() else source.parent) / "laws")
    figures = {"isoflops": draw_isoflops({name: law.curves for name, law in laws.items()}, loss_name)}
    if any(len(law.budgets) for law in laws.values()):
        figures["laws"] = draw_laws({name: law for name, law in laws.items() if len(law.budgets)}, loss_name)
    if parametric:
        figures["parametric"] = draw_parametric(parametric, params, tokens, losses, flops_per_param_token, loss_name)
    images = {name: save_png(figure, out / f"{name}.png") for name, figure in figures.items()}
    sections = describe_laws(laws, loss_name) + describe_parametric(parametric, main_name, laws[main_name],
                                                                   flops_per_param_token)
    sections.append(Section("Notes", notes=notes or ["Nothing was left out."]))
    for section in sections:
        print_section(section)
    subtitle = f"{len(runs)} runs, {len(budgets)} FLOP budgets, from {source.name}; {now()}"
    figures_html = "".join(f'<section><img alt="{name}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                           "</section>\n" for name, png in images.items())
    body = html_values(make_tiles(laws[main_name], main_name), "tiles") + figures_html
    write_atomic(out / "laws.html", html_page("nanochat scaling laws", subtitle,
                                              body + "".join(map(html_section, sections))))
    summary = {"source": str(source), "num_runs": len(runs), "loss": loss_name, "notes": notes,
               "laws": {name: summarize(law) for name, law in laws.items()},
               "parametric": parametric and {"counting": main_name, **vars(parametric)}}
    write_json(out / "laws.json", summary)
    print0(f"laws: {out / 'laws.html'}")
    return summary


def describe_straightest(laws: dict[str, Law]) -> list[str]:
    """The counts of parameters by the r2 of their power law, where there are three optima each."""
    r2 = {name: law.fits["params"].r2 for name, law in laws.items() if len(law.budgets) > 2}
    ranking = ", ".join(f"{name} (r2 {r2[name]:.4f})" for name in sorted(r2, key=r2.get, reverse=True))
    return [f"The power laws of optimal parameters, best r2 first: {ranking}."] if len(r2) > 1 else []


def describe_gaps(law: Law, parametric: ParametricLaw | None, num_runs: int) -> list[str]:
    """Which fits are missing or weak, and why."""
    notes = []
    for curve in law.curves:
        if curve.note:
            notes.append(f"Budget {format_flops(curve.budget)} has no optimum: {curve.note}.")
        elif curve.params[curve.losses.argmin()] in (curve.params[0], curve.params[-1]):
            notes.append(f"Budget {format_flops(curve.budget)}: its best run is at the edge of the grid, so its "
                         "optimum depends on the shape of the parabola.")
    if len(law.budgets) < 3:
        notes.append(f"{len(law.budgets)} of {len(law.curves)} budgets have an optimum: a power law needs two, "
                     "and three to show whether it is one.")
    elif all(fit.interval is None for fit in law.fits.values()):
        notes.append("No intervals: with three sizes a budget nothing tells how large the noise is.")
    if not parametric:
        notes.append(f"L(N, D) was not fitted: {num_runs} runs are too few (it takes {MIN_PARAMETRIC_RUNS}), or their "
                     "sizes and tokens vary too little.")
    return notes


def describe_laws(laws: dict[str, Law], loss_name: str) -> list[Section]:
    """The power laws of all counts of parameters, then the optima of each count."""
    sections, rows = [], []
    for name, law in laws.items():
        for key, symbol in (("params", "N"), ("tokens", "D"), ("ratio", "D / N"), ("loss", "L")):
            if fit := law.fits[key]:
                rows.append([name, symbol, f"{fit.exponent:.3f}", format_interval(fit.interval),
                             None if math.isnan(fit.r2) else f"{fit.r2:.4f}"])
    if rows:
        columns = ["parameters counted", "quantity", "exponent of C", f"{INTERVAL_PCT}% interval", "r2"]
        sections.append(Section("Power laws of the compute-optimal models", tables=[Table("", columns, rows)],
                                notes=describe_straightest(laws)))
    for name, law in laws.items():
        rows, k = [], 0
        for curve in law.curves:
            interval = None
            if curve.has_optimum:
                interval, k = law.ratios[k], k + 1
            values = [curve.best_params, curve.best_tokens, curve.best_tokens / curve.best_params, curve.best_loss]
            texts = [format_count(values[0]), format_count(values[1]), f"{values[2]:.3g}", f"{values[3]:.4f}"]
            rows.append([format_flops(curve.budget), len(curve.params), *(texts if curve.has_optimum else [None] * 4),
                         format_interval(interval), curve.note or None])
        columns = ["FLOPs", "runs", "parameters", "tokens", "tokens per parameter", loss_name,
                   f"{INTERVAL_PCT}% of tokens per parameter", "no optimum because"]
        if not any(curve.note for curve in law.curves):
            columns, rows = columns[:-1], [row[:-1] for row in rows]
        sections.append(Section(f"Optimal models, counting {name}", tables=[Table("", columns, rows)]))
    return sections


def describe_parametric(law: ParametricLaw | None, name: str, iso: Law, flops_per_param_token: float) -> list[Section]:
    """The constants of L(N, D), and its optima."""
    if not law:
        return []
    a, b = law.get_exponents()
    values = {"E": law.E, "A": law.A, "B": law.B, "alpha": law.alpha, "beta": law.beta, "N ~ C^": a, "D ~ C^": b,
              "residual_pct": law.error_pct}
    rows = []
    for curve in iso.curves:
        params, tokens = law.get_optimum(curve.budget, flops_per_param_token)
        rows.append([format_flops(curve.budget), format_count(params), format_count(tokens), f"{tokens / params:.3g}",
                     f"{law.predict(params, tokens):.4f}"])
    columns = ["FLOPs", "parameters", "tokens", "tokens per parameter", "loss"]
    note = f"Optima take C = {flops_per_param_token:.3g} N D, the mean of these runs."
    return [Section(f"L(N, D) = E + A / N^alpha + B / D^beta, counting {name}", values,
                    [Table("", columns, rows)], notes=[note])]


def format_interval(interval: tuple[float, float] | None) -> str | None:
    return interval and f"{interval[0]:.3g} to {interval[1]:.3g}"


def print_section(section: Section) -> None:
    """A section as text in columns."""
    print0(f"\n{section.title}")
    if section.values:
        print_table([], format_rows([], section.values.items()))
    for table in section.tables:
        print_table(table.columns, format_rows(table.columns, table.rows))
    for note in section.notes:
        print0(note)


def make_tiles(law: Law, name: str) -> dict[str, str]:
    """The figures at the head of the page."""
    tiles = {}
    for key, title in (("params", "parameters"), ("tokens", "tokens")):
        if fit := law.fits[key]:
            interval = f" ({format_interval(fit.interval)})" if fit.interval else ""
            tiles[f"optimal {title}, counting {name}"] = f"~ C^{fit.exponent:.3f}{interval}"
    if len(law.budgets):
        tiles[f"optimal tokens per parameter at {format_flops(law.budgets[-1])} FLOPs"] = \
            f"{law.optima.tokens[-1] / law.optima.params[-1]:.3g}"
    return tiles


def summarize(law: Law) -> dict:
    """A law as JSON: the optimum of each budget, null where there is none, and the power laws."""
    optima = [{"flops": c.budget, "params": c.best_params, "tokens": c.best_tokens, "loss": c.best_loss}
              if c.has_optimum else {"flops": c.budget, "params": None, "note": c.note} for c in law.curves]
    fits = {key: fit and {**vars(fit), "r2": None if math.isnan(fit.r2) else fit.r2} for key, fit in law.fits.items()}
    return {"optima": optima, "fits": fits}


if __name__ == "__main__":
    run_script(main)
