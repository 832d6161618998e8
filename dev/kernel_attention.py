"""Attention in the kernel bench: whole sequences, their gradients, and new tokens on a cache; each backend a variant.

B rows, T tokens (new ones, in decoding), S tokens of room in a cache, H query heads, Hk key/value heads, D head dim.
A window is the number of tokens before it that a query sees; -1: all.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dev.kernel_ops import TOLERANCES, Inputs, Operation, Scale, Setting, Shape, Variant, compiled, is_compiled
from nanochat import flash_attention
from nanochat.config import GPTConfig
from nanochat.flash_attention import BACKENDS, flash_attn, plain_attention

NEW_TOKENS = 1    # of each row in decoding


# ---------------------------------------------------------------------------------------------------------------------
# Shapes and inputs


def list_shapes(scale: Scale) -> dict[str, Shape]:
    """The last layer's, which sees the whole past, and the first one's window."""
    config = scale.config
    shape = {"B": scale.rows, "T": config.sequence_len, "H": config.n_head, "Hk": config.n_kv_head,
             "D": config.head_dim}
    window = max(1, config.sequence_len // 4)
    return {"whole past": shape | {"window": -1}, f"window {window}": shape | {"window": window}}


def list_decode_shapes(scale: Scale) -> dict[str, Shape]:
    """Rows whose caches are from half full to full, as those of an engine are."""
    config, B, S = scale.config, scale.decode_rows, scale.config.sequence_len
    lengths = tuple(S // 2 + (S - NEW_TOKENS - S // 2) * i // max(1, B - 1) for i in range(B))
    return {f"{B} rows": {"B": B, "T": NEW_TOKENS, "S": S, "H": config.n_head, "Hk": config.n_kv_head,
                          "D": config.head_dim, "lengths": lengths, "window": -1}}


def draw_heads(shape: Shape, tokens: int, heads: str, setting: Setting, is_normed: bool = True) -> Tensor:
    """(B, tokens, heads, D), queries and keys normed as the model norms them."""
    heads = torch.randn(shape["B"], tokens, shape[heads], shape["D"], device=setting.device)
    return (1.2 * F.rms_norm(heads, (shape["D"],)) if is_normed else heads).to(setting.dtype)


def make_inputs(shape: Shape, setting: Setting) -> Inputs:
    T = shape["T"]
    return {"q": draw_heads(shape, T, "H", setting), "k": draw_heads(shape, T, "Hk", setting),
            "v": draw_heads(shape, T, "Hk", setting, False), "window": shape["window"]}


def make_training_inputs(shape: Shape, setting: Setting) -> Inputs:
    return make_inputs(shape, setting) | {"grad": draw_heads(shape, shape["T"], "H", setting, False)}


def make_decode_inputs(shape: Shape, setting: Setting) -> Inputs:
    T, S = shape["T"], shape["S"]
    lengths = torch.tensor(shape["lengths"], dtype=torch.int32, device=setting.device)
    return {"q": draw_heads(shape, T, "H", setting), "k_cache": draw_heads(shape, S, "Hk", setting),
            "v_cache": draw_heads(shape, S, "Hk", setting, False), "k": draw_heads(shape, T, "Hk", setting),
            "v": draw_heads(shape, T, "Hk", setting, False), "lengths": lengths, "window": shape["window"]}


# ---------------------------------------------------------------------------------------------------------------------
# Definitions and counts


def attend_by_row(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """plain_attention of one row after the other, whose T x T scores aren't kept: those of all rows are large."""
    return torch.cat([checkpoint(plain_attention, *row, window, use_reentrant=False)
                      for row in zip(q.split(1), k.split(1), v.split(1), strict=True)])


def attend_to_rows(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor,
                   window: int) -> Tensor:
    """Each row by itself, as a whole sequence whose last queries are the new ones."""
    outputs, T = [], q.size(1)
    for row, length in enumerate(lengths.tolist()):
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache[row, length:length + T] = new[row]
        queries = F.pad(q[row:row + 1], (0, 0, 0, 0, length, 0))    # what stands before the last ones doesn't matter
        whole = plain_attention(queries, k_cache[row:row + 1, :length + T], v_cache[row:row + 1, :length + T], window)
        outputs.append(whole[:, length:])
    return torch.cat(outputs)


def count_pairs(T: int, window: int, length: int = 0) -> int:
    """Pairs of a query and a key that it sees, of T new tokens behind `length` others."""
    return sum(min(t, t if window < 0 else window) + 1 for t in range(length, length + T))


def count_flops(shape: Shape) -> int:
    """Of Q K^T and of P V."""
    return 4 * shape["B"] * shape["H"] * shape["D"] * count_pairs(shape["T"], shape["window"])


def count_decode_flops(shape: Shape) -> int:
    return 4 * shape["H"] * shape["D"] * sum(count_pairs(shape["T"], shape["window"], length)
                                             for length in shape["lengths"])


def count_decode_bytes(shape: Shape, inputs: Inputs) -> int:
    """Of a cache only the keys and values that some query sees are read, and the new ones are written."""
    T, window, key_bytes = shape["T"], shape["window"], shape["Hk"] * shape["D"] * inputs["k_cache"].itemsize
    seen = sum(length if window < 0 else min(length, window) for length in shape["lengths"])
    return 2 * inputs["q"].nbytes + 2 * key_bytes * (seen + 2 * shape["B"] * T) + inputs["lengths"].nbytes


# ---------------------------------------------------------------------------------------------------------------------
# Variants


@functools.cache
def probe(name: str, device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int],
          num_tokens: int) -> tuple[bool | None, str]:
    H, Hk, D = heads
    config = GPTConfig(n_head=H, n_kv_head=Hk, n_embd=H * D, smear=False, ve_gate_channels=0)
    return flash_attention.probe_backend(name, device, dtype, config, num_tokens)


def find_obstacle(name: str, setting: Setting, shape: Shape) -> str:
    """Why a backend isn't there, or isn't for this; one that is there and fails its probe is measured, and found wrong.
    """
    works, reason = probe(name, setting.device, setting.dtype, (shape["H"], shape["Hk"], shape["D"]), shape["T"])
    return reason if works is None else ""


def find_forward_obstacle(name: str, setting: Setting, shape: Shape) -> str:
    if name == "blocks":
        return "serves where gradients are wanted; without them sdpa is used"
    return find_obstacle(name, setting, shape)


def by_backend(name: str, call: Callable) -> Callable:
    """The call with a backend of flash_attention.py, whichever is chosen for this process."""
    def run_backend(*args: object) -> Tensor:
        before, flash_attention._override_impl = flash_attention._override_impl, name
        try:
            return call(*args)
        finally:
            flash_attention._override_impl = before
    return run_backend


def attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    return flash_attn.flash_attn_func(q, k, v, window_size=(window, 0))


def attend_to_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor,
                    window: int) -> Tensor:
    return flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths,
                                              window_size=(window, 0))


def list_backends(find_obstacle: Callable[[str, Setting, Shape], str]) -> tuple[Variant, ...]:
    """The definition as it is, each backend, and those that torch's compiler changes."""
    def obstacle_of(name: str, *, compiles: bool = False) -> Callable[[Setting, Shape], str]:
        return lambda setting, shape: find_obstacle(name, setting, shape) or (
            is_compiled(setting, shape) if compiles else "")
    backends = [Variant(name, by_backend(name, attend), obstacle_of(name)) for name in BACKENDS]
    backends += [Variant(f"{name}, compiled", by_backend(name, compiled(attend)), obstacle_of(name, compiles=True))
                 for name in ("blocks", "sdpa")]
    return Variant("plain", plain_attention), *backends


OPERATIONS = (
    Operation("attention", "attention", "(q (B, T, H, D), k (B, T, Hk, D), v, window) -> (B, T, H, D), causal",
              list_shapes, make_inputs, attend_by_row, count_flops, TOLERANCES, list_backends(find_forward_obstacle)),
    Operation("attention_train", "attention", "the same with the gradients of q, k and v",
              list_shapes, make_training_inputs, attend_by_row, lambda shape: 3 * count_flops(shape), TOLERANCES,
              list_backends(find_obstacle), gradients=("q", "k", "v")),
    Operation("attention_decode", "attention",
              "(q (B, T, H, D), k_cache (B, S, Hk, D), v_cache, k (B, T, Hk, D), v, lengths (B,), window) -> (B, T, H, "
              "D): new tokens' k and v are written behind the lengths, and q attends to what is there",
              list_decode_shapes, make_decode_inputs, attend_to_rows, count_decode_flops, TOLERANCES,
              (Variant("sdpa", by_backend("sdpa", attend_to_cache)),
               Variant("sdpa, compiled", by_backend("sdpa", compiled(attend_to_cache)), is_compiled),
               Variant("fa3", by_backend("fa3", attend_to_cache), functools.partial(find_obstacle, "fa3"))),
              changes=("k_cache", "v_cache"), count_bytes=count_decode_bytes),
)
