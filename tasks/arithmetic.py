"""Arithmetic: two numbers of up to four digits, added, subtracted, multiplied or divided without remainder.

The assistant calls the calculator and repeats its result.
"""

import re
from random import Random

from nanochat.execution import calculate
from tasks.common import GeneratedTask, get_reference, is_test, make_rng

MAX_DIGITS = 4
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
SIGNS = {"+": "+", "-": "-", "*": "x", "/": "÷"}    # as written on paper
QUESTIONS = (
    "What is {problem}?",
    "What's {problem}?",
    "what is {problem}",
    "How much is {problem}?",
    "Calculate {problem}.",
    "Compute {problem}.",
    "Please work out {problem}.",
    "Can you tell me what {problem} is?",
    "{problem} = ?",
    "{problem}=",
    "{problem}",
)
NUMBER = re.compile(r"-?(?:[0-9][0-9,]*)?\.?[0-9]+")


class Arithmetic(GeneratedTask):
    """A problem (the unordered pair for + and *) is in train or in test, whatever the seed."""

    def get_example(self, index: int) -> dict:
        rng = make_rng(self.seed, "Arithmetic", self.split, index)
        left, operator, right = draw_problem(rng)
        while is_test_problem(left, operator, right) != (self.split == "test"):
            left, operator, right = draw_problem(rng)
        call = f"{left}{operator}{right}"
        value = calculate(call)
        question = rng.choice(QUESTIONS).format(problem=write_problem(left, operator, right, rng))
        answer = [{"type": "python", "text": call},
                  {"type": "python_output", "text": value},
                  {"type": "text", "text": f"{left} {operator} {right} = {value}"}]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """The last number that the assistant says itself must be right; the calculator's output alone is no answer."""
        numbers = NUMBER.findall(answer.rpartition("<|output_end|>")[2])
        expected = NUMBER.findall(get_reference(conversation))[-1]
        return bool(numbers) and numbers[-1].replace(",", "") == expected

    def reward(self, conversation: dict, answer: str) -> float:
        return float(self.evaluate(conversation, answer))


def draw_problem(rng: Random) -> tuple[int, str, int]:
    """Operands with each number of digits equally often; a dividend has at most MAX_DIGITS, too."""
    operator = rng.choice("+-*/")
    if operator == "/":
        num_digits = rng.randint(1, MAX_DIGITS - 1)
        right = draw_number(rng, num_digits)
        return right * draw_number(rng, rng.randint(1, MAX_DIGITS - num_digits)), operator, right
    left, right = (draw_number(rng, rng.randint(1, MAX_DIGITS)) for _ in range(2))
    return left, operator, right


def draw_number(rng: Random, num_digits: int) -> int:
    """A number above 0 with `num_digits` digits."""
    return rng.randrange(10 ** (num_digits - 1), 10 ** num_digits)


def is_test_problem(left: int, operator: str, right: int) -> bool:
    """Whether a problem is for tests; the order of a sum or product doesn't matter."""
    if operator in "+*":
        left, right = sorted((left, right))
    return is_test(f"{left}{operator}{right}")


def write_problem(left: int, operator: str, right: int, rng: Random) -> str:
    """A problem as different people would type it; most use the keyboard's signs, with blanks around them."""
    style = rng.random()
    if style < 0.5:
        return f"{left} {operator} {right}"
    if style < 0.65:
        return f"{left}{operator}{right}"
    return f"{left} {SIGNS[operator] if style < 0.8 else WORDS[operator]} {right}"
