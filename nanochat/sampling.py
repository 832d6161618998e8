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
NUM_CANDIDATES = (64, 256, 1024)  # of the likeliest, in turn: sorting a whole vocabulary takes a millisecond or two
MAX_TIES = 14            # with the last of top-k that are expected: bf16 has many equal logits

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

    def is_limited(self, vocab_size: int) -> bool:
        """Whether it may leave a token out."""
        return 0 < (self.top_k or 0) < vocab_size or self.top_p is not None and self.top_p < 1


def draw_uniform(sampling: Sampling, token_idx: int) -> float:
    """The random number in [0, 1) of a sample's token; hashed, so that neighbouring seeds have nothing in common."""
    digest = hashlib.blake2b(f"{sampling.seed}/{sampling.sample}/{token_idx}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def sample_rows(logits: Tensor, samplings: Sequence[Sampling], token_idxs: Sequence[int]) -> Tensor:
    """One token for each row of (B, V) logits, by that row's settings -> (B,).

    token_idxs: which token of its sample each row is about to get
    """
    if logits.device.type == "mps":  # has no fp64
        return sample_rows(logits.cpu(), samplings, token_idxs).to(logits.device)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # fp16 has no temperature below 1e-8
    greedy, among_all, among_likeliest = [], [], []
    for i, sampling in enumerate(samplings):
        is_limited = sampling.is_limited(logits.size(1))
        rows = greedy if sampling.temperature == 0 else among_likeliest if is_limited else among_all
        rows.append(i)
    tokens = find_likeliest(logits) if greedy else logits.new_empty(len(logits), dtype=torch.long)
    for rows, sample in ((among_all, sample_among_all), (among_likeliest, sample_among_likeliest)):
        if rows:
            idx = torch.tensor(rows, device=logits.device)
            draws = [draw_uniform(samplings[i], token_idxs[i]) for i in rows]
            tokens[idx] = sample(logits if len(rows) == len(logits) else logits[idx], [samplings[i] for i in rows],
                                 make_column(draws, logits.device))
    return tokens


def make_column(values: Sequence[float], device: torch.device) -> Tensor:
    """(B, 1) in fp64."""
    return torch.tensor(values, dtype=torch.float64, device=device)[:, None]


def get_temperatures(samplings: Sequence[Sampling], like: Tensor) -> Tensor:
    """(B, 1) of the device and dtype of `like`."""
    return make_column([max(sampling.temperature, MIN_TEMPERATURE) for sampling in samplings], like.device).to(like)


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


def sample_among_all(logits: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """The token at which each row's summed probabilities pass its draw (B, 1) in [0, 1) -> (B,).

    Sums of blocks first, then within one block: summing up the whole vocabulary takes far longer.
    """
    if any(sampling.temperature != 1 for sampling in samplings):
        logits = logits / get_temperatures(samplings, logits)
    probs = F.softmax(logits, dim=-1)
    B, V = probs.shape
    if V % BLOCK_TOKENS:
        probs = F.pad(probs, (0, -V % BLOCK_TOKENS))
    blocks = probs.view(B, -1, BLOCK_TOKENS)
    ends = blocks.sum(dim=-1).double().cumsum(dim=-1)  # (B, blocks)
    target = draws * ends[:, -1:]
    block = find_passing(ends, target)  # (B, 1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK_TOKENS)).squeeze(1).double().cumsum(dim=-1)
    rest = (target - ends.gather(1, block) + inside[:, -1:]).clamp(min=0)
    return (block * BLOCK_TOKENS + find_passing(inside, rest)).squeeze(1)


def sample_among_likeliest(logits: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """The same where each row has a top-k or a top-p: looks at a row's likeliest first, at more where it must."""
    B, V = logits.shape
    tokens = logits.new_empty(B, dtype=torch.long)
    undecided = list(range(B))
    for num_candidates in (*(n for n in NUM_CANDIDATES if n < V), V):
        rows = [i for i in undecided if num_candidates == V or (samplings[i].top_k or 0) + MAX_TIES <= num_candidates]
        if rows:
            some, idx = (logits, slice(None)) if len(rows) == B else (logits[rows], torch.tensor(rows))
            tokens[idx], decided = sample_among(num_candidates, some, [samplings[i] for i in rows], draws[idx])
            done = {i for i, is_decided in zip(rows, decided.tolist(), strict=True) if is_decided}
            undecided = [i for i in undecided if i not in done]
    return tokens


def sample_among(num_candidates: int, logits: Tensor, samplings: Sequence[Sampling],
                 draws: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row (B, V) -> (B,), and whether it is sure that top-k and top-p leave in no other candidates."""
    B, V = logits.shape
    if num_candidates == V:
        lowest, _ = find_lowest(logits, logits.sort(dim=-1, descending=True).values, samplings)
        values, tokens = logits, torch.arange(V, device=logits.device).expand(B, -1)
        decided = torch.ones(B, dtype=torch.bool)
    else:
        values, tokens = logits.topk(num_candidates)  # (B, candidates), the likeliest first
        lowest, last_needed = find_lowest(logits, values, samplings)
        decided = (values[:, -1:] < last_needed).squeeze(1)
        tokens, order = tokens.sort(dim=-1)  # the vocabulary's order: that of topk leaves ties open
        values = values.gather(1, order)
    weights = find_weights(values, logits, samplings) * (values >= lowest)
    ends = weights.cumsum(dim=-1, dtype=torch.float64)
    return tokens.gather(1, find_passing(ends, draws * ends[:, -1:])).squeeze(1), decided


def find_lowest(logits: Tensor, values: Tensor, samplings: Sequence[Sampling]) -> tuple[Tensor, Tensor]:
    """The least likely logit of each row that its top-k and top-p leave in, and the least that one must know to tell.

    logits: (B, V); values: (B, N), the largest N of them in order -> (B, 1) each; both hold where values go on below
    the second
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
    wanted = mass * make_column(top_ps, logits.device)
    num_before = (weights.cumsum(dim=-1) < wanted).sum(dim=-1, keepdim=True)
    kept = torch.maximum(lowest, values.gather(1, num_before.clamp(max=values.size(1) - 1)))
    return kept, torch.where(ranks < V - 1, lowest, kept)  # top-p after top-k counts all that top-k leaves in


def find_weights(values: Tensor, logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Probabilities of some of a row's logits, (B, N), in units of that of its likeliest."""
    largest = logits.amax(dim=-1, keepdim=True)
    return ((values - largest) / get_temperatures(samplings, values)).exp()


def find_passing(cumulative: Tensor, target: Tensor) -> Tensor:
    """Where cumulative (B, N) passes target (B, 1) -> (B, 1); rounding doesn't lead past the last that adds to it."""
    return torch.searchsorted(cumulative, torch.minimum(target, cumulative[:, -1:] * (1 - 2**-50)), right=True)
