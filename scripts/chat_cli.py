"""Talk to a model in the terminal: a chat model answers, a base model continues the text.

    python -m scripts.chat_cli                                      # the last trained stage
    python -m scripts.chat_cli -i base -p "The capital of France is" --max-tokens 32
    cat questions.txt | python -m scripts.chat_cli > answers.txt    # each line is a message of one conversation

Messages of several lines stand between two lines of three double quotes. Lines that begin with / and a word are
commands, in a pipe too; /help lists them. Ctrl-C stops an answer; at the prompt, two of them or Ctrl-D leave. Calls of
the calculator are shown as [34*27 = 918]. The base folder's chat_history keeps the typed lines.

The session keeps each answer as the tokens that the model wrote, since encoding its text anew may give other tokens. So
the next prompt begins with the tokens of the last one, and the engine prefills only what is new (see engine.py).
"""

import argparse
import contextlib
import io
import json
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nanochat.checkpoint_manager import add_model_flags, load_for
from nanochat.command_line import Parser, add_compute_flags, run_script
from nanochat.common import UserError, expand_home, get_base_dir, write_atomic
from nanochat.conversations import (
    OPENAI,
    Turn,
    build_prompt,
    extend_parts,
    get_parts,
    get_text,
    join_texts,
    read_row,
    split_turns,
)
from nanochat.engine import ChatTokens, Engine, Event, Request

HELP = '''/new                 forget the conversation
/system TEXT         set the system message; without TEXT, remove it
/temperature NUMBER  0 = greedy
/save FILE           write the conversation as one line of JSON, the format of training data
/load FILE           continue a saved conversation
/quit                leave, as Ctrl-D does
"""                  begins and ends a message of several lines; Ctrl-C stops an answer'''
MAX_HISTORY_LINES = 1000
# Control characters of an answer must not move a terminal's cursor, change its title or type for the person
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_model_flags(parser)
    add_compute_flags(parser)
    add("-t", "--temperature", type=float, default=0.6, help="0 = greedy")
    add("-k", "--top-k", type=int, default=50, help="sample among the k likeliest tokens; 0 = all tokens")
    add("-p", "--prompt", type=str, help="answer this and end")
    add("--max-tokens", type=int, default=256, help="length of an answer in tokens, at most")
    add("--seed", type=int, default=42, help="seed of the first answer; each further answer adds 1")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    for stream in (sys.stdin, sys.stdout):  # a pipe may hold invalid text, a terminal may lack characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    model, tokenizer, meta, place = load_for(args.source, args.model_tag, args.step, args.dtype, args.device_type)
    stage = meta["stage"]
    session = ChatSession(Engine(model, tokenizer), model.config.sequence_len, is_base=stage == "base")
    chat = {"temperature": args.temperature, "top_k": args.top_k, "max_tokens": args.max_tokens, "seed": args.seed}
    interactive = args.prompt is None and sys.stdin.isatty()
    say(f"{stage} model {Path(meta['run_dir']).name}, step {meta['step']}, {place}")
    if interactive:
        say("/help lists the commands; anything else goes to the model")

    ctrl_c = CtrlC(interactive)
    lines = type_lines(ctrl_c) if interactive else (line.rstrip("\n") for line in sys.stdin)
    num_answers = num_tokens = 0
    for text, may_command in [(args.prompt, False)] if args.prompt is not None else read_messages(lines, interactive):
        if may_command and re.fullmatch(r"/quit(\s.*)?", text.strip()):
            break
        try:
            if may_command and (command := re.fullmatch(r"/(\w+)(?:\s+(.*))?", text.strip())):
                say(run_command(session, chat, command[1], command[2] or ""))
            elif not may_command or text.strip():
                show_answer(session, chat, text, ctrl_c)
                num_answers, num_tokens = num_answers + 1, num_tokens + len(session.turns[-1].tokens)
                chat["seed"] += 1
        except UserError as error:
            if not interactive:
                raise
            say(f"error: {error}")
    return {"source": stage, "step": meta["step"], "num_answers": num_answers, "num_tokens": num_tokens}


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

    def ask(self, question: str, max_tokens: int, is_cut: Callable[[], bool] = lambda: False,
            **fields_of_request) -> Iterator[Event]:
        """The answer, token by token, until it is cut; closing it early keeps the tokens so far, too. UserError at the
        first event."""
        prompt, self.num_dropped = self.build_prompt(question, max_tokens)
        max_tokens = min(max_tokens, self.context_tokens - len(prompt))
        request_id = self.engine.submit(Request(prompt, max_tokens=max_tokens, **fields_of_request))
        self.turns = self.add_question(question)
        turn, parts = self.turns[-1], []
        turn.answers, turn.tokens = [{"role": "assistant", "content": parts}], []
        try:
            while self.engine.has_work() and not is_cut():    # a long prompt is read in steps without events
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


class CtrlC:
    """Handler of Ctrl-C in a terminal: KeyboardInterrupt at the prompt, `was_pressed` anywhere else.

    So it never interrupts a step of the engine, and never ends the program by bad timing.
    """

    def __init__(self, interactive: bool):
        self.is_typing = self.was_pressed = False
        if interactive:
            signal.signal(signal.SIGINT, self._press)

    def _press(self, *_) -> None:
        if self.is_typing:
            raise KeyboardInterrupt
        self.was_pressed = True


def read_messages(lines: Iterator[str | None], interactive: bool) -> Iterator[tuple[str, bool]]:
    """(message, whether it may be a command) per line; lines between quotes are one message, None discards it."""
    block = None  # lines since the opening quotes
    for line in lines:
        if line is None:  # Ctrl-C
            block = None
        elif line.strip() == '"""':
            if block is not None:
                yield "\n".join(block), False
            block = [] if block is None else None
        elif block is None:
            yield line, True
        else:
            block.append(line)
    if block is not None and not interactive:
        raise UserError('the input ends within a message of several lines; end it with a line of """')


def type_lines(ctrl_c: CtrlC) -> Iterator[str | None]:
    """Typed lines, None for Ctrl-C; ends at Ctrl-D or a second Ctrl-C."""
    with open_history():
        num_interrupts = 0
        while num_interrupts < 2:
            try:
                ctrl_c.is_typing = True
                if not sys.stdout.isatty():  # input() would write its prompt between the answers
                    print("> ", end="", file=sys.stderr, flush=True)
                line = input("> " if sys.stdout.isatty() else "")
                num_interrupts = 0
            except EOFError:
                say("")
                return
            except KeyboardInterrupt:
                line, num_interrupts = None, num_interrupts + 1
                say("" if num_interrupts > 1 else "\nCtrl-C once more, or Ctrl-D, leaves")
            finally:
                ctrl_c.is_typing = False
            yield line


@contextlib.contextmanager
def open_history() -> Iterator[None]:
    """Line editing with a history of all sessions, where this Python has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    path = get_base_dir() / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(MAX_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)


def show_answer(session: ChatSession, chat: dict, text: str, ctrl_c: CtrlC) -> None:
    """Print an answer as it is generated, up to its end or to Ctrl-C."""
    num_dropped = session.num_dropped
    ctrl_c.was_pressed = False
    with contextlib.closing(session.ask(text, is_cut=lambda: ctrl_c.was_pressed, **chat)) as events:
        for piece in format_answer(events, session.engine.chat_tokens, sys.stdout.isatty()):
            print(piece, end="", flush=True)
    print(flush=True)
    if session.num_dropped > num_dropped:
        turns = "turn" if session.num_dropped == 1 else f"{session.num_dropped} turns"
        say(f"the conversation is longer than the model can read: it no longer sees the oldest {turns}")


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


def run_command(session: ChatSession, chat: dict, name: str, value: str) -> str:
    """Run a command; returns the message for the person."""
    if session.is_base and name in ("system", "save", "load"):
        raise UserError(f"/{name} is for chat models; a base model holds no conversation")
    if name in ("help", "new") and value:
        raise UserError(f"/{name} takes nothing after it; a message that begins with / stands between lines of "
                        '"""')
    if name == "help":
        return HELP
    if name == "new":
        session.turns, session.num_dropped = [], 0
        return "a new conversation"
    if name == "system":
        session.system = value
        return "the system message is set" if value else "there is no system message"
    if name == "temperature":
        if not re.fullmatch(r"\d*\.?\d+", value):
            raise UserError(f"/temperature wants a number of 0 or more, not {value!r}; it is {chat['temperature']:g}")
        chat["temperature"] = float(value)
        return f"temperature {chat['temperature']:g}"
    if name in ("save", "load"):
        if not value:
            raise UserError(f"/{name} wants the name of a file, as in /{name} talk.jsonl")
        path = expand_home(value)
        notes = (session.save if name == "save" else session.load)(path) or []
        return "; ".join([f"{'saved' if name == 'save' else 'loaded'} {len(session.turns)} turns, {path}", *notes])
    raise UserError(f"there is no command /{name}; /help lists them, and a message that begins with / stands between "
                    'lines of """')


def say(message: str) -> None:
    """A message to the person, beside the answers on stdout."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_script(main)
