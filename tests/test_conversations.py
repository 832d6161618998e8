"""The one definition of a conversation: what is taken, how it reads, and that all who take one agree."""

import hashlib
import json
from datetime import date

import pytest

from nanochat.common import UserError
from nanochat.conversations import build_prompt, parse_conversation, parse_messages, split_turns
from tasks.catalog import get_task
from tests.helpers import BYTE_TOKENIZER


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(content, **fields):
    return {"role": "assistant", "content": content} | fields


def call(name, arguments):
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def read(messages):
    """(the tokens as text, with what is learned in [brackets]; the same of the prompt for a next answer)."""
    ids, mask = BYTE_TOKENIZER.render_conversation({"messages": messages}, max_tokens=None)
    text, before = "", 0
    for token, learned in zip(ids, mask, strict=True):
        text += ("[" if learned else "]") * (learned != before) + BYTE_TOKENIZER.decode([token])
        before = learned
    turns = split_turns(parse_messages(messages))
    prompt = BYTE_TOKENIZER.decode(build_prompt(BYTE_TOKENIZER, *turns, 10_000, 10, is_base=False)[0])
    return [shorten(text + "]" * before), shorten(prompt)]


def shorten(text):
    for name, short in (("<|bos|>", ""), ("<|user_start|>", "U:"), ("<|assistant_start|>", "A:"), ("user_end|>", "/>"),
                        ("assistant_end|>", "/>"), ("python_start|>", "py|"), ("python_end|>", "/py>"),
                        ("output_start|>", "out|"), ("output_end|>", "/out>"), ("<|", "<")):
        text = text.replace(name, short)
    return text


@pytest.mark.parametrize(("messages", "learned", "prompt"), [
    ([user("a"), assistant("b")], "U:a</>A:[b</>]", "U:a</>A:b\n\n"),
    ([system("S"), user("a"), assistant("b"), user("c")], "U:S\n\na</>A:[b</>]U:c</>", "U:S\n\na</>A:b</>U:c</>A:"),
    ([{"role": "developer", "content": "S"}, user("a")], "U:S\n\na</>", "U:S\n\na</>A:"),
    ([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], "U:ab</>", "U:ab</>A:"),
    ([user("a"), user("b"), assistant("c")], "U:a\n\nb</>A:[c</>]", "U:a\n\nb</>A:c\n\n"),
    ([user("a"), assistant("b"), assistant("c"), user("d")], "U:a</>A:[b\n\nc</>]U:d</>",
     "U:a</>A:b\n\nc</>U:d</>A:"),
    ([user("a"), assistant("b"), system("S"), user("c")], "U:a</>A:[b</>]U:S\n\nc</>",
     "U:a</>A:b</>U:S\n\nc</>A:"),
    ([user("a"), system("S")], "U:a\n\nS</>", "U:a\n\nS</>A:"),
    ([system(""), user("a"), assistant("b"), system(""), assistant("c")], "U:a</>A:[b\n\nc</>]", "U:a</>A:b\n\nc\n\n"),
    ([system("S")], "U:S</>", "U:S</>A:"),
    ([assistant("Hi!"), user("a"), assistant("b")], "A:[Hi!</>]U:a</>A:[b</>]", "A:Hi!</>U:a</>A:b\n\n"),
    ([system("S"), assistant("Hi!"), user("a")], "U:S</>A:[Hi!</>]U:a</>", "U:S</>A:Hi!</>U:a</>A:"),
    ([user("a"), assistant("b", weight=0), user("c"), assistant("d", weight=1)], "U:a</>A:b</>U:c</>A:[d</>]",
     "U:a</>A:b</>U:c</>A:d\n\n"),
    ([user("a"), assistant("b", weight=0), assistant("c")], "U:a</>A:b[\n\nc</>]", "U:a</>A:b\n\nc\n\n"),
    ([user("a"), assistant(None), user("b")], "U:a</>A:</>U:b</>", "U:a</>A:</>U:b</>A:"),
    ([user("a"), assistant(None, tool_calls=[call("python", '{"expression": "6*7"}')]),
      {"role": "tool", "tool_call_id": "call_1", "content": "42"}], "U:a</>A:[<py|6*7</py>]<out|42</out></>",
     "U:a</>A:<py|6*7</py><out|42</out>"),
    ([user("a"), assistant("So:", tool_calls=[call("get", '{"city": "Oslo"}')]), {"role": "tool", "content": "cold"},
      assistant("Cold.")], 'U:a</>A:[So:<py|get({"city": "Oslo"})</py>]<out|cold</out>[Cold.</>]',
     'U:a</>A:So:<py|get({"city": "Oslo"})</py><out|cold</out>Cold.\n\n'),
    ([user("a"), assistant(None, function_call={"name": "get", "arguments": "5"}), {"role": "function", "name": "get",
      "content": "6"}, user("b")], "U:a</>A:[<py|get(5)</py>]<out|6</out></>U:b</>",
     "U:a</>A:<py|get(5)</py><out|6</out></>U:b</>A:"),
    ([user("a"), assistant("42", parts=[{"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"},
                                        {"type": "text", "text": "42"}], refusal=None), user("b")],
     "U:a</>A:[<py|6*7</py>]<out|42</out>[42</>]U:b</>", "U:a</>A:<py|6*7</py><out|42</out>42</>U:b</>A:"),
    ([user("a"), assistant("edited", parts=[{"type": "python", "text": "6*7"}, {"type": "text", "text": "42"}])],
     "U:a</>A:[edited</>]", "U:a</>A:edited\n\n"),
    ([user("a"), assistant(None, refusal="No.")], "U:a</>A:[No.</>]", "U:a</>A:No.\n\n"),
    ([user("a") | {"name": "Eve"}, assistant("b", audio=None)], "U:a</>A:[b</>]", "U:a</>A:b\n\n"),
])
def test_every_order_of_roles_is_a_conversation(messages, learned, prompt):
    before = json.dumps(messages)
    assert read(messages) == [learned, prompt] and json.dumps(messages) == before
    assert parse_messages(parse_messages(messages)) == parse_messages(messages)
    ids = BYTE_TOKENIZER.render_for_completion({"messages": [*messages, assistant("An answer")]})
    assert shorten(BYTE_TOKENIZER.decode(ids)) == prompt


def test_half_a_character_is_replaced():
    assert parse_messages([user("a \ud83d \ude00\ud83d\ude00")]) == [user("a \ufffd \ufffd\U0001f600")]


def test_arguments_of_a_parquet_file_may_hold_dates():
    messages = [user("a"), assistant(None, tool_calls=[call("get", {"day": date(2026, 1, 2)})])]
    assert 'get({"day": "2026-01-02"})' in str(parse_conversation({"messages": messages}))


@pytest.mark.parametrize(("messages", "reason"), [
    (None, "at least one message"), ([], "at least one message"), ({}, "at least one message"),
    (["hi"], "message 0 is not"), ([{"role": 5, "content": "a"}], "message 0 is not"),
    ([{"role": "user"}], "message 0 is not"), ([{"role": "assistant", "text": "a"}], "message 0 is not"),
    ([user("a"), {"role": "robot", "content": "b"}], "message 1 has role 'robot'; the roles are"),
    ([user("")], "message 0 is empty"), ([user(None)], "message 0 is empty"), ([user([])], "is empty"),
    ([user(5)], "a content that is int"), ([user(0)], "a content that is int"),
    ([assistant(0)], "a content that is int"), ([assistant({})], "a content that is dict"),
    ([assistant("a", parts=3)], "a parts that is int"),
    ([user({"type": "text"})], "a content that is dict"),
    ([user([{"type": "image_url", "image_url": "x"}])], "a part of type 'image_url' .* of the types text$"),
    ([user([{"type": "python", "text": "1"}])], "a part of type 'python'"), ([user(["a"])], "a part in its content"),
    ([user([{"type": "text"}])], "a text part that holds no text"),
    ([assistant("a", weight=0.5)], "message 0 has weight 0.5; it is 1, or 0"),
    ([assistant("a", weight="0")], "weight '0'"),
    ([assistant(None, tool_calls=[{"id": 1}])], "has a tool call that is not"),
    ([assistant(None, tool_calls="x")], "a tool_calls that is str"),
])
def test_what_is_no_conversation_is_one_sentence(messages, reason):
    with pytest.raises(UserError, match=reason) as error:
        parse_conversation({"messages": messages})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_tokens_and_masks_are_those_of_before():
    """The digests are of the code before conversations.py, which took fewer conversations."""
    parts = [{"type": "text", "text": "It is "}, {"type": "python", "text": "6*7"},
             {"type": "python_output", "text": "42"}, {"type": "text", "text": "."}, {"type": "text", "text": " Sure."},
             {"type": "python_output", "text": ""}]
    made = [{"messages": [system("Be brief.")] * (i % 2) + [
        user(f"Q {i} <|bos|>\n"), assistant(parts[:i % 7 or 1] if i % 3 else "naïve 🙂")] * (1 + i % 3)
        + [user(" ")] * (i % 4 == 0)} for i in range(40)]
    for conversations, expected in ((get_task("Identity", "train", size=100), "6ff31be678ae5833"),
                                    (get_task("Arithmetic", "train", size=100), "0ff7d7e2918d3d1a"),
                                    (made, "a3d3594059fc2984")):
        digest = hashlib.sha256()
        for conversation in conversations:
            digest.update(json.dumps(BYTE_TOKENIZER.render_conversation(conversation, max_tokens=None)).encode())
            digest.update(json.dumps(BYTE_TOKENIZER.render_for_completion(conversation)).encode())
        assert digest.hexdigest()[:16] == expected
