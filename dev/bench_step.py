"""The whole training step against the machine's own matmul rate, and its time by phase.

    python -m dev.bench_step                         depths 4 and 6, vocabularies 4,096 and 32,768, compiled
    python -m dev.bench_step --depth 4 --vocab-size 8192 --compile off
    python -m dev.bench_step --depth 4 --vocab-size 8192 --variant "num_experts=4" "num_experts=8 moe_every=2"

Each variant, some knobs, is timed after the plain model; the last column is its step time over the plain model's. Each
step has new tokens, so that experts have other rows. Model FLOP/s are compared with a large matrix product in the same
dtype, timed in the same process, in the same rounds. The peak is that of the process so far.
"""

import argparse
import itertools
import time

import torch

from dev.timing import add_step_args, choose_device, make_random_batch, make_training, print_rows, time_in_turn
from nanochat.command_line import Parser, run_script
from nanochat.devices import get_peak_memory_bytes, synchronize
from nanochat.moe import make_balance
from nanochat.presets import parse_knobs
from nanochat.scaling import check_counts, make_config
from nanochat.train import train_step

MATMUL_SIZE = {"cpu": 2048}  # of the matrices whose product measures the machine's rate; 8192 on an accelerator


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--variant", nargs="+", default=[], metavar="KNOBS", help="knobs of further models, in quotes")
    parser.add_argument("--rounds", type=int, default=15)
    add_step_args(parser)
    args = parser.parse_args(argv)
    check_counts(rows=args.rows, rounds=args.rounds)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device, dtype, _ = choose_device(args)
    for words in args.variant:
        parse_knobs(words.split())    # refuses unknown ones before anything is timed
    rows = []
    for depth, vocab_size in itertools.product(args.depth, args.vocab_size):
        of_depth = [measure_step(args, depth, vocab_size, words, device, dtype) for words in ("", *args.variant)]
        rows += [row | {"over the plain model's": row["step ms"] / of_depth[0]["step ms"]} for row in of_depth]
    print_rows(rows, args.json)
    return {"rows": rows}


def measure_step(args: argparse.Namespace, depth: int, vocab_size: int, words: str, device: torch.device,
                 dtype: torch.dtype) -> dict:
    """One row of the table; words: knobs of the model"""
    config = make_config(depth, vocab_size=vocab_size, sequence_len=args.max_seq_len, **parse_knobs(words.split()))
    model, optimizer, batch = make_training(config, args, device, dtype)
    model.balance = make_balance(model)
    size = MATMUL_SIZE.get(device.type, 8192)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def forward_backward() -> None:
        model(batch.inputs, batch.targets).backward()
        model.zero_grad(set_to_none=True)

    def step() -> None:
        train_step(model, optimizer, make_random_batch(config, args.rows, device), args.rows)

    def forward() -> None:
        model(batch.inputs, batch.targets)
    start = time.perf_counter()
    step()
    synchronize(device)
    first_sec = time.perf_counter() - start
    ms = time_in_turn({"step": step, "forward_backward": forward_backward, "forward": forward,
                       "matmul": lambda: left @ right}, device, rounds=args.rounds)
    matmul_rate = 2 * size**3 / (ms["matmul"] * 1e-3)
    num_tokens = batch.inputs.numel()
    model_rate = model.estimate_flops() * num_tokens / (ms["step"] * 1e-3)
    return {"depth": depth, "vocab": vocab_size, "knobs": words, "step ms": ms["step"],
            "forward and loss ms": ms["forward"], "backward ms": ms["forward_backward"] - ms["forward"],
            "optimizer ms": ms["step"] - ms["forward_backward"], "tokens/s": num_tokens / (ms["step"] * 1e-3),
            "model TFLOP/s": model_rate / 1e12, "matmul TFLOP/s": matmul_rate / 1e12,
            "of matmul %": 100 * model_rate / matmul_rate, "first step s": first_sec,
            "peak MiB": get_peak_memory_bytes(device) / 2**20}


if __name__ == "__main__":
    run_script(main)
