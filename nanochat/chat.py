"""Conversations as prompts, for the server and the terminal, and the session of a terminal.

The session stores each answer as the tokens that the model wrote, since encoding its text anew may give other tokens.
So the next prompt begins with the tokens of the last one, and the engine prefills only what is new (see engine.py).
"""

import bisect
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common import UserError, write_atomic
from nanochat.engine import ChatTokens, Engine, Event, Request
from nanochat.tokenizer import check_messages

ANSWER_SHARE = 4  # 1 / this of the context is reserved for the answer, at most; assumption, not studied
# Control characters of an answer must not move a terminal's cursor, change its title or type for the person
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


@dataclass
class Turn:
    """A question and its answer."""
    question: str
    parts:    list[dict] = field(default_factory=list)  # the answer, as in a conversation
    tokens:   list[int] | None = None                   # the answer without its end token; None: the parts are encoded


class NoRoom(UserError):
    """The prompt leaves no room for an answer."""


def build_prompt(tokenizer, system: str, turns: Sequence[Turn], context_tokens: int, max_tokens: int,
                 is_base: bool) -> tuple[list[int], int]:
    """(tokens of the prompt for an answer to the last turn, number of the oldest turns dropped to make it fit).

    The system message and the last question are never dropped; NoRoom where they alone are too long.

    max_tokens: of the answer; room is made for as many, up to a share of the context
    is_base:    a base model knows no conversations: its prompt is their texts, separated by blank lines
    """
    render = render_texts if is_base else render_turns
    limit = context_tokens - min(max_tokens, context_tokens // ANSWER_SHARE)
    tokens, num_dropped = render(tokenizer, system, turns), 0
    if len(tokens) > limit:  # the length falls with the number of dropped turns, so it can be bisected
        num_dropped = bisect.bisect_left(range(len(turns) - 1), True, key=lambda number: len(
            render(tokenizer, system, turns[number:])) <= limit)
        tokens = render(tokenizer, system, turns[num_dropped:])
    check_context(tokens, context_tokens)
    return tokens, num_dropped


def render_turns(tokenizer, system: str, turns: Sequence[Turn]) -> list[int]:
    """A conversation in the chat format of training, up to the start of the last turn's answer."""
    tokens = []
    for turn in turns:
        messages = [{"role": "system", "content": system}] if system and not tokens else []
        messages.append({"role": "user", "content": turn.question})
        question = tokenizer.render_for_completion({"messages": messages})
        tokens += question[1:] if tokens else question  # one bos per conversation, not per turn
        if turn is turns[-1]:
            return tokens
        answer = turn.tokens
        if answer is None:
            messages.append({"role": "assistant", "content": turn.parts})
            answer = tokenizer.render_conversation({"messages": messages}, max_tokens=None)[0][len(question):-1]
        tokens += [*answer, tokenizer.encode_special("<|assistant_end|>")]


def render_texts(tokenizer, system: str, turns: Sequence[Turn]) -> list[int]:
    """The texts of a conversation as one document, for a base model."""
    texts = [system] if system else []
    for turn in turns:
        texts += [turn.question, "".join(part["text"] for part in turn.parts)]
    return tokenizer.encode("\n\n".join(texts[:-1]), prepend=tokenizer.get_bos_token_id())


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
        turn = Turn(question, tokens=[])
        self.turns = [turn] if self.is_base else [*self.turns, turn]
        try:
            while self.engine.has_work():
                for event in self.engine.step():
                    if event.token not in self.engine.end_tokens:
                        turn.tokens.append(event.token)
                    extend_parts(turn.parts, event, self.engine.chat_tokens)
                    yield event
        finally:
            self.engine.cancel(request_id)

    def build_prompt(self, question: str, max_tokens: int) -> tuple[list[int], int]:
        """(tokens of the prompt, number of the oldest turns dropped to make it fit)."""
        turns = [] if self.is_base else self.turns
        return build_prompt(self.tokenizer, self.system, [*turns, Turn(question)], self.context_tokens, max_tokens,
                            self.is_base)

    def save(self, path: Path) -> None:
        """Write the conversation as one line of training data, without turns whose question or answer is empty."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            parts = [part for part in turn.parts if part["text"].strip() or part["type"] == "python_output"]
            if turn.question.strip() and parts:
                is_text = [part["type"] for part in parts] == ["text"]
                messages += [{"role": "user", "content": turn.question},
                             {"role": "assistant", "content": parts[0]["text"] if is_text else parts}]
        if not messages or messages[-1]["role"] == "system":
            raise UserError("there is nothing to save yet")
        try:
            if path.exists():
                raise UserError(f"{path} exists; save under another name")
            write_atomic(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{path} can't be written ({error.strerror}); save elsewhere") from None

    def load(self, path: Path) -> None:
        """Continue a saved conversation, without a last question that has no answer."""
        try:
            conversation = json.loads(path.read_text(encoding="utf-8"))
            check_messages(conversation)
            json.dumps(conversation, ensure_ascii=False).encode()  # lone surrogates are valid JSON, but not text
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}); name a saved file") from None
        except ValueError as error:
            raise UserError(f"{path} holds no conversation ({error}); name a saved file") from None
        messages = conversation["messages"]
        self.system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        contents = [message["content"] for message in messages if message["role"] != "system"]
        self.turns, self.num_dropped = [], 0
        for question, answer in zip(contents[::2], contents[1::2], strict=False):
            self.turns.append(Turn(question, [{"type": "text", "text": answer}] if isinstance(answer, str) else answer))


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
