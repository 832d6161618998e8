"""Grouped-query attention: the time and the cache that fewer key/value heads save, against a prediction from bytes.

    python -m dev.bench_gqa                                          64 query heads, 1 to 64 groups
    python -m dev.bench_gqa --query-heads 16 --cache-tokens 32768 --rows 1

One layer's attention call, without the projections around it. Decode: a new token of each row on its cache. Prefill: a
whole prompt. The prediction is the bytes that each must read and write, at the rate at which this machine reads a large
tensor, measured in the same rounds; where the time is longer, memory isn't the limit. On a CPU the eager engine keeps
its cache in fp32: measure with --dtype float32. Writes gqa.png, by default to $NANOCHAT_BASE_DIR/figures.
"""

import argparse
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dev.figures import COLORS, FAINT, add_out, make_panels, save_figure, styled
from dev.timing import choose_device, print_rows, time_in_turn
from nanochat.command_line import Parser, add_compute_flags, run_script
from nanochat.common import UserError, print0
from nanochat.flash_attention import flash_attn

READ_BYTES = {"cpu": 2**28}    # of the tensor that is read to measure the rate; 2**30 on an accelerator


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--query-heads", type=int, default=64)
    add("--groups", type=int, nargs="+", help="key/value heads (default: powers of two, and as many as query heads)")
    add("--head-dim", type=int, default=64)
    add("--rows", type=int, default=4, help="sequences that decode together")
    add("--cache-tokens", type=int, default=2048, help="tokens in each row's cache, the new one included")
    add("--prompt-tokens", type=int, default=512, help="tokens of the prompt that is prefilled, one row")
    add("--rounds", type=int, default=15)
    add_compute_flags(parser)
    add_out(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    for name in ("query_heads", "head_dim", "rows", "cache_tokens", "prompt_tokens", "rounds"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    H = args.query_heads
    groups = sorted(set(args.groups or [*(2**i for i in range(H.bit_length()) if H % 2**i == 0), H]))
    if wrong := [num for num in groups if num < 1 or H % num]:
        raise UserError(f"--groups {wrong[0]} doesn't divide the {H} query heads")
    device, dtype, backend = choose_device(args)
    calls: dict[str, Callable] = {}
    for num in groups:
        calls |= make_calls(args, num, device, dtype)
    large = torch.ones(READ_BYTES.get(device.type, 2**30) // 4, device=device)    # a CPU sums fp32 as fast as it reads
    with torch.inference_mode():
        ms = time_in_turn(calls | {"read": large.sum}, device, rounds=args.rounds)
    bytes_per_ms = large.nbytes / ms["read"]
    rows = [describe(args, num, ms, dtype.itemsize, bytes_per_ms) for num in groups]
    title = f"{H} query heads of {args.head_dim}, {device.type}, {str(dtype).removeprefix('torch.')}, attention " \
            f"{backend}; reading at {bytes_per_ms / 1e6:.1f} GB/s"
    print0(title)
    print_rows(rows)
    figure = draw_groups(rows, title, args)
    return {"rows": rows, "bytes_per_ms": bytes_per_ms, "figure": str(save_figure(figure, "gqa", args.out))}


def make_calls(args: argparse.Namespace, num_groups: int, device: torch.device,
               dtype: torch.dtype) -> dict[str, Callable]:
    """The attention calls of one number of groups: {"decode 4": ..., "prefill 4": ...}."""
    def draw(rows: int, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(rows, tokens, heads, args.head_dim, device=device).to(dtype)
    B, T, H = args.rows, args.prompt_tokens, args.query_heads
    q, new_k, new_v = draw(B, 1, H), draw(B, 1, num_groups), draw(B, 1, num_groups)
    k_cache, v_cache = (draw(B, args.cache_tokens, num_groups) for _ in range(2))
    lengths = torch.full((B,), args.cache_tokens - 1, dtype=torch.int32, device=device)    # without the new token
    prompt_q, prompt_k, prompt_v = draw(1, T, H), draw(1, T, num_groups), draw(1, T, num_groups)

    def decode() -> torch.Tensor:
        return flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k=new_k, v=new_v, cache_seqlens=lengths)

    def prefill() -> torch.Tensor:
        return flash_attn.flash_attn_func(prompt_q, prompt_k, prompt_v)
    return {f"decode {num_groups}": decode, f"prefill {num_groups}": prefill}


def count_bytes(rows: int, new_tokens: int, kv_tokens: int, query_heads: int, groups: int, head_dim: int,
                element_bytes: int) -> int:
    """What an attention call must move at least: queries and output, keys and values."""
    return 2 * rows * (new_tokens * query_heads + kv_tokens * groups) * head_dim * element_bytes


def describe(args: argparse.Namespace, num_groups: int, ms: dict[str, float], element_bytes: int,
             bytes_per_ms: float) -> dict:
    """One row of the table."""
    shape = (args.query_heads, num_groups, args.head_dim, element_bytes)
    decode_bytes = count_bytes(args.rows, 1, args.cache_tokens, *shape)
    prefill_bytes = count_bytes(1, args.prompt_tokens, args.prompt_tokens, *shape)
    cache_bytes = count_bytes(args.rows, 0, args.cache_tokens, *shape)
    return {"groups": num_groups,
            "decode ms": ms[f"decode {num_groups}"], "decode by bytes ms": decode_bytes / bytes_per_ms,
            "prefill ms": ms[f"prefill {num_groups}"], "prefill by bytes ms": prefill_bytes / bytes_per_ms,
            "cache MiB a layer": cache_bytes / 2**20}


@styled
def draw_groups(rows: list[dict], title: str, args: argparse.Namespace) -> Figure:
    """Times, measured and by bytes, and the cache's size, against the number of groups."""
    figure, axes = make_panels(1, 2, width=5.4, height=4.0)
    left, right = axes[0]
    groups = [row["groups"] for row in rows]
    labels = {"decode": f"decode: {args.rows} new tokens, {args.cache_tokens:,} each in the cache",
              "prefill": f"prefill: a prompt of {args.prompt_tokens:,} tokens"}
    for (name, label), color, marker in zip(labels.items(), COLORS, "os", strict=False):
        left.plot(groups, [row[f"{name} ms"] for row in rows], marker=marker, color=color, linewidth=1.6, label=label)
        left.plot(groups, [row[f"{name} by bytes ms"] for row in rows], "--", color=color, linewidth=1.2,
                  label=f"{name}, by bytes alone")
    left.set(title="time of one layer's attention", ylabel="ms")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2))
    right.plot(groups, [row["cache MiB a layer"] for row in rows], marker="D", color=COLORS[2], linewidth=1.6)
    right.set(title="cache of one layer", ylabel="MiB")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log", xlabel="groups (key/value heads)")
        ax.set_xticks(groups, [str(num) for num in groups])
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.minorticks_off()
    right.set_yticks([row["cache MiB a layer"] for row in rows])
    figure.suptitle(title, fontsize=10, color=FAINT, x=0.01, ha="left")
    return figure


if __name__ == "__main__":
    run_script(main)
