"""What several test files need: a model, a tokenizer, a base folder, runs, processes."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dev.torture import PER_PROCESS_KEYS, write_texts
from nanochat import dataset
from nanochat.checkpoint_manager import get_run_dir, save_checkpoint
from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from nanochat.presets import PRESETS
from nanochat.run import read_info, read_metrics
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
from nanochat.train import Batch, train_step
from scripts import tok_train
from tests.warm import WarmProcess, start_warm_process

REPO_DIR = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# One token per byte, then the special tokens
BYTE_TOKENIZER = RustBPETokenizer(SPLIT_PATTERN, {bytes([byte]): byte for byte in range(256)},
                                  {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)})
# For BYTE_TOKENIZER. L layers see 64 tokens, S layers 128 (the least there is)
CONFIG = GPTConfig(sequence_len=64, vocab_size=265, n_layer=4, n_head=4, n_kv_head=2, n_embd=64, window_pattern="SSL")
TINY = GPTConfig(sequence_len=16, vocab_size=265, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
# Flags of scripts.base_train for toys in which differences of rounding shouldn't grow within a few steps
SMALL_RATES = ("--matrix-lr", "6e-4", "--embedding-lr", "0.01", "--unembedding-lr", "2.5e-4", "--scalar-lr", "0.015")


def make_model(config=CONFIG, dtype=torch.float32, seed=0, model_class=GPT, as_initialised=False):
    """Random everywhere, unless it is to be trained: as initialised, attention, smear and backout hardly matter."""
    torch.manual_seed(seed)
    model = model_class(config, dtype)
    model.init_weights()
    if as_initialised:
        return model
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


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def make_trained(dtype=torch.float32, num_steps=2):
    model = make_model(TINY, dtype, as_initialised=True)
    optimizer = model.setup_optimizer()
    for step in range(num_steps):
        train_step(model, optimizer, make_batch(step), 4)
    return model, optimizer


def make_batch(seed):
    ids = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:], None)


def make_meta(optimizer, **more):
    return {"model_config": asdict(TINY), "tokenizer": {"name": "default", "hash": BYTE_TOKENIZER.hash},
            "optimizer_steps": optimizer.num_steps, **more}


def save_run(tag="d2", steps=(1,), stage="base", keep_last=None):
    """A run whose checkpoint of step s is trained for s steps."""
    run_dir = get_run_dir(stage, tag)
    for step in steps:
        model, optimizer = make_trained(num_steps=step)
        save_checkpoint(run_dir, step, model, optimizer, make_meta(optimizer), keep_last=keep_last)
    return run_dir


def assert_same_weights(model, other):
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def read_state(run_dir):
    """What must be the same of two runs: the last checkpoint to the bit, and the log but for times and memory."""
    run_dir = Path(run_dir)
    folder = run_dir / (run_dir / "latest").read_text().strip()
    lines = [{key: value for key, value in line.items() if key not in PER_PROCESS_KEYS}
             for line in read_metrics(run_dir)]
    meta = json.loads((folder / "meta.json").read_text())
    return {"model": (folder / "model.safetensors").read_bytes(), "lines": lines,
            "optimizer": [path.read_bytes() for path in sorted(folder.glob("optim_*.safetensors"))],
            "loader": meta["loader"], "scaler": meta["scaler"]}


def leave_out_stops(lines, others):
    """The lines without the evaluations and samples that only this run has, for it stopped there; not at the end."""
    places = {(line["kind"], line["step"]) for line in others}
    return [line for line in lines if line["kind"] == "train" or line["step"] == lines[-1]["step"]
            or (line["kind"], line["step"]) in places]


def assert_same_runs(run_dir, expected_dir):
    actual, expected = read_state(run_dir), read_state(expected_dir)
    lines = [leave_out_stops(*sides) for sides in itertools.permutations((actual["lines"], expected["lines"]))]
    assert lines[0] == lines[1]
    assert actual["loader"] == expected["loader"] and actual["scaler"] == expected["scaler"]
    assert actual["model"] == expected["model"] and actual["optimizer"] == expected["optimizer"]


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


@contextlib.contextmanager
def hang_up_in_step(stage, step):
    """The module of a stage's loop gets SIGHUP while it computes a step, as when its terminal closes; it ends."""
    set_schedules = stage.set_schedules

    def hang_up(optimizer, current_step, *args, **settings):
        if current_step == step:
            signal.raise_signal(signal.SIGHUP)
        return set_schedules(optimizer, current_step, *args, **settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ending:
        patch.setattr(stage, "set_schedules", hang_up)
        yield
    assert ending.value.code == 129


def assert_stopped_after(run_dir, step):
    """A run was stopped while it computed a step, and saved after it."""
    assert (run_dir / "latest").read_text().strip() == f"step_{step + 1:06d}"
    info = read_info(run_dir)
    assert info["status"] == "stopped" and info["reason"] == "SIGHUP"


def measure_peak_bytes(call):
    """Bytes in use at the worst instant of a call, beyond those before it, as the CPU's allocator counts them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start_script(*argv, **env):
    """`python -u -m` with these words, in a fork of a warm process; env: changes of the environment."""
    return WarmProcess(list(map(str, argv)), os.environ | {"OMP_NUM_THREADS": "1"} | env)


def run_to_end(*argv, input="", timeout=100, **env):
    """As start_script; returns exit code and outputs as subprocess.run does."""
    with start_script(*argv, **env) as process:
        stdout, stderr = process.communicate(input, timeout)
    return subprocess.CompletedProcess(argv, process.returncode, stdout, stderr)


def run_program(name, *argv, before=(), fresh=False, env=None, timeout=100):
    """Run tests/programs/<name>.py to its end, in a fork of a warm process; where its imports matter (`fresh`), it has
    an environment of its own, or it stands after the words `before` of another command, in a fresh interpreter."""
    if not (before or fresh or env):
        return run_to_end(f"tests.programs.{name}", *argv, timeout=timeout)
    return subprocess.run([*before, sys.executable, "-m", f"tests.programs.{name}", *map(str, argv)], cwd=REPO_DIR,
                          capture_output=True, text=True, env=env, timeout=timeout)


def send_signal_at(process, step, signum):
    """Wait for the line of a step, send the signal, wait for the end; returns (exit code, stderr)."""
    try:
        for line in process.stdout:
            if line.startswith(f"step {step:05d}/"):
                process.send_signal(signum)
                break
        process.stdout.read()
        stderr = process.stderr.read()
        return process.wait(timeout=60), stderr
    finally:
        process.kill()
        process.stdout.close()
        process.stderr.close()


def choose_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get_rank_env(rank, world_size, port):
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}


def run_jobs(rank, jobs, folder, env):
    """What each of four processes does: the jobs one after the other, each by the ranks that it is for."""
    os.environ.clear()
    os.environ.update(env)  # a fork has the environment in which the warm process was started
    torch.set_num_threads(1)
    for i, (world_size, port, work, args) in enumerate(jobs):
        if rank < world_size:
            os.environ.update(get_rank_env(rank, world_size, port))
            dist.init_process_group("gloo")
            result = work(*args)
            with open(f"{folder}/{i}_{rank}.json", "w") as file:
                json.dump(result, file)
            dist.destroy_process_group()


def run_on_ranks(jobs, folder):
    """Run (world size, function, arguments) jobs; returns for each the results of its ranks."""
    jobs = [(world_size, choose_port(), work, args) for world_size, work, args in jobs]
    start_warm_process()
    mp.start_processes(run_jobs, (jobs, str(folder), dict(os.environ)), max(job[0] for job in jobs),
                       start_method="forkserver")
    return [[json.loads((folder / f"{i}_{rank}.json").read_text()) for rank in range(job[0])]
            for i, job in enumerate(jobs)]


def run_program_on_ranks(program, folder, world_size=2):
    """Run tests/programs/<program>.py once for each rank, in `folder`, which the ranks meet in."""
    ranks = [start_script(f"tests.programs.{program}", folder, RANK=str(rank), LOCAL_RANK=str(rank),
                          WORLD_SIZE=str(world_size)) for rank in range(world_size)]
    outputs = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world_size, outputs


def run_forked(function, uid=None):
    """What `function` returns (JSON) in a fork of this process, as another user if asked."""
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            if uid is not None:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os.write(writer, json.dumps(function()).encode())
        except BaseException as error:
            os.write(writer, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader) as file:
        answer = file.read()
    status = os.waitpid(pid, 0)[1]
    assert answer, f"the fork answered nothing; its wait status is {status}"
    return json.loads(answer)


# ---------------------------------------------------------------------------------------------------------------------
# Presets


def make_preset_config(name):
    """The preset's model at toy size, for BYTE_TOKENIZER."""
    preset = PRESETS[name]
    small = {"attn_dim": 128, "mlp_dim": 96} if "attn_dim" in preset.knobs else {}
    if preset.knobs.get("backout_layer", -1) > 0:
        small["backout_layer"] = 1
    return replace(CONFIG, **preset.knobs | small, window_pattern=preset.flags["window_pattern"])


@contextlib.contextmanager
def small_presets():
    """The presets with a shape of their own have two layers of 32 channels."""
    shape = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    with pytest.MonkeyPatch.context() as patch:
        for name, preset in PRESETS.items():
            small = {"attn_dim": 64, "mlp_dim": 96} if "attn_dim" in preset.knobs else {}
            if preset.knobs.get("backout_layer", -1) > 0:
                small["backout_layer"] = 0
            if preset.shape:
                patch.setitem(PRESETS, name, replace(preset, shape=shape, knobs=preset.knobs | small))
        yield


def make_preset_argv(name, tag):
    """Flags of scripts.base_train for a small run on the data 'toy'."""
    shape = [] if PRESETS[name].shape else ["--depth", "2", "--aspect-ratio", "16", "--head-dim", "16"]
    return ["--preset", name, "--model-tag", tag, "--data", "toy", *shape, "--max-seq-len", "64", "--num-iterations",
            "4", "--total-batch-size", "512", "--eval-tokens", "1024", "--eval-every", "never", "--sample-every",
            "never", "--device-type", "cpu", "--dtype", "float32", "--compile", "off"]
