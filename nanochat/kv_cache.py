"""The cache of keys and values: what a model remembers of the tokens so far, each row with its own length.

    (layers, B, T, H, D) keys, the same of values; (B,) lengths; (B, 1) ids of the last tokens

Where the model offsets keys (gpt.offset_keys), the last token's key also waits behind it, for the next one.

B rows, T tokens of room, H key/value heads, D head dim.
"""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.flash_attention import (
    attend_to_cache,
    find_mask,
    find_positions,
    flash_attn,
    uses_fa3,
    write_to_cache,
)

NO_TOKEN = -1    # what stands before the first one


class KVCache:
    """Keys and values of the tokens so far, each row with its own length, and the last token, which the next one's
    embedding looks back at.

    Grows by doubling when a pass needs more room; the rotary table bounds a sequence's length.
    """

    def __init__(self, batch_size: int, num_heads: int, seq_len: int, head_dim: int, num_layers: int,
                 device: torch.device, dtype: torch.dtype):
        """num_heads: key/value heads; seq_len: tokens that there is room for at first."""
        shape = (num_layers, batch_size, seq_len + 1, num_heads, head_dim)  # (layers, B, T, H, D)
        self.k_cache, self.v_cache = (make_memory(shape, device, dtype) for _ in range(2))
        self.cache_seqlens = torch.zeros(batch_size, device=device, dtype=torch.int32)  # (B,) tokens of each row
        self.last_ids = torch.full((batch_size, 1), NO_TOKEN, device=device)  # (B, 1)
        self.num_tokens = 0  # of the longest row; known here so that a GPU needn't be asked

    @classmethod
    def wrap(cls, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, last_ids: Tensor) -> "KVCache":
        """A cache of these tensors that doesn't grow: for a pass that is traced or captured."""
        cache = cls.__new__(cls)
        cache.k_cache, cache.v_cache = k_cache, v_cache
        cache.cache_seqlens, cache.last_ids = cache_seqlens, last_ids
        cache.num_tokens = None
        return cache

    def count_rows(self) -> int:
        """Rows that there is memory for."""
        return self.k_cache.size(1)

    def get_capacity(self) -> int:
        """Tokens of a row that there is room for."""
        return self.k_cache.size(2) - 1

    def get_pos(self) -> int:
        """Tokens that the longest row holds."""
        return self.num_tokens

    # What the model calls in a forward pass: begin, get_positions, shift_ids, in each layer exchange_last and attend,
    # advance

    def begin(self, num_tokens: int) -> None:
        """Begin a forward pass over `num_tokens` new tokens of each row."""
        self.reserve(num_tokens)
        self.masks: dict[int, tuple[slice, Tensor | None]] = {}    # by window
        end = self.k_cache.size(2) if self.num_tokens is None else self.num_tokens + num_tokens
        self.positions = find_positions(self.cache_seqlens, num_tokens, end)

    def get_positions(self) -> Tensor | slice:
        """Of the new tokens: (B, T), or one slice where all rows are equally long."""
        positions = self.positions
        return slice(positions.first, positions.end) if positions.by_row is None else positions.by_row

    def exchange_last(self, layer: int, last: Tensor) -> Tensor:
        """Leave the last new token's key (B, 1, H, D) for the token behind it; returns what was left for the first new
        one, of which only the offset channels count.

        It waits where the next key will stand, which has the same offset channels. So in each place these are those of
        the token before, whether it is taken or not, and at the first one zeros: a row may be cut anywhere, copied,
        padded or left empty, and nothing else must be kept.
        """
        positions, by_row = self.positions, self.positions.by_row
        if by_row is None:
            at = layer, slice(None), slice(positions.first, positions.first + 1)
            behind = replace(positions, first=positions.end, end=positions.end + 1)
        else:
            at = torch.full((1, 1), layer, device=last.device), positions.rows, by_row[:, :1]
            behind = replace(positions, by_row=by_row[:, -1:] + 1)
        before = self.k_cache[at].to(last.dtype)
        write_to_cache((self.k_cache,), layer, (last,), behind)
        return before

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """Write the new tokens' keys and values into a layer and attend to it: q (B, T, H, D) -> the same shape"""
        if uses_fa3(q):
            return flash_attn.flash_attn_with_kvcache(q, *self.get_layer_cache(layer), k=k, v=v,
                                                      cache_seqlens=self.cache_seqlens, window_size=(window, 0))
        write_to_cache((self.k_cache, self.v_cache), layer, (k, v), self.positions)
        if window not in self.masks:  # of all layers with this window
            self.masks[window] = find_mask(self.positions, q, self.k_cache, window)
        keys, mask = self.masks[window]
        k_cache, v_cache = (memory[layer, :, keys] for memory in (self.k_cache, self.v_cache))
        return attend_to_cache(q, k_cache, v_cache, mask).to(q.dtype)

    def get_layer_cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values, (B, T, H, D) each."""
        return self.k_cache[layer], self.v_cache[layer]

    def shift_ids(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) shifted by one: the first is the last one of the pass before, at first NO_TOKEN."""
        previous = torch.cat((self.last_ids, idx[:, :-1]), dim=1)
        self.last_ids.copy_(idx[:, -1:])    # in place: it may be part of a larger cache's
        return previous

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more in each row, when all layers have written them."""
        self.cache_seqlens += num_tokens
        if self.num_tokens is not None:
            self.num_tokens += num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` more in each row."""
        capacity = self.get_capacity()
        if self.num_tokens is not None and self.num_tokens + num_tokens > capacity:
            more = max(capacity, self.num_tokens + num_tokens - capacity)
            self.k_cache, self.v_cache = (grow_memory(c, 0, more) for c in (self.k_cache, self.v_cache))

    def prefill(self, other: "KVCache") -> None:
        """Start every row of this empty cache as a copy of the only row of `other`, or row by row of as many."""
        if self.num_tokens:
            raise ValueError(f"a cache that already holds {self.num_tokens} tokens can't be prefilled; reset it first")
        layers, B, _, *head_shape = self.k_cache.shape
        other_layers, other_B, _, *other_head_shape = other.k_cache.shape
        if (layers, head_shape) != (other_layers, other_head_shape) or other_B not in (1, B):
            raise ValueError(f"a cache of shape {tuple(self.k_cache.shape)} can't be prefilled from one of shape "
                             f"{tuple(other.k_cache.shape)}: layers, heads and head dim must agree, rows be 1 or equal")
        self.reserve(other.num_tokens)
        self.k_cache[:, :, :other.num_tokens + 1] = other.k_cache[:, :, :other.num_tokens + 1]
        self.v_cache[:, :, :other.num_tokens] = other.v_cache[:, :, :other.num_tokens]
        self.cache_seqlens.copy_(other.cache_seqlens.expand(B))
        self.num_tokens = other.num_tokens
        self.last_ids.copy_(other.last_ids.expand(B, -1))

    def reset(self) -> None:
        """Forget everything but keep the memory."""
        self.k_cache.zero_()
        self.v_cache.zero_()
        self.cache_seqlens.zero_()
        self.num_tokens = 0
        self.last_ids.fill_(NO_TOKEN)

    # What follows is for rows that begin and end at different times: the caller knows their lengths

    def view_rows(self, start: int, end: int, num_tokens: int) -> "KVCache":
        """Rows start to end - 1 as a cache that shares this one's memory; the longest of them holds `num_tokens`."""
        view = copy.copy(self)
        view.k_cache, view.v_cache = self.k_cache[:, start:end], self.v_cache[:, start:end]
        view.cache_seqlens = self.cache_seqlens[start:end]
        view.last_ids = self.last_ids[start:end]
        view.num_tokens = num_tokens
        return view

    def take_rows(self, rows: Tensor, lengths: Tensor, last_ids: Tensor) -> "KVCache":
        """A copy of these rows (R,), each as if it held its first tokens only.

        lengths, last_ids: of this cache's rows, (B,) tokens that they keep and (B, 1) the last one's id
        """
        taken = copy.copy(self)
        taken.k_cache, taken.v_cache = self.k_cache[:, rows], self.v_cache[:, rows]
        taken.cache_seqlens, taken.last_ids = lengths[rows], last_ids[rows]
        return taken

    def add_rows(self, num_rows: int) -> None:
        """Append empty rows."""
        self.k_cache, self.v_cache = (grow_memory(c, num_rows, 0) for c in (self.k_cache, self.v_cache))
        self.cache_seqlens = F.pad(self.cache_seqlens, (0, num_rows))
        self.last_ids = F.pad(self.last_ids, (0, 0, 0, num_rows), value=NO_TOKEN)

    def swap_rows(self, a: int, b: int, num_tokens: int) -> None:
        """Exchange two rows, of which the longer holds `num_tokens`."""
        for tensor in (self.k_cache[:, :, :num_tokens + 1], self.v_cache[:, :, :num_tokens]):
            saved = tensor[:, a].clone()
            tensor[:, a] = tensor[:, b]
            tensor[:, b] = saved
        for tensor in (self.cache_seqlens, self.last_ids):
            tensor[[a, b]] = tensor[[b, a]]

    def copy_row(self, source: int, target: int, num_tokens: int) -> None:
        """Give a row the keys and values of another's first tokens (see start_row for the rest)."""
        self.k_cache[:, target, :num_tokens + 1] = self.k_cache[:, source, :num_tokens + 1]
        self.v_cache[:, target, :num_tokens] = self.v_cache[:, source, :num_tokens]

    def start_row(self, row: int, num_tokens: int, last_id: int) -> None:
        """Let a row hold its first `num_tokens` only, the last of which has this id (NO_TOKEN where there is none)."""
        self.cache_seqlens[row] = num_tokens
        self.last_ids[row] = last_id


def make_memory(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Zeros (layers, B, T, H, D), not garbage: a short row is masked past its end, but a masked NaN is still NaN.

    A compiled step recompiles, for seconds, where a stride happens to be a multiple of the keys or rows in use. So an
    unused token pads each row, and another each layer.
    """
    layers, B, T, H, D = shape
    memory = torch.zeros((layers, B * (T + 1) + 1, H, D), device=device, dtype=dtype)
    return memory[:, :-1].unflatten(1, (B, T + 1))[:, :, :T]


def add_unused_token(memory: Tensor) -> Tensor:
    """The same memory with the unused token of each row: (layers, B, T + 1, H, D)."""
    layers, B, T, H, D = memory.shape
    return memory.as_strided((layers, B, T + 1, H, D), memory.stride(), memory.storage_offset())


def grow_memory(cache: Tensor, num_rows: int, num_tokens: int) -> Tensor:
    """The same with more rows, or with room for more tokens."""
    layers, B, T, H, D = cache.shape
    grown = make_memory((layers, B + num_rows, T + num_tokens, H, D), cache.device, cache.dtype)
    grown[:, :B, :T] = cache
    return grown
