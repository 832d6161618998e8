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
KEPT_NAME = "words_found.txt"   # those of the texts, where the list can't be had; delete it to have them found anew
LIST_URL = f"https://raw.githubusercontent.com/{LIST_REPO}/refs/heads/master/{LIST_NAME}"
TIMEOUT_SECONDS = 10
MIN_LIST_WORDS = 100_000    # of an answer that is the list and not some page in its place
MIN_CHARS, MAX_CHARS = 3, 20
MIN_OCCURRENCES = 3         # in a text: rarer strings are mostly names and misspellings
MAX_TEXT_CHARS = 10_000_000 # of a corpus are read for their words, which takes about a second


def load_words() -> list[str]:
    """Lower-case words of the letters a-z, sorted: the published list, the corpus's words, or the docstrings' words.

    What is found is kept in the base folder: a run that is resumed, and the next stage's evaluation, must ask for the
    same words, though a network or another corpus may have come meanwhile.
    """
    kept = get_base_dir() / KEPT_NAME
    path = find_list() or (kept if kept.exists() else download_list())
    if path:
        return read_list(path)
    with file_lock(kept):
        if not kept.exists():  # another rank may have been first
            words, source = find_words()
            print0(f"words to spell: those of {source} ({LIST_NAME} isn't there), kept in {kept}")
            write_atomic(kept, "\n".join(words) + "\n")
    return read_list(kept)


def find_words() -> tuple[list[str], str]:
    """The words of the texts on this machine, and which texts those are."""
    for manifest in sorted(get_base_dir().glob("data/*/manifest.json")):
        try:
            documents = iter_documents(load_shards(str(manifest.parent)).train)
        except UserError:
            continue    # not complete: not at hand
        if words := collect_words(take_chars(documents, MAX_TEXT_CHARS)):
            return words, f"the corpus {manifest.parent.name}"
    return collect_words(doc for _, doc in iter_docstrings()), "Python's docstrings"


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
        raise UserError(f"{path} is damaged ({error}); delete it, and it is fetched again") from None
    if not words:
        raise UserError(f"{path} holds no words of the letters a-z, one per line; delete it, and it is fetched again")
    return words


def download_list() -> Path | None:
    """Fetch the published list, by one rank for all; None where it can't be had. Asked once: there is another way."""
    path = get_base_dir() / LIST_NAME
    with file_lock(path):
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
