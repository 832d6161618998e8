"""Shared by all tests."""

import functools
import signal

import pytest
import torch

from nanochat import flash_attention
from tasks import words
from tests.helpers import BYTE_TOKENIZER

torch.set_num_threads(1)  # threads that share their cores with another process cost more than they gain
for stop in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(stop) == signal.SIG_IGN:  # after & and under nohup; what tests start inherits it
        signal.signal(stop, signal.default_int_handler if stop == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def probe_each_backend_once():
    """What a probe finds out doesn't change within a process, as long as the backend is the same."""
    real = flash_attention.probe_backend
    probe = functools.cache(lambda call, *args: real(*args))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash_attention, "probe_backend",
                      lambda name, *args: probe(flash_attention._TRAIN_CALLS.get(name), name, *args))
        yield


@pytest.fixture
def byte_base(tmp_path, monkeypatch):
    """A base folder with nothing in it but the byte tokenizer."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    BYTE_TOKENIZER.save(tmp_path / "tokenizer" / "default")
    return tmp_path


@pytest.fixture
def offline_base(tmp_path, monkeypatch):
    """An empty base folder; the published list of words can't be fetched."""
    monkeypatch.delenv("NANOCHAT_MIRROR_DIR", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(words, "LIST_URL", "http://127.0.0.1:9/words_alpha.txt")   # where nobody listens
    return tmp_path
