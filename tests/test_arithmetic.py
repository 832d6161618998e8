"""tasks/arithmetic.py: problems by split, wordings, grades."""

import re

import pytest

from tasks import arithmetic
from tasks.arithmetic import Arithmetic, draw_problem, is_test_problem
from tasks.common import get_reference, make_rng
from tests.data_helpers import decode_answer, parts_of


def find_problem(conversation):
    left, operator, right = re.fullmatch(r"(\d+)([-+*/])(\d+)", parts_of(conversation)[0]["text"]).groups()
    return int(left), operator, int(right)


def test_arithmetic_problems():
    seen = set()
    for conversation in Arithmetic("train", 5000):
        left, operator, right = find_problem(conversation)
        assert 0 < left < 10_000 and 0 < right < 10_000
        value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]
        assert operator != "/" or value * right == left     # exact
        assert parts_of(conversation)[1]["text"] == str(value)
        assert get_reference(conversation) == f"{left} {operator} {right} = {value}"
        seen.add((operator, len(str(left)), len(str(right))))
    for operator in "+-*":
        assert {(operator, i, j) for i in range(1, 5) for j in range(1, 5)} <= seen


def test_train_and_test_problems_are_disjoint():
    def problems(split, seed):
        found = set()
        for conversation in Arithmetic(split, 8000, seed):
            left, operator, right = find_problem(conversation)
            found.add((min(left, right), operator, max(left, right)) if operator in "+*" else (left, operator, right))
        return found
    train, test = problems("train", 1), problems("test", 2)
    assert len(train) > 5000 and len(test) > 3000 and not train & test
    assert is_test_problem(34, "*", 27) == is_test_problem(27, "*", 34)
    share = sum(is_test_problem(left, "-", right) for left in range(100, 200) for right in range(100, 200)) / 10_000
    assert 0.08 < share < 0.12


def test_what_is_34_times_27_can_be_asked(monkeypatch):
    drawn = {draw_problem(make_rng(i)) for i in range(30_000)}
    products = {(left, right) for left, operator, right in drawn if operator == "*"}
    assert len({left for left, right in products if left >= 10 and 10 <= right <= 99} & {*range(10, 100)}) == 90
    assert len({right for left, right in products if 10 <= left <= 99}) > 90
    split = "test" if is_test_problem(34, "*", 27) else "train"
    monkeypatch.setattr(arithmetic, "draw_problem", lambda rng: (34, "*", 27))
    asked = {conversation["messages"][0]["content"]: conversation for conversation in Arithmetic(split, 300)}
    assert decode_answer(asked["What is 34 * 27?"]) == ("<|python_start|>34*27<|python_end|><|output_start|>918"
                                                        "<|output_end|>34 * 27 = 918")


def test_wordings_vary():
    forms = {re.sub(r"\d+", "N", conversation["messages"][0]["content"]) for conversation in Arithmetic("train", 3000)}
    assert {"What is N * N?", "N/N", "How much is N plus N?", "Calculate N x N."} <= forms and len(forms) > 100


@pytest.mark.parametrize(("answer", "right"), [
    ("34 * 27 = 918", True), ("918", True), ("It is 918.", True), ("The answer: 1,918", False), ("-918", False),
    ("<|python_start|>34*27<|python_end|><|output_start|>918<|output_end|>34 * 27 = 918", True),
    ("<|python_start|>34*27<|python_end|><|output_start|>918<|output_end|>", False),    # it must say so itself
    ("<|python_start|>34*27<|python_end|><|output_start|>918<|output_end|>34 * 27 = 91", False),
    ("918 or 919", False), ("", False), ("nine hundred", False)])
def test_arithmetic_is_graded_by_the_last_number(answer, right):
    reference = {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "34 * 27 = 918"}]}]}
    assert Arithmetic("test").evaluate(reference, answer) is right
