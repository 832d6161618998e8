"""scripts.chat_cli: the session, its prompts and its files."""

import re
from types import SimpleNamespace

import pytest

from nanochat.common import UserError
from nanochat.engine import Engine
from scripts.chat_cli import ChatSession, format_answer
from tasks.customjson import CustomJSON
from tests.data_helpers import write_lines
from tests.helpers import BYTE_TOKENIZER
from tests.server_helpers import ScriptedModel


def make_session(**options):
    return ChatSession(Engine(ScriptedModel(), BYTE_TOKENIZER), **({"context_tokens": 300} | options))


def ask(session, question, max_tokens=60):
    return "".join(format_answer(session.ask(question, max_tokens=max_tokens), session.engine.chat_tokens, False))


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
    assert session.build_prompt("So?", 60) == (BYTE_TOKENIZER.render_for_completion({"messages": messages}), 0)


def test_the_next_turn_reads_only_what_is_new():
    session = make_session()
    ask(session, "A question of some length, so that it is worth keeping")
    session.engine.model.num_read = 0  # the engine has a copy of its own
    ask(session, "Hi")
    new = BYTE_TOKENIZER.render_for_completion({"messages": [{"role": "user", "content": "Hi"}]})[1:]
    assert session.engine.model.num_read == len(new) + 1 + len("Hello!")  # 1: the end token, sampled but not yet read


def test_oldest_turns_are_dropped_where_the_context_ends():
    session = make_session(context_tokens=120)
    session.system = "Be brief."
    for i in range(5):
        ask(session, f"Question {i}", max_tokens=20)
        prompt, _ = session.build_prompt("next", 20)
        assert len(prompt) <= 100
    assert session.num_dropped == 1 and len(session.turns) == 5
    assert BYTE_TOKENIZER.decode(prompt).startswith("<|bos|><|user_start|>Be brief.\n\nQuestion 1<|user_end|>")
    with pytest.raises(UserError, match="leave no room"):
        ask(session, "x" * 1000)
    assert len(session.turns) == 5


def test_what_was_stopped_stays():
    session = make_session()
    events = session.ask("slow", max_tokens=100)
    assert "".join(next(events).text for _ in range(10)) == "tick tick "
    events.close()
    assert not session.engine.has_work()
    assert BYTE_TOKENIZER.decode(session.build_prompt("So?", 9)[0]).startswith(
        "<|bos|><|user_start|>slow<|user_end|><|assistant_start|>tick tick <|assistant_end|><|user_start|>So?")


def test_a_prompt_that_is_read_in_steps_can_be_stopped():
    session = make_session()
    session.engine.step, steps = lambda: steps.append(1) or [], []
    assert list(session.ask("Hi", max_tokens=9, is_cut=lambda: len(steps) == 3)) == [] and len(steps) == 3
    assert not session.engine.has_work()


def test_saved_conversations_are_training_data_and_can_be_loaded(tmp_path):
    session = make_session()
    session.system = "Be brief."
    ask(session, "Hi")
    ask(session, "34 * 27?")
    ask(session, " ")
    session.save(tmp_path / "talk.jsonl")
    messages = CustomJSON(tmp_path / "talk.jsonl").get_example(0)["messages"]
    assert len(messages) == 7 and messages[4]["content"][2] == {"type": "python_output", "text": "918"}
    other = make_session()
    other.load(tmp_path / "talk.jsonl")
    assert other.build_prompt("So?", 9) == session.build_prompt("So?", 9)
    other.save(tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "talk.jsonl").read_bytes()
    with pytest.raises(UserError, match="exists"):
        other.save(tmp_path / "talk.jsonl")
    with pytest.raises(UserError, match="nothing to save"):
        make_session().save(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="can't be written"):
        session.save(tmp_path / "no" / "talk.jsonl")
    with pytest.raises(UserError, match="the message is empty"):
        ask(session, "")


@pytest.mark.parametrize(("messages", "prompt"), [
    ([{"role": "assistant", "content": "Hi!"}], "<|assistant_start|>Hi!<|assistant_end|><|user_start|>So?"),
    ([{"role": "user", "content": "a"}], "<|user_start|>a\n\nSo?"),    # which has no answer yet
    ([{"role": "developer", "content": "S"}], "<|user_start|>S\n\nSo?"),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
      {"role": "system", "content": "S"}],
     "<|user_start|>a<|user_end|><|assistant_start|>b<|assistant_end|><|user_start|>S\n\nSo?"),
])
def test_what_training_takes_can_be_loaded(tmp_path, messages, prompt):
    session = make_session()
    session.load(write_lines(tmp_path / "talk.jsonl", [{"messages": messages}]))
    assert BYTE_TOKENIZER.decode(session.build_prompt("So?", 9)[0]) == (
        f"<|bos|>{prompt}<|user_end|><|assistant_start|>")
    assert ask(session, "So?")
    session.save(tmp_path / "saved.jsonl")
    saved = CustomJSON(tmp_path / "saved.jsonl")[0]
    assert [message for message in saved["messages"] if "weight" in message] == [
        message for message in messages if "weight" in message]


def test_what_is_said_of_a_loaded_conversation(tmp_path):
    session = make_session()
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert session.load(write_lines(tmp_path / "a", [{"conversations": talk, "id": 1, "tools": [2]}])) == [
        "converted from ShareGPT", "not read: id, tools"]
    assert session.load(write_lines(tmp_path / "b", [[{"role": "user", "content": "a"}]])) == [
        "its last question has no answer, the next message is added to it"]


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"\xff", b'{"messages": [3]}', b'{"messages": [{"role": "user", "content": 5}]}',
    b'{"messages": [{"role": "user", "content": ""}]}'])
def test_what_is_no_conversation_is_not_loaded(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    session = make_session()
    ask(session, "Hi")
    with pytest.raises(UserError, match="doesn't hold one conversation"):
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
