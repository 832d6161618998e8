"""What every HTTP request passes before and after its route: an id, host, key and size of body, a line in the log.

Also how errors become OpenAI's error JSON.
"""

import asyncio
import contextlib
import hmac
import json
import re
import secrets
import sys
import time
from collections.abc import Callable

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.api_types import ApiError, describe_validation
from nanochat.common import now
from nanochat.engine_pool import Busy, EngineError, Refused, TimeOver

MAX_BODY_BYTES = 2**20
MAX_DISCARDED_BYTES = 2**25    # of a body that is too large: read, so that the client hears why before it is cut off
BODY_TIMEOUT_SEC = 30          # for a body to arrive
CLIENT_GONE = 499              # for the log; nobody receives it
OPEN_PATHS = {"/", "/health", "/openapi.json"}  # no key needed
SECURITY_HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


def log_line(**fields) -> None:
    """One JSON object per line, on stdout; in one piece, for threads log, too. That nobody reads it stops nothing."""
    with contextlib.suppress(OSError):
        sys.stdout.write(json.dumps({"time": now(), **fields}) + "\n")
        sys.stdout.flush()


class Gate:
    """Gives a request its id, checks its host, its key and the size of its body, logs it, and drops its answer when it
    ends."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: tuple[str, ...], log: Callable[..., None]):
        self.app, self.api_key, self.hosts, self.log = app, api_key, hosts, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, request_id, status = time.perf_counter(), f"req_{secrets.token_hex(8)}", 500
        record = scope.setdefault("state", {})["record"] = {}

        async def send_start(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
            await send(message)
        try:
            self._check_host(scope)
            self._check_key(scope)
            await self.app(scope, await read_body(receive), send_start)
        except ApiError as error:
            await make_error_response(error)(scope, receive, send_start)
        finally:
            fields = {"id": request_id, "route": f"{scope['method']} {scope['path']}", "status": status}
            if answer := record.pop("answer", None):
                answer.close()
                first_token_sec = answer.first_token_sec
                fields |= {"prompt_tokens": answer.num_prompt_tokens, "tokens": answer.num_tokens,
                           "first_token_ms": first_token_sec and round(first_token_sec * 1e3, 1),
                           "worker": answer.worker.worker_idx}
            self.log(**fields, ms=round((time.perf_counter() - start) * 1e3, 1), **record)

    def _check_host(self, scope: Scope) -> None:
        """A foreign page whose name is made to point at this machine could else read a keyless server's answers.

        Every browser sends the name that it knows; a client that sends none is no browser.
        """
        host = re.sub(r":[0-9]*$", "", dict(scope["headers"]).get(b"host", b"").decode("latin-1")).lower()
        if self.hosts and host and host not in self.hosts:
            raise ApiError(403, f"this server is for its own machine, as {' or '.join(self.hosts)}; under another name "
                           "it needs an API key: start it with --api-key-file", code="foreign_host")

    def _check_key(self, scope: Scope) -> None:
        if self.api_key is None or scope["path"] in OPEN_PATHS:
            return
        sent = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, sent_key = sent.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(sent_key.strip(), self.api_key.encode()):
            raise ApiError(401, "this server needs its API key: send Authorization: Bearer <key>",
                           code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_body(receive: Receive) -> Receive:
    """Read a body, if it isn't too large; returns what receives it again, whole."""
    async def read() -> bytes:
        body, num_bytes, more = bytearray(), 0, True
        while more and num_bytes <= MAX_DISCARDED_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(CLIENT_GONE, "the client has gone")
            body += message.get("body", b"") if num_bytes <= MAX_BODY_BYTES else b""
            num_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        if num_bytes > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        return bytes(body)
    try:
        body = await asyncio.wait_for(read(), BODY_TIMEOUT_SEC)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_SEC} s") from None
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return messages.pop() if messages else await receive()
    return receive_again


def make_error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


def convert_error(error: Exception) -> ApiError:
    """What went wrong in the words of the API."""
    match error:
        case ApiError():
            return error
        case RequestValidationError():
            return describe_validation(error.errors())
        case Busy(retry_after_sec=seconds):
            return ApiError(429, str(error), kind="rate_limit_error", code="queue_full",
                            headers={"Retry-After": str(seconds)})
        case TimeOver():
            return ApiError(504, str(error), kind="timeout_error", code="timeout")
        case Refused():
            return ApiError(400, str(error))
        case EngineError():
            return ApiError(503, str(error), kind="server_error", code="engine_lost", headers={"Retry-After": "5"})
        case HTTPException(status_code=404):
            return ApiError(404, "there is no such route; see /openapi.json", code="unknown_url")
        case HTTPException(status_code=405):
            return ApiError(405, "this route has other methods; see /openapi.json", code="method_not_allowed",
                            headers=error.headers)
        case HTTPException():  # FastAPI's, for a body that isn't UTF-8 or is nested too deeply
            return ApiError(error.status_code, "the body can't be read: it must be JSON in UTF-8, not nested deeply")
    return ApiError(500, "the server has failed; its own output says how", kind="server_error")
