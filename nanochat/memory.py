"""Memory of a training step on one device, predicted part by part; the largest micro-batch that fits.

B rows, T tokens, N = B * T, C channels, H query heads, Hk key/value heads, D head dim, V vocabulary.

The formulas count what gpt.py, cross_entropy.py and optim.py allocate. The peak is in one of three phases:

    loss      all activations, the logits (fused: a chunk of them), the gradients of head and activations
    backward  activations are freed, gradients are made, beside one block's temporaries
    update    gradients, and the optimizer's stacks and temporaries

They need no torch, so that scripts.plan answers at once. tests/test_memory.py runs the model's own step on fake tensors
at full size and fails where the formulas are off by more than 2%: change the model, and it says which ones to mend.
Not compared with a GPU's allocator yet; `bash dev/gpu_check.sh --only memory` does that on one.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, count_local_ranks
from nanochat.config import ROPE_LENGTHS, GPTConfig, count_params, list_matrices
from nanochat.devices import COMPUTE_DTYPES

if TYPE_CHECKING:
    import torch

GIB = 2**30
# Sizes that memory depends on, here since the modules that allocate by them need torch
# optim.py: elements; smaller parameters are neither sharded nor given a compiled kernel
SMALL_PARAM = 1024
# optim.py: of experts that are orthogonalised at once, which takes about 5 copies of them
EXPERT_BYTES = 2**28
# cross_entropy.py: tokens of a chunk, enough to keep the matrix units busy, few enough that its logits stay small
# (dev/LOG.md, "Head and loss"; on GPUs an assumption, not studied)
CHUNK_TOKENS = defaultdict(lambda: 4096, cpu=2048, cuda=8192)
# cross_entropy.py: tokens that a CPU exponentiates at once, since its kernel keeps all of e for a second loop, the sum
CPU_EXP_TOKENS = 256
# moe.py: bins of an expert's histogram, over a range of 2 and a little more; the ranks sum all of them each step
HISTOGRAM_BINS = 1000
# flash_attention.py, blocks: short ones skip more of the keys, many take long to compile
MIN_BLOCK_QUERIES, MAX_BLOCKS = 256, 8
# Parts of the activations
ACTIVATIONS = ("residual stream", "attention", "MLP", "weights in the compute dtype", "embedding, final norm")


@dataclass(frozen=True)
class Machine:
    """How a rank computes: what a run decides for itself, and all that memory depends on beside the model's shape."""
    dtype:       str  = "bfloat16"   # of the activations, a key of COMPUTE_DTYPES
    attention:   str  = "fa3"        # a backend of flash_attention
    is_compiled: bool = True
    device_type: str  = "cuda"
    world_size:  int  = 1
    loss:        str  = "fused"      # a key of cross_entropy.LOSSES
    is_fp8:      bool = False        # whether the layers with normed inputs compute in 8 bits (fp8.py)
    has_muon:    bool = True         # whether Muon updates the matrices, or AdamW

    def __post_init__(self):
        if self.dtype not in COMPUTE_DTYPES:
            raise UserError(f"--dtype {self.dtype} is not one of {', '.join(COMPUTE_DTYPES)}")

    @property
    def act_bytes(self) -> int:      # of an element of the activations
        return COMPUTE_DTYPES[self.dtype]

    @property
    def master_bytes(self) -> int:   # of the matrices, and of sums that need precision
        return max(4, self.act_bytes)

    @property
    def cast_bytes(self) -> int:     # of the copy that a linear layer makes of its weight; 0 where it needs none
        return self.act_bytes if self.act_bytes < self.master_bytes else 0

    @property
    def eager_norm_bytes(self) -> int:  # of what an eager norm keeps: its input, on a CPU a copy of it in fp32
        return self.master_bytes if self.device_type == "cpu" else self.act_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""
    parameters:  int              # with the rotary tables and fp8's copies
    optimizer:   int              # this rank's part of the state
    gradients:   int              # at the end of the backward pass
    activations: dict[str, int]   # kept for the backward pass, by part of the model
    loss:        int              # logits, their gradients and copies, beside all of these
    checkpoint:  int              # the copy that a checkpoint is written from; 0 on a GPU, whose copy is in host memory
    phases:      dict[str, int]   # the peak of each phase

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def needed(self) -> int:         # by a run: the peak of a step, while a checkpoint is written
        return self.peak + self.checkpoint

    @property
    def worst_phase(self) -> str:
        return max(self.phases, key=self.phases.get)


def predict_memory(config: GPTConfig, T: int, micro_rows: int, machine: Machine, num_micro: int = 1) -> Memory:
    """Memory of a training step of `num_micro` micro-batches of `micro_rows` rows of T tokens."""
    usages = list_usage(config, T, micro_rows, machine, num_micro)
    phases = {phase: max(sum(parts.values()) for (other, _), parts in usages if other == phase)
              for phase in ("loss", "backward", "update")}
    parts = next(parts for (phase, _), parts in usages if phase == "loss")
    checkpoint = parts["parameters"] + parts["optimizer state"] if machine.device_type == "cpu" else 0
    return Memory(parts["parameters"], parts["optimizer state"], usages[-1][1]["gradients"],
                  {kind: parts[kind] for kind in ACTIVATIONS}, parts["logits and loss"], checkpoint, phases)


def list_usage(config: GPTConfig, T: int, rows: int, machine: Machine,
               num_micro: int = 1) -> list[tuple[tuple[str, str], dict[str, int]]]:
    """((phase, layer), bytes by part) in the order of a step, each at the worst of its layer, in the last micro-batch.
    The temporaries of the forward pass are left out: the loss always takes more."""
    gradients = sum(map(math.prod, list_muon(config))) * machine.master_bytes * machine.has_muon + \
        sum(num_bytes for num_bytes, *_ in list_adamw(config, machine))
    rope = 2 * ROPE_LENGTHS * config.sequence_len * config.head_dim // 2 * machine.act_bytes
    N, a, C = rows * T, machine.act_bytes, config.n_embd
    # outside the blocks nothing is compiled. Before them: normed, shifted, smeared; ids, targets, their weights
    embedding = N * (machine.eager_norm_bytes * C * config.embed_norm + (1 + 2 * config.smear) * a * C + 20)
    last_is_middle = config.middle_layer == config.n_layer - 1  # so that no later block keeps it
    final_norm = N * (machine.eager_norm_bytes * C + machine.master_bytes + a * C * last_is_middle)
    num_copies = 8 if machine.is_compiled else 12  # of temporaries: most are in the MLP, whose tensors are 4 C wide
    block_backward = N * num_copies * a * config.hidden_dim // 4 + \
        config.hidden_dim * C * (machine.master_bytes + machine.cast_bytes)
    moe_backward = count_moe_backward(config, N, machine) if config.num_experts else 0
    blocks = [count_block_bytes(config, layer, rows, T, machine) for layer in range(config.n_layer)]
    copies = sum(count_fp8_weights(config, layer) for layer in range(config.n_layer)) + config.padded_vocab_size * C \
        if machine.is_fp8 else 0
    parts = Counter({"parameters": gradients + rope + copies, "optimizer state": count_optimizer_bytes(config, machine),
                     "gradients": gradients if num_micro > 1 else 0, **dict.fromkeys(ACTIVATIONS, 0),
                     "logits and loss": 0, "workspace": 0})
    usages = []

    def add(phase: str, layer: str = "", part: str = "workspace", extra: int = 0) -> None:
        usages.append(((phase, layer), {**parts, part: parts[part] + extra}))
    parts["embedding, final norm"] += embedding
    add("forward", "embed")
    for layer, block in enumerate(blocks):
        parts.update(block)
        add("forward", str(layer))
    parts["embedding, final norm"] += final_norm
    add("forward", "norm")
    add("loss", part="logits and loss", extra=count_loss_bytes(config, N, machine))
    parts["embedding, final norm"] -= final_norm
    # each gradient is sent as soon as it is there: the rank's share of the sum stands beside it
    share = 1 / machine.world_size if machine.world_size > 1 else 0
    parts["gradients"] += round(config.padded_vocab_size * C * machine.master_bytes * (1 + share))  # the head's
    num_streams = 1 + (config.x0_init is not None) + (config.middle_layer is not None)
    parts["workspace"] = num_streams * N * C * a  # gradients of x, x0, middle block's output
    add("backward", "norm")
    for layer in reversed(range(config.n_layer)):
        add("backward", str(layer), extra=max(block_backward, moe_backward * config.has_experts(layer)))
        parts.subtract(blocks[layer])
        num_bytes = sum(map(math.prod, list_weights(config, layer))) * machine.master_bytes
        if config.has_value_embed(layer):
            num_bytes += config.padded_vocab_size * config.kv_dim * get_embed_bytes(config, machine)
        parts["gradients"] += round(num_bytes * ((num_micro == 1) + share))
    add("backward", "embed")
    parts = {**parts, **dict.fromkeys([*ACTIVATIONS, "workspace"], 0), "gradients": gradients}
    add("update", extra=count_update_bytes(config, machine) - gradients)
    return usages


# ---------------------------------------------------------------------------------------------------------------------
# What fits


def largest_micro_rows(config: GPTConfig, T: int, machine: Machine, memory_bytes: float | None,
                       rows_per_rank: int) -> int:
    """The most rows of a micro-batch that fit, a divisor of the rank's rows of a step; 0 if one row doesn't fit. Only
    tokens are bounded where `memory_bytes`, of the device or this rank's share of a CPU's, is None: unknown."""
    limit = max(1, get_max_micro_tokens(machine.device_type) // T)
    usable_bytes = math.inf if memory_bytes is None else get_usable_frac(machine) * memory_bytes
    return next((rows for rows in reversed(list_divisors(rows_per_rank)) if rows <= limit and
                 predict_memory(config, T, rows, machine, rows_per_rank // rows).needed <= usable_bytes), 0)


def get_usable_frac(machine: Machine) -> float:
    """The part of a device's free memory that a prediction may fill.

    A CPU's process grows by 1.5 to 2.0 times the live bytes, since malloc keeps what was freed (dev/LOG.md, "A CPU's
    predicted and resident memory"). On a GPU the rest is for fragments and for buffers of NCCL and cuBLAS: assumption,
    not studied. A step that runs out of memory is retried with half the rows.
    """
    return 0.5 if machine.device_type == "cpu" else 0.92


def get_max_micro_tokens(device_type: str) -> int:
    """Tokens of a micro-batch beyond which a step gets no faster.

    CPU: assumption, not studied. GPU, an estimate: a micro-batch's fixed cost is to read and add up all gradients, 12
    bytes a parameter; at 3 TB/s and 5e14 FLOP/s that is 0.5% of its 6 FLOPs a parameter and token, at any depth.
    """
    return 8192 if device_type == "cpu" else 2**16


def list_divisors(number: int) -> list[int]:
    """Ascending, in the time of a square root."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def rows_or_auto(text: str) -> int | str:
    """The value of --device-batch-size."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be a number of rows, or auto") from None


def measure_free_bytes(device: torch.device) -> int | None:
    """Memory of the device that this rank could still take, of a CPU's its share; None where the system doesn't say."""
    import torch
    if device.type == "cpu":
        known = [num_bytes for num_bytes in (read_available_bytes(), read_cgroup_bytes()) if num_bytes is not None]
        return min(known) // count_local_ranks() if known else None
    if device.type == "mps":
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    with contextlib.suppress(AttributeError, RuntimeError):  # not every device or driver says
        module = torch.get_device_module(device)
        module.empty_cache()  # left by probes of kernels
        return module.mem_get_info(device)[0]
    return None


def read_available_bytes(path: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that Linux could give to new processes without swapping."""
    with contextlib.suppress(OSError):
        lines = path.read_text(encoding="utf-8").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    return None


# Files of a control group, version 2 and 1: its limit, what it uses, and how much of that is cache that gives way
CGROUP_NAMES = {"": ("memory.max", "memory.current", "inactive_file"),
                "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}


def read_cgroup_bytes(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory left under the limits of this process's control groups (a container's, a job's); None without a limit."""
    left = []
    with contextlib.suppress(OSError):
        for line in own.read_text(encoding="utf-8").splitlines():
            _, controller, path = line.split(":", 2)
            if controller not in CGROUP_NAMES:
                continue
            limit, usage, cache = CGROUP_NAMES[controller]
            folder = root / controller / path.strip("/")
            # groups above have limits too; in a container the root is the container's own, the path the host's
            for group in (folder, *folder.parents[:len(folder.relative_to(root / controller).parts)]):
                with contextlib.suppress(OSError, ValueError):  # not there; "max", which is no limit
                    limit_bytes, used_bytes = (int((group / name).read_bytes()) for name in (limit, usage))
                    lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
                    stat = dict(line.split() for line in lines)
                    left.append(max(0, limit_bytes - used_bytes + int(stat.get(cache, 0))))
    return min(left, default=None)


# ---------------------------------------------------------------------------------------------------------------------
# Activations, which autograd keeps for the backward pass; temporaries; the optimizer's part


def count_block_bytes(config: GPTConfig, layer: int, rows: int, T: int, machine: Machine) -> dict[str, int]:
    """Activations of one block, by part. A compiled one recomputes the inputs of its norms, except the MLP's."""
    N, a, C, Q = rows * T, machine.act_bytes, config.n_embd, config.query_dim
    kv_dim, stat = config.kv_dim, machine.master_bytes  # stat: a norm keeps one for each row
    normed = a if machine.is_compiled else machine.eager_norm_bytes
    # the inputs of the linear layers; in fp8 a copy, beside which the gate of an eager block keeps the attention's
    linears = C * (2 + a * (config.has_value_embed(layer) and not machine.is_compiled)) if machine.is_fp8 else 2 * a * C
    # the block's input (the first one's is x0), the norms' inputs
    is_mixed = config.resid_init is not None or config.x0_init is not None
    residual = a * C * (layer > 0 and is_mixed) + normed * C * (1 if machine.is_compiled else 2) + linears + 2 * stat
    qk_norms = (normed * (Q + kv_dim) + stat * (config.n_head + config.n_kv_head)) * (config.qk_scale != 0)
    value_embed = a * (kv_dim + 2 * config.n_kv_head) if config.has_value_embed(layer) else 0
    num_cast = sum(map(math.prod, list_matrices(config, layer) + list_experts(config, layer)))
    num_cast -= machine.is_fp8 * count_fp8_weights(config, layer)
    mlp = N * config.hidden_dim * a * (2 if config.mlp_act == "relu2" else 4 - machine.is_compiled)
    return {"residual stream": N * residual,
            "attention": N * (qk_norms + value_embed) + count_attention_bytes(config, layer, rows, T, machine),
            "MLP": count_moe_bytes(config, N, machine) if config.has_experts(layer) else mlp,
            "weights in the compute dtype": machine.cast_bytes * num_cast}


def count_moe_bytes(config: GPTConfig, N: int, machine: Machine) -> int:
    """Activations of a mixture of experts: hidden channels of a token's experts and the shared one, what goes into the
    experts sorted and comes out of them put back, the router's input where it is cast, scores, gates and places."""
    a, C, E, k = machine.act_bytes, config.n_embd, config.num_experts, config.top_k
    router = machine.master_bytes * (E + C * (machine.cast_bytes > 0))
    return N * (2 * a * (config.expert_dim * (k + 1) + k * C) + router + k * (a + 3 * 8))


def count_moe_backward(config: GPTConfig, N: int, machine: Machine) -> int:
    """Temporaries of its backward pass: gradients of the sorted rows' hidden channels, and those of a matrix of all
    experts, in the compute dtype and as a master."""
    a, C, H = machine.act_bytes, config.n_embd, config.expert_dim
    weights = config.num_experts * H * C * (machine.master_bytes + machine.cast_bytes)
    return 2 * N * a * (config.top_k * H + C) + weights


def list_experts(config: GPTConfig, layer: int) -> list[tuple[int, int, int]]:
    """(experts, rows, columns) of a block's routed experts: up, down."""
    E, H, C = config.num_experts, config.expert_dim, config.n_embd
    return [(E, H, C), (E, C, H)] if config.has_experts(layer) else []


def list_weights(config: GPTConfig, layer: int) -> list[tuple[int, ...]]:
    """Shapes of all that a block has."""
    router = [(config.num_experts, config.n_embd)] if config.has_experts(layer) else []
    return [*list_matrices(config, layer), *list_experts(config, layer), *router]


def list_muon(config: GPTConfig) -> list[tuple[int, ...]]:
    """Shapes of all that Muon updates."""
    return [shape for layer in range(config.n_layer)
            for shape in (*list_matrices(config, layer), *list_experts(config, layer))]


def count_fp8_weights(config: GPTConfig, layer: int = 0) -> int:
    """Weights of a block that fp8 keeps a byte of: c_q, c_k, c_v and c_fc, of experts the shared one's."""
    hidden_dim = config.expert_dim if config.has_experts(layer) else config.hidden_dim
    return (config.query_dim + 2 * config.kv_dim + hidden_dim) * config.n_embd


def count_attention_bytes(config: GPTConfig, layer: int, rows: int, T: int, machine: Machine) -> int:
    """Activations of one attention call: queries, keys, values, output, and a statistic or the probabilities."""
    a, C, H, window = machine.act_bytes, config.query_dim, config.n_head, config.window(layer)
    is_windowed = window < T - 1
    if machine.attention == "blocks":
        pairs = [(end - start) * (end - first)
                 for start, end, first in list_query_blocks(T, window if is_windowed else -1)]
        pair_bytes, mask = sum(pairs) * (machine.master_bytes + machine.cast_bytes), sum(pairs)
        if machine.is_compiled:  # scores and probabilities in the compute dtype, but for the last block's scores
            pair_bytes, mask = pair_bytes - sum(pairs[:-1]) * (machine.master_bytes - a), 0
        return rows * (4 * a * C * T + H * pair_bytes) + mask
    if machine.attention == "sdpa" and is_windowed:
        chunk = max(window, 1)
        padded = -(-T // chunk) * chunk
        copies = a * C * 5 * padded  # queries, keys, values; the output in two parts and whole
        return rows * (copies + machine.master_bytes * H * padded) + a * chunk * 2 * chunk  # and the mask
    kv_dim = C if machine.attention == "sdpa" else config.kv_dim  # sdpa repeats shared key/value heads
    return rows * T * (2 * a * (C + kv_dim) + machine.master_bytes * H)


def list_query_blocks(T: int, window: int) -> list[tuple[int, int, int]]:
    """The products of 'blocks': queries [start, end) with keys [first, end); window -1 is the whole past."""
    size = get_even_size(T, max(MIN_BLOCK_QUERIES, -(-T // MAX_BLOCKS)))
    return [(start, min(start + size, T), max(0, start - window) if window >= 0 else 0) for start in range(0, T, size)]


def get_even_size(num: int, most: int) -> int:
    """Size of each of the fewest chunks of `num` that hold at most `most`; equal sizes, so that few shapes compile."""
    num_chunks = -(-num // most) or 1
    return -(-num // num_chunks) or 1


def count_loss_bytes(config: GPTConfig, N: int, machine: Machine) -> int:
    """The loss's input, the head in the compute dtype, and logits with their copies; gradients too, if it is fused."""
    a, master, C, V = machine.act_bytes, machine.master_bytes, config.n_embd, config.vocab_size
    logits_V = config.padded_vocab_size if machine.is_fp8 else V
    is_cpu, head = machine.device_type == "cpu", machine.cast_bytes * logits_V * C
    if machine.loss == "plain":
        # eager: the sigmoid, the log-probabilities and the gradients of both; compiled, a CPU's sum has exp in a buffer
        copies = a + (master if is_cpu else a) if machine.is_compiled else 4 * master
        return a * C * N + head + copies * N * V
    gradients = a * C * N + master * config.padded_vocab_size * C
    chunk = get_even_size(N, CHUNK_TOKENS[machine.device_type])
    exp_tokens = get_even_size(chunk, CPU_EXP_TOKENS) if is_cpu else chunk
    num_copies = int(is_cpu)  # of the logits while they become e (1 - t^2)
    if not machine.is_compiled:  # tanh of bf16 on a CPU is a fraction with two polynomials
        num_copies = 5 if machine.dtype == "bfloat16" and is_cpu else 4
        if not config.softcap:  # the logits in fp32, less their maximum, and exp
            num_copies = 2 + (a < master)
    inputs = (1 + a) * chunk * C if machine.is_fp8 else 0  # in 8 bits, and as the gradient of the head reads them
    return (a * C * N + head + gradients + 4 * master * N + a * chunk * logits_V + inputs
            + max(num_copies * master * exp_tokens * V, a * V * C))


def count_update_bytes(config: GPTConfig, machine: Machine) -> int:
    """Gradients, stacks, gathered parameters and temporaries of the optimizer's step, in the optimizer's order."""
    a, master, world = machine.act_bytes, machine.master_bytes, machine.world_size
    adamw, experts = list_adamw(config, machine), []
    for E, rows, cols in (shape for layer in range(config.n_layer) for shape in list_experts(config, layer)):
        own = count_own_rows(E, rows * cols, world)
        experts.append((E * rows * cols * master, own * rows * cols * master,
                        count_slice(own, rows * cols * master) * rows * cols))
    # bytes of the gradients of a shape, and of this rank's share of them
    muon = [(K * rows * cols * master, -(-K // world) * rows * cols * master)
            for (rows, cols), K in sorted(count_shapes(config).items()) if machine.has_muon]
    live = peak = sum(grads for grads, *_ in [*adamw, *muon, *experts]) + \
        sum(own for grads, own, _ in [*adamw, *experts] if own < grads)
    for grads, own in muon:
        if world == 1:  # reduce_gradients makes a stack; several ranks have sent smaller ones in the backward pass
            peak = max(peak, live + own)
        live += own * world - grads + (own if world > 1 else 0)
    peak = max(peak, live)
    for grads, own, size in adamw:
        is_sent = own < grads
        live -= grads if is_sent else 0
        # eager AdamW makes 6 copies of what it updates, and 4 more to come to fp32 and back: not all at once
        peak = max(peak, live + (0 if machine.is_compiled else own // size * master * (8 if size < master else 6)))
        live += own if is_sent else 0  # held until all are gathered
    copies = 2 * a + master if machine.is_compiled else a + 5 * master  # beside the stack of parameters
    gathered = a if machine.dtype == "bfloat16" else master
    for _, own in muon:
        live -= own * world if world > 1 else 0
        peak = max(peak, live + own + own // master * copies)
        # the stack that is sent and the whole that is gathered, in the compute dtype where the forward pass casts to it
        sent = own // master * gathered
        live += sent + sent * world if world > 1 else 0
    for grads, own, num_sliced in experts:    # where they lie
        live -= grads if own < grads else 0
        peak = max(peak, live + num_sliced * copies)
        live += (own + grads) // master * gathered if own < grads else 0
    return max(peak, live)


def count_slice(num: int, matrix_bytes: int) -> int:
    """Experts that Muon takes at once, of `num`: as many as EXPERT_BYTES hold, in slices of about one size."""
    return get_even_size(num, max(1, EXPERT_BYTES // matrix_bytes))


def count_optimizer_bytes(config: GPTConfig, machine: Machine) -> int:
    """This rank's state: AdamW's two moments; Muon's momentum, and its variance of each row or column."""
    adamw = sum(2 * own for _, own, _ in list_adamw(config, machine))
    muon = sum(-(-K // machine.world_size) * (rows * cols + max(rows, cols)) * machine.master_bytes
               for (rows, cols), K in count_shapes(config).items() if machine.has_muon)
    experts = sum(count_own_rows(E, rows * cols, machine.world_size) * (rows * cols + max(rows, cols))
                  for layer in range(config.n_layer) for E, rows, cols in list_experts(config, layer))
    return adamw + muon + experts * machine.master_bytes


def list_adamw(config: GPTConfig, machine: Machine) -> list[tuple[int, int, int]]:
    """Bytes of each AdamW parameter, of the part that one rank updates, and of an element; the few scalars as one."""
    V, C, master, embed = (config.padded_vocab_size, config.n_embd, machine.master_bytes,
                           get_embed_bytes(config, machine))
    num_ve = sum(map(config.has_value_embed, range(config.n_layer)))
    num_moe = sum(map(config.has_experts, range(config.n_layer)))
    params = [(V, C, master), (V, C, embed), *[(V, config.kv_dim, embed)] * num_ve,
              *[(config.num_experts, C, master)] * num_moe,
              (1, count_params(config)["scalars"], master)]
    if not machine.has_muon:
        params += [(*shape, master) for shape, num in count_shapes(config).items() for _ in range(num)]
    return [(rows * cols * size, count_own_rows(rows, cols, machine.world_size) * cols * size, size)
            for rows, cols, size in params]


def get_embed_bytes(config: GPTConfig, machine: Machine) -> int:
    """Of an element of the embeddings, which live in the compute dtype unless that is fp16 or a knob says otherwise."""
    return machine.master_bytes if machine.dtype == "float16" or config.fp32_embeds else machine.act_bytes


def count_own_rows(num_rows: int, num_cols: int, world_size: int) -> int:
    """Rows of an AdamW parameter that one rank updates: all, where they are small or don't split."""
    is_sharded = num_rows * num_cols >= SMALL_PARAM and num_rows % world_size == 0
    return num_rows // (world_size if is_sharded else 1)


def count_shapes(config: GPTConfig) -> dict[tuple[int, int], int]:
    """Muon's matrices: {(rows, cols): how many}."""
    return Counter(shape for layer in range(config.n_layer) for shape in list_matrices(config, layer))
