"""Conversations as rows: each supervised token is a target once, in an epoch that ends alike on any ranks."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from nanochat.common import Ranks, UserError
from nanochat.dataloader import ConversationGroups, Epoch, count_epoch, validation_conversations
from nanochat.packing import PackStats
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from tests.data_helpers import order_rows

ALONE, BOS = Ranks(), 0
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


class PlainTokenizer:
    """A conversation is given as its ids and mask, so that every token of a test can have an id of its own."""

    def get_bos_token_id(self):
        return BOS

    def render_conversation(self, conversation, max_tokens):
        if "error" in conversation:
            raise ValueError(conversation["error"])
        return conversation["ids"], conversation["mask"]


def make_conversations(num, seed=0, max_tokens=60):
    """Conversations whose ids are unique, but for bos; some turns learned, some not, some nothing at all."""
    rng, first, conversations = np.random.default_rng(seed), 1, []
    for i in range(num):
        size = int(rng.integers(1, max_tokens))
        mask = [0, *(rng.random(size).round() * (i % 7 > 0)).astype(int).tolist()]
        conversations.append({"ids": [BOS, *range(first, first + size)], "mask": mask})
        first += size
    return conversations


def make_groups(conversations, T=32, keep_whole=True):
    return ConversationGroups("toy", conversations, PlainTokenizer(), T, keep_whole=keep_whole)


def make_loader(groups, ranks=ALONE, **options):
    return order_rows(groups, ranks, {"num_lanes": 1, "rows_per_step": 12, "seed": 3, "num_epochs": 1} | options)


def read_steps(loader, num_steps):
    return [[(*inputs, *targets) for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)]
            for batch in (loader.next_step() for _ in range(num_steps))]


def list_pairs(batches):
    """(token before, target) of each place where something is to be learned."""
    return [(int(before), int(target)) for batch in batches
            for before, target in zip(batch.inputs.flatten(), batch.targets.flatten(), strict=True) if target >= 0]


@pytest.mark.parametrize("num", [1, 5, 1024, 2500])
def test_each_supervised_token_is_a_target_once(num):
    conversations, T = make_conversations(num), 32
    groups = make_groups(conversations, T)
    expected = [(c["ids"][i - 1], c["ids"][i]) for c in conversations for i in range(1, min(len(c["ids"]), T + 1))
                if c["mask"][i]]
    if not expected:
        with pytest.raises(UserError, match="nothing to learn in toy"):
            count_epoch(groups, ALONE)
        return
    epoch = count_epoch(groups, ALONE)
    loader = make_loader(groups)
    pairs = list_pairs(loader.next_step() for _ in range(-(-epoch.num_rows // 12)))
    assert sorted(pairs) == sorted(expected)
    assert loader.stats["epoch"] == loader.stats["repeated_groups"] == 0
    assert epoch.stats.num_docs == num and epoch.stats.in_tokens == sum(len(c["ids"]) for c in conversations)
    useful = [c for c in conversations if any(c["mask"][:T + 1])]
    assert epoch.stats.skipped_docs == num - len(useful)
    assert epoch.stats.cropped_docs == sum(len(c["ids"]) > T + 1 for c in useful)
    assert list_pairs([loader.next_step()]) == []       # past the end there is only padding


def test_two_epochs_hold_each_token_twice():
    groups = make_groups(make_conversations(1100))
    epoch = count_epoch(groups, ALONE)
    once = sorted(list_pairs([make_loader(groups, rows_per_step=epoch.num_rows).next_step()]))
    loader = make_loader(groups, num_epochs=2)
    twice = list_pairs(loader.next_step() for _ in range(-(-2 * epoch.num_rows // 12)))
    assert sorted(twice) == sorted(once * 2) and loader.stats["epoch"] == 1


def test_midtraining_crops_and_fills():
    conversations = make_conversations(2000)
    groups = make_groups(conversations, keep_whole=False)
    epoch = count_epoch(groups, ALONE)
    pairs = list_pairs([make_loader(groups, rows_per_step=epoch.num_rows).next_step()])
    targets = [target for _, target in pairs]
    assert len(targets) == len(set(targets))
    learned = {token for c in conversations for token, on in zip(c["ids"], c["mask"], strict=True) if on}
    assert set(targets) <= learned and len(targets) > 0.6 * len(learned)    # T 32 leaves much of 60 tokens behind
    assert epoch.stats.fractions()["pad_frac"] < 0.01


def test_any_ranks_see_the_same_rows_and_the_same_end():
    groups = make_groups(make_conversations(2100))
    num_steps = -(-count_epoch(groups, ALONE).num_rows // 12) + 1
    alone = read_steps(make_loader(groups), num_steps)
    for world_size in (2, 3, 4):
        parts = [read_steps(make_loader(groups, Ranks(rank, rank, world_size)), num_steps)
                 for rank in range(world_size)]
        assert [[parts[row % world_size][step][row // world_size] for row in range(12)]
                for step in range(num_steps)] == alone


@pytest.mark.parametrize("num_threads", [0, 2])
def test_resume_is_exact_up_to_the_end(num_threads):
    groups = make_groups(make_conversations(1300))
    num_steps = -(-count_epoch(groups, ALONE).num_rows // 40) + 1
    options = {"rows_per_step": 40, "num_threads": num_threads}
    with make_loader(groups, **options) as loader:
        states, rows = [], []
        for _ in range(num_steps):
            states.append(json.loads(json.dumps(loader.state_dict())))
            rows += read_steps(loader, 1)
    for step, state in enumerate(states):
        with make_loader(groups, state=state, **options) as resumed:
            assert read_steps(resumed, num_steps - step) == rows[step:]
            assert resumed.stats == loader.stats and resumed.state_dict() == loader.state_dict()
    with pytest.raises(UserError, match="belongs to supervise all, but this run has supervise assistant"):
        make_loader(groups, state=states[1] | {"supervise": "all"}, **options)     # an option of before


def test_ranks_count_their_shares_of_the_epoch():
    groups = make_groups(make_conversations(3000))
    shares = [count_epoch(groups, Ranks(rank, rank, 3)) for rank in range(3)]
    whole = count_epoch(groups, ALONE)
    assert sum(share.num_rows for share in shares) == whole.num_rows
    assert sum((share.stats for share in shares), PackStats()) == whole.stats
    assert Epoch.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_bad_conversation_and_empty_lists():
    conversations = [*make_conversations(3), {"error": "message 0 has role 'dog' where 'user' is due"}]
    with pytest.raises(UserError, match="a conversation of toy can.t be learned from: message 0 has role .dog.*error"):
        count_epoch(make_groups(conversations), ALONE)
    with pytest.raises(UserError, match="nothing to learn in toy"):
        count_epoch(make_groups([]), ALONE)
    assert validation_conversations("toy", [], PlainTokenizer(), 32, 8, ALONE) is None


def test_other_conversations_have_another_hash():
    conversations = make_conversations(2000)
    changed = [*conversations[:-1], {"ids": [BOS, 1], "mask": [0, 1]}]
    hashes = [make_groups(c).identity["data"] for c in (conversations, conversations[:-1], changed[::-1])]
    assert len(set(hashes)) == 3 and hashes[0] == make_groups(make_conversations(2000)).identity["data"]


def test_validation_counts_answers_only():
    conversations = make_conversations(300)
    batches = validation_conversations("toy", conversations, PlainTokenizer(), 32, 10, ALONE).cut(4)
    answers = {token for c in conversations for token, on in zip(c["ids"], c["mask"], strict=True) if on}
    pairs = list_pairs(batches)
    assert batches.num_rows == 10 and pairs and {target for _, target in pairs} <= answers
    assert "held-out conversations of toy" in batches.rule and "T 32, 10 rows" in batches.rule


@pytest.mark.skipif(not (SHARED / "sft").is_dir(), reason="the development data isn't beside this checkout")
def test_padding_of_real_conversations():
    with gzip.open(SHARED / "sft" / "chat_train.jsonl.gz") as file:
        conversations = [json.loads(line) for line in file][:6 * 1024]
    published = RustBPETokenizer.from_pretrained("gpt2", SHARED / "tokenizers")
    special_tokens = {name: 50257 + i for i, name in enumerate(SPECIAL_TOKENS)}
    tokenizer = RustBPETokenizer(published.pattern, published.ranks, special_tokens)
    groups = ConversationGroups("sft", conversations, tokenizer, 2048, keep_whole=True)
    stats = sum((groups.load_rows(i)[1] for i in range(len(groups))), PackStats())
    assert stats.num_docs == len(conversations) and stats.fractions()["pad_frac"] < 0.01
    assert stats.cropped_docs < 10
