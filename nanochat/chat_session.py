"""One person's conversation with a model: what was said, token by token, and what of it the next answer sees.

    session = ChatSession(engine, context_tokens=2048)
    with contextlib.closing(session.ask("Why is the sky blue?", max_tokens=256)) as events:
        for event in events:            # may be left at any time: what has come so far is kept as the answer
            print(event.text, end="")

An answer stays the tokens that the model wrote: so the next prompt begins as the last one did, and the engine reads
only what is new (see engine.py).
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanochat.common import UserError, write_atomic
from nanochat.engine import Engine, Event, Request
from nanochat.prompts import Turn, build_prompt
from nanochat.engine_request import ChatTokens
from nanochat.tokenizer import check_messages

# What a model writes must not move a terminal's cursor, change its title or type for the person
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


class ChatSession:
    def __init__(self, engine: Engine, context_tokens: int, is_base: bool = False):
        """context_tokens: of prompt and answer together; a conversation that is longer loses its oldest turns
        is_base: the model knows no conversations; each question is a text that it continues
        """
        self.engine, self.tokenizer = engine, engine.tokenizer
        self.context_tokens, self.is_base = context_tokens, is_base
        self.system = ""              # stands before the first question that the model sees
        self.turns: list[Turn] = []
        self.num_dropped = 0          # turns that the last answer didn't see any more

    def ask(self, question: str, max_tokens: int, **sampling) -> Iterator[Event]:
        """The answer as it comes; ends early, and keeps what came, when it is closed. UserError at the first event."""
        prompt, self.num_dropped = self.build_prompt(question, max_tokens)
        max_tokens = min(max_tokens, self.context_tokens - len(prompt))
        request_id = self.engine.submit(Request(prompt, max_tokens=max_tokens, **sampling))
        turn = Turn(question, tokens=[])
        self.turns = [turn] if self.is_base else [*self.turns, turn]
        try:
            while self.engine.has_work():
                for event in self.engine.step():
                    self._keep(turn, event)
                    yield event
        finally:
            self.engine.cancel(request_id)

    def build_prompt(self, question: str, max_tokens: int) -> tuple[list[int], int]:
        """The tokens to continue, and how many of the oldest turns had to be left out for them to fit."""
        turns = [] if self.is_base else self.turns
        return build_prompt(self.tokenizer, self.system, [*turns, Turn(question)], self.context_tokens, max_tokens,
                            self.is_base)

    def _keep(self, turn: Turn, event: Event) -> None:
        chat = self.engine.chat_tokens
        if event.token not in chat.end_tokens:
            turn.tokens.append(event.token)
        if event.token in (chat.python_start, chat.output_start) or event.text and (
                not turn.parts or turn.parts[-1]["type"] != event.part):
            turn.parts.append({"type": event.part, "text": ""})
        if event.text:
            turn.parts[-1]["text"] += event.text

    def save(self, path: Path) -> None:
        """Write the conversation as one line of training data; turns whose question or answer is empty are left out."""
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
        """Go on with a saved conversation; a last question without an answer is left out."""
        try:
            text = path.read_text(encoding="utf-8")
            conversation = json.loads(text)
            check_messages(conversation)
            json.dumps(conversation, ensure_ascii=False).encode()  # a lone surrogate may stand in JSON, but isn't text
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror}); name a file that was saved") from None
        except ValueError as error:
            raise UserError(f"{path} holds no conversation ({error}); name a file that was saved") from None
        messages = conversation["messages"]
        self.system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        messages = [message for message in messages if message["role"] != "system"]
        self.turns, self.num_dropped = [], 0
        for question, answer in zip(messages[::2], messages[1::2], strict=False):
            content = answer["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            self.turns.append(Turn(question["content"], parts))


def format_answer(events: Iterable[Event], chat_tokens: ChatTokens, is_terminal: bool) -> Iterator[str]:
    """An answer's text as it comes, its calculator calls as [34*27 = 918], on a terminal in a quieter colour."""
    part = "text"
    begin, end = ("\x1b[2m[", "]\x1b[0m") if is_terminal else ("[", "]")
    for event in events:
        if part != "text" and (event.part == "text" or event.token == chat_tokens.python_start):
            is_apart = event.part == "text" and event.text[:1].isalnum()  # a word, and the model left no blank
            yield f"{end} " if is_apart else end
            part = "text"
        if event.part != part:
            yield " = " if part == "python" else begin
            part = event.part
        if event.text:
            yield event.text.translate(CONTROLS) if is_terminal else event.text
    if part != "text":
        yield end
