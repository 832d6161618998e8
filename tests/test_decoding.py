"""Decoding runs the model's own forward pass: eager, compiled and captured, of GPT and of what a fork makes of it."""

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from nanochat import decoding
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, MLP, Block
from nanochat.rl import Question, compute_logprobs, make_batch, write_answers
from nanochat.train import Batch, train_step
from tests import fake_cuda
from tests.fake_cuda import NoHostCalls, NothingOfTheHost, fake_cuda_graphs
from tests.helpers import BYTE_TOKENIZER, CONFIG, make_model, make_prompt, measure_peak_bytes, run_program
from tests.server_helpers import serving

# GPT.generate neither ends rows nor calls tools
NO_CHAT_TOKENS = SimpleNamespace(python_start=None, python_end=None, output_start=None, output_end=None,
                                 end_tokens=frozenset(), special_tokens=frozenset())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_decoding_copy_computes_the_same_and_shares_the_rest(dtype):
    model = make_model(dtype=dtype)
    model.compile_blocks()
    copied = Engine(model, BYTE_TOKENIZER).model
    assert {p.dtype for p in model.transformer.h.parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert {p.dtype for p in copied.parameters() if p.dim() > 1} == {dtype}
    assert copied.transformer.wte.weight is model.transformer.wte.weight
    assert copied.value_embeds["1"].weight is model.value_embeds["1"].weight and copied.cos is model.cos
    assert all(block._compiled_call_impl is not None for block in model.transformer.h)
    assert all(block._compiled_call_impl is None for block in copied.transformer.h)  # shapes change with every call
    prompts = torch.tensor([make_prompt(100), make_prompt(100, seed=1)])
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float64: 1e-11}[dtype]  # of logits within +-15
    with torch.no_grad():
        cache = decoding.make_cache(model, 2, 4)
        logits = torch.cat([copied(part, kv_cache=cache) for part in prompts.split((90, 1, 9), dim=1)], dim=1)
        torch.testing.assert_close(logits, make_model(dtype=dtype)(prompts), rtol=0, atol=tolerance)


def test_the_first_token_does_not_wait_for_the_compiler_to_be_loaded():
    """Which takes a second or two of every start, and which nothing here uses."""
    result = run_program("first_token", fresh=True)
    assert result.stdout == "[]\n", result.stderr


def test_matrices_that_cannot_be_packed_are_said_so_once(monkeypatch, capsys):
    monkeypatch.setattr(decoding, "multiply", lambda x, packed: x.new_zeros(len(x), 96))
    decoding.can_pack.cache_clear()
    results = [decoding.can_pack(torch.float32) for _ in range(2)]
    decoding.can_pack.cache_clear()
    assert results == [False, False]
    assert capsys.readouterr().out.count("packed torch.float32 weights don't work here (its results are wrong)") == 1


def check_compiled(engine, model):
    """Rows that come one by one and together, from prompts of one token on, while the cache grows: as GPT.generate."""
    engine.chat_tokens = NO_CHAT_TOKENS
    for num_tokens, num_rows in ((1, 1), (5, 1), (7, 2), (130, 3), (30, 9)):
        prompts = [make_prompt(num_tokens + 3 * i, seed=i + num_tokens) for i in range(num_rows)]
        answers = engine.generate_many(prompts, max_tokens=20, temperature=0)
        assert [rows[0] for rows, _ in answers] == [
            prompt + list(model.generate(prompt, 20, temperature=0)) for prompt in prompts]


@pytest.mark.parametrize("packs", [True, False])
def test_compiled_step_equals_naive_and_is_compiled_but_twice(monkeypatch, packs):
    """The graphs that inductor would get, run by torch itself: the same tokens, and none is made after the start."""
    graphs = []

    def run_as_it_is(graph, inputs, options):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=run_as_it_is))
    monkeypatch.setattr(decoding, "choose_compile", lambda *args: (True, ""))
    if not packs:
        monkeypatch.setattr(decoding, "can_pack", lambda dtype: False)
    models = [make_model(seed=seed) for seed in range(1 + packs)]  # neither engine may take the other's graphs
    engines = [Engine(model, BYTE_TOKENIZER, compile=True) for model in models]
    assert all(isinstance(engine._run_step, decoding.CompiledStep) for engine in engines)
    assert len(graphs) == 2 * len(models)
    for engine, model in zip(engines, models, strict=True):
        check_compiled(engine, model)
    assert all(engine._run_step.works for engine in engines) and len(graphs) == 2 * len(models)


def test_one_row_alone_needs_one_graph(monkeypatch):
    shapes = []

    def note_shape(self, idx, cache):
        shapes.append(tuple(idx.shape))
    monkeypatch.setattr(decoding, "choose_compile", lambda *args: (True, ""))
    monkeypatch.setattr(decoding.CompiledStep, "__call__", note_shape)
    for max_rows in (1, 2, 7):
        Engine(make_model(), BYTE_TOKENIZER, max_rows=max_rows, compile=True)
    assert shapes == [(1, 1)] + 2 * [(1, 1), (2, 1)]


@pytest.mark.slow
def test_compiled_step_equals_naive():
    model = make_model()
    engine = Engine(model, BYTE_TOKENIZER, compile=True)
    check_compiled(engine, model)
    assert engine._run_step.works


@pytest.mark.parametrize("fails", ["torch.compile", "nanochat.compilation.probe_compiler"])
def test_step_that_cannot_be_compiled_runs_eagerly_and_says_so_once(monkeypatch, capsys, fails):
    def refuse(*args):
        raise RuntimeError("no compiler")
    monkeypatch.setattr("nanochat.compilation.remove_broken_kernels", lambda: 0)
    monkeypatch.setattr("nanochat.compilation.probe_compiler", lambda device: "")
    monkeypatch.setattr(fails, (lambda *args, **kwargs: refuse) if fails == "torch.compile" else lambda device: "none")
    model = make_model()
    check_compiled(Engine(model, BYTE_TOKENIZER, compile=True), model)
    assert capsys.readouterr().out.count("decoding eagerly: ") == 1


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs, without CUDA


def make_graphed(model, **settings):
    """An engine that decodes with CUDA graphs, and ends no row."""
    engine = Engine(model, BYTE_TOKENIZER, **settings)
    engine.chat_tokens = NO_CHAT_TOKENS
    engine._run_step = decoding.GraphedStep(engine.model)
    return engine


def make_step_tensors(model, num_rows, num_live, device="cpu"):
    """(token ids, number of live rows, a cache in which each row holds other tokens)."""
    cache = decoding.make_cache(model, num_rows, 6)
    cache.num_tokens = num_rows
    cache.cache_seqlens += torch.arange(1, num_rows + 1, device=device, dtype=torch.int32)
    for tensor in (cache.k_cache, cache.v_cache):
        tensor.normal_()
    cache.last_ids.copy_(torch.arange(num_rows, device=device)[:, None] + 7)
    idx = torch.arange(num_rows, device=device)[:, None]
    return idx, torch.full((), num_live, device=device, dtype=torch.int32), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_needs_nothing_of_the_host(dtype):
    with torch.device("meta"):
        model = decoding.copy_for_decoding(GPT(CONFIG, dtype))
        step_tensors = make_step_tensors(model, 4, 3, "meta")
    with torch.inference_mode(), NothingOfTheHost(), NoHostCalls():
        assert decoding.compute_step(model, *step_tensors).shape == (4, 265)
        for is_forbidden in (lambda x: x.new_tensor(15.0), lambda x: x.cpu(), lambda x: x * torch.ones(()),
                             lambda x: x.tolist(), lambda x: x[[0, 2]], lambda x: float(x[0]), lambda x: x[x > 0]):
            with pytest.raises(Exception):  # noqa: B017  each in its own way
                is_forbidden(torch.empty(3, device="meta"))


@torch.inference_mode()
def test_step_on_the_same_buffers_is_the_same_and_leaves_other_rows_alone(monkeypatch):
    """Of four rows two are live, one is not, one is full."""
    monkeypatch.setattr("nanochat.kv_cache.find_positions", fake_cuda.find_positions)
    model = decoding.copy_for_decoding(make_model(dtype=torch.float64))
    idx, num_live, cache = make_step_tensors(model, 4, 0)
    cache.cache_seqlens[3] = 6
    before = [tensor.clone() for tensor in vars(cache).values() if isinstance(tensor, torch.Tensor)]
    keys, values, lengths, last_ids = before
    expected = decoding.run_eagerly(model, idx[:2], copy.deepcopy(cache))
    for _ in range(3):
        torch.testing.assert_close(decoding.compute_step(model, idx, num_live, cache)[:2], expected)
        assert cache.cache_seqlens.equal(lengths) and cache.last_ids.equal(last_ids)
    torch.testing.assert_close(decoding.compute_step(model, idx, num_live + 2, cache)[:2], expected)
    assert cache.cache_seqlens.tolist() == [2, 3, 3, 6]
    assert [row.equal(old) for row, old in zip(cache.last_ids, last_ids, strict=True)] == [False, False, True, True]
    for row, length in enumerate(lengths.tolist()):
        for memory, old in ((cache.k_cache, keys), (cache.v_cache, values)):
            assert memory[:, row, :length].equal(old[:, row, :length])
            behind = length + 1 + (memory is cache.k_cache)    # the token's key waits behind it
            assert memory[:, row, behind:].equal(old[:, row, behind:])
        if row >= 2:    # and what waits for a row's next token still does
            slow = [d for d in range(CONFIG.head_dim) if d % (CONFIG.head_dim // 2) >= CONFIG.head_dim // 4]
            layers = [i for i in range(CONFIG.n_layer) if CONFIG.count_offset_pairs(i)]
            assert cache.k_cache[layers, row, length][..., slow].equal(keys[layers, row, length][..., slow])


def test_graphed_decoding_equals_naive_while_the_cache_grows(monkeypatch):
    model, graphs = make_model(dtype=torch.float64), fake_cuda_graphs(monkeypatch)
    engine = make_graphed(model, cache_tokens=4, max_rows=8)
    for num_tokens, num_rows in ((1, 1), (7, 2), (5, 3), (70, 5), (30, 1)):
        prompts = [make_prompt(num_tokens + 3 * i, seed=i + num_tokens) for i in range(num_rows)]
        answers = engine.generate_many(prompts, max_tokens=12, temperature=0)
        assert [rows[0] for rows, _ in answers] == [
            prompt + list(model.generate(prompt, 12, temperature=0)) for prompt in prompts]
    assert engine._run_step.works and set(engine._run_step.graphs) <= {1, 2, 4, 8}
    num_graphs, capacity = len(graphs), engine.cache.get_capacity()
    for num_rows in (1, 2, 3, 5, 8):  # no more growth: at most one graph for each power of two
        engine.generate_batch(make_prompt(20), num_rows, max_tokens=5)
    assert engine.cache.get_capacity() == capacity and len(graphs) <= num_graphs + 4
    assert set(engine._run_step.graphs) == {1, 2, 4, 8}


def test_rows_beyond_the_live_ones_keep_what_they_hold(monkeypatch):
    """Three rows decode in a graph of four, beside a prompt that is being read, then beside a conversation that fills
    its row."""
    monkeypatch.setattr("nanochat.engine.PREFILL_TOKENS", 9)
    monkeypatch.setattr("nanochat.engine.SHARED_STEP_TOKENS", 9)
    model, graphs = make_model(dtype=torch.float64), fake_cuda_graphs(monkeypatch)
    engine = make_graphed(model, cache_tokens=63, max_rows=4)
    prompts = [make_prompt(4, seed=1), make_prompt(5, seed=2), make_prompt(6, seed=3), make_prompt(50)]
    expected = [prompt + list(model.generate(prompt, 14, temperature=0)) for prompt in prompts]
    assert [rows[0] for rows, _ in engine.generate_many(prompts, max_tokens=14, temperature=0)] == expected
    assert max(len(row.tokens) for row in engine.rows) == 63 and len(graphs) == 3  # of 1, 2 and 4 rows
    assert engine.generate_many(prompts[:3], max_tokens=10, temperature=0) == [
        ([row[:-4]], [[0] * (len(row) - 14) + [1] * 10]) for row in expected[:3]]
    engine.submit(Request(expected[3], 5, 0))
    events = [event for _ in iter(engine.has_work, False) for event in engine.step()]
    assert events[-1].usage.cached_tokens == 63
    assert [event.token for event in events] == list(model.generate(expected[3], 5, temperature=0))


class ReadingMLP(MLP):
    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square()) * (1 if float(x.sum()) > 0 else 1)


class ReadingModel(GPT):
    """Reads a value back in its last layer, when the first ones have done their work."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__(config, dtype)
        self.transformer.h[-1].mlp.__class__ = ReadingMLP


@pytest.mark.parametrize("has_cuda", [True, False])
def test_graph_that_cannot_be_captured_runs_eagerly_and_says_so_once(monkeypatch, capsys, has_cuda):
    if has_cuda:
        fake_cuda_graphs(monkeypatch)
    elif torch.cuda.is_available():
        pytest.skip("graphs can be captured here")
    model, prompt = make_model(model_class=ReadingModel if has_cuda else GPT), make_prompt(20)
    rows, _ = make_graphed(model).generate_batch(prompt, 2, max_tokens=10, temperature=0)
    assert rows == [prompt + list(model.generate(prompt, 10, temperature=0))] * 2
    assert capsys.readouterr().out.count("decoding eagerly: a CUDA graph can't be captured") == 1


# ---------------------------------------------------------------------------------------------------------------------
# The copy's weights


@pytest.mark.parametrize(("kind", "dtype"), [
    ("eager", torch.float32), ("eager", torch.bfloat16), ("unpacked", torch.float32), ("unpacked", torch.bfloat16),
    ("compiled", torch.bfloat16), ("graphed", torch.float32), ("graphed", torch.bfloat16)])
def test_refreshed_engine_answers_as_a_new_one(monkeypatch, kind, dtype):
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend=lambda graph, inputs, options: graph.forward))
    monkeypatch.setattr(decoding, "choose_compile", lambda *args: (True, ""))
    graphs = fake_cuda_graphs(monkeypatch) if kind == "graphed" else []
    if kind in ("unpacked", "graphed"):
        monkeypatch.setattr(decoding, "can_pack", lambda dtype: False)

    def make_engine():
        if kind == "graphed":
            return make_graphed(model, cache_tokens=50)
        return Engine(model, BYTE_TOKENIZER, compile=kind == "compiled", max_rows=1 if kind == "compiled" else 4)

    def answer(engine):
        ids = [engine.submit(Request(make_prompt(30 + i, seed=i), 8, seed=i, num_logprobs=0)) for i in range(3)]
        return [(event.request_id - ids[0], event.token, event.logprobs.chosen)
                for _ in iter(engine.has_work, False) for event in engine.step()]
    model = make_model(replace(CONFIG, n_layer=1), dtype)
    engine, optimizer, rows = make_engine(), model.setup_optimizer(), torch.tensor([make_prompt(41)])
    before, num_graphs = answer(engine), len(graphs)
    train_step(model, optimizer, Batch(rows[:, :-1], rows[:, 1:], None), 1)
    engine.refresh(model)
    assert answer(engine) == answer(make_engine()) != before
    assert len(graphs) == 2 * num_graphs  # the new engine's
    engine.generate_batch(make_prompt(60), max_tokens=2)
    engine.forget()
    assert engine.rows == [] and engine.cache is None  # also where graphs know it: it had grown
    assert answer(engine) == answer(make_engine())
    engine.submit(Request([1], 2))
    with pytest.raises(ValueError, match="unfinished requests"):
        engine.refresh(model)


def test_engines_take_no_other_models_weights_and_no_engines_copy():
    model = make_model()
    engine = Engine(model, BYTE_TOKENIZER)
    with pytest.raises(ValueError, match="from the model that it was made from"):
        engine.refresh(make_model(seed=1))
    with pytest.raises(ValueError, match="make the engine from the model that was copied"):
        Engine(engine.model, BYTE_TOKENIZER)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_cpu_weights_are_packed():
    packed = [module for module in Engine(make_model(), BYTE_TOKENIZER).model.modules()
              if isinstance(module, decoding.DecodingLinear) and module.packed is not None]
    assert len(packed) == 4 * 4 + 1  # each layer's, queries, keys and values being one, and the head


def test_one_layers_fused_weights_exist_at_a_time():
    """Those of all layers in fp32 wouldn't fit beside a large model that is trained."""
    config = replace(CONFIG, n_layer=12)
    model = make_model(config, torch.bfloat16)
    layer_bytes = 4 * config.n_embd * (config.n_embd + 2 * config.kv_dim)
    kept = []
    copied_bytes = measure_peak_bytes(lambda: kept.append(decoding.copy_for_decoding(model)))
    kept_bytes = 2 * sum(module.out_features * module.in_features for module in kept[0].modules()
                         if isinstance(module, decoding.DecodingLinear))
    refreshed_bytes = measure_peak_bytes(lambda: decoding.refresh_copy(kept[0], model))
    assert copied_bytes - kept_bytes < 4 * layer_bytes and refreshed_bytes < 4 * layer_bytes


# ---------------------------------------------------------------------------------------------------------------------
# A fork's model: one edit changes it everywhere


class GeluMLP(MLP):
    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class LayerNormBlock(Block):
    def forward(self, x, x0, lambdas, ve, cos_sin, kv_cache=None):
        x = lambdas[0] * x + lambdas[1] * x0
        x = x + self.attn(F.layer_norm(x, x.shape[-1:]), ve, cos_sin, kv_cache)
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]))


class Fork(GPT):
    """Another activation, another norm."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__(config, dtype)
        for block in self.transformer.h:
            block.__class__, block.mlp.__class__ = LayerNormBlock, GeluMLP


def write_greedily(model, prompt, num_tokens=12):
    return list(model.generate(prompt, num_tokens, temperature=0))


@pytest.fixture
def fork():
    """With a prompt that it continues differently from a GPT of the same weights."""
    model, prompt = make_model(model_class=Fork), make_prompt(30)
    assert write_greedily(model, prompt) != write_greedily(make_model(), prompt)
    return model, prompt


def test_fork_is_trained():
    models = [make_model(dtype=torch.float64, model_class=model_class) for model_class in (Fork, GPT)]
    rows = torch.tensor([make_prompt(41), make_prompt(41, seed=1)])
    batch = Batch(rows[:, :-1], rows[:, 1:], None)
    losses = [train_step(model, model.setup_optimizer(), batch, 1).loss for model in models]
    logits = make_model(dtype=torch.float64, model_class=Fork)(rows[:, :-1])
    assert losses[0] == pytest.approx(F.cross_entropy(logits.mT, rows[:, 1:]).item(), rel=1e-10)
    assert abs(losses[0] - losses[1]) > 1e-3
    moved = [block.mlp.c_fc.weight for block in models[0].transformer.h]
    assert all((a - b).abs().max() > 0 for a, b in zip(
        moved, (block.mlp.c_fc.weight for block in models[1].transformer.h), strict=True))


@pytest.mark.parametrize("compiles", [False, True])
def test_fork_is_sampled_from(fork, monkeypatch, compiles):
    model, prompt = fork
    run_as_it_is = functools.partial(torch.compile, backend=lambda graph, inputs, options: graph.forward)
    monkeypatch.setattr(torch, "compile", run_as_it_is)
    monkeypatch.setattr(decoding, "choose_compile", lambda *args: (True, ""))
    engine = Engine(model, BYTE_TOKENIZER, compile=compiles)
    engine.chat_tokens = NO_CHAT_TOKENS
    for num_rows in (1, 3):
        rows, _ = engine.generate_batch(prompt, num_rows, max_tokens=12, temperature=0)
        assert rows == [prompt + write_greedily(model, prompt)] * num_rows
    assert not compiles or engine._run_step.works


def test_fork_writes_and_scores_the_answers_of_rl(fork):
    model, prompt = fork
    task = SimpleNamespace(reward=lambda conversation, text: 0.0)
    engine = Engine(model, BYTE_TOKENIZER)
    engine.chat_tokens = NO_CHAT_TOKENS
    ((answer,),) = write_answers(engine, [Question("task", task, {}, prompt)], 1, 12, 0.0, seed=0)
    assert answer.tokens == prompt + write_greedily(model, prompt)
    logprobs = compute_logprobs(model, make_batch([answer], [1.0], length_multiple=1), micro_rows=1)
    expected = model(torch.tensor([answer.tokens[:-1]]))[0, len(prompt) - 1:].log_softmax(-1)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)


def test_fork_is_served():
    model = make_model(model_class=Fork)
    prompt = [BYTE_TOKENIZER.get_bos_token_id(), *b"Tell me"]
    tokens = write_greedily(model, prompt)
    with serving(Engine(model, BYTE_TOKENIZER)) as client:
        answer = client.post("/v1/completions", json={"prompt": "Tell me", "max_tokens": 12, "temperature": 0}).json()
    text = BYTE_TOKENIZER.decode(tokens)
    assert answer["choices"][0]["text"][:6] == text[:6] and tokens != write_greedily(make_model(), prompt)
