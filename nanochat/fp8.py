"""fp8 in training: the linear layers that read RMS-normed activations compute their forward product in 8 bits.

N tokens, K channels in, M channels out.

    x8 = e4m3(x s)    RMS norm bounds |x| by sqrt(K), so s <= 448 / sqrt(K) never overflows: no pass over x for its
                      largest value, and the cut into micro-batches doesn't matter
    w8 = e4m3(w t)    t from the largest weight; made once an optimizer step, kept, never saved
    y  = x8 w8^T / (s t), which Hopper sums in fewer bits than fp32: enough for a forward pass, and faster
    backward: dx = dy w8 / t, dw = dy^T x8 / s, products in bf16; x8 is kept for it in place of x, w8 of the cast of w

s and t are powers of two: a float loses nothing by them until it underflows, and x8 / s, w8 / t are exact in bf16.
q, k and v share one x8. c_proj layers stay in bf16, since their inputs have no bound, and gates. The fp32 masters stay
the parameters: checkpoints don't know of fp8, so a run may switch it whenever it is continued; evaluation, decoding and
export compute without it. In nanochat's public log fp8 gave 1.17 times the tokens per second at depth 26 on H100s,
about 1.05 times to equal capability, and was slower at depth 12; weights kept for a step are modded-nanogpt's. This
code has not run on a GPU: no figure is its own.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat.common import UserError, get_first_line
from nanochat.compilation import fused
from nanochat.config import GPTConfig
from nanochat.gpt import GPT, Linear
from nanochat.optim import MuonAdamW

E4M3, E4M3_MAX = torch.float8_e4m3fn, 448.0                 # sign, 4 bits of exponent, 3 of mantissa
NORMED_INPUTS = ("c_q", "c_k", "c_v", "c_fc", "lm_head")    # the layers that read what gpt.norm returns


class Float8(NamedTuple):
    """A tensor in 8 bits, data * unit; the methods but the first are a weight's, (M, K)."""
    data: Tensor    # row-major
    unit: Tensor    # fp32 scalar on the same device, a power of two

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.data.to(dtype) * self.unit.to(dtype)

    def quantize_input(self, x: Tensor) -> "Float8":
        """RMS-normed (..., K). The clamp is for bf16, which rounds some values up to above sqrt(K)."""
        scale = 2.0 ** math.floor(math.log2(E4M3_MAX / x.size(-1) ** 0.5))
        data = (x.detach() * scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
        return Float8(data, torch.full((), 1 / scale, device=x.device, dtype=torch.float32))

    def multiply(self, x8: "Float8", dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """x8 @ weight.T, (N, K) -> (N, M). Refuses on every device what CUDA refuses: a CPU takes any layout."""
        (a, a_unit), (b, b_unit) = x8, self
        for rule, is_kept in (
                ("K and M must be multiples of 16", a.size(1) % 16 == b.size(0) % 16 == 0),
                ("both must be row-major", a.is_contiguous() and b.is_contiguous()),    # b.T is column-major then
                ("one must be e4m3", E4M3 in (a.dtype, b.dtype)),
                ("units must be fp32 scalars", a_unit.dtype == b_unit.dtype == torch.float32 and a_unit.dim() == 0),
                ("units must be on the device", a_unit.device == b_unit.device == a.device)):
            if not is_kept:
                raise ValueError(f"fp8 product of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}: {rule}")
        return torch._scaled_mm(a, b.T, a_unit, b_unit, out_dtype=dtype, use_fast_accum=True, out=out)

    def apply(self, x: "Tensor | Fp8Input", weight: Tensor) -> Tensor:
        """x @ weight.T, (..., K) -> (..., M), with gradients for x and for the master weight, whose copy this is."""
        x, x8 = x if isinstance(x, Fp8Input) else (x, self.quantize_input(x))
        return _Product.apply(x, weight, *x8, *self)


class Fp8Input(NamedTuple):
    """The input of the layers that share it: they multiply x8, and its gradient goes to x."""
    x:  Tensor
    x8: Float8


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, x_data, x_unit, w_data, w_unit):
        x_data, ctx.weight_dtype = x_data.flatten(0, -2), weight.dtype    # (N, K)
        ctx.save_for_backward(x_data, x_unit, w_data, w_unit)
        return Float8(w_data, w_unit).multiply(Float8(x_data, x_unit), x.dtype).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, dy):
        x, weight = (Float8(*pair).dequantize(dy.dtype) for pair in (ctx.saved_tensors[:2], ctx.saved_tensors[2:]))
        return dy @ weight, (dy.flatten(0, -2).T @ x).to(ctx.weight_dtype), None, None, None, None


@fused
def quantize_weight(weight: Tensor, dtype: torch.dtype) -> Float8:
    """Of the weight as `dtype` has it, like the product that it replaces."""
    weight = weight.to(dtype).float()
    limit = E4M3_MAX / weight.abs().amax().clamp(min=1e-12)
    scale = limit.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)    # its exponent alone
    return Float8((weight * scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), 1 / scale)


class Fp8Linear(Linear):
    """Takes a Linear's place and its parameter: fp8 where gradients are wanted, without them as before."""

    def __init__(self, linear: Linear, dtype: torch.dtype):
        with torch.device("meta"):    # nothing to initialise
            super().__init__(linear.in_features, linear.out_features, linear.weight.dtype)
        self.weight, self.dtype = linear.weight, dtype
        for name, buffer in quantize_weight(self.weight.detach(), dtype)._asdict().items():
            self.register_buffer(name, buffer, persistent=False)

    fp8 = property(lambda self: Float8(self.data, self.unit))    # the weight

    def prepare(self, x: Tensor) -> Tensor | Fp8Input:
        return Fp8Input(x, self.fp8.quantize_input(x)) if torch.is_grad_enabled() else x

    def forward(self, x: Tensor | Fp8Input) -> Tensor:
        return self.fp8.apply(x, self.weight) if torch.is_grad_enabled() else super().forward(x)


def use_fp8(model: GPT, optimizer: MuonAdamW) -> None:
    """Train in fp8 from now on; weights are loaded, nothing is compiled. Each optimizer step renews the copies."""
    places = [(parent, name) for parent in model.modules() for name in NORMED_INPUTS if hasattr(parent, name)]
    layers = [Fp8Linear(getattr(parent, name), model.compute_dtype) for parent, name in places]
    for (parent, name), layer in zip(places, layers, strict=True):
        setattr(parent, name, layer)

    def renew(*_) -> None:    # in place, for compiled code may know the address
        for layer in layers:
            for kept, new in zip(layer.fp8, quantize_weight(layer.weight.detach(), layer.dtype), strict=True):
                kept.copy_(new)
    optimizer.register_step_post_hook(renew)


def choose_fp8(wanted: str, device: torch.device, dtype: torch.dtype, config: GPTConfig) -> tuple[bool, str]:
    """Whether to train in fp8, and why; `wanted` is auto, on or off."""
    if wanted != "on":
        return False, "asked for" if wanted == "off" else "auto: no GPU has shown yet that it pays; --fp8 on tries it"
    reason = find_obstacle(device) if dtype == torch.bfloat16 else "it goes with --dtype bfloat16 only"
    sizes = {"channels": config.n_embd, "of queries": config.query_dim, "of keys": config.kv_dim,
             "of the MLP": config.hidden_dim}
    if odd := [f"{size} {name}" for name, size in sizes.items() if size % 16]:
        reason = f"{', '.join(odd)} must be multiples of 16"
    if reason:
        raise UserError(f"--fp8 on can't be had here: {reason}; --fp8 off goes without")
    return True, "asked for" if device.type != "cpu" else "asked for; slow on a CPU, where it only shows the loss"


def find_obstacle(device: torch.device) -> str:
    """'' where this device computes fp8 products, else the reason."""
    if device.type != "cpu" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)
                                 or torch.version.hip):
        return "it needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
    try:
        eye = torch.eye(16, device=device)
        eye8 = quantize_weight.__wrapped__(eye, torch.bfloat16)
        return "" if torch.equal(eye8.multiply(eye8, torch.bfloat16), eye.bfloat16()) else "its products are wrong"
    except (RuntimeError, AttributeError) as error:    # another torch, another build
        return get_first_line(error)
