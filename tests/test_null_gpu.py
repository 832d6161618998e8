"""The GPU that computes nothing: what it can't do without, and what it changes in the modules that it lets go on."""

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch

import nanochat
from dev import null_gpu
from nanochat.common import UserError
from tests.helpers import CONFIG


def test_a_command_without_its_dashes_is_refused():
    with pytest.raises(UserError, match="goes after --"):
        null_gpu.parse_args(["--gpus", "2"])


def test_what_follows_the_first_dashes_is_the_commands_own():
    args = null_gpu.parse_args(["--gpus", "2", "--", "-m", "torch.distributed.run", "--", "--depth", "2"])
    assert args.gpus == 2
    assert args.command == ["-m", "torch.distributed.run", "--", "--depth", "2"]


def test_a_python_without_headers_of_cuda_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(null_gpu.sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install torch.* nvidia-cuda-crt"):
        null_gpu.build(tmp_path)


@pytest.mark.parametrize("name", null_gpu.CHANGES)
def test_a_change_replaces_what_its_module_has(name):
    module = importlib.import_module(name)
    before = dict(vars(module))
    changed = SimpleNamespace(**before)
    null_gpu.CHANGES[name](changed)
    names = [key for key, value in vars(changed).items() if before.get(key) is not value]
    assert names and set(names) <= set(before)


def test_the_finder_changes_a_module_when_it_is_loaded():
    spec = null_gpu.Finder.find_spec("nanochat.flash_attention", nanochat.__path__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._TRAIN_CALLS["sdpa"] = lambda q, k, v, window: 0 * (q + k.sum() + v.sum())
    assert module.probe_backend("sdpa", torch.device("cpu"), torch.float32, CONFIG) == (True, "agrees with fp32")
    assert null_gpu.Finder.find_spec("nanochat.gpt", nanochat.__path__) is None
