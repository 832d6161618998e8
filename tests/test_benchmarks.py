"""The benchmarks of dev/ run: their figures are for a person to read, so only their form is checked."""

import http.server
import json
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from dev import bench_checkpoint, bench_kernels, bench_loader, bench_memory, bench_server, bench_split, bench_step
from dev.timing import print_table, time_in_turn
from nanochat.common import UserError
from nanochat.tokenizer import SPLIT_PATTERNS


@pytest.mark.parametrize(("module", "words", "message"), [
    (bench_checkpoint, ["--steps", "0"],          "--steps 0 must be at least 1"),
    (bench_loader,     ["--repeats", "0"],        "--repeats 0 must be at least 1"),
    (bench_memory,     ["--num-micro", "1", "0"], "--num-micro 0 must be at least 1"),
    (bench_server,     ["--clients", "99999"],    "--clients must be from 2, .* to 10,000"),
    (bench_split,      ["--num-chars", "0"],      "--num-chars 0 must be at least 1"),
    (bench_step,       ["--rounds", "0"],         "--rounds 0 must be at least 1")])
def test_numbers_out_of_reach_are_refused(module, words, message):
    with pytest.raises(UserError, match=message):
        module.parse_args(words)


@pytest.mark.parametrize("module", [bench_checkpoint, bench_kernels, bench_loader, bench_server, bench_split,
                                    bench_step])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.parse_args(["--help"])
    assert ended.value.code == 0 and "python -m dev." in capsys.readouterr().out


def test_whole_step(capsys):
    argv = ["--depth", "1", "--vocab-size", "128", "--max-seq-len", "32", "--rows", "2", "--rounds", "2"]
    (row,) = bench_step.main([*argv, "--compile", "off", "--dtype", "float32", "--device-type", "cpu"])["rows"]
    assert row["step ms"] > 0 and row["tokens/s"] == pytest.approx(64 / row["step ms"] * 1e3)
    assert "of matmul %" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no knob 'smaer'"):
        bench_step.main([*argv, "--variant", "num_experts=2", "smaer=1", "--device-type", "cpu"])
    more = ["--variant", "num_experts=2", "--compile", "off", "--dtype", "float32", "--device-type", "cpu"]
    dense, experts = bench_step.main([*argv, *more])["rows"]
    assert (dense["knobs"], dense["over the plain model's"]) == ("", 1) and experts["knobs"] == "num_experts=2"
    assert experts["over the plain model's"] == experts["step ms"] / dense["step ms"]


def test_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    argv = ["--depth", "1", "--vocab-size", "128", "--max-seq-len", "32", "--rows", "2", "--steps", "1", "--compile",
            "off", "--dtype", "float32", "--device-type", "cpu", "--json", str(tmp_path / "table.json")]
    rows = bench_checkpoint.main(argv)["rows"]
    assert [row["save"] for row in rows] == ["first", "later"] and all(row["load s"] > 0 for row in rows)
    assert json.loads((tmp_path / "table.json").read_text()) == rows
    assert list(tmp_path.iterdir()) == [tmp_path / "table.json"]    # no checkpoint is left behind


def test_resident_memory(capfd):
    """Of a process that trains: one number on the last line, which the process that compares reads."""
    assert bench_memory.main(["--resident", "--depth", "1", "--vocab-size", "128", "--max-seq-len", "32", "--rows", "2",
                              "--dtype", "float32", "--compile", "off", "--resident-of", "plain"]) == {}
    assert float(capfd.readouterr().out.split()[-1]) > 50


def test_resident_memory_by_loss(monkeypatch, capsys):
    def run(command, **options):
        return SimpleNamespace(returncode=0, stdout=f"attention sdpa\n{dict(fused=300, plain=400.5)[command[-1]]}\n")
    monkeypatch.setattr(bench_memory.subprocess, "run", run)
    rows = bench_memory.main(["--resident"])["rows"]
    assert rows == [{"loss": "fused", "peak MiB": 300.0}, {"loss": "plain", "peak MiB": 400.5}]
    assert "fused    300.00  0.75" in capsys.readouterr().out
    monkeypatch.setattr(bench_memory.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3, stdout=""))
    with pytest.raises(SystemExit) as ended:
        bench_memory.main(["--resident"])
    assert ended.value.code == 3


def test_split_patterns(capsys):
    rows = bench_split.main(["--vocab-size", "300", "--num-chars", "2000", "--rounds", "1"])["rows"]
    assert [row["pattern"] for row in rows] == list(SPLIT_PATTERNS) and all(row["Hindi"] > 0.3 for row in rows)
    assert "Hebrew with points" in capsys.readouterr().out


def test_table(capsys):
    print_table(["name", "ms"], [["a", 1.5], ["long", 1234.0]])
    print_table([], [["a", "b"]])
    assert capsys.readouterr().out == "name  ms\na         1.50\nlong  1,234.00\na  b\n"


def test_variants_take_turns():
    """And turns at being the first, whose caches are cold."""
    order = []
    ms = time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), rounds=3)
    assert "".join(order) == "abbaabbaab" and set(ms) == {"a", "b"}  # two rounds of warm-up


# ---------------------------------------------------------------------------------------------------------------------
# Servers that run already

CHUNKS = ('{"choices":[{"delta":{"role":"assistant","content":null}}]}', '{"choices":[{"delta":{"content":"a"}}]}',
          '{"choices":[],"usage":{"completion_tokens":7}}')


class Handler(http.server.BaseHTTPRequestHandler):
    """As other engines answer: compact JSON, a header of their own, usage in the last chunk."""
    asked: list[tuple[str, dict]] = []
    chunks = CHUNKS

    def log_message(self, *args):
        """No lines among the test's own."""

    def answer(self, kind, text):
        is_known = self.headers["Authorization"] == "Bearer secret"
        self.send_response(200 if is_known else 401)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.answer("application/json", json.dumps({"data": [{"id": "their-model"}]}))

    def do_POST(self):
        self.asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        time.sleep(0.01)
        self.answer("text/event-stream", "".join(f"data: {chunk}\n\n" for chunk in self.chunks) + "data: [DONE]\n\n")


@pytest.fixture
def urls(monkeypatch):
    """Two servers of OpenAI's API."""
    monkeypatch.setattr(Handler, "asked", [])
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


def test_servers_that_run_already(urls, capsys):
    argv = ["--url", urls[0], urls[1] + "/v1/", "--api-key", "secret", "--clients", "2", "--requests", "3"]
    result = bench_server.main([*argv, "--max-tokens", "9"])
    assert [(row["server"], row["clients"], row["requests"], row["tokens"]) for row in result["rows"]] == [
        (url.removeprefix("http://"), clients, 9 * clients, 63 * clients) for url in urls for clients in (1, 2)]
    assert all(0 < row["first p50 ms"] for row in result["rows"]) and list(result["ratios"]) == urls
    path, body = Handler.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "their-model" and body["max_tokens"] == 9
    assert "times the tokens/s of 127.0.0.1" in capsys.readouterr().out


def test_servers_that_do_not_answer(urls, monkeypatch):
    for argv, reason in ((["--url", urls[0]], "doesn't answer as a server of OpenAI's API .*401.*give its --api-key"),
                         (["--url", "127.0.0.1:9"], "it is no address such as http://127.0.0.1:8000"),
                         (["--url", "http://127.0.0.1:9"], "doesn't answer as a server"),
                         (["--url", urls[0], "--depth", "4"], "--depth is for the server that this starts; with --url"),
                         (["--url", urls[0], urls[0] + "/v1", "--api-key", "secret"], "is named twice; name each"),
                         (["--api-key", "secret"], "--api-key is for the servers of --url; name them")):
        with pytest.raises(UserError, match=reason):
            bench_server.main(argv)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="127.0.0.1:9 broke the connection off "):
        patch.setattr(bench_server, "find_server", lambda url, _: bench_server.Server(url, "ended since then"))
        bench_server.main(["--url", "http://127.0.0.1:9"])
    monkeypatch.setattr(Handler, "chunks", CHUNKS[:2])
    with pytest.raises(UserError, match='gave no answer that ends with its usage of tokens: data: {"choices"'):
        bench_server.main(["--url", urls[0], "--api-key", "secret"])
