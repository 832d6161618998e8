"""scripts.chat_web as people run it: a process with engines of its own, asked over the network of this machine."""

import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import openai
import pytest
import requests

from dev import bench_server
from nanochat.checkpoint_manager import get_step_name
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.server_api import Limits
from nanochat.server_engines import EngineSettings
from scripts import chat_web
from tests.helpers import BYTE_TOKENIZER, REPO_DIR, make_model
from tests.server_helpers import CONFIG, QUESTION, ServerProcess, save_toy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    base_dir = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
        save_toy(base_dir)
        # answers of this one never come to an end of their own: the output of its zero head is token 0
        save_toy(base_dir, GPTConfig(**vars(CONFIG) | {"sequence_len": 4096}), stage="rl")
    return base_dir


@pytest.fixture(scope="module")
def server(base_dir):
    server = ServerProcess(base_dir, "-i", "rl", "--workers", "2", "--max-rows", "4", "--queue", "4",
                           "--api-key", "secret", "-t", "0")
    yield server
    server.process.kill()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)


def open_stream(server: ServerProcess, **fields):
    """A response whose answer has begun; the rest can be read, or left."""
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions", headers={"Content-Type": "application/json",
                                                      "Authorization": "Bearer secret"},
        data=json.dumps({"messages": QUESTION, "stream": True, "max_tokens": 3000} | fields).encode())
    response = urllib.request.urlopen(request, timeout=60)
    response.readline()
    return response


def test_official_client(server, client):
    (model,) = client.models.list().data
    answer = client.chat.completions.create(model=model.id, messages=QUESTION, max_tokens=5, temperature=0, seed=1,
                                            logprobs=True, top_logprobs=2, stop=["never"], top_p=0.9)
    assert answer.usage.completion_tokens == 5 and answer.choices[0].finish_reason == "length"
    expected, _ = Engine(make_model(CONFIG), BYTE_TOKENIZER).generate_batch(
        BYTE_TOKENIZER.render_for_completion({"messages": QUESTION}), max_tokens=5, temperature=0)
    text = BYTE_TOKENIZER.decode(expected[0][-5:])
    assert answer.choices[0].message.content == text and len(answer.choices[0].logprobs.content) == 5
    stream = client.chat.completions.create(model=model.id, messages=QUESTION, max_tokens=5, temperature=0, n=2,
                                            stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == 1) == text
    assert chunks[-1].usage.completion_tokens == 10
    assert client.completions.create(model=model.id, prompt="Hi", max_tokens=3).usage.prompt_tokens == 3
    completion = client.completions.create(model=model.id, prompt=["a", "b"], n=2, max_tokens=2, echo=True)
    assert [choice.text[0] for choice in completion.choices] == ["a", "a", "b", "b"]
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError, match="isn't here"):
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=model.id, messages=QUESTION, temperature=9)
    with pytest.raises(openai.NotFoundError, match="ends with /v1"):
        client.with_options(base_url=server.url).chat.completions.create(model=model.id, messages=QUESTION)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        client.with_options(api_key="wrong").models.list()


EXAMPLES = [("python", code) for code in re.findall(
    r"```python\n(.*?)```", (REPO_DIR / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    if "http://127.0.0.1:8000/v1" in code] + [("bash", re.search(r"curl .*?}'", chat_web.__doc__, re.DOTALL)[0])]


@pytest.mark.parametrize("language,code", EXAMPLES)
def test_examples_of_the_readme_and_the_help(server, language, code, capsys):
    """As they stand there, but for the server's address and its key."""
    code = code.replace("http://127.0.0.1:8000", server.url)
    if language == "python":
        exec(re.sub(r'api_key="[^"]*"', 'api_key="secret"', code), {})
        assert capsys.readouterr().out
        return
    if shutil.which("curl") is None:
        pytest.skip("curl isn't installed")
    code = re.sub(r"\bcurl ", "curl -sS -H 'Authorization: Bearer secret' ", code)
    done = subprocess.run(["bash", "-ec", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and json.loads(done.stdout)["choices"][0]["message"]["content"], done.stderr


def test_large_body_hears_why(server):
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", data=b"x" * 10**7,
                                     headers={"Content-Type": "application/json", "Authorization": "Bearer secret"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=60)
    assert error.value.code == 413 and "larger than" in json.load(error.value)["error"]["message"]


def test_disconnect_frees_the_row_and_wait_ends(server):
    for attempt in range(5):    # on a machine that is busy with other things the first answers may end too early
        streams = [open_stream(server) for _ in range(6)]
        try:
            assert server.wait_for(lambda stats: stats["running"] == 6, timeout_sec=5)["waiting"] == 0
            break
        except AssertionError:
            if attempt == 4:
                raise
            for stream in streams:
                stream.close()
    for stream in streams:
        stream.close()
    server.wait_for(lambda stats: stats["running"] == 0, timeout_sec=5)
    # one who isn't streaming, too
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as connection:
        body = json.dumps({"messages": QUESTION, "max_tokens": 3000})
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\n"
                           f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        server.wait_for(lambda stats: stats["running"] == 1)
    server.wait_for(lambda stats: stats["running"] == 0, timeout_sec=5)


def test_dead_engine_is_replaced(server, client):
    streams = [open_stream(server) for _ in range(2)]
    stats = server.wait_for(lambda stats: stats["running"] == 2)
    assert [worker["running"] for worker in stats["workers"]] == [1, 1]
    engines = server.find_engines()
    assert len(engines) == 2
    os.kill(engines[0], signal.SIGKILL)
    stats = server.wait_for(lambda stats: sum(worker["ready"] for worker in stats["workers"]) == 1)
    assert client.chat.completions.create(model="rl/toy", messages=QUESTION, max_tokens=2).usage  # the other one
    bodies = [stream.read().decode() for stream in streams]
    assert sorted('"code": "engine_lost"' in body for body in bodies) == [False, True]
    assert sorted(body.rstrip().endswith("data: [DONE]") for body in bodies) == [False, True]
    stats = server.wait_for(lambda stats: all(worker["ready"] for worker in stats["workers"]), timeout_sec=60)
    assert sorted(worker["restarts"] for worker in stats["workers"]) == [0, 1]
    assert any(json.loads(line)["exit_code"] == -9 for line in server.lines if "engine_lost" in line)


def test_mistakes_end_with_one_sentence(base_dir, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is in use"):
            chat_web.main(["-p", str(port)])
    for argv, reason in ((["-i", "mid"], "there is no mid model"), (["-g", "nope"], "there is no"),
                         (["-s", "99"], "no checkpoint of step 99"), (["--host", "nowhere.invalid"], "can't listen"),
                         (["-p", "70000"], "--port"), (["-t", "3"], "--temperature"), (["--workers", "0"], "--workers"),
                         (["--max-choices", "0"], "--max-choices"), (["-m", "5000"], "--max-answer-tokens"),
                         (["--api-key", "é"], "one word"), (["--api-key-file", str(tmp_path / "no")], "can't be read")):
        with pytest.raises(UserError, match=reason):
            chat_web.main(argv)


@pytest.mark.parametrize("host,answers_at", [
    ("127.0.0.1", ["127.0.0.1"]), ("localhost", ["127.0.0.1"]), ("::1", ["::1"]), ("[::1]", ["::1"]),
    ("0.0.0.0", ["127.0.0.1"]), ("::", ["::1", "127.0.0.1"]), ("[::]", ["::1", "127.0.0.1"])])
def test_forms_of_hosts(host, answers_at):
    if ":" in host and not has_ipv6():
        with pytest.raises(UserError, match="can't listen"):
            chat_web.open_socket(host, 0)
        return
    with chat_web.open_socket(host, 0) as listener:
        for address in answers_at:
            socket.create_connection((address, listener.getsockname()[1]), timeout=5).close()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["", "nowhere.invalid", "a..b", "x" * 70, "http://127.0.0.1", "127.0.0.1:80", "\udcff",
                                  "192.0.2.1", "fe80::1%nowhere"])
def test_bad_hosts_end_with_one_sentence(host):
    with pytest.raises(UserError, match="can't listen at --host .* is this machine only"):
        chat_web.open_socket(host, 0)


@pytest.mark.parametrize("words", [["--workers", "99999"], ["--max-rows", "99999999"], ["--max-rows", "0"]])
def test_numbers_out_of_reach_are_refused(words):
    with pytest.raises(UserError, match="--workers must be from 1 to 1024, --max-rows from 1 to 65536"):
        chat_web.parse_args(words)


def test_flags_reach_the_server(base_dir, monkeypatch):
    served = []
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.setattr(chat_web, "EnginePool", lambda *_: SimpleNamespace(start=lambda: None, close=lambda: None))
    monkeypatch.setattr(chat_web, "make_app", lambda settings, *_: served.append(settings))
    monkeypatch.setattr(chat_web, "serve", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    limits = Limits(max_messages=1, max_message_chars=2, max_conversation_chars=3, max_answer_tokens=4, max_choices=5)
    os.utime(base_dir / "runs" / "rl" / "toy" / get_step_name(3), (1000, 1000))    # the checkpoint's time
    argv = [word for name, value in vars(limits).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    for host, hosts in (("127.0.0.2", {"127.0.0.1", "localhost", "[::1]", "127.0.0.2"}), ("0.0.0.0", set())):
        chat_web.main(["-i", "rl", "-p", "0", "-m", "3", "--host", host, *argv])
        assert served[-1].limits == limits and served[-1].max_tokens == 3 and set(served[-1].hosts) == hosts
        assert served[-1].created == 1000


def test_flags_reach_the_engine(base_dir, monkeypatch):
    made = []

    def stop_here(start, *args):
        made.append(start.keywords["settings"])
        raise UserError("seen")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.setattr(chat_web, "EnginePool", stop_here)
    with pytest.raises(UserError, match="seen"):
        chat_web.main(["-i", "rl", "-p", "0", "-d", "float32", "--device-type", "cpu", "--workers", "2",
                       "--max-rows", "4", "--compile"])
    assert made[0] == EngineSettings("rl", "toy", 3, "float32", "cpu", max_rows=4, num_workers=2, compile=True)


# ---------------------------------------------------------------------------------------------------------------------
# Long ones


@pytest.mark.slow
def test_fuzz_of_its_own_description(server):
    """No request that schemathesis makes up from /openapi.json, valid or not, gets a 5xx."""
    pytest.importorskip("schemathesis", reason="pip install schemathesis")
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--max-examples", "25",
               "--checks", "not_a_server_error,status_code_conformance,content_type_conformance", "--seed", "1",
               "--header", "Authorization: Bearer secret", "--no-color", "--workers", "1",
               "--phases", "coverage,fuzzing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=os.path.dirname(__file__))
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
def test_benchmark(capsys):
    argv = ["--depth", "1", "--vocab-size", "300", "--max-seq-len", "128", "--clients", "2", "--requests", "4"]
    result = bench_server.main([*argv, "--max-tokens", "4", "--prompt-tokens", "20", "--device-type", "cpu"])
    assert [row["requests"] for row in result["rows"]] == [12, 24]
    (ratios,) = result["ratios"].values()
    assert min(ratios["tokens_per_sec_ratio"], ratios["first_token_p95_ratio"]) > 0
    assert "times the tokens/s of one" in capsys.readouterr().out


def read_memory_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_500_requests_with_random_disconnects(base_dir):
    server = ServerProcess(base_dir, "-i", "rl", "--max-rows", "8", "--queue", "16", "-t", "1")
    for host, status in (("evil.example", 403), ("localhost", 200)):  # it has no key, so it is for this machine alone
        assert requests.get(server.url + "/health", headers={"Host": host}, timeout=10).status_code == status
    rng = random.Random(0)
    plans = [(rng.random() < 0.5, rng.randrange(1, 40), rng.random() * 0.05) for _ in range(500)]
    outcomes: list[str] = []

    def ask(leaves: bool, max_tokens: int, pause_sec: float) -> None:
        with open_stream(server, max_tokens=3000 if leaves else max_tokens) as stream:
            if leaves:
                time.sleep(pause_sec)
                outcomes.append("left")
            else:
                outcomes.append("done" if stream.read().rstrip().endswith(b"data: [DONE]") else "broken")

    def ask_all(some: list) -> int:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda plan: ask(*plan), some))
        server.wait_for(lambda stats: stats["running"] == stats["waiting"] == 0, timeout_sec=10)
        return sum(map(read_memory_bytes, [server.process.pid, *server.find_engines()]))
    ask_all(plans[:100])
    early_bytes, late_bytes = ask_all(plans[100:200]), ask_all(plans[200:])
    assert len(outcomes) == 500 and "broken" not in outcomes
    assert late_bytes - early_bytes < 20 * 2**20
    assert all(json.loads(line)["status"] == 200 for line in server.lines if '"POST' in line)
    assert threading.active_count() < 20 and server.stop() == 0


# The last one: it ends the server of this file
def test_closed_terminal_lets_answers_finish(server):
    """SIGHUP reaches all processes; the server then ends as by SIGTERM."""
    stream = open_stream(server, max_tokens=200)
    engines = server.find_engines()
    for pid in (*engines, server.process.pid):
        os.kill(pid, signal.SIGHUP)
    assert stream.read().decode().rstrip().endswith("data: [DONE]")
    assert server.process.wait(30) == 0
    for pid in engines:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
