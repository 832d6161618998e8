"""The pool of engines: its queue, its timeouts, and engines that fail, hang or die."""

import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from nanochat import server_engines
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.server import make_app
from nanochat.server_engines import EnginePool, EngineSettings, start_process
from tests.helpers import BYTE_TOKENIZER, make_model
from tests.server_helpers import (
    CHAT,
    CONFIG,
    QUESTION,
    EngineThread,
    ScriptedEngine,
    make_settings,
    read_stream,
    save_toy,
    serving,
)


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(make_model(CONFIG), BYTE_TOKENIZER, max_rows=4)


def test_stream_sends_tokens_together(engine, monkeypatch):
    """The first at once, the last without delay, and what comes between them in pieces."""
    monkeypatch.setattr(server_engines, "HANDOVER_SEC", 30)
    engine.script, engine.pause_sec = b"Hello there, all of you.", 0.0
    start = time.perf_counter()
    for sample_count in (1, 2):
        body = {"messages": QUESTION, "stream": True, "max_tokens": 50, "n": sample_count, "logprobs": True}
        with serving(engine) as client:
            chunks = [choice for chunk in read_stream(client.post(CHAT, json=body)) for choice in chunk["choices"]]
        for index in range(sample_count):
            own = [choice for choice in chunks if choice["index"] == index]
            texts = [choice["delta"]["content"] for choice in own if choice["delta"].get("content")]
            assert "".join(texts) == "Hello there, all of you." and len(texts) <= 2
            tokens = [token["token"] for choice in own for token in choice["logprobs"]["content"]]
            assert "".join(tokens) == "Hello there, all of you."
            assert [choice["finish_reason"] for choice in own][-2:] == [None, "stop"]
    assert time.perf_counter() - start < 20


def test_full_queue_and_timeout(engine):
    engine.script, engine.pause_sec = b"a" * 100, 0.02
    with serving(engine, max_waiting=1, request_timeout_sec=0.5, max_tokens=90) as client:
        statuses = []
        threads = [threading.Thread(target=lambda: statuses.append(client.post(CHAT, json={"messages": QUESTION})))
                   for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(response.status_code for response in statuses) == [429, 504, 504, 504, 504, 504]
        (busy,) = [response for response in statuses if response.status_code == 429]
        assert int(busy.headers["retry-after"]) >= 1 and busy.json()["error"]["type"] == "rate_limit_error"
        assert client.post(CHAT, json={"messages": QUESTION, "n": 6}).status_code == 400  # never, however empty it is
        lines = client.post(CHAT, json={"messages": QUESTION, "stream": True}).text.strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        assert client.pool.get_stats()["running"] == 0
    time.sleep(0.1)
    assert not engine.has_work()


def test_engine_that_cannot_load():
    def start(_):
        ours, theirs = multiprocessing.Pipe()
        theirs.send(("failure", "no such device"))
        theirs.close()
        return ours, SimpleNamespace(join=lambda _: None, kill=lambda: None)
    lines = []
    pool = EnginePool(start, 1, 4, 8, lambda **fields: lines.append(fields))
    with pytest.raises(UserError, match="no such device"):
        pool.start()
    assert not pool.workers[0].thread.is_alive()


def test_long_steps_are_no_hang_but_endless_ones_are(monkeypatch):
    """A step may take longer than an engine may be silent; one without end silences it."""
    monkeypatch.setattr(server_engines, "PULSE_SEC", 0.02)
    monkeypatch.setattr(server_engines, "MAX_SILENT_SEC", 0.5)
    killed, unblock = threading.Event(), threading.Event()

    def kill(thread):
        killed.set()
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(thread.theirs.fileno())) as connection:
            connection.shutdown(socket.SHUT_RDWR)
    monkeypatch.setattr(EngineThread, "kill", kill)
    engine = ScriptedEngine(make_model(CONFIG), BYTE_TOKENIZER, max_rows=4)
    engine.pause_sec = 1.2
    body = {"messages": QUESTION, "max_tokens": 1}
    with serving(engine) as client:
        assert client.post(CHAT, json=body).status_code == 200 and not killed.is_set()
        monkeypatch.setattr(server_engines, "MAX_STEP_SEC", 0.1)
        engine.step = lambda: unblock.wait(30) and []
        response = client.post(CHAT, json=body)
        unblock.set()
        assert response.status_code == 503 and int(response.headers["retry-after"]) > 0 and killed.is_set()
        assert response.json()["error"]["code"] == "engine_lost"


def test_engine_that_hangs_within_a_message_is_killed(monkeypatch):
    """As one that is suspended while it writes more than the connection holds."""
    monkeypatch.setattr(server_engines, "PULSE_SEC", 0.02)
    monkeypatch.setattr(server_engines, "MAX_SILENT_SEC", 0.1)
    killed = threading.Event()

    def start(_):
        ours, theirs = multiprocessing.Pipe()
        theirs.send(("ready", "a pipe"))
        os.write(theirs.fileno(), struct.pack("!i", 100_000) + bytes(1000))  # a length, and less than that

        def kill():
            killed.set()
            theirs.close()
        return ours, SimpleNamespace(join=lambda _: None, kill=kill)
    pool = EnginePool(start, 1, 4, 8, lambda **_: None)
    pool.start()
    assert killed.wait(10)
    pool.close()
    assert "no sign of life" in pool.workers[0].failure


def test_conversations_stay_with_their_engine():
    """Where engines are as free, the prompt's beginning decides; else the one that is the least busy gets it."""
    engines = [ScriptedEngine(make_model(CONFIG), BYTE_TOKENIZER, max_rows=2) for _ in range(2)]

    def start(worker_idx):
        thread = EngineThread(engines[worker_idx])
        return thread.ours, thread
    lines = []
    pool = EnginePool(start, 2, 2, 0, lambda **_: None)
    pool.start()
    with TestClient(make_app(make_settings(), pool, BYTE_TOKENIZER, lambda **fields: lines.append(fields))) as client:
        for i in range(40):
            question = [{"role": "user", "content": f"{i % 10} Hi"}]
            client.post(CHAT, json={"messages": question, "max_tokens": 2})
        workers = [line["worker"] for line in lines]
        assert workers[:10] * 4 == workers and set(workers) == {0, 1}
        lines.clear()
        for engine in engines:
            engine.pause_sec = 0.01
        client.post(CHAT, json={"messages": QUESTION, "n": 2, "max_tokens": 2})
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(lambda _: client.post(CHAT, json={"messages": QUESTION}), range(4)))
    pool.close()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert sorted(line["worker"] for line in lines[1:]) == [0, 0, 1, 1]


@pytest.mark.skipif(sys.platform == "win32", reason="stops a process by a signal")
def test_hung_engine_is_replaced(tmp_path, monkeypatch):
    """An engine that hangs in the middle of an answer: its requests get an error, the others don't wait."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    save_toy(tmp_path, GPTConfig(**vars(CONFIG) | {"sequence_len": 4096}), stage="rl")  # its answers never end
    monkeypatch.setattr(server_engines, "MAX_SILENT_SEC", 4)
    lines: list[dict] = []
    settings = EngineSettings("rl", "toy", 3, "float32", "cpu", max_rows=4, num_workers=1)
    pool = EnginePool(functools.partial(start_process, settings=settings), 1, 4, 4,
                      lambda **fields: lines.append(fields))
    pool.start()
    app_settings = make_settings(context_tokens=4096, max_tokens=3000)
    with TestClient(make_app(app_settings, pool, BYTE_TOKENIZER, lambda **_: None)) as client:
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            stream = threads.submit(client.post, CHAT, json={"messages": QUESTION, "stream": True})
            while not pool.get_stats()["tokens_per_sec"]:
                time.sleep(0.01)
            os.kill(pool.workers[0].process.pid, signal.SIGSTOP)
            long_prompt = {"prompt": [1] * 4000, "n": 3}  # more than fits into the connection that nobody reads
            waiting = threads.submit(client.post, "/v1/completions", json=long_prompt)
            time.sleep(1)
            assert client.get("/health").status_code == 200 and not lines[1:]  # the hang isn't even noticed yet
        assert stream.result().status_code == 200 and '"code": "engine_lost"' in stream.result().text
        assert (waiting.result().status_code, waiting.result().headers["retry-after"]) == (503, "5")
        deadline = time.monotonic() + 60
        while client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    pool.close()
    assert [line for line in lines if line["event"] == "engine_lost"] == [
        {"event": "engine_lost", "worker": 0, "failure": "no sign of life for 5 s", "exit_code": -signal.SIGKILL}]


def test_an_engine_that_starts_while_the_pool_closes_is_killed():
    """Nobody would tell it to end: the pool knew only the one before it."""
    ours, theirs = multiprocessing.Pipe()
    killed = []

    def kill():
        killed.append(True)
        theirs.close()

    def start_engine(worker_idx):
        pool.closed.set()
        return ours, SimpleNamespace(kill=kill, join=lambda timeout: None)
    pool = EnginePool(start_engine, 1, 1, 8, lambda **_: None)
    thread = threading.Thread(target=pool.workers[0]._run_engine, daemon=True)
    thread.start()
    thread.join(30)
    assert killed and not thread.is_alive()
