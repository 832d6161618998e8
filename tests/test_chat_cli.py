"""The terminal script, as a real process in a pipe and at a terminal, and the conversation that it holds."""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import REPO_DIR
from torch import nn

from nanochat.chat import ChatSession, format_answer
from nanochat.checkpoint_manager import find_last_stage, save_checkpoint
from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, RustBPETokenizer
from scripts import chat_cli
from tasks.customjson import CustomJSON

WAIT_SEC = 30
TOKENIZER = RustBPETokenizer(SPLIT_PATTERN, {bytes([byte]): byte for byte in range(256)},  # one token per byte
                             {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)})
CONFIG = GPTConfig(sequence_len=64, vocab_size=265, n_layer=1, n_head=1, n_kv_head=1, n_embd=128)
# What the scripted model says to a question that has the word
SCRIPTS = {"27": "That is <|python_start|>34*27<|python_end|>.", "slow": "tick " * 400, "evil": "\x1b[2Jdone\x07",
           "": "Hello!"}


class ScriptedModel(nn.Module):
    """Answers each question by its script; it finds out where it is from what its cache was fed."""
    config = SimpleNamespace(vocab_size=265, n_layer=1, n_kv_head=1, head_dim=2, n_embd=1, sequence_len=300)
    compute_dtype = torch.float32

    def __init__(self, step_sec=0.0):
        super().__init__()
        self.cos = range(1000)  # positions
        self.step_sec = step_sec
        self.num_read = 0       # tokens
        self.transformer = SimpleNamespace(wte=lambda token: torch.zeros(1))

    def get_device(self):
        return torch.device("cpu")

    def forward_trunk(self, idx, kv_cache):
        start = int(kv_cache.cache_seqlens[0])
        kv_cache.k_cache[0, 0, start:start + idx.size(1), 0, 0] = idx[0].float()
        kv_cache.advance(idx.size(1))
        self.num_read += idx.size(1)

    def forward(self, idx, kv_cache):
        self.forward_trunk(idx, kv_cache)
        time.sleep(self.step_sec)
        text = TOKENIZER.decode(kv_cache.k_cache[0, 0, :int(kv_cache.cache_seqlens[0]), 0, 0].int().tolist())
        question, answer = text.split("<|user_start|>")[-1].split("<|user_end|><|assistant_start|>")
        script = next(script for word, script in SCRIPTS.items() if word in question)
        answer = re.sub(r"<\|output_start\|>.*<\|output_end\|>", "", answer)  # put in by the calculator
        tokens = TOKENIZER.encoding.encode(script + "<|assistant_end|>", allowed_special="all")
        num_said = len(TOKENIZER.encoding.encode(answer, allowed_special="all"))
        return nn.functional.one_hot(torch.tensor([[tokens[num_said]]]), 265) * 100.0  # (1, 1, V)


def make_session(**options):
    return ChatSession(Engine(ScriptedModel(), TOKENIZER), **({"context_tokens": 300} | options))


def ask(session, question, max_tokens=60):
    return "".join(format_answer(session.ask(question, max_tokens=max_tokens), session.engine.chat_tokens, False))


# ---------------------------------------------------------------------------------------------------------------------
# The conversation


def test_prompts_are_those_of_training():
    session = make_session()
    session.system = "Be brief."
    assert ask(session, "Hi") == "Hello!" and ask(session, "34 * 27?") == "That is [34*27 = 918]."
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "34 * 27?"},
                {"role": "assistant", "content": [
                    {"type": "text", "text": "That is "}, {"type": "python", "text": "34*27"},
                    {"type": "python_output", "text": "918"}, {"type": "text", "text": "."}]},
                {"role": "user", "content": "So?"}]
    assert session.build_prompt("So?", 60) == (TOKENIZER.render_for_completion({"messages": messages}), 0)


def test_the_next_turn_reads_only_what_is_new():
    session = make_session()
    ask(session, "A question of some length, so that it is worth keeping")
    session.engine.model.num_read = 0  # the engine has a copy of its own
    ask(session, "Hi")
    new = TOKENIZER.render_for_completion({"messages": [{"role": "user", "content": "Hi"}]})[1:]
    assert session.engine.model.num_read == len(new) + 1 + len("Hello!")  # 1: the end token, sampled but not yet read


def test_oldest_turns_are_dropped_where_the_context_ends():
    session = make_session(context_tokens=120)
    session.system = "Be brief."
    for i in range(5):
        ask(session, f"Question {i}", max_tokens=20)
        prompt, _ = session.build_prompt("next", 20)
        assert len(prompt) <= 100
    assert session.num_dropped == 1 and len(session.turns) == 5
    assert TOKENIZER.decode(prompt).startswith("<|bos|><|user_start|>Be brief.\n\nQuestion 1<|user_end|>")
    with pytest.raises(UserError, match="leave no room"):
        ask(session, "x" * 1000)
    assert len(session.turns) == 5


def test_what_was_stopped_stays():
    session = make_session()
    events = session.ask("slow", max_tokens=100)
    assert "".join(next(events).text for _ in range(10)) == "tick tick "
    events.close()
    assert not session.engine.has_work()
    assert TOKENIZER.decode(session.build_prompt("So?", 9)[0]).startswith(
        "<|bos|><|user_start|>slow<|user_end|><|assistant_start|>tick tick <|assistant_end|><|user_start|>So?")


def test_saved_conversations_are_training_data_and_can_be_loaded(tmp_path):
    session = make_session()
    session.system = "Be brief."
    ask(session, "Hi")
    ask(session, "34 * 27?")
    ask(session, " ")
    session.save(tmp_path / "talk.jsonl")
    messages = CustomJSON(tmp_path / "talk.jsonl").get_example(0)["messages"]
    assert len(messages) == 5 and messages[4]["content"][2] == {"type": "python_output", "text": "918"}
    other = make_session()
    other.load(tmp_path / "talk.jsonl")
    session.turns.pop()  # which was empty
    assert other.build_prompt("So?", 9) == session.build_prompt("So?", 9)
    assert [(turn.question, turn.parts) for turn in other.turns] == [
        (turn.question, turn.parts) for turn in session.turns]
    with pytest.raises(UserError, match="exists"):
        other.save(tmp_path / "talk.jsonl")
    with pytest.raises(UserError, match="nothing to save"):
        make_session().save(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="can't be written"):
        session.save(tmp_path / "no" / "talk.jsonl")


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"\xff", b'{"messages": [3]}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "assistant", "content": "Hi"}]}'])
def test_what_is_no_conversation_is_not_loaded(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    session = make_session()
    ask(session, "Hi")
    with pytest.raises(UserError, match="holds no conversation"):
        session.load(tmp_path / "file")
    with pytest.raises(UserError, match="can't be read"):
        session.load(tmp_path)
    assert len(session.turns) == 1


def test_format_of_calls():
    def show(text, is_terminal=False):
        parts = re.findall("([tpo!])([^tpo!]*)", text)
        names = {"t": "text", "p": "python", "!": "python", "o": "python_output"}
        events = [SimpleNamespace(part=names[kind], text=words, token={"p": 1, "!": 2}.get(kind, 0))
                  for kind, words in parts]
        return "".join(format_answer(events, SimpleNamespace(python_start=1), is_terminal))
    assert show("ta p1+1!o2t b") == show("ta p1+1!o2tb") == "a [1+1 = 2] b"
    assert show("p1/0!p2!o2") == "[1/0][2 = 2]"   # a call that failed has no result
    assert show("ta p1") == "a [1]"               # stopped within a call
    assert show("ta p1+1!o2", is_terminal=True) == "a \x1b[2m[1+1 = 2]\x1b[0m"
    assert show("t\x1b[2J\x9b1\n\t", is_terminal=True) == "\ufffd[2J\ufffd1\n\t"  # no command for the terminal
    assert show("t\x1b[2J") == "\x1b[2J"


# ---------------------------------------------------------------------------------------------------------------------
# main


@pytest.fixture
def use_model(monkeypatch, tmp_path):
    """Make chat_cli load the scripted model, of whatever stage."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(chat_cli, "load_model", lambda *args, **options: (ScriptedModel(), TOKENIZER, {"step": 7}))


def make_model():
    torch.manual_seed(0)
    model = GPT(CONFIG, torch.float32)
    model.init_weights()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.5)
        model.lm_head.weight[256:] = 0  # no special tokens
    return model.eval()


def test_base_model_continues_a_prompt(monkeypatch, tmp_path, capsys):
    model = make_model()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(chat_cli, "load_model", lambda *args, **options: (model, TOKENIZER, {"step": 7}))
    for text in ("Once", ""):
        result = chat_cli.main(["-p", text, "-t", "0", "--max-tokens", "20", "-d", "float32"])
        expected = list(model.generate([256, *text.encode()], 20, temperature=0))
        assert result == {"source": "base", "step": 7, "num_answers": 1, "num_tokens": 20}
        assert capsys.readouterr().out == TOKENIZER.decode(expected) + "\n"
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
    TOKENIZER.save(tmp_path / "tokenizer" / "default")
    model = make_model()
    meta = {"model_config": vars(CONFIG), "tokenizer": {"name": "default", "hash": TOKENIZER.hash}}
    for stage, tag in (("base", "d4"), ("sft", "other")):
        save_checkpoint(tmp_path / "runs" / stage / tag, 3, model, model.setup_optimizer(), meta)
    assert find_last_stage(None) == "sft" and find_last_stage("d4") == "base"
    result = chat_cli.main(["-g", "d4", "-s", "3", "-p", "Hi", "-t", "0", "--max-tokens", "5", "-d", "float32"])
    assert result["source"] == "base" and result["num_tokens"] == 5


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


@pytest.mark.parametrize(("lines", "message"), [
    ("/nonsense", "no command /nonsense"), ("/temperature hot", "number of 0 or more"), ("/save", "name of a file"),
    ("/load nowhere", "can't be read"), ("/new york", "takes nothing"), ('"""\nno end', "ends within a message")])
def test_mistakes_in_a_pipe_end_it(use_model, monkeypatch, lines, message):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines + "\n"))
    with pytest.raises(UserError, match=message):
        chat_cli.main(["-i", "sft"])


# ---------------------------------------------------------------------------------------------------------------------
# Real processes

PROGRAM = """
import sys
sys.path.insert(0, "tests")
import test_chat_cli as test
from nanochat.common import run_script
test.chat_cli.load_model = lambda *args, **options: (test.ScriptedModel(step_sec=0.01), test.TOKENIZER, {"step": 7})
run_script(lambda _: test.chat_cli.main(sys.argv[1:]))
"""
COMMAND = [sys.executable, "-c", PROGRAM, "-i", "sft", "-d", "float32", "--device-type", "cpu", "--max-tokens", "2000"]


def test_pipe(tmp_path):
    text = f'Hi\n\n/temperature 0\n34 * 27?\n"""\n/is this\n27?\n"""\n/etc/hosts?\n/save {tmp_path}/talk.jsonl\n'
    done = subprocess.run(COMMAND, input=text, capture_output=True, text=True, cwd=REPO_DIR,
                          env=os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Hello!\nThat is [34*27 = 918].\nThat is [34*27 = 918].\nHello!\n"
    assert done.stderr.splitlines()[1:] == ["temperature 0", f"saved 4 turns, {tmp_path / 'talk.jsonl'}"]
    saved = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert [message["content"] for message in saved[::2]] == ["Hi", "34 * 27?", "/is this\n27?", "/etc/hosts?"]


class Terminal:
    """The script at a terminal of its own."""

    def __init__(self, base_dir):
        import pty  # not on Windows
        pid, self.fd = pty.fork()
        if pid == 0:
            os.chdir(REPO_DIR)
            os.execvpe(sys.executable, COMMAND, os.environ | {"NANOCHAT_BASE_DIR": str(base_dir), "TERM": "xterm"})
        self.pid, self.shown = pid, ""

    def wait_for(self, pattern, keys=""):
        """What is shown up to the end of a pattern; `keys` are typed where nothing comes.

        A Ctrl-C just before readline reads has its effect when the next key comes.
        """
        deadline = time.monotonic() + WAIT_SEC
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < deadline, self.shown
            if select.select([self.fd], [], [], 5)[0]:
                self.shown += os.read(self.fd, 4096).decode(errors="replace").replace("\r", "")
            else:
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
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        raise AssertionError(f"still running after {WAIT_SEC} s: {self.shown}")

    def close(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
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
    terminal.type("half a li\x03")                                     # gives the line up
    terminal.wait_for(r"Ctrl-C once more.*\n.*> ", keys=" ")
    terminal.type("Hi\n")
    terminal.wait_for(r"Hello!\n.*> ")
    time.sleep(0.5)                                                    # till readline reads: before, it looks away
    terminal.type("\x03")
    terminal.wait_for(r"Ctrl-C once more.*\n.*> ", keys=" ")
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
