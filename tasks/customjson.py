"""A person's own conversations, one per line of a .jsonl or .jsonl.gz file.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
"""

from pathlib import Path

from nanochat.common import UserError, expand_home
from nanochat.tokenizer import check_messages
from tasks.common import Task
from tasks.rows import JsonLines


class CustomJSON(Task):
    """Conversations of a file. The first bad line raises UserError with file, line and reason."""

    def __init__(self, path: str | Path, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rows = JsonLines(expand_home(path))
        for index in range(len(self.rows)):
            try:
                parse_conversation(self.rows[index])
            except ValueError as error:
                raise UserError(f"{self.rows.where(index)}: {error}; correct or remove the line") from None

    def get_example(self, index: int) -> dict:
        return parse_conversation(self.rows[index])


def parse_conversation(row: object) -> dict:
    """The conversation of one row; ValueError with the reason where the format is broken."""
    conversation = {"messages": row["messages"] if isinstance(row, dict) and "messages" in row else row}
    check_messages(conversation)
    for i, message in enumerate(conversation["messages"]):
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            part["text"].encode()   # a lone surrogate can stand in JSON, but it is no text
        # an output may be empty: some calls print nothing
        if not parts or any(not part["text"].strip() for part in parts if part["type"] != "python_output"):
            raise ValueError(f"the content of message {i} ({message['role']}) is empty")
    return conversation
