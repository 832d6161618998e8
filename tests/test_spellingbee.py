"""tasks/spellingbee.py: words by split, answers, questions, grades."""

import re

import pytest

from nanochat.common import UserError
from tasks.common import is_test
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tests.data_helpers import WORDS, parts_of


@pytest.mark.parametrize("make", [SimpleSpelling, SpellingBee])
def test_train_and_test_words_are_disjoint(make):
    train, test = ({conversation["word"] for conversation in make(split, 3000, seed, words=WORDS)}
                   for split, seed in (("train", 1), ("test", 2)))
    assert train and test and not train & test and train | test == set(WORDS)
    # another list can't move a word to the other side
    other = {conversation["word"] for conversation in make("test", 500, words=[*WORDS[::2], "hello", "world"])}
    assert not other & train


def test_spelling_bee_spells_counts_and_checks():
    absent = 0
    for conversation in SpellingBee("train", 500, words=WORDS):
        text, call, output, final = parts_of(conversation)
        word, letter = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call["text"]).groups()
        spelled, _, *lines = text["text"].split("\n")
        assert spelled.replace(" ", "") == word and [line[0] for line in lines[:len(word)]] == list(word)
        marked = [line for line in lines[:len(word)] if len(line) > 1]
        assert marked == [f"{letter} {i + 1}" for i in range(word.count(letter))]
        assert f"By hand: {word.count(letter)}\n" in text["text"]
        assert output["text"] == str(word.count(letter)) and final["text"].endswith(f"#### {word.count(letter)}")
        question = conversation["messages"][0]["content"]
        assert word in question and re.search(rf"\b{letter}(s|\b)", question)
        absent += word.count(letter) == 0
    assert 10 < absent < 60


def test_questions_vary():
    for make, num_forms in ((SimpleSpelling, 60), (SpellingBee, 250)):
        forms = set()
        for conversation in make("train", 3000, words=["strawberry"]):
            forms.add(conversation["messages"][0]["content"].replace("strawberry", "W"))
        assert len(forms) > num_forms and any('"W"' in form for form in forms) and any("'W'" in form for form in forms)
    assert "How many r are in strawberry?" in {conversation["messages"][0]["content"] for conversation
                                               in SpellingBee("train", 20_000, words=["strawberry"])}


def test_spelling_is_graded_by_its_letters():
    task = SimpleSpelling("train", words=["banana"])
    conversation = task[0]
    for answer, right in (("b a n a n a", True), ("B, A, N, A, N, A.", True), ("banana: b-a-n-a-n-a", True),
                          ("b a n a n", False), ("b a n n a a", False), ("banana", False)):
        assert task.evaluate(conversation, answer) is right


def test_no_word_for_a_split():
    with pytest.raises(UserError, match="no word for its split test; give it more"):
        SimpleSpelling("test", words=[word for word in WORDS if not is_test(word)])
