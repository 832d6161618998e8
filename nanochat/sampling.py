"""Sampling: from logits to tokens, with temperature, top-k (Fan et al. 2018) and top-p (Holtzman et al. 2019) per row.

The random numbers are counter-based (Salmon et al. 2011): each token takes one, a hash of (seed, sample, index of the
token). There is no generator whose state other rows could change, so a row is the same text alone, in any batch, and on
any device.

Inverse transform sampling: the token is the one at which the cumulative probability passes the random number. The
cumulative sums are in fp64, on GPUs in fixed point, and in the vocabulary's order, in which ties have a defined place.
B rows, V vocabulary, N candidates.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError

MIN_TEMPERATURE = 1e-30  # dividing by a lower one might overflow, and it samples as 0 does
BLOCK_TOKENS = 128       # width of the vocabulary's blocks in a two-level sum or search
MIN_BLOCK_ROWS = 4       # fewer rows take argmax over the whole vocabulary
NUM_CANDIDATES = (64, 256, 1024)  # topk sizes, tried in turn; sorting the whole vocabulary takes one to two ms
FIXED_POINT_BITS = 42    # of a GPU's cumulative sums: weights of at most 1 fit into 63 bits up to 2^21 of them
MAX_TIES = 14            # expected ties with the last token of a top-k: bf16 has many equal logits


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a row."""
    temperature: float = 1.0          # 0: greedy
    top_k:       int | None = None    # the k likeliest tokens, ties with the last included; None or 0: all
    top_p:       float | None = None  # the likeliest tokens that reach this probability together; None or 1: all
    seed:        int = 42
    sample:      int = 0              # index of the sample; each sample of a seed has its own random numbers

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature} must be a finite number, 0 or more")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be 1 or more, or 0 for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")


def draw_uniform(sampling: Sampling, token_idx: int) -> float:
    """The random number in [0, 1) of a sample's token; a hash decorrelates neighbouring seeds."""
    digest = hashlib.blake2b(f"{sampling.seed}/{sampling.sample}/{token_idx}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def sample_rows(logits: Tensor, samplings: Sequence[Sampling], token_idxs: Sequence[int]) -> Tensor:
    """One token for each row of (B, V) logits, by that row's sampling parameters -> (B,).

    samplings:  Sampling, or any object with its fields
    token_idxs: index of each row's next token within its sample
    """
    if logits.device.type == "mps":  # has no fp64
        return sample_rows(logits.cpu(), samplings, token_idxs).to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a temperature below 1e-8 is 0 in fp16
    greedy, among_all, among_likeliest = [], [], []
    for i, sampling in enumerate(samplings):
        is_limited = 0 < (sampling.top_k or 0) < logits.size(1) or (sampling.top_p or 1) < 1
        (greedy if sampling.temperature == 0 else among_likeliest if is_limited else among_all).append(i)
    tokens = find_likeliest(logits) if greedy else logits.new_empty(len(logits), dtype=torch.long)
    for rows, sample in ((among_all, sample_among_all), (among_likeliest, sample_among_likeliest)):
        if rows:
            idx = torch.tensor(rows, device=logits.device)
            draws = torch.tensor([[draw_uniform(samplings[i], token_idxs[i])] for i in rows], dtype=torch.float64)
            tokens[idx] = sample(logits if len(rows) == len(logits) else logits[idx], [samplings[i] for i in rows],
                                 draws.to(logits.device))
    return tokens


def get_temperatures(samplings: Sequence[Sampling], like: Tensor) -> Tensor:
    """(B, 1), device and dtype of `like`."""
    values = [max(sampling.temperature, MIN_TEMPERATURE) for sampling in samplings]
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None].to(like)


def find_likeliest(logits: Tensor) -> Tensor:
    """Argmax of each row (B, V), the first one among ties -> (B,).

    In two levels, blocks first: torch's argmax over 32 rows takes a CPU 8 times as long, but less over a few rows.
    """
    if len(logits) < MIN_BLOCK_ROWS or logits.size(1) % BLOCK_TOKENS:
        return logits.argmax(dim=-1)
    blocks = logits.unflatten(1, (-1, BLOCK_TOKENS))
    block = blocks.amax(dim=-1).argmax(dim=-1)  # (B,)
    rows = torch.arange(len(logits), device=logits.device)
    return block * BLOCK_TOKENS + blocks[rows, block].argmax(dim=-1)


def sample_among_all(logits: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """Inverse transform sampling over the whole vocabulary, from draws (B, 1) in [0, 1) -> (B,).

    In two levels: cumulative sums over blocks, then within one block; over the whole vocabulary they take far longer.
    """
    if any(sampling.temperature != 1 for sampling in samplings):
        logits = logits / get_temperatures(samplings, logits)
    probs = F.softmax(logits, dim=-1)
    B, V = probs.shape
    if V % BLOCK_TOKENS:
        probs = F.pad(probs, (0, -V % BLOCK_TOKENS))
    blocks = probs.view(B, -1, BLOCK_TOKENS)
    ends = cumulate(blocks.sum(dim=-1))  # (B, blocks)
    target = draws * ends[:, -1:]
    block = find_passing(ends, target)  # (B, 1)
    inside = cumulate(blocks.gather(1, block[..., None].expand(-1, -1, BLOCK_TOKENS)).squeeze(1))  # (B, BLOCK_TOKENS)
    rest = (target - ends.gather(1, block) + inside[:, -1:]).clamp(min=0)
    return (block * BLOCK_TOKENS + find_passing(inside, rest)).squeeze(1)


def sample_among_likeliest(logits: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """The same for rows with top-k or top-p: tries the fewest candidates first, more where those don't decide."""
    B, V = logits.shape
    tokens = logits.new_empty(B, dtype=torch.long)
    undecided = list(range(B))
    for num_candidates in (*(n for n in NUM_CANDIDATES if n < V), V):
        rows = [i for i in undecided if num_candidates == V or (samplings[i].top_k or 0) + MAX_TIES <= num_candidates]
        if rows:
            some, idx = (logits, slice(None)) if len(rows) == B else (logits[rows], torch.tensor(rows))
            tokens[idx], decided = sample_among(num_candidates, some, [samplings[i] for i in rows], draws[idx])
            undecided = sorted(set(undecided) - set(itertools.compress(rows, decided.tolist())))
    return tokens


def sample_among(num_candidates: int, logits: Tensor, samplings: Sequence[Sampling],
                 draws: Tensor) -> tuple[Tensor, Tensor]:
    """A token per row (B, V) -> (B,), and whether no token outside the candidates can pass top-k and top-p -> (B,)."""
    B, V = logits.shape
    if num_candidates == V:
        lowest, _ = find_lowest(logits, logits.sort(dim=-1, descending=True).values, samplings)
        values, tokens = logits, torch.arange(V, device=logits.device).expand(B, -1)
        decided = torch.ones(B, dtype=torch.bool)
    else:
        values, tokens = logits.topk(num_candidates)  # (B, candidates), the likeliest first
        lowest, last_needed = find_lowest(logits, values, samplings)
        decided = (values[:, -1:] < last_needed).squeeze(1)
        tokens, order = tokens.sort(dim=-1)  # the vocabulary's order; topk's order of ties is undefined
        values = values.gather(1, order)
    weights = find_weights(values, logits, samplings) * (values >= lowest)
    ends = cumulate(weights)
    return tokens.gather(1, find_passing(ends, draws * ends[:, -1:])).squeeze(1), decided


def find_lowest(logits: Tensor, values: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """Per row (B, 1): the lowest logit that passes top-k and top-p, and the lowest logit needed to find it.

    Both are right if the candidates reach below the second one.

    logits: (B, V)
    values: (B, N), the N largest logits in descending order
    """
    V = logits.size(1)
    top_ks = [min(sampling.top_k or V, V) for sampling in samplings]
    ranks = torch.tensor(top_ks, device=logits.device)[:, None] - 1
    lowest = torch.where(ranks < V - 1, values.gather(1, ranks.clamp(max=values.size(1) - 1)), -float("inf"))
    if all(sampling.top_p is None for sampling in samplings):
        return lowest, lowest
    weights = find_weights(values, logits, samplings).double() * (values >= lowest)
    mass = weights.sum(dim=-1, keepdim=True)
    if V in top_ks:
        whole = find_weights(logits, logits, samplings).sum(dim=-1, keepdim=True, dtype=mass.dtype)
        mass = torch.where(ranks < V - 1, mass, whole)
    top_ps = [float("inf") if sampling.top_p in (None, 1) else sampling.top_p for sampling in samplings]
    wanted = mass * torch.tensor(top_ps, dtype=torch.float64, device=logits.device)[:, None]
    num_before = (cumulate(weights) < wanted).sum(dim=-1, keepdim=True)
    kept = torch.maximum(lowest, values.gather(1, num_before.clamp(max=values.size(1) - 1)))
    return kept, torch.where(ranks < V - 1, lowest, kept)  # top-p's mass is that of all tokens that pass top-k


def find_weights(values: Tensor, logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Probabilities of some of a row's logits (B, N), relative to that of its likeliest token."""
    largest = logits.amax(dim=-1, keepdim=True)
    return ((values - largest) / get_temperatures(samplings, values)).exp()


def cumulate(weights: Tensor) -> Tensor:
    """Cumulative sums of weights (B, N), each from 0 to 1 -> (B, N) fp64, which never falls along a row."""
    return weights.cumsum(dim=-1, dtype=torch.float64) if weights.device.type == "cpu" else cumulate_exactly(weights)


def cumulate_exactly(weights: Tensor) -> Tensor:
    """`cumulate` in fixed point. Sums of integers don't depend on their order, which changes from run to run on a GPU:
    CUDA has no deterministic cumsum of floats, and --deterministic refuses it."""
    whole = (weights.double() * 2**FIXED_POINT_BITS).round().long()
    return whole.cumsum(dim=-1).double() * 2**-FIXED_POINT_BITS


def find_passing(cumulative: Tensor, target: Tensor) -> Tensor:
    """Index where cumulative (B, N) passes target (B, 1) -> (B, 1); rounding never gives a token of probability 0."""
    return torch.searchsorted(cumulative, torch.minimum(target, cumulative[:, -1:] * (1 - 2**-50)), right=True)
