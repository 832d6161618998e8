"""Text to token ids and back; conversations to one sequence of tokens.

Byte-level BPE: trained by rustbpe, run by tiktoken, kept in the file format of Hugging Face's tokenizers library.
"""

import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import safetensors.torch
import tiktoken
import torch

from nanochat.common import UserError, check_name, get_base_dir, write_atomic, write_json
from nanochat.conversations import (
    PARTS,
    SEPARATOR,
    Turn,
    get_parts,
    is_output,
    join_texts,
    parse_conversation,
    split_turns,
)

SPECIAL_TOKENS = ("<|bos|>",                                    # begins every document and every conversation
                  "<|user_start|>",      "<|user_end|>",
                  "<|assistant_start|>", "<|assistant_end|>",
                  "<|python_start|>",    "<|python_end|>",      # the assistant calls the interpreter
                  "<|output_start|>",    "<|output_end|>")      # what the interpreter answered

# How text is cut into pieces; no token spans two. Ours is GPT-4's pattern, but numbers are cut into one or two digits:
# three-digit tokens cost too much of a small vocabulary.
SPLIT_PATTERN = (r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"""
                 r"""|\s*[\r\n]|\s+(?!\S)|\s+""")
# As Qwen2's tokenizer.json has it; llama.cpp and others know this pattern and those made from it by their names.
QWEN2_PATTERN = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
                 r"""|\s*[\r\n]+|\s+(?!\S)|\s+""")
# Combining marks (\p{M}: vowel signs, tone marks, points) stand within the words of Hindi, Thai and other scripts of
# South and Southeast Asia; words of \p{L}+ end there. `python -m dev.bench_split` shows what that costs.
SPLIT_PATTERNS = {
    "nanochat": SPLIT_PATTERN,
    "marks":    SPLIT_PATTERN.replace(r"\p{L}+", r"\p{L}[\p{L}\p{M}]*"),      # ours, marks within words
    "llama3":   QWEN2_PATTERN.replace(r"\p{N}|", r"\p{N}{1,3}|"),
    "qwen2":    QWEN2_PATTERN,
    "qwen35":   QWEN2_PATTERN.replace(r"\p{L}+", r"[\p{L}\p{M}]+")            # Qwen2's, marks within words
                             .replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}"),
}

NUM_BYTES = 256
# The spelling of bytes in files since GPT-2: visible characters of Latin-1 as they are, the other bytes from U+0100 on.
VISIBLE_BYTES = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
BYTE_ALPHABET = "".join(chr(byte) if byte in VISIBLE_BYTES else chr(0x100 + byte - len(VISIBLE_BYTES & {*range(byte)}))
                        for byte in range(NUM_BYTES))
BYTES_BY_CHARACTER = {character: byte for byte, character in enumerate(BYTE_ALPHABET)}
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS) + 1     # one merge to learn
TRAIN_BUFFER_DOCUMENTS = 1024                            # texts that rustbpe holds at a time: bounds its memory

# A run of about a million blanks overflows the backtracking stack of both regex engines, which then panic.
MAX_BLANKS = 100_000
LONG_BLANKS = re.compile(rf"(?<!\s)\s{{{MAX_BLANKS + 1},}}")

# Published vocabularies: file, its name in tiktoken's cache, split pattern, special tokens.
PUBLISHED_TABLES = {
    "gpt2": ("gpt2_encoder.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
             r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
             {"<|endoftext|>": 50256}),
    "cl100k_base": ("cl100k_base.tiktoken", "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
                    SPLIT_PATTERN.replace("{1,2}", "{1,3}").replace(r"|\s*[\r\n]", r"|\s++$|\s*[\r\n]"),
                    {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259,
                     "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}),
}


class RustBPETokenizer:
    """A byte-level BPE vocabulary with its special tokens. Encoding is safe from several threads at once."""

    def __init__(self, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
        """ranks: the bytes of each ordinary token -> its id, which is also its order among the merges."""
        check_vocabulary(ranks, special_tokens)
        self.pattern, self.ranks, self.special_tokens = pattern, ranks, special_tokens
        self.bos_token = "<|bos|>" if "<|bos|>" in special_tokens else "<|endoftext|>"
        self.encoding = tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=special_tokens)

    @classmethod
    def train_from_iterator(cls, text_iterator: Iterable[str], vocab_size: int,
                            pattern: str = SPLIT_PATTERN) -> "RustBPETokenizer":
        """Learn a vocabulary of `vocab_size` tokens, specials included. Deterministic: a function of the texts.

        pattern: a regular expression; its matches, one after the other, are the pieces that merges stay within
        """
        import rustbpe  # here, so that a machine that only runs models needs no rustbpe
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(f"a vocabulary of {vocab_size} tokens is too small: {NUM_BYTES} bytes and "
                            f"{len(SPECIAL_TOKENS)} special tokens are always in it; ask for {MIN_VOCAB_SIZE} or more")
        trainer, pieces = rustbpe.Tokenizer(), (piece for text in text_iterator for piece in cut_blanks(text))
        trainer.train_from_iterator(pieces, vocab_size - len(SPECIAL_TOKENS), buffer_size=TRAIN_BUFFER_DOCUMENTS,
                                    pattern=pattern)
        ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
        if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
            raise UserError(f"the text is too short for a vocabulary of {vocab_size} tokens: it gives "
                            f"{len(ranks) + len(SPECIAL_TOKENS)}; train on more text or ask for a smaller vocabulary")
        return cls(pattern, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})

    @classmethod
    def from_directory(cls, directory: str | Path) -> "RustBPETokenizer":
        """Read `tokenizer.json` in `directory`; UserError if it is absent, damaged, or not byte-level BPE."""
        path = Path(directory) / "tokenizer.json"
        remedy = f"`python -m scripts.tok_train --name {path.parent.name}`"
        try:
            return cls(*parse_tokenizer_json(json.loads(path.read_text(encoding="utf-8"))))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"there is no tokenizer at {path}; make it with {remedy}") from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise UserError(f"{path} is damaged or not byte-level BPE as nanochat writes it ({reason}); "
                            f"make it again with {remedy} and --force") from None

    @classmethod
    def from_pretrained(cls, name: str, tables_dir: str | Path) -> "RustBPETokenizer":
        """A published vocabulary from its file in `tables_dir`, under its own name or that of tiktoken's cache."""
        if name not in PUBLISHED_TABLES:
            raise UserError(f"{name!r} is no published vocabulary; choose one of {', '.join(PUBLISHED_TABLES)}")
        file_name, cache_name, pattern, special_tokens = PUBLISHED_TABLES[name]
        path = Path(tables_dir, file_name) if Path(tables_dir, file_name).exists() else Path(tables_dir, cache_name)
        try:
            if file_name.endswith(".json"):
                vocab = json.loads(path.read_text(encoding="utf-8"))
                ranks = {unspell_bytes(token): rank for token, rank in vocab.items() if token not in special_tokens}
            else:
                lines = map(bytes.split, path.read_bytes().splitlines())
                ranks = {b64decode(token): int(rank) for token, rank in lines}
            return cls(pattern, ranks, special_tokens)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"there is no {file_name} in {tables_dir}; name a folder that holds it") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}); fetch it again") from None

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and, for other tools, `token_bytes.safetensors` into `directory`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "tokenizer.json", build_tokenizer_json(self.pattern, self.ranks, self.special_tokens))
        write_atomic(directory / "token_bytes.safetensors",
                     safetensors.torch.save({"token_bytes": self.count_token_bytes()}, {"tokenizer_hash": self.hash}))

    @cached_property
    def hash(self) -> str:
        """16 hex digits of the content: split pattern, tokens in order, specials; independent of the file format."""
        tokens = sorted((token_id, token.hex()) for token, token_id in self.ranks.items())
        specials = sorted((token_id, name) for name, token_id in self.special_tokens.items())
        return hashlib.sha256(json.dumps([self.pattern, tokens, specials]).encode()).hexdigest()[:16]

    def get_vocab_size(self) -> int:
        """One more than the largest id."""
        return self.encoding.n_vocab

    def get_special_tokens(self) -> dict[str, int]:
        """Name -> id of each special token."""
        return dict(self.special_tokens)

    def get_bos_token_id(self) -> int:
        """The id that begins every document."""
        return self.encode_special(self.bos_token)

    def encode_special(self, name: str) -> int:
        """The id of a special token."""
        if name not in self.special_tokens:
            raise ValueError(f"this tokenizer has no special token {name}; it has {', '.join(self.special_tokens)}")
        return self.special_tokens[name]

    def count_token_bytes(self) -> torch.Tensor:
        """(V,) int32: UTF-8 bytes of each token; 0 for specials and ids without a token."""
        counts = torch.zeros(self.get_vocab_size(), dtype=torch.int32)
        counts[list(self.ranks.values())] = torch.tensor([len(token) for token in self.ranks], dtype=torch.int32)
        return counts

    def encode(self, text: str | Sequence[str], prepend: int | str | None = None, append: int | str | None = None,
               num_threads: int = 8) -> list[int] | list[list[int]]:
        """Ids of one text, or a list of them for a list of texts; names of special tokens in a text are plain text.

        prepend, append: a special token (id or name) put before and after each text; bos for documents
        """
        texts = [text] if isinstance(text, str) else text
        if num_threads > 1 and len(texts) > 1:
            with ThreadPoolExecutor(num_threads) as pool:   # tiktoken works outside the interpreter's lock
                rows = list(pool.map(self._encode_one, texts))
        else:
            rows = list(map(self._encode_one, texts))
        before, after = ([self.encode_special(token) if isinstance(token, str) else token] if token is not None else []
                         for token in (prepend, append))
        rows = [before + row + after for row in rows] if before or after else rows
        return rows[0] if isinstance(text, str) else rows

    def _encode_one(self, text: str) -> list[int]:
        if len(text) <= MAX_BLANKS:
            return self.encoding.encode_ordinary(text)
        return [token_id for piece in cut_blanks(text) for token_id in self.encoding.encode_ordinary(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, specials by their names; bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode(ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The raw bytes of `ids`, which may end within a character."""
        return self.encoding.decode_bytes(ids)

    def render_conversation(self, conversation: dict, max_tokens: int | None = 2048) -> tuple[list[int], list[int]]:
        """One conversation as (ids, mask), cut to `max_tokens`; mask is 1 on what the assistant must learn to write.

        That is its text, its python calls and assistant_end, but not the output of a call: the interpreter writes that.
        conversation: {"messages": [...]}, see conversations.py; what is none raises ValueError
        """
        ids, mask = self.render_turns(*split_turns(parse_conversation(conversation)))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation: dict) -> list[int]:
        """The whole prompt for the next answer, ending in assistant_start, without the conversation's last answer."""
        messages = parse_conversation(conversation)
        if messages[-1]["role"] == "assistant" and not is_output(messages[-1]):
            messages = messages[:-1]
        return self.render_turns(*split_turns(messages), is_prompt=True)[0]

    def render_turns(self, system: str, turns: Sequence[Turn], is_prompt: bool = False) -> tuple[list[int], list[int]]:
        """(ids, mask) of turns, as conversations.split_turns gives them: the chat format, for training and serving.

        is_prompt: the last answer is left open, for the model to begin or continue it
        """
        special = self.encode_special
        ids, mask = [self.get_bos_token_id()], [0]

        def add(new_ids: list[int], learned: int) -> None:
            ids.extend(new_ids)
            mask.extend([learned] * len(new_ids))

        for turn in turns:
            if question := join_texts([system if turn is turns[0] else "", turn.question]):
                add([special("<|user_start|>"), *self.encode(question), special("<|user_end|>")], 0)
            is_open = is_prompt and turn is turns[-1]
            if not turn.answers and not is_open:
                continue
            add([special("<|assistant_start|>")], 0)
            learned, ends_in_text = 1, False
            for message in turn.answers if turn.tokens is None else ():
                learned, parts = message.get("weight", 1), get_parts(message)
                if ends_in_text and parts and parts[0]["type"] == "text":
                    add(self.encode(SEPARATOR), learned)
                for part in parts:
                    part_ids, (name, is_written) = self.encode(part["text"]), PARTS[part["type"]]
                    if name:
                        part_ids = [special(f"<|{name}_start|>"), *part_ids, special(f"<|{name}_end|>")]
                    add(part_ids, learned * is_written)
                    ends_in_text = part["type"] == "text" and bool(part["text"])
            add(turn.tokens or [], 0)
            if not is_open:
                add([special("<|assistant_end|>")], learned)
            elif ends_in_text:
                add(self.encode(SEPARATOR), 0)
        return ids, mask


def get_tokenizer_dir(name: str = "default") -> Path:
    """The folder of the tokenizer `name`, existing or not."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{name!r} can't name a tokenizer: use letters, digits, '.', '_' and '-', and no folder")
    check_name(name, "the tokenizer")
    return get_base_dir() / "tokenizer" / name


def get_tokenizer(name: str = "default") -> RustBPETokenizer:
    """The tokenizer that scripts.tok_train made under `name`."""
    return RustBPETokenizer.from_directory(get_tokenizer_dir(name))


def get_token_bytes(name: str = "default", device: str | torch.device = "cpu") -> torch.Tensor:
    """(V,) int32: UTF-8 bytes of each token of the tokenizer `name`, 0 for specials."""
    return get_tokenizer(name).count_token_bytes().to(device)


def cut_blanks(text: str) -> Iterator[str]:
    """`text` in pieces with at most MAX_BLANKS blanks in a row; nearly always one piece."""
    start = 0
    for blanks in LONG_BLANKS.finditer(text) if len(text) > MAX_BLANKS else ():
        for end in range(blanks.start() + MAX_BLANKS, blanks.end(), MAX_BLANKS):
            yield text[start:end]
            start = end
    yield text[start:]


def check_vocabulary(ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
    """Raise ValueError unless every text can be encoded and every id is one token."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError("the ids of the vocabulary are not 0, 1, 2, ...")
    if any(bytes([byte]) not in ranks for byte in range(NUM_BYTES)):
        raise ValueError("the vocabulary lacks some single bytes")
    special_ids = set(special_tokens.values())
    if len(special_ids) < len(special_tokens) or min(special_ids, default=0) < len(ranks):
        raise ValueError("there are no special tokens after the vocabulary, or two things share an id")
    if not {"<|bos|>", "<|endoftext|>"} & set(special_tokens):
        raise ValueError("no special token begins a document: neither <|bos|> nor <|endoftext|>")


def spell_bytes(token: bytes) -> str:
    """A token's spelling in files: each byte as its visible character of BYTE_ALPHABET."""
    return "".join(map(BYTE_ALPHABET.__getitem__, token))


def unspell_bytes(spelling: str) -> bytes:
    """The bytes of a token by its spelling in files."""
    if not BYTES_BY_CHARACTER.keys() >= set(spelling):
        raise ValueError(f"the token {spelling!r} is not spelled in the byte-level alphabet")
    return bytes(map(BYTES_BY_CHARACTER.__getitem__, spelling))


def find_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that merge into `token`: BPE of its bytes with the earlier merges alone leaves these two."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        _, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def build_tokenizer_json(pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> dict:
    """The vocabulary in the format of Hugging Face's tokenizers library, which gives the same ids."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    merges = [" ".join(map(spell_bytes, find_merge(token, ranks))) for token in tokens if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": token_id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for name, token_id in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {spell_bytes(token): ranks[token] for token in tokens}, "merges": merges},
    }


def parse_tokenizer_json(content: dict) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """Pattern, ranks and specials of `build_tokenizer_json`'s result; ValueError for what would give other ids."""
    model, pattern = content["model"], content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    ranks = {unspell_bytes(spelling): token_id for spelling, token_id in model["vocab"].items()}
    special_tokens, merged = {token["content"]: token["id"] for token in content["added_tokens"]}, []
    for merge in model["merges"]:
        left, right = map(unspell_bytes, merge.split(" ") if isinstance(merge, str) else merge)
        merged.append(ranks[left + right])
        if max(ranks[left], ranks[right]) >= merged[-1]:
            raise ValueError(f"the merge {merge!r} comes before its parts")
    if merged != sorted(rank for token, rank in ranks.items() if len(token) > 1):
        raise ValueError("the merges are not those of the vocabulary, in its order")
    same_settings = build_tokenizer_json(pattern, {}, special_tokens)
    for key in ("normalizer", "pre_tokenizer", "post_processor", "added_tokens"):
        if content[key] != same_settings[key]:
            raise ValueError(f"its {key} is not one that nanochat runs")
    return pattern, ranks, special_tokens
