"""The model: a decoder-only transformer. Its only forward pass, for training, evaluation and decoding.

B rows, T tokens, C = n_embd channels, H query heads, Hk key/value heads, D head dim, V vocabulary.

    x = norm(wte[ids]), smeared with the previous token; x0 = x
    for each layer: x = resid_lambda * x + x0_lambda * x0;  x += attn(norm(x));  x += mlp(norm(x))
    x -= backout_lambda * (output of the middle layer)      from depth 3 on
    logits = softcap(lm_head(norm(x)))

To change the model, change it here: decoding.py compiles or captures this code, memory and FLOPs are tested against it.
Each trick says what it is for, where it comes from, and what it gained in the public record, nanochat's log of 2026
(github.com/karpathy/nanochat, and its leaderboard), by the date of the entry; hours are those that 8 H100 take to
GPT-2's CORE. Weights are fp32 and cast to the activations' dtype where they are used. Embeddings are stored in the
compute dtype, bf16 without an fp32 master, which swallows small updates: loss-neutral at a rate of .3 (2026-08-22).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.config import ROPE_LENGTHS, SMEAR_GATE_CHANNELS, GPTConfig, estimate_flops
from nanochat.cross_entropy import LOSSES, softcap
from nanochat.flash_attention import flash_attn
from nanochat.kv_cache import NO_TOKEN
from nanochat.moe import MoE
from nanochat.optim import MuonAdamW, make_optimizer
from nanochat.sampling import Sampling, sample_rows

NORM_EPS = torch.finfo(torch.float32).eps  # also for bf16 input: bf16's own eps would flatten small activations
EPS_TENSORS = {dtype: torch.tensor(NORM_EPS, dtype=dtype) for dtype in (torch.float32, torch.float64)}


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension (arXiv 1910.07467), without a learned scale: the next matrix can learn it."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not torch.is_inference_mode_enabled():
        return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)
    # Eager decoding on a CPU: torch's own is 10 operations, of which each takes longer to start than to compute
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x * torch.addcmul(EPS_TENSORS[length.dtype], length, length, value=1 / x.size(-1)).rsqrt_().to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[d], x[d + D/2]) of (B, T, H, D) by the negative of their angles, (B or 1, T, 1, D/2).

    Scores then depend on distances alone (RoPE, arXiv 2104.09864). Either direction gives the same scores, since
    queries and keys share it; checkpoints fix this one.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def offset_keys(k: Tensor, num_pairs: int, first: Tensor | None) -> Tensor:
    """Keys (B, T, Hk, D) whose `num_pairs` slowest-turning pairs of channels come from the token before.

    first: (B, 1, Hk, D) has these pairs for the first key; None: zeros
    """
    num_own = k.size(-1) // 2 - num_pairs
    previous = F.pad(k[:, :-1], (0, 0, 0, 0, 1, 0)) if first is None else torch.cat((first, k[:, :-1]), dim=1)
    own, previous = (heads.unflatten(-1, (2, -1)) for heads in (k, previous))    # (B, T, Hk, 2, D/2)
    return torch.cat((own[..., :num_own], previous[..., num_own:]), dim=-1).flatten(-2)


class Linear(nn.Linear):
    """A linear layer without bias that casts its master weight to the dtype of the activations."""
    fp8 = None    # in training with --fp8 on, some layers are fp8.Fp8Linears: the weight's copy in 8 bits

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype):
        super().__init__(in_features, out_features, bias=False, dtype=dtype)

    def prepare(self, x: Tensor) -> Tensor:
        """What layers of the same input can share: nothing here, in fp8 its copy in 8 bits."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # on the meta device it would only import torch's compiler, which takes 1.5 s
            super().reset_parameters()


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with QK norm and, in every other layer, value embeddings."""

    def __init__(self, config: GPTConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        C, D = config.n_embd, config.head_dim
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, D
        self.config, self.layer, self.window = config, layer, config.window(layer)
        self.num_offset_pairs = config.count_offset_pairs(layer)    # a compiled block may not depend on its number
        self.c_q = Linear(C, config.n_head * D, dtype)
        self.c_k = Linear(C, config.n_kv_head * D, dtype)
        self.c_v = Linear(C, config.n_kv_head * D, dtype)
        self.c_proj = Linear(config.n_head * D, C, dtype)
        self.ve_gate = (Linear(config.ve_gate_channels, config.n_kv_head, dtype) if config.has_value_embed(layer)
                        else None)
        self.c_qkv = None

    def fuse(self) -> None:
        """Fuse c_q, c_k and c_v into one matrix, for decoding: not trainable afterwards."""
        weight = torch.cat([linear.weight.detach() for linear in (self.c_q, self.c_k, self.c_v)])
        with torch.device("meta"):  # nothing to initialise
            self.c_qkv = Linear(weight.size(1), weight.size(0), weight.dtype)
        self.c_qkv.weight = nn.Parameter(weight, requires_grad=False)
        del self.c_q, self.c_k, self.c_v

    def project(self, x: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """(B, T, C) -> (queries (B, T, H, D), keys (B, T, Hk, D)), or both in one tensor after fuse(); values."""
        B, T, _ = x.shape
        H, Hk, D = self.n_head, self.n_kv_head, self.head_dim
        if self.c_qkv is None:
            x = self.c_q.prepare(x)
            return (self.c_q(x).view(B, T, H, D), self.c_k(x).view(B, T, Hk, D)), self.c_v(x).view(B, T, Hk, D)
        qk, v = self.c_qkv(x).view(B, T, H + 2 * Hk, D).split((H + Hk, Hk), dim=2)
        return (qk,), v

    def forward(self, x: Tensor, ve: Tensor | None, cos_sin: tuple[Tensor, Tensor], kv_cache=None) -> Tensor:
        B, T, _ = x.shape
        config = self.config
        qk, v = self.project(x)
        if ve is not None:
            # Value embeddings (modded-nanogpt, after arXiv 2410.17897): in every other layer a table gives each token a
            # value of its own, half of all parameters at hardly a FLOP; each key/value head scales it by 0 to 3. Every
            # other layer was best, each way of sharing or factorising the tables lost (2026-01-17)
            gate = config.ve_gate_scale * torch.sigmoid(self.ve_gate(x[..., :config.ve_gate_channels]))  # (B, T, Hk)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        qk = [apply_rotary(heads, *cos_sin) for heads in qk]
        if config.qk_scale:
            # QK norm (arXiv 2010.04245) bounds the scores whatever the weights do; the factor on both makes them larger
            # again, attention sharper (1.2: harm at depth 4, none at 6)
            qk = [norm(heads) * config.qk_scale for heads in qk]
        q, k = qk if self.c_qkv is None else qk[0].split((self.n_head, self.n_kv_head), dim=2)
        if self.num_offset_pairs:
            # Key offset (modded-nanogpt, pull request 169): one layer finds what followed a token like the query's, an
            # induction head (arXiv 2209.11895), not two. At depth 4 worth 1.3 to 1.6 (dev/LOG.md, "Key offset: half")
            first = None if kv_cache is None else kv_cache.exchange_last(self.layer, k[:, -1:])
            k = offset_keys(k, self.num_offset_pairs, first)
        if kv_cache is None:
            y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(self.window, 0))
        else:
            y = kv_cache.attend(self.layer, q, k, v, self.window)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    """relu^2 (Primer, arXiv 2109.08668): as cheap as relu, sparse, about 1-2% better than GELU in modded-nanogpt;
    SwiGLU (arXiv 2002.05202), with its third matrix, lost in the public record."""

    def __init__(self, config: GPTConfig, hidden_dim: int, dtype: torch.dtype):
        super().__init__()
        self.c_fc = Linear(config.n_embd, hidden_dim, dtype)
        self.c_gate = Linear(config.n_embd, hidden_dim, dtype) if config.mlp_act == "swiglu" else None
        self.c_proj = Linear(hidden_dim, config.n_embd, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.c_gate is not None:
            return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Pre-norm attention and MLP (or moe.py) on a residual stream that each layer rescales and mixes with its input x0.

    resid and x0 lambdas (modded-nanogpt) are two learned numbers a layer: x0 hands every layer the token itself, so
    that the stream needn't carry it: -0.010 bits per byte at depth 8, -0.004 at 20; resid adds little (2026-01-11).
    """

    def __init__(self, config: GPTConfig, layer: int, dtype: torch.dtype):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, dtype)
        self.mlp = (MoE(config, MLP(config, config.expert_dim, dtype), dtype) if config.has_experts(layer) else
                    MLP(config, config.hidden_dim, dtype))

    def forward(self, x: Tensor, x0: Tensor, lambdas: tuple[Tensor | None, Tensor | None], ve: Tensor | None,
                cos_sin: tuple[Tensor, Tensor], kv_cache=None) -> Tensor:
        resid_lambda, x0_lambda = lambdas
        if resid_lambda is not None:
            x = resid_lambda * x
        if x0_lambda is not None:
            x = x + x0_lambda * x0
        x = x + self.attn(norm(x), ve, cos_sin, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32):
        """`dtype` is the activations'; the weights are not initialised (see init_weights)."""
        super().__init__()
        self.config = config
        master = torch.float64 if dtype == torch.float64 else torch.float32
        # fp16's range is too small for embeddings that Adam updates, so they stay masters there
        embed = master if dtype == torch.float16 or config.fp32_embeds else dtype
        C, V, L = config.n_embd, config.padded_vocab_size, config.n_layer
        self.compute_dtype = dtype
        self.loss = "fused"  # of training: a key of cross_entropy.LOSSES
        self.is_trunk_compiled, self.balance = False, None  # a moe.Balance where experts are to be balanced
        self.transformer = nn.ModuleDict({
            "wte": Embedding(V, C, dtype=embed),
            "h": nn.ModuleList(Block(config, i, master) for i in range(L)),
        })
        self.lm_head = Linear(C, V, master)
        self.value_embeds = nn.ModuleDict({str(i): Embedding(V, config.kv_dim, dtype=embed)
                                           for i in range(L) if config.has_value_embed(i)})
        def scalars(number: int, is_there: bool) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(number, dtype=master)) if is_there else None
        self.resid_lambdas  = scalars(L, config.resid_init is not None)
        self.x0_lambdas     = scalars(L, config.x0_init is not None)
        self.smear_gate     = Linear(SMEAR_GATE_CHANNELS, 1, master) if config.smear else None
        self.smear_lambda   = scalars(1, config.smear)
        self.backout_lambda = scalars(1, config.middle_layer is not None)
        rope_shape = (ROPE_LENGTHS * config.sequence_len, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(rope_shape, dtype=dtype), persistent=False)
        self.register_buffer("sin", torch.empty(rope_shape, dtype=dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter and buffer; a model built on the meta device holds garbage until then.

        A small head starts from near-uniform predictions; with zero projections (Fixup, arXiv 1901.09321) attention and
        MLP add nothing at first. The bounds were tuned with the rates: 2.02 -> 1.80 hours together.
        """
        config, L = self.config, self.config.n_layer

        def init_linear(weight: Tensor, fan_in: int, factor: float = 1.0) -> None:
            if config.linear_init == "uniform":
                bound = factor * math.sqrt(3 / fan_in)    # of a standard deviation of factor / sqrt(fan_in)
                nn.init.uniform_(weight, -bound, bound)
            else:
                std = factor / math.sqrt(fan_in)
                nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
        nn.init.normal_(self.transformer.wte.weight, std=config.wte_std)
        nn.init.normal_(self.lm_head.weight, std=config.head_std)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                init_linear(linear.weight, config.n_embd)
            mlp = getattr(block.mlp, "shared", block.mlp)
            for linear in filter(None, (mlp.c_fc, mlp.c_gate)):
                init_linear(linear.weight, config.n_embd, config.fc_init)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(mlp.c_proj.weight)
            if mlp is not block.mlp:
                block.mlp.init_weights(init_linear, config.fc_init)
            if block.attn.ve_gate is not None:
                nn.init.uniform_(block.attn.ve_gate.weight, 0, config.ve_gate_init)
        for value_embed in self.value_embeds.values():
            init_linear(value_embed.weight, config.n_embd)
        if self.resid_lambdas is not None:
            self.resid_lambdas.copy_(torch.linspace(*config.resid_init, L))
        if self.x0_lambdas is not None:
            self.x0_lambdas.copy_(torch.linspace(*config.x0_init, L))
        if self.smear_gate is not None:
            nn.init.uniform_(self.smear_gate.weight, 0, 0.02)
            nn.init.zeros_(self.smear_lambda)
        if self.backout_lambda is not None:
            nn.init.constant_(self.backout_lambda, config.backout_init)
        self.init_rope()

    def init_rope(self) -> None:
        """Fill the rotary tables, which are not saved with the weights."""
        num_positions, half_dim = self.cos.shape
        num_turning = round(half_dim * self.config.rope_fraction)    # pairs; the others stand still
        exponents = torch.arange(half_dim, dtype=torch.float64, device="cpu") / num_turning
        positions = torch.arange(num_positions, dtype=torch.float64, device="cpu")
        # From base 10,000 to 100,000, with tuned rates and inits: 2.02 -> 1.80 hours
        angles = positions[:, None] / self.config.rope_base ** exponents  # (positions, D/2)
        angles[:, num_turning:] = 0
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def get_device(self) -> torch.device:
        return self.transformer.wte.weight.device

    def num_scaling_params(self) -> dict[str, int]:
        """Parameters by part, counted on the modules; the horizon follows from matrices and head (scaling.py)."""
        modules = {"wte": self.transformer.wte, "value_embeds": self.value_embeds, "lm_head": self.lm_head,
                   "transformer_matrices": self.transformer.h, "total": self}
        counts = {name: sum(param.numel() for param in module.parameters()) for name, module in modules.items()}
        counts["scalars"] = 2 * counts["total"] - sum(counts.values())
        if inactive := sum(module.count_inactive() for module in self.modules() if isinstance(module, MoE)):
            counts |= {"inactive_experts": inactive, "transformer_matrices": counts["transformer_matrices"] - inactive}
        return counts

    def estimate_flops(self) -> float:
        """Training FLOPs per token, forward and backward, as tests count them in torch."""
        return estimate_flops(self.config)

    def compile_blocks(self) -> None:
        """Compile block by block: the layers share a few compiled variants, so that starting takes seconds."""
        for block in self.transformer.h:
            block.compile(dynamic=False)

    def compile_trunk(self) -> None:
        """Compile all but the head as one graph, in which one block's last addition and the next one's mix are one
        kernel (flex breaks the graph at each layer). Starting takes longer with each layer. Not run on a GPU yet."""
        self.is_trunk_compiled = True

    def setup_optimizer(self, **figures) -> MuonAdamW:
        """AdamW for embeddings, head and scalars, Muon for the matrices of the blocks: see optim.make_optimizer."""
        return make_optimizer(self, **figures)

    def embed_tokens(self, idx: Tensor) -> Tensor:
        """(...) token ids -> (..., C), normed: without it the first layers would have to undo the table's scale."""
        x = self.transformer.wte(idx).to(self.compute_dtype)
        return norm(x) if self.config.embed_norm else x

    def embed(self, idx: Tensor, kv_cache=None) -> Tensor:
        """The blocks' input: normed embeddings, smeared with the token before each one. (B, T) -> (B, T, C)

        Smear (modded-nanogpt): a gated part of the previous token, so that the first layer sees pairs of tokens without
        a previous-token head. Alone negligible (2026-01-16); with backout, shorter windows, ratio 8 1.80 -> 1.65 hours.
        """
        x = self.embed_tokens(idx)
        if self.smear_gate is None:
            return x
        if kv_cache is None:    # the first token of a sequence has none before it: zero adds nothing
            previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        else:
            last_ids = kv_cache.shift_ids(idx)
            previous = self.embed_tokens(last_ids.clamp(min=0)) * (last_ids != NO_TOKEN).unsqueeze(-1)
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))  # (B, T, 1)
        return x + self.smear_lambda[0] * gate * previous

    def get_positions(self, num_tokens: int, kv_cache=None) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions of `num_tokens` new tokens, (B or 1, T, 1, D/2)."""
        # A slice where all rows are equally long, else (B, T)
        positions = slice(num_tokens) if kv_cache is None else kv_cache.get_positions()
        if isinstance(positions, slice) and positions.stop > len(self.cos):  # it would be cut without a word
            raise ValueError(f"{positions.stop} tokens exceed the {len(self.cos)} positions of this model")
        cos, sin = self.cos[positions].unsqueeze(-2), self.sin[positions].unsqueeze(-2)
        return (cos, sin) if cos.dim() == 4 else (cos[None], sin[None])

    def forward_trunk(self, idx: Tensor, kv_cache=None) -> Tensor:
        """All but the head: normed activations, (B, T) -> (B, T, C)."""
        T = idx.size(1)
        if kv_cache is not None:
            kv_cache.begin(T)
        cos_sin = self.get_positions(T, kv_cache)
        x = x0 = self.embed(idx, kv_cache)
        middle = None
        for i, block in enumerate(self.transformer.h):
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if self.config.has_value_embed(i) else None
            lambdas = tuple(None if table is None else table[i] for table in (self.resid_lambdas, self.x0_lambdas))
            x = block(x, x0, lambdas, ve, cos_sin, kv_cache)
            if i == self.config.middle_layer:
                middle = x
        if kv_cache is not None:
            kv_cache.advance(T)
        if middle is not None:
            # Backout (modded-nanogpt): subtracts what only the first half of the layers needed. Alone no gain
            # (2026-01-16); for the gain with smear and others see `embed`
            x = x - self.backout_lambda[0] * middle
        return norm(x)

    def unembed(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Softcapped logits in fp32 of what forward_trunk returns: (..., C) -> (..., V)

        tokens: (N,) score these token ids only, in fp32, which avoids ties: (..., N)
        """
        if tokens is not None:
            return softcap(F.linear(x.float(), self.lm_head.weight[tokens].float()), self.config.softcap)
        return softcap(self.lm_head(x)[..., :self.config.vocab_size], self.config.softcap)

    def forward(self, idx: Tensor, targets: Tensor | None = None, kv_cache=None, loss_reduction: str = "mean",
                weights: Tensor | None = None) -> Tensor:
        """Logits, or the loss on `targets` where -1 means nothing to learn.

        idx:            (B, T) token ids
        targets:        (B, T) next tokens; None returns the logits, (B, T, V) fp32, softcapped
        kv_cache:       kv_cache.KVCache to read from and append to; the tokens continue what it holds
        loss_reduction: 'mean' over the targets that count, a scalar (0 where none counts); 'sum' of weights * nll, a
                        scalar; 'none', (B, T), 0 where ignored
        weights:        (B, T) factor on each target's loss, for 'sum'
        """
        x = compile_trunk()(self, idx) if self.is_trunk_compiled and kv_cache is None else \
            self.forward_trunk(idx, kv_cache)
        if targets is None:
            return self.unembed(x)
        # Evaluation takes each token's loss: always the cross-entropy, so that bits per byte stay comparable
        loss = LOSSES["fused" if loss_reduction == "none" else self.loss]
        return loss(x, self.lm_head.weight, targets, self.config.vocab_size, cap=self.config.softcap,
                    reduction=loss_reduction, weights=weights, fp8=self.lm_head.fp8)

    @torch.inference_mode()
    def generate(self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 seed: int = 42) -> Iterator[int]:
        """Yield `max_tokens` sampled tokens, the whole sequence anew for each: slow, obvious; Engine must equal it."""
        sampling = Sampling(temperature, top_k, seed=seed)
        idx = torch.tensor([tokens], dtype=torch.long, device=self.get_device())  # (1, T)
        for token_idx in range(max_tokens):
            next_id = sample_rows(self.forward(idx)[:, -1], [sampling], [token_idx])[:, None]  # (1, 1)
            idx = torch.cat((idx, next_id), dim=1)
            yield int(next_id)


@functools.cache
def compile_trunk() -> Callable[[GPT, Tensor], Tensor]:
    """GPT.forward_trunk compiled, of the class: a copy of a model would keep a bound method of the original."""
    return torch.compile(GPT.forward_trunk, dynamic=False)
