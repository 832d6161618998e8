"""The one definition of a conversation, and the prompt made of it: training, the terminal, the server and export all
take the same ones.

A conversation comes as OpenAI's messages. Its normal form has one message for each of them, in their order:

    {"role": "system" | "user", "content": text}
    {"role": "assistant", "content": text, or parts {"type": a key of PARTS, "text": text}}
    "weight": 0 in an assistant message that is read, but not learned

Any order of the roles is one. A developer is a system; a call of a tool and the tool's output are parts of the
assistant's, as in the format of training. What system and user say in a row is one question, its texts joined by blank
lines, and what the assistant says in a row is one answer: `split_turns` is the only place that knows.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanochat.common import UserError, escape

if TYPE_CHECKING:
    from nanochat.engine import ChatTokens, Event

# The parts of an assistant's message: the name in their special tokens, and whether they are learned
PARTS = {"text": (None, 1), "python": ("python", 1), "python_output": ("output", 0)}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
         "function": "tool"}   # "function" is OpenAI's older name of a tool
CALCULATORS = ("python", "calculator")   # tools whose call is its one argument, an expression: nanochat's own
READ_FIELDS = {"assistant": {"role", "content", "parts", "refusal", "tool_calls", "function_call", "weight"},
               "tool": {"role", "content", "name", "tool_call_id"}}   # by role; of others role and content
SEPARATOR = "\n\n"      # between the texts of one turn
MAX_NAME_CHARS = 200    # of a row's fields in a message
ANSWER_SHARE = 4        # 1 / this of the context is reserved for the answer, at most; assumption, not studied


class ConversationError(UserError, ValueError):
    """What is wrong with a conversation, and where in its list of messages.

    index: of the message; None: the list itself is wrong
    field: of the message; "": the message itself is wrong
    """

    def __init__(self, reason: str, index: int | None = None, field: str = "") -> None:
        super().__init__(reason if index is None else f"message {index} {reason}")
        self.reason, self.index, self.field = reason, index, field


@dataclass
class Turn:
    """What is said to the assistant, and its answer."""
    question:     str                                        # "": the assistant begins the conversation
    answers:      list[dict] = field(default_factory=list)   # messages of the assistant; none: there is no answer yet
    tokens:       list[int] | None = None                    # the answer as the model wrote it, without its end token
    num_messages: int = 1                                    # that the turn is made of, without a leading system's


def parse_conversation(conversation: object) -> list[dict]:
    """The messages of {"messages": [...]} in normal form."""
    return parse_messages(conversation.get("messages") if isinstance(conversation, dict) else None)


def parse_messages(messages: object) -> list[dict]:
    """The normal form of a list of messages, which is its own normal form; ConversationError for what is none."""
    if not isinstance(messages, list) or not messages:
        raise ConversationError('a conversation is {"messages": [...]} with at least one message')
    return [parse_message(message, index) for index, message in enumerate(messages)]


def parse_message(message: object, index: int) -> dict:
    """The normal form of message `index`. A field that is null counts as absent, as tables need it."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ConversationError('is not {"role": ..., "content": ...}', index)
    role = ROLES.get(message["role"])
    if role is None:
        raise ConversationError(f"has role {message['role']!r:.100}; the roles are system, developer, user, assistant "
                                "and tool", index, "role")
    if role == "tool":
        output = {"type": "python_output", "text": read_text(message, index)}
        return {"role": "assistant", "content": [output], "weight": 0}
    if role == "assistant":
        return read_answer(message, index)
    text = read_text(message, index)
    if not text and role == "user":
        raise ConversationError("is empty; a user message needs a text", index, "content")
    return {"role": role, "content": text}


def read_answer(message: dict, index: int) -> dict:
    """The normal form of an assistant message. An answer without any text is read, but nothing is learned from it."""
    calls = read_calls(message, index)
    if not calls and not message.keys() & {"content", "parts"}:
        raise ConversationError('is not {"role": ..., "content": ...}', index)
    content = read_content(message, index)
    if calls:
        content = get_parts({"content": content}) * bool(content) + calls
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ConversationError(f"has weight {weight!r:.100}; it is 1, or 0 where the answer is not to be learned",
                                index, "weight")
    answer = {"role": "assistant", "content": content}
    return answer | ({"weight": 0} if weight == 0 or not get_text(answer).strip() else {})


def read_content(message: dict, index: int) -> str | list[dict]:
    """The content of an assistant message: text or parts, or "" for null."""
    content = message.get("content")
    if content in (None, ""):
        content = message.get("refusal") or ""
    if isinstance(content, list):
        content = [read_part(part, index, PARTS) for part in content]
    else:
        content = clean_text(check_content(content, index))
    if not message.get("parts"):
        return content
    # An answer of nanochat's server holds its calls in "parts" alone; one that was edited since, in its content
    parts = [read_part(part, index, PARTS) for part in check_list(message["parts"], index, "parts")]
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    return parts if content in ("", text) else content


def read_calls(message: dict, index: int) -> list[dict]:
    """The calls of OpenAI's `tool_calls`, and of its older `function_call`, as python parts."""
    calls = list(check_list(message.get("tool_calls") or [], index, "tool_calls"))
    if message.get("function_call"):
        calls.append({"function": message["function_call"]})
    parts = []
    for call in calls:
        match call:
            case {"function": {"name": str(name), "arguments": str() | dict() as arguments}}:
                parts.append({"type": "python", "text": clean_text(spell_call(name, arguments))})
            case _:
                raise ConversationError('has a tool call that is not {"function": {"name": ..., "arguments": ...}}',
                                        index, "tool_calls")
    return parts


def spell_call(name: str, arguments: str | dict) -> str:
    """A call of a tool as the text of a python part: NAME(ARGUMENTS), or the bare expression for the calculator."""
    if name in CALCULATORS:
        try:
            values = list((json.loads(arguments) if isinstance(arguments, str) else arguments).values())
        except (ValueError, AttributeError, RecursionError):
            values = []
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False, default=str)    # of parquet: dates
    return f"{name}({arguments})"


def read_text(message: dict, index: int) -> str:
    """The content of a message that holds text alone: a string, a list of text parts, or null."""
    if "content" not in message:
        raise ConversationError('is not {"role": ..., "content": ...}', index)
    content = "" if message["content"] is None else message["content"]
    if isinstance(content, list):
        return "".join(read_part(part, index, ("text",))["text"] for part in content)
    return clean_text(check_content(content, index))


def read_part(part: object, index: int, types: Sequence[str]) -> dict:
    """The normal form of a part of a content: its type and its text."""
    if isinstance(part, dict) and part.get("type") == "refusal" and "text" in types:
        part = {"type": "text", "text": part.get("refusal")}
    if not isinstance(part, dict) or part.get("type") not in list(types):
        kind = f" of type {part.get('type')!r:.100}" if isinstance(part, dict) else ""
        raise ConversationError(f"has a part{kind} in its content; it may have parts of the types {', '.join(types)}",
                                index, "content")
    if not isinstance(part.get("text"), str):
        raise ConversationError(f"has a {part['type']} part that holds no text", index, "content")
    return {"type": part["type"], "text": clean_text(part["text"])}


def check_content(value: object, index: int) -> str:
    """`value`, where it is a text."""
    if not isinstance(value, str):
        raise ConversationError(f"has a content that is {type(value).__name__}, not text or a list of parts", index,
                                "content")
    return value


def check_list(value: object, index: int, name: str) -> list:
    """`value`, where it is a list."""
    if not isinstance(value, list):
        raise ConversationError(f"has a {name} that is {type(value).__name__}, not a list", index, name)
    return value


def clean_text(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, which JSON may hold and UTF-8 can't."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def split_turns(messages: Sequence[dict]) -> tuple[str, list[Turn]]:
    """(the text of the leading system messages or "", the turns, at least one) of a conversation in normal form.

    The system message stands apart since it stays where the oldest turns are dropped; it is part of the first question.
    """
    num_leading = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns = []
    for message in messages[num_leading:]:
        if message["role"] == "assistant":
            turns = turns or [Turn("", num_messages=0)]
            turns[-1].answers.append(message)
            turns[-1].num_messages += 1
        elif turns and not (turns[-1].answers and message["content"]):
            turns[-1].question = join_texts([turns[-1].question, message["content"]])
            turns[-1].num_messages += 1
        else:
            turns.append(Turn(message["content"]))
    return join_texts(message["content"] for message in messages[:num_leading]), turns or [Turn("", num_messages=0)]


def join_texts(texts: Iterable[str]) -> str:
    """Texts as paragraphs; those without a character are no paragraphs."""
    return SEPARATOR.join(filter(None, texts))


def get_parts(message: dict) -> list[dict]:
    """The content of a message in normal form as a list of parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def get_text(message: dict) -> str:
    """The text of all parts of a message in normal form."""
    return "".join(part["text"] for part in get_parts(message))


def is_output(message: dict) -> bool:
    """Whether a message in normal form is what a tool answered, which is never learned."""
    return [part["type"] for part in get_parts(message)] == ["python_output"]


# Prompts and answers


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


# Rows of files

OPENAI = "OpenAI's messages"
# The speakers of ShareGPT's turns, {"from": ..., "value": ...}; others are taken as roles
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
                  "bing": "assistant", "bard": "assistant", "observation": "tool"}
# Name of a form -> the fields of its question, the first of them required, and that of its answer
PAIRS = {"alpaca": (("instruction", "input"), "output"), "dolly": (("instruction", "context"), "response"),
         "prompt and completion": (("prompt",), "completion")}
# Forms of which no answer is to be learned as it is: their fields, and what they are
OTHER_FORMS = {("chosen", "rejected"): "pairs of a better and a worse answer",
               ("preferred_output", "non_preferred_output"): "pairs of a better and a worse answer",
               ("prompt", "completion", "label"): "answers with a rating (KTO)"}
TAKEN_FORMS = ('{"messages": [{"role": ..., "content": ...}]}, ShareGPT\'s "conversations", alpaca\'s "instruction" '
               'and "output", or "prompt" and "completion"')


@dataclass(frozen=True)
class Row:
    """A conversation of a file."""
    form:     str           # OPENAI, or the form that it was converted from
    messages: list[dict]    # in normal form
    unused:   set[str]      # fields with a value that is not read


def read_row(row: object) -> Row:
    """A row of a file, whose form shows in its fields; ConversationError for what is no conversation.

    A field that is null counts as absent. Conversations may be text that is JSON, as in tables.
    """
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise ConversationError(f"a row that is {'null' if row is None else type(row).__name__} is no conversation")
    fields = {key: value for key, value in row.items() if value is not None}
    form, messages, used = convert_fields(fields)
    if isinstance(fields.get("system"), str) and isinstance(messages, list):
        messages, used = [{"role": "system", "content": fields["system"]}, *messages], used | {"system"}
    normal, unused = parse_messages(messages), {key for key in fields if key not in used and fields[key] != ""}
    for message in messages:
        role = ROLES[message["role"]]
        extra = message.keys() - READ_FIELDS.get(role, {"role", "content"})
        unused |= {f"{key} of {role} messages" for key in extra if message[key] not in (None, "", [], {})}
    if any("\ufffd" in get_text(message) for message in normal) and has_half_pairs(row):
        unused.add("halves of surrogate pairs, which become U+FFFD")
    return Row(form, normal, {escape(name)[:MAX_NAME_CHARS] for name in unused})


def convert_fields(fields: dict) -> tuple[str, object, set[str]]:
    """(form, messages as OpenAI has them, the fields that they come from) of a row."""
    if fields.get("messages", "") != "":    # a table's empty cell
        return OPENAI, parse_json(fields["messages"]), {"messages"}
    for keys, what in OTHER_FORMS.items():
        if fields.keys() >= set(keys) and isinstance(fields.get("label", True), bool):
            raise ConversationError(f"a row of {what} ({', '.join(keys)}) can't be learned from")
    for key in ("conversations", "conversation"):
        turns = parse_json(fields.get(key))
        if isinstance(turns, list):
            is_sharegpt = any(isinstance(turn, dict) and "from" in turn for turn in turns)
            return "ShareGPT" if is_sharegpt else OPENAI, list(map(convert_turn, turns)), {key}
    for form, (questions, answer) in PAIRS.items():
        if fields.keys() >= {questions[0], answer}:
            return form, convert_pair(fields, questions, answer), {*questions, answer, "history"}
    if "text" in fields:
        raise ConversationError("a row of text is no conversation, but for pretraining (python -m nanochat.dataset "
                                "--source files)")
    names = escape(", ".join(fields))[:MAX_NAME_CHARS] or "nothing"
    raise ConversationError(f"a row of {names} is no form of a conversation that is known")


def convert_turn(turn: object) -> object:
    """A turn of ShareGPT as OpenAI's message; anything else stays as it is."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role, value = turn["from"], turn.get("value")
    if role == "function_call":
        return others | {"role": "assistant", "content": None, "tool_calls": [{"function": parse_json(value)}]}
    return others | {"role": SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role, "content": value}


def convert_pair(fields: dict, questions: Sequence[str], answer: str) -> list:
    """A question and its answer, after the earlier ones of a history; both may be lists of messages."""
    messages, question = [], fields[questions[0]]
    for pair in check_list(parse_json(fields.get("history")) or [], 0, "history"):
        earlier = check_list(pair, 0, "history")
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(earlier)]
    if isinstance(question, str):
        question = [{"role": "user", "content": join_texts(str(fields.get(key, "")) for key in questions)}]
    elif not isinstance(question, list):
        question = [{"role": "user", "content": question}]    # which is no text, so it is refused as one
    reply = fields[answer]
    return [*messages, *question, *(reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}])]


def parse_json(value: object) -> object:
    """The value of a text that is JSON, as a column of a table may hold it; anything else stays as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def has_half_pairs(row: object) -> bool:
    """Whether a text of a row holds half of a surrogate pair."""
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
        return False
    except UnicodeEncodeError:
        return True
