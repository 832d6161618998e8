"""Every attention backend that a CPU can run against the definition, and the definition against loops."""

import functools
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import flash_attention, memory
from nanochat.common import Ranks, UserError
from nanochat.config import GPTConfig
from nanochat.flash_attention import choose_backend, flash_attn, plain_attention, probe_backend
from scripts import doctor

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = GPTConfig(n_head=4, n_kv_head=2, n_embd=256)


def make_qkv(T, B=2, H=4, Hk=2, D=8, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, D, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
            for heads in (H, Hk, Hk)]


def slow_attention(q, k, v, window):
    """(B, T, H, D) by loops over rows, queries and heads."""
    out = torch.empty_like(q)
    for row in range(q.size(0)):
        for t in range(q.size(1)):
            seen = slice(0 if window < 0 else max(0, t - window), t + 1)
            for head in range(q.size(2)):
                kv_head = head * k.size(2) // q.size(2)
                scores = k[row, seen, kv_head] @ q[row, t, head] / math.sqrt(q.size(3))
                out[row, t, head] = scores.softmax(0) @ v[row, seen, kv_head]
    return out


def get_windows(T):
    return sorted({-1, 0, 1, 5, 127, 128, 129, T - 1, T, 2 * T})


def assert_equals_plain(call, q, k, v, window):
    """Output and gradients of call(q, k, v) against the definition's, in fp64."""
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual, expected = call(q, k, v), plain_attention(q, k, v, window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(actual, (q, k, v), upstream),
                               torch.autograd.grad(expected, (q, k, v), upstream), rtol=0, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# Whole sequences


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@torch.no_grad()
def test_the_definition_equals_loops(heads):
    q, k, v = make_qkv(12, H=heads[0], Hk=heads[1])
    for window in (-1, 0, 1, 5, 11, 40):
        torch.testing.assert_close(plain_attention(q, k, v, window), slow_attention(q, k, v, window))


@pytest.mark.parametrize("T", [1, 2, 128, 131, 300])
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_backend_equals_the_definition(backend, T, monkeypatch):
    monkeypatch.setattr(flash_attention, "_override_impl", backend)
    monkeypatch.setattr(memory, "MIN_BLOCK_QUERIES", 32)  # 300 tokens are then more blocks than there may be
    q, k, v = make_qkv(T)
    for window in get_windows(T):
        assert_equals_plain(lambda q, k, v, w=window: flash_attn.flash_attn_func(q, k, v, window_size=(w, 0)),
                            q, k, v, window)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_backend_shares_key_value_heads(backend, heads, monkeypatch):
    monkeypatch.setattr(flash_attention, "_override_impl", backend)
    q, k, v = make_qkv(70, H=heads[0], Hk=heads[1])
    for window in (-1, 16):
        assert_equals_plain(lambda q, k, v, w=window: flash_attn.flash_attn_func(q, k, v, window_size=(w, 0)),
                            q, k, v, window)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_mask_equals_the_definition():
    """Uncompiled, and so without its kernel: the mask and the layout are what a CPU can check."""
    q, k, v = (t.detach() for t in make_qkv(200, dtype=torch.float32))
    for window in (-1, 0, 1, 127, 128, 129):
        torch.testing.assert_close(flash_attention._flex(q, k, v, window), plain_attention(q, k, v, window),
                                   rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_bf16_stays_bf16_and_near_the_definition(backend):
    assert probe_backend(backend, CPU, torch.bfloat16, CONFIG) == (True, "agrees with fp32")
    q, k, v = make_qkv(50, dtype=torch.bfloat16)
    out = flash_attention._TRAIN_CALLS[backend](q, k, v, 9)
    assert out.dtype == torch.bfloat16 and out.shape == q.shape


@pytest.fixture
def fa2_on_cpu():
    """torch's FlashAttention operators on CPUs, by their documented arguments: a GPU's kernels can't be had here.

    window_size_left, window_size_right: keys before and behind a query that it sees, -1 for all; k and v may have fewer
    heads; the dense layout is (B, T, H, D), the log-sum-exp (B, H, T).
    """
    def score(q, k, is_causal, left, right):
        """(B, H, queries, keys)"""
        distance = torch.arange(k.size(1)) - torch.arange(q.size(1))[:, None]
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if left is not None and left >= 0:
            hidden |= distance < -left
        if is_causal or (right is not None and right >= 0):
            hidden |= distance > (0 if is_causal else right)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, expand(k, q)) * q.size(3) ** -0.5
        return scores.masked_fill(hidden, -math.inf)

    def expand(k, q):
        return k.repeat_interleave(q.size(2) // k.size(2), 2)

    def forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
                window_size_left=None, window_size_right=None, **others):
        assert cum_q is None and cum_k is None and (max_q, max_k) == (q.size(1), k.size(1)) and not dropout_p
        scores = score(q, k, is_causal, window_size_left, window_size_right)
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), expand(v, q)).contiguous()
        rng_state, unused = (torch.empty(shape, dtype=torch.uint64) for shape in ((2,), ()))
        return out, scores.logsumexp(-1), rng_state, unused, q.new_empty(0)

    def backward(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *,
                 scale=None, window_size_left=None, window_size_right=None):
        probs = (score(q, k, is_causal, window_size_left, window_size_right) - lse[..., None]).exp()
        grad_probs = torch.einsum("bqhd,bkhd->bhqk", grad, expand(v, q)) - (grad * out).sum(-1).mT[..., None]
        grad_scores = probs * grad_probs * q.size(3) ** -0.5
        grad_kv = (torch.einsum("bhqk,bqhd->bkhd", grad_scores, q), torch.einsum("bhqk,bqhd->bkhd", probs, grad))
        return torch.einsum("bhqk,bkhd->bqhd", grad_scores, expand(k, q)).contiguous(), *(
            g.contiguous().unflatten(2, (k.size(2), -1)).sum(3) for g in grad_kv)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize(("T", "heads"), [(1, (4, 4)), (131, (4, 4)), (70, (6, 2)), (70, (3, 1))])
def test_fa2_asks_torchs_operator_for_the_definition(T, heads, fa2_on_cpu):
    q, k, v = make_qkv(T, H=heads[0], Hk=heads[1])
    for window in get_windows(T):
        window = window if window < T - 1 else -1  # as flash_attn_func cuts it
        assert_equals_plain(lambda q, k, v, w=window: flash_attention._fa2(q, k, v, w), q, k, v, window)


def test_fa2_is_one_graph_with_its_backward_pass(fa2_on_cpu, monkeypatch):
    """Compiled as a block's attention is: a graph break would raise."""
    monkeypatch.setattr(flash_attention, "_override_impl", "fa2")

    def attend(q, k, v):
        return flash_attn.flash_attn_func(2 * q, k, v, window_size=(16, 0)) * 3
    q, k, v = make_qkv(40, dtype=torch.bfloat16)
    actual, expected = torch.compile(attend, backend="aot_eager", fullgraph=True)(q, k, v), attend(q, k, v)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(out, (q, k, v), torch.ones_like(out)) for out in (actual, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("window", [-1, 512])
def test_fa2_meets_torchs_schema_and_shapes(window):
    """On the meta device, by torch's own description of its kernels, at a model's real size, grouped heads included."""
    q, k, v = (torch.empty(4, 2048, heads, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
               for heads in (12, 4, 4))
    out = flash_attention._fa2(q, k, v, window)
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert out.shape == q.shape and [grad.shape for grad in grads] == [t.shape for t in (q, k, v)]


def test_only_causal_attention_is_offered():
    q, k, v = make_qkv(4)
    for changes in ({"causal": False}, {"window_size": (2, 1)}):
        with pytest.raises(ValueError, match="causal"):
            flash_attn.flash_attn_func(q, k, v, **changes)
        with pytest.raises(ValueError, match="causal"):
            flash_attn.flash_attn_with_kvcache(q, k, v, **changes)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""
    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_sdpa_makes_no_square_mask_for_a_window():
    """Nothing with as many elements as a T x T mask, masks over all heads together included."""
    q, k, v = make_qkv(2048, B=1, H=6, Hk=6, D=16, dtype=torch.float32)
    with LargestTensor() as plain:
        plain_attention(q, k, v, 512)
    assert plain.largest >= 2048**2  # the recorder sees what it should
    with LargestTensor() as windowed:
        flash_attention._sdpa(q, k, v, 512).sum().backward()
    assert windowed.largest <= 2 * 512**2    # the mask of one chunk, which all share


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


@pytest.mark.parametrize("num_new", [1, 7])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@torch.no_grad()
def test_cached_attention_with_lengths_of_its_own_per_row(heads, num_new):
    """Each row equals the end of attention over that row's whole sequence; the cache takes the new keys and values."""
    lengths = torch.tensor([0, 3, 50], dtype=torch.int32)
    whole = make_qkv(50 + num_new, B=3, H=heads[0], Hk=heads[1])
    for window in (-1, 0, 1, 5, 49, 1000):
        caches = [torch.randn(3, 64, heads[1], 8, dtype=torch.float64) for _ in range(2)]  # garbage past the lengths
        new = [torch.empty(3, num_new, t.size(2), 8, dtype=torch.float64) for t in whole]
        for row, length in enumerate(lengths.tolist()):
            for cache, tensor in zip(caches, whole[1:], strict=True):
                cache[row, :length] = tensor[row, :length]
            for part, tensor in zip(new, whole, strict=True):
                part[row] = tensor[row, length:length + num_new]
        before = [cache.clone() for cache in caches]
        actual = flash_attn.flash_attn_with_kvcache(new[0], *caches, k=new[1], v=new[2], cache_seqlens=lengths,
                                                    window_size=(window, 0))
        again = flash_attn.flash_attn_with_kvcache(new[0], *caches, cache_seqlens=lengths + num_new,
                                                   window_size=(window, 0))  # all in the cache already
        torch.testing.assert_close(again, actual, rtol=0, atol=1e-12)
        for row, length in enumerate(lengths.tolist()):
            end = length + num_new
            expected = slow_attention(*(t[row:row + 1, :end] for t in whole), window)[0, length:]
            torch.testing.assert_close(actual[row], expected, rtol=0, atol=1e-12)
            for cache, old, tensor in zip(caches, before, whole[1:], strict=True):
                assert torch.equal(cache[row, :end], tensor[row, :end])
                assert torch.equal(cache[row, end:], old[row, end:])


@pytest.mark.parametrize("chunks", [(1,) * 40, (9, 1, 30)])
@torch.no_grad()
def test_prompt_in_chunks_equals_the_whole(chunks):
    q, k, v = make_qkv(40)
    for window in (-1, 0, 6, 40):
        caches = [torch.zeros(2, 40, 2, 8, dtype=torch.float64) for _ in range(2)]
        outputs, length = [], 0
        for parts in zip(*(t.split(chunks, dim=1) for t in (q, k, v)), strict=True):
            outputs.append(flash_attn.flash_attn_with_kvcache(
                parts[0], *caches, k=parts[1], v=parts[2], window_size=(window, 0),
                cache_seqlens=torch.full((2,), length, dtype=torch.int32)))
            length += parts[0].size(1)
        torch.testing.assert_close(torch.cat(outputs, dim=1), plain_attention(q, k, v, window), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


@pytest.fixture
def forget_choice(monkeypatch):
    monkeypatch.setattr(flash_attention, "_chosen", {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cpu_trains_with_blocks_and_evaluates_with_sdpa(forget_choice, dtype):
    name, reason = choose_backend(CPU, dtype, CONFIG)
    assert name == "blocks" and "fa3: needs a CUDA device" in reason and "agrees with fp32" in reason
    q = make_qkv(4)[0]
    assert flash_attention._backend_of(q) == "blocks" and flash_attention._backend_of(q.detach()) == "sdpa"


def test_wanted_backend_is_used_or_refused_with_its_reason(forget_choice):
    assert choose_backend(CPU, torch.float32, CONFIG, wanted="sdpa")[0] == "sdpa"
    assert flash_attention._backend_of(make_qkv(4)[0]) == "sdpa"
    for wanted, message in (("fa3", "fa3: needs a CUDA device, this is cpu"), ("flex", "flex: needs a CUDA device"),
                            ("magic", "--attention magic is not one of auto, fa3, fa2, flex, blocks, sdpa")):
        with pytest.raises(UserError, match=message):
            choose_backend(CPU, torch.bfloat16, CONFIG, wanted=wanted)


def ignore_window(q, k, v, window):
    return plain_attention(q, k, v, -1)


def die(q, k, v, window):
    raise RuntimeError("no kernel image\nis available")


def spoil_gradient(q, k, v, window):
    return plain_attention(q, k.detach() + 0 * k, v, window)


@pytest.mark.parametrize(("broken", "message"), [
    (ignore_window, "blocks: its output is off by .* at window 128"), (die, "blocks: RuntimeError: no kernel image"),
    (spoil_gradient, "blocks: its dk is off by 1")])
def test_broken_backend_is_passed_over_and_named(broken, message, forget_choice, monkeypatch):
    monkeypatch.setitem(flash_attention._TRAIN_CALLS, "blocks", broken)
    name, reason = choose_backend(CPU, torch.float32, CONFIG)
    assert name == "sdpa" and message.split(" is ")[0] in reason
    with pytest.raises(UserError, match=message):
        choose_backend(CPU, torch.float32, CONFIG, wanted="blocks")


def test_the_models_own_heads_and_dtype_are_probed(forget_choice, monkeypatch):
    """A kernel whose shared memory doesn't suffice at the model's head dim fails here, not in the first step."""
    seen = []

    def needs_small_heads(q, k, v, window):
        seen.append((q.shape[2:], k.shape[2:], q.dtype))
        if q.size(3) > 64:
            raise RuntimeError("out of resource: shared memory, Required: 147456, Hardware limit: 101376")
        return plain_attention(q, k, v, window)
    monkeypatch.setitem(flash_attention._TRAIN_CALLS, "blocks", needs_small_heads)
    large = GPTConfig(n_head=6, n_kv_head=3, n_embd=768)
    name, reason = choose_backend(CPU, torch.bfloat16, large, 2048)
    assert name == "sdpa" and "blocks: RuntimeError: out of resource: shared memory" in reason
    assert seen == [((6, 128), (3, 128), torch.bfloat16)]
    assert choose_backend(CPU, torch.bfloat16, CONFIG, 2048)[0] == "blocks"
    assert seen[-1] == ((4, 64), (2, 64), torch.bfloat16)


@pytest.fixture
def on_ranks(forget_choice, monkeypatch):
    """Runs choose_backend on four ranks, two on each of two machines, as threads. find(rank, name) is what a rank's
    probe finds. Returns what each rank gets or is told, and the (rank, name) that were probed."""
    here, barrier, shared, probed = threading.local(), threading.Barrier(4, timeout=60), [None] * 4, []

    def gather(value):
        barrier.wait()
        shared[here.rank] = value
        barrier.wait()
        return list(shared)

    def run(find, wanted="auto"):
        def choose(rank):
            here.rank = rank
            try:
                return choose_backend(CUDA, torch.bfloat16, CONFIG, wanted=wanted)
            except UserError as error:
                return str(error)

        def probe(name, *_):
            probed.append((here.rank, name))
            return find(here.rank, name)
        monkeypatch.setattr(flash_attention, "probe_backend", probe)
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(choose, range(4))), probed
    monkeypatch.setattr(flash_attention, "gather", gather)
    monkeypatch.setattr(flash_attention, "get_ranks", lambda: Ranks(here.rank, here.rank % 2, 4))
    return run


def test_the_first_rank_of_each_machine_fetches_a_backend(on_ranks):
    found, probed = on_ranks(lambda rank, name: (True, f"works on rank {rank}"))
    assert found == [("fa3", "fa3 works on rank 0")] * 4
    assert sorted(probed[:2]) == [(0, "fa3"), (2, "fa3")] and sorted(probed[2:]) == [(1, "fa3"), (3, "fa3")]


def test_all_ranks_take_the_next_backend_where_one_rank_lacks_one(on_ranks):
    found, _ = on_ranks(lambda rank, name: ((rank, name) != (3, "fa3"), "the hub doesn't answer" if rank else "works"))
    assert found == [("fa2", "fa3 on rank 3: the hub doesn't answer; fa2 works")] * 4
    assert flash_attention._chosen["cuda"] == "fa2"


def test_no_rank_asks_the_hub_for_what_the_first_can_not_have(on_ranks):
    found, probed = on_ranks(lambda rank, name: (None if name == "fa3" else True, "works"))
    assert [name for name, _ in found] == ["fa2"] * 4
    assert sorted(rank for rank, name in probed if name == "fa3") == [0, 2]


def test_all_ranks_refuse_a_wanted_backend_that_one_lacks(on_ranks):
    """If only that one did, the others would wait for it until the collective's timeout."""
    found, _ = on_ranks(lambda rank, name: (rank != 1, "its output is off"), wanted="flex")
    assert found == ["no attention backend works here: flex on rank 1: its output is off"] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Backends of GPUs, with stand-ins for their packages and kernels


def trace(call, *, backend, dynamic):
    """A stand-in for torch.compile."""
    def traced(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return call(*args)
    return traced


def test_a_probe_traces_both_passes():
    values = [torch.randn(2, 128, 2, 32) for _ in range(4)]
    traced = torch.compile(flash_attention._TRAIN_CALLS["sdpa"], backend="aot_eager", dynamic=False)
    for window in (-1, 32):
        run = functools.partial(flash_attention._run_probe, values=values, device=CPU, dtype=torch.bfloat16,
                                window=window)
        for ours, theirs in zip(run(traced), run(flash_attention._TRAIN_CALLS["sdpa"]), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.fixture
def hopper(forget_choice, monkeypatch):
    """A Hopper GPU that has FlashAttention 2 only, and on which nothing runs: probes compute on the CPU."""
    monkeypatch.setattr(flash_attention, "probe_backend", probe_backend)  # itself: packages come and go (conftest.py)
    run_probe = flash_attention._run_probe
    monkeypatch.setattr(flash_attention, "_run_probe", lambda call, values, device, dtype, window: run_probe(
        call, values, CPU, dtype, window))
    run_cache_probe = flash_attention._run_cache_probe
    monkeypatch.setattr(flash_attention, "_run_cache_probe", lambda values, device, dtype, window: run_cache_probe(
        values, CPU, dtype, window))
    monkeypatch.setattr(torch, "compile", trace)    # torch's own asks for the GPU
    monkeypatch.setattr(flash_attention, "_fa3_module", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(flash_attention._TRAIN_CALLS, "fa2", plain_attention)
    monkeypatch.setitem(flash_attention._TRAIN_CALLS, "flex", die)
    monkeypatch.setattr(torch.compiler, "disable", lambda call: die)  # by which a probe would put flex back
    for name in ("flash_attn_interface", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    flash_attention.load_fa3.cache_clear()
    yield monkeypatch
    flash_attention.load_fa3.cache_clear()


def make_fa3(**changes) -> SimpleNamespace:
    """A stand-in for FlashAttention 3: the module, whose functions return the log-sum-exp as well."""
    def flash_attn_func(q, k, v, causal, window_size):
        assert causal and window_size in ((-1, -1), (128, 0))
        return plain_attention(q, k, v, window_size[0]), None

    def flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens, causal, window_size):
        length, = set(cache_seqlens.tolist())
        whole = [torch.cat((cache[:, :length], new), dim=1) for cache, new in ((k_cache, k), (v_cache, v))]
        q = torch.cat((q.new_zeros(len(q), length, *q.shape[2:]), q), dim=1)
        return plain_attention(q, *whole, window_size[0])[:, length:]
    return SimpleNamespace(**{"flash_attn_func": flash_attn_func, "flash_attn_with_kvcache": flash_attn_with_kvcache,
                              **changes})


def make_hub(answer) -> SimpleNamespace:
    """A stand-in for the package kernels, whose hub gives `answer` or raises it, and keeps what it was asked for."""
    def get_kernel(repo_id, *, version=None, trust_remote_code=False):
        if version is None:
            raise ValueError("A kernel version or revision must be specified.")  # as kernels 0.15 and later say
        asked.append((repo_id, version, trust_remote_code))
        if isinstance(answer, Exception):
            raise answer
        return answer
    asked = []
    return SimpleNamespace(get_kernel=get_kernel, asked=asked)


def test_an_installed_fa3_comes_first(hopper):
    hopper.setitem(sys.modules, "flash_attn_interface", module := make_fa3())
    hopper.setitem(sys.modules, "kernels", hub := make_hub(make_fa3()))
    name, reason = choose_backend(CUDA, torch.bfloat16, CONFIG)
    assert (name, reason) == ("fa3", "fa3 agrees with fp32, from flash_attn_interface")
    assert flash_attention._fa3_module is module and not hub.asked and flash_attention.HAS_FA3


def test_the_hubs_fa3_is_asked_for_by_version_and_once(hopper):
    hopper.setitem(sys.modules, "kernels", hub := make_hub(make_fa3()))
    for _ in range(2):
        name, reason = choose_backend(CUDA, torch.bfloat16, CONFIG)
    assert name == "fa3" and reason == ("fa3 agrees with fp32, from kernels-community/flash-attn3 version 1 of the "
                                        "kernels hub, since flash_attn_interface isn't installed")
    assert hub.asked == [("kernels-community/flash-attn3", 1, False)]


NO_BUILD = FileNotFoundError("Cannot find a build variant for this system in kernels-community/flash-attn3 (revision: "
                             "5f63):\n\ntorch29-cxx11-cu128-x86_64-linux: torch 2.9 is not 2.13")
UNTRUSTED = ValueError("Kernel repository 'kernels-community/flash-attn3' is not from a trusted publisher. Set "
                       "trust_remote_code=True or add the repository ID to the trust_remote_code allowlist")
UNREACHED = ValueError("Kernel repository 'kernels-community/flash-attn3' could not verify publisher trust status. Set")
OLD_BUILD = ImportError("_C.abi3.so: undefined symbol: _ZNK3c106SymInt6sym_neERKS0_")


@pytest.mark.parametrize(("answer", "reason"), [
    (None,                                        "needs the package kernels"),
    (NO_BUILD,                                    "has no build for torch 2.13.0+cu130 with CUDA 13.0"),
    (UNTRUSTED,                                   "is refused: the hub doesn't mark its publisher as trusted"),
    (UNREACHED,                                   "can't be had, for the hub doesn't answer"),
    (OLD_BUILD,                                   "is built for another torch than 2.13.0+cu130 (_C.abi3.so:"),
    (RuntimeError("capability 9.0 of\nthe GPU"), "fails: RuntimeError: capability 9.0 of"),
    (SimpleNamespace(flash_attn_func=None),       "has no flash_attn_with_kvcache"),
])
def test_why_the_hub_has_no_fa3_is_said_in_the_decision(hopper, answer, reason):
    """And fa2 serves, which needs no package. The hub's errors are those of kernels 0.17.2."""
    hopper.setitem(sys.modules, "kernels", answer and make_hub(answer))
    name, why = choose_backend(CUDA, torch.bfloat16, CONFIG)
    said = f"flash_attn_interface isn't installed, kernels-community/flash-attn3 version 1 of the kernels hub {reason}"
    assert name == "fa2" and f"fa3: {said}" in why and why.endswith("; fa2 agrees with fp32") and "\n" not in why
    assert flash_attention.HAS_FA3 is False
    with pytest.raises(UserError, match="fa3: flash_attn_interface isn't installed"):
        choose_backend(CUDA, torch.bfloat16, CONFIG, wanted="fa3")


def test_the_doctor_says_why_fa3_is_not_used(hopper, capsys):
    hopper.setitem(sys.modules, "kernels", make_hub(NO_BUILD))
    finding = doctor.check_attention(CUDA, torch.bfloat16)
    assert finding.state == "note" and finding.what.startswith("uses fa2; works: fa2, sdpa; not: fa3: ")
    assert "of the kernels hub has no build for torch 2.13.0+cu130 with CUDA 13.0; flex: " in finding.what
    assert "flash-attn-3 --index-url https://download.pytorch.org/whl/cu130" in finding.advice
    assert capsys.readouterr().out == ""  # --json is JSON


def test_a_package_built_for_another_torch_is_one_sentence(hopper, tmp_path):
    (tmp_path / "flash_attn_interface.py").write_text(f"raise ImportError({str(OLD_BUILD)!r})")
    hopper.delitem(sys.modules, "flash_attn_interface")
    hopper.syspath_prepend(tmp_path)
    hopper.setitem(sys.modules, "kernels", make_hub(make_fa3()))
    name, reason = choose_backend(CUDA, torch.bfloat16, CONFIG)
    assert name == "fa3" and reason.endswith("since flash_attn_interface is built for another torch than "
                                             f"2.13.0+cu130 ({OLD_BUILD})")


def test_an_fa3_that_computes_something_else_is_passed_over(hopper):
    hopper.setitem(sys.modules, "flash_attn_interface", make_fa3(
        flash_attn_func=lambda q, k, v, causal, window_size: plain_attention(q, k, v, -1)))
    name, reason = choose_backend(CUDA, torch.bfloat16, CONFIG)
    assert name == "fa2" and "fa3: its output is off by" in reason and "at window 128" in reason


def test_an_fa3_whose_cache_is_wrong_is_passed_over(hopper):
    """A server has no other call of it."""
    right = make_fa3().flash_attn_with_kvcache
    hopper.setitem(sys.modules, "flash_attn_interface", make_fa3(
        flash_attn_with_kvcache=lambda q, *caches, window_size, **more: right(q, *caches, window_size=(-1, 0), **more)))
    name, reason = choose_backend(CUDA, torch.bfloat16, CONFIG)
    assert name == "fa2" and "fa3: its output with a cache is off by" in reason and "at window 128" in reason


def test_what_torch_compile_can_not_trace_is_passed_over_where_it_compiles(hopper):
    """The hub's build once lacked a file that only its code for shapes reads."""
    def attend(q, k, v, causal, window_size):
        if torch.compiler.is_compiling():
            raise ModuleNotFoundError("No module named 'flash_attn_config'")
        return plain_attention(q, k, v, window_size[0])
    hopper.setitem(sys.modules, "flash_attn_interface", make_fa3(flash_attn_func=attend))
    name, reason = choose_backend(CUDA, torch.bfloat16, CONFIG)
    assert name == "fa2" and "fa3: torch.compile can't trace it: " in reason and "flash_attn_config" in reason
    assert choose_backend(CUDA, torch.bfloat16, CONFIG, is_traced=False)[0] == "fa3"


@pytest.mark.parametrize("capability", [(10, 0), (12, 0), (7, 5)])
def test_an_installed_fa3_is_not_loaded_where_it_would_end_the_process(capability, hopper):
    hopper.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    hopper.setitem(sys.modules, "flash_attn_interface", make_fa3(flash_attn_func=lambda *_, **__: pytest.fail("ran")))
    assert "flash_attn_interface is for Ampere and Hopper GPUs" in choose_backend(CUDA, torch.bfloat16, CONFIG)[1]


def test_a_model_that_only_answers_says_nothing_on_stdout(hopper, capsys):
    assert flash_attention.choose_for_inference(CPU, torch.bfloat16, CONFIG) == "sdpa"    # without a probe
    hopper.setattr(torch, "compile", lambda *_, **__: pytest.fail("traced"))
    hopper.setitem(sys.modules, "flash_attn_interface", make_fa3())
    assert flash_attention.choose_for_inference(CUDA, torch.bfloat16, CONFIG) == "fa3"
    said = capsys.readouterr()
    assert said.out == "" and "probing attention: fa3" in said.err


@pytest.mark.parametrize(("change", "name", "reason"), [
    (lambda m: m.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5)), "sdpa", "an Ampere GPU"),
    (lambda m: m.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False), "sdpa", "was built with"),
    (lambda m: m.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9)), "fa2", "is for Hopper GPUs"),
])
def test_other_gpus_and_builds_of_torch(hopper, change, name, reason):
    change(hopper)
    chosen, why = choose_backend(CUDA, torch.bfloat16, CONFIG)
    assert chosen == name and reason in why
    works = {name: works for name, works, _ in flash_attention.probe_report(CUDA, torch.bfloat16, CONFIG)}
    assert works["blocks"] is works["fa3"] is None and works["flex"] is False  # not here, against broken


def test_half_precision_only(hopper):
    """Nothing is loaded for a dtype that the GPU's backends don't have."""
    hopper.setitem(sys.modules, "kernels", hub := make_hub(make_fa3()))
    name, reason = choose_backend(CUDA, torch.float32, CONFIG)
    assert name == "sdpa" and "fa2: needs bf16 or fp16" in reason and not hub.asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be a FlashAttention 3 here")
def test_fa3_is_not_here_and_forcing_it_says_so(monkeypatch):
    assert flash_attention.HAS_FA3 is False
    monkeypatch.setattr(flash_attention, "_override_impl", "fa3")
    q, k, v = make_qkv(4, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="fa3 was asked for, but needs an NVIDIA GPU"):
        flash_attn.flash_attn_func(q, k, v)
