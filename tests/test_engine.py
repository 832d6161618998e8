"""The engine against GPT.generate, which recomputes the whole sequence for each token; its rows and its tool loop."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nanochat.common import UserError
from nanochat.engine import HEADROOM_TOKENS, Engine, KVCache, Request, count_common
from nanochat.tokenizer import SPLIT_PATTERN, RustBPETokenizer
from tests.helpers import BYTE_TOKENIZER, make_model, make_prompt

CPU = torch.device("cpu")
NUM_POSITIONS = 640
# The naive way neither ends rows nor calls tools
NO_CHAT_TOKENS = SimpleNamespace(python_start=None, python_end=None, output_start=None, output_end=None,
                                 end_tokens=frozenset(), special_tokens=frozenset())


@pytest.fixture
def tokenizer():
    return BYTE_TOKENIZER


# ---------------------------------------------------------------------------------------------------------------------
# The same tokens as the naive way


@pytest.mark.parametrize(("num_prompt_tokens", "dtype"), [
    (1, torch.float64), (2, torch.float32), (50, torch.float32), (63, torch.float64), (140, torch.float32)])
def test_greedy_equals_naive(tokenizer, dtype, num_prompt_tokens):
    """Prompts and outputs shorter and longer than the windows and than the context the model was trained with."""
    model, prompt, num_tokens = make_model(dtype=dtype), make_prompt(num_prompt_tokens), 100
    expected = list(model.generate(prompt, num_tokens, temperature=0))
    engine = Engine(model, tokenizer)
    assert len(set(expected)) > 5  # or the comparison says little
    engine.chat_tokens = NO_CHAT_TOKENS
    for num_samples in (1, 3):
        columns = [column for column, _ in engine.generate(prompt, num_samples, num_tokens, temperature=0)]
        assert [list(row) for row in zip(*columns, strict=True)] == [expected] * num_samples


@pytest.mark.parametrize("backend", ["sdpa", "blocks"])
def test_greedy_equals_naive_with_each_backend(tokenizer, monkeypatch, backend):
    monkeypatch.setattr("nanochat.flash_attention._override_impl", backend)
    model, prompt = make_model(), make_prompt(150)
    engine = Engine(model, tokenizer)
    engine.chat_tokens = NO_CHAT_TOKENS
    rows, _ = engine.generate_batch(prompt, 2, max_tokens=30, temperature=0)
    assert rows == [prompt + list(model.generate(prompt, 30, temperature=0))] * 2


def test_prompt_of_several_chunks_equals_naive(tokenizer, monkeypatch):
    model, prompt = make_model(), make_prompt(100)
    monkeypatch.setattr("nanochat.engine.PREFILL_TOKENS", 33)
    rows, _ = Engine(model, tokenizer).generate_batch(prompt, max_tokens=20, temperature=0)
    assert rows[0] == prompt + list(model.generate(prompt, 20, temperature=0))


def test_fills_all_positions_and_no_more(tokenizer):
    engine = Engine(make_model(), tokenizer)
    engine.chat_tokens = NO_CHAT_TOKENS
    num_prompt_tokens = NUM_POSITIONS - HEADROOM_TOKENS - 10  # so that the cache must grow on the way
    rows, masks = engine.generate_batch(make_prompt(num_prompt_tokens), num_samples=2)
    assert [len(row) for row in rows] == [len(mask) for mask in masks] == [NUM_POSITIONS] * 2
    rows, _ = engine.generate_batch(make_prompt(NUM_POSITIONS - 1), max_tokens=1000)
    assert len(rows[0]) == NUM_POSITIONS


def test_max_tokens(tokenizer):
    engine = Engine(make_model(), tokenizer)
    with pytest.raises(UserError, match="max_tokens 0 must be 1 or more"):
        engine.submit(Request([1, 2], max_tokens=0))
    with pytest.raises(UserError, match="num_logprobs -1"):
        engine.submit(Request([1, 2], num_logprobs=-1))
    with pytest.raises(UserError, match="stop string is empty"):
        engine.submit(Request([1, 2], stop=("a", "")))
    for top_p in (0, 1.1):
        with pytest.raises(UserError, match="top_p"):
            engine.submit(Request([1, 2], top_p=top_p))
    assert list(engine.generate([1, 2], max_tokens=0)) == []
    assert engine.generate_batch([1, 2], 2, max_tokens=0) == ([[1, 2], [1, 2]], [[0, 0], [0, 0]])
    rows, masks = engine.generate_batch([1, 2], 2, max_tokens=1, temperature=0)
    assert [len(row) for row in rows] == [3, 3] and masks == [[0, 0, 1]] * 2


@pytest.mark.parametrize(("request_values", "message"), [
    ({"tokens": []}, "the prompt is empty"),
    ({"tokens": [1] * NUM_POSITIONS}, "640 tokens leaves no room in the 640 positions"),
    ({"tokens": [1] * 5000}, "5000 tokens leaves no room"),
    ({"tokens": [1, 265]}, "outside the model's vocabulary, 0 to 264"),  # inside the padded one
    ({"tokens": [-1]}, "outside the model's vocabulary"),
    ({"tokens": [1], "max_tokens": -1}, "max_tokens"),
    ({"tokens": [1], "num_samples": 0}, "num_samples"),
    ({"tokens": [1], "top_k": -1}, "top_k"),
    ({"tokens": [1], "temperature": -0.1}, "temperature"),
    ({"tokens": [1], "temperature": float("nan")}, "temperature"),
])
def test_bad_requests_are_refused_at_once(tokenizer, request_values, message):
    engine = Engine(make_model(), tokenizer)
    with pytest.raises(UserError, match=message):
        engine.generate(**request_values)  # not only when the first token is asked for


def test_modes_do_not_leak_between_steps(tokenizer):
    steps = Engine(make_model(), tokenizer).generate([1], max_tokens=3)
    next(steps)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


# ---------------------------------------------------------------------------------------------------------------------
# Rows and their seeds


def test_rows_differ_and_are_reproducible(tokenizer):
    engine, prompt = Engine(make_model(dtype=torch.float64), tokenizer), make_prompt(10, seed=1)

    def sample(num_samples, seed):
        return engine.generate_batch(prompt, num_samples, max_tokens=12, top_k=50, seed=seed)[0]
    rows = sample(8, seed=42)
    assert len({tuple(row) for row in rows}) == 8
    assert len({row[len(prompt)] for row in rows}) > 3  # each row samples its own first token
    assert sample(8, seed=42) == rows
    assert sample(1, seed=42) == rows[:1] and sample(3, seed=42) == rows[:3]
    assert not {tuple(row) for row in sample(8, seed=43)} & {tuple(row) for row in rows}


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (7, None), (None, 0.6), (20, 0.9)])
def test_sampled_row_equals_naive(tokenizer, top_k, top_p):
    """The same random numbers, so the engine writes the very text that GPT.generate samples."""
    model, prompt = make_model(dtype=torch.float64), make_prompt(70)
    engine = Engine(model, tokenizer)
    engine.chat_tokens = NO_CHAT_TOKENS
    (events,) = run(engine, {0: [Request(prompt, 40, 1.3, top_k, top_p, seed=5)]})
    row = prompt + get_tokens(events)
    if top_p is None:
        assert row == prompt + list(model.generate(prompt, 40, 1.3, top_k, seed=5))
    idxs = [model(torch.tensor([row[:n]]))[0, -1].sort(descending=True) for n in range(70, 110)]
    ranks = [int((idx.indices == token).nonzero()) for idx, token in zip(idxs, row[70:], strict=True)]
    assert max(ranks) < (top_k or 265) and (not top_p or max(ranks) < 100)
    assert max(ranks) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Requests that come and go


def run(engine, arrivals, cancel=None):
    """Submit requests before the steps they are listed for, run to the end; returns each one's events, in order."""
    events, ids = {}, []
    for step in range(10_000):
        for request in arrivals.get(step, ()):
            ids.append(engine.submit(request))
            events[ids[-1]] = []
        if cancel and step == cancel[0]:
            assert engine.cancel(ids[cancel[1]]) and not engine.cancel(ids[cancel[1]])
        if not engine.has_work() and step >= max(arrivals):
            return [events[i] for i in ids]
        for event in engine.step():
            events[event.request_id].append(event)
    raise AssertionError("the engine does not end")


def get_tokens(events):
    return [event.token for event in events]


@pytest.mark.parametrize("max_rows", [2, 3, 16])
@pytest.mark.parametrize("temperature", [0, 1.2])
def test_any_batch_gives_the_tokens_of_each_alone(tokenizer, monkeypatch, max_rows, temperature):
    """Requests of all lengths that arrive, prefill in pieces, decode, end and are cancelled beside each other."""
    monkeypatch.setattr("nanochat.engine.PREFILL_TOKENS", 40)
    monkeypatch.setattr("nanochat.engine.SHARED_STEP_TOKENS", 13)
    model = make_model(dtype=torch.float64)
    sizes = [(1, 30), (100, 9), (3, 45), (17, 1), (64, 20), (140, 25), (30, 30), (2, 60)]
    requests = [Request(make_prompt(size, seed=i), num, temperature, 30, seed=i, sample=i)
                for i, (size, num) in enumerate(sizes)]
    engine = Engine(model, tokenizer, max_rows=max_rows)
    engine.chat_tokens = NO_CHAT_TOKENS
    answers = run(engine, {0: requests[:3], 4: requests[3:6], 11: requests[6:]}, cancel=(9, 2))
    for i, (request, events) in enumerate(zip(requests, answers, strict=True)):
        alone = Engine(model, tokenizer)
        alone.chat_tokens = NO_CHAT_TOKENS
        expected = get_tokens(run(alone, {0: [request]})[0])
        if temperature == 0:
            assert expected == list(model.generate(request.tokens, request.max_tokens, temperature=0))
        if i == 2:
            assert get_tokens(events) == expected[:len(events)] and len(events) < len(expected)
        else:
            assert get_tokens(events) == expected and [e.finish_reason for e in events][-2:] in (
                [None, "length"], ["length"])
            assert events[-1].usage.completion_tokens == len(expected)
    assert len(engine.rows) <= max_rows and not any(row.generation for row in engine.rows)


def test_long_prompt_does_not_stall_the_others(tokenizer, monkeypatch):
    monkeypatch.setattr("nanochat.engine.SHARED_STEP_TOKENS", 20)
    engine = Engine(make_model(), tokenizer)
    engine.chat_tokens = NO_CHAT_TOKENS
    short = engine.submit(Request(make_prompt(3), 100))
    engine.step()
    long = engine.submit(Request(make_prompt(201, seed=1), 5))
    told = [[event.request_id for event in engine.step()] for _ in range(11)]
    assert told[:9] == [[short]] * 9 and sorted(told[9]) == [short, long]  # 200 tokens, 20 a step, then both


def test_prompts_are_read_in_the_order_of_their_requests(tokenizer, monkeypatch):
    """Though the third, which is ready at once, takes the first one's place in the cache."""
    monkeypatch.setattr("nanochat.engine.SHARED_STEP_TOKENS", 20)
    engine = Engine(make_model(), tokenizer)
    engine.chat_tokens = NO_CHAT_TOKENS
    first, second, short = (engine.submit(Request(make_prompt(size, seed=size), 20)) for size in (61, 62, 1))
    told = [event.request_id for _ in range(7) for event in engine.step()]
    assert list(dict.fromkeys(told)) == [short, first, second]


def note_shapes(monkeypatch, engine):
    """The shapes of all prompts that are read from now on."""
    shapes, forward_trunk = [], type(engine.model).forward_trunk

    def note(model, idx, kv_cache=None):
        if idx.size(1) > 1:
            shapes.append(tuple(idx.shape))
        return forward_trunk(model, idx, kv_cache)
    monkeypatch.setattr(type(engine.model), "forward_trunk", note)
    return shapes


def make_reading_together(model, tokenizer, **settings):
    """An engine that reads prompts as on CUDA, and ends no row."""
    engine = Engine(model, tokenizer, **settings)
    engine.chat_tokens, engine.prefills_together = NO_CHAT_TOKENS, True
    return engine


def test_prompts_of_similar_length_are_read_in_one_pass(tokenizer, monkeypatch):
    model = make_model(dtype=torch.float64)
    prompts = [make_prompt(size, seed=size) for size in (41, 90, 37, 101, 33, 40, 1)]
    expected = [prompt + list(model.generate(prompt, 8, temperature=0)) for prompt in prompts]
    engine = make_reading_together(model, tokenizer)
    with monkeypatch.context() as patch:
        shapes = note_shapes(patch, engine)
        answers = engine.generate_many(prompts, max_tokens=8, temperature=0)
    assert [rows[0] for rows, _ in answers] == expected
    assert sorted(shapes) == [(2, 100), (4, 40)]
    alone = Engine(model, tokenizer)
    alone.chat_tokens = NO_CHAT_TOKENS
    for chosen, other in zip(engine.generate_many(prompts, 2, 9, 1.1, 20, seed=3),
                             alone.generate_many(prompts, 2, 9, 1.1, 20, seed=3), strict=True):
        assert chosen == other


@pytest.mark.parametrize("max_rows", [3, 16])
def test_reading_together_in_pieces_beside_rows_that_decode(tokenizer, monkeypatch, max_rows):
    """With rows that lie apart, a prefix that others share, a budget that cuts prompts, and a cache that grows."""
    monkeypatch.setattr("nanochat.engine.CUDA_PREFILL_TOKENS", 90)
    monkeypatch.setattr("nanochat.engine.CUDA_SHARED_STEP_TOKENS", 50)
    model, shared = make_model(dtype=torch.float64), make_prompt(30)
    prompts = [make_prompt(size, seed=size) for size in (4, 20, 22, 140, 25, 18, 3, 21)]
    prompts += [[*shared, *make_prompt(size, seed=size)] for size in (5, 9, 7)]
    requests = [Request(prompt, 5 + 7 * i % 11, 0) for i, prompt in enumerate(prompts)]
    engine = make_reading_together(model, tokenizer, max_rows=max_rows, cache_tokens=10)
    with monkeypatch.context() as patch:
        shapes = note_shapes(patch, engine)
        answers = run(engine, {0: requests[:3], 2: requests[3:5], 5: requests[5:7], 9: requests[7:]})
    for request, events in zip(requests, answers, strict=True):
        assert get_tokens(events) == list(model.generate(request.tokens, request.max_tokens, temperature=0))
    assert max(rows for rows, _ in shapes) >= 2 and max(rows * num_tokens for rows, num_tokens in shapes) <= 90


def test_padding_stays_within_the_positions(tokenizer, monkeypatch):
    """A conversation that has 40 positions left is read beside a prompt of 40 tokens, but not beside one of 41."""
    model = make_model()
    history, first = make_prompt(NUM_POSITIONS - 40), Request(make_prompt(NUM_POSITIONS - 39), 1, 0)
    for num_tokens, expected in ((40, [(2, 40)]), (41, [(1, 35), (1, 41)])):
        engine = make_reading_together(model, tokenizer)
        run(engine, {0: [first]})
        requests = [Request([*history, *make_prompt(36, seed=5)], 3, 0),
                    Request(make_prompt(num_tokens + 1, seed=num_tokens), 3, 0)]
        with monkeypatch.context() as patch:
            shapes = note_shapes(patch, engine)
            answers = run(engine, {0: requests})
        assert sorted(shapes) == expected
        for request, events in zip(requests, answers, strict=True):
            assert get_tokens(events) == list(model.generate(list(request.tokens), 3, temperature=0))


def test_cancelled_request_frees_its_row_at_once(tokenizer):
    engine = Engine(make_model(), tokenizer, max_rows=1)
    first, second, third = (engine.submit(Request([256, i], 50)) for i in range(3))
    assert [event.request_id for event in engine.step()] == [first]
    assert engine.cancel(second) and engine.cancel(first)  # a waiting one and a running one
    assert [event.request_id for event in engine.step()] == [third]
    assert not engine.cancel(first) and not engine.cancel(99)
    assert engine.cancel(third) and not engine.has_work() and engine.step() == []


def test_generators_share_an_engine(tokenizer):
    """Two calls of generate and a request run side by side, and each gets its own tokens."""
    model = make_model(dtype=torch.float64)
    engine = Engine(model, tokenizer)
    engine.chat_tokens = NO_CHAT_TOKENS
    prompts = [make_prompt(9), make_prompt(30, seed=1), make_prompt(5, seed=2)]
    expected = [list(model.generate(prompt, 12, temperature=0)) for prompt in prompts]
    request_id = engine.submit(Request(prompts[2], 12, 0))
    pairs = zip(*(engine.generate(prompt, 1, 12, temperature=0) for prompt in prompts[:2]), strict=True)
    pairs = [(first[0][0], second[0][0]) for first, second in pairs]
    assert [list(row) for row in zip(*pairs, strict=True)] == expected[:2]
    events = engine.step()
    assert [e.token for e in events if e.request_id == request_id] == expected[2]


def test_left_generator_cancels_its_rows(tokenizer):
    engine = Engine(make_model(), tokenizer)
    steps = engine.generate([1, 2], 5, max_tokens=50)
    next(steps)
    steps.close()
    assert not engine.has_work() and not any(row.generation for row in engine.rows)


def test_many_prompts(tokenizer):
    """More sequences than rows; each prompt's rows are those it gets alone, and keep their end token."""
    engine = Engine(make_model(dtype=torch.float64), tokenizer, max_rows=5)
    prompts = [make_prompt(size, seed=size) for size in (3, 40, 1, 17)] + [make_prompt(40, seed=40)]
    many = engine.generate_many(prompts, 3, max_tokens=30, seed=7)
    for i, (prompt, (rows, masks)) in enumerate(zip(prompts, many, strict=True)):
        alone = Engine(make_model(dtype=torch.float64), tokenizer).generate_batch(prompt, 3, max_tokens=30, seed=7 + i)
        ends = [row[-1] in engine.end_tokens for row in rows]
        assert ([row[:len(row) - end] for row, end in zip(rows, ends, strict=True)],
                [mask[:len(mask) - end] for mask, end in zip(masks, ends, strict=True)]) == alone
    assert many[1] != many[4]  # the same prompt, another seed
    assert engine.generate_many([], 3) == []
    end = tokenizer.encode_special("<|assistant_end|>")
    script = PromptedModel([7, end])
    assert Engine(script, tokenizer).generate_batch([256, 0]) == ([[256, 0, 7]], [[0, 0, 1]])
    assert Engine(script, tokenizer).generate_many([[256, 0]]) == [([[256, 0, 7, end]], [[0, 0, 1, 1]])]


def test_bad_prompt_among_many_leaves_nothing_behind(tokenizer):
    engine = Engine(make_model(), tokenizer)
    with pytest.raises(UserError, match="the prompt is empty"):
        engine.generate_many([[1, 2], []])
    assert not engine.has_work()


def test_interrupted_step_reads_everything_again(tokenizer, monkeypatch):
    model, prompt = make_model(dtype=torch.float64), make_prompt(80)
    engine = Engine(model, tokenizer)
    engine.chat_tokens = NO_CHAT_TOKENS
    request_id = engine.submit(Request(prompt, 20, 0))
    events = [event for _ in range(5) for event in engine.step()]
    forward = type(engine.model).forward_trunk

    def interrupt(*args):
        forward(*args)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(engine.model), "forward_trunk", interrupt)
        engine.step()
    while engine.has_work():
        events += engine.step()
    assert {event.request_id for event in events} == {request_id}
    assert get_tokens(events) == list(model.generate(prompt, 20, temperature=0))


@pytest.mark.parametrize("fails, waits", [("__init__", [0, 1, 2]), ("add_rows", [1, 2]), ("copy_row", [1])])
def test_requests_wait_on_where_there_is_no_memory_for_a_row(tokenizer, monkeypatch, fails, waits):
    """The second prompt waits for the first one's tokens, the third for a row of its own."""
    def refuse(*args):
        raise MemoryError
    monkeypatch.setattr("nanochat.engine.PREFILL_TOKENS", 20)
    model, shared = make_model(dtype=torch.float64), make_prompt(40)
    prompts = [[*shared, 1], [*shared, 2], make_prompt(9, seed=1)]
    engine = Engine(model, tokenizer)
    engine.chat_tokens = NO_CHAT_TOKENS
    events, ids = [], [engine.submit(Request(prompts[0], 5, 0))]
    if fails != "__init__":
        events += engine.step()
    ids += [engine.submit(Request(prompt, 5, 0)) for prompt in prompts[1:]]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(KVCache, fails, refuse)
        while engine.has_work():
            events += engine.step()
    assert [generation.id for generation in engine.waiting] == [ids[i] for i in waits]
    while engine.has_work():
        events += engine.step()
    for request_id, prompt in zip(ids, prompts, strict=True):
        tokens = [event.token for event in events if event.request_id == request_id]
        assert tokens == list(model.generate(prompt, 5, temperature=0))


# ---------------------------------------------------------------------------------------------------------------------
# What rows still hold


def count_read_tokens(engine, monkeypatch):
    """The tokens of each pass of the model from now on, as a list that grows."""
    counts, forward = [], type(engine.model).forward_trunk

    def count(model, idx, kv_cache=None):
        counts.append(idx.numel())
        return forward(model, idx, kv_cache)
    monkeypatch.setattr(type(engine.model), "forward_trunk", count)
    return counts


def test_next_turn_reads_only_what_is_new(tokenizer, monkeypatch):
    model = make_model(dtype=torch.float64)
    engine = Engine(model, tokenizer, max_rows=1)
    engine.chat_tokens = NO_CHAT_TOKENS
    history, held = make_prompt(50), 0
    for turn in range(3):
        expected = list(model.generate(history, 20, temperature=0))
        with monkeypatch.context() as patch:
            counts = count_read_tokens(engine, patch)
            (events,) = run(engine, {0: [Request(history, 20, 0)]})
        assert get_tokens(events) == expected
        assert events[-1].usage.cached_tokens == held and sum(counts) == len(history) - held + 19
        held = len(history) + 19  # the answer's last token hasn't been read
        history = [*history, *expected, *make_prompt(9, seed=turn)]
    branch = [*history[:60], *make_prompt(30, seed=9)]  # an edited question: what was before it is still there
    (events,) = run(engine, {0: [Request(branch, 20, 0)]})
    assert events[-1].usage.cached_tokens == 60
    assert get_tokens(events) == list(model.generate(branch, 20, temperature=0))


def test_samples_of_a_prompt_read_it_once(tokenizer, monkeypatch):
    engine, prompt = Engine(make_model(), tokenizer), make_prompt(100)
    engine.chat_tokens = NO_CHAT_TOKENS
    counts = count_read_tokens(engine, monkeypatch)
    engine.generate_batch(prompt, 20, max_tokens=10)
    assert sum(counts) == 99 + 20 * 10 and len(counts) <= 3 + 10 + 1


def test_conversations_are_kept_beside_each_other(tokenizer):
    """Turns of several conversations in turn, with a common beginning, in more rows and in fewer than there are."""
    model = make_model(dtype=torch.float64)
    system = make_prompt(30)
    for kept_rows, expected in ((4, [0, 30, 30, 59, 59, 59]), (1, [0, 30, 30, 30, 30, 30])):
        engine = Engine(model, tokenizer, kept_rows=kept_rows)
        engine.chat_tokens = NO_CHAT_TOKENS
        histories, cached = [[*system, *make_prompt(20, seed=i)] for i in range(3)], []
        for _ in range(2):
            for history in histories:
                (events,) = run(engine, {0: [Request(history, 10, 0)]})
                cached.append(events[-1].usage.cached_tokens)
                assert get_tokens(events) == list(model.generate(history, 10, temperature=0))
                history += [*get_tokens(events), *make_prompt(5, seed=9)]
        assert cached == expected and len(engine.rows) == min(kept_rows, 3)


def test_the_conversation_that_has_rested_longest_makes_room(tokenizer):
    """Of three in three rows; a fourth takes the row of the one whose last turn is the oldest."""
    engine = Engine(make_model(), tokenizer, max_rows=3, kept_rows=3)
    engine.chat_tokens = NO_CHAT_TOKENS
    histories, cached = [make_prompt(30, seed=i) for i in range(4)], []
    for i in (0, 1, 2, 0, 3, 2, 0, 1):
        (events,) = run(engine, {0: [Request(histories[i], 4, 0)]})
        cached.append(events[-1].usage.cached_tokens)
        histories[i] += [*get_tokens(events), *make_prompt(5, seed=9)]
    assert cached == [0, 0, 0, 33, 0, 33, 42, 0]


def test_count_common():
    for size in (0, 1, 2, 7, 64):
        a = make_prompt(size)
        assert count_common(a, a) == count_common(a, [*a, 1]) == size
        for i in range(size):
            assert count_common(a, [*a[:i], a[i] + 1, *a[i + 1:]]) == i


# ---------------------------------------------------------------------------------------------------------------------
# Ends and tools


class ScriptedModel(nn.Module):
    """Says a script, token by token, over and over, whatever it reads."""

    config = SimpleNamespace(vocab_size=265, n_layer=1, n_kv_head=1, head_dim=2, n_embd=1)
    compute_dtype, balance = torch.float32, None

    def __init__(self, script, interrupt_after=None):
        super().__init__()
        self.script, self.interrupt_after = script, interrupt_after
        self.cos = range(500)  # positions
        self.num_steps = 0

    def get_device(self):
        return CPU

    def forward_trunk(self, idx, kv_cache):
        kv_cache.advance(idx.size(1))

    def forward(self, idx, kv_cache):
        self.num_steps += 1
        kv_cache.advance(1)
        if self.num_steps == self.interrupt_after:
            raise KeyboardInterrupt
        return self.say([self.script[(self.num_steps - 1) % len(self.script)]])

    def say(self, tokens):
        logits = nn.functional.one_hot(torch.tensor(tokens), self.config.vocab_size) * 100.0
        return logits[:, None]  # (B, 1, V)


class PromptedModel(ScriptedModel):
    """To a prompt [256, i] it says scripts[i]; what a row has read decides what comes next, as with a real model."""

    def __init__(self, *scripts):
        super().__init__(None)
        self.scripts = scripts

    def forward_trunk(self, idx, kv_cache):
        for row, length in enumerate(kv_cache.cache_seqlens.tolist()):
            kv_cache.k_cache[0, row, length:length + idx.size(1), 0, 0] = idx[row].float()
        kv_cache.advance(idx.size(1))

    def forward(self, idx, kv_cache):
        self.forward_trunk(idx, kv_cache)
        rows = [kv_cache.k_cache[0, row, :length, 0, 0].int().tolist()
                for row, length in enumerate(kv_cache.cache_seqlens.tolist())]
        scripts = [self.scripts[row[1]] for row in rows]
        return self.say([script[(len(row) - 2) % len(script)] for row, script in zip(rows, scripts, strict=True)])


def script_tokens(tokenizer, text):
    """Tokens of a text in which special tokens are special."""
    return tokenizer.encoding.encode(text, allowed_special="all")


def test_tool_loop_row_by_row(tokenizer):
    says = ["<|python_start|>2+3<|python_end|>????<|assistant_end|>",  # 3 of the ? stand where it isn't asked
            "<|python_start|>2**9<|python_end|>?<|bos|>",              # refused: nothing is forced
            "no tool<|python_end|>5+5<|assistant_end|>",               # an end without a start calls nothing
            "<|assistant_end|>"]
    engine = Engine(PromptedModel(*(script_tokens(tokenizer, text) for text in says)), tokenizer)
    results = engine.generate_many([[256, i] for i in range(4)], max_tokens=30)
    sees = ["<|python_start|>2+3<|python_end|><|output_start|>5<|output_end|>?<|assistant_end|>",
            "<|python_start|>2**9<|python_end|>?<|bos|>", "no tool<|python_end|>5+5<|assistant_end|>",
            "<|assistant_end|>"]
    rows, masks = ([result[kind][0] for result in results] for kind in (0, 1))
    assert rows == [[256, i, *script_tokens(tokenizer, text)] for i, text in enumerate(sees)]
    assert masks[0] == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    assert all(mask == [0, 0] + [1] * (len(row) - 2) for mask, row in zip(masks[1:], rows[1:], strict=True))


def test_tool_does_not_hold_up_other_rows(tokenizer):
    call = script_tokens(tokenizer, "<|python_start|>99*99<|python_end|>" + "?" * 30)
    engine = Engine(PromptedModel(call, [*b"abcdefghijklmnopqrstuvwxyz"]), tokenizer)
    ids = [engine.submit(Request([256, i], 20)) for i in range(2)]
    steps = [engine.step() for _ in range(10)]
    assert all([event.request_id for event in step].count(ids[1]) == 1 for step in steps)
    called = [event for step in steps for event in step if event.request_id == ids[0]]
    assert "".join(event.text for event in called if event.part == "python") == "99*99"
    assert "".join(event.text for event in called if event.part == "python_output") == "9801"
    assert [event.mask for event in called] == [1] * 7 + [0] * 6 + [1] * 3
    assert [event.part for event in called][-3:] == ["text"] * 3


def test_steps_of_a_row_that_has_ended(tokenizer):
    """Rows of one prompt that end at different times: the filling of the shorter one is its end token, masked."""
    engine = Engine(make_model(), tokenizer)
    engine.chat_tokens = SimpleNamespace(**{**vars(NO_CHAT_TOKENS), "end_tokens": frozenset(range(0, 265, 9))})
    steps = list(engine.generate(make_prompt(5), 6, max_tokens=60))
    ends = []
    for row, masks in zip(zip(*(column for column, _ in steps), strict=True),
                          zip(*(column_masks for _, column_masks in steps), strict=True), strict=True):
        end = next((i for i, token in enumerate(row) if token % 9 == 0), len(row) - 1)
        assert all(token == row[end] for token in row[end:])
        assert list(masks) == [1] * (end + 1) + [0] * (len(row) - end - 1)
        ends.append(end)
    assert len(set(ends)) > 2 and max(ends) == len(steps) - 1


def test_tool_result_is_cut_at_max_tokens(tokenizer):
    engine = Engine(PromptedModel(script_tokens(tokenizer, "<|python_start|>99*99<|python_end|>")), tokenizer)
    rows, masks = engine.generate_batch([256, 0], 1, max_tokens=9)
    assert tokenizer.decode(rows[0][2:]) == "<|python_start|>99*99<|python_end|><|output_start|>9"
    assert masks[0] == [0, 0] + [1] * 7 + [0] * 2


def test_vocabulary_without_chat_tokens():
    tokenizer = RustBPETokenizer(SPLIT_PATTERN, {bytes([byte]): byte for byte in range(256)}, {"<|endoftext|>": 256})
    rows, _ = Engine(PromptedModel([1, 2, 256]), tokenizer).generate_batch([256, 0])
    assert rows == [[256, 0, 1, 2]]


def test_finish_reasons_and_stop_strings(tokenizer):
    end = tokenizer.encode_special("<|assistant_end|>")
    engine = Engine(PromptedModel([*"naïve 😀 stops".encode(), end], [*b"x" * 5, 0xf0]), tokenizer)

    def answer(prompt, **options):
        (events,) = run(engine, {0: [Request(prompt, **options)]})
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        return "".join(event.text for event in events), events[-1].finish_reason
    assert answer([256, 0]) == ("naïve 😀 stops", "stop")
    assert answer([256, 0], stop=("zz", " sto")) == ("naïve 😀", "stop")
    assert answer([256, 0], stop=("ops!", "stopsy")) == ("naïve 😀 stops", "stop")  # held back, then it was none
    assert answer([256, 0], max_tokens=4) == ("naï", "length")
    assert answer([256, 0], max_tokens=3, stop=("vx",)) == ("na\ufffd", "length")  # cut within a character
    text, reason = answer([256, 1])
    assert reason == "length" and text == ("xxxxx\ufffd" * 100)[:498]  # the end of the model's positions


@torch.no_grad()
def test_logprobs(tokenizer):
    model, prompt = make_model(dtype=torch.float64), make_prompt(20)
    (events,) = run(Engine(model, tokenizer), {0: [Request(prompt, 5, 0.7, num_logprobs=3)]})
    for i, event in enumerate(events):
        expected = model(torch.tensor([[*prompt, *get_tokens(events[:i])]]))[0, -1].log_softmax(-1)
        values, tokens = expected.topk(3)
        assert event.logprobs.chosen == pytest.approx(float(expected[event.token]), abs=1e-9)
        assert [token for token, _ in event.logprobs.likeliest] == tokens.tolist()
        assert [value for _, value in event.logprobs.likeliest] == pytest.approx(values.tolist(), abs=1e-9)
