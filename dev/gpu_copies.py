"""Weights cast once an optimizer step: each linear layer keeps a copy of its weight in the compute dtype.

K channels in, M channels out.

A Linear casts its fp32 weight in each forward pass. Beside the products a micro-batch moves 24 bytes a weight: 6 for
this cast, 6 for that of the gradient to fp32, 12 to add this to weight.grad. A copy saves the first 6, for one cast
after each update, by the hook that renews fp8's copies too; with one micro-batch a step it saves nothing. Results stay
the same bit for bit: the products read the same bf16 numbers, and the gradient takes the same way.

Without gradients (evaluation, decoding, RL's samples) a layer casts its master as before, so that a copy can be stale
only in training, where nothing but the optimizer changes weights. The head is left out: the loss casts it.

On a CPU no gain could be measured, and on an H100 the cast of depth 24 should take 0.2% of a micro-batch of 65,536
tokens (an estimate: 4.1 GB at 3 TB/s). So it isn't in the package: dev/gpu_check.sh times it, as the build "copies".
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.gpt import GPT, Linear
from nanochat.memory import Memory
from nanochat.optim import MuonAdamW


class CopiedLinear(Linear):
    """Takes a Linear's place and its parameter."""

    def __init__(self, linear: Linear, dtype: torch.dtype):
        with torch.device("meta"):    # nothing to initialise
            super().__init__(linear.in_features, linear.out_features, linear.weight.dtype)
        self.weight = linear.weight
        self.register_buffer("copy", linear.weight.detach().to(dtype), persistent=False)    # (M, K)

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.copy) if torch.is_grad_enabled() else super().forward(x)


class _Product(torch.autograd.Function):
    """x @ copy.T, (..., K) -> (..., M), with gradients for x and for the master, whose copy this is."""

    @staticmethod
    def forward(ctx, x, weight, copy):
        ctx.save_for_backward(x, copy)
        ctx.weight_dtype = weight.dtype
        return F.linear(x, copy)

    @staticmethod
    def backward(ctx, dy):
        x, copy = ctx.saved_tensors
        return dy @ copy, (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(ctx.weight_dtype), None


def use_copies(model: GPT, optimizer: MuonAdamW) -> None:
    """Train with copies from now on; weights are loaded, nothing is compiled. Each optimizer step renews the copies."""
    places = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
              if type(child) is Linear and child is not model.lm_head and child.weight.dtype != model.compute_dtype]
    layers = [CopiedLinear(child, model.compute_dtype) for _, _, child in places]
    for (parent, name, _), layer in zip(places, layers, strict=True):
        setattr(parent, name, layer)
    copies, weights = [layer.copy for layer in layers], [layer.weight.detach() for layer in layers]

    def renew(*_) -> None:    # in place, for compiled code may know the address
        if layers:
            torch._foreach_copy_(copies, weights)
    optimizer.register_step_post_hook(renew)


def predict_peak(memory: Memory) -> int:
    """Peak bytes of a step with copies, of the prediction without: the casts that autograd keeps until the backward
    pass has read them are now there in the update, too."""
    return max(memory.peak, memory.phases["update"] + memory.activations["weights in the compute dtype"])
