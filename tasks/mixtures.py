"""Mixtures of tasks for midtraining and SFT: which tasks, how many conversations of each, how often."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, expand_home, hash_file
from tasks.catalog import TASKS, get_task
from tasks.common import Task, TaskMixture
from tasks.customjson import VAL_ONE_IN, CustomJSON, RowAccount

# Each entry is NAME[:COUNT[:WEIGHT]], as --tasks takes them. 'mid' and 'sft' are those of the public record (January
# 2026), 'sft-direct' that of SFT straight from the base model (July 2026); 'quickstart', that of runs/quickstart.sh,
# needs no download.
MIXTURES = {
    "mid":        ("SmolTalk", "MMLU", "GSM8K", "Identity:1000:2", "SimpleSpelling:200000", "SpellingBee:80000"),
    "sft":        ("ARC-Easy", "ARC-Challenge", "GSM8K", "SmolTalk:10000", "Identity:1000", "SimpleSpelling:300",
                   "SpellingBee:300"),
    "sft-direct": ("SmolTalk", "MMLU::3", "GSM8K::4", "Identity:1000:2", "SimpleSpelling:200000", "SpellingBee:80000"),
    "quickstart": ("Arithmetic:8000", "SimpleSpelling:40000", "SpellingBee:16000", "Identity:1500:3", "PythonDocs"),
    "none":       (),   # a person's own conversations alone
}
GENERATED = ("SpellingBee", "SimpleSpelling", "Arithmetic", "Identity")   # of any size
VAL_SPLITS = {"MMLU": "validation", "ARC-Easy": "validation", "ARC-Challenge": "validation"}   # of others: test
MAX_CONVERSATIONS = 10**7   # of a task, repeats included; beyond any data set that is there
MAX_VAL_GENERATED = 1000    # held-out conversations of a generated task


@dataclass(frozen=True)
class Mixture:
    """Conversations to train on, and held-out ones of the same kinds to validate on."""
    train: Task
    val:   Task
    parts: dict[str, str]   # task or file -> its size, weight and hash, to print and to compare runs
    accounts: Sequence[RowAccount] = ()   # of the person's own files

    @property
    def name(self) -> str:
        return ", ".join(self.parts)


def make_mixture(entries: Sequence[str], custom_paths: Sequence[str] = (), words: str | None = None) -> Mixture:
    """The mixture of tasks, given as NAME[:COUNT[:WEIGHT]], and of a person's own files; UserError if one is missing.

    COUNT: conversations, all by default; WEIGHT: how often each is used, 2 = twice
    words: the dataset whose words are spelled, see tasks.words.load_words
    """
    train, val, weights, parts, accounts = [], [], [], {}, []
    for name, (count, weight) in parse_entries(entries).items():
        try:
            train.append(make_task(name, "train", count, words))
            val.append(make_task(name, VAL_SPLITS.get(name, "test"), min(count or MAX_VAL_GENERATED, MAX_VAL_GENERATED)
                                 if name in GENERATED else None, words))
        except UserError as error:
            raise UserError(f"{name}: {error}; or choose what there is with --tasks, or --mixture quickstart, which "
                            "needs no download") from None
        weights.append(weight)
        if (num := weight * len(train[-1])) > MAX_CONVERSATIONS:
            raise UserError(f"--tasks {name} is {num:.3g} conversations; use at most {MAX_CONVERSATIONS:,} of a task")
        parts[name] = f"{len(train[-1])} x{weight:g}"
    for path in custom_paths:
        whole, name = CustomJSON(path), Path(path).name
        if name in parts:
            raise UserError(f"two files or tasks are called {name}, so records couldn't tell them apart; rename one")
        num_train = len(whole) - len(whole) // VAL_ONE_IN
        train.append(whole.cut(0, num_train))
        val.append(whole.cut(num_train, None))
        accounts.append(whole.account)
        weights.append(1.0)
        parts[name] = f"{num_train} x1, sha256 {hash_file(expand_home(path))[:16]}"
    if not train:
        raise UserError(f"there is nothing to learn from: name some --tasks ({', '.join(TASKS)}) or a --custom-json")
    mixture = TaskMixture(train, weights)
    if unused := [name for name, num in zip(parts, mixture.counts, strict=True) if not num]:
        raise UserError(f"of {unused[0]} nothing would be used; give it a larger COUNT or WEIGHT")
    return Mixture(mixture, TaskMixture(val), parts, accounts)


def parse_entries(entries: Sequence[str]) -> dict[str, tuple[int | None, float]]:
    """Entries NAME[:COUNT[:WEIGHT]] as {name: (count, weight)}; UserError for unknown tasks and for repeats."""
    parsed: dict[str, tuple[int | None, float]] = {}
    for entry in entries:
        name, count, weight = parse_entry(entry)
        if name not in TASKS:
            raise UserError(f"--tasks {entry}: there is no task {name!r}; choose from {', '.join(TASKS)}")
        if name in parsed:
            raise UserError(f"--tasks names {name} twice; name it once, with a WEIGHT to use it more often, such as "
                            f"{name}:{count or ''}:2")
        parsed[name] = count, weight
    return parsed


def parse_entry(entry: str) -> tuple[str, int | None, float]:
    """NAME[:COUNT[:WEIGHT]] as its parts."""
    name, count, weight = [*entry.split(":"), "", ""][:3]
    try:
        parsed = name, int(count) if count else None, float(weight or 1)
        if entry.count(":") > 2 or (count and int(count) < 1) or not 0 < parsed[2] < float("inf"):
            raise ValueError
        if count and int(count) > MAX_CONVERSATIONS:
            raise UserError(f"--tasks {entry} asks for too many; COUNT may be up to {MAX_CONVERSATIONS:,}")
    except ValueError:
        raise UserError(f"--tasks {entry} isn't NAME[:COUNT[:WEIGHT]], such as GSM8K, SmolTalk:10000 or "
                        "MMLU::3") from None
    return parsed


def make_task(name: str, split: str, count: int | None, words: str | None = None) -> Task:
    """A task, `count` conversations of it or all; words: as get_task has it."""
    if count is None:
        return get_task(name, split, words)
    return get_task(name, split, words, **({"size": count} if name in GENERATED else {"stop": count}))
