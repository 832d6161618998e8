"""How evenly a mixture of experts spreads its tokens, step by step.

    python -m dev.show_load moe moe-every-other
    python -m dev.show_load moe --stage sft

Each name is a run under $NANOCHAT_BASE_DIR/runs/<stage>; a color for each. Of the load of a step's experts: coefficient
of variation, dashed in the worst layer; most loaded over the mean; entropy of a token's scores; largest bias.
Writes load.png, by default to $NANOCHAT_BASE_DIR/figures.
"""

import argparse

import numpy as np
from matplotlib.figure import Figure

from dev.figures import COLORS, add_out, make_panels, save_figure, styled
from dev.timing import print_table
from nanochat.checkpoint_manager import get_run_dir
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError
from nanochat.run import ROUTING_FIGURES, read_info, read_metrics

# Title and figures of a panel; the second one is dashed
PANELS = (("coefficient of variation of the load", ("moe_load_cv", "moe_worst_load_cv")),
          ("most loaded expert over the mean", ("moe_most_loaded",)),
          ("entropy of a token's scores, part of the most", ("moe_router_nats",)), ("largest bias", ("moe_max_bias",)))


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("tags", nargs="+", help="runs")
    parser.add_argument("--stage", choices=("base", "mid", "sft"), default="base", help="of the runs")
    add_out(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    runs = {tag: read_figures(args.stage, tag) for tag in args.tags}
    rows = [[tag, *(float(np.median(figures[name])) for name in ROUTING_FIGURES)] for tag, figures in runs.items()]
    print_table(["median of a run's steps", *(name.removeprefix("moe_") for name in ROUTING_FIGURES)], rows)
    return {"rows": rows, "figure": str(save_figure(draw_load(runs), "load", args.out))}


def read_figures(stage: str, tag: str) -> dict[str, np.ndarray]:
    """ROUTING_FIGURES and the steps that have them, (steps,) each; entropy as a part of that of equal scores."""
    run_dir = get_run_dir(stage, tag)
    lines = [line for line in read_metrics(run_dir) if line["kind"] == "train" and ROUTING_FIGURES[0] in line]
    if not lines:
        raise UserError(f"{run_dir} holds no steps of a mixture of experts that is balanced; name runs with the knob "
                        "num_experts, or another --stage")
    figures = {name: np.array([line[name] for line in lines]) for name in ("step", *ROUTING_FIGURES)}
    figures["moe_router_nats"] = figures["moe_router_nats"] / np.log(read_info(run_dir)["model_config"]["num_experts"])
    return figures


@styled
def draw_load(runs: dict[str, dict[str, np.ndarray]]) -> Figure:
    """A panel for each kind of figure; {tag: as of read_figures}."""
    figure, axes = make_panels(2, 2)
    for ax, (title, names) in zip(axes.flat, PANELS, strict=True):
        for (tag, figures), color in zip(runs.items(), COLORS * len(runs), strict=False):
            for name, style in zip(names, ("-", "--"), strict=False):
                ax.plot(figures["step"], figures[name], style, color=color, linewidth=1.2,
                        label=tag if style == "-" else None)
        ax.set(title=title, xlabel="steps", ylim=(0, None))
    axes[0, 0].legend()
    return figure


if __name__ == "__main__":
    run_script(main)
