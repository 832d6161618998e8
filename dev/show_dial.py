"""The best batch of small budgets, measured, and the dial's rule through it (scaling.make_plan).

    python -m dev.show_dial                 # the points of dev/dial_points.csv
    python -m dev.show_dial mine.csv        # your own: depth,tokens,batch,rate,seed,bpb

rate: learning rates as multiples of those at the reference batch, 2^19 tokens. Each depth and horizon is a cell. Of the
points of a cell and batch, the best mean over the seeds that the whole cell has counts, whatever its rate; a parabola
through the best batch and its neighbours, over log2 of the batch, gives the cell's best batch, where it has both.
Prints the cells, the rule's batch and what it costs in bits per byte by the parabola, and the power law that fits the
best batches; writes dial.png.
"""

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dev.figures import COLORS, FAINT, INK, MARKERS, add_out, make_panels, save_figure, styled
from dev.timing import print_table
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, print0
from nanochat.scaling import (
    REFERENCE_BATCH_TOKENS,
    REFERENCE_DEPTH,
    REFERENCE_RATIO,
    SMALL_TOKENS,
    count_scaling_params,
    get_best_batch,
    make_config,
)

POINTS = Path(__file__).with_name("dial_points.csv")
COLUMNS = ("depth", "tokens", "batch", "rate", "seed", "bpb")
VOCAB_SIZE, SEQ_LEN = 8192, 512    # of the measured runs
REFERENCE_TOKENS = REFERENCE_RATIO * count_scaling_params(
    make_config(REFERENCE_DEPTH, vocab_size=VOCAB_SIZE, sequence_len=SEQ_LEN))


class Cell(NamedTuple):
    """What was measured at one depth and horizon."""
    depth:     int
    tokens:    float
    losses:    dict[float, float]      # log2 of the batch -> bits per byte at its best rate
    rates:     dict[float, float]      # and that rate
    parabola:  np.ndarray | None       # of the losses over log2 of the batch
    best:      float | None            # log2 of the best batch


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("points", nargs="?", type=Path, default=POINTS, help="CSV file (default: the measured points)")
    add_out(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    cells = make_cells(read_points(args.points))
    law = fit_law(cells)
    rows = []
    for cell in cells:
        rule = math.log2(get_best_batch(cell.tokens, REFERENCE_TOKENS))
        cost = np.nan if cell.best is None else np.diff(np.polyval(cell.parabola, (cell.best, rule)))[0]
        tried = ", ".join(f"{2 ** batch / 1024:g}K {loss:.4f} (x{cell.rates[batch]:g})"
                          for batch, loss in cell.losses.items())
        rows.append((str(cell.depth), f"{cell.tokens / 1e6:.2f}", tried,
                     "-" if cell.best is None else f"{2 ** cell.best:,.0f}", f"{2 ** rule:,.0f}", f"{cost:.4f}"))
    print_table(("depth", "M tokens", "bits per byte by batch (best rate)", "best batch", "by the rule", "cost"), rows)
    print0("best batch: " + ("not known for two horizons" if law is None else
           f"{law[1]:,.0f} tokens at {SMALL_TOKENS / 1e6:g} M, growing as tokens^{law[0]:.3f}"))
    path = save_figure(draw_dial(cells), "dial", args.out)
    return {"law": law, "best": {(cell.depth, cell.tokens): cell.best for cell in cells}, "figure": str(path)}


def read_points(path: Path) -> list[dict[str, float]]:
    """Rows of a CSV file, as numbers. UserError where there is none, or a row that isn't."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        points = [{name: float(row[name]) for name in COLUMNS} for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} must be a CSV file with the columns {', '.join(COLUMNS)}, all numbers "
                        f"({error})") from None
    if not points or any(point["batch"] < 1 or point["tokens"] < 1 for point in points):
        raise UserError(f"{path} must have points, each with a batch and tokens of at least 1")
    return points


def make_cells(points: list[dict[str, float]]) -> list[Cell]:
    """The cells in the order of depth and horizon."""
    losses: dict[tuple[float, float], dict[tuple[float, float], dict[float, float]]] = \
        defaultdict(lambda: defaultdict(dict))
    for point in points:
        settings = math.log2(point["batch"]), point["rate"]
        losses[point["depth"], point["tokens"]][settings][point["seed"]] = point["bpb"]
    cells = []
    for (depth, tokens), by_settings in sorted(losses.items()):
        seeds = set.intersection(*(set(by_seed) for by_seed in by_settings.values()))
        if not seeds:
            raise UserError(f"the points of depth {depth:g}, {tokens:g} tokens have no seed in common")
        best_of: dict[float, tuple[float, float]] = {}
        for (batch, rate), by_seed in sorted(by_settings.items()):
            mean = float(np.mean([by_seed[seed] for seed in seeds]))
            best_of[batch] = min(best_of.get(batch, (math.inf, 0.0)), (mean, rate))
        batches, means = list(best_of), [loss for loss, _ in best_of.values()]
        parabola = best = None
        if 0 < int(np.argmin(means)) < len(means) - 1:
            # through the best and its neighbours: farther ones bend otherwise
            near = slice(int(np.argmin(means)) - 1, int(np.argmin(means)) + 2)
            parabola = np.polyfit(batches[near], means[near], 2)
            best = float(-parabola[1] / (2 * parabola[0]))
        cells.append(Cell(int(depth), tokens, dict(zip(batches, means, strict=True)),
                          {batch: rate for batch, (_, rate) in best_of.items()}, parabola, best))
    return cells


def fit_law(cells: list[Cell]) -> tuple[float, float] | None:
    """(exponent, best batch at SMALL_TOKENS) by least squares in log-log; None where fewer than two horizons have one.
    """
    known = [(math.log2(cell.tokens / SMALL_TOKENS), cell.best) for cell in cells if cell.best is not None]
    if len({tokens for tokens, _ in known}) < 2:
        return None
    exponent, batch = np.polyfit(*np.array(known).T, 1)
    return float(exponent), float(2 ** batch)


@styled
def draw_dial(cells: list[Cell]) -> Figure:
    """Left: what another batch than the best one costs; right: the best batch over the horizon, and the rule."""
    figure, ((left, right),) = make_panels(1, 2)
    for i, cell in enumerate(cells):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        label = f"depth {cell.depth}, {cell.tokens / 1e6:.1f} M"
        least = min(cell.losses.values())
        left.plot([2 ** batch for batch in cell.losses], [loss - least for loss in cell.losses.values()],
                  color=color, marker=marker, label=label)
        if cell.best is not None:
            right.plot(cell.tokens, 2 ** cell.best, color=color, marker=marker, linestyle="none", label=label)
    tokens = np.geomspace(min(cell.tokens for cell in cells) / 2, 8 * REFERENCE_TOKENS, 100)
    right.plot(tokens, [get_best_batch(num, REFERENCE_TOKENS) for num in tokens], color=INK, label="the rule")
    right.plot(REFERENCE_TOKENS, REFERENCE_BATCH_TOKENS, color=FAINT, marker="s", linestyle="none",
               label=f"depth {REFERENCE_DEPTH}, public record")
    left.set(xscale="log", xlabel="tokens of a batch", ylabel="bits per byte above the best",
             title="Another batch than the best one")
    right.set(xscale="log", yscale="log", xlabel="training tokens", ylabel="best batch in tokens",
              title="The best batch")
    for axes in (left, right):
        axes.legend()
    return figure


if __name__ == "__main__":
    run_script(main)
