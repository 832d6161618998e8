"""The tasks by the names that scripts take."""

from nanochat.common import UserError
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.common import Task
from tasks.embedded import Identity, PythonDocs
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.words import load_words

TASKS = {
    "ARC-Easy":       lambda split, **kwargs: ARC("ARC-Easy", split, **kwargs),
    "ARC-Challenge":  lambda split, **kwargs: ARC("ARC-Challenge", split, **kwargs),
    "MMLU":           lambda split, **kwargs: MMLU("auxiliary_train" if split == "train" else "all", split, **kwargs),
    "GSM8K":          lambda split, **kwargs: GSM8K("main", split, **kwargs),
    "HumanEval":      HumanEval,
    "SmolTalk":       SmolTalk,
    "SpellingBee":    SpellingBee,
    "SimpleSpelling": SimpleSpelling,
    "Arithmetic":     Arithmetic,
    "Identity":       Identity,
    "PythonDocs":     PythonDocs,
}
CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")   # ChatCORE's
SPELLING_TASKS = ("SpellingBee", "SimpleSpelling")
REWARD_TASKS = ["GSM8K", "Arithmetic", *SPELLING_TASKS]    # whose answers have a reward, for RL
GRADED_TASKS = tuple(name for name in TASKS if name != "SmolTalk")   # whose answers can be graded


def get_task(name: str, split: str, words: str | None = None, **kwargs) -> Task:
    """The task `name`; words: the dataset whose words are spelled, see tasks.words.load_words; kwargs: start, stop,
    step, and of generated tasks size and seed."""
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    if words and name in SPELLING_TASKS:
        kwargs["words"] = load_words(words)
    return TASKS[name](split, **kwargs)
