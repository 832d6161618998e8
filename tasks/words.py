"""Words to spell: those of a named dataset. Where none is named, the published list of 370,000 English words where
it is on disk, else the words of the texts there.

    python -m tasks.words       download the published list to the base folder; nothing else ever does

Without a name the words depend on what earlier commands left on this machine. So a recipe that must learn from the same
data everywhere, with a network or without, names its dataset: `--words NAME` of the stages and of scripts.chat_eval.
"""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":    # as scripts/__init__.py: before torch is loaded, so that Ctrl-C ends in one sentence
    from nanochat.command_line import prepare_process
    prepare_process()

from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, file_lock, get_base_dir, get_mirror_dir, print0, write_atomic
from nanochat.download import CorruptFile, Job, download_all
from nanochat.shards import iter_documents, load_shards
from tasks.embedded import iter_docstrings

LIST_REPO = "dwyl/english-words"    # public domain (Unlicense)
LIST_NAME = "words_alpha.txt"
LIST_URL = f"https://raw.githubusercontent.com/{LIST_REPO}/refs/heads/master/{LIST_NAME}"
MIN_LIST_WORDS = 100_000    # in a download that is the list and not some page in its place
MIN_CHARS, MAX_CHARS = 3, 20
MIN_FOUND_WORDS = 200       # of a dataset: with fewer, hardly in English, there is little to learn (assumption)
MIN_OCCURRENCES = 3         # in a text: rarer strings are mostly names and misspellings
MAX_TEXT_CHARS = 100_000_000    # of a corpus are read for their words, which takes about six seconds
KEPT_NAME = "words_found.txt"    # the words that were collected; delete it to have them collected anew


def load_words(data: str | None = None) -> list[str]:
    """Lower-case words of the letters a-z, sorted: the published list, the corpus's words, or the docstrings' words.

    data: the dataset whose words they are, whatever else is on disk, the list too; the docstrings' words if it has few
    The words that are collected are kept, so that all stages of a chain spell the same words.
    """
    if data:
        path, folders, advice = get_base_dir() / f"words_{load_shards(data).hash}.txt", [data], ""
    else:
        path = find_list() or get_base_dir() / KEPT_NAME
        folders = [str(manifest.parent) for manifest in sorted(get_base_dir().glob("data/*/manifest.json"))]
        advice = "; to use the published list instead: python -m tasks.words"
    if not path.exists():
        with file_lock(path):     # one rank for all
            if not path.exists():
                source, words = collect_first_words(folders)
                print0(f"words to spell: {len(words):,} of {source}, kept in {path}{advice}")
                write_atomic(path, "\n".join(words) + "\n")
    return read_list(path)


def collect_first_words(folders: Iterable[str]) -> tuple[str, list[str]]:
    """The words of the first dataset that has enough of them, else those of Python's docstrings; and whose they are."""
    for folder in folders:
        try:
            shards = load_shards(folder)
        except UserError:
            continue    # not complete: not at hand
        words = collect_words(iter_documents(shards.train, MAX_TEXT_CHARS))
        if len(words) >= MIN_FOUND_WORDS:    # fewer in many languages
            return f"the corpus {shards.name}", words
    return "Python's docstrings", collect_words(doc for _, doc in iter_docstrings())


def collect_words(texts: Iterable[str]) -> list[str]:
    """The words that stand in `texts` at least MIN_OCCURRENCES times, sorted."""
    counts = Counter(word for text in texts for word in re.findall(r"(?<![\w.])[A-Za-z][a-z]+(?![\w(])", text))
    totals = Counter()
    for word, count in counts.items():
        totals[word.lower()] += count
    return sorted(word for word, count in totals.items() if count >= MIN_OCCURRENCES and is_word(word))


def is_word(word: str) -> bool:
    """Of a length worth spelling, and with a vowel, as abbreviations often are not."""
    return MIN_CHARS <= len(word) <= MAX_CHARS and bool(re.fullmatch(r"(?=.*[aeiouy])[a-z]+", word))


def find_list() -> Path | None:
    """The published list, if it is on this machine."""
    mirror_dir = get_mirror_dir()
    folders = [get_base_dir(), *([mirror_dir / LIST_REPO] if mirror_dir else [])]
    return next((path for folder in folders for path in (folder / LIST_NAME, folder / f"{LIST_NAME}.gz")
                 if path.is_file()), None)


def read_list(path: Path) -> list[str]:
    """The words of a file with one per line."""
    advice = "delete it and run python -m tasks.words, or go on without it"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            words = sorted({word for word in map(str.strip, file) if is_word(word)})
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from None
    if not words:
        raise UserError(f"{path} holds no words of the letters a-z, one per line; {advice}")
    return words


def check_list(path: Path) -> None:
    """Refuse a download that isn't the list, as a page that asks to log in."""
    if path.read_bytes().count(b"\n") < MIN_LIST_WORDS:
        raise CorruptFile(f"it has fewer than {MIN_LIST_WORDS:,} lines")


def main(argv: list[str] | None = None) -> dict:
    Parser(description=__doc__).parse_args(argv)
    path = get_base_dir() / LIST_NAME
    with file_lock(path):
        if find_list() is None:
            failed = download_all([Job(LIST_URL, path)], 1, check_list, lambda *_: None)
            if failed:
                raise UserError(f"the list of words can't be had: {failed[LIST_NAME]}; connect to the network, put "
                                f"{LIST_NAME} into {path.parent}, or do without")
    print0(f"words to spell: the list in {find_list()}")
    return {"path": str(find_list())}


if __name__ == "__main__":
    run_script(main)
