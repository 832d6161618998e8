"""Decoding runs the model's own forward pass: eager, compiled and captured, of GPT and of what a fork makes of it."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from nanochat import decoding
from nanochat.engine import Engine
from nanochat.gpt import GPT, MLP, Block
from nanochat.rl import Question, compute_logprobs, make_batch, write_answers
from nanochat.train import Batch, train_step
from tests.helpers import BYTE_TOKENIZER, make_model, make_prompt, run_program
from tests.server_helpers import serving

# GPT.generate neither ends rows nor calls tools
NO_CHAT_TOKENS = SimpleNamespace(python_start=None, python_end=None, output_start=None, output_end=None,
                                 end_tokens=frozenset())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_decoding_copy_computes_the_same_and_shares_the_rest(dtype):
    model = make_model(dtype=dtype)
    model.compile_blocks()
    copy = Engine(model, BYTE_TOKENIZER).model
    assert {p.dtype for p in model.transformer.h.parameters()} == {torch.promote_types(dtype, torch.float32)}
    assert {p.dtype for p in copy.parameters() if p.dim() > 1} == {dtype}
    assert copy.transformer.wte.weight is model.transformer.wte.weight
    assert copy.value_embeds["1"].weight is model.value_embeds["1"].weight and copy.cos is model.cos
    assert all(block._compiled_call_impl is not None for block in model.transformer.h)
    assert all(block._compiled_call_impl is None for block in copy.transformer.h)  # shapes change with every call
    prompts = torch.tensor([make_prompt(100), make_prompt(100, seed=1)])
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float64: 1e-11}[dtype]  # of logits within +-15
    with torch.no_grad():
        cache = decoding.make_cache(model, 2, 4)
        logits = torch.cat([copy(part, kv_cache=cache) for part in prompts.split((90, 1, 9), dim=1)], dim=1)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs can be captured here")
def test_graph_that_cannot_be_captured_runs_eagerly_and_says_so_once(capsys):
    model, prompt = make_model(), make_prompt(20)
    engine = Engine(model, BYTE_TOKENIZER)
    engine.chat_tokens = NO_CHAT_TOKENS
    engine._run_step = decoding.GraphedStep(engine.model)  # there is no CUDA where this runs
    rows, _ = engine.generate_batch(prompt, 2, max_tokens=10, temperature=0)
    assert rows == [prompt + list(model.generate(prompt, 10, temperature=0))] * 2
    assert capsys.readouterr().out.count("decoding eagerly: a CUDA graph can't be captured") == 1


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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_cpu_weights_are_packed():
    packed = [module for module in Engine(make_model(), BYTE_TOKENIZER).model.modules()
              if isinstance(module, decoding.DecodingLinear) and module.packed is not None]
    assert len(packed) == 4 * 4 + 1  # each layer's, queries, keys and values being one, and the head


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
    assert abs(losses[0] - losses[1]) > 0.01
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
