"""A person's own conversations, a row of a file each: .jsonl, .ndjson, .json, .csv (also .gz and .zst) or .parquet.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]

or a row of another common form, see nanochat.conversations. A row that is no conversation is left out and counted.
"""

import copy
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common import UserError
from nanochat.conversations import OPENAI, is_output, read_row
from tasks.common import Task
from tasks.rows import read_rows

UNEXPECTED_FRAC = 0.05    # of the rows: more left out is a warning of its own
MAX_NUMBERS = 5           # of lines named for each reason
MAX_REASONS = 10          # shown and kept in the records; all rows are counted


@dataclass
class RowAccount:
    """What became of the rows of a file: every one is kept or left out."""
    file:     str
    unit:     str        # what is numbered: "line" or "row"
    rows:     int = 0
    kept:     int = 0
    reasons:  dict[str, list[int]] = field(default_factory=dict)     # why rows were left out -> their numbers
    forms:    Counter[str] = field(default_factory=Counter)          # of the kept rows
    unused:   Counter[str] = field(default_factory=Counter)          # fields that are not read, by the rows with them
    unlearned: int = 0    # kept rows in which an answer is read, but not learned: it has weight 0, or no text

    def to_json(self) -> dict:
        """For the records of a run, bounded in size."""
        reasons = {reason: {"rows": len(numbers), "numbers": numbers[:MAX_NUMBERS]}
                   for reason, numbers in list(self.reasons.items())[:MAX_REASONS]}
        return vars(self) | {"left_out": self.rows - self.kept, "reasons": reasons, "forms": dict(self.forms),
                             "unused": dict(self.unused.most_common(MAX_REASONS))}

    def describe(self) -> list[str]:
        """Lines for a person; the warning comes last."""
        left_out = self.rows - self.kept
        lines = [f"{self.file}: {self.kept:,} conversations in {self.rows:,} rows"]
        lines += [f"{self.file}: converted from {form}: {number:,} rows" for form, number in self.forms.items()
                  if form != OPENAI]
        for reason, numbers in list(self.reasons.items())[:MAX_REASONS]:
            more = f" and {len(numbers) - MAX_NUMBERS:,} more" if len(numbers) > MAX_NUMBERS else ""
            lines.append(f"{self.file}: left out {self.unit} "
                         f"{', '.join(map(str, numbers[:MAX_NUMBERS]))}{more}: {reason}")
        if others := list(self.reasons.values())[MAX_REASONS:]:
            lines.append(f"{self.file}: left out {sum(map(len, others)):,} rows more for {len(others):,} other reasons")
        if self.unused:
            lines.append(f"{self.file}: not read: " + ", ".join(
                f"{name} ({number:,} rows)" for name, number in self.unused.most_common(MAX_REASONS)))
        if self.unlearned:
            lines.append(f"{self.file}: {self.unlearned:,} conversations have an answer that is read, but not learned: "
                         "its weight is 0, or it has no text")
        if left_out > UNEXPECTED_FRAC * self.rows:
            lines.append(f"WARNING: {left_out / self.rows:.0%} of the rows of {self.file} were left out ({left_out:,} "
                         f"of {self.rows:,}); the reasons stand above")
        return lines


class CustomJSON(Task):
    """The conversations of a file; UserError where there is none."""

    def __init__(self, path: str | Path, **kwargs) -> None:
        super().__init__(**kwargs)
        path = Path(path).expanduser()
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
            raise UserError(f"{path} holds no conversation; {self.rows.unit} {numbers[0]}: {reason}")

    def add_row(self, index: int) -> None:
        """Count a row that is a conversation; ValueError for any other."""
        row, account = read_row(self.rows[index]), self.account
        self.indices.append(index)
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
