"""A model made ready to decode: the same modules and the same forward pass, with weights cast, fused and packed once.

Decoding is bound by the rate at which weights are read. torch's own product of one row with a bf16 matrix reaches a
fraction of it on CPUs, oneDNN's on packed weights most of it. Starting operations dominates small models: each takes
microseconds, on CPUs and GPUs alike. A compiled step on a CPU, or a CUDA graph, starts them all as one (figures in
dev/LOG.md, "One forward pass").

Linear layers are replaced one by one, modules with a `fuse` method are fused, and the step traces or captures
`GPT.forward` itself. All else that is known of the model here are the cache's tensors: keys, values, last ids.

B rows, T tokens, C channels, V vocabulary.
"""

import copy
import functools
import itertools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanochat.common import get_first_line, is_out_of_memory, print0
from nanochat.compilation import choose_compile, pause_collector
from nanochat.gpt import GPT, Linear
from nanochat.kv_cache import KVCache, add_unused_token
from nanochat.moe import Experts

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
    copied, dtype = copy_structure(model), model.compute_dtype
    replace_linears(copied, lambda _, layer: layer.cast(dtype) if isinstance(layer, Experts) else
                    DecodingLinear(layer.weight, dtype, keep_weights))
    return copied


def copy_structure(model: GPT) -> GPT:
    """The model as modules of their own that share its tensors, nothing compiled or balanced."""
    if any(isinstance(module, DecodingLinear) for module in model.modules()):
        raise ValueError("this model is an engine's own copy, whose weights are packed; make the engine from the model "
                         "that was copied")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())} | {id(model.balance): None}
    return copy.deepcopy(model, shared)  # which leaves a module's compiled call behind


def replace_linears(copied: GPT, make: Callable[[str, Linear | Experts], nn.Module | None]) -> None:
    """Fuse the modules of a copied structure, and put make(name, layer) in the place of each linear layer, and of each
    matrix of all experts. Module by module: all fused weights at once, in fp32, would take up to half as much memory as
    the 16-bit copy of all layers."""
    for path, module in list(copied.named_modules()):
        if hasattr(module, "fuse"):
            module.fuse()
        for name, child in list(module.named_children()):
            if isinstance(child, (Linear, Experts)):
                setattr(module, name, make(f"{path}.{name}".lstrip("."), child))


@torch.no_grad()
def refresh_copy(copied: GPT, model: GPT) -> None:
    """Give what copy_for_decoding made of a model the weights that this model has now, in place: CUDA graphs and
    compiled steps know a weight by its address, or its number."""
    linears = {name for name, module in model.named_modules() if isinstance(module, (Linear, Experts))}
    shared = dict(copied.named_parameters())
    if any(shared.get(name, param) is not param for name, param in model.named_parameters()
           if name.rpartition(".")[0] not in linears):
        raise ValueError("an engine takes new weights from the model that it was made from, not from another one")
    replace_linears(copy_structure(model), lambda name, layer: copied.get_submodule(name).refresh(layer.weight))


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

    def refresh(self, weight: Tensor) -> None:
        """Take the values of another weight of the same shape."""
        if self.weight is not None:
            self.weight.copy_(weight)
        if self.packed is not None:
            self.packed = _packed_weights[self.number] = pack(weight.detach().to(self.packed.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            if (self.is_small or x.numel() == self.in_features) and self.weight is not None:
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
        reason = get_first_line(error)[:100]
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
    return KVCache(num_rows, config.n_kv_head, num_tokens, config.head_dim, config.n_layer, device, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The step: each row of a cache gets its next token


def make_step(model: GPT, compile: bool | None = False, max_rows: int = 2) -> Callable[[Tensor, KVCache], Tensor]:
    """The function of a decoding step: (B, 1) token ids and a cache of at least B rows -> (B, V) logits.

    The tokens are those of the cache's first rows, of which the longest holds `num_tokens`.

    compile:  on a CPU, now; on CUDA the step is a graph anyway, elsewhere it is eager. None: eager everywhere
    max_rows: B is never more; one row alone needs one graph less
    """
    if model.get_device().type == "cuda" and compile is not None:
        return GraphedStep(model)
    if compile and model.get_device().type == "cpu":
        with pause_collector():
            works, reason = choose_compile("auto", model.get_device(), None)
            if works:
                step = CompiledStep(model, max_rows)
                if step.works:
                    return step
            else:
                print0(f"decoding eagerly: {reason}")
    return functools.partial(run_eagerly, model)


def run_eagerly(model: GPT, idx: Tensor, cache: KVCache) -> Tensor:
    return model(idx, kv_cache=cache.view_rows(0, len(idx), cache.num_tokens))[:, -1]


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
            cache.num_tokens = 3
            self(torch.zeros(num_rows, 1, dtype=torch.long), cache)

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the next token, from (B, 1) token ids."""
        if not self.works:
            return run_eagerly(self.model, idx, cache)
        rows = cache.view_rows(0, len(idx), cache.num_tokens)
        num_keys = rows.num_tokens + 2  # with the place behind the new token's
        k_cache, v_cache = rows.k_cache[:, :, :num_keys], rows.v_cache[:, :, :num_keys]
        for tensor in (k_cache, v_cache):
            # Unbacked: a guard on the size would recompile, for 6-10 s, at 4,096 keys
            torch._dynamo.decorators.mark_unbacked(tensor, 2)
        for tensor, row_dim in ((k_cache, 1), (v_cache, 1), (idx, 0), (rows.cache_seqlens, 0), (rows.last_ids, 0)):
            torch._dynamo.maybe_mark_dynamic(tensor, row_dim)
        try:
            return self.compute(idx, k_cache, v_cache, rows.cache_seqlens, rows.last_ids)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.works = False
            print0(f"decoding eagerly: the step can't be compiled ({get_first_line(error)[:200]})")
            return run_eagerly(self.model, idx, cache)

    def _compute(self, idx: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, last_ids: Tensor) -> Tensor:
        torch._check(k_cache.size(2) == v_cache.size(2))
        return self.model(idx, kv_cache=KVCache.wrap(k_cache, v_cache, lengths, last_ids))[:, -1]


@dataclass(frozen=True)
class Graph:
    """A captured step of so many rows, and the tensors by which it takes its input and gives its output."""
    graph:    torch.cuda.CUDAGraph
    idx:      Tensor   # (B, 1) token ids
    num_live: Tensor   # () int32: the first rows, which count
    logits:   Tensor   # (B, V)


class GraphedStep:
    """The forward pass of one new token in the first rows of a cache, as one CUDA graph for each power of two of rows.

    A graph replays kernels on the addresses that they had when it was captured: of the weights, the cache, its own
    input and output. So it holds nothing that the host decides anew in each step, and where the cache has moved, all
    graphs are dropped and captured again when they are next needed. The rows beyond the live ones are computed, too,
    but leave nothing behind except keys and values beyond the tokens that they hold.

    No CUDA device was at hand: tests replay the step's recorded operations on a CPU, and run it on the meta device,
    where a copy from the host or a value read back is an error. What fails to be captured runs eagerly, and says so.
    """

    def __init__(self, model: GPT):
        self.model = model
        self.works = True
        self.graphs: dict[int, Graph] = {}  # by number of rows
        self.addresses = None               # of the cache that they were captured with
        self.pool = None                    # memory of all graphs, which never run at once
        self.stream = None                  # on which they are captured: one, since a pool keeps memory by stream

    def __call__(self, idx: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the next token, from (B, 1) token ids; valid until the next call."""
        if not self.works:
            return run_eagerly(self.model, idx, cache)
        tensors = (cache.k_cache, cache.v_cache, cache.cache_seqlens, cache.last_ids)
        addresses = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]
        if addresses != self.addresses:
            self.graphs.clear()
            self.addresses, self.pool = addresses, None
        num_rows = min(round_up_rows(len(idx)), len(cache.cache_seqlens))
        if num_rows not in self.graphs:
            current_stream = torch.cuda.current_stream() if torch.cuda.is_available() else None
            try:
                self.graphs[num_rows] = self._capture(num_rows, cache)
            except RuntimeError as error:
                if current_stream is not None:    # which a capture that fails leaves behind
                    torch.cuda.set_stream(current_stream)
                self.works = False
                self.graphs.clear()
                reason = get_first_line(error)[:200]
                print0(f"decoding eagerly: a CUDA graph can't be captured ({reason})")
                return run_eagerly(self.model, idx, cache)
        graph = self.graphs[num_rows]
        graph.idx[:len(idx)] = idx
        graph.num_live.fill_(len(idx))
        graph.graph.replay()
        return graph.logits[:len(idx)]

    def _capture(self, num_rows: int, cache: KVCache) -> Graph:
        idx = cache.cache_seqlens.new_zeros(num_rows, 1, dtype=torch.long)
        num_live = cache.cache_seqlens.new_zeros(())  # while no row is live, no run leaves a trace
        self.stream, graph = self.stream or torch.cuda.Stream(), torch.cuda.CUDAGraph()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(GRAPH_WARMUP_STEPS):
                compute_step(self.model, idx, num_live, cache)
        torch.cuda.current_stream().wait_stream(self.stream)
        # Records, computes nothing; another thread may use CUDA meanwhile, as one that prepares batches does
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            logits = compute_step(self.model, idx, num_live, cache)
        self.pool = graph.pool()
        return Graph(graph, idx, num_live, logits)


def round_up_rows(num_rows: int) -> int:
    """The power of two that a graph for so many rows has."""
    return 1 << (num_rows - 1).bit_length()


def compute_step(model: GPT, idx: Tensor, num_live: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) of the next token in the first B rows of a cache, of which the first `num_live` () count.

    The other rows keep their length and last token. Their keys and values are written where their next token's will
    be, and behind it what waits there: in a row that is full into the token of its memory that is never used.
    """
    B = len(idx)
    lengths, last_ids = cache.cache_seqlens[:B], cache.last_ids[:B]
    k_cache, v_cache = (add_unused_token(memory[:, :B]) for memory in (cache.k_cache, cache.v_cache))
    rows = KVCache.wrap(k_cache, v_cache, lengths.clone(), last_ids.clone())
    logits = model(idx, kv_cache=rows)[:, -1]
    is_live = torch.arange(B, device=idx.device) < num_live  # (B,)
    lengths.copy_(torch.where(is_live, rows.cache_seqlens, lengths))
    last_ids.copy_(torch.where(is_live[:, None], rows.last_ids, last_ids))
    return logits
