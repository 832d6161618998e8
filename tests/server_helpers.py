"""What the tests of conversations and of the server share: what answers by a script, an engine in a thread, a server
in a process."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from starlette.testclient import TestClient
from torch import nn

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.engine import Engine
from nanochat.server import ServerSettings, make_app
from nanochat.server_engines import EnginePool, run_engine
from tests.helpers import BYTE_TOKENIZER, REPO_DIR, TINY, make_model

CONFIG = replace(TINY, sequence_len=256)
CHAT, TEXT, LEGACY = "/v1/chat/completions", "/v1/completions", "/chat/completions"
QUESTION = [{"role": "user", "content": "Hi"}]


# A word of the question -> the answer
SCRIPTS = {"27": "That is <|python_start|>34*27<|python_end|>.", "slow": "tick " * 400, "evil": "\x1b[2Jdone\x07",
           "": "Hello!"}


class ScriptedModel(nn.Module):
    """Answers each question by its script; its position in the script is that of the tokens in its cache."""
    config = SimpleNamespace(vocab_size=265, n_layer=1, n_kv_head=1, head_dim=2, n_embd=1, sequence_len=300)
    compute_dtype, balance = torch.float32, None

    def __init__(self, step_sec=0.0):
        super().__init__()
        self.cos = range(1000)  # positions
        self.step_sec = step_sec
        self.num_read = 0       # tokens

    def get_device(self):
        return torch.device("cpu")

    def embed_tokens(self, idx):
        return torch.zeros(*idx.shape, 1)

    def forward_trunk(self, idx, kv_cache):
        start = int(kv_cache.cache_seqlens[0])
        kv_cache.k_cache[0, 0, start:start + idx.size(1), 0, 0] = idx[0].float()
        kv_cache.advance(idx.size(1))
        self.num_read += idx.size(1)

    def forward(self, idx, kv_cache):
        self.forward_trunk(idx, kv_cache)
        time.sleep(self.step_sec)
        text = BYTE_TOKENIZER.decode(kv_cache.k_cache[0, 0, :int(kv_cache.cache_seqlens[0]), 0, 0].int().tolist())
        question, answer = text.split("<|user_start|>")[-1].split("<|user_end|><|assistant_start|>")
        script = next(script for word, script in SCRIPTS.items() if word in question)
        answer = re.sub(r"<\|output_start\|>.*<\|output_end\|>", "", answer)  # put in by the calculator
        tokens = BYTE_TOKENIZER.encoding.encode(script + "<|assistant_end|>", allowed_special="all")
        num_said = len(BYTE_TOKENIZER.encoding.encode(answer, allowed_special="all"))
        return nn.functional.one_hot(torch.tensor([[tokens[num_said]]]), 265) * 100.0  # (1, 1, V)


class ScriptedEngine(Engine):
    """Writes the tokens of a script, whatever the question, then ends."""
    script: bytes | list[int] = b"Hello there."
    pause_sec = 0.0

    def step(self):
        time.sleep(self.pause_sec)
        return super().step()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        run_step = self._run_step

        def run_scripted_step(idx, cache):
            logits = run_step(idx, cache)
            generations = [row.generation for row in self.rows[:len(idx)]]
            for i, generation in enumerate(generations):
                script = [*self.script, self.tokenizer.encode_special("<|assistant_end|>")]
                num_sampled = sum(generation.masks[generation.num_prompt:])
                logits[i] = -50.0
                logits[i, script[num_sampled % len(script)]] = 50.0
            return logits
        self._run_step = run_scripted_step


class EngineThread(threading.Thread):
    """Stands for an engine's process, with our end of the connection."""

    def __init__(self, engine: Engine):
        self.ours, self.theirs = multiprocessing.Pipe()
        super().__init__(target=run_engine, args=(engine, self.theirs, "a thread"), daemon=True)
        self.start()

    def kill(self) -> None:
        """A thread can't be."""


def make_pool(engine: Engine, max_waiting: int = 8, log=lambda **_: None) -> EnginePool:
    """A pool of one engine in a thread, which has been started."""
    def start(_):
        thread = EngineThread(engine)
        return thread.ours, thread
    pool = EnginePool(start, 1, engine.max_rows, max_waiting, log)
    pool.start()
    return pool


def make_settings(**changes) -> ServerSettings:
    return ServerSettings(**{"model_name": "sft/toy", "stage": "sft", "context_tokens": CONFIG.sequence_len,
                             "temperature": 0.0, "top_k": 0, "max_tokens": 16, "request_timeout_sec": 60} | changes)


@contextlib.contextmanager
def serving(engine: Engine, max_waiting: int = 8, **changes) -> Iterator:
    """A test client of an app with this engine; what is logged is in its `lines`."""
    lines: list[dict] = []
    pool = make_pool(engine, max_waiting)
    app = make_app(make_settings(**changes), pool, engine.tokenizer, lambda **fields: lines.append(fields))
    with TestClient(app, raise_server_exceptions=False) as client:
        client.lines, client.pool = lines, pool
        yield client
    pool.close()


def save_toy(base_dir: Path, config=CONFIG, stage: str = "sft") -> None:
    """A checkpoint sft/toy with random weights."""
    model = make_model(config)
    BYTE_TOKENIZER.save(base_dir / "tokenizer" / "default")
    meta = {"model_config": vars(config), "tokenizer": {"name": "default", "hash": BYTE_TOKENIZER.hash}}
    save_checkpoint(base_dir / "runs" / stage / "toy", 3, model, model.setup_optimizer(), meta)


class ServerProcess:
    """`python -m scripts.chat_web` in a process, on a free port."""

    def __init__(self, base_dir: Path, *argv: str):
        command = [sys.executable, "-u", "-m", "scripts.chat_web", "-p", "0", "-d", "float32", "--device-type", "cpu"]
        self.process = subprocess.Popen(
            [*command, *argv], cwd=REPO_DIR, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1"})
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith("serving "):
                break
        else:
            raise RuntimeError(self.process.stderr.read())
        self.url = line.split()[-1]
        threading.Thread(target=lambda: self.lines.extend(map(str.strip, self.process.stdout)), daemon=True).start()

    def get(self, path: str) -> dict:
        request = urllib.request.Request(self.url + path, headers={"Authorization": "Bearer secret"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

    def wait_for(self, condition, timeout_sec: float = 30):
        """Until condition(/stats) holds; returns the stats."""
        deadline = time.monotonic() + timeout_sec
        while not condition(stats := self.get("/stats")):
            assert time.monotonic() < deadline, stats
            time.sleep(0.05)
        return stats

    def find_engines(self) -> list[int]:
        """Process ids of the engines: the children that multiprocessing started with a model."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            children += (task / "children").read_text().split()
        return sorted({int(pid) for pid in children
                       if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()})

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()


def read_stream(response) -> list[dict]:
    """The data of server-sent events; the closing [DONE] must be there."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return list(map(json.loads, events))
