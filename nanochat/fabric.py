"""What the network costs a training step: links, the messages of a step in their order, and what of them isn't hidden.

    a message:  seconds = steps * alpha + bytes * factor / beta    (ring of n ranks: n - 1 steps, factor (n - 1) / n;
                                                                    all_reduce twice that, or a tree's)
    a step:     events in order: compute, start a message, wait for one; a rank's messages share its link, one by one

alpha is the latency of a hop, beta the bytes per second of a link in each direction. `list_step` is the order of
train.queue_step and optim.MuonAdamW; tests/test_fabric.py runs these on ranks that send nothing and compares what they
start and wait for, in order and in bytes. dev/fabric.py measures links, and compares predicted steps with measured
ones. Predicted for GPUs, measured on CPUs only.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from nanochat.common import UserError
from nanochat.config import GPTConfig, list_matrices
from nanochat.memory import HISTOGRAM_BINS, Machine
from nanochat.scaling import OURS, TrainingRule

if TYPE_CHECKING:
    from nanochat.optim import MuonAdamW, Part

MUON_STEPS = 5         # of the orthogonalisation
ADAM_FLOPS = 1000      # that take as long as the update of one element, which waits for memory; assumption, not studied


# ---------------------------------------------------------------------------------------------------------------------
# Links


class Fabric(NamedTuple):
    """A kind of link. Of the faster ones each GPU has a card of its own, of the others a machine has one."""
    name:             str
    alpha:            float    # seconds of a hop, as a collective library sees them
    beta:             float    # bytes per second of a card, in each direction
    has_card_per_gpu: bool = True


# Round figures of makers' data sheets and of what collective libraries reach; none was measured by this code base
FABRICS = {fabric.name: fabric for fabric in (
    Fabric("nvlink", 3e-6,  450e9),           # NVLink 4 of a node of H100
    Fabric("ib",     5e-6,  50e9),            # InfiniBand NDR, 400 Gbit/s
    Fabric("100g",   20e-6, 12e9),            # RoCE
    Fabric("25g",    30e-6, 3e9,   False),
    Fabric("10g",    50e-6, 1.2e9, False),
    Fabric("wan",    30e-3, 125e6, False),    # 1 Gbit/s between sites
)}


def find_fabric(text: str) -> Fabric:
    """One of FABRICS by its name, or MICROSECONDS:MEGABYTES_PER_SECOND, as in 20:12000; `free` costs nothing."""
    if text in FABRICS:
        return FABRICS[text]
    if text == "free":
        return Fabric("free", 0.0, math.inf)
    alpha, _, beta = text.partition(":")
    try:
        fabric = Fabric(text, float(alpha) * 1e-6, float(beta) * 1e6)
    except ValueError:
        fabric = None
    if fabric is None or not (0 <= fabric.alpha < math.inf and 0 < fabric.beta < math.inf):
        raise UserError(f"no fabric is named {text}; choose one of {', '.join(FABRICS)}, or give its latency and rate "
                        "as MICROSECONDS:MEGABYTES_PER_SECOND, as in 20:12000")
    return fabric


def count_hops(kind: str, num_ranks: int) -> tuple[int, float]:
    """Steps of a ring's collective, and what goes through each link as a part of the whole buffer."""
    rounds = 2 if kind == "all_reduce" else 1
    return rounds * (num_ranks - 1), rounds * (num_ranks - 1) / num_ranks


@dataclass(frozen=True)
class Network:
    """Ranks that a fabric connects; where several share a node, NVLink connects them there."""
    fabric:    Fabric
    num_ranks: int
    num_nodes: int    # 1 or num_ranks: the fabric connects all of them alike

    def __post_init__(self):
        if not 0 < self.num_nodes <= self.num_ranks or self.num_ranks % self.num_nodes:
            raise UserError(f"{self.num_ranks} ranks can't be shared by {self.num_nodes} nodes evenly; the nodes must "
                            "divide the ranks")

    def time(self, kind: str, num_bytes: float) -> float:
        """Seconds of a collective on a whole buffer of num_bytes (what a rank sends in reduce_scatter, receives in
        all_gather). Rings of all cards at once, as NCCL makes them: a node's cards add up."""
        n, fabric = self.num_ranks, self.fabric
        nodes = n if self.num_nodes == 1 else self.num_nodes
        inner, per_node, beta = FABRICS["nvlink"], n // nodes, fabric.beta
        if per_node > 1:
            beta = min(inner.beta, beta * (per_node if fabric.has_card_per_gpu else 1))
        hops, factor = count_hops(kind, n)
        outer_hops = hops // (n - 1) * (nodes - 1) if n > 1 else 0
        ring = outer_hops * fabric.alpha + (hops - outer_hops) * inner.alpha + num_bytes * factor / beta
        if kind != "all_reduce":
            return ring
        depth = math.ceil(math.log2(nodes))    # of a tree of nodes, a chain within each
        return min(ring, 2 * (depth * fabric.alpha + (per_node - 1) * inner.alpha + num_bytes * (n > 1) / beta))


# ---------------------------------------------------------------------------------------------------------------------
# The messages of a step


class Event(NamedTuple):
    """What a rank does: it computes, starts a message, or waits for one."""
    kind:    str             # "compute", "wait", or a collective
    phase:   str             # forward, backward, update
    amount:  float = 0       # FLOPs, or bytes of the whole buffer
    key:     object = None   # of the message
    is_host: bool = False    # between the ranks' Python: on a GPU it isn't queued behind the gradients


def make_meta_optimizer(config: GPTConfig, machine: Machine, rule: TrainingRule) -> MuonAdamW:
    """An optimizer over parameters that take no memory: that of the last rank, which has the fewest heads and so the
    longest update."""
    import torch  # here, not above, so that scripts.plan answers at once where no network is named

    from nanochat.gpt import GPT
    with torch.device("meta"):
        model = GPT(config, getattr(torch, machine.dtype))
    optimizer = model.setup_optimizer(rule=rule)
    optimizer.divide(machine.world_size - 1, machine.world_size)
    return optimizer


def find_layer(name: str, config: GPTConfig) -> int:
    """The layer whose backward pass reaches a parameter: as layer L the head, -1 what is before the blocks."""
    numbers = [int(word) for word in name.split(".") if word.isdecimal()]
    return numbers[0] if numbers else config.n_layer if name == "lm_head.weight" else -1


def count_muon_flops(rows: int, cols: int, num: int = 1, num_by_head: int = 0, head_dim: int = 1) -> int:
    """FLOPs of the orthogonalisation of `num` matrices, `num_by_head` of them in heads of `head_dim` rows."""
    def count(rows: int) -> int:    # of three products in each iteration: A = X X^T, A^2, B X
        short, long = sorted((rows, cols))
        return MUON_STEPS * (4 * short**2 * long + 2 * short**3)
    return (num - num_by_head) * count(rows) + num_by_head * (rows // head_dim) * count(head_dim)


def count_update(part: Part, optimizer: MuonAdamW, has_bf16_gathers: bool) -> tuple[float, int]:
    """FLOPs of the update of a part on its rank, and bytes of the whole that is gathered."""
    param, group = part.params[0], part.group
    if group["kind"] == "adamw":
        return ADAM_FLOPS * param.numel() * part.num_own / len(param), param.nbytes
    rows, cols = param.shape[-2:]
    num = part.num_own * optimizer.world_size if part.is_stacked else len(param)
    dtype = has_bf16_gathers and optimizer.matmul_dtype or param.dtype
    return (count_muon_flops(rows, cols, part.num_own, part.num_by_head, group["head_dim"]),
            num * rows * cols * dtype.itemsize)


def list_step(config: GPTConfig, machine: Machine, micro_tokens: int, num_micro: int = 1, rule: TrainingRule = OURS,
              reduces_in_backward: bool = True, has_bf16_gathers: bool = True) -> list[Event]:
    """What the last rank does in a step of num_micro micro-batches, in order.

    reduces_in_backward, has_bf16_gathers: False is what the step would cost without them
    """
    n, master = machine.world_size, machine.master_bytes
    optimizer = make_meta_optimizer(config, machine, rule)
    layers = {key: find_layer(name, config) for key, name in optimizer.names.items()}
    sent: dict[int, list[object]] = {id(part): [] for part in optimizer.parts}
    events, keys = [], itertools.count()

    def start(kind: str, phase: str, num_bytes: int, is_host: bool = False) -> object:
        events.append(Event(kind, phase, num_bytes, next(keys), is_host))
        return events[-1].key

    def wait(phase: str, *messages: object) -> None:
        events.extend(Event("wait", phase, key=key) for key in messages)

    def all_reduce(phase: str, num_bytes: int, is_host: bool = False) -> None:
        if n > 1:
            wait(phase, start("all_reduce", phase, num_bytes, is_host))
    all_reduce("forward", 2 * 8, is_host=True)    # targets of the step
    flops = count_layer_flops(config, micro_tokens)
    loss = flops.pop(config.n_layer)
    total = sum(flops.values())
    # the fused loss makes the head's gradients with the logits
    in_forward = loss if machine.loss == "fused" else loss / 3
    events.append(Event("compute", "forward", (num_micro - 1) * (total + loss) + total / 3 + in_forward))
    left = [(min(layers[id(param)] for param in piece.params), piece) for piece in optimizer.pieces if n > 1]
    for layer in [config.n_layer, *reversed(range(config.n_layer)), -1]:
        events.append(Event("compute", "backward", flops[layer] * 2 / 3 if layer in flops else
                            loss - in_forward if layer >= 0 else 0))
        while left and (layer < 0 or reduces_in_backward and left[0][0] >= layer):
            part = left.pop(0)[1].part
            num_bytes = part.params[0].nbytes * (n if part.is_stacked else 1)
            sent[id(part)].append(start("reduce_scatter" if part.is_sharded else "all_reduce", "backward", num_bytes))
    all_reduce("backward", 4, is_host=True)       # whether a rank ran out of memory
    for _ in range((machine.dtype == "float16") + 2 * bool(rule.max_norm)):    # norms that come before the update
        for messages in sent.values():
            wait("update", *messages)
            messages.clear()
        all_reduce("update", master)
    gathers = []
    for part in optimizer.parts:
        wait("update", *sent[id(part)])
        update_flops, num_bytes = count_update(part, optimizer, has_bf16_gathers)
        events.append(Event("compute", "update", update_flops))
        if n > 1 and part.is_sharded:
            gathers.append(start("all_gather", "update", num_bytes))
    if not rule.max_norm:
        all_reduce("update", master)              # the norm of the gradients
    wait("update", *gathers)
    all_reduce("update", master)                  # the loss
    num_moe = sum(map(config.has_experts, range(config.n_layer)))
    if config.top_k < config.num_experts and num_moe:
        all_reduce("update", num_moe * (config.num_experts * (HISTOGRAM_BINS + 1) + 2) * 8)
    return events


def count_layer_flops(config: GPTConfig, num_tokens: int) -> dict[int, float]:
    """Training FLOPs of each block and, as layer L, of the head, as config.estimate_flops counts them."""
    C, L = config.n_embd, config.n_layer
    flops = {L: 6.0 * config.padded_vocab_size * C * num_tokens}
    for layer in range(L):
        active = sum(map(math.prod, list_matrices(config, layer)))
        if config.has_experts(layer):
            active += config.top_k * 2 * C * config.expert_dim + config.num_experts * C
        keys = min(config.window(layer), config.sequence_len)
        flops[layer] = (6.0 * active + 12 * config.n_head * config.head_dim * keys) * num_tokens
    return flops


# ---------------------------------------------------------------------------------------------------------------------
# The time of a step


@dataclass(frozen=True)
class StepTime:
    """A step on one rank, predicted."""
    compute_sec:  float
    link_sec:     float               # all messages, one after the other
    exposed_sec:  dict[str, float]    # of these what no computation hides, by phase
    num_messages: int
    num_bytes:    float               # of all buffers

    @property
    def step_sec(self) -> float:
        return self.compute_sec + sum(self.exposed_sec.values())


def simulate(events: list[Event], sec_per_flop: dict[str, float] | float, network: Network,
             free_sec: dict[object, float] | None = None) -> StepTime:
    """Go through a step's events with two clocks, the rank's and its link's.

    sec_per_flop: of each phase, or of all
    free_sec:     how long each message is waited for where the network costs nothing
    """
    now = free_at = compute_sec = link_sec = num_bytes = 0.0
    due: dict[object, float] = {}
    exposed = Counter(dict.fromkeys(("forward", "backward", "update"), 0.0))
    for kind, phase, amount, key, is_host in events:
        if kind == "compute":
            seconds = amount * (sec_per_flop if isinstance(sec_per_flop, float) else sec_per_flop[phase])
            now, compute_sec = now + seconds, compute_sec + seconds
        elif kind == "wait":
            gap = max(0.0, due[key] - now, free_sec[key] if free_sec else 0.0)
            now, exposed[phase] = now + gap, exposed[phase] + gap
        else:
            seconds = network.time(kind, amount)
            link_sec, num_bytes = link_sec + seconds, num_bytes + amount
            due[key] = (now if is_host else max(now, free_at)) + seconds
            free_at = free_at if is_host else due[key]
    return StepTime(compute_sec, link_sec, dict(exposed), len(due), num_bytes)


def predict_step(config: GPTConfig, machine: Machine, network: Network, flops_per_sec: float, micro_tokens: int,
                 num_micro: int, **settings) -> StepTime:
    """A step on GPUs that compute so many model FLOPs per second; settings: of list_step."""
    machine = replace(machine, world_size=network.num_ranks)
    return simulate(list_step(config, machine, micro_tokens, num_micro, **settings), 1 / flops_per_sec, network)
