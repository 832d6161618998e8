"""The head and its loss in one: softcapped cross-entropy of x @ weight.T, a chunk of tokens at a time.

N tokens, C channels, V vocabulary. With z = x @ weight.T, t = tanh(z / 15), e = exp(15 t), s = sum(e):

    nll = log(s) - 15 t[target]        d nll / d z = (e / s - [z is the target]) (1 - t^2)

Softcapped logits are bounded by 15, so exp needs no maximum taken first, and one pass over a chunk of logits
overwrites them with e (1 - t^2) and sums e. The division by s is left to the rows of the products with the weight and
with x, which are C wide, not V. Memory: one chunk of logits, whatever the batch; the gradients are made as it passes.
"""

import torch
from torch import Tensor

from nanochat.compilation import fused

LOGIT_SOFTCAP = 15.0
# Long enough to keep the matrix units busy, short enough that a chunk of logits stays small (dev/LOG.md, 2026-11-21)
CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, reduction: str = "mean",
                         weights: Tensor | None = None) -> Tensor:
    """Cross-entropy of softcapped logits x @ weight.T against `targets`, -1 = ignored; fp32 (fp64 for fp64 input).

    x:          (..., C) activations; the product is computed in their dtype
    weight:     (padded V, C) master weights; rows from vocab_size on are padding and get no gradient
    targets:    (...) token ids
    reduction:  'mean' over the targets that count (0 where none does), 'sum' of weights * nll, or 'none', shaped (...)
    weights:    (...) factors for 'sum'; None means 1
    """
    if (weights is not None) != (reduction == "sum" and weights is not None):
        raise ValueError(f"weights go with reduction 'sum', not {reduction!r}")
    rows, flat_targets = x.flatten(0, -2), targets.flatten()
    counted = flat_targets >= 0
    coef = counted.to(torch.promote_types(x.dtype, torch.float32))  # d loss / d nll of each token
    if reduction == "none":
        nll = _TokenLosses.apply(rows, weight, flat_targets, vocab_size)
        return nll.view(targets.shape)
    if reduction == "mean":
        coef = coef / counted.sum().clamp(min=1)
    elif reduction != "sum":
        raise ValueError(f"loss_reduction must be mean, sum or none, not {reduction!r}")
    elif weights is not None:
        coef = coef * weights.flatten()
    if not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad)):
        return (coef * compute_token_losses(rows, weight, flat_targets, vocab_size)).sum()
    return _WeightedLoss.apply(rows, weight, flat_targets, vocab_size, coef)


LOSSES = {"fused": linear_cross_entropy, "plain": linear_cross_entropy}


class _WeightedLoss(torch.autograd.Function):
    """sum(coef * nll). The coefficients are known in the forward pass, so the gradients are made there, once."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, coef):
        nll, dx, dw = compute_losses_and_grads(x, weight, targets, vocab_size, coef)
        ctx.save_for_backward(dx, dw)
        return (coef * nll).sum()

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad), dw.mul_(grad), None, None, None


class _TokenLosses(torch.autograd.Function):
    """nll per token. What each is worth is known in the backward pass only, so the logits are made again there."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size):
        ctx.save_for_backward(x, weight, targets)
        ctx.vocab_size = vocab_size
        return compute_token_losses(x, weight, targets, vocab_size)

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets = ctx.saved_tensors
        _, dx, dw = compute_losses_and_grads(x, weight, targets, ctx.vocab_size, grad * (targets >= 0))
        return dx, dw, None, None


def compute_token_losses(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """nll of each token, (N,), 0 where ignored."""
    head = weight[:vocab_size].to(x.dtype)
    losses = []
    for x_chunk, target_chunk in zip(x.split(_chunk_tokens(x)), targets.split(_chunk_tokens(x)), strict=True):
        losses.append(_score_logits(x_chunk @ head.T, target_chunk))
    return torch.cat(losses)


def compute_losses_and_grads(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int,
                             coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """nll (N,), and the gradients of sum(coef * nll) with respect to x (N, C) and weight (padded V, C)."""
    head = weight[:vocab_size].to(x.dtype)  # (V, C)
    nll, dx, dw = torch.empty_like(coef), torch.empty_like(x), torch.zeros_like(weight)
    chunk_tokens = _chunk_tokens(x)
    logits_buffer = x.new_empty(min(chunk_tokens, len(x)), vocab_size)
    for start in range(0, len(x), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        x_chunk, target = x[rows], targets[rows]
        logits = torch.mm(x_chunk, head.T, out=logits_buffer[:len(x_chunk)])  # (n, V)
        index = target.clamp(min=0)[:, None]
        target_t = torch.tanh(logits.gather(1, index).to(coef.dtype) / LOGIT_SOFTCAP)[:, 0]  # (n,)
        u, sum_e = _softcap_exp(logits)  # u is e (1 - t^2), over the logits' own memory
        unit = sum_e if x.dtype == torch.float16 else torch.ones_like(sum_e)  # what _softcap_exp divided u by
        target_u = ((LOGIT_SOFTCAP * target_t).exp() - sum_e) / unit * (1 - target_t.square())
        u[torch.arange(len(u), device=u.device), index[:, 0]] = target_u.to(u.dtype)
        nll[rows] = (sum_e.log() - LOGIT_SOFTCAP * target_t) * (target >= 0)
        scale = (coef[rows] * unit / sum_e)[:, None]
        dx[rows] = (u @ head) * scale
        dw[:vocab_size] += u.T @ (x_chunk * scale).to(x.dtype)
    return nll, dx, dw


def _chunk_tokens(x: Tensor) -> int:
    """Tokens in a chunk: the fewest chunks of equal size within the device's limit, so that few shapes compile."""
    num_chunks = -(-len(x) // CHUNK_TOKENS.get(x.device.type, 4096)) or 1
    return -(-len(x) // num_chunks) or 1


@fused
def _softcap_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Replace (n, V) logits by e (1 - t^2) in place; also the sums of e, (n,), in at least fp32.

    fp16 can't hold e, which reaches exp(15): there the result is divided by the sum.
    """
    t = _tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / LOGIT_SOFTCAP, logits)
    e = torch.exp(LOGIT_SOFTCAP * t)
    sum_e = e.sum(-1)
    u = e * (1 - t * t)
    if logits.dtype == torch.float16:
        u = u / sum_e[:, None]
    return logits.copy_(u), sum_e


def _tanh(z: Tensor, like: Tensor) -> Tensor:
    """tanh; for bf16 on a CPU by Lambert's continued fraction, three times faster than the library's.

    Its error, under 1.1e-4 everywhere and 3e-7 for |z| < 2, is far below bf16's rounding of the logits.
    """
    if like.dtype != torch.bfloat16 or like.device.type != "cpu":
        return torch.tanh(z)
    z = z.clamp(-4.97, 4.97)
    s = z * z
    return (z * (135135 + s * (17325 + s * (378 + s))) / (135135 + s * (62370 + s * (3150 + 28 * s)))).clamp(-1, 1)


@fused
def _score_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """nll (n,) of (n, V) logits, 0 where the target is -1."""
    capped = LOGIT_SOFTCAP * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / LOGIT_SOFTCAP)
    target = capped.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return (capped.exp().sum(-1).log() - target) * (targets >= 0)
