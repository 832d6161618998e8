"""Mixtures: what a person may name, what is held out, and what is said where something is missing."""

import json
import re
from pathlib import Path

import pytest

from nanochat.common import UserError
from tasks.common import get_reference
from tasks.mixtures import GENERATED, MIXTURES, make_mixture, parse_entry


def write_conversations(path, num):
    lines = [[{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}"}]
             for i in range(num)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(("entry", "parsed"), [
    ("GSM8K", ("GSM8K", None, 1.0)), ("SmolTalk:10000", ("SmolTalk", 10000, 1.0)), ("MMLU::3", ("MMLU", None, 3.0)),
    ("Arithmetic:20:0.5", ("Arithmetic", 20, 0.5))])
def test_entries(entry, parsed):
    assert parse_entry(entry) == parsed


@pytest.mark.parametrize("entry", ["GSM8K:many", "GSM8K:0", "GSM8K:-3", "GSM8K::0", "GSM8K::nan", "GSM8K:1:1:1"])
def test_bad_entries(entry):
    with pytest.raises(UserError, match=f"--tasks {entry} isn't NAME"):
        make_mixture([entry])


@pytest.mark.parametrize("entry", ["Arithmetic:100000000000000000000", "Arithmetic:20:1e300", "Arithmetic:20:1e6"])
def test_more_conversations_than_can_be_used(entry):
    with pytest.raises(UserError, match="--tasks Arithmetic.* 10,000,000"):
        make_mixture([entry])


def test_every_mixture_names_tasks_that_exist():
    for entries in MIXTURES.values():
        names = [parse_entry(entry)[0] for entry in entries]
        assert len(names) == len(set(names))
    assert {parse_entry(entry)[0] for entry in MIXTURES["quickstart"]} <= {*GENERATED, "PythonDocs"}


def test_quickstart_by_hand_has_the_recipes_tasks():
    recipe = (Path(__file__).parents[1] / "runs" / "quickstart.sh").read_text()
    assert re.search(r"^MID_TASKS=\$\{MID_TASKS:-(.*)\}$", recipe, re.MULTILINE)[1].split() == [*MIXTURES["quickstart"]]


def test_counts_weights_and_held_out_conversations(tmp_path):
    custom = write_conversations(tmp_path / "mine.jsonl", 45)
    mixture = make_mixture(["Arithmetic:30:2", "Identity:7"], [custom])
    assert len(mixture.train) == 60 + 7 + 43 and len(mixture.val) == 30 + 7 + 2
    assert mixture.name == "Arithmetic, Identity, mine.jsonl" and mixture.parts["Arithmetic"] == "30 x2"
    answers = [{get_reference(c) for c in tasks} for tasks in (mixture.train, mixture.val)]
    assert "Answer 42" in answers[0] and answers[1] >= {"Answer 43", "Answer 44"}
    questions = [{c["messages"][0]["content"] for c in tasks} for tasks in (mixture.train, mixture.val)]
    assert not questions[0] & questions[1]


def test_nothing_is_named_twice_or_for_nothing(tmp_path):
    with pytest.raises(UserError, match="names Identity twice; .* such as Identity:5:2"):
        make_mixture(["Identity:20", "Identity:5"])
    with pytest.raises(UserError, match="of Identity nothing would be used"):
        make_mixture(["Arithmetic:20", "Identity:20:0.001"])
    (tmp_path / "other").mkdir()
    paths = [write_conversations(folder / "mine.jsonl", 20) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(UserError, match="two files or tasks are called mine.jsonl"):
        make_mixture([], paths)


def test_small_file_is_trained_on_whole(tmp_path):
    mixture = make_mixture([], [write_conversations(tmp_path / "mine.jsonl", 19)])
    assert len(mixture.train) == 19 and len(mixture.val) == 0


def test_missing_tasks_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folder = tmp_path / "hub" / "openai" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"question": "1+1?"}\n')
    with pytest.raises(UserError, match="GSM8K: .*train.jsonl has no column 'answer'.*--mixture quickstart"):
        make_mixture(["GSM8K"])
    with pytest.raises(UserError, match="there is no task 'GSM9K'; choose from ARC-Easy"):
        make_mixture(["GSM9K"])
    with pytest.raises(UserError, match="nothing to learn from: name some --tasks"):
        make_mixture([])
