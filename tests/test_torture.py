"""The torture of dev/torture.py: it passes, and it fails where a resume is wrong."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dev.timing import make_random_batch, make_random_model
from dev.torture import compare_runs
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.gpt import GPTConfig
from nanochat.train import train_step
from tests.helpers import REPO_DIR


def run_python(tmp_path, monkeypatch, *argv, timeout=300):
    """Exit code, all lines, and the summary, which is the last line on stdout."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    result = subprocess.run([sys.executable, *argv], cwd=REPO_DIR, capture_output=True, text=True, timeout=timeout)
    assert result.stdout, result.stderr
    return result.returncode, result.stdout + result.stderr, json.loads(result.stdout.splitlines()[-1])


def test_one_kill(tmp_path, monkeypatch):
    code, text, summary = run_python(tmp_path, monkeypatch, "dev/torture.py", "--kills", "1", "--series", "bitwise")
    assert code == 0, text
    assert summary["verdict"] == "passed" and summary["kills"] == {"bitwise": 1}
    assert not list(tmp_path.iterdir())  # leaves nothing behind


@pytest.mark.slow
def test_a_fault_is_found(tmp_path, monkeypatch):
    code, text, summary = run_python(tmp_path, monkeypatch, "-m", "tests.programs.forgetful_resume")
    assert code == 1 and summary["verdict"] == "failed", text
    assert "is not the undisturbed run" in summary["faults"][0] and "model.safetensors" in summary["faults"][0]
    assert "all files are in" in text and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_fifty_kills(tmp_path, monkeypatch):
    code, text, summary = run_python(tmp_path, monkeypatch, "-m", "dev.torture", "--kills", "50", timeout=3600)
    assert code == 0, text
    assert summary["kills"] == {"bitwise": 50, "elastic": 50}
    assert summary["kills_in_save"] >= 25 and summary["kills_of_one_rank"] >= 10


# ---------------------------------------------------------------------------------------------------------------------
# What counts as a difference


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    config = GPTConfig(sequence_len=16, vocab_size=80, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = make_random_model(config, torch.float64, torch.device("cpu"))
    optimizer = model.setup_optimizer()
    for _ in range(2):
        train_step(model, optimizer, make_random_batch(config, 4, torch.device("cpu")), 4)
    save_checkpoint(run_dir, 2, model, optimizer, {"optimizer_steps": 2, "loader": {"lanes": [[0, 1, 2]]},
                                                   "scaler": None})
    lines = [{"kind": "train", "step": step, "loss": 5.0, "epoch": 0, "step_ms": 7.0} for step in (1, 2)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def change_tensor(name, amount):
    def change(run_dir):
        path = run_dir / "step_000002" / name
        tensors = load_file(path)
        tensors[min(tensors)].flatten()[0] += amount
        save_file(tensors, path)
    return change


def change_text(name, old, new):
    def change(run_dir):
        path = run_dir / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    return change


def change_meta(**changes):
    """Another state in a meta.json that is whole, as a resume that went wrong would have saved it."""
    def change(run_dir):
        path = run_dir / "step_000002" / "meta.json"
        meta = json.loads(path.read_text())
        del meta["checksum"]
        path.write_text(json.dumps(meta | changes))
    return change


@pytest.mark.parametrize(("change", "is_exact_difference", "is_difference"), [
    (lambda run_dir: None, False, False),
    (change_tensor("model.safetensors", 1e-9), True, False),
    (change_tensor("optim_0.safetensors", 1e-9), True, False),
    (change_tensor("model.safetensors", 1e-5), True, True),
    (change_tensor("optim_0.safetensors", 1e-5), True, True),
    (change_tensor("model.safetensors", float("nan")), True, True),
    (change_meta(optimizer_steps=3), True, True),
    (change_meta(loader={"lanes": [[0, 1, 3]]}), True, True),
    (change_text("metrics.jsonl", '"loss": 5.0', '"loss": 5.0000000000001'), True, False),
    (change_text("metrics.jsonl", '"loss": 5.0', '"loss": 5.00000001'), True, True),
    (change_text("metrics.jsonl", '"loss": 5.0', '"loss": null'), True, True),
    (change_text("metrics.jsonl", '"epoch": 0', '"epoch": 1'), True, False),
    (change_text("metrics.jsonl", '"step_ms": 7.0', '"step_ms": 8.0'), False, False),
    (change_text("metrics.jsonl", '"step": 1', '"step": 3'), True, True)])
def test_differences(run_dir, tmp_path, change, is_exact_difference, is_difference):
    other_dir = tmp_path / "other"
    shutil.copytree(run_dir, other_dir)
    change(other_dir)
    assert bool(compare_runs(other_dir, run_dir, is_exact=True)) == is_exact_difference
    assert bool(compare_runs(other_dir, run_dir, is_exact=False)) == is_difference
