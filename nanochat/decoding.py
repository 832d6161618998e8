"""A model made ready to decode: the same modules and the same forward pass, with weights cast, fused and packed once.

Decoding is bound by the rate at which weights are read. torch's own product of one row with a bf16 matrix reaches a
fraction of it on CPUs, oneDNN's on packed weights most of it. Starting operations dominates small models: each takes
microseconds, on CPUs and GPUs alike. A compiled step on a CPU, or a CUDA graph, starts them all as one (figures in
dev/LOG.md, "One forward pass").

Linear layers are replaced one by one, modules with a `fuse` method are fused, and the step traces or captures
`GPT.forward` itself. All else that is known of the model here are the cache's tensors: keys, values, last embedding.

B rows, T tokens, C channels, V vocabulary.
"""

import copy
import functools
import itertools
import types
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanochat.common import is_out_of_memory, print0
from nanochat.compilation import choose_compile
from nanochat.gpt import GPT, Linear
from nanochat.kv_cache import KVCache

MIN_PACKED = 64         # rows and columns; smaller matrices aren't packed
GRAPH_WARMUP_STEPS = 3  # before a capture, so that libraries have allocated what they need
# All layers touch the cache: inductor would try to fuse each with the next 64, in vain, which takes 15 s at depth 12
FUSION_ATTEMPTS = 4
_packed_weights: dict[int, Tensor] = {}
_packed_numbers = itertools.count()


# ---------------------------------------------------------------------------------------------------------------------
# The model


def copy_for_decoding(model: GPT, keep_weights: bool = False) -> GPT:
    """The model with its linear layers replaced by DecodingLinears, and nothing compiled; the rest is shared.

    keep_weights: beside the packed ones, for a compiled step. A compiled block is made for training's one shape, while
    decoding's changes with every call.
    """
    replacements = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, replacements)  # which leaves a module's compiled call behind
    for module in list(copied.modules()):
        if hasattr(module, "fuse"):
            module.fuse()
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, DecodingLinear(child.weight, model.compute_dtype, keep_weights))
    return copied


class DecodingLinear(nn.Module):
    """A linear layer with frozen weights: cast once, and on a CPU packed by oneDNN where that works."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, keep_weight: bool = False):
        super().__init__()
        weight = weight.detach().to(dtype)
        self.out_features, self.in_features = weight.shape
        self.is_small, self.packed = min(weight.shape) < MIN_PACKED, None
        if weight.device.type == "cpu" and not self.is_small and can_pack(dtype):
            define_packed_product()
            self.packed, self.number = pack(weight), next(_packed_numbers)
            _packed_weights[self.number] = self.packed
            weakref.finalize(self, _packed_weights.pop, self.number)
        self.weight = nn.Parameter(weight, requires_grad=False) if self.packed is None or keep_weight else None

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            if self.weight is not None and (self.is_small or x.numel() == self.in_features):
                # One row reads the weights once, in a loop that inductor fuses with the operations around it
                return (self.weight.float() * x.float().unsqueeze(-2)).sum(-1).to(x.dtype)
            if self.packed is not None:
                rows = x.reshape(-1, self.in_features)
                y = torch.ops.nanochat.packed_linear(rows, self.number, self.out_features)
                return y.view(*x.shape[:-1], self.out_features)
        return nn.functional.linear(x, self.weight) if self.packed is None else multiply(x, self.packed)


def pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)


def multiply(x: Tensor, packed: Tensor) -> Tensor:
    """x @ weight.T of packed weights."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@functools.cache
def define_packed_product() -> torch.library.Library:
    """torch.ops.nanochat.packed_linear: inductor takes no packed weights as inputs, so they are called by a number."""
    library = torch.library.Library("nanochat", "DEF")
    library.define("packed_linear(Tensor x, int number, int out_features) -> Tensor")
    library.impl("packed_linear", lambda x, number, _: multiply(x, _packed_weights[number]), "CPU")
    library.impl("packed_linear", lambda x, _, out_features: x.new_empty(x.size(0), out_features), "Meta")
    return library


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine and torch have the packed product and it is right; says so once where they don't."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (3, 64)))
    try:
        actual, expected = multiply(x, pack(weight)).float(), x.float() @ weight.float().T
        if (actual - expected).norm() < 0.01 * expected.norm():
            return True
        reason = "its results are wrong"
    except (RuntimeError, AttributeError) as error:  # no oneDNN in this build, or not for this CPU
        reason = str(error).splitlines()[0][:100]
    print0(f"decoding with torch's own products: packed {dtype} weights don't work here ({reason})")
    return False


def make_cache(model: GPT, num_rows: int, num_tokens: int, is_compiled: bool = False) -> KVCache:
    """An empty cache for a model that decodes, with room for so many tokens in each row.

    On a CPU the cache of a bf16 model that decodes eagerly is fp32: twice the memory, but torch's attention of one
    query is 8 times as fast in it there; in a compiled graph half the bytes take half the time.
    """
    config, device = model.config, model.get_device()
    is_half = model.compute_dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if is_half and not is_compiled and device.type == "cpu" else model.compute_dtype
    cache = KVCache(num_rows, config.n_kv_head, num_tokens, config.head_dim, config.n_layer, device, dtype)
    cache.last_embed = torch.zeros(num_rows, 1, config.n_embd, device=device, dtype=model.compute_dtype)
    return cache


# ---------------------------------------------------------------------------------------------------------------------
# The step: each row of a cache gets its next token


def make_step(model: GPT, compile: bool = False, max_rows: int = 2) -> Callable[[Tensor, KVCache], Tensor]:
    """The function of a decoding step: (B, 1) token ids and the cache of these rows -> (B, V) logits.

    compile:  on a CPU, now; on CUDA the step is a graph anyway, elsewhere it is eager
    max_rows: B is never more; one row alone needs one graph less
    """
    if model.get_device().type == "cuda":
        return GraphedStep(model)
    if compile and model.get_device().type == "cpu":
        works, reason = choose_compile("auto", model.get_device(), None)
        if works:
            step = CompiledStep(model, max_rows)
            if step.works:
                return step
        else:
            print0(f"decoding eagerly: {reason}")
    return lambda idx, cache: model(idx, kv_cache=cache)[:, -1]


class CompiledStep:
    """The forward pass of one new token in each row as one compiled graph, for any number of rows and keys.

    One row has a graph of its own. What `max_rows` needs is compiled when this is made, in some seconds to a minute,
    and serves from then on, however the cache grows. Where it can't be compiled or run, which is said once, the step
    is eager (slower than a step that was eager from the start, because of the cache's dtype).
    """

    @torch.inference_mode()
    def __init__(self, model: GPT, max_rows: int = 2):
        self.model = model
        self.works = True
        # Guards on modules cost a tenth of a small step. So each engine compiles its own copy of the code, for a model
        # that never changes, without them
        code = CompiledStep._compute.__code__.replace()
        compute = types.FunctionType(code, CompiledStep._compute.__globals__, "compute")
        self.compute = torch.compile(types.MethodType(compute, self), fullgraph=True, options={
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            "max_fusion_buffer_group_pairwise_attempts": FUSION_ATTEMPTS})
        for num_rows in range(1, min(max_rows, 2) + 1):
            # A cache with room for more of everything, so that no stride follows from sizes
            cache = make_cache(model, num_rows + 1, 8, is_compiled=True)
            self(torch.zeros(num_rows, 1, dtype=torch.long), cache.view_rows(0, num_rows, 3))

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the next token, from (B, 1) token ids."""
        if not self.works:
            return self.model(idx, kv_cache=cache)[:, -1]
        num_keys = max(cache.num_tokens + 1, 2)  # a size of 1 would be compiled anew
        k_cache, v_cache = cache.k_cache[:, :, :num_keys], cache.v_cache[:, :, :num_keys]
        for tensor in (k_cache, v_cache):
            # Unbacked: a guard on the size would recompile, for 6-10 s, at 4,096 keys
            torch._dynamo.decorators.mark_unbacked(tensor, 2)
        for tensor, row_dim in ((k_cache, 1), (v_cache, 1), (idx, 0), (cache.cache_seqlens, 0), (cache.last_embed, 0)):
            torch._dynamo.maybe_mark_dynamic(tensor, row_dim)
        try:
            return self.compute(idx, k_cache, v_cache, cache.cache_seqlens, cache.last_embed)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.works = False
            print0(f"decoding eagerly: the step can't be compiled ({(str(error).splitlines() or [''])[0][:200]})")
            return self.model(idx, kv_cache=cache)[:, -1]

    def _compute(self, idx: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, last_embed: Tensor) -> Tensor:
        torch._check(k_cache.size(2) == v_cache.size(2))
        return self.model(idx, kv_cache=KVCache.wrap(k_cache, v_cache, lengths, last_embed))[:, -1]


class GraphedStep:
    """The forward pass of one new token in the first rows of a cache as a CUDA graph, one for each number of rows.

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
        # a cache of the same memory that never grows: a graph knows addresses, not where the memory has moved to
        fixed = KVCache.wrap(cache.k_cache, cache.v_cache, cache.cache_seqlens, cache.last_embed)

        def run() -> Tensor:
            return self.model(static_idx, kv_cache=fixed)[:, -1]
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
