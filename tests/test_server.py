"""The server around the answers: key, host, log, health, CORS, page."""

import base64
import hashlib
import io
import json
import sys

import pytest

from nanochat import server
from tests.helpers import BYTE_TOKENIZER, make_model
from tests.server_helpers import CHAT, CONFIG, LEGACY, QUESTION, TEXT, ScriptedEngine, serving


class ClosedPipe(io.StringIO):
    def write(self, _):
        raise BrokenPipeError


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(make_model(CONFIG), BYTE_TOKENIZER, max_rows=4)


def test_api_key(engine):
    engine.script, engine.pause_sec = b"Hello", 0.0
    with serving(engine, api_key="secret") as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"},
                        {"Authorization": "Bearer sécret".encode()}):
            response = client.post(CHAT, json={"messages": QUESTION}, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/stats").status_code == client.get("/nope").status_code == 401
        assert client.get("/health").status_code == 200
        response = client.post(CHAT, json={"messages": QUESTION}, headers={"Authorization": "Bearer secret"})
        assert response.status_code == 200
        assert "secret" not in json.dumps(client.lines)


def test_foreign_host(engine):
    """A page elsewhere, whose name now points here, sends its own name."""
    engine.script, engine.pause_sec = b"Hello", 0.0
    with serving(engine, hosts=("localhost", "[::1]")) as client:
        for host, status in (("evil.example", 403), ("evil.example:8000", 403), ("localhost.evil.example", 403),
                             ("", 200), ("localhost", 200), ("LOCALHOST:8000", 200), ("[::1]:8000", 200)):
            response = client.post(CHAT, json={"messages": QUESTION}, headers={"Host": host})
            assert response.status_code == status, host
        assert client.get("/", headers={"Host": "evil.example"}).json()["error"]["code"] == "foreign_host"


def test_log_has_no_contents_unless_asked(engine):
    engine.script, engine.pause_sec = b"Answer!", 0.0
    for log_contents in (False, True):
        with serving(engine, log_contents=log_contents) as client:
            for path, stream in ((CHAT, False), (CHAT, True), (LEGACY, True)):
                client.post(path, json={"messages": [{"role": "user", "content": "Hello you"}], "stream": stream})
            client.post(TEXT, json={"prompt": "Hello you"})
            assert all(("Hello you" in json.dumps(line)) == ("Answer!" in json.dumps(line)) == log_contents
                       for line in client.lines)
            line = client.lines[0]
            assert line["route"] == f"POST {CHAT}" and line["status"] == 200 and line["tokens"] == 8
            assert line["ms"] >= line["first_token_ms"] > 0 and line["id"].startswith("req_")


@pytest.mark.parametrize("stdout", [None, ClosedPipe()])
def test_log_needs_no_stdout(stdout, monkeypatch):
    """A server goes on where its output was closed, from the start or by a reader that has ended."""
    monkeypatch.setattr(sys, "stdout", stdout)
    server.log_line(event="unseen")


def test_health_stats_models(engine):
    with serving(engine) as client:
        client.post(CHAT, json={"messages": QUESTION})
        health, stats, models = (client.get(path).json() for path in ("/health", "/stats", "/v1/models"))
        model = client.get("/v1/models/sft/toy").json()
    assert health["status"] == "ok"
    assert stats["rows"] == 4 and stats["running"] == stats["waiting"] == 0 and stats["tokens_per_sec"] > 0
    assert stats["answer_ms"]["p99"] >= stats["first_token_ms"]["p50"] > 0
    assert models["data"] == [model] and model["id"] == "sft/toy"
    assert model["context_tokens"] == CONFIG.sequence_len


def test_cors_only_where_asked(engine):
    headers = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with serving(engine) as client:
        assert client.options(CHAT, headers=headers).status_code == 405
    with serving(engine, cors_origins=("https://example.org",), api_key="secret") as other:
        allowed = other.options(CHAT, headers=headers)
        refused = other.post(CHAT, json={"messages": QUESTION}, headers={"Origin": "https://example.org"})
        for response, status in ((allowed, 200), (refused, 401)):
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == "https://example.org"


# What version 6.49.0 of openai for JavaScript sends from a page in Chrome
JAVASCRIPT_HEADERS = {
    "accept": "application/json", "authorization": "Bearer secret", "content-type": "application/json",
    "x-stainless-arch": "unknown", "x-stainless-lang": "js", "x-stainless-os": "Unknown",
    "x-stainless-package-version": "6.49.0", "x-stainless-retry-count": "0", "x-stainless-timeout": "600",
    "x-stainless-runtime": "browser:chrome", "x-stainless-runtime-version": "131.0.0"}


@pytest.mark.parametrize("method,path,body,headers", [
    ("GET", "/v1/models", None, {}), ("POST", CHAT, {"messages": QUESTION}, {}),
    ("POST", CHAT, {"messages": QUESTION, "stream": True}, {"x-stainless-helper-method": "stream"}),
    ("POST", TEXT, {"prompt": ["a", "b"]}, {"x-my-own": "1"})])
def test_javascript_client_works_from_a_page(engine, method, path, body, headers):
    """The preflight of a browser names each header that isn't a simple one; then comes the request itself."""
    engine.script = b"Hello"
    origin = {"Origin": "https://example.org"}
    names = ",".join(sorted({*JAVASCRIPT_HEADERS, *headers} - {"accept"}))
    with serving(engine, cors_origins=("https://example.org",), api_key="secret") as client:
        preflight = client.options(path, headers=origin | {
            "Access-Control-Request-Method": method, "Access-Control-Request-Headers": names,
            "Access-Control-Request-Private-Network": "true"})
        response = client.request(method, path, json=body and body | {"model": "sft/toy"},
                                  headers=JAVASCRIPT_HEADERS | headers | origin)
    assert preflight.status_code == response.status_code == 200, preflight.text + response.text
    assert set(preflight.headers["access-control-allow-headers"].replace(" ", "").lower().split(",")) >= set(
        names.split(","))
    for answer in (preflight, response):
        assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert "stop" in response.text or method == "GET"


def test_head_is_get_without_a_body(engine):
    with serving(engine, api_key="secret") as client:
        client.headers = {"Authorization": "Bearer secret"}
        for path in ("/", "/health", "/v1/models", "/v1/models/sft/toy", "/stats", "/openapi.json", "/nope", CHAT):
            head, got = client.head(path), client.get(path)
            assert head.status_code == got.status_code and head.content == b"" != got.content
            assert head.headers["content-type"] == got.headers["content-type"]
            assert path == "/stats" or head.headers["content-length"] == got.headers["content-length"]
        client.headers = {}
        assert client.head("/health").status_code == 200 and client.head("/v1/models").status_code == 401
    assert any(line["route"] == "HEAD /health" for line in client.lines)


def test_a_proxy_passes_streams_on_at_once(engine):
    engine.script = b"Hello"
    with serving(engine) as client:
        for path, body in ((CHAT, {"messages": QUESTION, "stream": True}), (LEGACY, {"messages": QUESTION}),
                           (TEXT, {"prompt": "a", "stream": True})):
            assert client.post(path, json=body).headers["x-accel-buffering"] == "no"


def test_page_runs_its_own_blocks_only(engine, monkeypatch, tmp_path):
    monkeypatch.setattr(server, "PAGE_PATH", tmp_path / "ui.html")
    with serving(engine) as client:
        assert client.get("/").status_code == 404
    (tmp_path / "ui.html").write_text("<style>p {}</style><p>é</p><script>\nlet a = '</p>';\n</script>")
    with serving(engine) as client:
        response = client.get("/")
    policy = response.headers["content-security-policy"]
    digest = base64.b64encode(hashlib.sha256(b"\nlet a = '</p>';\n").digest()).decode()
    assert response.status_code == 200 and f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';") and "connect-src 'self';" in policy and "unsafe" not in policy
