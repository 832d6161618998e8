"""A mixture of experts in the place of an MLP: more parameters for the same computation of each token.

N tokens, C channels, E routed experts of H hidden channels, k of them for each token; one shared expert for all.

    s   = sigmoid(router(x))                               (N, E), fp32
    ids = top-k of s + expert_bias                         the bias chooses, s alone weighs
    y   = shared(x) + sum over the k of s * expert(x)      expert(x) = down(relu(up(x))^2), as in the dense MLP

H is such that a token's k + 1 experts compute what the dense MLP would. The shared expert (DeepSeekMoE, arXiv
2401.06066) learns what all tokens need: without it nanochat's branch of July 2026 lost .0044 bits per byte. Scores are
sigmoids, as in DeepSeek-V3 (arXiv 2412.19437), not normalised over a token's experts: with k = 1 they would be 1, and
the router without a gradient. They weigh what comes out of an expert, not what goes in.

Dispatch: rows are sorted by expert, each expert multiplies its own in one grouped product, and they are put back. No
token is dropped. All copies are gathers, forward and backward, so that results repeat bit for bit; torch's own gradient
of an index adds with atomics on GPUs. The copies are the price, by estimate 42 C bytes per token and layer with k = 1
and 76 C with k = 2: a tenth to a fifth of a layer's time on a GPU. On a CPU experts win in seconds with 20 tokens for
each parameter at depth 2, where 8 are even, and with 8 at depth 4 (two seeds; dev/LOG.md, "Depth 4 with
experts, a second"); on a GPU that was not measured.

Balance: Quantile Balancing (Kimi K3's report, section 2.3.3; since 2026 marin's and torchtitan's) has no rate to tune.
Expert j is chosen by token i if and only if r_ij = alpha_i - s_ij < bias_j, with alpha_i the (k+1)-th largest s + bias.
So the k/E quantile of r over a step's tokens gives each expert its share, if alpha stayed; few updates are enough.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.common import get_first_line, print0, sum_over_ranks
from nanochat.config import GPTConfig
from nanochat.memory import HISTOGRAM_BINS as NUM_BINS  # of the histogram of r

FEW_ROWS = 64       # so many at most gather a matrix each where grouped products lack or wait, and need no buckets
NATS = 1_000_000    # entropy is summed in whole millionths, since whole numbers add up alike in any order


class Experts(nn.Module):
    """One matrix of each routed expert, which multiplies the rows that the expert has."""

    def __init__(self, num_experts: int, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, dtype=dtype))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x: (M, in), sorted by expert; ends: (E,) int32, the row after each expert's last -> (M, out)"""
        return _GroupedProduct.apply(x, self.weight.to(x.dtype), ends)

    def cast(self, dtype: torch.dtype) -> "Experts":
        """A copy for decoding, with the weights in the activations' dtype once and for all."""
        copied = Experts(0, 0, 0, dtype)
        copied.weight = nn.Parameter(self.weight.detach().to(dtype), requires_grad=False)
        return copied

    def refresh(self, weight: Tensor) -> None:
        """Give what `cast` returned other values."""
        self.weight.copy_(weight)


class MoE(nn.Module):
    def __init__(self, config: GPTConfig, shared: nn.Module, dtype: torch.dtype):
        """shared: the expert of all tokens, an MLP of `expert_dim` hidden channels"""
        super().__init__()
        E, C, H = config.num_experts, config.n_embd, config.expert_dim
        self.num_experts, self.top_k, self.shared = E, config.top_k, shared
        self.router = nn.Linear(C, E, bias=False, dtype=dtype)
        self.up, self.down = Experts(E, C, H, dtype), Experts(E, H, C, dtype)
        self.register_buffer("expert_bias", torch.empty(E, dtype=dtype))    # saved with the weights
        self.keeps_scores = False           # for a Balance
        self.scores: Tensor | None = None   # of the last forward pass

    def init_weights(self, init_linear: Callable[..., None], fc_init: float) -> None:
        """As the dense MLP; init_linear: (weight, inputs, factor)"""
        init_linear(self.router.weight, self.router.in_features)
        init_linear(self.up.weight, self.router.in_features, fc_init)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.expert_bias)

    def count_inactive(self) -> int:
        """Parameters of the experts that don't compute for a token."""
        numel = self.up.weight.numel() + self.down.weight.numel()
        return numel // self.num_experts * (self.num_experts - self.top_k)

    def forward(self, x: Tensor) -> Tensor:
        tokens, k = x.flatten(0, -2), self.top_k    # (N, C)
        scores = torch.sigmoid(F.linear(tokens.to(self.router.weight.dtype), self.router.weight))    # (N, E)
        ids = (scores.detach() + self.expert_bias).topk(k).indices    # (N, k)
        if self.keeps_scores and torch.is_grad_enabled():
            self.scores = scores.detach()
        gates = scores.gather(1, ids).to(x.dtype)    # (N, k)
        routed = run_experts(tokens, ids, gates, self.up, self.down, self.num_experts)
        return self.shared(x) + routed.view_as(x)


def run_experts(tokens: Tensor, ids: Tensor, gates: Tensor, up: Callable[[Tensor, Tensor], Tensor],
                down: Callable[[Tensor, Tensor], Tensor], num_experts: int) -> Tensor:
    """The dispatch: tokens (N, C), each through its experts ids (N, k), weighed by gates (N, k) -> (N, C).
    up, down: the grouped products, as Experts.forward"""
    k = ids.size(1)
    order, inverse, ends = torch.ops.nanochat.sort_by_expert(ids, num_experts)
    rows = _Permute.apply(tokens, order, inverse, k)    # (N k, C), sorted by expert
    rows = down(F.relu(up(rows, ends)).square(), ends)
    routed = _Permute.apply(rows, inverse, order, 1).unflatten(0, (-1, k))    # (N, k, C)
    return (routed * gates.unsqueeze(-1)).sum(1)


def sort_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids: (N, k) experts of each token -> order and its inverse, (N k,) places in ids, equal experts in the tokens'
    order; (E,) int32, the place after each expert's last"""
    sorted_ids, order = ids.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
    experts = torch.arange(num_experts, device=ids.device)
    return order, inverse, torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)


class _Permute(torch.autograd.Function):
    """Rows (N, C) -> k copies of each, in an order of the copies: (N k, C). With order and inverse exchanged, and one
    copy of each, it puts them back."""

    @staticmethod
    def forward(ctx, rows, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return rows.index_select(0, order // k if k > 1 else order)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.saved_tensors[0])
        return grad.unflatten(0, (-1, ctx.k)).sum(1) if ctx.k > 1 else grad, None, None, None


# The grouped product: each expert's rows by its own matrix


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight, ends)
        return torch.ops.nanochat.grouped_product(x, weight.mT, ends)

    @staticmethod
    def backward(ctx, grad):
        x, weight, ends = ctx.saved_tensors
        return (torch.ops.nanochat.grouped_product(grad, weight, ends),
                torch.ops.nanochat.grouped_outer(grad, x, ends), None)


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x: (M, K), sorted by expert; weight: (E, K, R) -> (M, R)"""
    if prefers_few_shapes(x):
        return bucketed_product(x, weight, ends)
    return F.grouped_mm(x.contiguous(), weight, offs=ends) if can_group(x, weight) else padded_product(x, weight, ends)


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The sum over each expert's rows of their outer products: (M, R), (M, K) -> (E, R, K); 0 without rows"""
    if prefers_few_shapes(a):
        return bucketed_outer(a, b, ends)
    return F.grouped_mm(a.contiguous().mT, b.contiguous(), offs=ends) if can_group(a, b) else padded_outer(a, b, ends)


def padded_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """grouped_product where torch has none, or one that waits: experts padded to one length, or each row's matrix."""
    if len(x) <= FEW_ROWS:    # reads no other expert's matrix, and nothing back from a GPU
        expert_of = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)    # (M,)
        return torch.bmm(x.unsqueeze(1), weight[expert_of]).squeeze(1)
    rows, is_row = find_rows(ends)
    return torch.bmm(x[rows], weight)[is_row]


def padded_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """grouped_outer where torch has none."""
    rows, is_row = find_rows(ends)
    return torch.bmm((a[rows] * is_row.unsqueeze(-1)).mT, b[rows])


def describe_products(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """How a training step multiplies each expert's rows, and why; calls as above take another way for themselves."""
    if prefers_few_shapes(torch.empty(FEW_ROWS + 1, 1, dtype=dtype, device=device)):
        return "bucketed", f"in {dtype} a CPU makes a kernel for each number of rows: experts have few numbers"
    reason = probe_grouped(device.type, dtype)
    if reason:
        return "padded", f"torch's grouped products don't serve: {reason}"
    return "grouped", "torch has them" + (", on this GPU one after the other" if waits_for_counts(device) else "")


def prefers_few_shapes(x: Tensor) -> bool:
    """Whether a kernel is made for each new number of rows, as oneDNN does in 16 bits on CPUs. To make it takes 3 to 10
    times as long as the product (dev/LOG.md, "What held experts back on CPUs")."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) and len(x) > FEW_ROWS


def find_buckets(ends: Tensor, num_rows: int) -> Iterator[tuple[int, slice, slice]]:
    """(expert, its rows, a slice around them), of each expert that has any; slices have one of 128 lengths at most."""
    step, start = -(-num_rows // 4096) * 32, 0
    for expert, stop in enumerate(ends.tolist()):
        if stop > start:
            size = min(num_rows, -(-(stop - start) // step) * step)
            first = min(start, num_rows - size)
            yield expert, slice(start, stop), slice(first, first + size)
        start = stop


def bucketed_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """grouped_product, an expert at a time, with some rows of the next one, which overwrites them."""
    y = x.new_empty(len(x), weight.size(2))
    for expert, own, more in find_buckets(ends, len(x)):
        if own.start == more.start:
            torch.mm(x[more], weight[expert], out=y[more])
        else:    # near the end the slice begins before them
            y[own] = (x[more] @ weight[expert])[own.start - more.start:own.stop - more.start]
    return y


def bucketed_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """grouped_outer, an expert at a time, with some rows of zeros: what isn't finite may spread to other experts, but
    a step with such values is lost anyway."""
    outer = a.new_zeros(len(ends), a.size(1), b.size(1))
    for expert, own, more in find_buckets(ends, len(a)):
        narrow = min(a, b, key=lambda rows: rows.size(1))
        rows = torch.zeros_like(narrow[more])
        rows[own.start - more.start:own.stop - more.start] = narrow[own]
        left, right = (rows, b[more]) if narrow is a else (a[more], rows)
        torch.mm(left.T, right, out=outer[expert])
    return outer


def find_rows(ends: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of each expert, padded to the most that one has: (E, most), and which of them are its own."""
    counts = ends.diff(prepend=ends.new_zeros(1))    # (E,)
    places = torch.arange(int(counts.max()), device=ends.device)    # a host sync: the largest count
    rows, is_row = (ends - counts).unsqueeze(1) + places, places < counts.unsqueeze(1)
    return rows.where(is_row, 0), is_row


def can_group(*operands: Tensor) -> bool:
    """Whether torch's grouped product takes them: rows of a multiple of 16 bytes, and see probe_grouped; few rows not
    where it waits."""
    if len(operands[0]) <= FEW_ROWS and waits_for_counts(operands[0].device):
        return False
    is_aligned = all(t.size(-1) * t.element_size() % 16 == 0 for t in operands)
    return is_aligned and probe_grouped(operands[0].device.type, operands[0].dtype) == ""


@functools.cache
def waits_for_counts(device: torch.device) -> bool:
    """Whether torch's grouped product reads the experts' counts on the host, which waits for the GPU and can't be
    captured, and multiplies one by one: on all NVIDIA GPUs but those of compute capability 9 and 10 (torch's
    GroupedBlas.cpp, 2.10 to 2.13)."""
    is_nvidia = device.type == "cuda" and not torch.version.hip
    return is_nvidia and torch.cuda.get_device_capability(device)[0] not in (9, 10)


@functools.cache
def probe_grouped(device_type: str, dtype: torch.dtype) -> str:
    """'' where torch's grouped products are right on this device, one expert without rows among them; else the reason,
    which is said once. They came with torch 2.10; GPUs need bf16, CPUs take fp32 and fp16, too."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(shape, generator=generator).to(device_type, dtype)
                       for shape in ((72, 64), (4, 64, 32), (72, 32)))
    ends = torch.tensor([40, 40, 64, 72], device=device_type, dtype=torch.int32)
    try:
        actual = F.grouped_mm(x, weight, offs=ends), F.grouped_mm(grad.mT, x, offs=ends)
        x, weight, grad = x.float(), weight.float(), grad.float()
        expected = padded_product(x, weight, ends), padded_outer(grad, x, ends)
        if all((ours.float() - theirs).norm() < 0.02 * theirs.norm()
               for ours, theirs in zip(actual, expected, strict=True)):
            return ""
        reason = "its results are wrong"
    except (RuntimeError, AttributeError, ValueError) as error:
        reason = get_first_line(error)[:100]
    if dtype != torch.float64:    # which nobody trains in
        print0(f"experts multiply one by one or in padded batches: grouped {dtype} products don't work here ({reason})")
    return reason


def _define_operations() -> torch.library.Library:
    """torch.ops.nanochat.*: opaque to the compiler, so that compiled and eager code compute alike. torch's own grouped
    product can't be traced in fp32, and what sorts would only be more kernels to compile."""
    library = torch.library.Library("nanochat", "FRAGMENT")
    for function, arguments, results, fake in (
            (sort_by_expert, "Tensor ids, int num_experts", "(Tensor, Tensor, Tensor)", lambda ids, num_experts: (
                ids.new_empty(ids.numel()), ids.new_empty(ids.numel()), ids.new_empty(num_experts, dtype=torch.int32))),
            (grouped_product, "Tensor x, Tensor weight, Tensor ends", "Tensor",
                lambda x, weight, _: x.new_empty(x.size(0), weight.size(2))),
            (grouped_outer, "Tensor a, Tensor b, Tensor ends", "Tensor",
                lambda a, b, ends: a.new_empty(ends.size(0), a.size(1), b.size(1)))):
        name = function.__name__
        library.define(f"{name}({arguments}) -> {results}")
        library.impl(name, function, "CompositeExplicitAutograd")
        library.impl(name, fake, "Meta")
    return library


_operations = _define_operations()    # registered as long as this lives


# Balance


class Balance:
    """Counts where the tokens of a step go, and sets the biases after it; evaluations and RL have none."""

    def __init__(self, layers: list[MoE]):
        self.layers, self.sums = layers, torch.empty(0)
        for layer in layers:
            layer.keeps_scores = True

    def begin(self) -> None:
        """Begin a step, which may be one that is tried again; a rank without rows counts nothing in it."""
        bias = self.layers[0].expert_bias
        # of each layer: histogram (E, bins), tokens of each expert (E), entropy, and what isn't counted
        self.sums = torch.zeros(len(self.layers), len(bias) * (NUM_BINS + 1) + 2, dtype=torch.int64, device=bias.device)

    @torch.no_grad()
    def count(self, targets: Tensor) -> None:
        """Count a micro-batch that has just been through the model. targets: (B, T), of which -1, padding, doesn't
        count."""
        k = self.layers[0].top_k
        is_counted = targets.flatten() >= 0    # (N,)
        for layer, sums in zip(self.layers, self.sums, strict=True):
            count_scores(layer.scores, layer.expert_bias, is_counted, k, sums)
            layer.scores = None

    @torch.no_grad()
    def update(self) -> Tensor:
        """Set the biases by what was counted since `begin`; returns run.ROUTING_FIGURES. Collective."""
        E, k = self.layers[0].num_experts, self.layers[0].top_k
        bias = torch.stack([layer.expert_bias for layer in self.layers])    # (L, E)
        sums = sum_over_ranks(self.sums)    # whole numbers: alike for any ranks and micro-batches
        histogram, loads, nats, _ = sums.split((E * NUM_BINS, E, 1, 1), dim=1)
        new_bias = find_quantiles(histogram.view(-1, E, NUM_BINS), bias, k / E)
        for layer, values in zip(self.layers, new_bias, strict=True):
            layer.expert_bias.copy_(values)
        loads = loads.float()
        mean = loads.mean(1)    # (L,)
        cv, most = loads.std(1, correction=0) / mean, loads.amax(1) / mean
        num_tokens = mean * E / k
        return torch.stack((cv.mean(), cv.max(), most.max(), (loads == 0).sum().float(),
                            (nats.squeeze(1) / NATS / num_tokens).mean(), new_bias.abs().max().float()))


def count_scores(scores: Tensor, bias: Tensor, is_counted: Tensor, k: int, sums: Tensor) -> None:
    """Add to one layer's sums, (E bins + E + 2), those of scores (N, E)."""
    E = len(bias)
    top = (scores + bias).topk(k + 1)
    r = top.values[:, -1:] - scores    # (N, E)
    low, width = find_bins(bias)
    bins = ((r - low) / width).long().clamp_(0, NUM_BINS - 1) + NUM_BINS * torch.arange(E, device=bias.device)
    loads = E * NUM_BINS + top.indices[:, :k]    # (N, k)
    places = torch.cat((bins, loads), dim=1).masked_fill_(~is_counted.unsqueeze(1), len(sums) - 1).flatten()
    sums.scatter_add_(0, places, torch.ones_like(places))
    share = scores / scores.sum(1, keepdim=True)
    nats = -torch.xlogy(share, share).sum(1)    # (N,)
    sums[-2] += (nats * is_counted * NATS).long().sum()


def find_bins(bias: Tensor) -> tuple[Tensor, Tensor]:
    """The lower edge and the width of the histogram's bins, (..., E) -> (..., 1): scores are from 0 to 1, so that r is
    within 1 of a bias."""
    low, high = bias.amin(-1, keepdim=True) - 1, bias.amax(-1, keepdim=True) + 1
    return low, (high - low) / NUM_BINS


def find_quantiles(histogram: Tensor, bias: Tensor, part: float) -> Tensor:
    """The value of r below which `part` of a layer's tokens are, by expert, between bins by a straight line; centred.
    histogram: (L, E, bins); bias: (L, E), of which the bins were made -> (L, E)"""
    low, width = find_bins(bias)
    below = histogram.cumsum(-1)
    target = below[..., -1] * part
    crossing = (below < target.unsqueeze(-1)).sum(-1, keepdim=True)    # the first bin that reaches it
    inside, until = (counts.gather(-1, crossing).squeeze(-1) for counts in (histogram, below))
    value = low + width * (crossing.squeeze(-1) + 1 - (until - target) / inside)
    return value - value.mean(-1, keepdim=True)


def make_balance(model: nn.Module) -> Balance | None:
    """None of a dense model, and where each token has all experts."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    return Balance(layers) if layers and layers[0].top_k < layers[0].num_experts else None
