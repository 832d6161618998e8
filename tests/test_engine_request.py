"""A request's generation without a model: text, tool calls and the end, from tokens that a test appends."""

import pytest

from nanochat.conversations import extend_parts
from nanochat.engine import ChatTokens, Generation, Request, TextStream
from tests.helpers import BYTE_TOKENIZER

PROMPT = [256, 1, 2]


def generate(text, max_length=100, stop=()):
    """The generation and the events of sampled tokens up to the end."""
    generation = Generation(7, Request(PROMPT, stop=stop), max_length, BYTE_TOKENIZER, ChatTokens(BYTE_TOKENIZER))
    events = []
    for token in BYTE_TOKENIZER.encoding.encode(text, allowed_special="all"):
        if not generation.finish_reason:
            events += generation.append(token)
    return generation, events


def test_tool_call_is_answered_by_the_calculator():
    generation, events = generate("It is <|python_start|>34*27<|python_end|>!<|assistant_end|>")
    assert BYTE_TOKENIZER.decode(generation.tokens[3:]) == (
        "It is <|python_start|>34*27<|python_end|><|output_start|>918<|output_end|>!<|assistant_end|>")
    parts = [(part, "".join(event.text for event in events if event.part == part))
             for part in ("text", "python", "python_output")]
    assert parts == [("text", "It is !"), ("python", "34*27"), ("python_output", "918")]
    assert [event.token for event in events if event.mask == 0] == generation.tokens[-7:-2]
    assert generation.masks == [0] * 3 + [event.mask for event in events]
    assert {event.request_id for event in events} == {7}
    usage = events[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, len(events), 0)
    assert all(event.usage is event.finish_reason is None for event in events[:-1])


@pytest.mark.parametrize("call", ["<|python_start|>1/0<|python_end|>", "5+5<|python_end|>",
                                  "<|python_start|><|output_start|>2+3<|output_end|>"])
def test_what_is_no_call_gets_no_output(call):
    generation, events = generate(call)
    assert BYTE_TOKENIZER.decode(generation.tokens[3:]) == call and all(event.mask for event in events)


@pytest.mark.parametrize("text,shown,calls", [
    ("Hi <|user_start|>foo<|python_end|>.", "Hi foo.", ""), ("<|user_end|>naïve<|assistant_start|>", "naïve", ""),
    ("a<|python_start|>1+<|user_end|>1<|python_end|>b", "ab", "1+1")])
def test_stray_special_tokens_have_no_text(text, shown, calls):
    generation, events = generate(text)
    assert "".join(event.text for event in events if event.part == "text") == shown
    assert "".join(event.text for event in events if event.part == "python") == calls
    assert BYTE_TOKENIZER.decode(generation.tokens[3:]) == text and len(events) == len(generation.tokens) - 3


@pytest.mark.parametrize("text,max_length,stop,shown,reason", [
    ("Hi<|assistant_end|>", 100, (), "Hi", "stop"), ("Hi<|bos|>", 100, (), "Hi", "stop"),
    ("Hello", 7, (), "Hell", "length"), ("one two", 100, ("wo", " t"), "one", "stop"),
    ("naïve", 6, (), "na\ufffd", "length"),
    ("<|python_start|>99*99<|python_end|>", 12, (), "99*999", "length")])  # the output, too, ends at the limit
def test_end(text, max_length, stop, shown, reason):
    generation, events = generate(text, max_length, stop)
    assert "".join(event.text for event in events) == shown
    assert events[-1].finish_reason == generation.finish_reason == reason and len(generation.tokens) <= max_length


@pytest.mark.parametrize("stop,pieces,reason", [
    (("END", "ENOUGH"), ["a", "EN", "EO"], "length"), (("ENEO",), ["a", ""], "stop"), (("OX",), [*"aENEO"], "length")])
def test_stop_strings_are_held_back_however_they_are_cut(stop, pieces, reason):
    generation = Generation(7, Request(PROMPT, stop=stop), 8, BYTE_TOKENIZER, ChatTokens(BYTE_TOKENIZER))
    steps = [generation.append(token) for token in b"aENEO"]
    assert ["".join(event.text for event in events) for events in steps if events] == pieces
    assert generation.finish_reason == reason


CALL = "<|python_start|>34*27<|python_end|>"


@pytest.mark.parametrize("stop,shown", [
    ("*", "It is 918, 5"), ("34", "It is 918, 5*7"), ("918", "It is "), ("is 9", "It "), ("s 918,", "It i"),
    ("It is 918", ""), (" 919", "It is 918, 5*7"), ("5*7", "It is 918, ")])
def test_stop_strings_look_at_what_the_client_sees(stop, shown):
    """Not at the hidden call and its output; a stop string may begin before the call and end after it."""
    generation, events = generate(f"It is {CALL}918, 5*7<|assistant_end|>", stop=(stop,))
    assert "".join(event.text for event in events if event.part == "text") == shown
    assert generation.finish_reason == events[-1].finish_reason == "stop" and events[-1].usage
    assert all(event.finish_reason is None for event in events[:-1])
    calls = "".join(event.text for event in events if event.part == "python")
    assert calls == ("" if stop in ("is 9", "s 918,", "It is 918") else "34*27")  # what follows the end isn't shown


def test_held_text_stays_before_the_call():
    """An answer's parts keep their order, though the text before the call was shown only after it."""
    generation, events = generate(f"It is {CALL}8<|assistant_end|>", stop=("is 9",))
    parts: list[dict] = []
    for event in events:
        extend_parts(parts, event, generation.chat_tokens)
    assert parts == [{"type": "text", "text": "It is "}, {"type": "python", "text": "34*27"},
                     {"type": "python_output", "text": "918"}, {"type": "text", "text": "8"}]
    assert [event.token for event in events] == generation.tokens[3:]


def test_only_whole_characters_are_streamed():
    def stream_text(tokens):
        stream = TextStream(BYTE_TOKENIZER)
        pieces = [*(stream.feed(token) for token in tokens), stream.flush()]
        return [piece for piece in pieces if piece]
    text = "naïve 한국어 😀 ok"
    assert stream_text(BYTE_TOKENIZER.encode(text)) == list(text)
    assert stream_text([*b"a\xf0\x9f"]) == ["a", "\ufffd"]                   # cut within a character
    assert "".join(stream_text([*b"\xff\xc3a\x80"])) == "\ufffd\ufffda\ufffd"  # not UTF-8
    assert stream_text([]) == []
