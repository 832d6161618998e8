"""What several test files need: a base folder with toy data, and what must be the same of two runs."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dev.torture import PER_PROCESS_KEYS, write_texts
from nanochat import dataset
from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from nanochat.run import read_metrics
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
from scripts import tok_train

REPO_DIR = Path(__file__).resolve().parents[1]
# One token per byte, then the special tokens
BYTE_TOKENIZER = RustBPETokenizer(SPLIT_PATTERN, {bytes([byte]): byte for byte in range(256)},
                                  {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)})
# For BYTE_TOKENIZER. L layers see 64 tokens, S layers 128 (the least there is)
CONFIG = GPTConfig(sequence_len=64, vocab_size=265, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL")


def make_model(config=CONFIG, dtype=torch.float32, seed=0, model_class=GPT):
    """Random everywhere: as initialised, attention, smear and backout would hardly matter."""
    torch.manual_seed(seed)
    model = model_class(config, dtype)
    model.init_weights()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name not in ("resid_lambdas", "x0_lambdas"):
                param.normal_(std=0.8 if param.dim() < 2 or "embed" in name or "wte" in name else 0.15)
    return model.eval()


def make_prompt(num_tokens, seed=0):
    """Bytes at random."""
    return torch.randint(0, 256, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_base(base_dir, patch, names=("toy",), num_docs=400):
    """Make `base_dir` the base folder, with toy data and a tokenizer for each name; the first one's is the default."""
    patch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    patch.delenv("RANK", raising=False)
    for seed, name in enumerate(names):
        write_texts(base_dir / f"texts_{name}", seed, num_docs)
        dataset.main(["--source", "files", "--path", str(base_dir / f"texts_{name}"), "--name", name])
        tok_train.main(["--data", name, "--vocab-size", "320", "--name", "default" if name == names[0] else name])


def read_state(run_dir):
    """What must be the same of two runs: the last checkpoint to the bit, and the log but for times and memory."""
    run_dir = Path(run_dir)
    folder = run_dir / (run_dir / "latest").read_text().strip()
    lines = [{key: value for key, value in line.items() if key not in PER_PROCESS_KEYS}
             for line in read_metrics(run_dir)]
    return {"model": (folder / "model.safetensors").read_bytes(), "lines": lines,
            "optimizer": [path.read_bytes() for path in sorted(folder.glob("optim_*.safetensors"))],
            "loader": json.loads((folder / "meta.json").read_text())["loader"]}


def assert_same_runs(run_dir, expected_dir):
    actual, expected = read_state(run_dir), read_state(expected_dir)
    assert actual["lines"] == expected["lines"]
    assert actual["loader"] == expected["loader"]
    assert actual["model"] == expected["model"] and actual["optimizer"] == expected["optimizer"]


def start_script(*argv):
    return subprocess.Popen([sys.executable, "-u", "-m", *argv], cwd=REPO_DIR, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})


@contextlib.contextmanager
def out_of_memory_at(*calls):
    """The forward passes of training with these numbers, from 0 on, run out of memory; those of evaluations don't."""
    forward, counter = GPT.forward, itertools.count()

    def fail(self, *args, weights=None, **settings):
        if weights is not None and next(counter) in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return forward(self, *args, weights=weights, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", fail)
        yield


def measure_peak_bytes(call):
    """Bytes in use at the worst instant of a call, beyond those before it, as the CPU's allocator counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
