"""2,000 mutated requests to the server: each outcome is a result, or one error object with a sentence and a 4xx."""

import asyncio
import collections
import copy
import json
import random

import httpx

from nanochat.server import make_app
from nanochat.server_api import UNSUPPORTED, ChatRequest, CompletionRequest, Limits
from tests.helpers import BYTE_TOKENIZER, make_model
from tests.server_helpers import CHAT, CONFIG, LEGACY, QUESTION, TEXT, ScriptedEngine, make_pool, make_settings

NUM_REQUESTS = 2000
MAX_SEC = 10       # for one request
PARALLEL = 16
PARTS = [{"type": "text", "text": "It is "}, {"type": "python", "text": "34*27"},
         {"type": "python_output", "text": "918"}, {"type": "text", "text": "."}]
HISTORY = [{"role": "system", "content": "Be brief."}, *QUESTION, {"role": "assistant", "content": PARTS},
           {"role": "user", "content": [{"type": "text", "text": "Sure?"}]}]
TOOL_HISTORY = [*QUESTION, {"role": "assistant", "content": None, "tool_calls": [
    {"id": "a", "type": "function", "function": {"name": "python", "arguments": '{"code": "1+1"}'}}]},
    {"role": "tool", "tool_call_id": "a", "content": "2"}, {"role": "developer", "content": "Go on."}]
REQUESTS = [
    (CHAT, {"messages": QUESTION}), (CHAT, {"messages": HISTORY, "stream": True, "stop": ["918"], "model": "sft/toy"}),
    (CHAT, {"messages": QUESTION, "n": 2, "logprobs": True, "top_logprobs": 2, "seed": 1, "temperature": 1.0}),
    (CHAT, {"messages": TOOL_HISTORY, "max_completion_tokens": 5, "stream": True,
            "stream_options": {"include_usage": True}}),
    (TEXT, {"prompt": "The", "max_tokens": 3, "echo": True, "top_p": 0.9}), (TEXT, {"prompt": ["a", "b"], "n": 2}),
    (TEXT, {"prompt": [5, 6], "logprobs": 1, "stream": True}), (TEXT, {"prompt": [[5, 6], [7]], "top_k": 3}),
    (LEGACY, {"messages": HISTORY, "temperature": 0.5, "top_k": 3, "max_tokens": 4}),
    ("/v1/models", None), ("/v1/models/sft/toy", None), ("/health", None), ("/stats", None), ("/", None)]
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *UNSUPPORTED, "user", "no_such_field"})
VALUES = [None, True, False, 0, 1, 2, -1, 3.5, 1e308, 5e-324, float("nan"), float("-inf"), 10**40, "", " ", "a", "\x00",
          "\ud800", "日本 😀", "x" * 9000, [], {}, [[]], [None], [1], ["a"], ["a", 1], [[1, 2], [3]], {"a": 1}, [{}],
          {"role": "user", "content": "Hi"}, {"type": "text"}, {"include_usage": 1}, "user", "assistant", "tool"]


def mutate_value(rng: random.Random, body):
    """A copy of a JSON value with one place replaced, removed or repeated."""
    body = copy.deepcopy(body)
    places = []

    def collect(value) -> None:
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                collect(value[key])
    collect(body)
    action = rng.choice(("replace", "replace", "replace", "add", "remove", "repeat"))
    if action == "add" or not places:
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
        return body
    holder, key = rng.choice(places)
    if action == "replace":
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    elif action == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.extend([holder[key]] * rng.choice((1, 3, 600)))
    return body


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes cut, flipped, inserted or repeated."""
    place = rng.randrange(len(content) + 1)
    match rng.choice(("cut", "flip", "insert", "repeat", "drop")):
        case "cut":
            return content[:place]
        case "flip":
            return bytes(byte ^ (1 << rng.randrange(8)) if rng.random() < 0.02 else byte for byte in content)
        case "insert":
            more = rng.choice((b"\x00", b"\xff", b"[" * 2000, b'"', b",", b"9" * 5000))
            return content[:place] + more + content[place:]
        case "repeat":
            return content * 2
    return content[place:]


def make_request(rng: random.Random) -> httpx.Request:
    path, body = rng.choice(REQUESTS[:9] if rng.random() < 0.9 else REQUESTS)
    headers, content, method = {"Content-Type": "application/json"}, b"", "GET" if body is None else "POST"
    if body is not None:
        for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 4))):
            body = mutate_value(rng, body)
        encoding = rng.choice(("utf-8",) * 8 + ("utf-8-sig", "utf-16", "utf-32-le", "cp037"))
        content = json.dumps(body, ensure_ascii=rng.random() < 0.5 or encoding == "cp037").encode(
            encoding, "surrogatepass")
        if rng.random() < 0.1:
            content = mutate_bytes(rng, content)
    if rng.random() < 0.08:
        headers["Content-Type"] = rng.choice((
            "text/plain", "", "application/json; charset=latin-1", "multipart/form-data",
            "application/x-www-form-urlencoded", "application/problem+json", "é"))
    if rng.random() < 0.05:
        headers |= rng.choice(({"Authorization": "Basic x"}, {"X-Stainless-Lang": "js"}, {"Host": "é.example:x"},
                               {"Expect": "100-continue"}, {"Accept": "text/html"}, {"Origin": "null"}))
    if rng.random() < 0.05:
        method = rng.choice(("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST", "BREW"))
    if rng.random() < 0.05:
        path = rng.choice((path.removeprefix("/v1"), "/v1" + path, path + "/", path + "?a=%ff&b", path + "%00",
                           "/v1/models/é%2f..", "//" + path, "/../etc/passwd", "/v1/embeddings"))
    headers = {name: value.encode() for name, value in headers.items()}
    return httpx.Request(method, "http://server" + path, headers=headers, content=content)


def check_outcome(request: httpx.Request, response: httpx.Response) -> str:
    """The kind of an outcome; fails for one that a client couldn't understand."""
    note = f"{request.method} {request.url} {dict(request.headers)} {request.content[:1500]} -> {response.text[:500]}"
    assert response.status_code == 200 or 400 <= response.status_code < 500, note
    if request.method == "HEAD":
        assert not response.content
        return "head"
    if response.status_code == 200 and not response.headers["content-type"].startswith("text/event-stream"):
        assert response.headers["content-type"].startswith("text/html") or "error" not in response.json(), note
        return "result"
    if response.status_code == 200:
        *events, last = response.text.strip().split("\n\n")
        if last in ("data: [DONE]", 'data: {"done": true}'):
            assert not any(json.loads(event.removeprefix("data: ")).get("error") for event in events), note
            return "stream"
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        error = response.json()["error"]
    message = error["message"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"], note
    assert 2 < len(message.split()) < 100 and "\n" not in message and "Traceback" not in message, note
    return "error"


def test_each_outcome_is_a_result_or_a_sentence():
    engine = ScriptedEngine(make_model(CONFIG), BYTE_TOKENIZER, max_rows=32)
    pool = make_pool(engine, max_waiting=64)
    settings = make_settings(max_tokens=3, limits=Limits(max_answer_tokens=4, max_choices=4))
    app = make_app(settings, pool, BYTE_TOKENIZER, lambda **_: None)
    rng = random.Random(0)
    requests = iter([make_request(rng) for _ in range(NUM_REQUESTS)])
    outcomes: collections.Counter = collections.Counter()

    async def ask_some(client: httpx.AsyncClient) -> None:
        for request in requests:
            response = await asyncio.wait_for(client.send(request, follow_redirects=True), MAX_SEC)
            outcomes[check_outcome(request, response)] += 1

    async def ask_all() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as client:
            await asyncio.gather(*(ask_some(client) for _ in range(PARALLEL)))
    try:
        asyncio.run(ask_all())
        assert outcomes.total() == NUM_REQUESTS
        assert min(outcomes["result"], outcomes["stream"], outcomes["error"]) > 100 and outcomes["head"], outcomes
        assert not engine.has_work()
    finally:
        pool.close()
