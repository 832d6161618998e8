"""A picture of the rewards of RL runs: of the sampled answers, step by step, and of held-out questions.

    python -m dev.rl_curve few-1 few-2 few-3 --out dev/rl_curve.png

Each name is a run under $NANOCHAT_BASE_DIR/runs/rl; a color for each.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dev.figures import COLORS, make_folder, make_panels, save_png, styled
from nanochat.checkpoint_manager import get_run_dir
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, print0
from nanochat.run import read_metrics

SMOOTH_STEPS = 10  # each point of a curve is a mean over as many steps


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("tags", nargs="+", help="runs of scripts.chat_rl")
    parser.add_argument("--out", type=Path, default=Path("rl_curve.png"), help="the figure")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    runs = {tag: read_metrics(get_run_dir("rl", tag)) for tag in args.tags}
    for tag, lines in runs.items():
        if not any(line["kind"] == "train" for line in lines):
            raise UserError(f"{get_run_dir('rl', tag)} holds no steps of RL; name runs of scripts.chat_rl")
    save_png(draw_rewards(runs), make_folder(args.out.parent) / args.out.name)
    print0(f"{args.out}: {len(runs)} runs")
    return {"out": str(args.out)}


@styled
def draw_rewards(runs: dict[str, list[dict]]) -> Figure:
    """One color a run; {tag: lines of metrics.jsonl}."""
    figure, axes = make_panels(1, 2, sharey=True)
    left, right = axes[0]
    for (tag, lines), color in zip(runs.items(), COLORS * len(runs), strict=False):
        rewards = np.array([line["reward"] for line in lines if line["kind"] == "train"])
        width = min(SMOOTH_STEPS, len(rewards))
        left.plot(np.arange(width, len(rewards) + 1), np.convolve(rewards, np.full(width, 1 / width), "valid"),
                  color=color, label=tag)
        evals = [line for line in lines if line["kind"] == "eval"]
        steps = [line["step"] for line in evals]
        for suffix, style in (("_reward", "o-"), ("_greedy_frac", "o:")):
            # several tasks count alike
            values = [np.mean([value for key, value in line.items() if key.endswith(suffix)]) for line in evals]
            right.plot(steps, values, style, color=color, markersize=4)
    left.set(title=f"sampled, mean of {SMOOTH_STEPS} steps", xlabel="steps", ylabel="reward", ylim=(0, 1))
    left.legend(loc="lower right")
    right.set(title="held out, greedy dotted", xlabel="steps")
    return figure


if __name__ == "__main__":
    run_script(main)
