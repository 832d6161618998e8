"""The server under load: one client at a time against many at once, each reading its stream, in one run.

    python -m dev.bench_server                              # depth 12, random weights, 16 clients
    python -m dev.bench_server --depth 4 --compile          # a small model, of which overhead is the larger part
    python -m dev.bench_server --clients 64 --depth 24 --device-type cuda --dtype bfloat16

Starts scripts.chat_web on this machine with a model of random weights, and sends requests through the loopback network.
The clients begin one after the other, within the time of one answer, and each sends its next question when it has its
answer. Tokens per second count the time in which all clients were active.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from dev.timing import add_device_args, make_random_model, print_rows
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import UserError, run_script
from nanochat.scaling import make_config
from nanochat.server_engines import compute_percentiles
from nanochat.tokenizer import NUM_BYTES, SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer

ROUNDS = 3      # of each load


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=12)
    add("--vocab-size", type=int, default=32768)
    add("--max-seq-len", type=int, default=1024, help="context in tokens")
    add("--clients", type=int, default=16, help="at once")
    add("--requests", type=int, default=2, help="of each client in each of the rounds")
    add("--prompt-tokens", type=int, default=60, help="length of a question: 60 are about 250 characters of English")
    add("--max-tokens", type=int, default=128, help="length of an answer")
    add("--workers", type=int, default=1, help="engine processes")
    add("--compile", action="store_true", help="as chat_web --compile")
    add_device_args(parser)
    args = parser.parse_args(argv)
    if args.clients < 2:
        raise UserError("--clients must be 2 or more: one alone is measured anyway")
    if min(args.requests, args.workers, args.max_tokens, args.prompt_tokens) < 1:
        raise UserError("--requests, --workers, --max-tokens and --prompt-tokens must be 1 or more")
    return args


@dataclass(frozen=True)
class Timing:
    """One request, as its client saw it; times in seconds of one clock."""
    start:       float
    first_token: float
    end:         float
    num_tokens:  int


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(args, Path(folder))
        command = ["env", f"NANOCHAT_BASE_DIR={folder}", sys.executable, "-m", "scripts.chat_web", "-i", "sft",
                   "-p", "0", "-d", args.dtype, "--workers", str(args.workers), "--max-rows", str(args.clients)]
        command += ["--device-type", args.device_type] if args.device_type else []
        command += ["--compile"] if args.compile else []
        server = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
        try:
            port = read_port(server)
            threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would stop it in its log
            return asyncio.run(measure(args, port))
        finally:
            server.terminate()
            server.communicate()


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


async def measure(args: argparse.Namespace, port: int) -> dict:
    """Both loads in turn, and their ratios."""
    rng = random.Random(0)

    def make_questions(number: int) -> list[str]:
        return ["".join(rng.choices("abcdefgh ijklmnop", k=args.prompt_tokens)) for _ in range(number)]  # one each

    async def client(questions: list[str], delay_sec: float) -> list[Timing]:
        await asyncio.sleep(delay_sec)
        return [await ask(port, question, args.max_tokens) for question in questions]

    async def load(num_clients: int, num_requests: int, ramp_sec: float) -> list[list[Timing]]:
        return await asyncio.gather(*(client(make_questions(num_requests), ramp_sec * i / num_clients)
                                      for i in range(num_clients)))
    ((_, timing),) = await load(1, 2, 0)
    ramp_sec = timing.end - timing.start
    await load(args.clients, 1, ramp_sec)  # the cache grows to its final size
    results: dict[int, list[list[list[Timing]]]] = {1: [], args.clients: []}
    for _ in range(ROUNDS):  # in turn, so that other work on this machine slows both
        results[1].append(await load(1, args.requests, 0))
        results[args.clients].append(await load(args.clients, args.requests, ramp_sec))
    rows = [describe(num_clients, rounds) for num_clients, rounds in results.items()]
    print_rows(rows)
    alone, together = rows
    ratios = {"tokens_per_sec_ratio": together["tokens/s"] / alone["tokens/s"],
              "first_token_p95_ratio": together["first p95 ms"] / alone["first p95 ms"]}
    print(f"{args.clients} clients get {ratios['tokens_per_sec_ratio']:.1f} times the tokens/s of one; their p95 time "
          f"to the first token is {ratios['first_token_p95_ratio']:.1f} times that of one")
    return {"rows": rows} | ratios


async def ask(port: int, question: str, max_tokens: int) -> Timing:
    """One streamed answer; the connection is closed after it, as HTTP/1.0 does."""
    body = json.dumps({"messages": [{"role": "user", "content": question}], "stream": True, "max_tokens": max_tokens,
                       "stream_options": {"include_usage": True}})
    start, first, last_line = time.perf_counter(), None, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
    while line := await reader.readline():
        if first is None and b'"delta": {"content": "' in line:
            first = time.perf_counter()
        if line.startswith(b"data: {"):
            last_line = line
    writer.close()
    usage = json.loads(last_line.removeprefix(b"data: ")).get("usage")
    end = time.perf_counter()
    if not usage:
        raise UserError(f"the server gave no answer: {last_line.decode() or 'nothing'}")
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
    token_sec = mean((timing.end - timing.first_token) / timing.num_tokens for timing in timings)
    counts, seconds = zip(*(count_together(clients) for clients in rounds), strict=True)
    return {"clients": num_clients, "requests": len(timings), "tokens": sum(timing.num_tokens for timing in timings),
            "tokens/s": sum(counts) / sum(seconds),
            "first p50 ms": first["p50"], "first p95 ms": first["p95"], "token ms": token_sec * 1e3}


if __name__ == "__main__":
    run_script(main)
