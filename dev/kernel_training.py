"""What a training step and a decoding step consist of beside attention and optimizer: products, fp8, the loss, norm and
rotary, a mixture of experts, sampling.

N tokens, C channels in, M channels out, V vocabulary, B rows, T tokens of a row, H heads of D, E experts of hidden size
F, k of them for each token. Weights are fp32 masters where training casts them in each micro-batch.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dev.kernel_ops import (
    TOLERANCES,
    Inputs,
    Operation,
    Scale,
    Setting,
    Shape,
    Variant,
    compiled,
    is_compiled,
    with_kernels,
)
from nanochat import fp8, moe
from nanochat.cross_entropy import linear_cross_entropy, plain_cross_entropy
from nanochat.gpt import apply_rotary, norm
from nanochat.sampling import Sampling, sample_among_all, sample_among_likeliest

LOSS_CHUNK = 1024     # tokens whose float64 logits stand in memory at once
NUM_EXPERTS = 8
TOP_K = 50            # of the samplers that have one
FP8_TOLERANCE = 0.05  # of products whose factors have 3 bits of mantissa: 2^-4 / sqrt(3) each


def count_tokens(scale: Scale) -> int:
    return scale.rows * scale.config.sequence_len


# ---------------------------------------------------------------------------------------------------------------------
# Products


def list_product_shapes(scale: Scale) -> dict[str, Shape]:
    """Of the linear layers."""
    N, C, hidden = count_tokens(scale), scale.config.n_embd, scale.config.hidden_dim
    return {name: {"N": N, "C": inputs, "M": outputs} for name, inputs, outputs in (
        ("q", C, C), ("c_fc", C, hidden), ("c_proj", hidden, C))}


def make_product_inputs(shape: Shape, setting: Setting) -> Inputs:
    N, C, M = shape["N"], shape["C"], shape["M"]
    return {"x": torch.randn(N, C, device=setting.device).to(setting.dtype),
            "weight": torch.randn(M, C, device=setting.device).to(setting.dtype)}


def list_fp8_shapes(scale: Scale) -> dict[str, Shape]:
    """Of the layers whose inputs are RMS-normed."""
    return {name: shape for name, shape in list_product_shapes(scale).items() if name != "c_proj"}


def make_fp8_inputs(shape: Shape, setting: Setting) -> Inputs:
    """x is RMS-normed; w8, unit: the weight in 8 bits, which is made once an optimizer step."""
    N, C, M = shape["N"], shape["C"], shape["M"]
    x = F.rms_norm(torch.randn(N, C, device=setting.device), (C,)).to(setting.dtype)
    weight = torch.randn(M, C, device=setting.device) / C**0.5
    w8, unit = fp8.quantize_weight.__wrapped__(weight, setting.dtype)
    return {"x": x, "weight": weight, "w8": w8, "unit": unit,
            "grad": torch.randn(N, M, device=setting.device).to(setting.dtype)}


def multiply_cast(x: Tensor, weight: Tensor, w8: Tensor, unit: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def multiply_fp8(x: Tensor, weight: Tensor, w8: Tensor, unit: Tensor) -> Tensor:
    return fp8.Float8(w8, unit).apply(x, weight)


def has_fp8(setting: Setting, shape: Shape) -> str:
    """An obstacle, as all of these."""
    return fp8.find_obstacle(setting.device)


# ---------------------------------------------------------------------------------------------------------------------
# Loss


def list_loss_shapes(scale: Scale) -> dict[str, Shape]:
    return {"head": {"N": count_tokens(scale), "C": scale.config.n_embd, "V": scale.config.vocab_size}}


def make_loss_inputs(shape: Shape, setting: Setting) -> Inputs:
    """Weights large enough that the softcap bends some logits; some tokens aren't learned from."""
    N, C, V, device = shape["N"], shape["C"], shape["V"], setting.device
    targets = torch.randint(V, (N,), device=device)
    targets[::7] = -1
    return {"x": torch.randn(N, C, device=device).to(setting.dtype),
            "weight": torch.randn(-(-V // 64) * 64, C, device=device) * 5 / C**0.5, "targets": targets,
            "vocab_size": V, "grad": torch.ones((), device=device)}


def find_loss(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """plain_cross_entropy of some tokens after others, whose logits aren't kept: those of all are large."""
    def sum_chunk(x: Tensor, targets: Tensor) -> Tensor:
        return plain_cross_entropy.__wrapped__(x, weight, targets, vocab_size, reduction="sum")
    chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
    return sum(checkpoint(sum_chunk, *chunk, use_reentrant=False) for chunk in chunks) / (targets >= 0).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Norm and rotary


def list_rotary_shapes(scale: Scale) -> dict[str, Shape]:
    config = scale.config
    return {"queries": {"B": scale.rows, "T": config.sequence_len, "H": config.n_head, "D": config.head_dim}}


def make_rotary_inputs(shape: Shape, setting: Setting) -> Inputs:
    B, T, H, D = (shape[name] for name in "BTHD")
    x, grad = (torch.randn(B, T, H, D, device=setting.device).to(setting.dtype) for _ in range(2))
    angles = torch.arange(T, device=setting.device)[:, None] / 100_000 ** (
        torch.arange(D // 2, device=setting.device) / (D // 2))    # (T, D/2)
    cos, sin = (table[None, :, None].to(setting.dtype) for table in (angles.cos(), angles.sin()))
    return {"x": x, "cos": cos, "sin": sin, "grad": grad}


def rotate_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As CausalSelfAttention.forward has it."""
    return norm(apply_rotary(x, cos, sin)) * 1.2


def define_rotate_norm(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """In complex numbers."""
    half = x.size(-1) // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, -sin)
    x = torch.cat((turned.real, turned.imag), dim=-1)
    return 1.2 * x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def count_rotary_flops(shape: Shape) -> int:
    """Of an element forward: 3 to turn it, 2 for its square, 2 to scale it; backward twice as many."""
    return 3 * 7 * shape["B"] * shape["T"] * shape["H"] * shape["D"]


# ---------------------------------------------------------------------------------------------------------------------
# Experts


def list_expert_shapes(scale: Scale) -> dict[str, Shape]:
    shapes = {}
    for k in (1, 2):
        config = replace(scale.config, num_experts=NUM_EXPERTS, top_k=k)
        shapes[f"k = {k}"] = {"N": count_tokens(scale), "C": config.n_embd, "F": config.expert_dim, "E": NUM_EXPERTS,
                              "k": k}
    return shapes


def make_expert_inputs(shape: Shape, setting: Setting) -> Inputs:
    """Loads are uneven, as scores are that aren't balanced; the last expert has no token."""
    (N, C, hidden, E, k), device = (shape[name] for name in "NCFEk"), setting.device
    scores = torch.rand(N, E, device=device) + torch.linspace(0.5, 0, E, device=device)
    scores[:, -1] = -1
    gates, ids = scores.topk(k)
    return {"x": F.rms_norm(torch.randn(N, C, device=device), (C,)).to(setting.dtype),
            "up": torch.randn(E, hidden, C, device=device) / C**0.5,
            "down": torch.randn(E, C, hidden, device=device) / hidden**0.5, "ids": ids,
            "gates": gates.to(setting.dtype), "grad": torch.randn(N, C, device=device).to(setting.dtype)}


def run_each_expert(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    """One expert after the other, each on its tokens."""
    out = torch.zeros_like(x)
    for expert in range(len(up)):
        tokens, place = (ids == expert).nonzero(as_tuple=True)
        hidden = F.relu(x[tokens] @ up[expert].to(x.dtype).T).square()
        out = out.index_add(0, tokens, hidden @ down[expert].to(x.dtype).T * gates[tokens, place, None])
    return out


def run_experts(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    """The model's dispatch and grouped products."""
    def multiply_by(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda rows, ends: moe._GroupedProduct.apply(rows, weight.to(rows.dtype), ends)
    return moe.run_experts(x, ids, gates, multiply_by(up), multiply_by(down), len(up))


class PaddedProduct(torch.autograd.Function):
    """moe's grouped product with padded batches in both passes."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight, ends)
        return moe.padded_product(x, weight.mT, ends)

    @staticmethod
    def backward(ctx, grad):
        x, weight, ends = ctx.saved_tensors
        return moe.padded_product(grad, weight, ends), moe.padded_outer(grad, x, ends), None


def run_padded(x: Tensor, up: Tensor, down: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    """The model's dispatch, products in batches that are padded to the longest."""
    def multiply_by(weight: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda rows, ends: PaddedProduct.apply(rows, weight.to(rows.dtype), ends)
    return moe.run_experts(x, ids, gates, multiply_by(up), multiply_by(down), len(up))


def has_grouped(setting: Setting, shape: Shape) -> str:
    if any(shape[name] * setting.dtype.itemsize % 16 for name in "CF"):
        return "needs rows of a multiple of 16 bytes"
    return moe.probe_grouped(setting.device.type, setting.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def list_sampling_shapes(scale: Scale) -> dict[str, Shape]:
    shape = {"B": scale.decode_rows, "V": scale.config.vocab_size}
    top_k = min(TOP_K, shape["V"])
    return {"all": shape | {"top_k": 0}, f"top {top_k}": shape | {"top_k": top_k}}


def make_sampling_inputs(shape: Shape, setting: Setting) -> Inputs:
    """Each draw is in the middle of a token's interval of cumulative probability, the widest of some that were drawn,
    so that rounding doesn't decide."""
    logits = 4 * torch.randn(shape["B"], shape["V"], device=setting.device).to(setting.dtype)
    ends = cumulate_kept(logits.double(), shape["top_k"])
    draws = torch.rand(shape["B"], 8, dtype=torch.float64, device=setting.device)
    tokens = torch.searchsorted(ends, draws, right=True)
    padded = F.pad(ends, (1, 0))
    start, end = padded.gather(1, tokens), padded.gather(1, tokens + 1)
    widest = (end - start).argmax(1, keepdim=True)
    return {"logits": logits, "draws": ((start + end) / 2).gather(1, widest), "top_k": shape["top_k"]}


def cumulate_kept(logits: Tensor, top_k: int) -> Tensor:
    """Cumulative probabilities (B, V) over the vocabulary, of the likeliest top_k tokens alone where that isn't 0."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -float("inf"))
    ends = logits.softmax(-1).cumsum(-1)
    return ends / ends[:, -1:]


def sample_plainly(logits: Tensor, draws: Tensor, top_k: int) -> Tensor:
    """The token at which the cumulative probability passes the draw."""
    ends = cumulate_kept(logits.to(torch.promote_types(logits.dtype, torch.float32)), top_k)
    return torch.searchsorted(ends.double(), draws, right=True).squeeze(1)


def sample(logits: Tensor, draws: Tensor, top_k: int) -> Tensor:
    """As sample_rows does it, but for the random numbers."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    samplings = [Sampling(top_k=top_k)] * len(logits)
    return (sample_among_likeliest if top_k else sample_among_all)(logits, samplings, draws)


# ---------------------------------------------------------------------------------------------------------------------


def lose_plainly(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    return plain_cross_entropy(x, weight, targets, vocab_size)


def lose(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    return linear_cross_entropy(x, weight, targets, vocab_size)


OPERATIONS = (
    Operation("linear", "products", "(x (N, C), weight (M, C)) -> x @ weight.T",
              list_product_shapes, make_product_inputs, F.linear, lambda s: 2 * s["N"] * s["C"] * s["M"], TOLERANCES,
              (Variant("torch", F.linear),)),
    Operation("fp8_linear", "products", "(x (N, C), weight (M, C) fp32, w8 and unit: weight in e4m3) -> x @ weight.T, "
              "with the gradients of x and weight",
              list_fp8_shapes, make_fp8_inputs, multiply_cast, lambda s: 6 * s["N"] * s["C"] * s["M"],
              {torch.bfloat16: FP8_TOLERANCE},
              (Variant("bf16", multiply_cast), Variant("bf16, compiled", compiled(multiply_cast), is_compiled),
               Variant("fp8", with_kernels(multiply_fp8, False), has_fp8),
               Variant("fp8, compiled", compiled(multiply_fp8), lambda *of: has_fp8(*of) or is_compiled(*of))),
              gradients=("x", "weight")),
    Operation("linear_cross_entropy", "products", "(x (N, C), weight (V or more, C) fp32, targets (N,), "
              "vocab_size) -> the mean cross-entropy of softcapped logits, with the gradients of x and weight",
              list_loss_shapes, make_loss_inputs, find_loss, lambda s: 6 * s["N"] * s["C"] * s["V"], TOLERANCES,
              (Variant("plain", with_kernels(lose_plainly, False)),
               Variant("plain, compiled", with_kernels(lose_plainly), is_compiled),
               Variant("fused", with_kernels(lose, False)),
               Variant("fused, compiled", with_kernels(lose), is_compiled)),
              gradients=("x", "weight"), result_dtype=torch.float32),
    Operation("moe", "products", "(x (N, C), up (E, F, C) fp32, down (E, C, F) fp32, ids (N, k), gates (N, k)) -> "
              "(N, C), the sum of down(relu(up(x))^2) of a token's experts by its gates, with gradients",
              list_expert_shapes, make_expert_inputs, run_each_expert,
              lambda s: 12 * s["N"] * s["k"] * s["C"] * s["F"], TOLERANCES,
              (Variant("one by one", run_each_expert), Variant("padded", run_padded),
               Variant("grouped", run_experts, has_grouped),
               Variant("grouped, compiled", compiled(run_experts), lambda *of: has_grouped(*of) or is_compiled(*of))),
              gradients=("x", "up", "down", "gates")),
    Operation("norm_rotary", "elementwise", "(x (B, T, H, D), cos (1, T, 1, D/2), sin) -> 1.2 norm(rotary(x)), with "
              "the gradient of x",
              list_rotary_shapes, make_rotary_inputs, define_rotate_norm, count_rotary_flops,
              {torch.bfloat16: 0.01, torch.float16: 0.002, torch.float32: 1e-5},
              (Variant("ours", rotate_norm), Variant("ours, compiled", compiled(rotate_norm), is_compiled)),
              gradients=("x",)),
    Operation("sampling", "elementwise", "(logits (B, V), draws (B, 1) from 0 to 1, top_k or 0) -> (B,) the token at "
              "which the cumulative probability, in the vocabulary's order, passes the draw",
              list_sampling_shapes, make_sampling_inputs, sample_plainly, lambda s: 3 * s["B"] * s["V"],
              dict.fromkeys(TOLERANCES, 0.0),
              (Variant("plain", sample_plainly), Variant("ours", sample)), result_dtype=torch.int64),
)
