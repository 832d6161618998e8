"""tasks/words.py: which words there are to spell, and that nothing is downloaded unasked."""

import gzip
import json
import threading

import pytest

from nanochat import download
from nanochat.common import UserError
from nanochat.dataset import main as make_dataset
from tasks import words as words_module
from tasks.catalog import get_task
from tasks.common import is_test
from tasks.mixtures import make_mixture
from tasks.spellingbee import SimpleSpelling
from tasks.words import collect_words, load_words, read_list
from tests.data_helpers import Server
from tests.helpers import REPO_DIR

REAL_LIST = REPO_DIR.parent / "shared" / "data" / "tasks" / "words_alpha.txt.gz"


@pytest.mark.skipif(not REAL_LIST.exists(), reason=f"the published list is not at {REAL_LIST}")
def test_published_list(offline_base, capsys):
    (offline_base / "words_alpha.txt.gz").write_bytes(REAL_LIST.read_bytes())
    words = load_words()
    assert len(words) > 350_000 and words == sorted(set(words)) and "strawberry" in words
    assert 0.09 < sum(map(is_test, words)) / len(words) < 0.11
    assert not capsys.readouterr().out
    assert read_list(offline_base / "words_alpha.txt.gz") == words


def test_list_is_downloaded_by_command_alone(offline_base, monkeypatch, capsys):
    listed = [first + second + third + fourth for first in "abcdefghij" for second in "aeiou" for third in "klmno"
              for fourth in "stuvwxyz"]
    monkeypatch.setattr(words_module, "MIN_LIST_WORDS", 1000)
    monkeypatch.setattr(download, "MAX_FAILURES", 1)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setattr(words_module, "LIST_URL", server.url)
        server.content, server.script = b"a page that asks to log in\n", ["500"]
        for _ in range(2):  # an error, then a page: neither is kept
            with pytest.raises(UserError, match="the list of words can't be had: .*connect to the network"):
                words_module.main([])
            assert not (offline_base / "words_alpha.txt").exists()
        server.content = "\r\n".join(listed).encode() + b"\r\n"
        num_requests = len(server.requests)
        collected = load_words()
        assert collected != sorted(listed) and len(server.requests) == num_requests    # nothing is fetched by itself
        words_module.main([])
        words_module.main([])
        assert load_words() == sorted(listed) and len(server.requests) == num_requests + 1
        server.shutdown()


def test_words_of_docstrings_then_of_the_corpus(offline_base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(words_module, "MIN_FOUND_WORDS", 3)
    words = load_words()
    lines = capsys.readouterr().out.splitlines()
    assert len(words) > 800 and {"return", "string", "value", "number"} <= set(words)
    assert len(lines) == 1 and "Python's docstrings" in lines[0] and "python -m tasks.words" in lines[0]
    rows = [{"text": f"{idx} The harbour, the quay and the Harbour. " * 5} for idx in range(30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"text": "once xyz."}]))
    make_dataset(["--source", "files", "--path", str(tmp_path / "texts.jsonl"), "--name", "mine"])
    capsys.readouterr()
    assert load_words() == words and not capsys.readouterr().out    # those that were kept
    (offline_base / words_module.KEPT_NAME).unlink()
    found = load_words()
    assert {"harbour", "quay", "the"} <= set(found) and "once" not in found
    assert "the corpus mine" in capsys.readouterr().out
    assert SimpleSpelling("train", words=found)[0]["word"] in found
    (offline_base / "words_alpha.txt").write_text("apple\n")             # a person's own list goes first
    assert load_words() == ["apple"]


def test_named_data_goes_before_whatever_is_on_disk(offline_base, tmp_path, capsys, monkeypatch):
    """A recipe learns from the same words on a machine with the published list, and with other datasets."""
    monkeypatch.setattr(words_module, "MIN_FOUND_WORDS", 2)
    for name, words in (("another", "lemon melon"), ("mine", "harbour quay"), ("numbers", "12 345")):
        rows = [{"text": f"{idx} {words} " * 5} for idx in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        make_dataset(["--source", "files", "--path", str(tmp_path / f"{name}.jsonl"), "--name", name])
    (offline_base / "words_alpha.txt").write_text("apple\n")
    capsys.readouterr()
    assert load_words("mine") == load_words("mine") == ["harbour", "quay"]
    assert capsys.readouterr().out.count("2 of the corpus mine") == 1
    assert get_task("SimpleSpelling", "train", "another", size=5).words == ["lemon", "melon"]
    assert get_task("Arithmetic", "train", "another", size=5)[0]
    assert make_mixture(["SimpleSpelling:5"], words="mine").train[0]["word"] in ("harbour", "quay")
    assert load_words() == ["apple"]
    (tmp_path / "russian.jsonl").write_text(json.dumps({"text": "привет, " * 50 + "zebra zebra zebra"}) + "\n" +
                                            json.dumps({"text": "спасибо " * 50}))
    make_dataset(["--source", "files", "--path", str(tmp_path / "russian.jsonl"), "--name", "russian"])
    assert "zebra" not in load_words("russian")    # one word is too few to spell
    capsys.readouterr()
    assert "docstring" in load_words("numbers") and "of Python's docstrings, kept in" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no data 'none'"):
        load_words("none")


def test_collect_words_keeps_words_only():
    text = "Apples and pears, os.path.join(x) snake_case naïve HTTP Server's x1 it bcdfg. " * 3
    assert collect_words([text]) == ["and", "apples", "pears", "server"]


def test_damaged_list(offline_base):
    path = offline_base / "words_alpha.txt.gz"
    for content in (b"no gzip", gzip.compress(b"apple\n" * 1000)[:-9], gzip.compress(b"1\n2\n")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path} .*delete it"):
            load_words()


def test_flags_are_read_before_anything_is_downloaded(monkeypatch):
    monkeypatch.setattr(words_module, "download_all", lambda *_: pytest.fail("downloads"))
    for argv, code in ((["--help"], 0), (["--nmae", "mine"], 2)):
        with pytest.raises(SystemExit) as ended:
            words_module.main(argv)
        assert ended.value.code == code
