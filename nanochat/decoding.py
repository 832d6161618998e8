"""A model made ready to decode: matrices cast and packed once, and on CPUs few operations.

Decoding one token reads every matrix once, so it is as fast as the weights can be read. On CPUs two things are in the
way. torch's own product of one row with a bf16 matrix reads it at a fraction of the memory's rate; oneDNN's, on weights
in the layout that it likes, at most of it. And each operation takes a few microseconds to start, however little it
does, so that a small model spends most of a token there (figures for both in dev/LOG.md).

B rows, T tokens, C channels, H query heads, Hk key/value heads, D head dim, V vocabulary.
"""

import copy
import functools

import torch
from torch import Tensor, nn

from nanochat.common import print0
from nanochat.cross_entropy import LOGIT_SOFTCAP
from nanochat.flash_attention import CachedKeys, attend_to_cache, find_cached_keys
from nanochat.gpt import GPT, NORM_EPS, QK_SCALE, VE_GATE_CHANNELS, Block, Linear
from nanochat.kv_cache import KVCache


class PackedLinear(nn.Module):
    """A linear layer in oneDNN's own layout of the weights; for CPUs."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine and torch have the packed product and it is right; says so once where they don't."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (3, 64)))
    try:
        actual, expected = PackedLinear(weight)(x).float(), x.float() @ weight.float().T
        if (actual - expected).norm() < 0.01 * expected.norm():
            return True
        reason = "its results are wrong"
    except (RuntimeError, AttributeError) as error:  # no oneDNN in this build, or not for this CPU
        reason = str(error).splitlines()[0][:100]
    print0(f"decoding with torch's own products: packed {dtype} weights don't work here ({reason})")
    return False


def cast_linear(weight: Tensor, dtype: torch.dtype) -> Linear:
    """A linear layer of this matrix in another dtype; the same memory where it is the same."""
    with torch.device("meta"):  # nothing to initialise
        linear = Linear(weight.size(1), weight.size(0), dtype)
    linear.weight = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    return linear


def pack_linear(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """The same for a CPU, packed where that works."""
    return PackedLinear(weight.detach().to(dtype)) if can_pack(dtype) else cast_linear(weight, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# For CPUs: the model in fewer operations


def make_eps(dtype: torch.dtype) -> Tensor:
    """What quick_norm adds, for a model that computes in `dtype`."""
    return torch.tensor(NORM_EPS, dtype=torch.promote_types(dtype, torch.float32))


def quick_norm(x: Tensor, eps: Tensor) -> Tensor:
    """gpt.norm in 4 operations instead of torch's 10; eps is a tensor so that adding it isn't one more."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(eps, length, length, value=1 / x.size(-1)).rsqrt_()


class CPUBlock(nn.Module):
    """gpt.Block on a cache; what it adds to the activations stays in their dtype, fp32 for a bf16 model."""

    def __init__(self, block: Block, dtype: torch.dtype):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.dtype, self.eps = dtype, make_eps(dtype)
        self.n_head, self.n_kv_head, self.head_dim = attn.n_head, attn.n_kv_head, attn.head_dim
        self.c_qkv = pack_linear(torch.cat([layer.weight for layer in (attn.c_q, attn.c_k, attn.c_v)]), dtype)
        self.c_proj, self.mlp_fc, self.mlp_proj = (pack_linear(layer.weight, dtype)
                                                   for layer in (attn.c_proj, mlp.c_fc, mlp.c_proj))
        self.ve_gate = None if attn.ve_gate is None else cast_linear(attn.ve_gate.weight, dtype)

    def forward(self, x: Tensor, ve: Tensor | None, rotation: Tensor, keys: CachedKeys,
                layer_cache: tuple[Tensor, Tensor]) -> Tensor:
        """x: (B, T, C), is overwritten; rotation: (T, 1, 3, D/2) or (B, T, 1, 3, D/2): cos, sin, -sin"""
        B, T, _ = x.shape
        H, Hk, D = self.n_head, self.n_kv_head, self.head_dim
        h = quick_norm(x, self.eps).to(self.dtype)
        qk, v = self.c_qkv(h).view(B, T, H + 2 * Hk, D).to(x.dtype).split((H + Hk, Hk), dim=2)
        if ve is not None:
            gate = torch.sigmoid(self.ve_gate(h[..., :VE_GATE_CHANNELS]))  # (B, T, Hk)
            v = torch.addcmul(v, gate.unsqueeze(-1), ve.view(B, T, Hk, D), value=3)
        cos, sin = rotation.split((1, 2), dim=-2)
        halves = quick_norm(qk, self.eps).view(B, T, H + Hk, 2, D // 2)  # a rotation doesn't change the norm
        qk = torch.addcmul(halves * cos, halves.flip(-2), sin).view(B, T, H + Hk, D)
        q, k = qk.split((H, Hk), dim=2)
        # Both would be scaled by QK_SCALE: the scores are, instead
        y = attend_to_cache(q, *layer_cache, k, v, keys, scale=QK_SCALE**2 / D**0.5)
        x += self.c_proj(y.to(self.dtype).reshape(B, T, H * D))
        x += self.mlp_proj(self.mlp_fc(quick_norm(x, self.eps).to(self.dtype)).relu_().square_())
        return x


class CPUModel(GPT):
    """gpt.GPT on a cache, for CPUs: the same sums in fewer operations.

    The embeddings are the model's own; the matrices are copies, cast and packed.
    """

    def __init__(self, model: GPT):
        nn.Module.__init__(self)  # GPT's would make parameters
        self.config, self.compute_dtype = model.config, model.compute_dtype
        self.wide_dtype = torch.promote_types(model.compute_dtype, torch.float32)
        self.transformer = nn.ModuleDict({
            "wte": model.transformer.wte,
            "h": nn.ModuleList(CPUBlock(block, model.compute_dtype) for block in model.transformer.h),
        })
        self.value_embeds = model.value_embeds
        self.smear_gate = cast_linear(model.smear_gate.weight, model.compute_dtype)
        self.smear_lambda = model.smear_lambda
        self.lm_head = pack_linear(model.lm_head.weight, model.compute_dtype)
        self.lambdas = list(zip(model.resid_lambdas.tolist(), model.x0_lambdas.tolist(), strict=True))
        self.backout = model.backout_lambda.item()
        self.eps = make_eps(model.compute_dtype)
        self.windows = [model.config.window(i) for i in range(model.config.n_layer)]
        self.rotations = torch.stack((model.cos, model.sin, -model.sin), dim=1).to(self.wide_dtype)[:, None]

    def forward_trunk(self, idx: Tensor, kv_cache: KVCache) -> Tensor:
        T, config = idx.size(1), self.config
        x = x0 = self.embed(idx, kv_cache).to(self.wide_dtype)
        keys = {window: find_cached_keys(kv_cache.cache_seqlens, T, T, window, config.n_head // config.n_kv_head,
                                         kv_cache.k_cache.size(2), self.wide_dtype)
                for window in set(self.windows)}
        any_keys = keys[self.windows[0]]
        positions = slice(any_keys.end - T, any_keys.end) if any_keys.positions is None else any_keys.positions
        rotation = self.rotations[positions]
        middle = None
        for i, block in enumerate(self.transformer.h):
            ve = self.value_embeds[str(i)](idx) if config.has_value_embed(i) else None
            resid_lambda, x0_lambda = self.lambdas[i]
            x = block(torch.add(x * resid_lambda, x0, alpha=x0_lambda), ve, rotation, keys[self.windows[i]],
                      kv_cache.get_layer_cache(i))
            if i == config.n_layer // 2:
                middle = x
        kv_cache.advance(T)
        return quick_norm(torch.sub(x, middle, alpha=self.backout), self.eps).to(self.compute_dtype)

    def forward(self, idx: Tensor, kv_cache: KVCache) -> Tensor:
        """Logits (B, T, V), softcapped as in GPT.forward, but in place: those of a large batch exceed the caches."""
        return self.unembed(self.forward_trunk(idx, kv_cache))

    def unembed(self, h: Tensor) -> Tensor:
        """From what forward_trunk returns to logits."""
        logits = self.lm_head(h)[..., :self.config.vocab_size].to(self.wide_dtype)
        halves = logits.mul_(2 / LOGIT_SOFTCAP).sigmoid_()
        return torch.add(halves.new_tensor(-LOGIT_SOFTCAP), halves, alpha=2 * LOGIT_SOFTCAP, out=halves)


def copy_for_decoding(model: GPT) -> GPT:
    """The same model with its matrices cast to the compute dtype once, packed on CPUs, and nothing compiled.

    It computes with a cache only. All but the matrices is shared. A compiled block is made for training's one shape,
    while decoding's changes with every call.
    """
    if isinstance(model, GPT) and model.get_device().type == "cpu":
        return CPUModel(model)
    replacements = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, Linear):
            replacements[id(module)] = cast_linear(module.weight, model.compute_dtype)
    return copy.deepcopy(model, replacements)  # which leaves a module's compiled call behind


def get_cache_dtype(model: GPT, is_compiled: bool = False) -> torch.dtype:
    """The dtype of the cache: the model's, but fp32 for a bf16 model that decodes eagerly on a CPU.

    torch's attention of one query is 8 times as fast in fp32 there, which is worth twice the memory; in a compiled
    graph half the bytes take half the time.
    """
    is_half = model.compute_dtype in (torch.bfloat16, torch.float16)
    widens = is_half and not is_compiled and model.get_device().type == "cpu"
    return torch.float32 if widens else model.compute_dtype
