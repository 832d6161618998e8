"""The step that gives each row its next token: a CUDA graph per batch size, compiled or eager on CPUs, eager elsewhere.

Starting operations is most of a small model's step, on CPUs and GPUs alike; a graph starts them all at once, or as one.

B rows, C channels, H query heads, Hk key/value heads, G query heads of each, D head dim, V vocabulary.
"""

import functools
import itertools
import types
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanochat.common import print0
from nanochat.compilation import choose_compile
from nanochat.cross_entropy import LOGIT_SOFTCAP
from nanochat.decoding import CPUModel, PackedLinear, get_cache_dtype
from nanochat.gpt import GPT, NORM_EPS, QK_SCALE, SMEAR_GATE_CHANNELS, VE_GATE_CHANNELS, norm
from nanochat.kv_cache import KVCache

GRAPH_WARMUP_STEPS = 3  # before a capture, so that libraries have allocated what they need


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs


class GraphedStep:
    """One decoding step of the first rows of a cache, captured as a CUDA graph; each number of rows has its own.

    Untested: no CUDA device was at hand when it was written. What fails to be captured runs eagerly, and it says so.
    """

    def __init__(self, model: GPT):
        self.model = model
        self.works = True
        self.memory = None                    # one pool for all graphs, which never run at once
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}  # rows -> graph, its idx and logits
        self.keys = None                      # the cache's memory that they were captured with

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the next token, from (B, 1) token ids; valid until the next call."""
        if not self.works:
            return self.model(idx, kv_cache=cache)[:, -1]
        if self.keys is None or self.keys.data_ptr() != cache.k_cache.data_ptr() or self.keys.shape[2:] != (
                cache.k_cache.shape[2:]):
            self.graphs.clear()               # the cache has grown, so it lies elsewhere
            self.keys = cache.k_cache
        if len(idx) not in self.graphs:
            try:
                self.graphs[len(idx)] = self._capture(idx, cache)
            except RuntimeError as error:
                self.works = False
                print0(f"decoding eagerly: a CUDA graph can't be captured ({str(error).splitlines()[0][:200]})")
                return self.model(idx, kv_cache=cache)[:, -1]
        graph, static_idx, logits = self.graphs[len(idx)]
        static_idx.copy_(idx)
        graph.replay()
        return logits

    def _capture(self, idx: Tensor, cache: KVCache) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        static_idx, graph = idx.clone(), torch.cuda.CUDAGraph()
        lengths, last_embed = cache.cache_seqlens.clone(), cache.last_embed.clone()

        def run() -> Tensor:
            return self.model(static_idx, kv_cache=cache)[:, -1]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(GRAPH_WARMUP_STEPS):
                run()
                cache.cache_seqlens.copy_(lengths)  # every one of them is the same step
                cache.last_embed.copy_(last_embed)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, pool=self.memory):  # records, computes nothing
            logits = run()
        self.memory = graph.pool()
        return graph, static_idx, logits


# ---------------------------------------------------------------------------------------------------------------------
# For CPUs: the step compiled

_packed_layers: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
_packed_numbers = itertools.count()


@functools.cache
def define_packed_product() -> torch.library.Library:
    """torch.ops.nanochat.packed_linear: inductor takes no packed weights as inputs, so they are called by a number."""
    library = torch.library.Library("nanochat", "DEF")
    library.define("packed_linear(Tensor x, int number, int out_features) -> Tensor")
    library.impl("packed_linear", lambda x, number, _: _packed_layers[number](x), "CPU")
    library.impl("packed_linear", lambda x, _, out_features: x.new_empty(x.size(0), out_features), "Meta")
    return library


class CompiledLinear(nn.Module):
    """A linear layer in a compiled graph: for one row a sum that its surroundings are fused with, else the layer."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, is_fused: bool = True):
        """dtype: of the layer; is_fused: False for the layer itself for one row, too, without a copy of its weights"""
        super().__init__()
        self.layer, self.dtype, self.number, self.weight = layer, dtype, None, None
        if isinstance(layer, PackedLinear):
            define_packed_product()
            self.number, self.num_outputs = next(_packed_numbers), layer.packed.size(0)
            _packed_layers[self.number] = layer
        if is_fused:
            self.weight = layer.weight if self.number is None else layer.packed.to_dense()

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """(scale * x) through the layer, in the dtype of x: (B, C) -> (B, N)"""
        if x.size(0) == 1 and self.weight is not None:
            return (self.weight.to(x.dtype) * x).sum(-1)[None] * scale
        h = (x * scale).to(self.dtype)
        if self.number is None:
            return self.layer(h).to(x.dtype)
        return torch.ops.nanochat.packed_linear(h, self.number, self.num_outputs).to(x.dtype)


def find_scale(x: Tensor) -> Tensor:
    """What gpt.norm multiplies x with."""
    return torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + NORM_EPS)


class CompiledStep:
    """One decoding step of CPUModel as one compiled graph, for any number of rows and keys.

    One row has a graph of its own. Both are compiled when this is made, in some seconds to half a minute, and serve
    from then on, however the cache grows. A graph only reads the cache; the new keys and values are written when it is
    done, so where it can't be compiled or run, which is said once, the step is done anew, eagerly (slower than a step
    that was eager from the start, because of the cache's dtype).
    """

    @torch.inference_mode()
    def __init__(self, model: CPUModel):
        self.model = model
        self.works = True
        self.layers = [tuple(CompiledLinear(layer, model.compute_dtype) for layer in (
            block.c_qkv, block.c_proj, block.mlp_fc, block.mlp_proj)) for block in model.transformer.h]
        self.lm_head = CompiledLinear(model.lm_head, model.compute_dtype, is_fused=False)
        # A graph belongs to a function's code, and its guards, which find out whose it is, take a tenth of a small step
        # to check. So each engine has code of its own, and no guard looks at its model, which stays as it is.
        code = CompiledStep._compute.__code__.replace()
        compute = types.FunctionType(code, CompiledStep._compute.__globals__, "compute")
        self.compute = torch.compile(types.MethodType(compute, self), fullgraph=True, options={
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe})
        config = model.config
        for num_rows in (1, 2):  # of a cache with room for more of everything, so that no stride follows from sizes
            cache = KVCache(num_rows + 1, config.n_kv_head, 8, config.head_dim, config.n_layer, torch.device("cpu"),
                            get_cache_dtype(model, is_compiled=True))
            cache.last_embed = torch.zeros(num_rows + 1, 1, config.n_embd, dtype=model.compute_dtype)
            self(torch.zeros(num_rows, 1, dtype=torch.long), cache.view_rows(0, num_rows, 3))

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the next token, from (B, 1) token ids."""
        if not self.works:
            return self.model(idx, kv_cache=cache)[:, -1]
        lengths = cache.cache_seqlens.long()
        num_keys = max(cache.num_tokens, 2)  # sizes 0 and 1 would be compiled anew
        k_cache, v_cache = cache.k_cache[:, :, :num_keys], cache.v_cache[:, :, :num_keys]
        ids, last_embed = idx[:, 0], cache.last_embed[:, 0]
        for tensor, dims in ((k_cache, (1, 2)), (v_cache, (1, 2)), (ids, 0), (lengths, 0), (last_embed, 0)):
            torch._dynamo.maybe_mark_dynamic(tensor, dims)
        try:
            logits, keys, values, embed = self.compute(ids, k_cache, v_cache, lengths, last_embed)
        except RuntimeError as error:
            self.works = False
            print0(f"decoding eagerly: the step can't be compiled ({(str(error).splitlines() or [''])[0][:200]})")
            return self.model(idx, kv_cache=cache)[:, -1]
        rows = torch.arange(len(idx))
        cache.k_cache[:, rows, lengths], cache.v_cache[:, rows, lengths] = keys, values
        cache.set_last_embed(embed[:, None])
        cache.advance(1)
        return logits

    def _compute(self, ids: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
                 last_embed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B,) token ids -> (B, V) logits, (layers, B, Hk, D) new keys and values, (B, C) embeddings."""
        model, config, dtype = self.model, self.model.config, self.model.wide_dtype
        embed = norm(model.transformer.wte.weight[ids].to(model.compute_dtype))  # (B, C)
        gate = torch.sigmoid((embed[:, :SMEAR_GATE_CHANNELS] * model.smear_gate.weight).to(dtype).sum(-1, keepdim=True))
        x = x0 = embed.to(dtype) + model.smear_lambda * gate * last_embed
        rotation = model.rotations[lengths]  # (B, 1, 3, D/2)
        distances = lengths[:, None] - torch.arange(k_cache.size(2))  # (B, keys), of those before
        masks = {window: ((distances > 0) & (distances <= window) if window >= 0 else distances > 0)[:, None, None]
                 for window in sorted(set(model.windows))}
        new_keys, new_values, middle = [], [], None
        for i, block in enumerate(model.transformer.h):
            c_qkv, c_proj, mlp_fc, mlp_proj = self.layers[i]
            resid_lambda, x0_lambda = model.lambdas[i]
            x = resid_lambda * x + x0_lambda * x0
            scale = find_scale(x)
            q, k, v = self._rotate(c_qkv(x, scale), rotation)
            if block.ve_gate is not None:
                gate = (x[:, None, :VE_GATE_CHANNELS] * block.ve_gate.weight).sum(-1, keepdim=True)  # (B, Hk, 1)
                v = v + 3 * torch.sigmoid(gate * scale[:, None]) * model.value_embeds[str(i)].weight[ids].view_as(v)
            y = attend_before(q, k, v, k_cache[i], v_cache[i], masks[model.windows[i]])
            x = x + c_proj(y)
            x = x + mlp_proj(mlp_fc(x, find_scale(x)).relu().square())
            new_keys.append(k)
            new_values.append(v)
            middle = x if i == config.n_layer // 2 else middle
        x = x - model.backout * middle
        new_keys, new_values = (torch.stack(new).to(k_cache.dtype) for new in (new_keys, new_values))
        logits = self.lm_head(x, find_scale(x))[:, :config.vocab_size]
        logits = 2 * LOGIT_SOFTCAP * torch.sigmoid(2 / LOGIT_SOFTCAP * logits) - LOGIT_SOFTCAP
        return logits, new_keys, new_values, embed

    def _rotate(self, qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, (H + 2 Hk) * D) -> normed, rotated queries and keys, and values: (B, H or Hk, D)"""
        config = self.model.config
        H, Hk, D = config.n_head, config.n_kv_head, config.head_dim
        qk, v = qkv.view(-1, H + 2 * Hk, D).split((H + Hk, Hk), dim=1)
        cos, sin = rotation.split((1, 2), dim=2)  # (B, 1, 1, D/2), (B, 1, 2, D/2)
        halves = (qk * find_scale(qk)).view(-1, H + Hk, 2, D // 2)
        q, k = (halves * cos + halves.flip(2) * sin).reshape(-1, H + Hk, D).split((H, Hk), dim=1)
        return q, k, v


def attend_before(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token on itself and on the cache, (B, keys, Hk, D), where the mask (B, 1, 1, keys) lets it.

    q: (B, H, D), k and v: (B, Hk, D), the token's own -> (B, H * D)
    """
    Hk, D = k.shape[1:]
    q = (q * (QK_SCALE**2 / D**0.5)).view(-1, Hk, q.size(1) // Hk, D)  # (B, Hk, G, D)
    own = (q * k[:, :, None]).sum(-1, keepdim=True)                    # (B, Hk, G, 1)
    scores = (q[:, None] * k_cache[:, :, :, None].to(q.dtype)).sum(-1).permute(0, 2, 3, 1)  # (B, Hk, G, keys)
    scores = torch.where(mask, scores, -float("inf"))
    largest = torch.maximum(scores.amax(dim=-1, keepdim=True), own)
    weights, own_weight = torch.exp(scores - largest), torch.exp(own - largest)
    y = (weights[..., None] * v_cache.to(q.dtype).transpose(1, 2)[:, :, None]).sum(3) + own_weight * v[:, :, None]
    return (y / (weights.sum(-1, keepdim=True) + own_weight)).flatten(1)


def make_step(model: GPT, compile: bool = False) -> Callable[[Tensor, KVCache], Tensor]:
    """The function of a decoding step: (B, 1) token ids and the cache of these rows -> (B, V) logits.

    compile: on a CPU, now; on CUDA the step is a graph anyway, elsewhere it is eager
    """
    if model.get_device().type == "cuda":
        return GraphedStep(model)
    if compile and isinstance(model, CPUModel):
        works, reason = choose_compile("auto", model.get_device(), None)
        if works:
            step = CompiledStep(model)
            if step.works:
                return step
        else:
            print0(f"decoding eagerly: {reason}")
    return lambda idx, cache: model(idx, kv_cache=cache)[:, -1]
