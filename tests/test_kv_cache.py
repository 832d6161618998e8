"""The cache of keys and values: a forward pass in pieces computes what one over the whole sequence does."""

import pytest
import torch

from nanochat.kv_cache import KVCache
from tests.helpers import CONFIG, make_model, make_prompt


def make_cache(batch_size, seq_len, dtype):
    return KVCache(batch_size, CONFIG.n_kv_head, seq_len, CONFIG.head_dim, CONFIG.n_layer, torch.device("cpu"), dtype)


@pytest.mark.parametrize("seq_len", [200, 3])  # room from the start, and growing several times
@pytest.mark.parametrize("chunks", [(200,), (1,) * 200, (7, 1, 130, 61, 1)])
@torch.inference_mode()
def test_cached_logits_equal_uncached(seq_len, chunks):
    model, idx = make_model(dtype=torch.float64), torch.tensor([make_prompt(200), make_prompt(200, seed=1)])
    cache = make_cache(2, seq_len, torch.float64)
    logits = torch.cat([model(part, kv_cache=cache) for part in idx.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(idx), rtol=0, atol=1e-10)
    assert cache.get_pos() == 200 and cache.k_cache.size(2) >= 200


@torch.inference_mode()
def test_rows_of_different_lengths():
    model = make_model(dtype=torch.float64)
    prompts = [make_prompt(150), make_prompt(9, seed=1), make_prompt(70, seed=2)]
    cache = make_cache(3, 160, torch.float64)
    for row, prompt in enumerate(prompts):
        alone = make_cache(1, len(prompt), torch.float64)
        model(torch.tensor([prompt]), kv_cache=alone)
        for memory, other in ((cache.k_cache, alone.k_cache), (cache.v_cache, alone.v_cache)):
            memory[:, row, :len(prompt) + 1] = other[:, 0]
        cache.cache_seqlens[row], cache.last_ids[row] = len(prompt), alone.last_ids[0]
    cache.num_tokens = 150
    new = torch.tensor([[5], [6], [7]])
    logits = model(new, kv_cache=cache)[:, -1]
    for row, prompt in enumerate(prompts):
        expected = model(torch.tensor([[*prompt, int(new[row])]]))[0, -1]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-10)


@torch.inference_mode()
def test_prefill_copies_to_rows_and_reset_forgets():
    model, idx = make_model(dtype=torch.float64), torch.tensor([make_prompt(20)])
    one, three = make_cache(1, 20, torch.float64), make_cache(3, 4, torch.float64)
    model(idx, kv_cache=one)
    three.prefill(one)
    new = torch.tensor([[1], [2], [3]])
    expected = model(torch.cat((idx.expand(3, -1), new), dim=1))[:, -1]
    torch.testing.assert_close(model(new, kv_cache=three)[:, -1], expected, rtol=0, atol=1e-10)
    assert one.get_pos() == 20 and three.get_pos() == 21  # the copy is a copy
    with pytest.raises(ValueError, match="already holds 21 tokens"):
        three.prefill(one)
    three.reset()
    torch.testing.assert_close(model(new, kv_cache=three), model(new), rtol=0, atol=1e-10)
    one.reset()
    with pytest.raises(ValueError, match="rows be 1 or equal"):
        one.prefill(make_cache(2, 4, torch.float64))


@torch.inference_mode()
def test_growth_keeps_what_is_there_and_rows_can_be_added():
    model, idx = make_model(dtype=torch.float64), torch.tensor([make_prompt(30), make_prompt(30, seed=1)])
    cache = make_cache(2, 30, torch.float64)
    model(idx, kv_cache=cache)
    assert cache.k_cache.shape[1:3] == (2, 31)  # a full cache isn't grown before it has to be
    before = cache.k_cache.clone()
    cache.add_rows(1)
    cache.reserve(1)
    assert cache.k_cache.shape[1:3] == (3, 61)
    assert cache.k_cache[:, :2, :31].equal(before) and not cache.k_cache[:, 2].any()
    assert not cache.k_cache[:, :, 31:].any()


@torch.inference_mode()
def test_wrapped_cache_works_on_the_same_memory_and_never_moves():
    """As a captured graph needs it: the same addresses in every step, and what a step writes is the cache's own."""
    model, idx = make_model(dtype=torch.float64), torch.tensor([make_prompt(24), make_prompt(24, seed=1)])
    cache = make_cache(2, 24, torch.float64)
    model(idx[:, :20], kv_cache=cache)
    wrapped = KVCache.wrap(cache.k_cache, cache.v_cache, cache.cache_seqlens, cache.last_ids)
    tensors = (wrapped.k_cache, wrapped.v_cache, wrapped.cache_seqlens, wrapped.last_ids)
    addresses = [tensor.data_ptr() for tensor in tensors]
    logits = torch.cat([model(idx[:, i:i + 1], kv_cache=wrapped) for i in range(20, 24)], dim=1)
    torch.testing.assert_close(logits, model(idx)[:, 20:], rtol=0, atol=1e-10)
    assert [tensor.data_ptr() for tensor in tensors] == addresses and cache.cache_seqlens.tolist() == [24, 24]
    assert cache.k_cache[:, :, 23].any() and wrapped.k_cache is cache.k_cache


@torch.inference_mode()
def test_a_pass_beyond_the_rotary_table_is_refused():
    """With one position left, a slice of the table would be one long, and serve all new tokens alike."""
    model, prompt = make_model(dtype=torch.float64), make_prompt(len(make_model().cos) + 1)
    cache = make_cache(1, 8, torch.float64)
    model(torch.tensor([prompt[:-2]]), kv_cache=cache)
    with pytest.raises(ValueError, match="641 tokens exceed the 640 positions"):
        model(torch.tensor([prompt[-2:]]), kv_cache=cache)


def test_a_gpu_attends_to_the_keys_in_use():
    """Which the host knows without reading lengths back, except in a graph; the meta device goes a GPU's ways."""
    memory = make_cache(3, 100, torch.float64)
    cache = KVCache.wrap(memory.k_cache.to("meta"), memory.v_cache.to("meta"), memory.cache_seqlens.to("meta"), None)
    for num_tokens, expected in ((None, 101), (20, 27)):
        cache.num_tokens = num_tokens
        cache.begin(7)
        assert (cache.positions.first, cache.positions.end) == (0, expected)
