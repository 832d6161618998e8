"""Train the tokenizer: a byte-level BPE vocabulary learned from text.

python -m nanochat.dataset --source python-docs && python -m scripts.tok_train --vocab-size 2048
python -m scripts.tok_train --data climbmix --max-chars 2000000000 --vocab-size 32768
python -m scripts.tok_train --data hindi --split-pattern marks     Hindi, Thai, ...: combining marks stay in their words
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, now, print0, replaced_folder, write_json
from nanochat.dataset import default_source
from nanochat.report import write_section
from nanochat.shards import iter_documents, load_shards, sole_writer
from nanochat.tokenizer import MIN_VOCAB_SIZE, SPLIT_PATTERNS, RustBPETokenizer, get_tokenizer_dir

PROGRESS_SECONDS = 5.0
DEFAULT_PATTERN = "nanochat"
MAX_VOCAB_SIZE = 2**24   # far above any in use, and what the trainer can count


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--data",
                        help="dataset by name, or a folder of shards (default: climbmix on a GPU, else python-docs)")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters to learn from")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters used of one document")
    parser.add_argument("--vocab-size", type=int, default=32768, help="tokens, specials included")
    parser.add_argument("--split-pattern", choices=SPLIT_PATTERNS, default=DEFAULT_PATTERN,
                        help="how text is cut into words, which no token spans; marks: as nanochat, but "
                             "combining marks stay with their letters, for Hindi, Thai, vocalised Arabic and the like; "
                             "llama3, qwen2, qwen35 (keeps marks too): what other engines know by these names")
    parser.add_argument("--name", default="default", help="folder under <base dir>/tokenizer")
    parser.add_argument("--force", action="store_true", help="replace a tokenizer that other text or settings made")
    args = parser.parse_args(argv)
    if not MIN_VOCAB_SIZE <= args.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size {args.vocab_size} is out of reach; ask for {MIN_VOCAB_SIZE} to "
                        f"{MAX_VOCAB_SIZE} tokens")
    for flag, value in (("--max-chars", args.max_chars), ("--doc-cap", args.doc_cap)):
        if value < 1:
            raise UserError(f"{flag} {value} leaves no text to learn from; give at least 1")
    return args


@dataclass
class TextCounter:
    """Text read so far."""
    documents: int = 0
    chars: int = 0


def take_texts(documents: Iterable[str], max_chars: int, doc_cap: int, counter: TextCounter) -> Iterator[str]:
    """The first `doc_cap` characters of each document, `max_chars` in all. Prints its progress."""
    start = last_print = time.perf_counter()
    for document in documents:
        text = document[:min(doc_cap, max_chars - counter.chars)]
        counter.documents += 1
        counter.chars += len(text)
        yield text
        now = time.perf_counter()
        is_done = counter.chars >= max_chars
        if is_done or now - last_print >= PROGRESS_SECONDS:
            print0(f"read {counter.documents:,} documents, {counter.chars:,} characters in {now - start:.1f} s")
            last_print = now
        if is_done:
            return
    print0(f"read all {counter.documents:,} documents, {counter.chars:,} characters; now learning the merges")


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    directory = get_tokenizer_dir(args.name)
    shards = load_shards(args.data or default_source())
    made_from = {"data_hash": shards.hash, "max_chars": args.max_chars, "doc_cap": args.doc_cap,
                 "vocab_size": args.vocab_size, "split_pattern": args.split_pattern}
    with sole_writer(directory):
        if directory.exists() and not args.force:
            training = keep_existing(directory, made_from)
            report_tokenizer(training, args.name, sys.argv if argv is None else argv)
            return training
        start = time.perf_counter()
        counter = TextCounter()
        print0(f"training a tokenizer of {args.vocab_size:,} tokens on {shards.name} ...")
        texts = take_texts(iter_documents(shards.train), args.max_chars, args.doc_cap, counter)
        tokenizer = RustBPETokenizer.train_from_iterator(texts, args.vocab_size, SPLIT_PATTERNS[args.split_pattern])
        training = {"tokenizer_hash": tokenizer.hash, "made_from": made_from, "data": shards.name,
                    "data_folder": str(shards.train[0].parent), "num_documents": counter.documents,
                    "num_chars": counter.chars, "train_seconds": round(time.perf_counter() - start, 2)}
        with replaced_folder(directory) as new:
            tokenizer.save(new)
            write_json(new / "training.json", training)
    report_tokenizer(training, args.name, sys.argv if argv is None else argv)
    print0(f"tokenizer {args.name!r} ({tokenizer.hash}) after {training['train_seconds']:.1f} s is in {directory}")
    return training


def report_tokenizer(training: dict, name: str, argv: list[str]) -> None:
    """Write the section of the report card."""
    write_section("tok_train", {
        "title": "Tokenizer: training", "created": now(), "argv": argv, "wall_sec": training["train_seconds"],
        "values": {"name": name, "vocabulary": training["made_from"]["vocab_size"],
                   "split pattern": training["made_from"]["split_pattern"], "data": training["data"],
                   "documents": training["num_documents"], "characters": training["num_chars"],
                   "hash": training["tokenizer_hash"]}})


def keep_existing(directory: Path, made_from: dict) -> dict:
    """The record of the existing tokenizer; UserError if other text or settings made it."""
    try:
        training = json.loads((directory / "training.json").read_text(encoding="utf-8"))
        training["made_from"].setdefault("split_pattern", DEFAULT_PATTERN)     # the only one when there was no choice
        limits = training["made_from"]["max_chars"], made_from["max_chars"]
        if training["num_chars"] < min(limits):    # all the text was read, by either limit
            made_from = made_from | {"max_chars": limits[0]}
        differences = [f"{key} {training['made_from'].get(key)}, not {value}" for key, value in made_from.items()
                       if training["made_from"].get(key) != value]
        differences += [] if RustBPETokenizer.from_directory(directory).hash == training["tokenizer_hash"] else \
            ["a tokenizer.json that isn't the one of its training.json"]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        differences = ["no readable training.json"]
    if differences:
        raise UserError(f"{directory} holds a tokenizer with {'; '.join(differences)}: "
                        "pass --force to replace it, or another --name to keep both")
    print0(f"tokenizer {directory.name!r} ({training['tokenizer_hash']}) is there already, trained on this text: done")
    return training


if __name__ == "__main__":
    run_script(main)
