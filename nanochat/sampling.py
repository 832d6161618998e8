"""From logits to tokens: temperature, top-k and top-p, each row with its own settings and its own random numbers.

A token needs one random number, which is a hash of (seed, sample, index of the token): there is no generator whose
state could depend on what else runs, so a row is the same text alone, in any batch, and on any device.

B rows, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError

MIN_TEMPERATURE = 1e-30  # what is colder is as good as 0, and dividing by it might overflow
BLOCK_TOKENS = 128       # of the vocabulary that are summed up, or searched, at once
MIN_BLOCK_ROWS = 4       # for which a search by blocks is worth its more operations
TOP_P_CANDIDATES = 1024  # of which the sum is tried first: sorting a whole vocabulary takes a millisecond or two

@dataclass(frozen=True)
class Sampling:
    """How a row chooses its tokens."""
    temperature: float = 1.0          # 0 takes the likeliest
    top_k:       int | None = None    # sample among the k likeliest, ties with the last included; None or 0 = all
    top_p:       float | None = None  # sample among the likeliest that reach this probability together; None or 1 = all
    seed:        int = 42
    sample:      int = 0              # which of a seed's samples this is; each has random numbers of its own

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be a finite number, 0 or more")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be 1 or more, or 0 for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")


def draw_uniform(sampling: Sampling, token_idx: int) -> float:
    """The random number in [0, 1) of a sample's token; hashed, so that neighbouring seeds have nothing in common."""
    digest = hashlib.blake2b(f"{sampling.seed}/{sampling.sample}/{token_idx}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def sample_rows(logits: Tensor, samplings: Sequence[Sampling], token_idxs: Sequence[int]) -> Tensor:
    """One token for each row of (B, V) logits, by that row's settings -> (B,).

    token_idxs: which token of its sample each row is about to get
    """
    random = [i for i, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not random:
        return find_likeliest(logits)
    chosen = [samplings[i] for i in random]
    rows = torch.tensor(random, device=logits.device)

    def column(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits.device)[:, None]  # (random rows, 1)
    random_logits = logits if len(random) == len(logits) else logits[rows]
    temperatures = [max(sampling.temperature, MIN_TEMPERATURE) for sampling in chosen]
    if set(temperatures) != {1.0}:
        random_logits = random_logits / column(temperatures, logits.dtype)
    probs = F.softmax(random_logits, dim=-1)
    filter_probs(probs, chosen)
    draws = [draw_uniform(samplings[i], token_idxs[i]) for i in random]
    tokens = invert_distribution(probs, column(draws, torch.float64))
    if len(random) == len(logits):
        return tokens
    return find_likeliest(logits).index_copy(0, rows, tokens)


def find_likeliest(logits: Tensor) -> Tensor:
    """The first of the largest of each row (B, V) -> (B,).

    The largest of each block first: argmax over 32 rows takes a CPU 8 times as long, though less over a few.
    """
    if len(logits) < MIN_BLOCK_ROWS or logits.size(1) % BLOCK_TOKENS:
        return logits.argmax(dim=-1)
    blocks = logits.unflatten(1, (-1, BLOCK_TOKENS))
    block = blocks.amax(dim=-1).argmax(dim=-1)  # (B,)
    rows = torch.arange(len(logits), device=logits.device)
    return block * BLOCK_TOKENS + blocks[rows, block].argmax(dim=-1)


def invert_distribution(probs: Tensor, draws: Tensor) -> Tensor:
    """The token at which each row's summed probabilities (B, V) pass the draw (B, 1) in [0, 1) of their total -> (B,).

    Sums of blocks first, then within one block: summing up the whole vocabulary takes far longer.
    """
    B, V = probs.shape
    if V % BLOCK_TOKENS:
        probs = F.pad(probs, (0, -V % BLOCK_TOKENS))
    blocks = probs.view(B, -1, BLOCK_TOKENS)

    def find(cumulative: Tensor, target: Tensor) -> Tensor:  # rounding must not lead past the last token
        return torch.searchsorted(cumulative, torch.minimum(target, cumulative[:, -1:] * (1 - 2**-50)), right=True)
    ends = blocks.sum(dim=-1).double().cumsum(dim=-1)  # (B, blocks)
    target = draws * ends[:, -1:]
    block = find(ends, target)  # (B, 1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK_TOKENS)).squeeze(1).double().cumsum(dim=-1)
    rest = (target - ends.gather(1, block) + inside[:, -1:]).clamp(min=0)
    return (block * BLOCK_TOKENS + find(inside, rest)).squeeze(1)


def filter_probs(probs: Tensor, samplings: Sequence[Sampling]) -> None:
    """Set to zero, in place, what top-k and top-p leave out; what remains isn't normalised again."""
    for row, sampling in zip(probs, samplings, strict=True):
        k = sampling.top_k if sampling.top_k and sampling.top_k < len(row) else None
        if k:
            row.masked_fill_(row < row.topk(k).values[-1], 0)
        if sampling.top_p is not None and sampling.top_p < 1:
            wanted = sampling.top_p * row.sum(dtype=torch.float64)
            likeliest = row.topk(min(k or TOP_P_CANDIDATES, len(row))).values
            if likeliest.sum(dtype=torch.float64) < wanted:
                likeliest = row.sort(descending=True).values
            num_kept = int((likeliest.cumsum(0, dtype=torch.float64) < wanted).sum()) + 1
            row.masked_fill_(row < likeliest[min(num_kept, len(likeliest)) - 1], 0)
