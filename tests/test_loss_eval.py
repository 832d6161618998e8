"""Bits per byte against slow, obvious versions."""

import copy
import math
import random
from collections import Counter
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist

from nanochat.gpt import GPTConfig
from nanochat.loss_eval import compute_byte_bpb, evaluate_bpb, evaluate_loss
from nanochat.train import Batch
from tests.helpers import make_model, run_on_ranks

CONFIG = GPTConfig(sequence_len=16, vocab_size=100, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
SPECIAL_IDS = (90, 99)


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG, torch.float64)


def make_batches(num_batches=5, rows=3):
    rng = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(num_batches):
        ids = torch.randint(0, 100, (rows, 17), generator=rng)
        targets = ids[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=rng) < 0.2] = -1
        targets[0, 3], targets[1, 5:7] = SPECIAL_IDS[0], SPECIAL_IDS[1]
        batches.append(Batch(ids[:, :-1], targets, None))
    return batches


def make_token_bytes():
    token_bytes = torch.randint(1, 9, (100,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    token_bytes[list(SPECIAL_IDS)] = 0
    return token_bytes


@torch.no_grad()
def compute_slow(model, batches, token_bytes):
    """(nats, bytes, tokens), target by target."""
    nats, num_bytes, num_tokens = 0.0, 0, 0
    for batch in batches:
        log_probs = model(batch.inputs).log_softmax(-1)
        for row, row_targets in enumerate(batch.targets.tolist()):
            for place, target in enumerate(row_targets):
                if target >= 0 and target not in SPECIAL_IDS:
                    nats -= float(log_probs[row, place, target])
                    num_bytes += int(token_bytes[target])
                    num_tokens += 1
    return nats, num_bytes, num_tokens


def test_equals_a_slow_loop(model):
    batches, token_bytes = make_batches(), make_token_bytes()
    nats, num_bytes, num_tokens = compute_slow(model, batches, token_bytes)
    result = evaluate_loss(model, batches, token_bytes)
    assert (result.num_bytes, result.num_tokens) == (num_bytes, num_tokens)
    assert result.nats == pytest.approx(nats, rel=1e-9)
    assert result.bpb == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-9)
    assert evaluate_bpb(model, batches, None, token_bytes) == result.bpb


def test_the_cut_into_batches_does_not_matter(model):
    token_bytes, batches = make_token_bytes(), make_batches()
    whole = Batch(torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches]), None)
    results = [evaluate_loss(model, whole.split(rows), token_bytes) for rows in (15, 4, 1)]
    assert len({(r.num_bytes, r.num_tokens) for r in results}) == 1
    assert [r.nats for r in results[1:]] == pytest.approx([results[0].nats] * 2, rel=1e-9)


def test_specials_and_ignored_targets_do_not_count(model):
    batch, token_bytes = make_batches(1)[0], make_token_bytes()
    expected = evaluate_loss(model, [batch], token_bytes)
    specials = torch.isin(batch.targets, torch.tensor(SPECIAL_IDS))
    without = Batch(batch.inputs, batch.targets.masked_fill(specials, -1), None)
    assert specials.any() and evaluate_loss(model, [without], token_bytes) == expected
    nothing = Batch(batch.inputs, torch.full_like(batch.targets, -1), None)
    assert evaluate_loss(model, [batch, nothing], token_bytes) == expected
    empty = evaluate_loss(model, [nothing], token_bytes)
    assert (empty.nats, empty.num_bytes, empty.num_tokens) == (0, 0, 0) and math.isnan(empty.bpb)


@pytest.mark.parametrize("num_tokens, num_batches", [(48, 1), (95, 1), (96, 2), (239, 4), (240, 5), (10**9, 5)])
def test_num_tokens_is_rounded_down_to_whole_batches(model, num_tokens, num_batches):
    batches, token_bytes = make_batches(), make_token_bytes()  # of 3 x 16 tokens
    expected = evaluate_loss(model, batches[:num_batches], token_bytes)
    assert evaluate_loss(model, batches, token_bytes, num_tokens) == expected


def evaluate_share(num_tokens):
    """What a rank finds that has its share of each batch."""
    rows = slice(dist.get_rank(), None, dist.get_world_size())
    batches = [batch.map(lambda tensor: tensor[rows]) for batch in make_batches(rows=4)]
    return asdict(evaluate_loss(make_model(CONFIG, torch.float64), batches, make_token_bytes(), num_tokens))


def test_all_ranks_find_the_loss_of_all_rows(model, tmp_path):
    """And stop together, after as many tokens of all of them."""
    limits = (None, 130)    # the second has room for two of the five batches of 4 x 16 tokens
    results = run_on_ranks([(2, evaluate_share, (limit,)) for limit in limits], tmp_path)
    for limit, shares in zip(limits, results, strict=True):
        expected = evaluate_loss(model, make_batches(rows=4), make_token_bytes(), limit)
        for share in shares:
            assert (share["num_bytes"], share["num_tokens"]) == (expected.num_bytes, expected.num_tokens)
            assert share["nats"] == pytest.approx(expected.nats, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(model, training):
    model.train(training)
    evaluate_loss(model, make_batches(1), make_token_bytes())
    assert model.training == training and all(p.grad is None for p in model.parameters())


def test_uniform_model_gives_its_vocabulary(model):
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    one_byte_each = torch.ones(100, dtype=torch.int32)
    assert evaluate_bpb(uniform, make_batches(), None, one_byte_each) == pytest.approx(math.log2(100), rel=1e-9)


def compute_slow_byte_bpb(train_texts, val_texts):
    """Add-one smoothed byte models by their definitions; a text's first byte has the unigram's probability."""
    singles, pairs, befores = Counter(), Counter(), Counter()
    for data in (text.encode() for text in train_texts):
        singles.update(data)
        pairs.update(zip(data, data[1:], strict=False))
        befores.update(data[:-1])
    total, unigram_bits, bigram_bits, num_bytes = sum(singles.values()), 0.0, 0.0, 0
    for data in (text.encode() for text in val_texts):
        for place, byte in enumerate(data):
            bits = -math.log2((singles[byte] + 1) / (total + 256))
            unigram_bits += bits
            before = data[place - 1]
            bigram_bits += bits if place == 0 else -math.log2((pairs[before, byte] + 1) / (befores[before] + 256))
            num_bytes += 1
    return {"unigram_byte_bpb": unigram_bits / num_bytes, "bigram_byte_bpb": bigram_bits / num_bytes}


def test_byte_models_equal_slow_ones():
    rng = random.Random(0)
    texts = ["".join(rng.choices("aab cdé\n", k=rng.randrange(200))) for _ in range(60)]
    texts += ["", "x"]
    expected = compute_slow_byte_bpb(texts[:40], texts[40:])
    assert compute_byte_bpb(iter(texts[:40]), iter(texts[40:])) == pytest.approx(expected, rel=1e-9)


def test_byte_models_learn_what_they_can():
    alternating = ["ab" * 50_000]
    result = compute_byte_bpb(alternating, ["ab" * 1000])
    assert result["unigram_byte_bpb"] == pytest.approx(1, abs=0.02)  # a or b
    assert result["bigram_byte_bpb"] < 0.02                          # after a comes b
    assert compute_byte_bpb([], ["any text"]) == pytest.approx({"unigram_byte_bpb": 8, "bigram_byte_bpb": 8})
