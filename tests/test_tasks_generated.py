"""What holds for all generated tasks: formats, calls, seeds, speed, splits."""

import subprocess
import sys
import time

import pytest

from nanochat.common import UserError
from nanochat.conversations import parse_conversation
from nanochat.execution import calculate
from tasks.arithmetic import Arithmetic
from tasks.catalog import get_task
from tasks.embedded import Identity, PythonDocs
from tasks.spellingbee import SpellingBee
from tests.data_helpers import WORDS, decode_answer, parts_of
from tests.helpers import REPO_DIR
from tests.programs.task_digest import digest, make_tasks


@pytest.mark.parametrize("split", ["train", "test"])
def test_conversations_are_well_formed_and_their_references_right(split):
    for task in [*make_tasks(split), PythonDocs(split)]:
        for conversation in task:
            parse_conversation(conversation)
            assert all(part["text"] for part in parts_of(conversation))
            assert task.evaluate(conversation, decode_answer(conversation))
            assert not task.evaluate(conversation, "")
            if hasattr(task, "reward"):
                assert task.reward(conversation, decode_answer(conversation)) == 1.0
                assert task.reward(conversation, "I don't know") == 0.0


def test_calls_give_what_the_calculator_gives():
    for task in make_tasks("train"):
        for conversation in task:
            parts = parts_of(conversation)
            for call, output in zip(parts, parts[1:], strict=False):
                assert call["type"] != "python" or \
                    output == {"type": "python_output", "text": calculate(call["text"])}


def test_same_in_every_process_and_other_with_another_seed():
    run = subprocess.run([sys.executable, "-m", "tests.programs.task_digest"], cwd=REPO_DIR, capture_output=True,
                         text=True, check=True)
    assert run.stdout.strip() == digest(make_tasks("train"))
    for make in (lambda seed: SpellingBee("train", words=WORDS, seed=seed), lambda seed: Arithmetic("train", seed=seed),
                 lambda seed: Identity("train", seed=seed)):
        assert list(make(1)) == list(make(1)) != list(make(2))


def test_an_example_does_not_depend_on_the_others():
    for small, large in zip(make_tasks("train", 10), make_tasks("train", 10**9), strict=True):
        assert small[7] == large[7]
        assert large[10**9 - 1]


def test_examples_are_made_fast():
    for split in ("train", "test"):
        for task in make_tasks(split):
            start = time.process_time()
            for i in range(1000):
                task[i]
            assert time.process_time() - start < 0.5, type(task)   # 2,000 a second on a busy machine; idle 15,000


@pytest.mark.parametrize("name", ["SpellingBee", "SimpleSpelling", "Arithmetic", "Identity", "PythonDocs"])
def test_unknown_split(name, offline_base):
    with pytest.raises(UserError, match=f"{name} has no split 'val'; choose train or test"):
        get_task(name, "val")
