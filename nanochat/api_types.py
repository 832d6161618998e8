"""What clients send and get: OpenAI's formats, the limits of each field, and errors.

A field that would change the answer and isn't supported is refused; what is unknown beyond these is ignored.
Extensions: `top_k`; the model's calls of its calculator, which are left out of the plain content:

    a stream's delta    {"tool": {"type": "call", "text": "34*27"}}, then {"tool": {"type": "output", "text": "918"}}
    a whole message     "parts": [{"type": "text" | "python" | "python_output", "text": ...}], where there are calls

An assistant message of a request may hold such parts as its content, so that the model sees its calls again. It may be
longer than those of others: whatever a model has written can be sent back, up to the limit of the conversation.
"""

import math
import time
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from nanochat.chat import Turn
from nanochat.engine_request import Event, Usage

MAX_MESSAGES = 500
MAX_MESSAGE_CHARS = 8_000      # of all but the assistant's
MAX_CONVERSATION_CHARS = 32_000
MAX_TOKENS = 4_096
MAX_TOP_K = 200
MAX_CHOICES = 16
MAX_STOPS, MAX_STOP_CHARS = 4, 256
MAX_TOP_LOGPROBS = 20
IMPOSSIBLE_LOGPROB = -9999.0   # OpenAI's stand-in for minus infinity, which JSON lacks

# What clients may ask for and doesn't exist here -> the values of it that ask for nothing (beside null)
UNSUPPORTED = {"tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
               "response_format": ({"type": "text"},), "logit_bias": ({},), "presence_penalty": (0,),
               "frequency_penalty": (0,), "modalities": (["text"],), "audio": (), "web_search_options": (),
               "prediction": (), "echo": (False,), "suffix": ("",), "best_of": (1,)}


class ApiError(Exception):
    """A request that gets no answer: the status, and why, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---------------------------------------------------------------------------------------------------------------------
# Requests


class ErrorBody(BaseModel):
    message: str
    type:    str
    param:   str | None
    code:    str | None


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or more."""
    error: ErrorBody


class Part(BaseModel):
    """A piece of a message; python and python_output are for the assistant's calls of its calculator."""
    model_config = ConfigDict(strict=True)
    type: Literal["text", "python", "python_output"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role:    Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[Part], Field(description=(
        f"At most {MAX_MESSAGE_CHARS} characters; an assistant's only counts toward the {MAX_CONVERSATION_CHARS} of "
        "the conversation."))]

    @model_validator(mode="after")
    def check_content(self):
        text = self.get_text()
        if len(text) > MAX_MESSAGE_CHARS and self.role != "assistant":
            raise ValueError(f"has {len(text)} characters, {MAX_MESSAGE_CHARS} are the most in a message that isn't "
                             "the assistant's")
        if self.role == "user" and not text:
            raise ValueError("is empty")
        if self.role != "assistant" and any(part.type != "text" for part in self.get_parts()):
            raise ValueError("has a part of the assistant's: only it calls python")
        return self

    def get_parts(self) -> list[Part]:
        return [Part(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    def get_text(self) -> str:
        """All of its parts."""
        return "".join(part.text for part in self.get_parts())


def check_length(messages: list[Message]) -> list[Message]:
    num_chars = sum(len(message.get_text()) for message in messages)
    if num_chars > MAX_CONVERSATION_CHARS:
        raise ValueError(f"has {num_chars} characters, {MAX_CONVERSATION_CHARS} are the most; leave out the oldest")
    return messages


Messages = Annotated[list[Message], AfterValidator(check_length), Field(
    min_length=1, max_length=MAX_MESSAGES, description=f"At most {MAX_CONVERSATION_CHARS} characters, all together.")]


def split_turns(messages: list[Message]) -> tuple[str, list[Turn]]:
    """The system message, if any, and the turns: a question and its answer each, the last one without.

    Messages of one role in a row are one message; what else breaks the alternation is refused.
    """
    first = next((i for i, message in enumerate(messages) if message.role not in ("system", "developer")), None)
    if first is None:
        raise ApiError(400, "messages has no message of the user", param="messages")
    system = "\n\n".join(text for message in messages[:first] if (text := message.get_text()))
    merged: list[tuple[str, list[dict]]] = []
    for i, message in enumerate(messages[first:], start=first):
        if message.role in ("system", "developer"):
            raise ApiError(400, f"messages[{i}]: a {message.role} message must stand before all others",
                           param=f"messages[{i}].role")
        parts = [part.model_dump() for part in message.get_parts()]
        if merged and merged[-1][0] == message.role:
            merged[-1][1].extend([{"type": "text", "text": "\n\n"}, *parts])
        else:
            merged.append((message.role, parts))
    for i, place in ((0, "first"), (-1, "last")):
        if merged[i][0] != "user":
            raise ApiError(400, f"messages: the {place} message, system aside, must be the user's", param="messages")
    questions = ["".join(part["text"] for part in parts) for _, parts in merged[::2]]
    answers = [parts for _, parts in merged[1::2]]
    return system, [Turn(*turn) for turn in zip(questions, [*answers, []], strict=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool | None = False


class SamplingFields(BaseModel):
    """What all requests may say about sampling; null is the server's default."""
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k:       Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None  # an extension; 0 = all
    max_tokens:  Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None

    @model_validator(mode="after")
    def refuse_unsupported(self):
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                raise ApiError(400, f"{name} isn't supported by this server; leave it out", param=name,
                               code="unsupported_parameter")
        return self


def to_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class OpenAIFields(SamplingFields):
    """What both of OpenAI's routes have."""
    model:          str | None = None
    top_p:          Annotated[float, Field(gt=0, le=1)] | None = None
    n:              Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed:           Annotated[int, Field(ge=-2**63, lt=2**64)] | None = None
    stop:           Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
                              Field(max_length=MAX_STOPS), BeforeValidator(to_list)] | None = None
    stream:         bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(OpenAIFields):
    """POST /v1/chat/completions"""
    messages:              Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs:              bool | None = None
    top_logprobs:          Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def check_top_logprobs(self):
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return self

    def get_max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def get_num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(OpenAIFields):
    """POST /v1/completions"""
    prompt:   Annotated[str, Field(max_length=MAX_CONVERSATION_CHARS)] | Annotated[
        list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MAX_CONVERSATION_CHARS)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    def get_max_tokens(self) -> int | None:
        return self.max_tokens

    def get_num_logprobs(self) -> int | None:
        return self.logprobs


class FamilyChatRequest(SamplingFields):
    """POST /chat/completions, the plain stream of this family of projects"""
    messages: Messages


# Where pydantic would name just one of the branches
UNION_HINTS = {"content": "must be a string or a list of parts of type text; the assistant's may be python, too",
               "prompt": "must be one string or one list of token ids; send each prompt in a request of its own"}


def describe_validation(errors: list[dict]) -> ApiError:
    """The first of pydantic's errors as a sentence; values aren't repeated."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON ({error['ctx']['error']} at character {error['loc'][-1]})")
    # loc also names the branch of a union, such as 'str' or 'list[Part]'
    names = [name for name in error["loc"][1:] if isinstance(name, int) or name.isidentifier() and name != "str"]
    if not names:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    param = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).lstrip(".")
    reason = error["msg"].removeprefix("Value error, ")
    if error["type"] == "string_type":
        reason = UNION_HINTS.get(names[-1], reason)
    return ApiError(400, f"{param}: {reason[0].lower()}{reason[1:]}", param=param)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class Choice:
    """One sample of an answer, put together from its events."""

    def __init__(self, index: int, tokenizer):
        self.index, self.tokenizer = index, tokenizer
        specials = tokenizer.get_special_tokens()
        self.special_tokens = frozenset(specials.values())
        self.part_ends = {specials.get("<|python_end|>"), specials.get("<|output_end|>")}
        self.parts: list[dict] = []       # as in a conversation
        self.open_tool: dict | None = None  # the call or output that is being written
        self.logprobs: list[dict] = []
        self.finish_reason: str | None = None
        self.usage: Usage | None = None

    def add(self, event: Event) -> list[dict]:
        """Take an event; returns the deltas that a stream sends for it."""
        deltas = []
        if self.open_tool and self.open_tool["type"] != event.part:
            deltas.append(self._close_tool())
        if event.part == "text":
            if event.text:
                deltas.append({"content": event.text})
                self._add_text(event.text)
        else:
            self.open_tool = self.open_tool or {"type": event.part, "text": ""}
            self.open_tool["text"] += event.text
            if event.token in self.part_ends or event.finish_reason:
                deltas.append(self._close_tool())
        if event.logprobs and event.part == "text" and event.token not in self.special_tokens:
            self.logprobs.append(self._describe_token(event))
        self.finish_reason, self.usage = event.finish_reason, event.usage
        return deltas

    def _add_text(self, text: str) -> None:
        if not self.parts or self.parts[-1]["type"] != "text":
            self.parts.append({"type": "text", "text": ""})
        self.parts[-1]["text"] += text

    def _close_tool(self) -> dict:
        tool, self.open_tool = self.open_tool, None
        self.parts.append(tool)
        return {"tool": {"type": "call" if tool["type"] == "python" else "output", "text": tool["text"]}}

    def _describe_token(self, event: Event) -> dict:
        def describe(token: int, logprob: float) -> dict:
            return {"token": self.tokenizer.decode([token]), "bytes": list(self.tokenizer.decode_bytes([token])),
                    "logprob": logprob if math.isfinite(logprob) else IMPOSSIBLE_LOGPROB}
        return describe(event.token, event.logprobs.chosen) | {
            "top_logprobs": [describe(*pair) for pair in event.logprobs.likeliest]}

    @property
    def content(self) -> str:
        """The text that a person reads."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")


class ChatFormat:
    """Choices as POST /v1/chat/completions gives them."""
    prefix, name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    first_delta = {"role": "assistant", "content": ""}

    @staticmethod
    def whole(choice: Choice, with_logprobs: bool) -> dict:
        message = {"role": "assistant", "content": choice.content, "refusal": None}
        if any(part["type"] != "text" for part in choice.parts):
            message["parts"] = choice.parts
        logprobs = {"content": choice.logprobs, "refusal": None} if with_logprobs else None
        return {"index": choice.index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    @staticmethod
    def delta(choice: Choice, delta: dict, logprobs: list[dict] | None, finish_reason: str | None = None) -> dict:
        return {"index": choice.index, "delta": delta, "finish_reason": finish_reason,
                "logprobs": None if logprobs is None else {"content": logprobs, "refusal": None}}


class TextFormat:
    """Choices as POST /v1/completions gives them."""
    prefix, name, chunk_name = "cmpl-", "text_completion", "text_completion"
    first_delta = None

    @staticmethod
    def whole(choice: Choice, with_logprobs: bool) -> dict:
        return TextFormat.delta(choice, {"content": choice.content}, choice.logprobs if with_logprobs else None,
                                choice.finish_reason)

    @staticmethod
    def delta(choice: Choice, delta: dict, logprobs: list[dict] | None, finish_reason: str | None = None) -> dict:
        columns = None if logprobs is None else {
            "tokens": [token["token"] for token in logprobs],
            "token_logprobs": [token["logprob"] for token in logprobs],
            "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in logprobs]}
        return {"index": choice.index, "text": delta.get("content", ""), "logprobs": columns,
                "finish_reason": finish_reason}


def make_envelope(format_: type[ChatFormat | TextFormat], answer_id: str, model: str, num_dropped: int) -> dict:
    """What surrounds the choices; `dropped_messages` is there where the context was too short for all of them."""
    envelope = {"id": format_.prefix + answer_id, "object": format_.name, "created": int(time.time()), "model": model}
    return envelope | ({"dropped_messages": num_dropped} if num_dropped else {})


def sum_usage(choices: list[Choice]) -> dict:
    """The prompt counts once, however many samples there are of it."""
    usages = [choice.usage for choice in choices]
    prompt_tokens, completion_tokens = usages[0].prompt_tokens, sum(usage.completion_tokens for usage in usages)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens}}
