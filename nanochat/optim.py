"""MuonAdamW: AdamW for embeddings, head and scalars, Muon for the matrices of the transformer; one rank or many.

AdamW (arXiv 1711.05101): decoupled weight decay, bias-corrected, arithmetic in fp32 whatever the storage.
Muon (K. Jordan 2024, kellerjordan.github.io/posts/muon): momentum whose singular values are all moved to 1, so that
rare directions of a gradient count as much as common ones; about twice AdamW's efficiency at scale (arXiv 2502.16982).
Its six steps here have their sources beside their lines. In nanochat's public log (2026-01-10) Polar Express made no
visible difference, NorMuon a very small gain, cautious decay a solid one; this code base has not measured them alone.

ZeRO-2 (arXiv 1910.02054): each rank keeps the state of its part only, and updates that part: a range of rows of a large
AdamW parameter, whole matrices of each shape for Muon. Small AdamW parameters are updated by every rank.
A parameter of experts, (E, rows, columns), is E matrices to Muon and a range of E rows to what shards it: updated where
it lies, a slice of bounded memory after the other, since a copy of all experts would be most of a step's memory.

    gradients --reduce_scatter--> this rank's part --update--> parameters --all_gather--> every rank

Of K matrices of one shape rank r has the i-th where i % world == r, n = ceil(K / world) at most; missing ones are
zeros. So `world` matrices of neighbouring layers make one message, which is sent while the backward pass goes on.
A matrix that the forward pass casts to bf16 is gathered in bf16: only its owner has it in fp32, until `gather_masters`.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat import scaling
from nanochat.compilation import fused
from nanochat.memory import SMALL_PARAM, count_own_rows, count_slice
from nanochat.scaling import JULY26, TrainingRule

# (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X, iteration by iteration (arXiv 2505.16932)
POLAR_EXPRESS = (
    (8.156554524902461,  -22.48329292557795,  15.878769915207462),
    (4.042929935166739,  -2.808917465908714,  0.5000178451051316),
    (3.8916678022926607, -2.772484153217685,  0.5060648178503393),
    (3.285753657755655,  -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


class MuonRule(NamedTuple):
    """Which of the six steps a kind of Muon takes, and with which figures; by default all of them."""
    equalizes_rows:  bool  = True    # 2. MuonEq
    margin:          float = 1.01    # 3. X is divided by margin * norm + eps, and then
    eps:             float = 1e-6
    coefficients:    tuple[tuple[float, float, float], ...] = POLAR_EXPRESS    # moved by these
    by_heads:        bool  = False   # step 3 for each head of the queries and keys, not for the matrix
    fixes_norm:      bool  = True    # 4. Muon+
    has_neuron_norm: bool  = True    # 5. NorMuon
    is_cautious:     bool  = True    # 6. cautious decay, plain otherwise


# torch 2.13 has new names for these two, and warns about the old ones
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)
all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass
class Part:
    """The unit of reduction and update: a parameter of AdamW or of experts, or all other Muon matrices of one shape."""
    group:       dict
    params:      list[nn.Parameter]
    is_stacked:  bool                     # whether it is those matrices
    is_sharded:  bool
    num_own:     int                      # rows, or matrices of this rank's stack, missing ones included
    start:       int                      # this rank's rows, or experts, of the parameter
    stop:        int
    matrices:    list[nn.Parameter]       # where they are stacked: those of this rank
    num_by_head: int                      # and how many of them, the first ones, are orthogonalised by heads
    grad:        Tensor | None = None     # of this rank's rows or matrices, summed over the ranks
    messages:    list[tuple[dist.Work, Tensor]] = field(default_factory=list)  # under way; their inputs are kept alive

    def wait(self) -> Tensor:
        """This rank's gradient, once it is reduced."""
        for work, _ in self.messages:
            work.wait()
        self.messages.clear()
        return self.grad

    def get_own(self) -> Tensor:
        """This rank's rows or experts where they lie, or a stack of its matrices, (num_own, rows, columns)."""
        param = self.params[0]
        return stack_padded(self.matrices, self.num_own, param) if self.is_stacked else param[self.start:self.stop]


@dataclass
class Piece:
    """The unit of reduction: a parameter, or as many neighbouring stacked matrices as there are ranks."""
    part:        Part
    params:      list[nn.Parameter]
    idx:         int       # of the matrix of this rank's stack that it fills
    num_missing: int = 0   # parameters whose gradients the backward pass hasn't reached yet


@dataclass(frozen=True)
class StateSlice:
    """One tensor of the optimizer's state as this rank has it: `tensor` is rows [start, stop) of `num_rows`."""
    tensor:   Tensor
    start:    int
    stop:     int
    num_rows: int
    is_ours:  bool   # whether this rank saves it; rank 0 saves state that all ranks hold


class MuonAdamW(torch.optim.Optimizer):
    def __init__(self, groups: Sequence[dict], names: dict[int, str] | None = None,
                 matmul_dtype: torch.dtype | None = None):
        """One optimizer for all parameters. Collective: all ranks make it, and call it together.

        groups:       dicts with kind 'adamw' (lr, betas, eps, weight_decay; max_norm, to which the gradients of all
                      groups that have it are clipped together) or 'muon' (lr, momentum, ns_steps, beta2, weight_decay,
                      rule; matrices of one shape, the first num_by_head of which have heads of head_dim rows; or
                      such parameters of experts)
        names:        id(parameter) -> its name in the model, for saved state, in the order in which the backward pass
                      reaches the parameters
        matmul_dtype: of Muon's orthogonalisation and of the forward pass, which casts the matrices; None means the
                      parameters' own
        """
        for group in groups:
            group["initial_lr"], group["initial_weight_decay"] = group["lr"], group["weight_decay"]
        super().__init__(groups, defaults={})
        self.names, self.matmul_dtype, self.num_steps = names or {}, matmul_dtype, 0
        self.divide(*((dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)))

    def divide(self, rank: int, world_size: int) -> None:
        """Divide the work among so many ranks; this is one of them (or, in fabric.py, would be)."""
        self.rank, self.world_size = rank, world_size
        self.parts: list[Part] = []
        for group in self.param_groups:
            is_stacked = group["kind"] == "muon" and group["params"][0].dim() == 2
            for params in [group["params"]] if is_stacked else [[param] for param in group["params"]]:
                num = len(params) if is_stacked else len(params[0])
                num_own = -(-num // self.world_size) if is_stacked else \
                    count_own_rows(num, params[0].numel() // num, self.world_size)
                is_sharded = is_stacked or num_own < num
                start = min(self.rank * num_own, num) if is_sharded else 0
                matrices = params[self.rank::self.world_size] if is_stacked else []
                self.parts.append(Part(group, params, is_stacked, is_sharded, num_own, start, min(start + num_own, num),
                                       matrices, len(params[self.rank:group.get("num_by_head", 0):self.world_size])))
        self.pieces = [piece for part in self.parts for piece in self._cut(part)]
        # All ranks must send in one order; the best one is that in which gradients come
        place = {key: place for place, key in enumerate(self.names)}
        self.pieces.sort(key=lambda piece: max(place.get(id(param), 0) for param in piece.params))
        self.num_sent = 0  # pieces of this step whose reduction has begun

    def _cut(self, part: Part) -> list[Piece]:
        """The pieces of a part, from the end, which the backward pass reaches first; one rank alone sends none."""
        num = self.world_size if part.is_stacked and self.world_size > 1 else len(part.params)
        return [Piece(part, part.params[i:i + num], i // num) for i in reversed(range(0, len(part.params), num))]

    @contextlib.contextmanager
    def reduce_in_backward(self) -> Iterator[None]:
        """Around the backward pass of a step's last micro-batch: each reduction starts as soon as its gradients are
        complete, and all before it in the order have started. Those that are left wait for `reduce_gradients`."""
        def receive(piece: Piece, _: nn.Parameter) -> None:
            piece.num_missing -= 1
            while self.num_sent < len(self.pieces) and self.pieces[self.num_sent].num_missing == 0:
                self._reduce_next()
        hooks = []
        for piece in self.pieces if self.world_size > 1 else ():
            learning = [param for param in piece.params if param.requires_grad]  # others may be frozen
            piece.num_missing = len(learning)
            hooks += [param.register_post_accumulate_grad_hook(functools.partial(receive, piece))
                      for param in learning]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def reduce_gradients(self) -> None:
        """Start to sum over all ranks what isn't summed yet; the parameters' own gradients are dropped. Collective.

        A sum, not a mean: the loss is divided by the whole step's targets already.
        """
        while self.num_sent < len(self.pieces):
            self._reduce_next()

    @torch.no_grad()
    def _reduce_next(self) -> None:
        """Start the next reduction in the order."""
        piece, is_sent = self.pieces[self.num_sent], self.world_size > 1
        part = piece.part
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in piece.params]  # None counts as zero
        for param in piece.params:
            param.grad = None
        grad = stack_padded(grads, max(len(grads), self.world_size), grads[0]) if part.is_stacked else grads[0]
        del grads
        if is_sent and part.is_sharded:
            if part.grad is None:
                part.grad = grad.new_empty(part.num_own, *grad.shape[1:])
            own = part.grad[piece.idx:piece.idx + 1] if part.is_stacked else part.grad
            part.messages.append((reduce_scatter(own, grad, async_op=True), grad))
        else:
            part.grad = grad
            part.messages += [(dist.all_reduce(grad, async_op=True), grad)] if is_sent else []
        self.num_sent += 1  # last: a piece that memory runs out for is still to be sent, as zeros

    def wait_gradients(self) -> list[Tensor]:
        """This rank's gradients, summed over the ranks; `step` uses them, changes in place included."""
        return [part.wait() for part in self.parts]

    def get_grad_norm(self, parts: Sequence[Part] | None = None) -> Tensor:
        """The Euclidean norm of all gradients, or of some parts', accumulated in at least fp32. Collective."""
        def measure(part: Part) -> Tensor:
            grad = part.wait()
            return torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
        parts = self.parts if parts is None else parts
        # What all ranks hold counts once
        norms = [measure(part) for part in parts if part.is_sharded or self.rank == 0]
        norm = torch.linalg.vector_norm(torch.stack(norms or [torch.zeros_like(measure(parts[0]))]))
        if self.world_size == 1:
            return norm
        sq_norm = norm.square()
        dist.all_reduce(sq_norm)
        return sq_norm.sqrt()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, also those summed over the ranks."""
        super().zero_grad(set_to_none)
        for part in self.parts:
            part.wait()
            part.grad = None
        self.num_sent = 0

    @torch.no_grad()
    def step(self) -> Tensor:
        """Update all parameters from their gradients, drop these, and return their norm. Collective.

        Three phases, so that one part's communication runs beside another's update: start the reductions that haven't
        begun yet, update part by part and start its gather, wait for the gathers.
        """
        self.reduce_gradients()
        self.num_steps += 1
        clipped = [part for part in self.parts if part.group.get("max_norm")]
        grad_norm = self._clip(clipped) if clipped else None
        gathers = [self._update(part) for part in self.parts]
        grad_norm = self.get_grad_norm() if grad_norm is None else grad_norm
        for finish in filter(None, gathers):
            finish()
        self.zero_grad()
        return grad_norm

    def _clip(self, parts: list[Part]) -> Tensor:
        """Scale the gradients of these parts down to max_norm; returns the norm of all gradients before. Collective:
        the norm is that of all ranks' rows together."""
        grad_norm, norm = self.get_grad_norm(), self.get_grad_norm(parts)
        factor = (parts[0].group["max_norm"] / norm).clamp(max=1.0)
        for part in parts:
            part.wait().mul_(factor)    # the norm is rank 0's to measure, where all ranks hold the gradient
        return grad_norm

    def _update(self, part: Part) -> Callable[[], None] | None:
        """Update this rank's rows or matrices; returns the end of their gather, None where nothing is sent."""
        group, state, is_sent = part.group, self._get_state(part).values(), part.is_sharded and self.world_size > 1
        grad, own = part.wait(), part.get_own()
        if group["kind"] == "adamw":
            param = part.params[0]
            update = adamw_update if param.numel() >= SMALL_PARAM else adamw_update.__wrapped__
            update(own, grad, *state,
                   *as_scalars([group["lr"], *group["betas"], group["eps"], group["weight_decay"], self.num_steps]))
            if not is_sent:
                return None
            own = own.clone()  # gloo doesn't promise to gather in place
            work = all_gather(param.data, own, async_op=True)
            return lambda own=own: work.wait()  # the gather reads `own`
        if part.is_stacked:
            self._update_matrices(group, own, grad, *state, num_by_head=part.num_by_head)
            copy_all(part.matrices, own)
        else:
            size = count_slice(len(own), own[0].nbytes)
            for some in zip(*(tensor.split(size) for tensor in (own, grad, *state)), strict=True):
                self._update_matrices(group, *some, skips_idle=True)
        return self._gather(part, own.to(self.matmul_dtype or own.dtype)) if is_sent else None

    def _update_matrices(self, group: dict, own: Tensor, grad: Tensor, momentum: Tensor, second_moment: Tensor,
                         num_by_head: int = 0, skips_idle: bool = False) -> None:
        """Muon's step on a stack, in place.

        num_by_head: matrices, the first ones, that are orthogonalised by heads
        skips_idle:  a matrix without a gradient, an expert without a token, stays bit for bit where it is, and so does
                     its state: what momentum is left would move it by a whole step
        """
        rows, cols = own.shape[-2:]
        lr = group["lr"] * max(1.0, rows / cols) ** 0.5  # so that outputs move as much, whatever the shape
        lr, mu, beta2, decay = as_scalars([lr, group["momentum"], group["beta2"], group["weight_decay"]])
        if own.device.type == "mps":    # whose lerp takes no weight on the CPU before torch 2.14
            mu, beta2 = mu.to(own.device), beta2.to(own.device)
        if skips_idle:
            is_used = grad.flatten(1).abs().amax(1)[:, None, None] > 0    # (n, 1, 1)
            # filled on the GPU itself: to copy a number there waits for all that is queued
            lr, mu, beta2 = (torch.where(is_used, own.new_full((), value.item()), unmoved)
                             for value, unmoved in ((lr, 0.0), (mu, 1.0), (beta2, 1.0)))
        muon_update(own, grad, momentum, second_moment, group["ns_steps"], self.matmul_dtype or own.dtype,
                    lr, mu, beta2, decay, group.get("rule", MuonRule()), num_by_head, group.get("head_dim", 0))

    def _gather(self, part: Part, own: Tensor) -> Callable[[], None]:
        """Start to send this rank's stack of matrices, or its experts, to all others; returns what waits for theirs and
        stores them."""
        whole = own.new_empty(len(own) * self.world_size, *own.shape[1:])
        work = all_gather(whole, own, async_op=True)

        def finish(own: Tensor = own) -> None:  # kept alive while the gather reads it
            work.wait()
            for rank, theirs in enumerate(whole.split(len(own))):
                if rank != self.rank and part.is_stacked:
                    copy_all(part.params[rank::self.world_size], theirs)
                elif rank != self.rank:
                    part.params[0][rank * len(own):(rank + 1) * len(own)].copy_(theirs)
        return finish

    @torch.no_grad()
    def gather_masters(self) -> None:
        """Give every rank all matrices as their owners have them; a checkpoint holds these. Collective."""
        for part in self.parts if self.world_size > 1 else ():
            dtype = part.params[0].dtype
            if part.group["kind"] == "muon" and part.is_sharded and dtype != (self.matmul_dtype or dtype):
                self._gather(part, part.get_own())()

    def set_rates(self, lr_frac: float, momentum: float, decay_frac: float = 1.0) -> None:
        """The figures of the next step: the part of each learning rate and of Muon's weight decay, Muon's momentum."""
        for group in self.param_groups:
            group["lr"] = group["initial_lr"] * lr_frac
            if group["kind"] == "muon":
                group |= {"momentum": momentum, "weight_decay": group["initial_weight_decay"] * decay_frac}

    def get_named_state(self) -> dict[str, StateSlice]:
        """This rank's state as a checkpoint holds it: `<parameter>.<state>`, Muon's matrix by matrix, or by expert."""
        named = {}
        for part in self.parts:
            for key, tensor in self._get_state(part).items():
                params, slices = part.params, [StateSlice(tensor, part.start, part.stop, len(part.params[0]),
                                                          part.is_sharded or self.rank == 0)]
                if part.is_stacked:
                    params = part.matrices  # without padding
                    slices = [StateSlice(matrix, 0, len(matrix), len(matrix), True) for matrix in tensor[:len(params)]]
                named |= {f"{self.names[id(param)]}.{key}": piece for param, piece in zip(params, slices, strict=True)}
        return named

    @torch.no_grad()
    def load_named_state(self, read: Callable[[str, int, int, int], Tensor], num_steps: int) -> None:
        """Restore state that any number of ranks saved.

        read: (name, first row, end row, rows of the whole) -> these rows; called only for rows that this rank keeps
        """
        self.num_steps = num_steps
        for name, piece in self.get_named_state().items():
            rows = read(name, piece.start, piece.stop, piece.num_rows)
            if rows.shape != piece.tensor.shape:  # copy_ would broadcast it
                raise ValueError(f"{name} has shape {tuple(rows.shape)}, not {tuple(piece.tensor.shape)}")
            piece.tensor.copy_(rows)

    def _get_state(self, part: Part) -> dict[str, Tensor]:
        """Zeros at first; one stack for all matrices of a shape, kept with the first of them."""
        param = part.params[0]
        if not self.state[param]:
            own = (part.num_own, *(param.shape if part.is_stacked else param.shape[1:]))
            shapes = list_state(part.group["kind"], own)
            self.state[param] = {key: param.new_zeros(shape) for key, shape in shapes.items()}
        return self.state[param]

    def count_state_bytes(self) -> int:
        """Bytes of the state of all ranks together, as a checkpoint holds it."""
        return sum(math.prod(shape) * param.element_size() for group in self.param_groups for param in group["params"]
                   for shape in list_state(group["kind"], param.shape).values())


def make_optimizer(model: nn.Module, *, unembedding_lr: float = scaling.UNEMBEDDING_LR,
                   embedding_lr: float = scaling.EMBEDDING_LR, matrix_lr: float = scaling.MATRIX_LR,
                   scalar_lr: float = scaling.SCALAR_LR, weight_decay: float = scaling.WEIGHT_DECAY,
                   batch_lr_scale: float = 1.0, rule: TrainingRule = JULY26) -> MuonAdamW:
    """The optimizer of a GPT. Rates and betas as the public record tuned them at 768 channels, or as a rule has them.
    Those of head and embeddings fall with the root of the width; batch_lr_scale multiplies all but that of smear and
    backout (ADAM_GROUPS in scaling.py).

    rates are those before they are scaled; weight_decay: Muon's
    """
    rates = {"unembedding_lr": unembedding_lr, "embedding_lr": embedding_lr, "scalar_lr": scalar_lr,
             "matrix_lr": matrix_lr, "": 1.0}
    scales = {"width": (model.config.n_embd / 768) ** -0.5 * batch_lr_scale, "batch": batch_lr_scale, "": 1.0}
    of_blocks = {kind: [param for name, param in model.transformer.h.named_parameters()
                        if name.endswith(".router.weight") == (kind == "routers")] for kind in ("routers", "matrices")}
    params = {"lm_head": [model.lm_head.weight], "wte": [model.transformer.wte.weight],
              "value_embeds": list(model.value_embeds.parameters()), "resid_lambdas": [model.resid_lambdas],
              "x0_lambdas": [model.x0_lambdas], **of_blocks,
              "gates": [model.smear_gate and model.smear_gate.weight, model.smear_lambda, model.backout_lambda]}
    params = {name: [param for param in members if param is not None] for name, members in params.items()}
    groups = [{"kind": "adamw", "name": row.name, "params": params[row.name],
               "lr": rates[row.rate] * row.factor * scales[row.scaling], "betas": row.betas, "eps": rule.adam_eps,
               "weight_decay": row.weight_decay, "max_norm": rule.max_norm}
              for row in rule.groups if params[row.name]]    # of what this model has
    by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for param in params["matrices"] if rule.has_muon else ():
        by_shape.setdefault(tuple(param.shape), []).append(param)
    muon, head_dim = MuonRule(**rule.muon), model.config.head_dim
    by_head = {linear.weight for block in model.transformer.h for linear in (block.attn.c_q, block.attn.c_k)
               if muon.by_heads and len(linear.weight) > head_dim}
    for members in by_shape.values():
        members.sort(key=lambda param: param not in by_head)
    groups += [{"kind": "muon", "name": "matrices", "params": members, "lr": rates["matrix_lr"] * batch_lr_scale,
                "momentum": 0.95, "ns_steps": 5, "beta2": rule.beta2, "weight_decay": weight_decay, "rule": muon,
                "num_by_head": len(by_head.intersection(members)), "head_dim": head_dim}
               for _, members in sorted(by_shape.items())]
    # In the order in which the backward pass reaches them, so that each is sent as soon as its gradient is there
    modules: list[nn.Module] = [model.lm_head]
    for i, block in reversed(list(enumerate(model.transformer.h))):
        modules += [block, model.value_embeds[str(i)]] if model.config.has_value_embed(i) else [block]
    name_of = {param: name for name, param in model.named_parameters()}
    names = {id(param): name_of[param] for module in (*modules, model) for param in module.parameters()}
    return MuonAdamW(groups, names, matmul_dtype=torch.bfloat16 if model.compute_dtype == torch.bfloat16 else None)


def list_state(kind: str, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state of a parameter or stack, all of its dtype. AdamW: both moments; Muon: the momentum,
    and a second moment for each row or each column, whichever are more."""
    if kind == "adamw":
        return {"exp_avg": tuple(shape), "exp_avg_sq": tuple(shape)}
    *stack, rows, cols = shape
    return {"momentum": tuple(shape), "second_moment": (*stack, rows, 1) if rows >= cols else (*stack, 1, cols)}


def stack_padded(tensors: Sequence[Tensor], num: int, like: Tensor) -> Tensor:
    """A stack of `num` tensors: the given ones, then zeros."""
    return torch.stack([*tensors, *[torch.zeros_like(like)] * (num - len(tensors))])


def copy_all(matrices: list[nn.Parameter], stack: Tensor) -> None:
    """Set the matrices, none perhaps, to the first ones of the stack."""
    if matrices:
        torch._foreach_copy_(matrices, list(stack[:len(matrices)].unbind(0)))


def as_scalars(values: Sequence[float]) -> list[Tensor]:
    """0-d CPU tensors: a Python float's new value would compile a kernel again."""
    return [torch.tensor(value, dtype=torch.float32) for value in values]


@fused
def adamw_update(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: Tensor, beta1: Tensor,
                 beta2: Tensor, eps: Tensor, weight_decay: Tensor, step: Tensor) -> None:
    """One AdamW step in place, on a parameter of any shape."""
    math_dtype = torch.promote_types(param.dtype, torch.float32)
    p, g, m, v = (t.to(math_dtype) for t in (param, grad, exp_avg, exp_avg_sq))
    m = m + (1 - beta1) * (g - m)
    v = v + (1 - beta2) * (g * g - v)
    denom = (v / (1 - beta2 ** step)).sqrt() + eps
    p = p * (1 - lr * weight_decay) - lr / (1 - beta1 ** step) * (m / denom)
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    param.copy_(p)


def muon_update(param: Tensor, grad: Tensor, momentum: Tensor, second_moment: Tensor, ns_steps: int,
                matmul_dtype: torch.dtype, lr: Tensor, mu: Tensor, beta2: Tensor, weight_decay: Tensor,
                rule: MuonRule, num_by_head: int = 0, head_dim: int = 0) -> None:
    """One Muon step in place, on a stack of matrices (K, rows, cols); lr includes the factor for the shape. The first
    `num_by_head` matrices have heads of `head_dim` rows.

    The clamps are part of the recipe. c_proj starts at zero, so most gradients are exactly zero at step 1, and up to
    42% of a matrix's rows still are at step 2: without the clamps all parameters are NaN after one step.
    """
    X = _prepare_momentum(grad, momentum, mu, matmul_dtype, rule)
    if num_by_head:
        # Attention multiplies queries and keys within a head: heads that share no product needn't be orthogonal to each
        # other. Worth 1.04 at depth 4, 1.06 at 6 (dev/LOG.md, "Muon by heads"); modded-nanogpt has pairs of heads
        for stack in (X[:num_by_head].view(-1, head_dim, X.size(-1)), X[num_by_head:]):
            stack.copy_(orthogonalize(stack, ns_steps, rule.coefficients))
    else:
        X = orthogonalize(X, ns_steps, rule.coefficients)
    _apply_update(param, X, second_moment, lr, beta2, weight_decay, rule)


@fused
def _prepare_momentum(grad: Tensor, momentum: Tensor, mu: Tensor, matmul_dtype: torch.dtype,
                      rule: MuonRule) -> Tensor:
    """Steps 1 and 2, and a Frobenius norm just under 1; zero rows and matrices stay zero."""
    # 1. Nesterov momentum, as Muon has it: the average looks one gradient ahead
    momentum.lerp_(grad, 1 - mu.to(grad.dtype))
    X = grad.lerp(momentum, mu.to(grad.dtype))
    # 2. MuonEq (arXiv 2603.28254): rows of equal norm, so that the few iterations below begin nearer to orthogonal
    if rule.equalizes_rows:
        rows = X.size(-2)
        sq_norms = X.square().sum(-1, keepdim=True)  # (K, rows, 1)
        rms_row_norm = (sq_norms.sum(-2, keepdim=True) / rows).sqrt()
        X = X * (rms_row_norm / sq_norms.sqrt().clamp(min=1e-6))
    norm = X.square().sum((-2, -1), keepdim=True).sqrt()
    return (X / (rule.margin * norm + rule.eps)).to(matmul_dtype)  # singular values must be below 1 for step 3


def orthogonalize(X: Tensor, num_steps: int,
                  coefficients: Sequence[tuple[float, float, float]] = POLAR_EXPRESS) -> Tensor:
    """Step 3: move all singular values of each (rows, cols) matrix of the stack towards 1, by matrix products alone.

    Polar Express (arXiv 2505.16932) has the best coefficients for each iteration, where Newton-Schulz repeats the same;
    bf16 is precise enough. Products are stacked: one by one they take 1.2 to 1.4 times as long at 256 channels
    (dev/LOG.md, "Muon's orthogonalisation: what was not taken").
    """
    tall = X.size(-2) > X.size(-1)
    for a, b, c in coefficients[:num_steps]:
        A = X.mT @ X if tall else X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


@fused
def _apply_update(param: Tensor, X: Tensor, second_moment: Tensor, lr: Tensor, beta2: Tensor,
                  weight_decay: Tensor, rule: MuonRule) -> None:
    """Steps 4 to 6: scale the orthogonalised X, equalise its rows or columns, decay, and subtract."""
    rows, cols = X.shape[-2:]
    g = X.to(param.dtype)
    # 4. Muon+ (arXiv 2602.21545; lower perplexity from 60M to 1B parameters): the norm of an exactly orthogonal matrix,
    #    which step 3 only approximates
    if rule.fixes_norm:
        g = g * (min(rows, cols) ** 0.5 / g.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-6))
    # 5. NorMuon (arXiv 2510.05491; 11% more efficient than Muon at 1.1B parameters): Adam's second moment for each
    #    neuron, since orthogonal updates still differ in the norms of their rows; the norm of the whole stays
    if rule.has_neuron_norm:
        mean_square = g.square().mean(-1 if rows >= cols else -2, keepdim=True)
        second_moment.lerp_(mean_square, 1 - beta2.to(param.dtype))
        scaled = g * second_moment.clamp(min=1e-10).rsqrt()
        norm = g.square().sum((-2, -1), keepdim=True).sqrt()
        scaled_norm = scaled.square().sum((-2, -1), keepdim=True).sqrt()
        g = scaled * (norm / scaled_norm.clamp(min=1e-10))
    # 6. Cautious weight decay (arXiv 2510.12402): only where the update shrinks the weight as well
    decayed = weight_decay * param
    if rule.is_cautious:
        decayed = decayed * (g * param >= 0)
    param.sub_(lr * (g + decayed))
