"""Bits per byte of a language model on text, and of two byte models that any language model must beat.

The validation rows come from dataloader.validation_batches, the same whatever the ranks and the batch.
"""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat.common import get_ranks, sum_over_ranks
from nanochat.train import Batch


@dataclass(frozen=True)
class LossEval:
    """The sums behind bits per byte, over all ranks."""
    nats:       float   # over the targets that count bytes
    num_bytes:  int     # UTF-8 bytes of those targets
    num_tokens: int

    @property
    def bpb(self) -> float:
        return self.nats / (math.log(2) * self.num_bytes) if self.num_bytes else float("nan")


@torch.no_grad()
def evaluate_loss(model, batches: Iterable[Batch], token_bytes: Tensor, num_tokens: int | None = None) -> LossEval:
    """Sum the loss over `batches`. Collective: all ranks call it, with equally many batches.

    token_bytes: (V,) UTF-8 length of each token; tokens of 0 bytes (the special ones) don't count
    num_tokens:  at most, all ranks together, rounded down to whole batches; None = all
    """
    device = model.get_device()
    token_bytes = token_bytes.to(device)
    sums = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    num_seen, world_size, was_training = 0, get_ranks().world_size, model.training
    model.eval()
    # On a CPU, compiling for the shapes of an evaluation takes longer than most evaluations
    with torch.compiler.set_stance("force_eager") if device.type == "cpu" else contextlib.nullcontext():
        for batch in batches:
            num_seen += batch.inputs.numel() * world_size
            if num_tokens is not None and num_seen > num_tokens:
                break
            batch = batch.to(device)
            nll = model(batch.inputs, batch.targets, loss_reduction="none")  # (B, T)
            num_bytes = token_bytes[batch.targets.clamp(min=0)] * (batch.targets >= 0)  # (B, T)
            counted = num_bytes > 0
            sums += torch.stack([(nll * counted).sum().to(sums.device).double(), num_bytes.sum().to(sums.device),
                                 counted.sum().to(sums.device)])
    model.train(was_training)
    nats, num_bytes, num_counted = sum_over_ranks(sums).tolist()
    return LossEval(nats, int(num_bytes), int(num_counted))


def evaluate_bpb(model, batches: Iterable[Batch], num_tokens: int | None, token_bytes: Tensor) -> float:
    """Bits per byte on `batches`, comparable across tokenizers; lower is better. Arguments as of evaluate_loss."""
    return evaluate_loss(model, batches, token_bytes, num_tokens).bpb


def compute_byte_bpb(train_texts: Iterable[str], val_texts: Iterable[str]) -> dict[str, float]:
    """Bits per byte on `val_texts` of unigram and bigram byte models fitted to `train_texts`, add-one smoothed."""
    singles, pairs = np.ones(256), np.ones((256, 256))
    for text in train_texts:
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        singles += np.bincount(data, minlength=256)
        pairs += np.bincount(data[:-1] * 256 + data[1:], minlength=65536).reshape(256, 256)
    unigram_bits = -np.log2(singles / singles.sum())                      # (256,)
    bigram_bits = -np.log2(pairs / pairs.sum(1, keepdims=True))              # (256 before, 256)
    sums = np.zeros(3)
    for text in val_texts:
        data = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
        if len(data):
            pair_bits = unigram_bits[data[0]] + bigram_bits[data[:-1], data[1:]].sum()
            sums += unigram_bits[data].sum(), pair_bits, len(data)
    num_bytes = max(sums[2], 1)
    return {"unigram_byte_bpb": sums[0] / num_bytes, "bigram_byte_bpb": sums[1] / num_bytes}
