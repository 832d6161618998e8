"""The HTTP server: OpenAI's API, the legacy endpoint, and the chat page.

    POST /v1/chat/completions   POST /v1/completions   GET /v1/models     as in OpenAI's reference, streaming or not
    POST /chat/completions      {"messages", "temperature", "top_k", "max_tokens"} -> data: {"token": "...", "gpu": 0}
    GET  /health  /stats  /                                               the last one is the page
    HEAD                                                                  as GET, without a body

Every error is {"error": {"message", "type", "param", "code"}}. A client that disconnects frees its rows at once, and
so does the page's stop button: fetch aborted -> http.disconnect -> Answer.close -> ("cancel", id) -> Engine.cancel. An
answer that takes too long ends with an error. Formats and limits: server_api.py; engines: server_engines.py.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat import engine
from nanochat import server_api as api
from nanochat.common import now
from nanochat.conversations import NoRoom, build_prompt, check_context, split_turns
from nanochat.server_engines import Answer, EngineError, EnginePool

PAGE_PATH = Path(__file__).with_name("ui.html")
MIN_BODY_BYTES = 2**20         # largest body, at least
MAX_CHAR_BYTES = 16            # of a character in JSON, "\\ud83d\\ude00" and what stands around it
MAX_DISCARDED_BYTES = 2**25    # of a body that is too large: read, so that the client gets the error before the cut
BODY_TIMEOUT_SEC = 30          # for a body to arrive
OPEN_PATHS = {"/", "/health", "/openapi.json"}  # no key needed
CLIENT_GONE = "the client has gone"
MAX_HEADER_CHARS = 1000
# nginx, as a proxy, would hold a stream back until its buffer is full
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


@dataclass(frozen=True)
class ServerSettings:
    """The served model, the defaults and the limits."""
    model_name:          str
    stage:               str
    context_tokens:      int            # prompt and answer together
    temperature:         float          # these three: defaults of a request
    top_k:               int
    max_tokens:          int
    request_timeout_sec: float
    limits:              api.Limits = api.Limits()
    created:             int = 0        # time of the checkpoint, seconds since 1970
    api_key:             str | None = None
    cors_origins:        tuple[str, ...] = ()
    hosts:               tuple[str, ...] = ()    # accepted Host headers; (): any
    log_contents:        bool = False


class Service:
    """The path from a parsed request to its answer."""

    def __init__(self, settings: ServerSettings, pool: EnginePool, tokenizer):
        self.settings, self.pool, self.tokenizer = settings, pool, tokenizer

    async def respond(self, http: Request, body: api.ChatRequest | api.CompletionRequest,
                      format_type: type[api.ChatFormat]) -> Response:
        """The answer, whole or as a stream. An error before the first token has its own status."""
        answer, num_dropped = self._begin(http, body)
        format_ = format_type(body, self.settings.model_name, answer.worker.worker_idx, num_dropped)
        choices = {request_id: api.Choice(i, self.tokenizer, self._get_echo(body, i))
                   for i, request_id in enumerate(answer.request_ids)}
        headers = {"X-Dropped-Messages": str(num_dropped)} if num_dropped else {}
        if ignored := [name for name, value in (body.model_extra or {}).items() if value is not None]:
            headers["X-Ignored-Fields"] = ascii(", ".join(ignored))[1:-1][:MAX_HEADER_CHARS]
        watcher = asyncio.ensure_future(fail_when_gone(http, answer))
        try:
            if body.stream:
                await answer.wait()
                return StreamingResponse(self._stream(http, answer, choices, format_), media_type="text/event-stream",
                                         headers=headers | STREAM_HEADERS)
            async for events in answer.iterate():
                for event in events:
                    choices[event.request_id].add(event)
        finally:
            watcher.cancel()
        self._log_answer(http, choices)
        return JSONResponse(format_.format_whole(list(choices.values())), headers=headers)

    def _begin(self, http: Request, body: api.ChatRequest | api.CompletionRequest) -> tuple[Answer, int]:
        """Submit a request to an engine; returns its answer, and how many messages were dropped from the prompt."""
        settings = self.settings
        if body.model not in (None, "", settings.model_name):
            raise api.ApiError(404, f"the model {ascii(body.model)[:100]} isn't here; this server has "
                               f"{settings.model_name!r}", param="model", code="model_not_found")
        settings.limits.check(body)
        self.pool.check_size(body.count_choices())
        max_tokens = min(body.max_tokens or settings.max_tokens, settings.limits.max_answer_tokens)
        prompts, num_dropped = self._encode_prompts(body, max_tokens)
        if settings.log_contents:
            http.state.record |= body.model_dump(include={"messages", "prompt"})
        seed = secrets.randbits(63) if body.seed is None else body.seed
        requests = [engine.Request(
            tokens, min(max_tokens, settings.context_tokens - len(tokens)),
            settings.temperature if body.temperature is None else body.temperature,
            settings.top_k if body.top_k is None else body.top_k,
            body.top_p, seed, sample, tuple(body.stop or ()), body.get_num_logprobs())
            for tokens in prompts for sample in range(body.n or 1)]
        answer = http.state.record["answer"] = self.pool.submit(requests, settings.request_timeout_sec)
        return answer, num_dropped

    def _encode_prompts(self, body: api.ChatRequest | api.CompletionRequest,
                        max_tokens: int) -> tuple[list[list[int]], int]:
        """(tokens of each prompt, messages that were dropped to leave room for the answer)."""
        context_tokens, vocab_size = self.settings.context_tokens, self.tokenizer.get_vocab_size()
        param = "messages"
        try:
            if isinstance(body, api.ChatRequest):
                system, turns = split_turns(body.messages)
                tokens, num_turns = build_prompt(self.tokenizer, system, turns, context_tokens, max_tokens,
                                                 self.settings.stage == "base")
                return [tokens], sum(turn.num_messages for turn in turns[:num_turns])
            prompts = []
            for name, prompt in body.get_prompts():
                param, tokens = name, prompt
                if isinstance(prompt, str):
                    tokens = self.tokenizer.encode(prompt, prepend=self.tokenizer.get_bos_token_id())
                elif max(prompt) >= vocab_size:
                    raise api.ApiError(400, f"{param}: has token ids outside the vocabulary, 0 to {vocab_size - 1}",
                                       param=param)
                check_context(tokens, context_tokens)
                prompts.append(tokens)
            return prompts, 0
        except NoRoom as error:
            raise api.ApiError(400, f"{param}: {error}", param=param, code="context_length_exceeded") from None

    def _get_echo(self, body: api.ChatRequest | api.CompletionRequest, choice_idx: int) -> str:
        """The text of a choice's prompt, where a completion is to repeat it."""
        if not (isinstance(body, api.CompletionRequest) and body.echo):
            return ""
        _, prompt = body.get_prompts()[choice_idx // (body.n or 1)]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    async def _stream(self, http: Request, answer: Answer, choices: dict[int, api.Choice],
                      format_: api.ChatFormat) -> AsyncIterator[str]:
        """What arrives together is sent together, with the consecutive texts of a choice as one delta."""
        if start := format_.start(choices.values()):
            yield start
        try:
            async for events in answer.iterate():
                for event in events:
                    choices[event.request_id].add(event)
                piece = ""
                for choice in choices.values():
                    piece += "".join(format_.encode(choice, delta) for delta in choice.deltas)
                    choice.deltas.clear()
                if piece:
                    yield piece
            self._log_answer(http, choices)
            yield format_.end(list(choices.values()))
        except EngineError as error:  # the status has been sent already
            yield api.to_sse(api.convert_error(error).body)

    def _log_answer(self, http: Request, choices: dict[int, api.Choice]) -> None:
        http.state.record["finish_reasons"] = [choice.finish_reason for choice in choices.values()]
        if self.settings.log_contents:
            http.state.record["answers"] = [choice.parts for choice in choices.values()]


async def fail_when_gone(http: Request, answer: Answer) -> None:
    """Wait for the client to disconnect."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    answer.fail(EngineError("gone", CLIENT_GONE))


def log_line(**fields) -> None:
    """One JSON object per line on stdout, in one write, since threads log, too; a closed stdout is ignored."""
    with contextlib.suppress(OSError):
        print(json.dumps({"time": now(), **fields}) + "\n", end="", flush=True)


class Gate:
    """Middleware around all routes: gives a request its id, checks host, key and body, logs it, closes its answer."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, log: Callable[..., None]):
        self.app, self.log = app, log
        self.api_key, self.hosts = settings.api_key, settings.hosts
        self.max_body_bytes = max(MIN_BODY_BYTES, MAX_CHAR_BYTES * settings.limits.max_conversation_chars)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, request_id, status = time.perf_counter(), f"req_{secrets.token_hex(8)}", 500
        record = scope.setdefault("state", {})["record"] = {}

        is_head = scope["method"] == "HEAD"

        async def send_start(message: Message) -> None:
            nonlocal status
            if is_head and message["type"] == "http.response.body":
                message["body"] = b""
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
            await send(message)
        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers)
            receive_again = await read_body(Request(scope, receive), self.max_body_bytes)
            await self.app(scope | {"method": "GET"} if is_head else scope, receive_again, send_start)
        except api.ApiError as error:
            await error.make_response()(scope, receive, send_start)
        finally:
            fields = {"id": request_id, "route": f"{scope['method']} {scope['path']}", "status": status}
            if answer := record.pop("answer", None):
                answer.close()
                first_token_sec = answer.first_token_sec
                fields |= {"prompt_tokens": answer.num_prompt_tokens, "tokens": answer.num_tokens,
                           "first_token_ms": first_token_sec and round(first_token_sec * 1e3, 1),
                           "worker": answer.worker.worker_idx}
            self.log(**fields, ms=round((time.perf_counter() - start) * 1e3, 1), **record)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Against DNS rebinding: a foreign page whose name resolves to this machine sends its own name as the host.

        Every browser sends a Host header; a client without one is no browser.
        """
        host = re.sub(r":[0-9]*$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if self.hosts and host and host not in self.hosts:
            raise api.ApiError(403, f"this server is for its own machine, as {' or '.join(self.hosts)}; under another "
                               "name it needs an API key: start it with --api-key-file", code="foreign_host")

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if self.api_key is not None and (
                kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key.encode())):
            raise api.ApiError(401, "this server needs its API key: send Authorization: Bearer <key>",
                               code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_body(request: Request, max_bytes: int) -> Receive:
    """Read a body of limited size in limited time; returns a function that receives it again, whole."""
    async def read() -> bytes:
        body, num_bytes = bytearray(), 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes <= max_bytes:
                body += chunk
            elif num_bytes > max_bytes + MAX_DISCARDED_BYTES:
                break
        if num_bytes > max_bytes:
            raise api.ApiError(413, f"the body is larger than {max_bytes} bytes")
        return bytes(body)
    try:
        messages = [{"type": "http.request", "body": await asyncio.wait_for(read(), BODY_TIMEOUT_SEC)}]
    except asyncio.TimeoutError:
        raise api.ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_SEC} s") from None
    except ClientDisconnect:
        raise api.convert_error(EngineError("gone", CLIENT_GONE)) from None

    async def receive_again() -> Message:
        return messages.pop() if messages else await request.receive()
    return receive_again


def load_page() -> Response:
    """The chat page, with a content security policy: only its own script runs, nothing loads from other servers."""
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
    """The application, on a pool that has been started."""
    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None)  # those load from elsewhere
    app.add_middleware(Gate, settings=settings, log=log)
    if settings.cors_origins:  # outside the gate, so that a page can read the gate's errors, too
        # Clients send headers of their own, as OpenAI's for JavaScript its x-stainless-*
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "HEAD", "POST"],
                           allow_headers=["*"], allow_private_network=True,
                           expose_headers=["X-Request-Id", "X-Dropped-Messages", "X-Ignored-Fields", "Retry-After"])

    async def answer_error(_, error: Exception) -> JSONResponse:
        return api.convert_error(error).make_response()
    for kind in (api.ApiError, EngineError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    add_routes(app, Service(settings, pool, tokenizer))
    return app


def add_routes(app: FastAPI, service: Service) -> None:
    """The routes that generate, the model's description, the server's state, and the page."""
    refused = {"4XX": {"model": api.ErrorResponse}}
    errors = refused | {"5XX": {"model": api.ErrorResponse}}
    stream, whole = {"text/event-stream": {}}, {"application/json": {}}
    settings, page = service.settings, load_page()
    description = {"id": settings.model_name, "object": "model", "created": settings.created, "owned_by": "nanochat",
                   "stage": settings.stage, "context_tokens": settings.context_tokens,  # these five: extensions
                   "max_tokens": settings.max_tokens, "limits": asdict(settings.limits),
                   "defaults": {name: getattr(settings, name) for name in ("temperature", "top_k", "max_tokens")}}

    @app.post("/v1/chat/completions", responses=errors | {200: {"content": whole | stream}})
    async def chat_completions(body: api.ChatRequest, http: Request):
        return await service.respond(http, body, api.ChatFormat)

    @app.post("/v1/completions", responses=errors | {200: {"content": whole | stream}})
    async def completions(body: api.CompletionRequest, http: Request):
        return await service.respond(http, body, api.TextFormat)

    @app.post("/chat/completions", responses=errors | {200: {"content": stream}}, response_class=StreamingResponse)
    async def legacy_chat_completions(body: api.LegacyChatRequest, http: Request):
        if body.model is not None or "x-stainless-lang" in http.headers:  # its own clients name no model
            raise api.ApiError(404, f"this is the legacy endpoint; {api.BASE_URL_HINT}", code="unknown_url")
        return await service.respond(http, body.to_chat_request(), api.LegacyFormat)

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [description]}

    @app.get("/v1/models/{name:path}", responses=refused)
    async def model(name: str):
        if name != settings.model_name:
            raise api.ApiError(404, f"this server has {settings.model_name!r} only", param="model",
                               code="model_not_found")
        return description

    @app.get("/health", responses={503: {}})
    async def health():
        workers = service.pool.get_stats()["workers"]
        num_ready = sum(worker["ready"] for worker in workers)
        return JSONResponse({"status": "ok" if num_ready else "starting", "ready": num_ready > 0,
                             "ready_workers": num_ready, "workers": len(workers), "model": settings.model_name,
                             "stage": settings.stage}, 200 if num_ready else 503)

    @app.get("/stats", responses=refused)
    async def stats():
        return service.pool.get_stats()

    @app.get("/", include_in_schema=False)
    async def index():
        return page
