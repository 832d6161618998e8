"""The HTTP server: OpenAI's API, this family's own stream, and the page.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models     as in OpenAI's reference, streaming or not
    POST /chat/completions      {"messages", "temperature", "top_k", "max_tokens"} -> data: {"token": "...", "gpu": 0}
    GET  /health  /stats  /                                                the last one is the page

Every error is {"error": {"message", "type", "param", "code"}}. A request that a client leaves frees its row at once,
one that takes too long ends with an error. Formats and limits: api_types.py; engines: engine_pool.py.
"""

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from nanochat import engine_request
from nanochat.api_types import (
    ApiError,
    ChatFormat,
    ChatRequest,
    Choice,
    CompletionRequest,
    ErrorResponse,
    FamilyChatRequest,
    SamplingFields,
    TextFormat,
    make_envelope,
    split_turns,
    sum_usage,
)
from nanochat.chat import NoRoom, build_prompt, check_context
from nanochat.engine_pool import Answer, EngineError, EnginePool
from nanochat.gate import CLIENT_GONE, Gate, convert_error, log_line, make_error_response

PAGE_PATH = Path(__file__).with_name("ui.html")
DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class ServerSettings:
    """What is served, and within which limits."""
    model_name:          str
    stage:               str
    context_tokens:      int            # prompt and answer together
    temperature:         float          # these three where a request says nothing
    top_k:               int
    max_tokens:          int
    request_timeout_sec: float
    created:             int = 0        # of the checkpoint, seconds since 1970
    api_key:             str | None = None
    cors_origins:        tuple[str, ...] = ()
    hosts:               tuple[str, ...] = ()    # what this server may be called in a request; () is anything
    log_contents:        bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class Service:
    """From a parsed request to its answer."""

    def __init__(self, settings: ServerSettings, pool: EnginePool, tokenizer):
        self.settings, self.pool, self.tokenizer = settings, pool, tokenizer

    def begin_chat(self, http: Request, body: ChatRequest | FamilyChatRequest) -> tuple[Answer, int]:
        """Hand a conversation to an engine; returns how many messages were dropped, too."""
        max_tokens = self._get_max_tokens(body)
        with refuse_long_prompt("messages"):
            tokens, num_turns = build_prompt(self.tokenizer, *split_turns(body.messages), self.settings.context_tokens,
                                             max_tokens, self.settings.stage == "base")
        if self.settings.log_contents:
            http.state.record["messages"] = [message.model_dump() for message in body.messages]
        return self._begin(http, body, tokens, max_tokens), 2 * num_turns

    def begin_completion(self, http: Request, body: CompletionRequest) -> Answer:
        """Hand a text, or tokens, to an engine."""
        tokens = body.prompt
        if isinstance(tokens, str):
            tokens = self.tokenizer.encode(tokens, prepend=self.tokenizer.get_bos_token_id())
        with refuse_long_prompt("prompt"):
            check_context(tokens, self.settings.context_tokens)
        if self.settings.log_contents:
            http.state.record["prompt"] = body.prompt
        return self._begin(http, body, tokens, self._get_max_tokens(body))

    def _get_max_tokens(self, body: SamplingFields) -> int:
        asked = body.max_tokens if isinstance(body, FamilyChatRequest) else body.get_max_tokens()
        return asked or self.settings.max_tokens

    def _begin(self, http: Request, body: SamplingFields, tokens: list[int], max_tokens: int) -> Answer:
        settings, is_openai = self.settings, not isinstance(body, FamilyChatRequest)
        model = getattr(body, "model", None)
        if model not in (None, "", settings.model_name):
            raise ApiError(404, f"the model {ascii(model)[:100]} isn't here; this server has {settings.model_name!r}",
                           param="model", code="model_not_found")
        seed = body.seed if is_openai and body.seed is not None else secrets.randbits(63)
        requests = [engine_request.Request(
            tokens, min(max_tokens, settings.context_tokens - len(tokens)),
            settings.temperature if body.temperature is None else body.temperature,
            settings.top_k if body.top_k is None else body.top_k,
            body.top_p if is_openai else None, seed, sample, tuple(body.stop or ()) if is_openai else (),
            body.get_num_logprobs() if is_openai else None) for sample in range(is_openai and body.n or 1)]
        answer = http.state.record["answer"] = self.pool.submit(requests, settings.request_timeout_sec)
        return answer

    async def respond(self, http: Request, body: ChatRequest | CompletionRequest, answer: Answer, num_dropped: int,
                      format_: type[ChatFormat | TextFormat]) -> Response:
        """OpenAI's answer, whole or as a stream. Before the first token an error has a status of its own."""
        envelope = make_envelope(format_, secrets.token_hex(12), self.settings.model_name, num_dropped)
        headers = {"X-Dropped-Messages": str(num_dropped)} if num_dropped else None
        choices = {generation_id: Choice(index, self.tokenizer) for generation_id, index in answer.samples.items()}
        if body.stream:
            await unless_gone(http, answer.wait())
            chunks = self._stream(http, body, answer, envelope, choices, format_)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=(headers or {}) | {
                "Cache-Control": "no-store"})
        await unless_gone(http, self._collect(answer, choices))
        self._log_answer(http, choices)
        with_logprobs = body.get_num_logprobs() is not None
        return JSONResponse(envelope | {
            "choices": [format_.whole(choice, with_logprobs) for choice in choices.values()],
            "usage": sum_usage(list(choices.values()))}, headers=headers)

    async def _collect(self, answer: Answer, choices: dict[int, Choice]) -> None:
        while answer.has_more():
            for event in await answer.next_events():
                choices[event.request_id].add(event)

    async def _stream(self, http: Request, body: ChatRequest | CompletionRequest, answer: Answer, envelope: dict,
                      choices: dict[int, Choice], format_: type[ChatFormat | TextFormat]) -> AsyncIterator[str]:
        """Server-sent events; what is there at once goes out in one piece, a choice's text in one of them."""
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        with_logprobs = body.get_num_logprobs() is not None
        envelope = envelope | {"object": format_.chunk_name} | ({"usage": None} if with_usage else {})
        begin, end = json.dumps(envelope, ensure_ascii=False)[:-1] + ', "choices": [', "]}\n\n"

        def encode(choice: Choice, delta: dict) -> str:
            logprobs, choice.logprobs = choice.logprobs if with_logprobs else None, []
            finish_reason = None if delta else choice.finish_reason
            return "data: " + begin + json.dumps(format_.delta(choice, delta, logprobs, finish_reason),
                                                 ensure_ascii=False) + end
        if format_.first_delta:
            yield "".join(encode(choice, format_.first_delta) for choice in choices.values())
        with say_error_in_stream() as last_words:
            while answer.has_more():
                deltas: dict[Choice, list[dict]] = {choice: [] for choice in choices.values()}
                for event in await answer.next_events():
                    choice = choices[event.request_id]
                    deltas[choice] += choice.add(event) + ([{}] if event.finish_reason else [])  # {}: the end
                lines = [encode(choice, delta) for choice in deltas for delta in join_texts(deltas[choice])]
                if lines:
                    yield "".join(lines)
            self._log_answer(http, choices)
            if with_usage:
                usage = envelope | {"choices": [], "usage": sum_usage(list(choices.values()))}
                yield f"data: {json.dumps(usage, ensure_ascii=False)}\n\n"
            yield DONE
        for line in last_words:
            yield line

    async def stream_family(self, http: Request, answer: Answer) -> AsyncIterator[str]:
        """The visible text, some tokens at a time, as {"token", "gpu"} lines, and {"done": true}."""
        choice = Choice(0, self.tokenizer)
        with say_error_in_stream() as last_words:
            while answer.has_more():
                texts = [delta["content"] for event in await answer.next_events() for delta in choice.add(event)
                         if "content" in delta]
                if texts:
                    line = json.dumps({"token": "".join(texts), "gpu": answer.worker.worker_idx}, ensure_ascii=False)
                    yield f"data: {line}\n\n"
            self._log_answer(http, {0: choice})
            yield 'data: {"done": true}\n\n'
        for line in last_words:
            yield line

    def _log_answer(self, http: Request, choices: dict[int, Choice]) -> None:
        http.state.record["finish_reasons"] = [choice.finish_reason for choice in choices.values()]
        if self.settings.log_contents:
            http.state.record["answers"] = [choice.parts for choice in choices.values()]


def join_texts(deltas: list[dict]) -> Iterator[dict]:
    """The same deltas, neighbouring texts as one."""
    for has_text, group in itertools.groupby(deltas, key=lambda delta: "content" in delta):
        if has_text:
            yield {"content": "".join(delta["content"] for delta in group)}
        else:
            yield from group


@contextlib.contextmanager
def refuse_long_prompt(param: str) -> Iterator[None]:
    """Let a client know that its prompt leaves no room for an answer."""
    try:
        yield
    except NoRoom as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="context_length_exceeded") from None


@contextlib.contextmanager
def say_error_in_stream():
    """Gives a list of last lines, filled where the answer breaks off: the status has been sent before."""
    lines: list[str] = []
    try:
        yield lines
    except EngineError as error:
        lines.append(f"data: {json.dumps(convert_error(error).body)}\n\n")


async def unless_gone(http: Request, work: Awaitable[None]) -> None:
    """Wait for `work`, but not when the client has gone."""
    async def wait_for_end() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(CLIENT_GONE, "the client has gone")
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


# ---------------------------------------------------------------------------------------------------------------------
# The application


def load_page() -> Response:
    """The page, under a policy that lets nothing run but its own script and nothing load from elsewhere."""
    if not PAGE_PATH.exists():
        return PlainTextResponse("this installation has no page; the API is at /v1", 404)
    html = PAGE_PATH.read_text(encoding="utf-8")

    def hash_blocks(tag: str) -> str:
        blocks = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'"
                        for block in blocks) or "'none'"
    policy = (f"default-src 'none'; script-src {hash_blocks('script')}; style-src {hash_blocks('style')}; "
              "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    return HTMLResponse(html, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


def make_app(settings: ServerSettings, pool: EnginePool, tokenizer, log: Callable[..., None] = log_line) -> FastAPI:
    """The application on engines that run already."""
    @contextlib.asynccontextmanager
    async def lifespan(_):
        pool.loop = asyncio.get_running_loop()
        yield
        pool.loop = None

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None)  # those load from elsewhere
    app.add_middleware(Gate, api_key=settings.api_key, hosts=settings.hosts, log=log)
    if settings.cors_origins:  # around the gate, so that its errors can be read there, too
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"],
                           allow_headers=["Authorization", "Content-Type"],
                           expose_headers=["X-Request-Id", "X-Dropped-Messages", "Retry-After"])

    async def answer_error(_, error: Exception) -> JSONResponse:
        return make_error_response(convert_error(error))
    for kind in (ApiError, EngineError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    add_answer_routes(app, Service(settings, pool, tokenizer))
    add_other_routes(app, settings, pool)
    return app


def add_answer_routes(app: FastAPI, service: Service) -> None:
    """What a model answers."""
    errors = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}
    stream, whole = {"text/event-stream": {}}, {"application/json": {}}

    @app.post("/v1/chat/completions", responses=errors | {200: {"content": whole | stream}})
    async def chat_completions(body: ChatRequest, http: Request):
        answer, num_dropped = service.begin_chat(http, body)
        return await service.respond(http, body, answer, num_dropped, ChatFormat)

    @app.post("/v1/completions", responses=errors | {200: {"content": whole | stream}})
    async def completions(body: CompletionRequest, http: Request):
        return await service.respond(http, body, service.begin_completion(http, body), 0, TextFormat)

    @app.post("/chat/completions", responses=errors | {200: {"content": stream}}, response_class=StreamingResponse)
    async def family_chat_completions(body: FamilyChatRequest, http: Request):
        answer, num_dropped = service.begin_chat(http, body)
        await unless_gone(http, answer.wait())
        return StreamingResponse(service.stream_family(http, answer), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-store", "X-Dropped-Messages": str(num_dropped)})


def add_other_routes(app: FastAPI, settings: ServerSettings, pool: EnginePool) -> None:
    """Which model this is, how the server is doing, and the page."""
    errors, page = {"4XX": {"model": ErrorResponse}}, load_page()

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [describe_model(settings)]}

    @app.get("/v1/models/{name:path}", responses=errors)
    async def model(name: str):
        if name != settings.model_name:
            raise ApiError(404, f"this server has {settings.model_name!r} only", param="model", code="model_not_found")
        return describe_model(settings)

    @app.get("/health", responses={503: {}})
    async def health():
        workers = pool.get_stats()["workers"]
        ready = any(worker["ready"] for worker in workers)
        return JSONResponse({"status": "ok" if ready else "starting", "ready": ready,
                             "ready_workers": sum(worker["ready"] for worker in workers), "workers": len(workers),
                             "model": settings.model_name, "stage": settings.stage}, 200 if ready else 503)

    @app.get("/stats", responses=errors)
    async def stats():
        return pool.get_stats()

    @app.get("/", include_in_schema=False)
    async def index():
        return page


def describe_model(settings: ServerSettings) -> dict:
    """One entry of /v1/models; the last three are extensions."""
    return {"id": settings.model_name, "object": "model", "created": settings.created, "owned_by": "nanochat",
            "stage": settings.stage, "context_tokens": settings.context_tokens, "max_tokens": settings.max_tokens}
