"""The attention weights of each head of a trained model on a prompt, as pictures and as a table of figures.

    python -m dev.show_attention --prompt "The planets of the solar system are Mercury, Venus and Mars."
    python -m dev.show_attention -i sft -g d12 --layers 0 11 --prompt "$(cat page.txt)"

The weights are computed in fp32 on the CPU, from the queries and keys of the model's own attention calls; weights @
values must equal the calls' outputs. Writes attention.png, by default to $NANOCHAT_BASE_DIR/figures.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from dev.figures import FAINT, add_out, make_panels, save_figure, styled
from dev.timing import print_rows
from nanochat.checkpoint_manager import add_model_flags, load_for
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, print0
from nanochat.flash_attention import _expand_heads, _window_mask, flash_attn

MAX_ERROR = 1e-5          # of weights @ values, relative to the attention's output; fp32 rounding is under 1e-6
MAX_LABELS = 48           # tokens that fit beside a picture as text; longer prompts show positions
MAX_PANELS = 80           # pictures that fit on one sheet


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention on a prompt of T tokens."""
    layer:   int
    window:  int       # tokens before itself that a token may see
    weights: Tensor    # (H, T, T) each query's weights on all keys, fp32
    error:   float     # largest difference of weights @ values from the layer's own output, relative to the largest


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add("-p", "--prompt", type=str, required=True, help="the text; bos is put before it")
    add("--layers", type=int, nargs="+", help="layers to draw (default: all)")
    add_out(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    model, tokenizer, meta, _ = load_for(args.source, args.model_tag, args.step, "float32", "cpu")
    config = model.config
    ids = tokenizer.encode(args.prompt, prepend=tokenizer.get_bos_token_id())
    if not 2 < len(ids) <= config.sequence_len:
        raise UserError(f"--prompt has {len(ids) - 1} tokens; give from 2 to {config.sequence_len - 1}, the context of "
                        "the model")
    layers = list(range(config.n_layer)) if args.layers is None else args.layers
    if wrong := [layer for layer in layers if not 0 <= layer < config.n_layer]:
        raise UserError(f"--layers {wrong[0]} is none of the model's layers, 0 to {config.n_layer - 1}")
    if len(layers) * config.n_head > MAX_PANELS:
        raise UserError(f"{len(layers)} layers of {config.n_head} heads don't fit on one picture; choose at most "
                        f"{max(1, MAX_PANELS // config.n_head)} with --layers")
    attentions = record_attention(model, torch.tensor([ids]))
    rows = describe_heads(attentions)
    print_rows(rows)
    error = max(attention.error for attention in attentions)
    print0(f"weights @ values differs from the model's own attention by {error:.1e} of its largest value, at most")
    title = f"Attention of {meta['stage']} {Path(meta['run_dir']).name}, step {meta['step']}: queries down, keys across"
    texts = [spell_token(tokenizer, token_id) for token_id in ids]
    figure = draw_attention([attentions[layer] for layer in layers], texts, rows, title)
    return {"heads": rows, "error": error, "figure": str(save_figure(figure, "attention", args.out))}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def record_attention(model, idx: Tensor) -> list[LayerAttention]:
    """The attention weights of each layer on one row of tokens, (1, T)."""
    layers: list[LayerAttention] = []
    own_call = flash_attn.flash_attn_func

    def record(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
        y = own_call(q, k, v, causal=causal, window_size=window_size)
        weights = compute_weights(q, k, window_size[0])
        expected = torch.einsum("hqk,bkhd->bqhd", weights, _expand_heads(q, k, v)[1])
        error = float((expected - y).abs().max() / y.abs().max().clamp_min(1e-30))
        if error > MAX_ERROR:
            raise RuntimeError(f"layer {len(layers)}: the weights don't give the attention's output, by {error:.1e}")
        layers.append(LayerAttention(len(layers), window_size[0], weights, error))
        return y
    flash_attn.flash_attn_func = record
    try:
        model.forward_trunk(idx)
    finally:
        flash_attn.flash_attn_func = own_call
    return layers


def compute_weights(q: Tensor, k: Tensor, window: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) of one row, under its mask. q (1, T, H, D), k (1, T, Hk, D) -> (H, T, T) fp32"""
    T, D = q.size(1), q.size(-1)
    k, _ = _expand_heads(q, k, k)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)[0] / D**0.5
    return scores.masked_fill(~_window_mask(T, T, window, q.device), -float("inf")).softmax(-1)


def describe_heads(attentions: list[LayerAttention]) -> list[dict]:
    """One row a head, and a last row for uniform weights; means over all tokens but the first, which has one key."""
    rows = [{"layer": a.layer, "head": head, "window": a.window, **measure_head(weights, a.window)}
            for a in attentions for head, weights in enumerate(a.weights)]
    T = attentions[0].weights.size(-1)
    uniform = compute_weights(torch.zeros(1, T, 1, 2), torch.zeros(1, T, 1, 2), T)[0]
    return [*rows, {"layer": "uniform", "head": "", "window": T, **measure_head(uniform, T)}]


def measure_head(weights: Tensor, window: int) -> dict[str, float]:
    """Figures of one head's weights, (T, T): mean distance, entropy, and the weight on three kinds of tokens.

    The weight on bos is a mean over the tokens whose window includes it.
    """
    w = weights[1:].double()
    T = weights.size(-1)
    distance = (torch.arange(1, T)[:, None] - torch.arange(T)).clamp_min(0)    # (T - 1, T)
    entropy = -torch.xlogy(w, w).sum(-1)
    return {"distance tokens": float((w * distance).sum(-1).mean()), "entropy nats": float(entropy.mean()),
            "on bos %": 100 * float(w[:window, 0].mean()), "on itself %": 100 * float(w.diagonal(1).mean()),
            "on the one before %": 100 * float(w.diagonal().mean())}


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def spell_token(tokenizer, token_id: int) -> str:
    """A token as a label, with visible blanks and line ends."""
    text = tokenizer.decode([token_id])
    for char, sign in ((" ", "\u00b7"), ("\n", "\\n"), ("\t", "\\t"), ("$", r"\$")):    # a bare $ begins a formula
        text = text.replace(char, sign)
    return text if len(text) <= 14 else text[:13] + "\u2026"


@styled
def draw_attention(attentions: list[LayerAttention], texts: list[str], rows: list[dict], title: str) -> Figure:
    """A column of panels for each layer, a panel a head; masked keys, ahead or out of the window, are grey."""
    T, num_heads, num_layers = len(texts), len(attentions[0].weights), len(attentions)
    is_labeled = T <= MAX_LABELS
    size = min(max(2.6, 0.11 * T) if is_labeled else 3.4, 40 / num_layers)
    figure, axes = make_panels(num_heads, num_layers, width=size, height=size + 0.3, sharex=True, sharey=True)
    figures = {(row["layer"], row["head"]): row for row in rows}
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="#e9ebef")
    for column, attention in zip(axes.T, attentions, strict=True):
        unseen = ~_window_mask(T, T, attention.window, attention.weights.device)
        for head, (ax, weights) in enumerate(zip(column, attention.weights, strict=True)):
            # colors by the root of the weight: most weights are near zero, and few would be visible
            image = ax.imshow(np.ma.array(weights, mask=unseen), cmap=colors, norm=PowerNorm(0.5, 0, 1),
                              interpolation="nearest")
            row = figures[attention.layer, head]
            ax.set_title(f"layer {attention.layer}, head {head}", fontsize=9)
            ax.text(0.97, 0.97, f"{row['distance tokens']:.1f} tokens back\n{row['entropy nats']:.2f} nats\n"
                    f"bos {row['on bos %']:.0f}%", transform=ax.transAxes, ha="right", va="top", fontsize=7.5)
            if attention.window < T - 1:
                ax.text(0.03, 0.03, f"window {attention.window}", transform=ax.transAxes, fontsize=7.5)
            ax.grid(False)
            ax.tick_params(length=0, labelsize=6 if is_labeled else 8)
            if is_labeled:
                ax.set_xticks(range(T), texts, rotation=90)
                ax.set_yticks(range(T), texts)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8 / num_heads**0.5, aspect=25, pad=0.01,
                    ticks=(0, 0.05, 0.2, 0.5, 1)).outline.set_visible(False)
    figure.suptitle(title, fontsize=10, color=FAINT, x=0.01, ha="left")
    return figure


if __name__ == "__main__":
    run_script(main)
