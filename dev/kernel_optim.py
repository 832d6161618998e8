"""The optimizer in the kernel bench: Muon's orthogonalisation alone, its whole update, AdamW's.

K matrices of one shape (rows, cols) in a stack; V vocabulary, C channels. Queries and keys are there whole, as older
rules have them, and by heads, as today's: those shapes have run on CPUs only, no GPU has seen them yet.
"""

import torch
from torch import Tensor

from dev.kernel_ops import Inputs, Operation, Scale, Setting, Shape, Variant, is_compiled, with_kernels
from nanochat.fabric import count_muon_flops
from nanochat.optim import POLAR_EXPRESS, MuonRule, adamw_update, as_scalars, list_state, muon_update, orthogonalize

# By the activations' dtype; with fp16 all parameters are fp32. Orthogonalisation in tf32 and bf16 is inexact by design:
# singular values only have to come near 1
MUON_TOLERANCES = {torch.float32: 0.02, torch.float16: 0.02, torch.bfloat16: 0.06}
ADAMW_TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 0.01}
ADAMW_RATES = dict(lr=0.02, beta1=0.8, beta2=0.95, eps=1e-10, weight_decay=0.1, step=3)
MUON_RATES = dict(lr=0.02, mu=0.95, beta2=0.9, weight_decay=0.1)
NUM_STEPS = len(POLAR_EXPRESS)


def list_stacks(scale: Scale) -> dict[str, Shape]:
    """The matrices of the blocks, by shape, and the heads of their queries and keys."""
    C, hidden, L = scale.config.n_embd, scale.config.hidden_dim, scale.config.n_layer
    return {"square": {"K": 4 * L, "rows": C, "cols": C},
            "heads": {"K": 2 * L * scale.config.n_head, "rows": scale.config.head_dim, "cols": C},
            "c_fc": {"K": L, "rows": hidden, "cols": C}, "c_proj": {"K": L, "rows": C, "cols": hidden}}


def list_updates(scale: Scale) -> dict[str, Shape]:
    """The same matrices; the heads are those of half of the square ones."""
    stacks = list_stacks(scale)
    by_heads = {"num_by_head": 2 * scale.config.n_layer, "head_dim": scale.config.head_dim}
    return stacks | {"heads": stacks["square"] | by_heads}


def make_stack(shape: Shape, setting: Setting) -> Inputs:
    """Random matrices of Frobenius norm 1, as the momentum is prepared."""
    X = torch.randn(shape["K"], shape["rows"], shape["cols"], device=setting.device)
    return {"X": (X / X.square().sum((-2, -1), keepdim=True).sqrt()).to(get_storage_dtype(setting))}


def get_storage_dtype(setting: Setting) -> torch.dtype:
    """Of embeddings and of Muon's products: fp16's range is too small."""
    return torch.bfloat16 if setting.dtype == torch.bfloat16 else torch.float32


def make_muon_inputs(shape: Shape, setting: Setting) -> Inputs:
    """State as in the first steps: a row, a whole matrix and, where there are heads, one of them without a gradient."""
    size = shape["K"], shape["rows"], shape["cols"]
    param, grad = torch.randn(2, *size, device=setting.device)
    grad[0] = 0
    grad[-1, 0] = 0
    heads = {name: shape.get(name, 0) for name in ("num_by_head", "head_dim")}
    grad[1:2, :heads["head_dim"]] = 0
    state = {name: torch.zeros(state_size, device=setting.device)
             for name, state_size in list_state("muon", size).items()}
    return {"param": 0.02 * param, "gradient": grad, **state, "matmul_dtype": get_storage_dtype(setting),
            **name_scalars(MUON_RATES), **heads}


def name_scalars(rates: dict[str, float]) -> dict[str, Tensor]:
    return dict(zip(rates, as_scalars(list(rates.values())), strict=True))


def list_adamw_shapes(scale: Scale) -> dict[str, Shape]:
    return {"embedding": {"V": scale.config.padded_vocab_size, "C": scale.config.n_embd}}


def make_adamw_inputs(shape: Shape, setting: Setting) -> Inputs:
    """Parameter, gradient and moments of an embedding, half of whose rows have no gradient."""
    size = shape["V"], shape["C"]
    param, grad, moment = (torch.randn(size, device=setting.device).to(get_storage_dtype(setting)) for _ in range(3))
    grad[::2] = 0
    return {"param": param, "gradient": grad, "exp_avg": 0.1 * moment, "exp_avg_sq": 0.01 * moment.square(),
            **name_scalars(ADAMW_RATES)}


def count_orthogonalize_flops(shape: Shape) -> int:
    return count_muon_flops(shape["rows"], shape["cols"], shape["K"], shape.get("num_by_head", 0),
                            shape.get("head_dim", 1))


def orthogonalize_stack(X: Tensor) -> Tensor:
    return orthogonalize(X, NUM_STEPS)


def orthogonalize_each(X: Tensor) -> Tensor:
    return torch.cat([orthogonalize(matrix, NUM_STEPS) for matrix in X.split(1)])


def iterate(X: Tensor) -> Tensor:
    """Polar Express as its paper writes it."""
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + b * A @ X + c * A @ A @ X
    return X


def update_muon(param: Tensor, gradient: Tensor, momentum: Tensor, second_moment: Tensor, matmul_dtype: torch.dtype,
                lr: Tensor, mu: Tensor, beta2: Tensor, weight_decay: Tensor, num_by_head: int, head_dim: int) -> None:
    muon_update(param, gradient, momentum, second_moment, NUM_STEPS, matmul_dtype, lr, mu, beta2, weight_decay,
                MuonRule(), num_by_head, head_dim)


def update_adamw(*args: Tensor) -> None:
    adamw_update(*args)


OPERATIONS = (
    Operation("orthogonalize", "optimizer", "(X (K, rows, cols)) -> the same with all singular values near 1",
              list_stacks, make_stack, iterate, count_orthogonalize_flops, MUON_TOLERANCES,
              (Variant("one by one", orthogonalize_each), Variant("stacked", orthogonalize_stack))),
    Operation("muon_update", "optimizer", "(param (K, rows, cols), gradient, momentum, second_moment, matmul_dtype, "
              "lr, mu, beta2, weight_decay, num_by_head, head_dim): one step in place, rates are 0-d tensors, the "
              "first num_by_head matrices have heads of head_dim rows",
              list_updates, make_muon_inputs, with_kernels(update_muon, False), count_orthogonalize_flops,
              MUON_TOLERANCES,
              (Variant("ours", with_kernels(update_muon, False)),
               Variant("ours, compiled", with_kernels(update_muon), is_compiled)),
              changes=("param", "momentum", "second_moment"), has_result=False),
    Operation("adamw_update", "optimizer", "(param (V, C), gradient, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, "
              "weight_decay, step): one step in place, rates are 0-d tensors",
              list_adamw_shapes, make_adamw_inputs, with_kernels(update_adamw, False),
              lambda shape: 16 * shape["V"] * shape["C"], ADAMW_TOLERANCES,
              (Variant("ours", with_kernels(update_adamw, False)),
               Variant("ours, compiled", with_kernels(update_adamw), is_compiled)),
              changes=("param", "exp_avg", "exp_avg_sq"), has_result=False),
)
