"""What experts cost in time beside the dense model, by two rates fitted to finished runs; and at larger batches.

    python -m dev.moe_cost ablate-d4-full-seed1 ablate-d4-e8-seed1 ablate-d6-full-seed1 ablate-d6-e8-seed1

Names are tags of base runs on one machine, of each width and batch a dense one among them. A mixture of experts takes
longer for as many FLOPs a token: Muon orthogonalises more matrices each step, and the dispatch copies rows, (8 + 34 k)
C bytes a token and layer, forward and backward, in 16 bits. The two rates are those that predict the extra
milliseconds of the runs' median steps best, relative to each. Copies grow with the batch, Muon's products don't.
"""

import argparse
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from dev.timing import print_table
from nanochat.checkpoint_manager import get_run_dir
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, print0
from nanochat.config import GPTConfig, read_config
from nanochat.fabric import count_muon_flops
from nanochat.memory import list_muon
from nanochat.report import read_run

FACTORS = (4, 16, 128)    # on the runs' batch


@dataclass(frozen=True)
class Timed:
    """Runs of one model and batch: the median step of the median run."""
    config:       GPTConfig
    batch_tokens: int
    ms:           float

    @property
    def muon_flops(self) -> float:
        """Of a step."""
        return sum(count_muon_flops(*shape[-2:], math.prod(shape[:-2])) for shape in list_muon(self.config))

    @property
    def copied_bytes(self) -> float:
        """Of a step."""
        num_layers = sum(map(self.config.has_experts, range(self.config.n_layer)))
        return self.batch_tokens * num_layers * (8 + 34 * self.config.top_k) * self.config.n_embd


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("tags", nargs="+", help="runs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    pairs = pair_runs(read_runs(parse_args(argv).tags))
    muon_rate, copy_rate = fit_rates(pairs)
    print0(f"Muon's further products: {muon_rate / 1e9:,.2f} TFLOP/s; copies: {copy_rate / 1e6:,.1f} GB/s")
    rows = []
    for dense, moe in pairs:
        config, extra_flops = moe.config, moe.muon_flops - dense.muon_flops
        fitted = extra_flops / muon_rate + moe.copied_bytes / copy_rate
        taxes = [1 + (extra_flops / muon_rate + factor * moe.copied_bytes / copy_rate) /
                 grow(dense, factor, muon_rate) for factor in FACTORS]
        rows.append([config.n_layer, config.num_experts, config.top_k, config.moe_every, moe.batch_tokens, dense.ms,
                     moe.ms, dense.ms + fitted, moe.ms / dense.ms, extra_flops / muon_rate / fitted, *taxes])
    columns = ["depth", "experts", "top k", "every", "batch", "dense ms", "ms", "fitted ms", "over dense",
               "Muon's part", *(f"x{factor} batch" for factor in FACTORS)]
    print_table(columns, rows)
    return {"muon_rate": muon_rate, "copy_rate": copy_rate, "rows": rows}


def read_runs(tags: list[str]) -> list[Timed]:
    """UserError where one has no steps."""
    by_model: dict[tuple[GPTConfig, int], list[float]] = defaultdict(list)
    for tag in tags:
        run = read_run(get_run_dir("base", tag))
        steps = run.get_series("train", "step_ms")
        if not steps:
            raise UserError(f"{get_run_dir('base', tag)} holds no steps; name base runs")
        key = read_config(run.info["model_config"]), run.info["plan"]["batch_tokens"]
        by_model[key].append(statistics.median(ms for _, ms in steps))
    return [Timed(config, batch, statistics.median(values)) for (config, batch), values in by_model.items()]


def pair_runs(runs: list[Timed]) -> list[tuple[Timed, Timed]]:
    """(dense, mixture of experts) that differ in their experts alone."""
    def make_dense(run: Timed) -> tuple[GPTConfig, int]:
        return replace(run.config, num_experts=0, top_k=1, moe_every=1), run.batch_tokens
    dense = {make_dense(run): run for run in runs if not run.config.num_experts}
    experts = [run for run in runs if run.config.num_experts]
    for run in experts:
        if make_dense(run) not in dense:
            raise UserError(f"of depth {run.config.n_layer} and {run.batch_tokens} tokens a step there is no dense run "
                            "that differs in its experts alone; name one, too")
    if len(experts) < 2:
        raise UserError("two rates need two different mixtures of experts at least; name their runs")
    return [(dense[make_dense(run)], run) for run in experts]


def fit_rates(pairs: list[tuple[Timed, Timed]]) -> tuple[float, float]:
    """FLOPs and bytes a millisecond."""
    costs = np.array([[moe.muon_flops - dense.muon_flops, moe.copied_bytes] for dense, moe in pairs])
    extra = np.array([moe.ms - dense.ms for dense, moe in pairs])
    if (extra <= 0).any():
        raise UserError("a mixture of experts was as fast as its dense model; there is nothing to fit")
    inverse = np.linalg.lstsq(costs / extra[:, None], np.ones(len(pairs)), rcond=None)[0]
    if (inverse <= 0).any():
        raise UserError("these times don't fit two rates; name more runs, of machines where nothing else ran")
    return 1 / float(inverse[0]), 1 / float(inverse[1])


def grow(dense: Timed, factor: float, muon_rate: float) -> float:
    """Milliseconds of the dense step at a larger batch: all but Muon's products grow with it."""
    muon_ms = min(dense.ms, dense.muon_flops / muon_rate)
    return muon_ms + factor * (dense.ms - muon_ms)


if __name__ == "__main__":
    run_script(main)
