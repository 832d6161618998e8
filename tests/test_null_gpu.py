"""The simulated GPU: what it can't do without, and what it changes in the modules which it lets go on. Running torch
on it takes a CUDA build, which no test has."""

import importlib
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

from dev import null_gpu
from nanochat.common import UserError
from tests.helpers import CONFIG, run_program


@pytest.mark.parametrize("argv", [["--gpus", "2"], ["-m", "scripts.doctor"], ["--"]])
def test_a_command_without_its_dashes_is_refused(argv):
    with pytest.raises(UserError, match="goes after --"):
        null_gpu.parse_args(argv)


def test_what_follows_the_first_dashes_is_the_commands_own():
    args = null_gpu.parse_args(["--gpus", "2", "--", "-m", "torch.distributed.run", "--", "--depth", "2"])
    assert args.gpus == 2
    assert args.command == ["-m", "torch.distributed.run", "--", "--depth", "2"]


def test_what_lacks_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(null_gpu, "NVIDIA_DIR", tmp_path)
    with pytest.raises(UserError, match="use the real GPU"):
        null_gpu.build(tmp_path)
    monkeypatch.setattr(null_gpu, "NVIDIA_DIR", tmp_path / "none")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install torch.* nvidia-cuda-crt"):
        null_gpu.build(tmp_path)
    for name in ("crt", "cccl"):
        (tmp_path / "nvidia" / "cu13" / "include" / name).mkdir(parents=True)
    if shutil.which("g++"):    # whose headers are empty here
        with pytest.raises(UserError, match="can't compile null_gpu.cpp"):
            null_gpu.build(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="isn't there"):
        null_gpu.build(tmp_path)


def test_a_process_and_its_children_load_changed_modules(tmp_path):
    environment = null_gpu.make_environment(tmp_path, null_gpu.parse_args(["--gib", "24", "--", "-c", "pass"]))
    assert environment["NULL_GPU_GIB"] == "24"
    del environment["LD_PRELOAD"]    # the libraries aren't built here
    done = run_program("null_gpu", env=environment)
    assert done.stdout.split() == 2 * ["dev.null_gpu", "nanochat.gpt"], done.stderr


def change(name: str) -> SimpleNamespace:
    changed = SimpleNamespace(**vars(importlib.import_module(name)))
    null_gpu.CHANGES[name](changed)
    return changed


@pytest.mark.parametrize("name", null_gpu.CHANGES)
def test_a_change_replaces_what_its_module_has(name):
    before = dict(vars(importlib.import_module(name)))
    names = [key for key, value in vars(change(name)).items() if before.get(key) is not value]
    assert names and set(names) <= set(before)


def test_wrong_results_pass_and_other_obstacles_stay(monkeypatch):
    from nanochat import flash_attention, fp8, moe
    probe = {"wrong": (False, "its output is off by nan at window -1"), "broken": (False, "RuntimeError: no kernel"),
             "absent": (None, "isn't installed")}
    monkeypatch.setattr(flash_attention, "probe_backend", probe.get)
    probed = change("nanochat.flash_attention").probe_backend
    assert [probed(name)[0] for name in probe] == [True, False, None]
    monkeypatch.setattr(fp8, "find_obstacle", lambda device: device)
    monkeypatch.setattr(moe, "probe_grouped", lambda device_type, dtype: "its results are wrong")
    assert change("nanochat.fp8").find_obstacle("its products are wrong") == ""
    assert change("nanochat.fp8").find_obstacle("it needs an NVIDIA GPU") == "it needs an NVIDIA GPU"
    grouped = change("nanochat.moe").probe_grouped
    assert [grouped("cuda", dtype) for dtype in (torch.bfloat16, torch.float16)] == ["", "its results are wrong"]


def test_those_are_the_words_of_the_modules(monkeypatch):
    from nanochat import flash_attention, fp8
    cpu = torch.device("cpu")
    monkeypatch.setitem(flash_attention._TRAIN_CALLS, "sdpa", lambda q, k, v, window: 0 * (q + k.sum() + v.sum()))
    assert change("nanochat.flash_attention").probe_backend("sdpa", cpu, torch.float32, CONFIG)[0]
    monkeypatch.setattr(fp8.Float8, "multiply", lambda self, x8, dtype: torch.zeros(16, 16, dtype=dtype))
    assert fp8.find_obstacle(cpu) and not change("nanochat.fp8").find_obstacle(cpu)
