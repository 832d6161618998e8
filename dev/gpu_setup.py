"""Shared by the GPU checks: their sizes, the line that a check reports, models, and measurements."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanochat.common import get_peak_memory_bytes, is_out_of_memory
from nanochat.gpt import GPT, GPTConfig
from nanochat.scaling import make_config
from nanochat.train import Batch, OutOfMemory


@dataclass(frozen=True)
class Check:
    """One line of the table."""
    name:    str
    status:  str                # ok, FAIL, absent (not available on this machine), skipped (no time left)
    detail:  str                # the measurement, or the error
    figures: dict = field(default_factory=dict)  # the same as values, units in the keys


@dataclass(frozen=True)
class Sizes:
    """The sizes of the checks."""
    T:             int
    vocab_size:    int
    head_dim:      int
    aspect_ratio:  int               # channels per layer
    depths:        tuple[int, ...]   # of the steps and saves; the first also compares attention backends
    resume_depth:  int
    steps:         int               # of a timed run
    max_rows:      int               # of a device batch; the search goes down from it
    loss_tokens:   int
    attention_T:   tuple[int, int]   # one a multiple of the kernels' tiles, one not
    matrices:      tuple[tuple[int, int, int], ...]   # (K, rows, cols) for Muon


FULL = Sizes(T=2048, vocab_size=32768, head_dim=128, aspect_ratio=64, depths=(12, 20), resume_depth=4, steps=30,
             max_rows=256, loss_tokens=16384, attention_T=(2048, 1000),
             matrices=((4, 768, 768), (4, 3072, 768), (4, 768, 3072), (4, 6, 12)))
TINY = Sizes(T=256, vocab_size=320, head_dim=16, aspect_ratio=16, depths=(2, 4), resume_depth=2, steps=4, max_rows=2,
             loss_tokens=512, attention_T=(256, 100), matrices=((2, 32, 32), (2, 64, 16)))


@dataclass(frozen=True)
class Setup:
    """The device of the checks, and how they use it."""
    sizes:       Sizes
    device:      torch.device
    dtype:       torch.dtype                # of the activations
    use_compile: bool
    backend:     str                        # the attention backend that a training run would choose
    out_dir:     Path
    rows:        Tensor                     # (R, T + 1) int64 token ids to train on

    def make_config(self, depth: int) -> GPTConfig:
        sizes = self.sizes
        return make_config(depth, vocab_size=sizes.vocab_size, sequence_len=sizes.T, head_dim=sizes.head_dim,
                           aspect_ratio=sizes.aspect_ratio)

    def make_model(self, depth: int) -> tuple[GPT, object]:
        """A seeded model and its optimizer, compiled as a training run compiles them."""
        torch.manual_seed(0)
        with self.device:
            model = GPT(self.make_config(depth), self.dtype)
        model.init_weights()
        if self.use_compile:
            model.compile_blocks()
        return model, model.setup_optimizer()

    def make_batch(self, num_rows: int, step: int = 0) -> Batch:
        """The rows of a step, on the CPU as a loader gives them; after the last row the first follows."""
        index = (torch.arange(num_rows) + step * num_rows) % len(self.rows)
        rows = self.rows[index]
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return Batch(rows[:, :-1], rows[:, 1:], None)


def make_synthetic_rows(sizes: Sizes, num_rows: int) -> Tensor:
    """(num_rows, T + 1) token ids whose frequencies follow Zipf's law, as those of text do."""
    rng = torch.Generator().manual_seed(0)
    exponents = torch.rand((num_rows, sizes.T + 1), generator=rng, dtype=torch.float64)
    return ((sizes.vocab_size + 1) ** exponents).long() - 1  # log-uniform over the vocabulary


def free_memory(device: torch.device) -> None:
    """Drop the tensors, compiled programs and peak-memory statistics of earlier checks."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def is_no_memory(error: Exception) -> bool:
    """Whether memory ran out, in a training step, which raises an exception of its own, or elsewhere."""
    return isinstance(error, OutOfMemory) or is_out_of_memory(error)


def measure_peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak device memory of a call, beyond the memory in use before it."""
    run()  # compiles, and allocates the buffers that stay
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return get_peak_memory_bytes(device) - before


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def judge(passed: bool) -> str:
    return "ok" if passed else "FAIL"
