"""HumanEval: Python functions to be written from their docstrings (arXiv 2107.03374); graded by running their tests."""

import re
from collections.abc import Sequence

from nanochat.common import count_cpus, count_local_ranks
from nanochat.execution import execute_code, execute_many
from tasks.common import Task
from tasks.rows import load_rows

TIMEOUT_SECONDS  = 5.0
MAX_MEMORY_BYTES = 2**28
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


class HumanEval(Task):
    """164 functions, all of them tests."""

    grade_batch = 16    # programs that run side by side

    def __init__(self, split: str = "test", **kwargs) -> None:
        super().__init__(**kwargs)
        self.rows = load_rows("openai/openai_humaneval", "openai_humaneval", split,
                              columns=("prompt", "canonical_solution", "test", "entry_point"))

    def get_example(self, index: int) -> dict:
        row = self.rows[index]
        return {"messages": [{"role": "user", "content": row["prompt"]},
                             {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]}],
                "entry_point": row["entry_point"], "test": row["test"]}

    def evaluate(self, conversation: dict, answer: str) -> bool:
        """Whether the function passes its tests, run in the sandbox."""
        return self.grade([conversation], [answer]) == [1.0]

    def grade(self, conversations: Sequence[dict], answers: Sequence[str], allow_unsafe: bool = False) -> list[float]:
        programs = [build_program(conversation["messages"][0]["content"], answer, conversation["test"],
                                  conversation["entry_point"])
                    for conversation, answer in zip(conversations, answers, strict=True)]
        # A program's time is wall-clock time, so the ranks of a machine share its cores
        num_workers = max(1, count_cpus() // count_local_ranks())
        results = execute_many(programs, TIMEOUT_SECONDS, MAX_MEMORY_BYTES, allow_unsafe, num_workers)
        return [float(result.success) for result in results]

    def check_grading(self, allow_unsafe: bool) -> None:
        execute_code("", allow_unsafe=allow_unsafe)


def build_program(prompt: str, answer: str, test: str, entry_point: str) -> str:
    """The program that fails unless `answer` is right: the body that continues the prompt, or the whole function.

    A whole function replaces the prompt's, which has a docstring and so is complete; the prompt's imports and helpers
    stay in either case. Of an answer with a ``` fence only the code inside counts.
    """
    fenced = FENCE.search(answer)
    code = fenced[1] if fenced else answer
    return f"{prompt.rstrip()}\n{code}\n\n{test}\n\ncheck({entry_point})\n"
