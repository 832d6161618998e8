"""How much memory a training step takes on one device, part by part, and the largest micro-batch that fits.

B rows, T tokens, N = B * T, C channels, H query heads, Hk key/value heads, D head dim, V vocabulary.

Counted is what gpt.py, cross_entropy.py and optim.py allocate: what stays (parameters, optimizer state), what the
backward pass needs (activations, block by block), and what comes and goes. The peak is at one of three moments:

    loss      all activations, a chunk of logits, and the gradients of head and activations, which are made there
    backward  activations go, gradients come, and one block's temporaries stand beside them
    update    gradients, and the optimizer's stacks and temporaries

Compared with tensors counted one by one by `python -m dev.bench_memory`; not yet with a GPU's allocator, for which it
has check_memory, nor on several ranks. Needs no torch, but to ask a GPU what it has free.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import COMPUTE_DTYPES, UserError, count_local_ranks
from nanochat.config import VE_GATE_CHANNELS, GPTConfig, count_params

if TYPE_CHECKING:
    import torch

GIB = 2**30
# What may be filled by prediction, of a device's memory or of what is free of it. A CPU's process grew by 1.5 to 2.0
# times the live bytes, since malloc keeps what was freed (dev/LOG.md, 2026-11-21). On a GPU the rest is for fragments,
# for buffers that NCCL and cuBLAS make later, and for what predictions lack (at most 10%, see the tests): assumption,
# not studied; a step that runs out of memory all the same goes on with half the rows
USABLE_FRACS = {"cpu": 0.5}
DEFAULT_USABLE_FRAC = 0.92
MAX_MICRO_TOKENS = {"cpu": 8192}    # of a micro-batch: more make a CPU's step no faster (assumption, not studied)
# Nor a GPU's: what a micro-batch costs beside its tokens is to read and add up all gradients, 12 bytes a parameter. At
# 3 TB/s and 5e14 FLOP/s that is 0.5% of the 6 FLOPs a parameter and token of so many tokens, at any depth (an estimate)
DEFAULT_MAX_MICRO_TOKENS = 2**16
# As in the modules that allocate, which need torch; a test compares them
ROPE_LENGTHS, SMALL_PARAM = 10, 1024
CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}
MIN_BLOCK_QUERIES, MAX_BLOCKS = 256, 8


@dataclass(frozen=True)
class Machine:
    """How a rank computes: what a run decides for itself, and all that memory depends on beside the model's shape."""
    dtype:       str  = "bfloat16"   # of the activations, a key of COMPUTE_DTYPES
    attention:   str  = "fa3"        # a backend of flash_attention
    is_compiled: bool = True
    device_type: str  = "cuda"
    world_size:  int  = 1
    loss:        str  = "fused"      # a key of cross_entropy.LOSSES

    def __post_init__(self):
        if self.dtype not in COMPUTE_DTYPES:
            raise UserError(f"--dtype {self.dtype} is not one of {', '.join(COMPUTE_DTYPES)}")

    @property
    def act_bytes(self) -> int:
        """Of an element of the activations."""
        return COMPUTE_DTYPES[self.dtype]

    @property
    def master_bytes(self) -> int:
        """Of an element of the matrices, and of sums that need precision."""
        return max(4, self.act_bytes)

    @property
    def embed_bytes(self) -> int:
        """Of an element of the embeddings, which live in the compute dtype unless that is fp16."""
        return self.master_bytes if self.dtype == "float16" else self.act_bytes

    @property
    def cast_bytes(self) -> int:
        """Of an element of the copy that a linear layer makes of its weight; 0 where it needs none."""
        return self.act_bytes if self.act_bytes < self.master_bytes else 0

    @property
    def eager_norm_bytes(self) -> int:
        """Of an element of what an eager norm keeps: its input, on a CPU a copy of it in fp32."""
        return self.master_bytes if self.device_type == "cpu" else self.act_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""
    parameters:  int              # with the rotary tables
    optimizer:   int              # this rank's part of the state
    gradients:   int              # as the backward pass leaves them
    activations: dict[str, int]   # kept for the backward pass, by part of the model
    loss:        int              # what making the loss takes beside all of these
    checkpoint:  int              # the copy that one is written from, on a CPU; that of a GPU isn't in its memory
    moments:     dict[str, int]   # what is in use at the worst instant of each

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def needed(self) -> int:
        """What must be there for a run: the peak of a step, while a checkpoint is written."""
        return self.peak + self.checkpoint

    @property
    def worst_moment(self) -> str:
        return max(self.moments, key=self.moments.get)


def predict_memory(config: GPTConfig, T: int, micro_rows: int, compute: Machine, num_micro: int = 1) -> Memory:
    """Memory of a training step of `num_micro` micro-batches of `micro_rows` rows of T tokens, once the optimizer has
    its state."""
    stream = micro_rows * T * config.n_embd * compute.act_bytes  # one tensor (B, T, C)
    blocks = [count_block_bytes(config, layer, micro_rows, T, compute) for layer in range(config.n_layer)]
    ends = count_end_bytes(config, micro_rows * T, compute)
    activations = {key: sum(block[key] for block in blocks) for key in blocks[0]} | ends
    parameters, gradients = count_parameter_bytes(config, compute)
    optimizer = count_optimizer_bytes(config, compute)
    loss = count_loss_bytes(config, micro_rows * T, compute)
    head_grad = config.padded_vocab_size * config.n_embd * compute.master_bytes
    kept = parameters + optimizer + (gradients if num_micro > 1 else 0)
    # Backward from the last block to the first, beside the gradients of x, x0 and the middle block's output
    live = kept + sum(activations.values()) - ends["final norm"] + head_grad + 3 * stream
    backward = live
    for layer in reversed(range(config.n_layer)):
        backward = max(backward, live + count_backward_bytes(config, layer, micro_rows, T, compute))
        live -= sum(blocks[layer].values())
        if num_micro == 1:
            live += count_block_gradients(config, layer, compute)
    moments = {"loss": kept + sum(activations.values()) + loss, "backward": max(backward, live),
               "update": parameters + optimizer + count_update_bytes(config, gradients, compute)}
    checkpoint = parameters + optimizer if compute.device_type == "cpu" else 0
    return Memory(parameters, optimizer, gradients, activations, loss, checkpoint, moments)


# ---------------------------------------------------------------------------------------------------------------------
# What fits


def largest_micro_rows(config: GPTConfig, T: int, compute: Machine, memory_bytes: float | None,
                       rows_per_rank: int) -> int:
    """The most rows of a micro-batch, a divisor of the rank's rows of a step, that fit; 0 if not even one does.

    memory_bytes: of the device; of a CPU, the part of it that this rank may use. None, where nobody knows: then only
                  the number of tokens is bounded, beyond which more rows gain nothing
    """
    limit = get_max_micro_tokens(compute.device_type) // T
    for rows in list_divisors(rows_per_rank)[::-1]:
        if rows <= max(1, limit) and (memory_bytes is None or predict_memory(
                config, T, rows, compute, rows_per_rank // rows).needed <= get_usable_frac(compute) * memory_bytes):
            return rows
    return 0


def get_usable_frac(compute: Machine) -> float:
    return USABLE_FRACS.get(compute.device_type, DEFAULT_USABLE_FRAC)


def get_max_micro_tokens(device_type: str) -> int:
    return MAX_MICRO_TOKENS.get(device_type, DEFAULT_MAX_MICRO_TOKENS)


def list_divisors(number: int) -> list[int]:
    """Ascending; of a huge number, too."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def rows_or_auto(text: str) -> int | str:
    """The value of --device-batch-size."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be a number of rows, or auto") from None


def measure_free_bytes(device: torch.device) -> int | None:
    """Memory of the device that this rank could still take, of a CPU's its share; None where nobody knows."""
    import torch
    if device.type == "cpu":
        known = [num_bytes for num_bytes in (read_available_bytes(), read_cgroup_bytes()) if num_bytes is not None]
        return min(known) // count_local_ranks() if known else None
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    with contextlib.suppress(AttributeError, RuntimeError):  # not every device or driver tells
        module = torch.get_device_module(device)
        module.empty_cache()  # what probes of kernels have left
        return module.mem_get_info(device)[0]
    return None


def read_available_bytes(path: Path = Path("/proc/meminfo")) -> int | None:
    """What Linux could give to new processes without swapping."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


# Files of a control group, version 2 and 1: its limit, what it uses, and how much of that is cache that gives way
CGROUP_NAMES = {"": ("memory.max", "memory.current", "inactive_file"),
                "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}


def read_cgroup_bytes(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the limits of this process's control groups leave, those of a container or a job; None without a limit."""
    left = []
    with contextlib.suppress(OSError):
        for line in own.read_text().splitlines():
            _, controller, path = line.split(":", 2)
            if controller not in CGROUP_NAMES:
                continue
            limit, usage, cache = CGROUP_NAMES[controller]
            folder = root / controller / path.strip("/")
            # every group above counts, too; in a container the root is the container's own, the path the host's
            for group in (folder, *folder.parents[:len(folder.relative_to(root / controller).parts)]):
                with contextlib.suppress(OSError, ValueError):  # not there; "max", which is no limit
                    limit_bytes, used_bytes = (int((group / name).read_text()) for name in (limit, usage))
                    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                    left.append(max(0, limit_bytes - used_bytes + int(stat.get(cache, 0))))
    return min(left, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Activations: what autograd keeps for the backward pass


def count_block_bytes(config: GPTConfig, layer: int, rows: int, T: int, compute: Machine) -> dict[str, int]:
    """What one block keeps, by part. A compiled one makes the inputs of norms again, all but the MLP's."""
    N, a, C = rows * T, compute.act_bytes, config.n_embd
    kv_dim, stat = config.n_kv_head * config.head_dim, compute.master_bytes  # stat: a norm keeps one for each row
    normed = a if compute.is_compiled else compute.eager_norm_bytes
    # the block's input (the first one's is x0), the norms' inputs, what they give to the linear layers
    residual = a * C * (layer > 0) + normed * C * (1 if compute.is_compiled else 2) + 2 * a * C + 2 * stat
    qk_norms = normed * (C + kv_dim) + stat * (config.n_head + config.n_kv_head)
    value_embed = a * (kv_dim + 2 * config.n_kv_head) if config.has_value_embed(layer) else 0
    return {"residual stream": N * residual,
            "attention": N * (qk_norms + value_embed) + count_attention_bytes(config, layer, rows, T, compute),
            "MLP": N * 2 * 4 * a * C,
            "weights in the compute dtype": compute.cast_bytes * count_block_params(config, layer)}


def count_attention_bytes(config: GPTConfig, layer: int, rows: int, T: int, compute: Machine) -> int:
    """What one block's attention call keeps: queries, keys, values, output, and a statistic or the probabilities."""
    a, C, H, window = compute.act_bytes, config.n_embd, config.n_head, config.window(layer)
    is_windowed = window < T - 1
    if compute.attention == "blocks":
        pairs = [queries * keys for queries, keys in list_query_blocks(T, window if is_windowed else -1)]
        pair_bytes, mask = sum(pairs) * (compute.master_bytes + compute.cast_bytes), sum(pairs)
        if compute.is_compiled:  # scores and probabilities in the compute dtype, but for the last block's scores
            pair_bytes, mask = pair_bytes - sum(pairs[:-1]) * (compute.master_bytes - a), 0
        return rows * (4 * a * C * T + H * pair_bytes) + mask
    if compute.attention == "sdpa" and is_windowed:
        chunk = max(window, 1)
        padded = -(-T // chunk) * chunk  # queries and output; keys and values are padded by one chunk more
        copies = a * C * (2 * padded + 2 * (padded + chunk) + T)
        return rows * (copies + compute.master_bytes * H * padded) + a * padded * 2 * chunk  # and the mask
    return rows * T * (4 * a * C + compute.master_bytes * H)


def list_query_blocks(T: int, window: int) -> list[tuple[int, int]]:
    """(queries, keys) of each product of the 'blocks' attention; window -1 is the whole past."""
    num_blocks = min(MAX_BLOCKS, -(-T // MIN_BLOCK_QUERIES))
    size = -(-T // num_blocks)
    spans = [(start, min(start + size, T)) for start in range(0, T, size)]
    return [(end - start, end - max(0, start - window) if window >= 0 else end) for start, end in spans]


def count_end_bytes(config: GPTConfig, N: int, compute: Machine) -> dict[str, int]:
    """What is kept before the first block and after the last, which are never compiled."""
    a, C, normed = compute.act_bytes, config.n_embd, compute.eager_norm_bytes
    last_is_middle = config.n_layer // 2 == config.n_layer - 1  # so that no later block keeps it
    return {"embedding": N * (normed * C + 3 * a * C + 20),  # normed, shifted, smeared; ids, targets, their weights
            "final norm": N * (normed * C + compute.master_bytes + a * C * last_is_middle)}


# ---------------------------------------------------------------------------------------------------------------------
# What comes and goes


def count_loss_bytes(config: GPTConfig, N: int, compute: Machine) -> int:
    """What making the loss takes: its input, the gradients that it makes, the head, a chunk of logits and the like."""
    a, master, C, V = compute.act_bytes, compute.master_bytes, config.n_embd, config.vocab_size
    num_chunks = -(-N // CHUNK_TOKENS.get(compute.device_type, 4096))
    chunk = -(-N // num_chunks)
    num_copies = 0
    if not compute.is_compiled:  # a bf16 tanh on a CPU is a fraction, whose halves both stand there
        num_copies = 5 if compute.dtype == "bfloat16" and compute.device_type == "cpu" else 4
    return (2 * a * C * N + master * (config.padded_vocab_size * C + 4 * N) + compute.cast_bytes * V * C
            + a * chunk * V + max(num_copies * master * chunk * V, a * V * C))


def count_backward_bytes(config: GPTConfig, layer: int, rows: int, T: int, compute: Machine) -> int:
    """The most that a block's backward pass has beside what was kept: in its MLP, where tensors are 4 C wide."""
    C = config.n_embd
    num_copies = 8 if compute.is_compiled else 12
    return rows * T * num_copies * compute.act_bytes * C + 4 * C * C * (compute.master_bytes + compute.cast_bytes)


def count_update_bytes(config: GPTConfig, gradients: int, compute: Machine) -> int:
    """Gradients, stacks, gathered parameters and temporaries of the optimizer's step at their worst."""
    a, master, world = compute.act_bytes, compute.master_bytes, compute.world_size
    adamw = [(shard(num_rows, num_cols, world), size) for num_rows, num_cols, size in list_adamw(config, compute)]
    stacks = [-(-K // world) * rows * cols for (rows, cols), K in count_shapes(config).items()]
    # eager AdamW makes 6 copies of what it updates, and 4 more to come to fp32 and back: not all at once
    adamw_copies = 0 if compute.is_compiled else max(n * master * (8 if size < master else 6) for n, size in adamw)
    muon_copies = max(stacks) * (2 * a + master if compute.is_compiled else a + 5 * master)
    if world == 1:
        return gradients + max(adamw_copies, max(stacks) * master + muon_copies)
    own = sum(n * size for n, size in adamw) + sum(stacks) * master  # this rank's part of all gradients
    sent = sum(rows * cols * size for rows, cols, size in list_adamw(config, compute)) + sum(stacks) * world * master
    gathered = sum(n * size for n, size in adamw) + sum(stacks) * (world + 1) * master
    return max(sent + own + adamw_copies, own + gathered + muon_copies)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters


def count_parameter_bytes(config: GPTConfig, compute: Machine) -> tuple[int, int]:
    """Bytes of the parameters with the rotary tables, and of the gradients."""
    counts = count_params(config)
    embeds = counts["wte"] + counts["value_embeds"]
    num_bytes = (counts["total"] - embeds) * compute.master_bytes + embeds * compute.embed_bytes
    rope = 2 * ROPE_LENGTHS * config.sequence_len * config.head_dim // 2 * compute.act_bytes
    return num_bytes + rope, num_bytes


def count_optimizer_bytes(config: GPTConfig, compute: Machine) -> int:
    """This rank's state: two moments of what AdamW updates; momentum and a row or column of variances for Muon."""
    world, master = compute.world_size, compute.master_bytes
    adamw = sum(2 * shard(rows, cols, world) * size for rows, cols, size in list_adamw(config, compute))
    muon = sum(-(-K // world) * (rows * cols + max(rows, cols)) * master
               for (rows, cols), K in count_shapes(config).items())
    return adamw + muon


def list_adamw(config: GPTConfig, compute: Machine) -> list[tuple[int, int, int]]:
    """(rows, columns, bytes of an element) of each AdamW parameter, the few scalars together as the last."""
    V, C, kv_dim = config.padded_vocab_size, config.n_embd, config.n_kv_head * config.head_dim
    num_ve = sum(config.has_value_embed(layer) for layer in range(config.n_layer))
    return [(V, C, compute.master_bytes), (V, C, compute.embed_bytes)] + [(V, kv_dim, compute.embed_bytes)] * num_ve + \
        [(1, count_params(config)["scalars"], compute.master_bytes)]


def shard(num_rows: int, num_cols: int, world_size: int) -> int:
    """Elements of an AdamW parameter that one rank updates."""
    is_sharded = num_rows * num_cols >= SMALL_PARAM and num_rows % world_size == 0
    return num_rows * num_cols // (world_size if is_sharded else 1)


def count_shapes(config: GPTConfig) -> dict[tuple[int, int], int]:
    """Muon's matrices: {(rows, cols): how many}."""
    counts: dict[tuple[int, int], int] = {}
    for layer in range(config.n_layer):
        for shape in list_matrices(config, layer):
            counts[shape] = counts.get(shape, 0) + 1
    return counts


def list_matrices(config: GPTConfig, layer: int) -> list[tuple[int, int]]:
    """Shapes of a block's matrices: q, k, v, attention's output, the MLP's two, the value embeddings' gate."""
    C, kv_dim = config.n_embd, config.n_kv_head * config.head_dim
    gate = [(config.n_kv_head, VE_GATE_CHANNELS)] if config.has_value_embed(layer) else []
    return [(C, C), (kv_dim, C), (kv_dim, C), (C, C), (4 * C, C), (C, 4 * C)] + gate


def count_block_params(config: GPTConfig, layer: int) -> int:
    return sum(rows * cols for rows, cols in list_matrices(config, layer))


def count_block_gradients(config: GPTConfig, layer: int, compute: Machine) -> int:
    """Bytes that a block's backward pass leaves: its matrices', and its value embeddings'."""
    kv_dim = config.n_kv_head * config.head_dim
    value_embed = config.padded_vocab_size * kv_dim * compute.embed_bytes if config.has_value_embed(layer) else 0
    return count_block_params(config, layer) * compute.master_bytes + value_embed
