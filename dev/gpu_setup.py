"""Shared by the GPU checks: their sizes, the line that a check reports, its guard, models, and measurements."""

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dev.gpu_copies import use_copies
from nanochat import fp8
from nanochat.common import get_first_line, is_out_of_memory
from nanochat.devices import get_peak_memory_bytes
from nanochat.gpt import GPT, GPTConfig
from nanochat.moe import make_balance
from nanochat.scaling import make_config
from nanochat.train import Batch, OutOfMemory


@dataclass(frozen=True)
class Candidate:
    """One option of a choice that this GPU decides."""
    choice:     str      # what is chosen: a flag, a constant
    option:     str
    cost:       float    # in the same unit for all options of the choice; less is better
    is_default: bool     # what a run uses today


@dataclass(frozen=True)
class Check:
    """One line of the table."""
    name:      str
    status:    str                # ok, FAIL, absent (not on this machine), no memory, skipped (no time left)
    detail:    str                # the measurement, or the error
    figures:   dict = field(default_factory=dict)  # the same as values, units in the keys
    candidate: Candidate | None = None


STATUSES = ("ok", "FAIL", "absent", "no memory", "skipped")


@dataclass(frozen=True)
class Sizes:
    """The sizes of the checks."""
    T:               int
    vocab_size:      int
    head_dim:        int
    aspect_ratio:    int               # channels per layer
    depths:          tuple[int, ...]   # of the steps, the most important first; the first also compares backends
    step_rows:       tuple[int, ...]   # of a micro-batch
    num_micro:       int               # micro-batches of a step
    resume_depth:    int
    max_rows:        int               # of a micro-batch in the other checks
    loss_tokens:     int               # of the fused loss against the plain one
    chunk_tokens:    tuple[int, ...]   # of a chunk of the fused loss
    micro_tokens:    int               # of products and of the loss in chunks: a micro-batch's
    attention_T:     tuple[int, int]   # one a multiple of the kernels' tiles, one not
    matrices:        tuple[tuple[int, int, int], ...] # (K, rows, cols) for Muon
    copy_bytes:      int
    decode_rows:     tuple[int, ...]   # sequences at once
    decode_tokens:   int               # of an answer whose speed is measured
    compared_tokens: int               # of one that is compared with GPT.generate's: the cache has to grow for it
    sustain_sec:     float             # of one product, repeated
    step_sec:        float             # of a timed run's steps, three at least
    profile_steps:   int


FULL = Sizes(T=2048, vocab_size=32768, head_dim=128, aspect_ratio=64, depths=(12, 24, 18), step_rows=(16, 32),
             num_micro=4, resume_depth=4, max_rows=32, loss_tokens=16384, chunk_tokens=(4096, 8192, 16384, 32768),
             micro_tokens=32768, attention_T=(2048, 1000),
             matrices=((4, 768, 768), (4, 3072, 768), (4, 768, 3072), (4, 6, 12)), copy_bytes=2**32,
             decode_rows=(1, 8, 64), decode_tokens=128, compared_tokens=280, sustain_sec=5, step_sec=6,
             profile_steps=3)
TINY = Sizes(T=128, vocab_size=320, head_dim=16, aspect_ratio=32, depths=(1, 2), step_rows=(1, 2), num_micro=2,
             resume_depth=2, max_rows=2, loss_tokens=256, chunk_tokens=(64, 128), micro_tokens=256,
             attention_T=(256, 100), matrices=((2, 32, 32), (2, 64, 16)), copy_bytes=2**20, decode_rows=(1, 3),
             decode_tokens=4, compared_tokens=12, sustain_sec=0, step_sec=0,
             profile_steps=1)


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
    knobs:       dict = field(default_factory=dict)    # of the models

    def make_config(self, depth: int) -> GPTConfig:
        sizes = self.sizes
        return make_config(depth, vocab_size=sizes.vocab_size, sequence_len=sizes.T, head_dim=sizes.head_dim,
                           aspect_ratio=sizes.aspect_ratio, **self.knobs)

    def make_model(self, depth: int, build: str = "blocks") -> tuple[GPT, object]:
        """A seeded model and its optimizer; `build` is a key of BUILDS. Nothing is compiled where the setup doesn't."""
        torch.manual_seed(0)
        with self.device:
            model = GPT(self.make_config(depth), self.dtype)
        model.init_weights()
        model.balance = make_balance(model)
        optimizer = model.setup_optimizer()
        if build == "fp8":
            fp8.use_fp8(model, optimizer)
        if build == "copies":
            use_copies(model, optimizer)
        if self.use_compile:
            BUILDS[build](model)
        return model, optimizer

    def make_batch(self, num_rows: int, step: int = 0) -> Batch:
        """The rows of a step, on the CPU as a loader gives them; after the last row the first follows."""
        index = (torch.arange(num_rows) + step * num_rows) % len(self.rows)
        parts = [part.contiguous() for part in (self.rows[index, :-1], self.rows[index, 1:])]
        if self.device.type == "cuda":
            parts = [part.pin_memory() for part in parts]
        return Batch(*parts, None)


def compile_tuned(model: GPT) -> None:
    """Block by block, the products by the fastest of several kernels: searching takes minutes."""
    for block in model.transformer.h:
        block.compile(dynamic=False, mode="max-autotune-no-cudagraphs")


# How a model is compiled; fp8 and copies replace its linear layers before that
BUILDS: dict[str, Callable[[GPT], None]] = {
    "blocks": GPT.compile_blocks, "trunk": lambda model: model.compile_trunk(), "max-autotune": compile_tuned,
    "fp8": GPT.compile_blocks, "copies": GPT.compile_blocks}


def make_synthetic_rows(sizes: Sizes, num_rows: int) -> Tensor:
    """(num_rows, T + 1) token ids whose frequencies follow Zipf's law, as those of text do."""
    rng = torch.Generator().manual_seed(0)
    exponents = torch.rand((num_rows, sizes.T + 1), generator=rng, dtype=torch.float64)
    return ((sizes.vocab_size + 1) ** exponents).long() - 1  # log-uniform over the vocabulary


def free_memory(device: torch.device) -> None:
    """Drop the tensors, compiled programs and peak-memory statistics of earlier checks."""
    torch.compiler.reset()
    if device.type == "cuda":
        gc.collect()  # autograd graphs may be parts of cycles; a CPU has memory enough at toy size
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


class TimeUp(BaseException):
    """A check has used up its time. Not an Exception: the compiler and others catch and wrap these."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the main thread after so many seconds, as soon as Python runs there."""
    def ring(*_) -> None:
        raise TimeUp(f"cut off after {seconds:.0f} s")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def guarded(name: str, device: torch.device, run: Callable[[], Check]) -> Check:
    """The check that `run` returns; what goes wrong in it is a line of the table, and the section goes on."""
    try:
        return run()
    except (TimeUp, Exception) as error:
        check = describe_failure(name, error)
    with suppress(RuntimeError):
        free_memory(device)  # here, where the error no longer holds the frames that it came through
    return check


def describe_failure(name: str, error: BaseException) -> Check:
    """The line of a check that ended in an exception, of whatever kind."""
    message = get_first_line(error)[:200]
    if isinstance(error, TimeUp):
        return Check(name, "skipped", message)
    if is_no_memory(error):
        return Check(name, "no memory", message)
    return Check(name, "FAIL", f"{type(error).__name__}: {message}")


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
