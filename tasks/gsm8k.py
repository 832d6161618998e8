"""GSM8K: word problems of school mathematics (arXiv 2110.14168), solved in steps that call the calculator."""

import re

from nanochat.execution import calculate
from tasks.common import Task, extract_answer, get_reference
from tasks.rows import load_rows

CALL = re.compile(r"<<([^<>]*)=([^<>=]*)>>")     # <<48/2=24>>: what is computed, and its value


class GSM8K(Task):
    """subset: main, or socratic with a question before each step; split: train or test."""

    def __init__(self, subset: str, split: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rows = load_rows("openai/gsm8k", subset, split, columns=("question", "answer"))

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        return {"messages": [{"role": "user", "content": row["question"]},
                             {"role": "assistant", "content": split_calls(row["answer"])}]}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """The number after #### must be the reference's, as text."""
        return extract_answer(answer) == extract_answer(get_reference(conversation))

    def reward(self, conversation: dict, answer: str) -> float:
        return float(self.evaluate(conversation, answer))


def split_calls(answer: str) -> list[dict]:
    """The parts of a published solution: text, and each calculation as a call with its output.

    The output is the calculator's own, which is what a model will meet: about 3 of 100 were published otherwise, as
    16.00 or .4 or 3/4.
    """
    pieces, parts = CALL.split(answer), []
    for text, call, published in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        output = (calculate(call) or published) if call else published
        parts += [{"type": "text", "text": text}, {"type": "python", "text": call},
                  {"type": "python_output", "text": output}]
    return [part for part in parts if part["text"]]
