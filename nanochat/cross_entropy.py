"""The loss: cross-entropy of the softcapped logits x @ weight.T, written plainly and fused; its scale in fp16.

N tokens, C channels, V vocabulary.

`plain_cross_entropy` is the definition, and the place to try another training loss (a z-loss, label smoothing): --loss
plain. Evaluation always computes the fused one, so that bits per byte stay comparable.
`linear_cross_entropy` is the default: the same loss a chunk of tokens at a time, gradients included. With
z = x @ weight.T, t = tanh(z / 15), e = exp(15 t), s = sum(e):

    nll = log(s) - 15 t[target]        d nll / d z = (e / s - [z is the target]) (1 - t^2)

Softcapped logits are bounded by 15, so exp needs no maximum taken first: one pass over a chunk of logits overwrites
them with e (1 - t^2) and sums e. Without a softcap t is z / 15 itself, its slope 1, and the maximum is taken. The
division by s is left to the rows of the products with the weight and with x, which are C wide, not V. Memory holds one
chunk of logits, whatever the batch: training at depth 6 took 30% of what the plain loss takes, and 94% of what
torch.compile makes of that (dev/LOG.md, "Head and loss").
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError
from nanochat.compilation import fused
from nanochat.config import GPTConfig
from nanochat.memory import CHUNK_TOKENS, CPU_EXP_TOKENS, get_even_size

MAX_FUSED_CAP = 64.0    # whose exp, summed over a vocabulary, fits fp32


def softcap(logits: Tensor, cap: float = GPTConfig.softcap) -> Tensor:
    """cap tanh(logits / cap), in at least fp32; a cap of 0 is none.

    The softcap (Gemma 2, arXiv 2408.00118) bounds every logit: none runs away, and exp can't overflow fp32. In
    nanochat's public log (2026-03-02) 20 was better than 15 by 0.001 nats at depth 24; not tried here.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not cap:
        return logits
    # As a sigmoid, since tanh(z) = 2 * sigmoid(2z) - 1: on CPUs torch's tanh takes 5 times as long
    z = logits * (2 / cap)
    floor = z.new_full((), -cap)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.add(floor, torch.sigmoid(z), alpha=2 * cap)
    return torch.add(floor, z.sigmoid_(), alpha=2 * cap, out=z)  # in place: many logits exceed the caches


def _scaled_tanh(logits: Tensor, cap: float, is_fast: bool = False) -> Tensor:
    """t, in at least fp32: the fused loss's softcap is cap t, its derivative 1 - t^2."""
    is_rational = is_fast and logits.dtype == torch.bfloat16 and logits.device.type == "cpu"
    tanh = _rational_tanh if is_rational else torch.tanh
    # the argument has no name here: its memory is free as soon as `tanh` has read it
    return tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)


def _rational_tanh(z: Tensor) -> Tensor:
    """Lambert's continued fraction, three times faster on a CPU than the library's tanh. Its error, under 1.1e-4
    everywhere and 3e-7 for |z| < 2, is far below bf16's rounding of the logits."""
    z = z.clamp(-4.97, 4.97)
    s = z * z
    return (z * (135135 + s * (17325 + s * (378 + s))) / (135135 + s * (62370 + s * (3150 + 28 * s)))).clamp(-1, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The losses. Both take and give the same:
#
#   x:          (..., C) activations; the product is computed in their dtype
#   weight:     (padded V, C) master weights; rows from vocab_size on are padding and get no gradient
#   targets:    (...) token ids, -1 where nothing is to be learned
#   cap:        of the softcap; 0: none
#   reduction:  'mean' over the targets that count (0 where none does), 'sum' of weights * nll, or 'none', shaped (...)
#   weights:    (...) factors for 'sum'; None means 1
#   fp8:        an fp8.Float8 of the weight, for the product where gradients are wanted; None: in the dtype of x
#   returns:    nats, fp32 (fp64 for fp64 input)


@fused
def plain_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, cap: float = GPTConfig.softcap,
                        reduction: str = "mean", weights: Tensor | None = None, fp8=None) -> Tensor:
    """The definition: the logits of all tokens at once."""
    if fp8 is None or not torch.is_grad_enabled():
        logits = softcap(F.linear(x, weight[:vocab_size].to(x.dtype)), cap)  # (..., V)
    else:
        logits = softcap(fp8.apply(x, weight)[..., :vocab_size], cap)
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=-1, reduction="none")  # (N,)
    coef = _make_coefficients(targets, reduction, weights, nll.dtype)
    return nll.view(targets.shape) if coef is None else (coef * nll).sum()


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, *, cap: float = GPTConfig.softcap,
                         reduction: str = "mean", weights: Tensor | None = None, fp8=None) -> Tensor:
    """The fused loss: head, softcap and cross-entropy a chunk of tokens at a time."""
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    # No stage learns from "none", and the fused gradients need the coefficients; exp of a large cap overflows fp32
    if needs_grad and (reduction == "none" or cap > MAX_FUSED_CAP):
        return plain_cross_entropy(x, weight, targets, vocab_size, cap=cap, reduction=reduction, weights=weights,
                                   fp8=fp8)
    coef = _make_coefficients(targets, reduction, weights, torch.promote_types(x.dtype, torch.float32))
    rows, flat_targets = x.flatten(0, -2), targets.flatten()
    if needs_grad:
        return _WeightedLoss.apply(rows, weight, flat_targets, vocab_size, cap, coef, fp8)
    head, chunk_tokens = weight[:vocab_size].to(x.dtype), get_even_size(len(rows), CHUNK_TOKENS[x.device.type])
    nll = torch.cat([_score_logits(x_chunk @ head.T, target, cap) for x_chunk, target
                     in zip(rows.split(chunk_tokens), flat_targets.split(chunk_tokens), strict=True)])
    return nll.view(targets.shape) if coef is None else (coef * nll).sum()


LOSSES = {"fused": linear_cross_entropy, "plain": plain_cross_entropy}


def _make_coefficients(targets: Tensor, reduction: str, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """d loss / d nll of each token, (N,); None for reduction 'none', where only the caller knows it."""
    if reduction not in ("mean", "sum", "none") or weights is not None and reduction != "sum":
        raise ValueError(f"loss_reduction must be mean, sum or none, and weights go with sum: not {reduction!r}"
                         f"{'' if weights is None else ' with weights'}")
    if reduction == "none":
        return None
    counted = targets.flatten() >= 0
    coef = counted.to(dtype)
    if reduction == "mean":
        return coef / counted.sum().clamp(min=1)
    return coef if weights is None else coef * weights.flatten()


class _WeightedLoss(torch.autograd.Function):
    """sum(coef * nll). The coefficients are known in the forward pass, so the gradients are made there, once."""

    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, cap, coef, fp8):
        head = weight[:vocab_size].to(x.dtype) if fp8 is None else fp8.dequantize(x.dtype)[:vocab_size]  # (V, C)
        nll, dx = torch.empty_like(coef), torch.empty_like(x)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # RL leaves the head as it is
        chunk_tokens = get_even_size(len(x), CHUNK_TOKENS[x.device.type])
        logits_buffer = x.new_empty(min(chunk_tokens, len(x)), vocab_size if fp8 is None else len(weight))
        for start in range(0, len(x), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            x_chunk, target = x[rows], targets[rows]
            if fp8 is None:
                logits = torch.mm(x_chunk, head.T, out=logits_buffer[:len(x_chunk)])  # (n, V)
            else:
                x8 = fp8.quantize_input(x_chunk)
                x_chunk = x8.dequantize(x.dtype)  # for the gradient of the weight
                logits = fp8.multiply(x8, x.dtype, out=logits_buffer[:len(x_chunk)])[:, :vocab_size]  # (n, V)
            index = target.clamp(min=0)[:, None]
            target_z, slope = logits.gather(1, index)[:, 0], 1  # (n,)
            pieces = logits.split(get_even_size(len(logits), CPU_EXP_TOKENS)) if x.device.type == "cpu" else (logits,)
            if cap:
                target_t = _scaled_tanh(target_z, cap)
                target_z, slope, top = cap * target_t, 1 - target_t.square(), 0
                sum_e = torch.cat([_softcap_exp(piece, cap) for piece in pieces])
            else:
                sum_e, top = map(torch.cat, zip(*(_shifted_exp(piece) for piece in pieces), strict=True))
            u = logits  # now e, times its slope
            unit = sum_e if x.dtype == torch.float16 else torch.ones_like(sum_e)  # what u was divided by
            target_u = ((target_z - top).exp() - sum_e) / unit * slope
            u[torch.arange(len(u), device=u.device), index[:, 0]] = target_u.to(u.dtype)
            nll[rows] = (sum_e.log() + top - target_z) * (target >= 0)
            scale = (coef[rows] * unit / sum_e)[:, None]
            dx[rows] = (u @ head) * scale
            if dw is not None:
                dw[:vocab_size] += u.T @ (x_chunk * scale).to(x.dtype)
        ctx.save_for_backward(dx, dw)
        return (coef * nll).sum()

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad), None if dw is None else dw.mul_(grad), None, None, None, None, None


@fused
def _softcap_exp(logits: Tensor, cap: float) -> Tensor:
    """Replace (n, V) logits by e (1 - t^2) in place; returns the sums of e, (n,), in at least fp32.

    fp16 can't hold e, which reaches exp(15): there the logits' replacement is divided by the sum.
    """
    t = _scaled_tanh(logits, cap, is_fast=True)
    e = torch.exp(cap * t)
    sum_e = e.sum(-1)
    u = e * (1 - t * t)
    if logits.dtype == torch.float16:
        u = u / sum_e[:, None]
    logits.copy_(u)
    return sum_e


@fused
def _shifted_exp(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Without a softcap: replace (n, V) logits by e = exp(z - max z) in place; the sums of e and the maxima, (n,).

    fp16 can't hold the gradient at the target, e minus the sum, of a vocabulary over 65,504: divided as above.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top = z.amax(-1)
    e = torch.exp(z - top[:, None])
    sum_e = e.sum(-1)
    logits.copy_(e / sum_e[:, None] if logits.dtype == torch.float16 else e)
    return sum_e, top


@fused
def _score_logits(logits: Tensor, targets: Tensor, cap: float) -> Tensor:
    """nll (n,) of (n, V) logits, 0 where the target is -1."""
    index = targets.clamp(min=0)[:, None]
    if not cap:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (torch.logsumexp(z, -1) - z.gather(1, index)[:, 0]) * (targets >= 0)
    capped = cap * _scaled_tanh(logits, cap)
    target = capped.gather(1, index)[:, 0]
    return (capped.exp().sum(-1).log() - target) * (targets >= 0)


# ---------------------------------------------------------------------------------------------------------------------
# fp16

MIN_LOSS_SCALE = 2.0**-14  # overflow even at this scale means diverged gradients


class LossScaler:
    """Keeps fp16 gradients in range: the loss is multiplied by a scale that halves on overflow, and doubles after
    `growth_steps` steps without one. The decision follows from the gradient norm over all ranks, so they agree."""

    def __init__(self, scale: float = 2.0**16, growth_steps: int = 2000):
        self.scale, self.growth_steps, self.num_good_steps = scale, growth_steps, 0

    def update(self, overflowed: bool) -> None:
        self.num_good_steps = 0 if overflowed else self.num_good_steps + 1
        if overflowed:
            self.scale /= 2
            if self.scale < MIN_LOSS_SCALE:
                raise UserError("fp16 gradients overflow at any scale of the loss, so the run stopped; the last "
                                "checkpoint is intact, go on with another --dtype")
        elif self.num_good_steps % self.growth_steps == 0:
            self.scale *= 2
