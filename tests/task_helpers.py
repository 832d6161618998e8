"""What the tests of tasks share: files of rows, words, the generated tasks and their digest."""

import hashlib
import json
from pathlib import Path

from tasks.arithmetic import Arithmetic
from tasks.embedded import Identity
from tasks.spellingbee import SimpleSpelling, SpellingBee

REPO_DIR = Path(__file__).parents[1]
WORDS = ["strawberry", "banana", "mississippi", "apple", "harbour", "quay", "yellow", "winter", "letter", "cloud",
         "engine", "garden", "pepper", "silver", "ribbon", "coffee", "rabbit", "summer", "tunnel", "window", "zebra",
         "orange", "purple", "basket", "cotton", "dinner", "flower", "guitar", "hammer", "island", "jacket", "kitten"]


def parts_of(conversation):
    content = conversation["messages"][-1]["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def decode_answer(conversation):
    """The reference answer as the engine's tokens would be decoded."""
    forms = {"text": "{}", "python": "<|python_start|>{}<|python_end|>",
             "python_output": "<|output_start|>{}<|output_end|>"}
    return "".join(forms[part["type"]].format(part["text"]) for part in parts_of(conversation))


def make_tasks(split, size=2000):
    return [SimpleSpelling(split, size, words=WORDS), SpellingBee(split, size, words=WORDS), Arithmetic(split, size),
            Identity(split, size)]


def digest(tasks):
    return hashlib.sha256(json.dumps([[task[i] for i in (0, 1, 77, 1999)] for task in tasks]).encode()).hexdigest()


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
