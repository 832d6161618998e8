"""The tokenizer: ids and text, files, conversations, and the two scripts that make and measure it."""

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import rustbpe
import safetensors.torch
import tiktoken
import torch

from dev import bench_split
from nanochat import dataset
from nanochat.common import UserError
from nanochat.tokenizer import (
    MAX_BLANKS,
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    SPLIT_PATTERNS,
    RustBPETokenizer,
    get_token_bytes,
    get_tokenizer,
)
from scripts import tok_eval, tok_train
from tests.helpers import BYTE_TOKENIZER, REPO_DIR, run_to_end

TABLES = REPO_DIR.parent / "shared" / "data" / "tokenizers"
VOCAB_SIZE = 600
needs_tables = pytest.mark.skipif(not TABLES.is_dir(), reason=f"the published tables are not in {TABLES}")


def read_sources() -> list[str]:
    """Some real text that is always there: this repository's own code."""
    names = ("nanochat/common.py", "nanochat/tokenizer.py", "scripts/tok_eval.py", "tests/test_tokenizer.py")
    return [(REPO_DIR / name).read_text(encoding="utf-8") for name in names]


@pytest.fixture(scope="session")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(read_sources(), VOCAB_SIZE)


@pytest.fixture
def base_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def data_dir(base_dir) -> Path:
    folder = base_dir / "data" / "tiny"
    folder.mkdir(parents=True)
    texts = read_sources()
    dataset.Manifest("files", {}, "", dataset.write_shards(folder, texts[:-1]),
                     dataset.write_shard(folder / "val.parquet", iter(texts[-1:]))).save(folder)
    return folder


def make_random_texts(num_texts: int, seed: int = 0) -> list[str]:
    """Texts that mix scripts, blanks, digits, emoji, combining marks and what the split pattern treats specially."""
    rng = random.Random(seed)
    awkward = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u0085", "\u2028", "\u200b", "'", "'s", "'LL", "'ſ",
               "ß", "ﬆ", "İ", "e\u0301", "é", "中文", "한국어", "٣", "²", "123", "\x00", "\x1c", "_",
               "...", "don't", "👩‍👩‍👧", "🇰🇷"]

    def draw() -> str:
        if rng.random() < 0.7:
            return rng.choice(awkward)
        code = rng.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)     # leaves out the surrogates, which are not text

    return ["".join(draw() for _ in range(rng.randrange(1, 60))) for _ in range(num_texts)]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_round_trip_of_random_unicode(tokenizer):
    token_bytes = tokenizer.count_token_bytes()
    for text in [*make_random_texts(500), ""]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert int(token_bytes[ids].sum()) == len(text.encode())
        assert max(ids, default=0) < VOCAB_SIZE - len(SPECIAL_TOKENS)


def test_special_tokens_in_text_are_text(tokenizer):
    for name in SPECIAL_TOKENS:
        ids = tokenizer.encode(f"a{name}b")
        assert tokenizer.encode_special(name) not in ids
        assert tokenizer.decode(ids) == f"a{name}b"


def test_special_tokens_come_last_in_order(tokenizer):
    ids = [tokenizer.encode_special(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(VOCAB_SIZE - len(SPECIAL_TOKENS), VOCAB_SIZE))
    assert [tokenizer.decode([token_id]) for token_id in ids] == list(SPECIAL_TOKENS)
    assert tokenizer.get_special_tokens() == dict(zip(SPECIAL_TOKENS, ids, strict=True))
    assert (tokenizer.get_vocab_size(), tokenizer.get_bos_token_id()) == (VOCAB_SIZE, ids[0])
    with pytest.raises(ValueError, match="no special token <|nope|>"):
        tokenizer.encode_special("<|nope|>")


@pytest.mark.parametrize("num_threads", [1, 4])
def test_encode_many_with_bos(tokenizer, num_threads):
    texts = make_random_texts(50)
    bos, end = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|assistant_end|>")
    rows = tokenizer.encode(texts, prepend=bos, append="<|assistant_end|>", num_threads=num_threads)
    assert rows == [[bos, *tokenizer.encode(text), end] for text in texts]
    assert tokenizer.encode("x", prepend="<|bos|>") == [bos, *tokenizer.encode("x")]
    assert tokenizer.encode([]) == []


def test_threads_may_encode_at_once(tokenizer):
    texts = make_random_texts(40)
    expected = tokenizer.encode(texts, num_threads=1)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: tokenizer.encode(texts, num_threads=2), range(16)))
    assert all(result == expected for result in results)


def test_numbers_are_cut_into_pairs(tokenizer):
    pieces = tokenizer.encode("1234567")
    assert all(len(tokenizer.decode([token_id])) <= 2 for token_id in pieces)
    trained = RustBPETokenizer.train_from_iterator(["12345678 " * 50], MIN_VOCAB_SIZE + 3)
    assert all(len(token) <= 2 for token in trained.ranks if token.isdigit())


@pytest.mark.parametrize("name", ["nanochat", "marks", "llama3"])
@pytest.mark.parametrize("text", [" " * 2_500_000, "x" + "\t " * 700_000, "\n" + " " * 1_200_000 + "\nx",
                                  "a" * 1_000_000, "e\u0301" * 500_000, "?" * 1_000_000],
                         ids=["blanks", "mixed blanks", "blank line", "letters", "marks", "signs"])
def test_endless_runs_do_not_overflow_the_regex(text, name):
    tokenizer = RustBPETokenizer(SPLIT_PATTERNS[name], BYTE_TOKENIZER.ranks, BYTE_TOKENIZER.special_tokens)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    [row] = tokenizer.encode([text], prepend="<|bos|>")
    assert len(row) == 1 + len(tokenizer.encode(text))


def test_endless_blanks_do_not_stop_the_training():
    texts = ["abab " * 100, " " * 12 * MAX_BLANKS]
    assert RustBPETokenizer.train_from_iterator(texts, MIN_VOCAB_SIZE).get_vocab_size() == MIN_VOCAB_SIZE


# ---------------------------------------------------------------------------------------------------------------------
# Split patterns


# What the patterns of other engines must be, to the letter: as the models' tokenizer.json files have them
PUBLISHED_PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
             r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+"}

HARD_TEXT = ("नमस्ते दुनिया, क्‍ष श्री।\n\nสวัสดีครับ ผมชื่ออเล็กซ์\r\n\r\n  السَّلَامُ عَلَيْكُمْ שָׁלוֹם עֲלֵיכֶם "
             "e\u0301te\u0301 \u0301\u0301 1\u0301a \u0301a 한국어 \u1112\u1161\u11ab 👩‍👩‍👧 ❤️abc 1️⃣2️⃣ 🇰🇷 12345678 "
             "٣٤٥ ²³ I'LL it's 'S 'ſ don’t x\t\t y  \u00a0\u3000 z\r\n\n\r   \n!?\n...\r\na_b = {'a': 1}  \n\n  ")


def name_blocks() -> str:
    """Every seventh character of the blocks that hold marks, within a word, at its end and at its start."""
    codes = [*range(0xD800), *range(0xE000, 0x12000), *range(0x16A00, 0x17000), *range(0x1CF00, 0x1F000),
             *range(0xE0000, 0xE0200)]
    return "".join(f"x{c}y{c}{c} {c}\n" for c in map(chr, codes[::7]))


@pytest.mark.parametrize("name", SPLIT_PATTERNS)
def test_all_engines_split_alike(name):
    """Training (rustbpe), encoding (tiktoken), and Hugging Face's library; Unicode's versions in them included."""
    tokenizers = pytest.importorskip("tokenizers")
    pattern, text = SPLIT_PATTERNS[name], HARD_TEXT + "".join(make_random_texts(300, seed=2)) + name_blocks()
    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    pieces = [piece.encode() for piece, _ in splitter.pre_tokenize_str(text)]
    assert b"".join(pieces) == text.encode()
    trainer = rustbpe.Tokenizer()   # learns until each of its pieces is one token, so that ids show how it splits
    trainer.train_from_iterator(iter([text, text]), 2**21, pattern=pattern)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    ids = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(text)
    tokens = list(ranks)
    assert [tokens[token_id] for token_id in ids] == pieces
    assert trainer.encode(text) == ids


def split(name: str, text: str) -> list[str]:
    """The pieces that a pattern cuts a text into: the tokens of a vocabulary that has each of them."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter([text, text]), 2**20, pattern=SPLIT_PATTERNS[name])
    return [bytes(trainer.get_mergeable_ranks()[token_id][0]).decode() for token_id in trainer.encode(text)]


def test_marks_stay_with_their_letters():
    text = "नमस्ते दुनिया"
    assert split("nanochat", text) == ["नमस", "्त", "े", " द", "ुन", "िय", "ा"]
    assert split("marks", text) == split("qwen35", text) == ["नमस्ते", " दुनिया"]
    assert split("marks", "e\u0301te\u0301 שָׁלוֹם สวัสดี") == ["e\u0301te\u0301", " שָׁלוֹם", " สวัสดี"]
    # a mark without a letter before it, and what emoji are made of, are as in the pattern without marks
    for other in ("1\u0301a", "\u0301\u0301", "❤️abc 1️⃣", "(\u0301)", "👩‍👩‍👧"):
        assert split("marks", other) == split("nanochat", other), other


def test_digits_of_a_token():
    assert {name: split(name, "1234567")[0] for name in SPLIT_PATTERNS} == \
        {"nanochat": "12", "marks": "12", "llama3": "123", "qwen2": "1", "qwen35": "1"}


def test_patterns_that_others_know_by_name():
    assert {name: SPLIT_PATTERNS[name] for name in PUBLISHED_PATTERNS} == PUBLISHED_PATTERNS
    assert SPLIT_PATTERNS["nanochat"] == SPLIT_PATTERN


@pytest.mark.parametrize(("language", "gain"), [("Hindi", 1.5), ("Thai", 1.1), ("Hebrew with points", 1.5),
                                                ("Arabic", 1), ("Korean", 1), ("English", 1)])
def test_characters_per_token_with_marks_kept(language, gain):
    texts, held_out = (bench_split.make_text(language, 20_000, seed) for seed in range(2))
    num_tokens = {name: sum(map(len, bench_split.learn(texts, 1024, SPLIT_PATTERNS[name]).encode(held_out)))
                  for name in ("nanochat", "marks")}
    ratio = num_tokens["nanochat"] / num_tokens["marks"]
    assert ratio > gain if gain > 1 else ratio == 1     # text without marks is encoded as before


# ---------------------------------------------------------------------------------------------------------------------
# Training and files


def test_training_is_deterministic(tokenizer):
    again = RustBPETokenizer.train_from_iterator(iter(read_sources()), VOCAB_SIZE)
    assert again.hash == tokenizer.hash
    assert again.ranks == tokenizer.ranks


def test_vocabulary_too_small():
    with pytest.raises(UserError, match=f"ask for {MIN_VOCAB_SIZE} or more"):
        RustBPETokenizer.train_from_iterator(["abab"], MIN_VOCAB_SIZE - 1)


def test_text_too_short_for_the_vocabulary():
    with pytest.raises(UserError, match="too short for a vocabulary of 1000 tokens"):
        RustBPETokenizer.train_from_iterator(["just a few words"], 1000)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = RustBPETokenizer.from_directory(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["token_bytes.safetensors", "tokenizer.json"]
    assert (loaded.ranks, loaded.special_tokens, loaded.pattern) == \
        (tokenizer.ranks, tokenizer.special_tokens, SPLIT_PATTERN)
    assert loaded.encode(make_random_texts(50)) == tokenizer.encode(make_random_texts(50))


def test_hash_names_the_content_not_the_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    content["model"]["merges"] = [merge.split(" ") for merge in content["model"]["merges"]]
    path.write_text(json.dumps(content))
    assert RustBPETokenizer.from_directory(tmp_path).hash == tokenizer.hash
    assert len(tokenizer.hash) == 16
    specials = {f"{name}x" if name == "<|user_end|>" else name: i for name, i in tokenizer.special_tokens.items()}
    others = [RustBPETokenizer(SPLIT_PATTERN.replace("{1,2}", "{1,3}"), tokenizer.ranks, tokenizer.special_tokens),
              RustBPETokenizer(SPLIT_PATTERN, tokenizer.ranks, specials),
              RustBPETokenizer.train_from_iterator(read_sources()[:2], VOCAB_SIZE)]
    assert len({tokenizer.hash, *(other.hash for other in others)}) == 4


def test_tokenizers_on_disk_keep_their_hash():
    """Checkpoints name the tokenizer by its hash: one that changes with the code would refuse them all."""
    assert BYTE_TOKENIZER.hash == "54adc86c891312d4"


def drop_last_merge(content: dict) -> None:
    content["model"]["merges"].pop()


def swap_two_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[3], merges[200] = merges[200], merges[3]


def shift_specials(content: dict) -> None:
    for token in content["added_tokens"]:
        token["id"] -= 1


def lowercase(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def spell_wrongly(content: dict) -> None:
    content["model"]["vocab"]["a b"] = content["model"]["vocab"].pop("a")


def break_pattern(content: dict) -> None:
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(unclosed"


def drop_model(content: dict) -> None:
    del content["model"]


def drop_specials(content: dict) -> None:
    content["added_tokens"] = []


@pytest.mark.parametrize("damage", [drop_last_merge, swap_two_merges, shift_specials, lowercase, spell_wrongly,
                                    break_pattern, drop_model, drop_specials])
def test_incompatible_file(tokenizer, tmp_path, damage):
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="damaged or not byte-level BPE"):
        RustBPETokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE", "vocab": {'])
def test_damaged_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        RustBPETokenizer.from_directory(tmp_path)


def test_absent_tokenizer(base_dir):
    with pytest.raises(UserError, match="scripts.tok_train --name mine"):
        get_tokenizer("mine")
    with pytest.raises(UserError, match="can't name a tokenizer"):
        get_tokenizer("../elsewhere")
    for name in ("x" * 300, "mine.lock"):
        with pytest.raises(UserError, match="must be a plain folder name"):
            get_tokenizer(name)


def test_token_bytes(tokenizer, base_dir):
    folder = base_dir / "tokenizer" / "default"
    tokenizer.save(folder)
    token_bytes = get_token_bytes()
    assert (token_bytes.dtype, token_bytes.shape) == (torch.int32, (VOCAB_SIZE,))
    assert token_bytes[-len(SPECIAL_TOKENS):].eq(0).all()
    assert token_bytes[:-len(SPECIAL_TOKENS)].tolist() == \
        [len(tokenizer.decode_bytes([token_id])) for token_id in range(VOCAB_SIZE - len(SPECIAL_TOKENS))]
    assert get_tokenizer().hash == tokenizer.hash

    saved = safetensors.torch.load_file(folder / "token_bytes.safetensors")
    assert saved["token_bytes"].equal(token_bytes)


def test_hugging_face_reads_the_file_and_gives_the_same_ids(tokenizer, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True     # as text, which is what ours always does
    for text in [*make_random_texts(1500, seed=1), *read_sources(), "".join(map(chr, range(0x3000)))]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text
    assert [theirs.token_to_id(name) for name in SPECIAL_TOKENS] == list(tokenizer.special_tokens.values())
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert RustBPETokenizer.from_directory(tmp_path).hash == tokenizer.hash


# ---------------------------------------------------------------------------------------------------------------------
# Published vocabularies


@needs_tables
@pytest.mark.parametrize(("name", "vocab_size"), [("gpt2", 50257), ("cl100k_base", 100277)])
def test_published_tables_equal_tiktoken(name, vocab_size, tmp_path, monkeypatch):
    # tiktoken's own loader, from a cache that holds the same files, so that it needs no network
    for file_name, cache_name in (("gpt2_vocab.bpe", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
                                  ("gpt2_encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
                                  ("cl100k_base.tiktoken", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4")):
        shutil.copyfile(TABLES / file_name, tmp_path / cache_name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    theirs = tiktoken.get_encoding(name)
    ours = RustBPETokenizer.from_pretrained(name, TABLES)
    assert (ours.get_vocab_size(), ours.get_bos_token_id()) == (vocab_size, theirs.eot_token)
    for text in [*make_random_texts(300), *read_sources()]:
        assert ours.encode(text) == theirs.encode_ordinary(text)
    cached = RustBPETokenizer.from_pretrained(name, tmp_path)
    assert (cached.ranks, cached.special_tokens) == (ours.ranks, ours.special_tokens)


@needs_tables
def test_published_vocabulary_in_hugging_face_format(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    ours = RustBPETokenizer.from_pretrained("cl100k_base", TABLES)
    ours.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True     # as text, which is what ours always does
    assert all(theirs.encode(text).ids == ours.encode(text) for text in [*make_random_texts(300), *read_sources()])
    assert RustBPETokenizer.from_directory(tmp_path).hash == ours.hash


def test_published_tables_absent_or_damaged(tmp_path):
    with pytest.raises(UserError, match="there is no cl100k_base.tiktoken"):
        RustBPETokenizer.from_pretrained("cl100k_base", tmp_path)
    for name, file_name in (("cl100k_base", "cl100k_base.tiktoken"), ("gpt2", "gpt2_encoder.json")):
        (tmp_path / file_name).write_text("IQ== 0\nIg==")
        with pytest.raises(UserError, match="damaged"):
            RustBPETokenizer.from_pretrained(name, tmp_path)
    with pytest.raises(UserError, match="choose one of"):
        RustBPETokenizer.from_pretrained("gpt9", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


CONVERSATION = {"messages": [
    {"role": "system", "content": "Be brief."}, user("What is 6*7?"),
    assistant([{"type": "text", "text": "Let me see: "}, {"type": "python", "text": "6*7"},
               {"type": "python_output", "text": "42"}, {"type": "text", "text": "It's 42."}]),
    user("Thanks <|bos|>"), assistant("Any time.")]}


def test_rendering_supervises_only_what_the_assistant_writes(tokenizer):
    expected = [("<|bos|>", 0),
                ("<|user_start|>", 0), ("Be brief.\n\nWhat is 6*7?", 0), ("<|user_end|>", 0),
                ("<|assistant_start|>", 0), ("Let me see: ", 1),
                ("<|python_start|>", 1), ("6*7", 1), ("<|python_end|>", 1),
                ("<|output_start|>", 0), ("42", 0), ("<|output_end|>", 0),
                ("It's 42.", 1), ("<|assistant_end|>", 1),
                ("<|user_start|>", 0), ("Thanks <|bos|>", 0), ("<|user_end|>", 0),
                ("<|assistant_start|>", 0), ("Any time.", 1), ("<|assistant_end|>", 1)]
    expected_ids, expected_mask = [], []
    for text, supervised in expected:
        new_ids = [tokenizer.encode_special(text)] if text in SPECIAL_TOKENS else tokenizer.encode(text)
        expected_ids += new_ids
        expected_mask += [supervised] * len(new_ids)
    before = json.dumps(CONVERSATION)
    assert tokenizer.render_conversation(CONVERSATION) == (expected_ids, expected_mask)
    assert json.dumps(CONVERSATION) == before


def test_rendering_is_cut_to_max_tokens(tokenizer):
    ids, mask = tokenizer.render_conversation(CONVERSATION, max_tokens=None)
    for max_tokens in (1, 20, len(ids), len(ids) + 1):
        assert tokenizer.render_conversation(CONVERSATION, max_tokens) == (ids[:max_tokens], mask[:max_tokens])
    long = {"messages": [user("q"), assistant("word " * 5000)]}
    assert [len(part) for part in tokenizer.render_conversation(long)] == [2048, 2048]


def test_prompt_for_completion(tokenizer):
    ids, _ = tokenizer.render_conversation(CONVERSATION)
    prompt = tokenizer.render_for_completion(CONVERSATION)
    assert prompt == ids[:len(prompt)]
    assert prompt[-1] == tokenizer.encode_special("<|assistant_start|>")
    assert tokenizer.render_for_completion({"messages": CONVERSATION["messages"][:-1]}) == prompt
    long = tokenizer.render_for_completion({"messages": [user("word " * 5000)]})
    assert len(long) > 2048 and long[-1] == prompt[-1]      # a prompt is never cut


@pytest.mark.parametrize(("conversation", "reason"), [
    ([], "a conversation is"),
    ({}, "a conversation is"),
    ({"messages": []}, "at least one message"),
    ({"messages": ["hi"]}, "message 0 is not"),
    ({"messages": [user("a"), {"role": "assistant"}]}, "message 1 is not"),
    ({"messages": [user("a"), {"role": "robot", "content": "b"}]}, "message 1 has role 'robot'"),
    ({"messages": [user(None)]}, "message 0 is empty"),
    ({"messages": [user("a"), assistant(["b"])]}, "message 1 has a part in its content"),
    ({"messages": [user("a"), assistant([{"type": "image", "text": "b"}])]}, "message 1 has a part of type 'image'"),
    ({"messages": [user("a"), assistant([{"type": "python", "text": 42}])]}, "message 1 has a python part"),
])
def test_bad_conversation(tokenizer, conversation, reason):
    for render in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(ValueError, match=reason):
            render(conversation)


# ---------------------------------------------------------------------------------------------------------------------
# Scripts


def test_tok_train_makes_skips_and_replaces(data_dir, capsys):
    flags = ["--data", "tiny", "--vocab-size", "400"]
    training = tok_train.main(flags)
    assert get_tokenizer().hash == training["tokenizer_hash"]
    assert (get_tokenizer().get_vocab_size(), training["num_documents"]) == (400, 3)
    assert get_token_bytes().shape == (400,)
    folder = data_dir.parents[1] / "tokenizer" / "default"
    modified_ns = (folder / "tokenizer.json").stat().st_mtime_ns

    assert tok_train.main(flags) == training
    assert "there already" in capsys.readouterr().out
    assert (folder / "tokenizer.json").stat().st_mtime_ns == modified_ns

    others = ["--data", "tiny", "--vocab-size", "410"]
    with pytest.raises(UserError, match="vocab_size 400, not 410.*--force"):
        tok_train.main(others)
    assert get_tokenizer().get_vocab_size() == 400
    tok_train.main([*others, "--force"])
    assert get_tokenizer().get_vocab_size() == 410
    assert {path.name for path in folder.parent.iterdir()} <= {"default", "default.lock"}


def test_tok_train_never_takes_a_changed_tokenizer_for_its_own(data_dir, tokenizer):
    flags = ["--data", "tiny", "--vocab-size", "400"]
    tok_train.main(flags)
    folder = data_dir.parents[1] / "tokenizer" / "default"
    tokenizer.save(folder)
    with pytest.raises(UserError, match="isn't the one of its training.json"):
        tok_train.main(flags)
    (folder / "training.json").unlink()
    with pytest.raises(UserError, match="no readable training.json"):
        tok_train.main(flags)


@pytest.mark.parametrize("name", ["marks", "llama3"])
def test_tok_train_split_pattern(data_dir, name, capsys):
    flags = ["--data", "tiny", "--vocab-size", "400", "--split-pattern"]
    training = tok_train.main([*flags, name])
    tokenizer = get_tokenizer()
    assert tokenizer.pattern == SPLIT_PATTERNS[name] and tokenizer.hash == training["tokenizer_hash"]
    assert training["made_from"]["split_pattern"] == name
    assert tokenizer.hash != RustBPETokenizer(SPLIT_PATTERN, tokenizer.ranks, tokenizer.special_tokens).hash
    assert tok_train.main([*flags, name]) == training
    with pytest.raises(UserError, match=f"split_pattern {name}, not nanochat"):
        tok_train.main(flags[:-1])
    with pytest.raises(SystemExit):
        tok_train.main([*flags, "other"])
    assert "nanochat" in capsys.readouterr().err


def test_tok_train_keeps_a_tokenizer_of_before_the_choice_of_pattern(data_dir):
    flags = ["--data", "tiny", "--vocab-size", "400"]
    training = tok_train.main(flags)
    path = data_dir.parents[1] / "tokenizer" / "default" / "training.json"
    del training["made_from"]["split_pattern"]
    path.write_text(json.dumps(training))
    assert tok_train.main(flags)["made_from"]["split_pattern"] == "nanochat"
    with pytest.raises(UserError, match="split_pattern nanochat, not marks"):
        tok_train.main([*flags, "--split-pattern", "marks"])


def test_tok_train_keeps_a_tokenizer_of_all_the_text(data_dir):
    """A limit beyond the text changes nothing; one within it does."""
    flags = ["--data", "tiny", "--vocab-size", "400", "--max-chars"]
    training = tok_train.main([*flags, "2000000000"])
    assert tok_train.main([*flags, "100000000"]) == training
    with pytest.raises(UserError, match="max_chars 2000000000, not 5000"):
        tok_train.main([*flags, "5000"])


def test_tok_train_recovers_what_a_crash_moved_aside(data_dir):
    flags = ["--data", "tiny", "--vocab-size", "400"]
    training = tok_train.main(flags)
    folder = data_dir.parents[1] / "tokenizer" / "default"
    folder.rename(folder.with_name(".default.old"))
    assert tok_train.main(flags) == training


def test_tok_train_failure_leaves_the_old_tokenizer(data_dir):
    tok_train.main(["--data", "tiny", "--vocab-size", "400"])
    with pytest.raises(UserError, match="too short"):
        tok_train.main(["--data", "tiny", "--vocab-size", "9000", "--max-chars", "500", "--force"])
    assert get_tokenizer().get_vocab_size() == 400


def test_take_texts_caps_documents_and_total(capsys):
    counter = tok_train.TextCounter()
    documents = iter(["a" * 10, "b" * 3, "c" * 10, "d"])
    texts = list(tok_train.take_texts(documents, max_chars=10, doc_cap=4, counter=counter))
    assert texts == ["aaaa", "bbb", "ccc"]
    assert (counter.documents, counter.chars) == (3, 10)
    assert "read 3 documents, 10 characters" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--max-chars", "0"], ["--doc-cap", "-1"], ["--vocab-size", "256"],
                                   ["--name", "a/b"]])
def test_tok_train_bad_flags(data_dir, flags):
    with pytest.raises(UserError, match=flags[1]):
        tok_train.main(["--data", "tiny", *flags])


def test_tok_eval_without_tables(data_dir, tmp_path, capsys):
    tok_train.main(["--data", "tiny", "--vocab-size", "400"])
    result = tok_eval.main(["--tables", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("not compared with") == 2
    assert set(result["domains"]) == {"news", "code", "maths", "Korean", "Hindi", "Thai", "science", "train", "val"}
    hindi = result["domains"]["Hindi"]
    assert 2.5 < hindi["num_bytes"] / hindi["num_chars"] < 3    # three bytes a letter: bytes per token flatter it
    ours = hindi["tokenizers"]["ours"]
    assert ours["chars_per_token"] == hindi["num_chars"] / ours["num_tokens"] < ours["bytes_per_token"]
    val = result["domains"]["val"]
    assert val["num_bytes"] == len(read_sources()[-1].encode())
    assert val["tokenizers"]["ours"]["num_tokens"] == len(get_tokenizer().encode(read_sources()[-1]))
    assert json.loads((data_dir.parents[1] / "tokenizer" / "default" / "tok_eval.json").read_text()) == result


def test_tok_eval_without_data(tokenizer, base_dir, tmp_path, capsys):
    tokenizer.save(base_dir / "tokenizer" / "default")
    result = tok_eval.main(["--tables", str(tmp_path)])
    assert set(result["domains"]) == {"news", "code", "maths", "Korean", "Hindi", "Thai", "science"}
    assert "name another with --data" in capsys.readouterr().out
    data = {"data_folder": str(tmp_path / "moved away")}
    (base_dir / "tokenizer" / "default" / "training.json").write_text(json.dumps(data))
    assert tok_eval.main(["--tables", str(tmp_path)]) == result


@needs_tables
def test_tok_eval_against_published_tables(data_dir, capsys):
    tok_train.main(["--data", "tiny", "--vocab-size", "400"])
    capsys.readouterr()
    result = tok_eval.main(["--tables", str(TABLES), "--max-chars", "2000"])
    assert result["vocab_sizes"] == {"ours": 400, "GPT-2": 50257, "GPT-4": 100277}
    for domain in result["domains"].values():
        counts = {label: values["num_tokens"] for label, values in domain["tokenizers"].items()}
        assert counts["ours"] > counts["GPT-4"]     # 400 tokens can't compress as 100,277 do
    table = [line for line in capsys.readouterr().out.splitlines() if line.count("|") == 3]
    assert len(table) == 10 and len({len(line) for line in table}) == 1


@pytest.mark.parametrize(("script", "reason"), [("tok_train", "there is no data"),
                                                ("tok_eval", "there is no tokenizer")])
def test_scripts_end_with_one_sentence_and_code_2(base_dir, script, reason):
    done = run_to_end(f"scripts.{script}")
    assert done.returncode == 2
    assert reason in done.stderr and len(done.stderr.strip().splitlines()) == 1
