"""tasks/embedded.py: the identity, and Python's documentation."""

import json
import re

import pytest

from tasks.common import get_reference, make_rng
from tasks.embedded import IDENTITY, Identity, PythonDocs, find_sentence, iter_docstrings, make_conversation


def test_identity():
    for questions, answers in IDENTITY:
        assert len(questions) == len(set(questions)) >= 5 and len(answers) >= 2
        # else an evaluation would have nothing to look for
        assert any(all(key in answer for answer in answers) for key in ("{{name}}", "{{author}}"))
    conversations = list(Identity("train", 3000))
    assert len({json.dumps(conversation["messages"]) for conversation in conversations}) > 500
    questions = {conversation["messages"][0]["content"] for conversation in conversations}
    assert {"Who are you?", "What's your name?", "Who made you?"} <= questions
    assert {len(conversation["messages"]) for conversation in conversations} == {2, 4}
    assert not any("{{" in message["content"] for conversation in conversations for message in conversation["messages"])


def test_identity_is_held_out_by_wording():
    def questions(split):
        return {re.sub(r"\W", "", message["content"].lower()) for conversation in Identity(split, 5000)
                for message in conversation["messages"] if message["role"] == "user"}
    train, test = questions("train"), questions("test")
    held_out = {re.sub(r"\W", "", asked[-1].lower().replace("{{name}}", "nanochat")) for asked, _ in IDENTITY}
    assert held_out <= test and not any(text.endswith(tuple(held_out)) for text in train)


def test_identity_is_graded_by_its_names():
    task = Identity("train", fields={"name": "Ada", "author": "Eve Moss"})
    conversation = next(row for row in task if row["messages"][-2]["content"] == "Who made you?")
    assert conversation["expected"] == ["Eve Moss"] and "Eve Moss" in get_reference(conversation)
    assert task.evaluate(conversation, "It was eve moss!") and not task.evaluate(conversation, "It was Ada.")


def test_templates_of_one_question():
    made = {tuple(message["content"] for message in make_conversation(
        [(["Where?"], ["In {{city}}."])], {"city": "Oslo"}, make_rng(i))["messages"]) for i in range(50)}
    assert made == {("Where?", "In Oslo."), ("where", "In Oslo.")}


def test_python_docs():
    train, test = PythonDocs("train"), PythonDocs("test")
    assert len(train) > 800 and len(test) > 80
    names = [{name for name, _ in task.facts} for task in (train, test)]
    assert not names[0] & names[1]
    sentences = [{sentence for _, sentence in task.facts} for task in (train, test)]
    assert not sentences[0] & sentences[1]    # such as that of bytes.ljust and str.ljust
    facts = dict(train.facts + test.facts)
    assert facts["os.path.join"].startswith("Join two or more pathname components")
    assert "math.sqrt" in facts and "str.upper" in facts and "len" in facts
    for name, sentence in facts.items():
        assert 20 <= len(sentence) <= 200 and sentence[0].isupper() and sentence[-1] in ".!?" and "\n" not in sentence
        assert not re.search(r">>>|->|::", sentence), name
    assert list(train) == list(PythonDocs("train"))
    assert train[0]["messages"][0]["content"].count(train.facts[0][0]) == 1


def test_python_docs_are_graded_by_their_words():
    task = PythonDocs("train")
    conversation = {"messages": [{"role": "assistant", "content": "Return the square root of x."}]}
    assert task.evaluate(conversation, "return the square root of x") == 1.0
    assert task.evaluate(conversation, "Return the cube of x.") == pytest.approx(8 / 11)    # 4 of 5 and of 6 words
    assert task.evaluate(conversation, "Nothing alike") == 0.0


@pytest.mark.parametrize(("doc", "sentence"), [
    ("Return the sum of all items, e.g. of a list. Then more.", "Return the sum of all items, e.g. of a list."),
    ("max(iterable, *[, key=func]) -> value\n\nReturn the biggest\nof the items", "Return the biggest of the items."),
    ("lower case is no sentence here.", None), ("Too short.", None), ("Some kinds are supported here:", None),
    (">>> Some code that is no prose at all", None), ("Word " * 60, None), ("", None)])
def test_find_sentence(doc, sentence):
    assert find_sentence("builtins.max", doc) == sentence


def test_docstrings_are_of_this_python():
    assert dict(iter_docstrings())["textwrap.dedent"].startswith("Remove any common leading whitespace")
