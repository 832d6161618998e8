"""A person's own conversations, a row of a file each: .jsonl .ndjson .json .csv .tsv (also .gz and .zst), .parquet.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]

or a row of another common form: ShareGPT, alpaca, dolly, prompt and completion. The roles may be system, developer,
user, assistant and tool in any order, with OpenAI's tool calls; an answer with "weight": 0 is read, but not learned.
What system and user say in a row is one question, a call and its output are part of the answer
(nanochat.conversations).

The account, printed and kept in run.json and the report card, has the rows kept, rows left out and why, and fields that
are not read. Every twentieth conversation, the last ones of the file, is held out for validation (tasks.mixtures); of
fewer than 20 none is.
"""

import copy
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common import UserError, expand_home
from nanochat.conversations import OPENAI, TAKEN_FORMS, get_text, is_output, read_row
from tasks.common import Task
from tasks.rows import read_rows

UNEXPECTED_FRAC = 0.05    # of the rows: more left out is a warning of its own
VAL_ONE_IN = 20           # of the conversations is held out for validation, the last ones of the file
MAX_NUMBERS = 5           # of lines named for each reason
MAX_REASONS = 10          # shown and kept in the records; all rows are counted


@dataclass
class RowAccount:
    """What became of the rows of a file: every one is kept or left out."""
    file:       str
    unit:       str         # what is numbered: "line" or "row"
    rows:       int = 0
    kept:       int = 0
    characters: int = 0     # of the kept rows
    unlearned:  int = 0     # kept rows in which an answer is read, but not learned: it has weight 0, or no text
    reasons:    dict[str, list[int]] = field(default_factory=dict)     # why rows were left out -> their numbers
    forms:      Counter[str] = field(default_factory=Counter)          # of the kept rows
    unused:     Counter[str] = field(default_factory=Counter)          # fields that are not read, by the rows with them

    @property
    def left_out(self) -> int:
        return self.rows - self.kept

    def get_reasons(self) -> list[tuple[str, list[int]]]:
        """The commonest reasons, with the numbers of their rows."""
        return sorted(self.reasons.items(), key=lambda item: -len(item[1]))[:MAX_REASONS]

    def to_json(self) -> dict:
        """For the records of a run, bounded in size."""
        reasons = {reason: {"rows": len(numbers), "first": numbers[:MAX_NUMBERS]}
                   for reason, numbers in self.get_reasons()}
        return vars(self) | {"left_out": self.left_out, "reasons": reasons, "forms": dict(self.forms),
                             "unused": dict(self.unused.most_common(MAX_REASONS)), "lines": self.describe()}

    def describe(self) -> list[str]:
        """Lines for a person; the warning comes last."""
        lines = [f"{self.kept:,} conversations of {self.characters:,} characters in {self.rows:,} rows"]
        lines += [f"converted from {form}: {number:,} rows" for form, number in self.forms.items() if form != OPENAI]
        for reason, numbers in self.get_reasons():
            more = f" and {len(numbers) - MAX_NUMBERS:,} more" if len(numbers) > MAX_NUMBERS else ""
            lines.append(f"left out {self.unit} {', '.join(map(str, numbers[:MAX_NUMBERS]))}{more}: {reason}")
        if len(self.reasons) > MAX_REASONS:
            num_rows = self.left_out - sum(len(numbers) for _, numbers in self.get_reasons())
            lines.append(f"left out {num_rows:,} rows more for {len(self.reasons) - MAX_REASONS:,} other reasons")
        if self.unused:
            names = [f"{name} ({number:,} rows)" for name, number in self.unused.most_common(MAX_REASONS)]
            more = f" and {len(self.unused) - MAX_REASONS:,} other fields" if len(self.unused) > MAX_REASONS else ""
            lines.append(f"not read: {', '.join(names)}{more}")
        if self.unlearned:
            lines.append(f"{self.unlearned:,} conversations have an answer that is read, but not learned: its weight "
                         "is 0, or it has no text")
        if self.kept < VAL_ONE_IN:
            lines.append(f"no conversation is held out for validation: 1 of {VAL_ONE_IN} would be")
        lines = [f"{self.file}: {line}" for line in lines]
        if self.left_out > UNEXPECTED_FRAC * self.rows:
            lines.append(f"WARNING: {self.left_out / self.rows:.0%} of the rows of {self.file} were left out "
                         f"({self.left_out:,} of {self.rows:,}); the reasons stand above")
        return lines


class CustomJSON(Task):
    """The conversations of a file; UserError where there is none."""

    def __init__(self, path: str | Path, **kwargs) -> None:
        super().__init__(**kwargs)
        path = expand_home(path)
        self.rows, self.indices = read_rows(path), []    # indices: of the rows that are conversations
        self.account = RowAccount(path.name, self.rows.unit, len(self.rows))
        for index in range(len(self.rows)):
            try:
                self.add_row(index)
            except ValueError as error:      # JSON's, UTF-8's and ConversationError
                self.account.reasons.setdefault(explain(error), []).append(self.rows.numbers[index])
        self.account.kept = len(self.indices)
        if not self.indices:
            reason, numbers = next(iter(self.account.reasons.items()))
            raise UserError(f"{path} holds no conversation ({self.rows.unit} {numbers[0]}: {reason}); give rows of "
                            f"{TAKEN_FORMS}")

    def add_row(self, index: int) -> None:
        """Count a row that is a conversation; ValueError for any other."""
        row, account = read_row(self.rows[index]), self.account
        self.indices.append(index)
        account.characters += sum(len(get_text(message)) for message in row.messages)
        account.forms[row.form] += 1
        account.unused.update(row.unused)
        account.unlearned += any("weight" in message and not is_output(message) for message in row.messages)

    def cut(self, start: int, stop: int | None) -> "CustomJSON":
        """The conversations [start:stop], of the rows read before."""
        part = copy.copy(self)
        part.start, part.stop = start, stop
        return part

    def num_examples(self) -> int:
        return len(self.indices)

    def get_example(self, index: int) -> dict:
        return {"messages": read_row(self.rows[self.indices[index]]).messages}


def explain(error: ValueError) -> str:
    """Why a row was left out, without what differs from row to row."""
    return f"it is not JSON ({error.msg})" if hasattr(error, "msg") else str(error)
