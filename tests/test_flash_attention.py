"""Every attention backend that a CPU can run against the definition, and the definition against loops."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import flash_attention, memory
from nanochat.common import UserError
from nanochat.flash_attention import choose_backend, flash_attn, plain_attention, probe_backend

CPU = torch.device("cpu")


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
    q, k, v = make_qkv(20, H=heads[0], Hk=heads[1])
    for window in (-1, 0, 1, 5, 19, 40):
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
    assert probe_backend(backend, CPU, torch.bfloat16) == (True, "agrees with fp32")
    q, k, v = make_qkv(50, dtype=torch.bfloat16)
    out = flash_attention._TRAIN_CALLS[backend](q, k, v, 9)
    assert out.dtype == torch.bfloat16 and out.shape == q.shape


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
    assert windowed.largest < 2048**2


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
    name, reason = choose_backend(CPU, dtype)
    assert name == "blocks" and "fa3: needs a CUDA device" in reason and "agrees with fp32" in reason
    q = make_qkv(4)[0]
    assert flash_attention._backend_of(q) == "blocks" and flash_attention._backend_of(q.detach()) == "sdpa"


def test_wanted_backend_is_used_or_refused_with_its_reason(forget_choice):
    assert choose_backend(CPU, torch.float32, wanted="sdpa")[0] == "sdpa"
    assert flash_attention._backend_of(make_qkv(4)[0]) == "sdpa"
    for wanted, message in (("fa3", "fa3: needs a CUDA device, this is cpu"), ("flex", "flex: needs a CUDA device"),
                            ("magic", "--attention magic is not one of auto, fa3, flex, blocks, sdpa")):
        with pytest.raises(UserError, match=message):
            choose_backend(CPU, torch.bfloat16, wanted=wanted)


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
    name, reason = choose_backend(CPU, torch.float32)
    assert name == "sdpa" and message.split(" is ")[0] in reason
    with pytest.raises(UserError, match=message):
        choose_backend(CPU, torch.float32, wanted="blocks")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be a FlashAttention 3 here")
def test_fa3_is_not_here_and_forcing_it_says_so(monkeypatch):
    assert flash_attention.HAS_FA3 is False
    monkeypatch.setattr(flash_attention, "_override_impl", "fa3")
    q, k, v = make_qkv(4, dtype=torch.bfloat16)
    with pytest.raises(UserError, match="fa3"):
        flash_attn.flash_attn_func(q, k, v)
