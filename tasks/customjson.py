"""A person's own conversations, one per line of a .jsonl or .jsonl.gz file.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
"""

from pathlib import Path

from nanochat.common import UserError
from nanochat.conversations import parse_messages
from tasks.common import Task
from tasks.rows import JsonLines


class CustomJSON(Task):
    """Conversations of a file. The first bad line raises UserError with file, line and reason."""

    def __init__(self, path: str | Path, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rows = JsonLines(Path(path).expanduser())
        for index in range(len(self.rows)):
            try:
                parse_conversation(self.rows[index])
            except ValueError as error:
                raise UserError(f"{self.rows.where(index)}: {error}; correct or remove the line") from None

    def get_example(self, index: int) -> dict:
        return parse_conversation(self.rows[index])


def parse_conversation(row: object) -> dict:
    """The conversation of one row; ValueError with the reason where the format is broken."""
    return {"messages": parse_messages(row["messages"] if isinstance(row, dict) and "messages" in row else row)}
