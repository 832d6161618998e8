"""The server under load: one client at a time against many at once, each reading its stream, in one run.

    python -m dev.bench_server                              # depth 12, random weights, 16 clients
    python -m dev.bench_server --depth 4 --compile          # a small model, of which overhead is the larger part
    python -m dev.bench_server --clients 64 --depth 24 --device-type cuda --dtype bfloat16
    python -m dev.bench_server --url http://127.0.0.1:8000 http://127.0.0.1:8080    # servers that run, in turn

Starts scripts.chat_web on this machine with a model of random weights, and sends requests through the loopback network.
With --url it asks servers of OpenAI's API that run already, each its first model: ours, llama.cpp's, vLLM's. To compare
engines, serve one model with all of them (scripts.export); answers may end early then, and tokens are counted as the
server counts them.

The clients begin one after the other, within the time of one answer, and each sends its next question when it has its
answer. Tokens per second count the time in which all clients were active.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from urllib.parse import urlsplit

import requests
import torch

from dev.timing import make_random_model, print_rows
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.command_line import Parser, add_compute_flags, run_script
from nanochat.common import UserError
from nanochat.scaling import make_config
from nanochat.server_engines import compute_percentiles
from nanochat.tokenizer import NUM_BYTES, SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

ROUNDS = 3      # of each load
OWN_FLAGS = ("depth", "vocab_size", "max_seq_len", "workers", "compile", "device_type", "dtype")    # of its server
CONTENT = re.compile(rb'"content": ?"[^"]')    # text in a chunk of the stream


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--depth", type=int, default=12)
    add("--vocab-size", type=int, default=32768)
    add("--max-seq-len", type=int, default=1024, help="context in tokens")
    add("--url", nargs="+", help="servers that run already, instead of one with a random model")
    add("--api-key", help="of these servers")
    add("--clients", type=int, default=16, help="at once")
    add("--requests", type=int, default=2, help="of each client in each of the rounds")
    add("--prompt-tokens", type=int, default=60, help="length of a question: 60 are about 250 characters of English")
    add("--max-tokens", type=int, default=128, help="length of an answer")
    add("--workers", type=int, default=1, help="engine processes")
    add("--compile", action="store_true", help="as chat_web --compile")
    add_compute_flags(parser)
    args = parser.parse_args(argv)
    if not 2 <= args.clients <= 10_000:
        raise UserError("--clients must be from 2, as one alone is measured anyway, to 10,000")
    if min(args.requests, args.workers, args.max_tokens, args.prompt_tokens) < 1:
        raise UserError("--requests, --workers, --max-tokens and --prompt-tokens must be 1 or more")
    typed = [name for name in (*OWN_FLAGS, "api_key") if getattr(args, name) != parser.get_default(name)]
    if args.url and typed and typed[0] != "api_key":
        raise UserError(f"--{typed[0].replace('_', '-')} is for the server that this starts; with --url leave it out")
    if args.api_key and not args.url:
        raise UserError("--api-key is for the servers of --url; name them")
    return args


@dataclass(frozen=True)
class Timing:
    """One request, as its client saw it; times in seconds of one clock."""
    start:       float
    first_token: float
    end:         float
    num_tokens:  int


@dataclass(frozen=True)
class Server:
    """Where to ask, and for which model."""
    url:     str
    model:   str
    api_key: str | None = None

    @property
    def place(self) -> str:
        return urlsplit(self.url).netloc


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.url:
        servers = [find_server(url, args.api_key) for url in args.url]
        if twice := [server.url for i, server in enumerate(servers) if server in servers[:i]]:
            raise UserError(f"--url {twice[0]} is named twice; name each server once")
        return asyncio.run(measure(args, servers))
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(args, Path(folder))
        with start_server(args, folder) as url:
            return asyncio.run(measure(args, [find_server(url, None)]))


@contextlib.contextmanager
def start_server(args: argparse.Namespace, folder: str) -> Iterator[str]:
    """The address of scripts.chat_web, which serves the model in this base folder meanwhile."""
    command = ["env", f"NANOCHAT_BASE_DIR={folder}", sys.executable, "-m", "scripts.chat_web", "-i", "sft",
               "-p", "0", "-d", args.dtype, "--device-type", args.device_type, "--workers", str(args.workers),
               "--max-rows", str(args.clients)]
    command += ["--compile"] if args.compile else []
    server = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        url = f"http://127.0.0.1:{read_port(server)}"
        threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would stop it in its log
        yield url
    finally:
        server.terminate()
        server.communicate()


def find_server(url: str, api_key: str | None) -> Server:
    """The server at an address, with or without its /v1, and the first model that it names."""
    url = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    try:
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("it is no address such as http://127.0.0.1:8000")
        with requests.Session() as session:
            session.trust_env = False    # no proxy, since the requests themselves use none
            answer = session.get(f"{url}/v1/models", headers=make_headers(api_key), timeout=30)
        answer.raise_for_status()
        return Server(url, str(answer.json()["data"][0]["id"]), api_key)
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--url {url} doesn't answer as a server of OpenAI's API ({' '.join(str(error).split())}); "
                        "start it, or give its --api-key") from None


def make_headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def save_random_model(args: argparse.Namespace, base_dir: Path) -> None:
    """A checkpoint with tokens of one and two bytes: each letter of a question is a token, and none ends an answer."""
    pairs = [bytes((i // 128, 128 + i % 128)) for i in range(args.vocab_size - NUM_BYTES - len(SPECIAL_TOKENS))]
    ranks = {token: rank for rank, token in enumerate([bytes([byte]) for byte in range(NUM_BYTES)] + pairs)}
    tokenizer = RustBPETokenizer(SPLIT_PATTERN, ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})
    tokenizer.save(base_dir / "tokenizer" / "default")
    config = make_config(args.depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len)
    model = make_random_model(config, torch.float32, torch.device("cpu"))
    meta = {"model_config": vars(config), "tokenizer": {"name": "default", "hash": tokenizer.hash}}
    save_checkpoint(base_dir / "runs" / "sft" / "bench", 0, model, model.setup_optimizer(), meta)


def read_port(server: subprocess.Popen) -> int:
    """The port that the server prints when it is ready."""
    for line in server.stdout:
        if line.startswith("serving "):
            return int(line.rsplit(":", maxsplit=1)[1])
    raise UserError("the server ended before it was ready; its messages are above")


async def measure(args: argparse.Namespace, servers: list[Server]) -> dict:
    """Both loads of all servers in turn, and their ratios."""
    rng = random.Random(0)

    def make_questions(number: int) -> list[str]:
        return ["".join(rng.choices("abcdefgh ijklmnop", k=args.prompt_tokens)) for _ in range(number)]  # one each

    async def client(server: Server, questions: list[str], delay_sec: float) -> list[Timing]:
        await asyncio.sleep(delay_sec)
        try:
            return [await ask(server, question, args.max_tokens) for question in questions]
        except OSError as error:
            raise UserError(f"{server.url} broke the connection off ({error}); its log may tell why") from None

    async def load(server: Server, num_clients: int, num_requests: int, ramp_sec: float) -> list[list[Timing]]:
        return await asyncio.gather(*(client(server, make_questions(num_requests), ramp_sec * i / num_clients)
                                      for i in range(num_clients)))
    ramps_sec = []
    for server in servers:
        ((_, timing),) = await load(server, 1, 2, 0)
        ramps_sec.append(timing.end - timing.start)
        await load(server, args.clients, 1, ramps_sec[-1])  # the cache grows to its final size
    results = {(server, num): [] for server in servers for num in (1, args.clients)}
    for _ in range(ROUNDS):  # in turn, so that other work on this machine slows all
        for server, ramp_sec in zip(servers, ramps_sec, strict=True):
            results[server, 1].append(await load(server, 1, args.requests, 0))
            results[server, args.clients].append(await load(server, args.clients, args.requests, ramp_sec))
    rows = [({"server": server.place} if len(servers) > 1 else {}) | describe(num_clients, rounds)
            for (server, num_clients), rounds in results.items()]
    print_rows(rows)
    ratios = {}
    for server, alone, together in zip(servers, rows[::2], rows[1::2], strict=True):
        ratios[server.url] = {"tokens_per_sec_ratio": together["tokens/s"] / alone["tokens/s"],
                              "first_token_p95_ratio": together["first p95 ms"] / alone["first p95 ms"]}
        print(f"{server.place}: {args.clients} clients get {ratios[server.url]['tokens_per_sec_ratio']:.1f} times the "
              f"tokens/s of one; their p95 time to the first token is "
              f"{ratios[server.url]['first_token_p95_ratio']:.1f} times that of one")
    for server, *pair in zip(servers[1:], rows[2::2], rows[3::2], strict=True):
        alone, together = (theirs["tokens/s"] / ours["tokens/s"] for theirs, ours in zip(pair, rows[:2], strict=True))
        print(f"{server.place} gives {alone:.2f} times the tokens/s of {servers[0].place} to one client, "
              f"{together:.2f} times to {args.clients}")
    return {"rows": rows, "ratios": ratios}


async def ask(server: Server, question: str, max_tokens: int) -> Timing:
    """One streamed answer; the connection is closed after it, as HTTP/1.0 does."""
    body = json.dumps({"model": server.model, "messages": [{"role": "user", "content": question}], "stream": True,
                       "max_tokens": max_tokens, "stream_options": {"include_usage": True}})
    parts, start, first, last_line = urlsplit(server.url), time.perf_counter(), None, b""
    is_secure = parts.scheme == "https"
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or (443 if is_secure else 80),
                                                   ssl=is_secure or None)
    headers = {"Host": parts.netloc, "Content-Type": "application/json", "Content-Length": str(len(body)),
               **make_headers(server.api_key)}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    writer.write(f"POST {parts.path}/v1/chat/completions HTTP/1.0\r\n{lines}\r\n{body}".encode())
    while line := await reader.readline():
        if first is None and CONTENT.search(line):
            first = time.perf_counter()
        if line.startswith(b"data: {") or not last_line:    # else the status, which tells why there is no answer
            last_line = line
    writer.close()
    end, usage = time.perf_counter(), None
    with contextlib.suppress(ValueError, AttributeError):
        usage = json.loads(last_line.removeprefix(b"data: ")).get("usage")
    if not usage:
        raise UserError(f"{server.url} gave no answer that ends with its usage of tokens: "
                        f"{last_line.decode(errors='replace').strip() or 'nothing'}")
    return Timing(start, first or end, end, usage["completion_tokens"])  # a short answer may be no whole character


def count_together(clients: list[list[Timing]]) -> tuple[float, float]:
    """Tokens and seconds of the time in which all clients were active; a request counts by its part inside."""
    start, end = max(client[0].start for client in clients), min(client[-1].end for client in clients)
    if start >= end:
        raise UserError("the clients were never active all at once; give a larger --requests or --max-tokens")
    return sum(timing.num_tokens * max(0.0, min(timing.end, end) - max(timing.start, start))
               / (timing.end - timing.start) for client in clients for timing in client), end - start


def describe(num_clients: int, rounds: list[list[list[Timing]]]) -> dict:
    """One line of the table, from the timings of each client in each round."""
    timings = [timing for clients in rounds for client in clients for timing in client]
    first = compute_percentiles([timing.first_token - timing.start for timing in timings])
    token_sec = mean((timing.end - timing.first_token) / max(timing.num_tokens, 1) for timing in timings)
    counts, seconds = zip(*(count_together(clients) for clients in rounds), strict=True)
    return {"clients": num_clients, "requests": len(timings), "tokens": sum(timing.num_tokens for timing in timings),
            "tokens/s": sum(counts) / sum(seconds),
            "first p50 ms": first["p50"], "first p95 ms": first["p95"], "token ms": token_sec * 1e3}


if __name__ == "__main__":
    run_script(main)
