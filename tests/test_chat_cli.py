"""scripts.chat_cli: its main, and real processes in a pipe and at a terminal."""

import io
import json
import os
import re
import select
import sys
import time

import pytest
import torch

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import find_last_stage, save_checkpoint
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from scripts import chat_cli
from tests.helpers import BYTE_TOKENIZER, make_model, run_to_end
from tests.server_helpers import ScriptedModel
from tests.warm import WarmProcess

WAIT_SEC = 120     # without any output; a busy machine may take 10 s for what takes one
CONFIG = GPTConfig(sequence_len=64, vocab_size=265, n_layer=1, n_head=1, n_kv_head=1, n_embd=128)


@pytest.fixture
def use_model(monkeypatch, tmp_path):
    """Make chat_cli load the scripted model, of whatever stage."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(checkpoint_manager, "load_model", lambda stage, *args, **options: (
        ScriptedModel(), BYTE_TOKENIZER, {"stage": stage, "step": 7, "run_dir": "d4"}))


def make_base_model():
    model = make_model(CONFIG)
    torch.nn.init.zeros_(model.lm_head.weight[256:])  # no special tokens
    return model


def test_base_model_continues_a_prompt(monkeypatch, tmp_path, capsys):
    model = make_base_model()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(checkpoint_manager, "load_model", lambda stage, *args, **options: (
        model, BYTE_TOKENIZER, {"stage": stage, "step": 7, "run_dir": "d4"}))
    for text in ("Once", ""):
        result = chat_cli.main(["-p", text, "-t", "0", "--max-tokens", "20", "-d", "float32"])
        expected = list(model.generate([256, *text.encode()], 20, temperature=0))
        assert result == {"source": "base", "step": 7, "num_answers": 1, "num_tokens": 20}
        assert capsys.readouterr().out == BYTE_TOKENIZER.decode(expected) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n/save file"))
    with pytest.raises(UserError, match="for chat models"):
        chat_cli.main(["-d", "float32"])


def test_bad_values_are_refused(use_model):
    for flag, value in (("-t", "-1"), ("-k", "-1"), ("--max-tokens", "-5"), ("-d", "int8"), ("--device-type", "no")):
        with pytest.raises(UserError):
            chat_cli.main(["-i", "sft", "-p", "hi", flag, value])


def test_the_last_stage_is_loaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert find_last_stage(None) == "base"
    BYTE_TOKENIZER.save(tmp_path / "tokenizer" / "default")
    model = make_base_model()
    meta = {"model_config": vars(CONFIG), "tokenizer": {"name": "default", "hash": BYTE_TOKENIZER.hash}}
    for stage, tag in (("base", "d4"), ("sft", "other")):
        save_checkpoint(tmp_path / "runs" / stage / tag, 3, model, model.setup_optimizer(), meta)
    assert find_last_stage(None) == "sft" and find_last_stage("d4") == "base"
    result = chat_cli.main(["-g", "d4", "-s", "3", "-p", "Hi", "-t", "0", "--max-tokens", "5", "-d", "float32"])
    assert result["source"] == "base" and result["num_tokens"] == 5
    assert capsys.readouterr().err.startswith("base model d4, step 3, on cpu in torch.float32")


def test_without_a_model_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="there is no base model in "):
        chat_cli.main(["-p", "hi", "-d", "float32", "--device-type", "cpu"])


def test_what_the_model_no_longer_sees_is_told(use_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 100 + "\n" + "y" * 110 + "\nz\n"))
    assert chat_cli.main(["-i", "sft"])["num_answers"] == 3  # of a model that reads 300 tokens
    out, err = capsys.readouterr()
    assert out == "Hello!\n" * 3
    assert err.splitlines()[1:] == ["the conversation is longer than the model can read: "
                                    "it no longer sees the oldest turn"]


def test_quit_with_more_words_leaves_too(use_model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit now\nHello\n"))
    assert chat_cli.main(["-i", "sft"])["num_answers"] == 0


@pytest.mark.parametrize(("lines", "message"), [
    ("/nonsense", "no command /nonsense"), ("/temperature hot", "number of 0 or more"), ("/save", "name of a file"),
    ("/load nowhere", "can't be read"), ("/new york", "takes nothing"), ('"""\nno end', "ends within a message")])
def test_mistakes_in_a_pipe_end_it(use_model, monkeypatch, lines, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines + "\n"))
    with pytest.raises(UserError, match=message):
        chat_cli.main(["-i", "sft"])


# ---------------------------------------------------------------------------------------------------------------------
# Real processes

COMMAND = ["tests.programs.chat_cli", "-i", "sft", "-d", "float32", "--device-type", "cpu", "--max-tokens", "2000"]


def test_pipe(tmp_path):
    text = f'Hi\n\n/temperature 0\n34 * 27?\n"""\n/is this\n27?\n"""\n/etc/hosts?\n/save {tmp_path}/talk.jsonl\n'
    done = run_to_end(*COMMAND, input=text, NANOCHAT_BASE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Hello!\nThat is [34*27 = 918].\nThat is [34*27 = 918].\nHello!\n"
    assert done.stderr.splitlines()[1:] == ["temperature 0", f"saved 4 turns, {tmp_path / 'talk.jsonl'}"]
    saved = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["content"] for message in saved[::2]] == ["Hi", "34 * 27?", "/is this\n27?", "/etc/hosts?"]


class Terminal:
    """The script at a terminal of its own."""

    def __init__(self, base_dir):
        import pty  # not on Windows
        self.fd, theirs = pty.openpty()
        env = os.environ | {"NANOCHAT_BASE_DIR": str(base_dir), "TERM": "xterm"}
        self.process, self.shown = WarmProcess(COMMAND, env, terminal=theirs), ""
        os.close(theirs)

    def wait_for(self, pattern, keys=""):
        """What is shown up to the end of a pattern; `keys` are typed where nothing comes.

        A Ctrl-C just before readline reads has its effect when the line ends.
        """
        silent_sec, deadline = 0, time.monotonic() + 3 * WAIT_SEC
        while not (found := re.search(pattern, self.shown)):
            if select.select([self.fd], [], [], 5)[0]:
                self.shown += os.read(self.fd, 4096).decode(errors="replace").replace("\r", "")
                silent_sec = 0
            else:
                silent_sec += 5
                assert silent_sec < WAIT_SEC and time.monotonic() < deadline, self.shown
                self.type(keys)
        text, self.shown = self.shown[:found.end()], self.shown[found.end():]
        return text

    def type(self, text):
        os.write(self.fd, text.encode())

    def wait_for_end(self, keys=""):
        """The exit code; `keys` are typed again at times, for a Ctrl-C just before the prompt reads does nothing."""
        deadline, next_press = time.monotonic() + WAIT_SEC, 0.0
        while time.monotonic() < deadline:
            try:
                if time.monotonic() > next_press:
                    self.type(keys)
                    next_press = time.monotonic() + 5
                if select.select([self.fd], [], [], 0.1)[0]:
                    os.read(self.fd, 4096)
            except OSError:  # Linux's way to say that nobody is at the other end
                pass
            time.sleep(0.02)
            if self.process.returncode is not None:
                return self.process.returncode
        raise AssertionError(f"still running after {WAIT_SEC} s: {self.shown}")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


@pytest.fixture
def terminal(tmp_path):
    pytest.importorskip("readline")
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def test_terminal(terminal, tmp_path):
    terminal.wait_for("> ")
    terminal.type("What is 34 * 27?\n")
    assert "\x1b[2m[34*27 = 918]\x1b[0m." in terminal.wait_for(r"\]\x1b\[0m\.\n")
    terminal.type('/help\n"""\none\n/two\n"""\n')                        # several lines, the second is no command
    assert "/temperature NUMBER" in terminal.wait_for(r"Hello!\n")
    terminal.type("/nonsense\n")
    terminal.wait_for("error: there is no command /nonsense")
    terminal.type("evil\n")                                            # the model can't clear the screen
    assert "\ufffd[2Jdone\ufffd" in terminal.wait_for(r"done.\n")
    terminal.type("be slow\n")
    terminal.wait_for("tick tick tick")
    terminal.type("\x03")                                              # stops the answer, not the program
    terminal.wait_for(r"\n.*> ")
    terminal.type("still there?\n")
    terminal.wait_for(r"Hello!\n")
    terminal.type(f"/save {tmp_path / 'talk.jsonl'}\n")
    terminal.wait_for(r"saved 5 turns.*\n.*> ")                        # Ctrl-C before the prompt would do nothing
    time.sleep(0.5)                                                    # till readline reads: before, it looks away
    terminal.type("half a li\x03")                                     # gives the line up
    terminal.wait_for(r"Ctrl-C once more.*\n.*> ", keys="\n")
    terminal.type("Hi\n")
    terminal.wait_for(r"Hello!\n.*> ")
    time.sleep(0.5)
    terminal.type("\x03")
    terminal.wait_for(r"Ctrl-C once more.*\n.*> ", keys="\n")
    assert terminal.wait_for_end("\x03") == 0
    saved = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert saved[2]["content"] == "one\n/two" and saved[7]["content"].startswith("tick tick tick")
    assert len(saved[7]["content"]) < 200  # of the 280 that its context has room for
    assert "What is 34 * 27?\n" in (tmp_path / "chat_history").read_text()


def test_terminal_ends_with_ctrl_d(terminal, tmp_path):
    (tmp_path / "chat_history").write_text("an old question\n")
    terminal.wait_for("> ")
    terminal.type("\x1b[A\n")                                          # arrow up
    assert "an old question" in terminal.wait_for(r"Hello!\n.*> ")
    terminal.type("\x04")
    assert terminal.wait_for_end() == 0
