"""What the split patterns of scripts.tok_train do to scripts with combining marks: characters per token, and speed.

    python -m dev.bench_split
    python -m dev.bench_split --vocab-size 512 --num-chars 50000 --rounds 1

The text is made here: words of random syllables as each script spells them, drawn by Zipf's law. Real text has more
words, so compare patterns, not languages. Characters per token are of as much text again, which the vocabulary wasn't
trained on; seconds are CPU time for all languages, the least of several rounds.
"""

import argparse
import itertools
import random
import time

import rustbpe

from dev.timing import print_rows
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError
from nanochat.scaling import check_counts
from nanochat.tokenizer import SPLIT_PATTERNS, RustBPETokenizer

NUM_WORDS = 4000
DOCUMENT_CHARS = 1000
ENGLISH, HEBREW, ARABIC = "bcdfghjklmnprstvwyz", "אבגדהוזחטיכלמנסעפצקרשת", "ابتثجحخدذرزسشصضطظعغفقكلمنهوي"
DEVANAGARI, MATRAS = "कखगघचछजझटठडढतथदधनपफबभमयरलवशषसह", ["", "", "ा", "ि", "ी", "ु", "ू", "े", "ै", "ो", "ौ"]
THAI, THAI_VOWELS = "กขคงจฉชซดตถทนบปผพฟมยรลวสหอ", ["", "ั", "า", "ิ", "ี", "ึ", "ื", "ุ", "ู", "่", "้", "ี่", "ิ้"]


def draw_syllable(language: str, rng: random.Random) -> str:
    """A syllable as the script spells it."""
    pick = rng.choice
    if language == "English":
        return pick(ENGLISH) + pick("aeiou") + pick(["", "", *"nrstl"])
    if language == "Hindi":     # consonants, joined by a virama, then a vowel sign
        return pick(DEVANAGARI) + ("्" + pick(DEVANAGARI) if rng.random() < 0.15 else "") + pick(MATRAS) + \
            ("ं" if rng.random() < 0.1 else "")
    if language == "Thai":      # vowels before, above, below or after; tone marks above
        return (pick("เแโใไ") if rng.random() < 0.2 else "") + pick(THAI) + pick(THAI_VOWELS) + pick(["", pick(THAI)])
    if language == "Korean":
        return chr(0xAC00 + rng.randrange(11_172))
    letters, marks = (HEBREW, "ְִֵֶַָֹֻ") if language.startswith("Hebrew") else (ARABIC, "ًٌٍَُِّْ")
    return pick(letters) + (pick(marks) if "with" in language else "")


# Everyday Arabic and Hebrew leave vowels out; scripture, poetry and schoolbooks write them.
LANGUAGES = ("Hindi", "Thai", "Arabic", "Arabic with vowels", "Hebrew", "Hebrew with points", "Korean", "English")


def make_text(language: str, num_chars: int, seed: int = 0) -> list[str]:
    """Documents of `num_chars` characters in all; the words are the same for each seed, their order is not."""
    rng = random.Random(language)
    lengths = (3, 6) if language.startswith(("Arabic", "Hebrew")) else (1, 3)
    words = ["".join(draw_syllable(language, rng) for _ in range(rng.randint(*lengths))) for _ in range(NUM_WORDS)]
    frequencies = [1 / (rank + 3) for rank in range(NUM_WORDS)]
    rng, documents, left = random.Random(seed), [], num_chars
    while left > 0:
        sentences = []
        for count in rng.choices(range(4, 12), k=DOCUMENT_CHARS // 20):
            between = "" if language == "Thai" else " "     # Thai has blanks between clauses only
            sentences.append(between.join(rng.choices(words, frequencies, k=count)))
        documents.append(rng.choice([". ", ", ", " "]).join(sentences)[:min(DOCUMENT_CHARS, left)])
        left -= len(documents[-1])
    return documents


def learn(texts: list[str], vocab_size: int, pattern: str) -> RustBPETokenizer:
    """At most `vocab_size` tokens; fewer where each piece of the text is a token already."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - 1, pattern=pattern)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return RustBPETokenizer(pattern, ranks, {"<|bos|>": len(ranks)})


def measure(texts: dict[str, list[str]], held_out: dict[str, list[str]], vocab_size: int, rounds: int) -> list[dict]:
    """A row for each split pattern; each language has a vocabulary of its own."""
    rows = [{"pattern": name, "train s": float("inf"), "encode s": float("inf")} for name in SPLIT_PATTERNS]
    for _, row in itertools.product(range(rounds), rows):
        pattern, train_sec, encode_sec = SPLIT_PATTERNS[row["pattern"]], 0.0, 0.0
        for language in texts:
            start = time.process_time()
            tokenizer = learn(texts[language], vocab_size, pattern)
            middle = time.process_time()
            num_tokens = sum(map(len, tokenizer.encode(held_out[language], num_threads=1)))
            train_sec, encode_sec = train_sec + middle - start, encode_sec + time.process_time() - middle
            row[language] = sum(map(len, held_out[language])) / num_tokens
        row |= {"train s": min(row["train s"], train_sec), "encode s": min(row["encode s"], encode_sec)}
    return rows


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of each language's vocabulary")
    parser.add_argument("--num-chars", type=int, default=400_000, help="characters of each language")
    parser.add_argument("--rounds", type=int, default=3, help="runs of which the fastest counts")
    args = parser.parse_args(argv)
    check_counts(num_chars=args.num_chars, rounds=args.rounds)
    if args.num_chars > 10**9:
        raise UserError(f"--num-chars {args.num_chars} must be at most {10**9}: texts are made in memory")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    texts, held_out = ({language: make_text(language, args.num_chars, seed) for language in LANGUAGES}
                       for seed in range(2))
    rows = measure(texts, held_out, args.vocab_size, args.rounds)
    print_rows(rows)
    return {"rows": rows}


if __name__ == "__main__":
    run_script(main)
