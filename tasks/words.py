"""Words to spell: the published list of 370,000 English words, else the words of the texts on this machine."""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import requests

from nanochat.common import UserError, file_lock, get_base_dir, get_mirror_dir, print0, write_atomic
from nanochat.shards import iter_documents, load_shards
from tasks.embedded import iter_docstrings

LIST_REPO = "dwyl/english-words"    # public domain (Unlicense)
LIST_NAME = "words_alpha.txt"
LIST_URL = f"https://raw.githubusercontent.com/{LIST_REPO}/refs/heads/master/{LIST_NAME}"
TIMEOUT_SECONDS = 10
MIN_LIST_WORDS = 100_000    # of an answer that is the list and not some page in its place
MIN_CHARS, MAX_CHARS = 3, 20
MIN_OCCURRENCES = 3         # in a text: rarer strings are mostly names and misspellings
MAX_TEXT_CHARS = 100_000_000    # of a corpus are read for their words, which takes about six seconds
KEPT_NAME = "words_found.txt"    # the words that were collected; delete it to have them collected anew


def load_words() -> list[str]:
    """Lower-case words of the letters a-z, sorted: the published list, the corpus's words, or the docstrings' words.

    The list is asked for once; without an answer, the words that are collected instead are kept, so that all stages of
    a chain spell the same words, whether there is a network by then or not.
    """
    kept_path = get_base_dir() / KEPT_NAME
    path = find_list()
    if path is None:
        with file_lock(kept_path):     # one rank for all
            path = kept_path if kept_path.exists() else download_list()
            if path is None:
                source, words = collect_words_here()
                print0(f"words to spell: {len(words):,} of {source}, kept in {kept_path}; a {LIST_NAME} beside it "
                       "would be used instead")
                write_atomic(kept_path, "\n".join(words) + "\n")
                path = kept_path
    return read_list(path)


def collect_words_here() -> tuple[str, list[str]]:
    """What there is to read on this machine, and its words."""
    for manifest in sorted(get_base_dir().glob("data/*/manifest.json")):
        try:
            documents = iter_documents(load_shards(str(manifest.parent)).train)
        except UserError:
            continue    # not complete: not at hand
        if words := collect_words(take_chars(documents, MAX_TEXT_CHARS)):     # none in many languages
            return f"the corpus {manifest.parent.name}", words
    return "Python's docstrings", collect_words(doc for _, doc in iter_docstrings())


def collect_words(texts: Iterable[str]) -> list[str]:
    """The words that stand in `texts` at least MIN_OCCURRENCES times, sorted."""
    counts = Counter(word for text in texts for word in re.findall(r"(?<![\w.])[A-Za-z][a-z]+(?![\w(])", text))
    totals = Counter()
    for word, count in counts.items():
        totals[word.lower()] += count
    return sorted(word for word, count in totals.items() if count >= MIN_OCCURRENCES and is_word(word))


def take_chars(texts: Iterable[str], max_chars: int) -> Iterator[str]:
    """The first texts, up to the one that reaches `max_chars`."""
    for text in texts:
        yield text
        max_chars -= len(text)
        if max_chars <= 0:
            return


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
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            words = sorted({word for word in map(str.strip, file) if is_word(word)})
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, and it is replaced") from None
    if not words:
        raise UserError(f"{path} holds no words of the letters a-z, one per line; delete it, and it is replaced")
    return words


def download_list() -> Path | None:
    """Fetch the published list, unless another rank just did; None where it can't be had, as there is another way."""
    path = get_base_dir() / LIST_NAME
    if path.exists():
        return path
    try:
        response = requests.get(LIST_URL, timeout=TIMEOUT_SECONDS)
        response.raise_for_status()
    except requests.RequestException as error:
        print0(f"{LIST_URL} can't be fetched ({type(error).__name__})")
        return None
    if response.content.count(b"\n") < MIN_LIST_WORDS:
        print0(f"{LIST_URL} answered with something else than the list of words")
        return None
    write_atomic(path, response.content)
    return path
