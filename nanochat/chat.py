"""Conversations as prompts, for the server and the terminal, and the session of a terminal.

The session stores each answer as the tokens that the model wrote, since encoding its text anew may give other tokens.
So the next prompt begins with the tokens of the last one, and the engine prefills only what is new (see engine.py).
"""

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from nanochat.common import UserError, write_atomic
from nanochat.conversations import OPENAI, Turn, get_parts, get_text, join_texts, read_row, split_turns
from nanochat.engine import ChatTokens, Engine, Event, Request

ANSWER_SHARE = 4  # 1 / this of the context is reserved for the answer, at most; assumption, not studied
# Control characters of an answer must not move a terminal's cursor, change its title or type for the person
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


class NoRoom(UserError):
    """The prompt leaves no room for an answer."""


def build_prompt(tokenizer, system: str, turns: Sequence[Turn], context_tokens: int, max_tokens: int,
                 is_base: bool) -> tuple[list[int], int]:
    """(tokens of the prompt for an answer to the last turn, number of the oldest turns dropped to make it fit).

    The system message and the last question are never dropped; NoRoom where they alone are too long.

    max_tokens: of the answer; room is made for as many, up to a share of the context
    is_base:    a base model knows no conversations: its prompt is their texts, separated by blank lines
    """
    def render(num_dropped: int) -> list[int]:
        if is_base:
            return render_texts(tokenizer, system, turns[num_dropped:])
        return tokenizer.render_turns(system, turns[num_dropped:], is_prompt=True)[0]

    limit = context_tokens - min(max_tokens, context_tokens // ANSWER_SHARE)
    tokens, num_dropped = render(0), 0
    if len(tokens) > limit:  # the length falls with the number of dropped turns, so it can be bisected
        num_dropped = bisect.bisect_left(range(len(turns) - 1), True, key=lambda number: len(render(number)) <= limit)
        tokens = render(num_dropped)
    check_context(tokens, context_tokens)
    return tokens, num_dropped


def render_texts(tokenizer, system: str, turns: Sequence[Turn]) -> list[int]:
    """The texts of a conversation as one document, for a base model."""
    texts = [system]
    for turn in turns:
        texts += [turn.question, *map(get_text, turn.answers)]
    return tokenizer.encode(join_texts(texts), prepend=tokenizer.get_bos_token_id())


def check_context(tokens: Sequence[int], context_tokens: int) -> None:
    """NoRoom where a prompt leaves no room for an answer."""
    if len(tokens) >= context_tokens:
        raise NoRoom(f"{len(tokens)} tokens leave no room for an answer in this model's context of {context_tokens}; "
                     "shorten the text")


def extend_parts(parts: list[dict], event: Event, chat_tokens: ChatTokens) -> None:
    """Add a new token of an answer to the answer's parts."""
    starts_tool = event.token in (chat_tokens.python_start, chat_tokens.output_start)
    if starts_tool or event.text and (not parts or parts[-1]["type"] != event.part):
        parts.append({"type": event.part, "text": ""})
    if event.text:
        parts[-1]["text"] += event.text


class ChatSession:
    """A conversation in a terminal."""

    def __init__(self, engine: Engine, context_tokens: int, is_base: bool = False):
        """context_tokens: of prompt and answer together; a longer conversation loses its oldest turns
        is_base: the model knows no conversations; each question is a text that it continues
        """
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.context_tokens, self.is_base = context_tokens, is_base
        self.system = ""              # system message
        self.turns: list[Turn] = []
        self.num_dropped = 0          # turns that were dropped from the last prompt

    def ask(self, question: str, max_tokens: int, **fields_of_request) -> Iterator[Event]:
        """The answer, token by token; closing it early keeps the tokens so far. UserError at the first event."""
        prompt, self.num_dropped = self.build_prompt(question, max_tokens)
        max_tokens = min(max_tokens, self.context_tokens - len(prompt))
        request_id = self.engine.submit(Request(prompt, max_tokens=max_tokens, **fields_of_request))
        self.turns = self.add_question(question)
        turn, parts = self.turns[-1], []
        turn.answers, turn.tokens = [{"role": "assistant", "content": parts}], []
        try:
            while self.engine.has_work():
                for event in self.engine.step():
                    if event.token not in self.engine.end_tokens:
                        turn.tokens.append(event.token)
                    extend_parts(parts, event, self.engine.chat_tokens)
                    yield event
        finally:
            self.engine.cancel(request_id)

    def build_prompt(self, question: str, max_tokens: int) -> tuple[list[int], int]:
        """(tokens of the prompt, number of the oldest turns dropped to make it fit)."""
        return build_prompt(self.tokenizer, self.system, self.add_question(question), self.context_tokens, max_tokens,
                            self.is_base)

    def add_question(self, question: str) -> list[Turn]:
        """The turns with one more question, or with a longer last one where that has no answer yet."""
        if self.is_base:
            return [Turn(question)]
        if not question:
            raise UserError("the message is empty; write a text")
        if self.has_open_question():
            return [*self.turns[:-1], Turn(join_texts([self.turns[-1].question, question]))]
        return [*self.turns, Turn(question)]

    def has_open_question(self) -> bool:
        """Whether the last question has no answer, as in a file that ends with it."""
        return bool(self.turns) and not self.turns[-1].answers

    def save(self, path: Path) -> None:
        """Write the conversation as one line of training data."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.question}] if turn.question else []
            messages += map(simplify, turn.answers)
        if not self.turns:
            raise UserError("there is nothing to save yet")
        try:
            if path.exists():
                raise UserError(f"{path} exists; save under another name")
            write_atomic(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror}); save elsewhere") from None

    def load(self, path: Path) -> list[str]:
        """Continue a saved conversation; returns what a person should know of how it was read."""
        try:
            row = read_row(json.loads(path.read_text(encoding="utf-8-sig")))
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}); name a saved file") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} doesn't hold one conversation ({error}); name a saved file") from None
        self.system, turns = split_turns(row.messages)
        self.turns, self.num_dropped = [turn for turn in turns if turn.num_messages], 0
        notes = [f"converted from {row.form}"] if row.form != OPENAI else []
        notes += [f"not read: {', '.join(sorted(row.unused))}"] if row.unused else []
        open_question = "its last question has no answer, the next message is added to it"
        return [*notes, open_question] if self.has_open_question() else notes


def simplify(message: dict) -> dict:
    """A message with text as its content, where that is one part of text, or none."""
    parts = get_parts(message)
    if len(parts) > 1 or any(part["type"] != "text" for part in parts):
        return message
    return message | {"content": get_text(message)}


def format_answer(events: Iterable[Event], chat_tokens: ChatTokens, is_terminal: bool) -> Iterator[str]:
    """The text of an answer, piece by piece, with tool calls as [34*27 = 918]; dimmed in a terminal."""
    part = "text"
    begin, end = ("\x1b[2m[", "]\x1b[0m") if is_terminal else ("[", "]")
    for event in events:
        if part != "text" and (event.part == "text" or event.token == chat_tokens.python_start):
            needs_space = event.part == "text" and event.text[:1].isalnum()  # the model wrote none before the word
            yield f"{end} " if needs_space else end
            part = "text"
        if event.part != part:
            yield " = " if part == "python" else begin
            part = event.part
        if event.text:
            yield event.text.translate(CONTROLS) if is_terminal else event.text
    if part != "text":
        yield end
