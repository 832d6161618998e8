"""dev/gen_synthetic_data.py: from templates, and from a local server that behaves badly."""

import json
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dev import gen_synthetic_data
from dev.gen_synthetic_data import main
from nanochat.common import UserError
from tasks.customjson import CustomJSON
from tasks.embedded import Identity

GOOD = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada."}]}


class ChatServer(ThreadingHTTPServer):
    """Speaks OpenAI's chat completions; the first answers follow `script`: a status, "drop", or the model's text."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass    # a dropped connection is part of the tests


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, "body": body, "key": self.headers.get("Authorization")})
            number = len(self.server.requests)
            act = self.server.script.pop(0) if self.server.script else ""
        if act == "drop":
            self.close_connection = True
            return
        text = act or json.dumps({"messages": [{"role": "user", "content": f"Question {number}?"},
                                               {"role": "assistant", "content": "Ada."}]})
        answer = b"no" if act.isdigit() else json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(int(act) if act.isdigit() else 200)
        self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(gen_synthetic_data, "BACKOFF_SECONDS", 0.001)
    with ChatServer() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def ask(server, tmp_path):
    """Runs the command against the server for 8 conversations, one at a time."""
    (tmp_path / "about.md").write_text("Ada lives in {Oslo}.")     # braces are not placeholders

    def run(*extra):
        return main(["--out", str(tmp_path / "me.jsonl"), "--endpoint", server.url, "--model", "m", "--num", "8",
                     "--about", str(tmp_path / "about.md"), "--num-workers", "1", *extra])
    return run


def read(folder):
    return list(CustomJSON(folder / "me.jsonl"))


# ---------------------------------------------------------------------------------------------------------------------
# Templates


def test_identity_templates(tmp_path):
    argv = ["--name", "Ada", "--author", "Eve Moss", "--num", "300"]
    assert main(["--out", str(tmp_path / "me.jsonl"), *argv])["num_conversations"] == 300
    rows = read(tmp_path)
    assert len({json.dumps(row) for row in rows}) == 300 and [path.name for path in tmp_path.iterdir()] == ["me.jsonl"]
    text = (tmp_path / "me.jsonl").read_text()
    assert "Ada" in text and "Eve Moss" in text and "{{" not in text and "nanochat" not in text
    main(["--out", str(tmp_path / "again.jsonl"), *argv])
    main(["--out", str(tmp_path / "other.jsonl"), *argv, "--seed", "1"])
    assert (tmp_path / "again.jsonl").read_text() == text != (tmp_path / "other.jsonl").read_text()
    with pytest.raises(UserError, match="there already"):
        main(["--out", str(tmp_path / "me.jsonl"), *argv])


def test_no_question_of_the_test_split_is_written(tmp_path):
    main(["--out", str(tmp_path / "me.jsonl"), "--num", "500"])
    asked = {message["content"].lower().rstrip("?.!") for row in read(tmp_path) for message in row["messages"]
             if message["role"] == "user"}
    tested = {message["content"].lower().rstrip("?.!") for conversation in Identity("test", 300)
              for message in conversation["messages"] if message["role"] == "user"}
    assert len(asked) > 50 and len(tested) > 5 and not asked & tested


def test_own_templates(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"questions": ["Where?", "Where to?"], "answers": ["To {{city}}.", "{{city}}"]}]))
    argv = ["--out", str(tmp_path / "me.jsonl"), "--templates", str(path)]
    main([*argv, "--set", "city=Bergen=Oslo", "--num", "8"])
    pairs = Counter(tuple(message["content"] for message in row["messages"]) for row in read(tmp_path))
    assert len(pairs) == 8 and ("Where?", "To Bergen=Oslo.") in pairs and ("where to", "Bergen=Oslo") in pairs
    (tmp_path / "me.jsonl").unlink()
    path.write_text(path.read_text().replace("Where?", "?"))    # a mark alone is not cut off
    main([*argv, "--set", "city=Oslo", "--num", "6"])
    (tmp_path / "me.jsonl").unlink()
    with pytest.raises(UserError, match=r"has \{\{city\}\}, which has no value; add --set city=VALUE"):
        main(argv)
    with pytest.raises(UserError, match="about 6 different conversations; ask for fewer than --num 7"):
        main([*argv, "--set", "city=Oslo", "--num", "7"])
    assert not (tmp_path / "me.jsonl").exists()


@pytest.mark.parametrize("content", ["{", "[]", "[1]", '{"questions": []}', '[{"questions": ["a"]}]',
                                     '[{"questions": ["a"], "answers": []}]', '[{"questions": "a", "answers": ["b"]}]',
                                     '[{"questions": ["a"], "answers": [" "]}]',
                                     '[{"questions": [1], "answers": [2]}]'])
def test_templates_that_are_none(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match="mine.json is not"):
        main(["--out", str(tmp_path / "me.jsonl"), "--templates", str(tmp_path / "mine.json")])


@pytest.mark.parametrize(("argv", "message"), [
    (["--num", "0"], "--num 0 must be from 1 to 10,000,000"), (["--set", "city"], "--set city is not KEY=VALUE"),
    (["--endpoint", "http://x"], "needs --model NAME and --about FILE"), (["--model", "m"], "add --endpoint"),
    (["--endpoint", "http://x", "--model", "m", "--about", "a", "--name", "b"], "say it in --about"),
    (["--endpoint", "http://x", "--model", "m", "--about", "none.md"], "--about none.md can't be read"),
    (["--templates", "none.json"], "--templates none.json can't be read"),
    (["--set", "name= "], "name.* filled with nothing"), (["--set", "city="], "city.* filled with nothing"),
    (["--out", f"{__file__}/me.jsonl"], "--out .*me.jsonl can't be made")])
def test_flags_that_do_not_fit(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        main(["--out", str(tmp_path / "me.jsonl"), *argv])


# ---------------------------------------------------------------------------------------------------------------------
# An endpoint


def test_endpoint(server, ask, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    assert ask("--api-key-file", str(tmp_path / "key"), "--num-workers", "4")["num_conversations"] == 8
    assert sorted(row["messages"][0]["content"] for row in read(tmp_path)) == [f"Question {i}?" for i in range(1, 9)]
    assert not (tmp_path / "me.jsonl.part").exists()
    first = server.requests[0]
    assert first["path"] == "/v1/chat/completions" and first["key"] == "Bearer secret" and first["body"]["model"] == "m"
    prompts = {request["body"]["messages"][0]["content"] for request in server.requests}
    assert len(prompts) > 5 and all("Ada lives in {Oslo}." in prompt for prompt in prompts)


def test_faults_are_repeated(server, ask, tmp_path):
    bad_texts = ["I won't.", '{"messages": []}', json.dumps({"messages": GOOD["messages"][:1]}),
                 '{"messages": [{"role": "robot", "content": "x"}]}', '{"messages": [{"role": "user", "con']
    server.script = ["429", "503", "drop", "500", f"Sure!\n```json\n{json.dumps(GOOD)}\n```", *bad_texts]
    ask()
    rows = read(tmp_path)
    assert rows[0] == GOOD and len(rows) == 8
    assert len(server.requests) == 8 + 4 + len(bad_texts)


def test_continues_where_it_was_stopped(server, ask, tmp_path):
    server.script = [json.dumps(GOOD)] * 3 + ["401"]
    with pytest.raises(UserError, match="answered 401.*check --api-key-file"):
        ask()
    part = tmp_path / "me.jsonl.part"
    assert len(part.read_text().splitlines()) == 1 + 3 and not (tmp_path / "me.jsonl").exists()
    part.write_bytes(part.read_bytes() + b'{"index": 3, "conv')  # killed in the middle of a line
    with pytest.raises(UserError, match="begun with other settings"):
        ask("--seed", "1")
    ask()
    assert len(server.requests) == 4 + 5 and len(read(tmp_path)) == 8
    assert read(tmp_path)[:3] == [GOOD] * 3 and not part.exists()


def test_gives_up_on_a_server_that_is_down(server, ask, tmp_path, monkeypatch):
    monkeypatch.setattr(gen_synthetic_data, "MAX_ATTEMPTS", 2)
    server.script = [json.dumps(GOOD), *["500"] * 100]
    with pytest.raises(UserError, match="7 of 8 conversations are missing.*run the same command again"):
        ask()
    assert len(server.requests) <= 1 + 4 * 2    # three conversations, and the one that had begun
    server.script = []
    ask()
    assert len(read(tmp_path)) == 8


def test_damaged_part(ask, tmp_path):
    (tmp_path / "me.jsonl.part").write_text("{\n")
    with pytest.raises(UserError, match="me.jsonl.part is damaged .*delete it"):
        ask()


def test_command_line(tmp_path):
    def run(*argv):
        return subprocess.run([sys.executable, "-m", "dev.gen_synthetic_data", *argv], capture_output=True, text=True,
                              cwd=Path(__file__).parents[1])
    done = run("--out", str(tmp_path / "me.jsonl"), "--endpoint", "nowhere", "--model", "m", "--about", __file__)
    assert done.returncode == 2 and "--endpoint nowhere/chat/completions is no address" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
