"""The laboratory's figures: PNG files in one style, drawn without a display (matplotlib's objects, never pyplot)."""

import argparse
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from dev.laws import IsoFlop, Law, ParametricLaw
from nanochat.common import UserError, get_base_dir, print0, write_atomic
from nanochat.report_render import format_count

# Of series: Okabe and Ito's colors (jfly.uni-koeln.de/color), which the color-blind can tell apart, and markers
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5b6470", "#000000")
MARKERS = "osD^vPX*"
INK, FAINT, GRID = "#1d2129", "#687080", "#e4e2dc"    # as in nanochat/report_render.py
STYLE = {
    "font.size": 10, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.edgecolor": GRID, "axes.labelcolor": FAINT, "axes.titlecolor": INK, "text.color": INK,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": FAINT, "ytick.labelcolor": FAINT,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9,
    "savefig.dpi": 130,
}
styled = matplotlib.rc_context(STYLE)    # decorates each function that draws


def make_panels(rows: int, columns: int, width: float = 4.6, height: float = 3.7, **options) -> tuple[Figure, NDArray]:
    """An empty figure and its (rows, columns) axes; width and height of one panel in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def make_folder(out: Path) -> Path:
    """The folder of the output, made where it is missing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} can't be made ({error.strerror}); choose another folder with --out") from None
    return out


def add_out(parser: argparse.ArgumentParser) -> None:
    """The flag --out of the programs that draw one picture (see save_figure)."""
    parser.add_argument("--out", type=Path, help="folder for the picture (default: figures, in the base folder)")


def save_figure(figure: Figure, name: str, out: Path | None) -> Path:
    """Write <out>/<name>.png, by default to the base folder's figures, and print its path."""
    path = make_folder(out or get_base_dir() / "figures") / f"{name}.png"
    save_png(figure, path)
    print0(f"figure: {path}")
    return path


@styled
def save_png(figure: Figure, path: Path) -> bytes:
    """Write a figure atomically; returns the file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())
    return buffer.getvalue()


def format_flops(flops: float) -> str:
    """4e12, the form of --target-flops."""
    return f"{flops:.3g}".replace("e+", "e")


def label_counts(axis: object, format_tick: Callable[[float], str] = format_count) -> None:
    """Ticks such as 20 M on a logarithmic axis, the fewer the larger its span."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high / low < 100 else (1, 3) if high / low < 2000 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
    axis.set_minor_formatter(NullFormatter())


def label_values(axis: object) -> None:
    """Plain numbers on a logarithmic axis; evenly spaced where its span has too few powers."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(MaxNLocator(6) if high / low < 4 else LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def pick_shade(index: int, count: int) -> tuple:
    """A color of an ordered series, from light (the first) to dark."""
    return matplotlib.colormaps["viridis_r"](0.12 + 0.8 * index / max(1, count - 1))


def span_log(values: Sequence[float] | NDArray, margin: float = 1.15) -> NDArray:
    """Log-spaced points from end to end of `values`, for a smooth curve."""
    return np.geomspace(min(values) / margin, max(values) * margin, 200)


# ---------------------------------------------------------------------------------------------------------------------
# Scaling laws


@styled
def draw_isoflops(curves_by_name: dict[str, list[IsoFlop]], loss_name: str) -> Figure:
    """Loss against parameters: a curve for each FLOP budget, a panel for each count of parameters."""
    figure, axes = make_panels(1, len(curves_by_name), sharey=True)
    for ax, (name, curves) in zip(axes[0], curves_by_name.items(), strict=True):
        ax.set_xscale("log")
        for i, curve in enumerate(curves):
            color = pick_shade(i, len(curves))
            ax.plot(curve.params, curve.losses, "o", color=color, markersize=5, label=format_flops(curve.budget))
            if curve.coefficients is not None:
                x = span_log(curve.params, 1.1)
                ax.plot(x, np.polyval(curve.coefficients, np.log(x)), color=color, linewidth=1.3,
                        linestyle="-" if curve.has_optimum else ":")
            if curve.has_optimum:
                ax.plot(curve.best_params, curve.best_loss, "*", color=color, markersize=15, markeredgecolor=INK)
        label_counts(ax.xaxis)
        ax.set(title=f"counting {name}", xlabel="parameters")
    axes[0, 0].set_ylabel(loss_name)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    handles += [Line2D([], [], color=FAINT, marker="*", markersize=11, linewidth=0, markeredgecolor=INK),
                Line2D([], [], color=FAINT, linewidth=1.3, linestyle=":")]
    axes[0, -1].legend(handles, [*labels, "optimum", "none within\nthese sizes"], title="FLOPs", loc="upper left",
                       bbox_to_anchor=(1, 1))
    return figure


@styled
def draw_laws(laws: dict[str, Law], loss_name: str) -> Figure:
    """The optima against compute, a color for each count of parameters.

    A line through two optima is dashed: any two points are on a line.
    """
    figure, axes = make_panels(2, 2, width=5, height=4.4)
    quantities = (("params", "optimal parameters", "N"), ("tokens", "optimal tokens", "D"),
                  ("ratio", "optimal tokens per parameter", "D / N"), ("loss", f"lowest loss ({loss_name})", "L"))
    for ax, (key, title, symbol) in zip(axes.flat, quantities, strict=True):
        ax.set(xscale="log", yscale="log", title=title, xlabel="training FLOPs")
        for i, (name, law) in enumerate(laws.items()):
            label, num_optima = f"{name}: one optimum, no line", len(law.budgets)
            if fit := law.fits[key]:
                label = f"{name}: {symbol} ~ C^{fit.exponent:.3f}" + ", two optima" * (num_optima == 2)
                x = span_log(law.budgets, 1.6)
                ax.plot(x, fit.predict(x), color=COLORS[i], linewidth=1.3, linestyle="-" if num_optima > 2 else "--")
            ax.plot(law.budgets, getattr(law.optima, key), MARKERS[i], color=COLORS[i], markersize=6, label=label)
        label_counts(ax.xaxis, format_flops)
        if key in ("params", "tokens"):
            label_counts(ax.yaxis)
        else:
            label_values(ax.yaxis)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))    # inside, it would hide optima
    return figure


@styled
def draw_parametric(law: ParametricLaw, params: NDArray, tokens: NDArray, losses: NDArray, flops_per_param_token: float,
                    loss_name: str) -> Figure:
    """L(N, D) as a landscape with the runs and the path of optima; and the residual of each run."""
    figure, axes = make_panels(1, 2, width=5.6, height=4.4)
    left, right = axes[0]
    x, y = np.meshgrid(span_log(tokens, 1.5), span_log(params, 1.5))
    landscape = left.contourf(x, y, law.predict(y, x), levels=24, cmap="viridis")
    # a run without residual has the color of the landscape at its place
    left.scatter(tokens, params, c=losses, cmap="viridis", norm=landscape.norm, s=44, zorder=3, edgecolors="white",
                 linewidths=1.2)
    figure.colorbar(landscape, ax=left, label=loss_name).outline.set_visible(False)
    best_params, best_tokens = law.get_optimum(span_log(params * tokens, 4) * flops_per_param_token,
                                               flops_per_param_token)
    left.plot(best_tokens, best_params, color=COLORS[1], linewidth=1.8)
    left.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="parameters", xlim=(x.min(), x.max()),
             ylim=(y.min(), y.max()), title="L(N, D), and its optimal models in orange")
    label_counts(left.xaxis)
    label_counts(left.yaxis)
    right.axhline(0, color=INK, linewidth=0.8)
    right.scatter(tokens / params, 100 * np.log(losses / law.predict(params, tokens)), c=losses, cmap="viridis", s=44,
                  norm=landscape.norm, edgecolors=INK, linewidths=0.5, zorder=3)
    right.set(xscale="log", xlabel="tokens per parameter", ylabel="loss above the law, %", title="residuals")
    label_counts(right.xaxis)
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Comparison of runs


@styled
def draw_comparison(groups: dict[str, list[dict[str, NDArray]]], label: str, target: float) -> Figure:
    """One metric against steps, tokens, FLOPs and seconds: a color for each group, a line for each seed.

    groups: {name: [{"steps", "tokens", "flops", "seconds", "values": (points,)} of each run]}
    target: the first group's final metric, drawn dashed
    """
    figure, axes = make_panels(2, 2, width=5.2, height=3.6, sharey=True)
    finals = [run["values"][-1] for runs in groups.values() for run in runs]
    # without the first tenth of training, whose high losses would flatten the rest
    tops = [run["values"][np.searchsorted(run["steps"], 0.1 * run["steps"][-1])] for runs in groups.values()
            for run in runs]
    low, high = min(finals), max(tops)
    for ax, (key, name) in zip(axes.flat, (("steps", "optimizer steps"), ("tokens", "training tokens"),
                                           ("flops", "training FLOPs"), ("seconds", "training seconds")), strict=True):
        for i, runs in enumerate(groups.values()):
            for run in runs:
                ax.plot(run[key], run["values"], color=COLORS[i % len(COLORS)], linewidth=1.4,
                        alpha=1 if len(runs) == 1 else 0.6, marker="o" if len(run["values"]) < 30 else None,
                        markersize=3.5)
        ax.axhline(target, color=INK, linestyle="--", linewidth=0.9)
        ax.set(xlabel=name, ylim=(low - 0.05 * (high - low), high + 0.05 * (high - low)), xlim=(0, None))
        format_tick = format_flops if key == "flops" else format_count
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _, format_tick=format_tick: format_tick(value)))
    for ax in axes[:, 0]:
        ax.set_ylabel(label)
    handles = [Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=2, label=name)
               for i, name in enumerate(groups)]
    handles.append(Line2D([], [], color=INK, linestyle="--", linewidth=0.9, label=f"{next(iter(groups))}'s final"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))
    return figure


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


HOLLOW = ", compiled"    # ends the name of a variant


@styled
def draw_roofline(results: dict, scale: str) -> Figure:
    """FLOP/s against FLOPs per byte under the roofs, of one scale's shapes: a panel for each family of operations, a
    color for each operation and a marker for each variant. results: what dev/bench_kernels.py writes"""
    points = [point for point in results["points"] if point["ms"] and point["scale"] == scale]
    families = list(dict.fromkeys(point["family"] for point in points))
    figure, axes = make_panels(-(-len(families) // 2), min(2, len(families)), width=6.6, height=4.3)
    for ax, family in zip(axes.flat, families, strict=False):
        draw_family(ax, [point for point in points if point["family"] == family], results["roofs"])
        ax.set_title(family)
    for ax in axes.flat[len(families):]:
        ax.set_axis_off()
    hardware = results["environment"]["hardware"]
    figure.suptitle(f"{hardware.get('gpu') or hardware['cpu']}, {results['dtype']}, shapes of {scale}", fontsize=10,
                    color=FAINT, x=0.01, ha="left")
    return figure


def draw_family(ax: object, points: list[dict], roofs: dict[str, dict]) -> None:
    """The points of one family, and the roofs over them; variants of one shape side by side, for they'd cover each
    other where they are equally fast. What torch's compiler made of a variant is hollow."""
    operations = list(dict.fromkeys(point["operation"] for point in points))
    variants = list(dict.fromkeys(point["variant"].removesuffix(HOLLOW) for point in points))
    markers = (MARKERS + "<>ph") * (1 + len(variants) // 12)
    x = span_log([point["flops_per_byte"] for point in points], 4)
    for (_, roof), style in zip(list_known(roofs), ("-", "--"), strict=False):
        ax.plot(x, np.minimum(roof["flops_per_sec"], x * roof["bytes_per_sec"]) / 1e12, style, color=INK, linewidth=1.2)
    ax.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel="TFLOP/s")
    width = (x[-1] / x[0]) ** 0.014    # of a marker
    for members in find_neighbours(points):
        color = COLORS[operations.index(members[0]["operation"]) % len(COLORS)]
        names = list(dict.fromkeys(point["variant"] for point in members))
        for point in members:
            place = names.index(point["variant"]) - (len(names) - 1) / 2
            is_hollow = point["variant"].endswith(HOLLOW)
            ax.plot(point["flops_per_byte"] * width ** place, point["flops_per_sec"] / 1e12, markersize=7,
                    marker=markers[variants.index(point["variant"].removesuffix(HOLLOW))], zorder=3,
                    markerfacecolor="white" if is_hollow else color, markeredgewidth=1.2 if is_hollow else 0.6,
                    markeredgecolor=color if is_hollow else "white")
        labels: dict[str, dict[str, None]] = {}    # a line for each place
        for point in members:
            labels.setdefault(f"{point['flops_per_byte']:.2g}", {})[point["label"]] = None
        lowest = min(point["flops_per_sec"] for point in members) / 1e12
        middle = (members[0]["flops_per_byte"] * members[-1]["flops_per_byte"]) ** 0.5
        ax.annotate("\n".join(map(", ".join, labels.values())), (middle, lowest), (0, -8), rotation=90, ha="center",
                    va="top", textcoords="offset points", fontsize=7.5, color=color)
    low, high = ax.get_ylim()
    ax.set_ylim(low / (high / low) ** 0.4, high)    # room for the labels
    label_counts(ax.xaxis, lambda value: f"{value:g}")
    label_counts(ax.yaxis, lambda value: f"{value:g}")
    handles = [Line2D([], [], color=INK, linewidth=1.2, linestyle=style, label=f"{name} roof")
               for (name, _), style in zip(list_known(roofs), ("-", "--"), strict=False)]
    handles += [Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=4, label=name)
                for i, name in enumerate(operations)]
    handles += [Line2D([], [], color=FAINT, marker=marker, linewidth=0, label=name)
                for marker, name in zip(markers, variants, strict=False)]
    if any(point["variant"].endswith(HOLLOW) for point in points):
        handles.append(Line2D([], [], color=FAINT, marker="o", markerfacecolor="white", linewidth=0, label="compiled"))
    ax.legend(handles=handles, loc="upper left", bbox_to_anchor=(1, 1))


def find_neighbours(points: list[dict]) -> list[list[dict]]:
    """The points of each operation, from left to right, cut where there is room between the labels of shapes."""
    groups: list[list[dict]] = []
    for operation in dict.fromkeys(point["operation"] for point in points):
        members = sorted((point for point in points if point["operation"] == operation),
                         key=lambda point: point["flops_per_byte"])
        for i, point in enumerate(members):
            if i == 0 or point["flops_per_byte"] > 1.4 * members[i - 1]["flops_per_byte"]:
                groups.append([])
            groups[-1].append(point)
    return groups


def list_known(roofs: dict[str, dict]) -> list[tuple[str, dict]]:
    """The roofs of which both figures are known."""
    return [(name, roof) for name, roof in roofs.items() if roof["flops_per_sec"] and roof["bytes_per_sec"]]
