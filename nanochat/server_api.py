"""The HTTP API's formats: OpenAI's requests and answers, the limits of each field, errors, and the legacy endpoint.

The fields of OpenAI's reference are honoured, with two exceptions. One that would change the answer is refused: those
of UNSUPPORTED, and some combinations. One that wouldn't is ignored: user, safety_identifier, metadata, store,
service_tier, prompt_cache_key, prompt_cache_options, prompt_cache_retention, prediction, parallel_tool_calls,
reasoning_effort, verbosity. A field outside the reference is ignored, too. The header X-Ignored-Fields of an answer
names the ignored fields of its request.

Extensions: `top_k`, and the model's tool calls (of its calculator), which the plain content leaves out:

    delta of a stream    {"tool": {"type": "call", "text": "34*27"}}, then {"tool": {"type": "output", "text": "918"}}
    a whole message      "parts": [{"type": "text" | "python" | "python_output", "text": ...}], where there are calls

An assistant message of a request may have such parts, as its content or beside it, so that the model sees its calls
again. Only the limit of the conversation bounds its length, so that every answer can be sent back.
"""

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator
from starlette.exceptions import HTTPException

from nanochat.conversations import ConversationError, extend_parts, get_text, parse_messages
from nanochat.engine import ChatTokens, Event, Usage
from nanochat.server_engines import EngineError

MAX_TEMPERATURE = 2
MAX_TOP_K = 200
MAX_TOP_LOGPROBS = 20

# Unsupported fields -> their values that change nothing, beside null
UNSUPPORTED = {"tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
               "response_format": ({"type": "text"},), "logit_bias": ({},), "presence_penalty": (0,),
               "frequency_penalty": (0,), "modalities": (["text"],), "audio": (), "web_search_options": (),
               "moderation": (), "echo": (False,), "suffix": ("",)}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for: flags of scripts/chat_web.py, told by GET /v1/models."""
    max_messages:           int = 500
    max_message_chars:      int = 8_000   # of a message that isn't the assistant's
    max_conversation_chars: int = 32_000  # of all messages, or of a prompt; of token ids, as many
    max_answer_tokens:      int = 4_096   # a soft one: max_tokens is cut to it, and to what the context leaves
    max_choices:            int = 16      # of a prompt

    def check(self, body: "ChatRequest | CompletionRequest") -> None:
        """ApiError where a request is above a limit."""
        if (body.n or 1) > self.max_choices:
            raise ApiError(400, f"n: {body.n} choices are asked for, {self.max_choices} are the most", param="n")
        if isinstance(body, CompletionRequest):
            for place, prompt in body.get_prompts():
                self._check_number(place, len(prompt), "characters" if isinstance(prompt, str) else "token ids")
            return
        if len(body.messages) > self.max_messages:
            raise ApiError(400, f"messages: there are {len(body.messages)}, {self.max_messages} are the most; leave "
                           "out the oldest", param="messages")
        sizes = [len(get_text(message)) for message in body.messages]
        for i, (message, size) in enumerate(zip(body.messages, sizes, strict=True)):
            if size > self.max_message_chars and message["role"] != "assistant":
                raise ApiError(400, f"messages[{i}]: has {size} characters, {self.max_message_chars} are the most, "
                               "except in an assistant message", param=f"messages[{i}]")
        self._check_number("messages", sum(sizes), "characters", "; leave out the oldest")

    def _check_number(self, param: str, number: int, what: str, advice: str = "") -> None:
        if number > self.max_conversation_chars:
            raise ApiError(400, f"{param}: has {number} {what}, {self.max_conversation_chars} are the most{advice}",
                           param=param)


class ApiError(Exception):
    """The status and the reason of a failed request, in OpenAI's format."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None,
                 code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def make_response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


# Kind of an engine's error -> status, type and code of the API's
ENGINE_ERRORS = {"refused": (400, "invalid_request_error", None), "busy": (429, "rate_limit_error", "queue_full"),
                 "lost": (503, "server_error", "engine_lost"), "timeout": (504, "timeout_error", "timeout"),
                 "gone": (499, "invalid_request_error", None)}  # for the log alone


BASE_URL_HINT = "the base_url of a client of OpenAI's API ends with /v1"


def convert_error(error: Exception) -> ApiError:
    """The API's error for an exception of any layer."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return describe_validation(error.errors())
        case EngineError(kind=engine_kind, retry_after_sec=seconds):
            status, kind, code = ENGINE_ERRORS[engine_kind]
            return ApiError(status, str(error), kind=kind, code=code,
                            headers={"Retry-After": str(seconds)} if seconds else None)
        case HTTPException(status_code=404):
            return ApiError(404, "there is no such route; /v1 has chat/completions, completions and models, and "
                            f"/openapi.json lists all; {BASE_URL_HINT}", code="unknown_url")
        case HTTPException(status_code=405):
            return ApiError(405, "this route has other methods; see /openapi.json", code="method_not_allowed",
                            headers=error.headers)
        case HTTPException():  # FastAPI's, for a body that isn't UTF-8 or is nested too deeply
            return ApiError(error.status_code, "the body can't be read: it must be JSON in UTF-8, not nested deeply")
    return ApiError(500, "internal error; the server's output has the traceback", kind="server_error")


def describe_validation(errors: list[dict]) -> ApiError:
    """The first of pydantic's errors as a sentence, without the value."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON ({error['ctx']['error']} at character {error['loc'][-1]})")
    # loc also names the branch of a union, such as 'str' or 'list[Part]'
    names = [name for name in error["loc"][1:] if isinstance(name, int) or name.isidentifier() and name != "str"]
    if not names:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    param = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).lstrip(".")
    reason = error["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {reason[0].lower()}{reason[1:]}", param=param)


class ErrorResponse(BaseModel):
    """Every answer with a status of 400 or more: message, type, param, code."""
    error: dict[str, str | None]


def check_messages(messages: list) -> list[dict]:
    """The conversation in normal form; the place of a fault is the error's param."""
    try:
        return parse_messages(messages)
    except ConversationError as error:
        param = "messages" + (f"[{error.index}]" if error.index is not None else "")
        param += f".{error.field}" if error.field else ""
        raise ApiError(400, f"{param}: {error.reason}", param=param) from None


Messages = Annotated[list, AfterValidator(check_messages), Field(min_length=1, description=(
    "OpenAI's messages, of the roles system, developer, user, assistant and tool in any order; content is a string or "
    "a list of text parts. At most max_messages, of max_conversation_chars characters all together, and of "
    "max_message_chars in each but the assistant's (see GET /v1/models)."))]


class StreamOptions(BaseModel, strict=True):
    include_usage: bool | None = False


class SamplingFields(BaseModel, strict=True, extra="allow", allow_inf_nan=False):
    """The fields of all endpoints; null is the server's default."""
    model:       str | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_TEMPERATURE)] | None = None
    top_k:       Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None  # an extension; 0: all tokens
    max_tokens:  Annotated[int, Field(ge=1)] | None = None                # cut to max_answer_tokens and the context

    @model_validator(mode="after")
    def refuse_unsupported(self):
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
                raise ApiError(400, f"{name} isn't supported by this server; leave it out", param=name,
                               code="unsupported_parameter")
        return self


class OpenAIFields(SamplingFields):
    """The fields of both of OpenAI's endpoints."""
    top_p:          Annotated[float, Field(gt=0, le=1)] | None = None
    n:              Annotated[int, Field(ge=1)] | None = None
    seed:           Annotated[int, Field(ge=-2**63, lt=2**64)] | None = None
    stop:           Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] | None = None
    stream:         bool | None = None
    stream_options: StreamOptions | None = None

    def count_choices(self) -> int:
        return self.n or 1


class ChatRequest(OpenAIFields):
    """POST /v1/chat/completions"""
    messages:              Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs:              bool | None = None
    top_logprobs:          Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def check_pairs(self):
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self

    def get_num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def check_prompt(value: object) -> object:
    """The prompt of a completion in any of its forms; ValueError for any other value."""
    def is_ids(item: object) -> bool:
        return isinstance(item, list) and len(item) > 0 and all(type(token) is int and token >= 0 for token in item)
    prompts = value if isinstance(value, list) and not is_ids(value) else ["" if value is None else value]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not prompts or len(texts) != len(prompts) and not all(map(is_ids, prompts)):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists; no list is "
                         "empty")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return value


class CompletionRequest(OpenAIFields):
    """POST /v1/completions"""
    prompt:   Annotated[str | list[str] | list[int] | list[list[int]] | None, BeforeValidator(check_prompt), Field(
        description="Each prompt has n choices; null is the beginning of a document.")] = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo:     bool | None = None
    best_of:  int | None = None

    @model_validator(mode="after")
    def check_pairs(self):
        if "messages" in (self.model_extra or {}):
            raise ApiError(400, "messages belong to POST /v1/chat/completions; this route takes a prompt",
                           param="messages")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo with logprobs isn't supported by this server, which has none for a prompt; leave "
                           "one of them out", param="echo", code="unsupported_parameter")
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, "best_of other than n isn't supported by this server; leave it out", param="best_of",
                           code="unsupported_parameter")
        return self

    def get_prompts(self) -> list[tuple[str, str | list[int]]]:
        """Name and text, or token ids, of each prompt."""
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            return [(f"prompt[{i}]", prompt) for i, prompt in enumerate(self.prompt)]
        return [("prompt", self.prompt or "")]

    def count_choices(self) -> int:
        return len(self.get_prompts()) * (self.n or 1)

    def get_num_logprobs(self) -> int | None:
        return self.logprobs


class LegacyChatRequest(SamplingFields):
    """POST /chat/completions, the legacy endpoint: that of the original nanochat."""
    messages: Messages

    def to_chat_request(self) -> ChatRequest:
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return ChatRequest.model_construct(**fields, stream=True)


class Choice:
    """One sample of an answer, assembled from its events."""

    def __init__(self, index: int, tokenizer, echo: str = ""):
        """echo: the prompt's text, where the answer's is to follow it"""
        self.index, self.tokenizer = index, tokenizer
        self.chat_tokens = ChatTokens(tokenizer)
        self.content = echo               # visible text, without tool calls
        self.parts: list[dict] = []       # as in a conversation
        self.in_tool = False              # the last part is an unfinished tool call or output
        # for a stream: text at once, a tool's part when complete, {} at the end
        self.deltas: list[dict] = [{"content": echo}] if echo else []
        self.logprobs: list[dict] = []
        self.offsets: list[int] = []      # of their tokens in `content`, in characters
        self.finish_reason: str | None = None
        self.usage: Usage | None = None

    def add(self, event: Event) -> None:
        num_parts, num_chars = len(self.parts), len(self.content)
        extend_parts(self.parts, event, self.chat_tokens)
        if self.in_tool and len(self.parts) > num_parts:
            self._end_tool(self.parts[num_parts - 1])
        if event.part != "text":
            self.in_tool = True
            if event.token in (self.chat_tokens.python_end, self.chat_tokens.output_end) or event.finish_reason:
                self._end_tool(self.parts[-1])
        elif event.text:
            self.content += event.text
            if not (self.deltas and "content" in self.deltas[-1]):
                self.deltas.append({"content": ""})
            self.deltas[-1]["content"] += event.text
        if event.logprobs and event.part == "text" and event.token not in self.chat_tokens.special_tokens:
            self.logprobs.append(self._describe_token(event.token, event.logprobs.chosen) | {
                "top_logprobs": [self._describe_token(*pair) for pair in event.logprobs.likeliest]})
            self.offsets.append(num_chars)
        if event.finish_reason:
            self.finish_reason, self.usage = event.finish_reason, event.usage
            self.deltas.append({})

    def _end_tool(self, part: dict) -> None:
        self.in_tool = False
        self.deltas.append({"tool": {"type": "call" if part["type"] == "python" else "output", "text": part["text"]}})

    def _describe_token(self, token: int, logprob: float) -> dict:
        return {"token": self.tokenizer.decode([token]), "bytes": list(self.tokenizer.decode_bytes([token])),
                "logprob": max(logprob, -9999.0)}  # OpenAI's stand-in for minus infinity, which JSON lacks


def to_sse(data: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class ChatFormat:
    """An answer of POST /v1/chat/completions, whole or as a stream that [DONE] closes."""
    id_prefix, name, chunk_name = "chatcmpl-", "chat.completion", "chat.completion.chunk"
    first_delta = {"role": "assistant", "content": ""}

    def __init__(self, body: ChatRequest | CompletionRequest, model: str, worker_idx: int, num_dropped: int):
        self.worker_idx = worker_idx
        self.with_logprobs = body.get_num_logprobs() is not None
        self.with_usage = bool(body.stream_options and body.stream_options.include_usage)
        self.num_samples = body.n or 1
        self.envelope = {"id": self.id_prefix + secrets.token_hex(12), "object": self.name,
                         "created": int(time.time()), "model": model}
        if num_dropped:  # an extension, only where the context was too short
            self.envelope["dropped_messages"] = num_dropped
        self.chunk = self.envelope | {"object": self.chunk_name} | ({"usage": None} if self.with_usage else {})

    def format_choice(self, choice: Choice, delta: dict | None = None) -> dict:
        """delta: {} at the end of a stream; None: the whole answer"""
        fields = {"index": choice.index, "finish_reason": None if delta else choice.finish_reason,
                  "logprobs": {"content": choice.logprobs, "refusal": None} if self.with_logprobs else None}
        if delta is not None:
            return fields | {"delta": delta}
        calls = {"parts": choice.parts} if any(part["type"] != "text" for part in choice.parts) else {}
        return fields | {"message": {"role": "assistant", "content": choice.content, "refusal": None} | calls}

    def format_whole(self, choices: Sequence[Choice]) -> dict:
        return self.envelope | {"choices": list(map(self.format_choice, choices)), "usage": self.sum_usage(choices)}

    def start(self, choices: Sequence[Choice]) -> str:
        return "".join(self.encode(choice, self.first_delta) for choice in choices) if self.first_delta else ""

    def encode(self, choice: Choice, delta: dict) -> str:
        event = to_sse(self.chunk | {"choices": [self.format_choice(choice, delta)]})
        choice.logprobs.clear()
        choice.offsets.clear()
        return event

    def end(self, choices: Sequence[Choice]) -> str:
        usage = self.envelope | {"object": self.chunk_name, "choices": [], "usage": self.sum_usage(choices)}
        return (to_sse(usage) if self.with_usage else "") + "data: [DONE]\n\n"

    def sum_usage(self, choices: Sequence[Choice]) -> dict:
        """Token counts of an answer; a prompt, which its samples share, counts once."""
        prompts = [choice.usage for choice in choices[::self.num_samples]]
        prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
        completion_tokens = sum(choice.usage.completion_tokens for choice in choices)
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
                "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)}}


def spell(token: dict) -> str:
    """A token as a key: its text, or as OpenAI writes parts of a character, which would all look alike."""
    is_text = bytes(token["bytes"]) == token["token"].encode("utf-8")
    return token["token"] if is_text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in token["bytes"])


class TextFormat(ChatFormat):
    """An answer of POST /v1/completions."""
    id_prefix, name, chunk_name, first_delta = "cmpl-", "text_completion", "text_completion", None

    def format_choice(self, choice: Choice, delta: dict | None = None) -> dict:
        columns = {"tokens": [spell(token) for token in choice.logprobs],
                   "token_logprobs": [token["logprob"] for token in choice.logprobs],
                   # OpenAI's, too, has the sampled token beside the likeliest
                   "top_logprobs": [{spell(top): top["logprob"] for top in (*token["top_logprobs"], token)}
                                    for token in choice.logprobs], "text_offset": list(choice.offsets)}
        return {"index": choice.index, "text": choice.content if delta is None else delta.get("content", ""),
                "logprobs": columns if self.with_logprobs else None,
                "finish_reason": None if delta else choice.finish_reason}


class LegacyFormat(ChatFormat):
    """The visible text of the legacy endpoint as a stream of {"token", "gpu"}, closed by {"done": true}."""
    first_delta = None

    def encode(self, choice: Choice, delta: dict) -> str:
        return to_sse({"token": delta["content"], "gpu": self.worker_idx}) if "content" in delta else ""

    def end(self, choices: Sequence[Choice]) -> str:
        return to_sse({"done": True})
