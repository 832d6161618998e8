"""The task: a list of conversations and a grade for answers. Mixtures of tasks; multiple-choice questions.

A conversation is {"messages": [{"role", "content"}, ...]}, see nanochat.conversations; its last message is the
reference answer. A task may add fields that its own `evaluate` reads; a categorical one adds "letters", the choices.
The graded answer is text as the tokenizer decodes it, special tokens by their names.
"""

import random
import re
import zlib
from collections.abc import Sequence

import numpy as np

from nanochat.common import UserError

LETTERS = "ABCDEFGHIJ"      # of the choices of a question
TEST_ONE_IN = 10            # of the words, problems and names of generated tasks are for tests alone
FINAL_ANSWER = re.compile(r"#### *(-?[0-9.,]+)")


class Task:
    """A list of conversations, of which [start:stop:step] is used. A subclass loads `rows` and grades answers."""

    eval_type = "generative"    # or "categorical": the answer is one of the conversation's "letters"
    grade_batch = 1             # problems to grade at a time; more where a task grades several side by side

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(f"[{start}:{stop}:{step}] is no slice of a task: 0 <= start <= stop, step >= 1")
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self) -> int:
        """All conversations, used or not."""
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        """Conversation `index` of all."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, answer: str) -> bool | float:
        """Whether `answer` is right, or a score from 0 to 1."""
        raise NotImplementedError(f"{type(self).__name__} has no grade for an answer; it is for training alone")

    def grade(self, conversations: Sequence[dict], answers: Sequence[str], allow_unsafe: bool = False) -> list[float]:
        """A score from 0 to 1 for each answer.

        allow_unsafe: run programs that a model wrote without isolation where this machine has none
        """
        return [float(self.evaluate(conversation, answer))
                for conversation, answer in zip(conversations, answers, strict=True)]

    def check_grading(self, allow_unsafe: bool) -> None:
        """Raise UserError where this machine can't grade answers, before any is written."""

    def _used(self) -> range:
        num_examples = self.num_examples()
        stop = num_examples if self.stop is None else min(self.stop, num_examples)
        return range(self.start, stop, self.step)

    def __len__(self) -> int:
        return len(self._used())

    def __getitem__(self, index: int) -> dict:
        """A conversation; UserError where its row is damaged."""
        place = self._used()[index]
        try:
            return self.get_example(place)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            name, reason = type(self).__name__, f"{type(error).__name__}: {error}"
            raise UserError(f"example {place} of {name} can't be used ({reason}); fetch its data again") from None


class GeneratedTask(Task):
    """A task whose conversations are generated, each from (seed, split, index) alone; `size` of them."""

    def __init__(self, split: str, size: int = 1000, seed: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        check_split(self, split)
        self.split, self.size, self.seed = split, size, seed

    def num_examples(self) -> int:
        return self.size


class ChoiceTask(Task):
    """A task of multiple-choice questions, of which the letter alone is right."""

    eval_type = "categorical"

    def evaluate(self, conversation: dict, answer: str) -> bool:
        return answer.strip() == get_reference(conversation)


class TaskMixture(Task):
    """Tasks shuffled into one list; the order depends on the seed and the tasks' lengths alone.

    weights: how often each conversation of a task counts; 2 = twice, 0.5 = every other one. By default once.
    """

    def __init__(self, tasks: Sequence[Task], weights: Sequence[float] | None = None, seed: int = 42,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        self.tasks = tuple(tasks)
        weights = [1.0] * len(self.tasks) if weights is None else weights
        if len(weights) != len(self.tasks) or min(weights, default=0) < 0:
            raise ValueError(f"{len(self.tasks)} tasks take as many weights, none below 0, not {list(weights)}")
        self.counts = [round(weight * len(task)) for task, weight in zip(self.tasks, weights, strict=True)]
        self.ends = np.cumsum(self.counts, dtype=np.int64)
        self.order = np.random.default_rng(seed).permutation(sum(self.counts))

    def num_examples(self) -> int:
        return len(self.order)

    def get_example(self, index: int) -> dict:
        place = int(self.order[index])
        task_idx = int(np.searchsorted(self.ends, place, side="right"))
        task, count = self.tasks[task_idx], self.counts[task_idx]
        place -= int(self.ends[task_idx]) - count
        return task[place * len(task) // count]     # spread evenly over the task, whatever the weight


def render_mc(question: str, choices: Sequence[str], letters: Sequence[str] = LETTERS) -> str:
    """A multiple-choice question. No blank precedes a letter, so that it is the same token as the bare answer."""
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, letters[:len(choices)], strict=True)]
    return "\n".join([question, *lines, "", "Answer with the letter only."])


def make_choice_conversation(question: str, choices: Sequence[str], answer_idx: int) -> dict:
    """The conversation of a multiple-choice question, whose answer is a bare letter."""
    letters = tuple(LETTERS[:len(choices)])
    return {"messages": [{"role": "user", "content": render_mc(question, choices, letters)},
                         {"role": "assistant", "content": letters[answer_idx]}], "letters": letters}


def get_reference(conversation: dict) -> str:
    """The text of the reference answer's last part."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def extract_answer(text: str) -> str | None:
    """The number after ####, without commas; None where there is none."""
    found = FINAL_ANSWER.search(text)
    return found[1].replace(",", "").rstrip(".") if found else None


def make_rng(*names: object) -> random.Random:
    """A generator seeded by `names` alone, the same in every process and version of Python."""
    return random.Random("/".join(map(str, names)))


def is_test(key: str) -> bool:
    """Whether a word, problem or name is for tests: by its own hash, so that no two lists or runs can disagree."""
    return zlib.crc32(key.encode()) % TEST_ONE_IN == 0


def check_split(task: Task, split: str) -> None:
    """UserError for a split that a task without a dataset doesn't have."""
    if split not in ("train", "test"):
        raise UserError(f"{type(task).__name__} has no split {split!r}; choose train or test")
