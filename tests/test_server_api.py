"""The HTTP API's formats, as clients see them: requests, answers, streams, limits and errors."""

import json
import re

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from nanochat import server_api
from nanochat.conversations import build_prompt, parse_messages, split_turns
from nanochat.engine import Engine, Request
from nanochat.server_api import ChatRequest, CompletionRequest, Limits
from tests.helpers import BYTE_TOKENIZER, make_model
from tests.server_helpers import CHAT, CONFIG, LEGACY, QUESTION, TEXT, ScriptedEngine, read_stream, serving

PYTHON_START, PYTHON_END = (BYTE_TOKENIZER.encode_special(f"<|python_{end}|>") for end in ("start", "end"))


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(make_model(CONFIG), BYTE_TOKENIZER, max_rows=4)


@pytest.fixture(scope="module")
def served(engine):
    with serving(engine) as client:
        yield client


@pytest.fixture
def client(engine, served):
    """Serves an engine that writes `script` to any question."""
    engine.script = b"Hello there."
    yield served
    assert not engine.has_work()


def join_content(chunks: list[dict], index: int = 0) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]
                   if choice["index"] == index)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_whole_answer(client):
    answer = client.post(CHAT, json={"messages": QUESTION}).json()
    assert answer["object"] == "chat.completion" and answer["model"] == "sft/toy"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there.", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    prompt = BYTE_TOKENIZER.render_for_completion({"messages": QUESTION})
    assert answer["usage"]["prompt_tokens"] == len(prompt) and answer["usage"]["completion_tokens"] == 13
    assert answer["usage"]["total_tokens"] == len(prompt) + 13


def test_stream_is_the_whole_answer(client, engine):
    engine.script = "naïve 🙂 日本".encode()
    body = {"messages": QUESTION, "stream": True, "n": 2, "max_tokens": 50, "stream_options": {"include_usage": True}}
    chunks = read_stream(client.post(CHAT, json=body))
    assert [join_content(chunks, index) for index in range(2)] == ["naïve 🙂 日本"] * 2
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert reasons == ["stop", "stop"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2 * (len(engine.script) + 1)
    assert len({chunk["id"] for chunk in chunks}) == 1 and {chunk["object"] for chunk in chunks} == {
        "chat.completion.chunk"}


def test_tokens_are_those_of_the_engine():
    """Sampling settings arrive: the same seed gives what the engine gives alone."""
    model = make_model(CONFIG)
    settings = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "seed": 7, "max_tokens": 12}
    with serving(Engine(model, BYTE_TOKENIZER, max_rows=4)) as client:
        asked = client.post(TEXT, json={"prompt": "abc", "n": 2, "logprobs": 1} | settings).json()
    prompt = BYTE_TOKENIZER.encode("abc", prepend="<|bos|>")
    engine = Engine(model, BYTE_TOKENIZER)
    for sample, choice in enumerate(asked["choices"]):
        engine.submit(Request(prompt, sample=sample, **settings))
        text = ""
        while engine.has_work():
            text += "".join(event.text for event in engine.step())
        assert choice["text"] == text


def test_stop_and_length(client):
    choice = client.post(CHAT, json={"messages": QUESTION, "stop": "there"}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello ", "stop")
    choice = client.post(CHAT, json={"messages": QUESTION, "max_completion_tokens": 4}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hell", "length")


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop,shown", [("*", "It is 918"), ("918", "It is "), (["is 9"], "It "),
                                        (["34", "8*"], "It is 91")])
def test_stop_strings_look_at_what_the_client_sees(client, engine, path, stream, stop, shown):
    engine.script = [*b"It is ", PYTHON_START, *b"34*27", PYTHON_END, *b"918*!"]
    body = {"messages": QUESTION, "prompt": "Hi", "max_tokens": 60, "stop": stop, "stream": stream, "temperature": 0}
    del body["prompt" if path == CHAT else "messages"]
    response = client.post(path, json=body)
    choices = [choice for chunk in (read_stream(response) if stream else [response.json()])
               for choice in chunk["choices"]]
    texts = [(choice.get("delta") or choice.get("message", {})).get("content", choice.get("text"))
             for choice in choices]
    assert "".join(filter(None, texts)) == shown and choices[-1]["finish_reason"] == "stop"


def test_each_prompt_has_its_choices(client, engine):
    """A string, strings, token ids, or lists of these: one choice for each prompt and sample, in that order."""
    ids = [BYTE_TOKENIZER.encode(text, prepend="<|bos|>") for text in ("a", "bc")]
    for prompt, num_tokens in (("The", 4), (["The"], 4), (["a", "bc"], 5), (ids[0], 2), (ids, 5), (None, 1), ("", 1)):
        for n in (1, 2):
            answer = client.post(TEXT, json={"prompt": prompt, "n": n, "max_tokens": 5}).json()
            num_choices = n * (len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1)
            assert [choice["index"] for choice in answer["choices"]] == list(range(num_choices))
            assert {choice["text"] for choice in answer["choices"]} == {"Hello"}
            assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (num_tokens,
                                                                                               5 * num_choices)
    body = {"prompt": ["a", ids[1]], "echo": True, "n": 2, "max_tokens": 5}
    assert client.post(TEXT, json=body).json()["error"]["param"] == "prompt"
    for prompt in (["a", "bc"], [ids[0][1:], ids[1][1:]]):
        body["prompt"] = prompt
        texts = [choice["text"] for choice in client.post(TEXT, json=body).json()["choices"]]
        assert texts == ["aHello", "aHello", "bcHello", "bcHello"]
        chunks = read_stream(client.post(TEXT, json=body | {"stream": True}))
        assert ["".join(choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)
                for index in range(4)] == texts


def test_prompts_sample_as_they_do_alone():
    with serving(Engine(make_model(CONFIG), BYTE_TOKENIZER, max_rows=4)) as client:
        settings = {"temperature": 1.0, "seed": 7, "max_tokens": 6, "n": 2}
        alone = [choice["text"] for prompt in ("abc", "xy")
                 for choice in client.post(TEXT, json=settings | {"prompt": prompt}).json()["choices"]]
        together = client.post(TEXT, json=settings | {"prompt": ["abc", "xy"]}).json()["choices"]
    assert [choice["text"] for choice in together] == alone and len(set(alone)) == 4


def test_max_tokens_is_cut_to_what_there_is(engine):
    engine.script = b"x" * 40
    question = {"messages": QUESTION}
    room = 40 - len(BYTE_TOKENIZER.render_for_completion(question))
    with serving(engine, context_tokens=40) as client:
        for fields in ({"max_tokens": 8192}, {"max_tokens": 10**40}, {"max_completion_tokens": 32768}):
            answer = client.post(CHAT, json=question | fields).json()
            assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (room, "length")
        assert client.post(TEXT, json={"prompt": "a", "max_tokens": 8192}).json()["usage"]["total_tokens"] == 40
        assert client.post(LEGACY, json=question | {"max_tokens": 8192}).text.count("x") == room


def test_limits_are_settings():
    engine = ScriptedEngine(make_model(CONFIG), BYTE_TOKENIZER, max_rows=4)
    engine.script = b"x" * 300
    limits = Limits(max_messages=3, max_message_chars=10, max_conversation_chars=25, max_answer_tokens=20,
                    max_choices=2)
    user, assistant = {"role": "user", "content": "x" * 10}, {"role": "assistant", "content": "y" * 15}
    with serving(engine, limits=limits) as client:
        assert client.get("/v1/models").json()["data"][0]["limits"] == vars(limits)
        for path, body, param in (
                (CHAT, {"messages": [user]}, None), (CHAT, {"messages": [user, assistant, user]}, "messages"),
                (CHAT, {"messages": QUESTION * 4}, "messages"), (CHAT, {"messages": QUESTION, "n": 2}, None),
                (CHAT, {"messages": [user | {"content": "x" * 11}]}, "messages[0]"), (TEXT, {"prompt": "x" * 25}, None),
                (CHAT, {"messages": QUESTION, "n": 3}, "n"), (TEXT, {"prompt": "x" * 26}, "prompt"),
                (TEXT, {"prompt": ["x", "x" * 26]}, "prompt[1]"), (TEXT, {"prompt": [5] * 26}, "prompt")):
            response = client.post(path, json=body | {"max_tokens": 4096})
            assert response.status_code == (400 if param else 200), response.text
            assert not param or response.json()["error"]["param"] == param
            assert param or response.json()["usage"]["completion_tokens"] == 20 * body.get("n", 1)
    with serving(engine, limits=Limits(max_conversation_chars=10**6), context_tokens=10**6) as client:
        response = client.post(TEXT, json={"prompt": "\U0001f600" * 10**5, "max_tokens": 1})  # 1.2 MB as JSON
        assert "leaves no room" in response.json()["error"]["message"]  # the engine's own refusal
    with serving(engine, max_waiting=0) as client:  # 4 rows
        error = client.post(TEXT, json={"prompt": ["a"] * 5}).json()["error"]
        assert "5 choices at once are more than the 4" in error["message"]


def test_logprobs(client):
    body = {"messages": QUESTION, "logprobs": True, "top_logprobs": 2}
    choice = client.post(CHAT, json=body).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == "Hello there."  # the end token isn't shown
    assert all(token["top_logprobs"][0]["token"] == token["token"] and token["logprob"] == pytest.approx(0, abs=1e-3)
               and len(token["top_logprobs"]) == 2 and token["bytes"] == list(token["token"].encode())
               for token in tokens)
    stopped = client.post(CHAT, json=body | {"stop": "there"}).json()["choices"][0]
    assert "".join(token["token"] for token in stopped["logprobs"]["content"]) == "Hello "  # nor the stop string
    chunks = read_stream(client.post(CHAT, json=body | {"stream": True}))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [token for choice in choices for token in choice["logprobs"]["content"]] == tokens
    text = client.post(TEXT, json={"prompt": "x", "logprobs": 1}).json()["choices"][0]
    assert "".join(text["logprobs"]["tokens"]) == text["text"] == "Hello there."
    assert text["logprobs"]["text_offset"] == list(range(12))
    chunks = read_stream(client.post(TEXT, json={"prompt": "x", "logprobs": 1, "stream": True}))
    assert [offset for chunk in chunks for choice in chunk["choices"]
            for offset in choice["logprobs"]["text_offset"]] == list(range(12))


def test_completions_top_logprobs_hold_the_sampled_token():
    """As OpenAI's do: beside the likeliest, where it isn't one of them."""
    body = {"prompt": "x", "temperature": 2, "top_k": 0, "seed": 1, "max_tokens": 12}
    with serving(Engine(make_model(CONFIG), BYTE_TOKENIZER)) as client:
        for num_likeliest in (0, 2):
            found = client.post(TEXT, json=body | {"logprobs": num_likeliest}).json()["choices"][0]["logprobs"]
            tops = found["top_logprobs"]
            assert [top[token] for token, top in zip(found["tokens"], tops, strict=True)] == found["token_logprobs"]
            assert max(map(len, tops)) == num_likeliest + 1


def test_stray_special_token_is_neither_text_nor_logprob(client, engine):
    engine.script = [*b"Hi ", BYTE_TOKENIZER.encode_special("<|user_start|>"), *b"foo", PYTHON_END, *b"."]
    choice = client.post(CHAT, json={"messages": QUESTION, "logprobs": True}).json()["choices"][0]
    assert choice["message"]["content"] == "Hi foo."
    assert "".join(token["token"] for token in choice["logprobs"]["content"]) == "Hi foo."


def test_parts_of_a_character_have_a_name_each(client, engine):
    """They all decode to the same character, so a dictionary by text would hold one of them."""
    engine.script = "日".encode()
    found = client.post(TEXT, json={"prompt": "x", "logprobs": 5}).json()["choices"][0]["logprobs"]
    assert found["tokens"] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    for token, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 5 and top[token] == logprob == pytest.approx(0, abs=1e-3)


def test_tool_calls_are_shown_apart(client, engine):
    engine.script = [*b"It is ", PYTHON_START, *b"34*27", PYTHON_END, *b"918!"]
    body = {"messages": QUESTION, "max_tokens": 40}
    message = client.post(CHAT, json=body).json()["choices"][0]["message"]
    parts = [{"type": "text", "text": "It is "}, {"type": "python", "text": "34*27"},
             {"type": "python_output", "text": "918"}, {"type": "text", "text": "918!"}]
    assert message["content"] == "It is 918!" and message["parts"] == parts
    chunks = read_stream(client.post(CHAT, json=body | {"stream": True}))
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert [delta["tool"] for delta in deltas if "tool" in delta] == [{"type": "call", "text": "34*27"},
                                                                      {"type": "output", "text": "918"}]
    assert join_content(chunks) == "It is 918!"
    # sent back, the model sees its call again
    history = [*QUESTION, {"role": "assistant", "content": parts}, {"role": "user", "content": "Sure?"}]
    asked = client.post(CHAT, json={"messages": history}).json()
    assert asked["usage"]["prompt_tokens"] == len(BYTE_TOKENIZER.render_for_completion({"messages": history}))


def test_legacy_stream(client):
    lines = client.post(LEGACY, json={"messages": QUESTION, "temperature": 0.5, "top_k": 3, "max_tokens": 5}).text
    events = [json.loads(line.removeprefix("data: ")) for line in lines.split("\n\n") if line]
    assert events[-1] == {"done": True} and "".join(event["token"] for event in events[:-1]) == "Hello"
    assert all(event["gpu"] == 0 for event in events[:-1])


def test_oldest_turns_are_dropped(client):
    history = [message for i in range(20) for message in ({"role": "user", "content": f"question {i}"},
                                                          {"role": "assistant", "content": f"answer {i}"})]
    body = {"messages": [{"role": "system", "content": "Be brief."}, *history, *QUESTION], "max_tokens": 30}
    response = client.post(CHAT, json=body)
    num_dropped = response.json()["dropped_messages"]
    assert response.headers["x-dropped-messages"] == str(num_dropped) and num_dropped % 2 == 0
    kept = [body["messages"][0], *body["messages"][1 + num_dropped:]]
    num_kept = len(BYTE_TOKENIZER.render_for_completion({"messages": kept}))
    assert response.json()["usage"]["prompt_tokens"] == num_kept <= 226
    more = [body["messages"][0], *body["messages"][num_dropped - 1:]]  # one turn less would not have fitted
    assert len(BYTE_TOKENIZER.render_for_completion({"messages": more})) > 226
    assert read_stream(client.post(CHAT, json=body | {"stream": True}))[0]["dropped_messages"] == num_dropped
    assert "dropped_messages" not in client.post(CHAT, json={"messages": QUESTION}).json()


def test_messages_become_turns():
    def render(*turns, is_base=False):
        messages = parse_messages([{"role": role, "content": content} for role, content in turns])
        tokens, num_dropped = build_prompt(BYTE_TOKENIZER, *split_turns(messages), 256, 16, is_base)
        assert num_dropped == 0
        return BYTE_TOKENIZER.decode(tokens)
    assert render(("developer", "A"), ("system", "B"), ("user", "c"), ("user", "d")) == (
        "<|bos|><|user_start|>A\n\nB\n\nc\n\nd<|user_end|><|assistant_start|>")
    assert render(("user", "a"), ("assistant", "b"), ("user", "c"), is_base=True) == "<|bos|>a\n\nb\n\nc"
    assert render(("system", "A"), ("user", "b"), is_base=True) == "<|bos|>A\n\nb"


CALL = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}


@pytest.mark.parametrize("path", [CHAT, LEGACY])
@pytest.mark.parametrize("messages", [
    [{"role": "user", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
    [{"role": "user", "content": "a"}, {"role": "developer", "content": "b"}], [{"role": "system", "content": "a"}],
    [{"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "a", "name": "Eve"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "refusal": None, "weight": 0},
     {"role": "system", "content": "b"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
     {"role": "tool", "tool_call_id": "c", "content": "cold"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
def test_what_training_takes_is_answered(client, path, messages):
    response = client.post(path, json={"messages": messages, "max_tokens": 20})
    assert response.status_code == 200
    if path == CHAT:
        messages = [*messages, {"role": "assistant", "content": "Hello"}]
        ids, _ = BYTE_TOKENIZER.render_conversation({"messages": messages})
        assert response.json()["usage"]["prompt_tokens"] == len(ids) - len("Hello") - 1


def test_an_answer_with_calls_is_sent_back_as_it_is(client, engine):
    engine.script = [*b"It is ", PYTHON_START, *b"34*27", PYTHON_END, *b"918!"]
    message = client.post(CHAT, json={"messages": QUESTION, "max_tokens": 40}).json()["choices"][0]["message"]
    history = [*QUESTION, message, *QUESTION]
    asked = client.post(CHAT, json={"messages": history}).json()["usage"]["prompt_tokens"]
    with_calls = [*QUESTION, {"role": "assistant", "content": message["parts"]}, *QUESTION]
    assert asked == len(BYTE_TOKENIZER.render_for_completion({"messages": with_calls}))


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

BAD_FIELDS = [
    ("messages", []), ("messages", None), ("messages", "Hi"), ("messages", [{"role": "user"}]),
    ("messages[0].role", [{"role": "robot", "content": "x"}]),
    ("messages[0].content", [{"role": "user", "content": 5}]),
    ("messages[0].content", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
    ("messages[0]", [{"role": "user", "content": ""}]), ("messages[0]", [{"role": "user", "content": "x" * 8001}]),
    ("messages", [{"role": "user", "content": "x" * 8000}] * 5), ("messages", QUESTION * 501),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True), ("top_k", -1),
    ("top_k", 201), ("top_p", 0), ("top_p", 1.5), ("max_tokens", 0), ("max_tokens", -1),
    ("max_tokens", 1.5), ("n", 0), ("n", 17), ("seed", 2**70), ("stop", ""), ("stop", ["a"] * 5), ("stop", 5),
    ("stream", "yes"), ("logprobs", 1), ("top_logprobs", 3), ("tools", [{"type": "function"}]),
    ("response_format", {"type": "json_object"}), ("presence_penalty", 0.5), ("logit_bias", {"5": 1}),
]


@pytest.mark.parametrize("param,value", BAD_FIELDS)
def test_bad_field_is_named(client, param, value):
    field = param.split("[")[0]
    error = client.post(CHAT, json={"messages": QUESTION} | {field: value})
    assert error.status_code == 400
    body = error.json()["error"]
    assert body["param"].startswith(param) and body["param"].split("[")[0] in body["message"]
    assert set(body) == {"message", "type", "param", "code"} and body["type"] == "invalid_request_error"


@pytest.mark.parametrize("body,status", [
    (b'{"messages": [', 400), (b"\xff\xfe", 400), (b'"text"', 400), (b"[]", 400), (b"", 400), (b"[" * 10**5, 400),
    (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400), (b" " * (2**20 + 1), 413),
    (b'{"a": "' + b"x" * 2**20 + b'"}', 413), (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 200)])
@pytest.mark.parametrize("path", [CHAT, LEGACY])
def test_bad_body(client, path, body, status):
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status and (status == 200 or response.json()["error"]["message"])


def test_whatever_a_model_wrote_can_be_sent_back(client):
    history = [*QUESTION, {"role": "assistant", "content": "x" * 20_000}, *QUESTION]
    assert client.post(CHAT, json={"messages": history}).json()["dropped_messages"] == 2
    error = client.post(CHAT, json={"messages": [*history[:2], *history]}).json()["error"]
    assert error["param"] == "messages" and "32000 are the most" in error["message"]


def test_harmless_fields_are_ignored(client):
    body = {"messages": QUESTION, "user": "me", "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None,
            "tools": [], "store": False, "metadata": {}, "response_format": {"type": "text"}, "temperature": None,
            "max_tokens": None, "n": None, "stop": None, "stream": None, "seed": None, "top_p": None, "unheard\n_öf": 1}
    response = client.post(CHAT, json=body)
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == (
        "user, presence_penalty, frequency_penalty, tools, store, metadata, response_format, unheard\\n_\\xf6f")
    assert "x-ignored-fields" not in client.post(CHAT, json={"messages": QUESTION}).headers


@pytest.mark.parametrize("request_type,reference", [
    (ChatRequest, chat_params.CompletionCreateParamsStreaming),
    (CompletionRequest, text_params.CompletionCreateParamsStreaming)])
def test_each_field_of_the_reference_has_its_place(request_type, reference):
    """Read, refused, or in the list of the ignored ones, which the documentation of the formats names."""
    ignored = set(re.split(r",\s+", re.search(r"is ignored: (.*?)\. A field", server_api.__doc__, re.DOTALL)[1]))
    read, refused = set(request_type.model_fields), set(server_api.UNSUPPORTED)
    assert set(reference.__annotations__) - read - refused - ignored == set()
    assert ignored <= set(chat_params.CompletionCreateParamsStreaming.__annotations__) and not ignored & refused


@pytest.mark.parametrize("fields,param", [
    *(({"prompt": prompt}, "prompt") for prompt in ([], [[]], 5, 0, {}, ["a", 5], [1, True], [-1], [[1], "a"],
                                                     "\ud800")),
    ({"prompt": [[1], [300]]}, "prompt[1]"), ({"messages": QUESTION}, "messages"),
    ({"prompt": "a", "best_of": 3, "n": 2}, "best_of"), ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
    ({"prompt": "a", "suffix": "b"}, "suffix")])
def test_bad_completion_is_named(client, fields, param):
    response = client.post(TEXT, content=json.dumps(fields), headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and param in error["message"]


def test_base_url_without_v1(client):
    """A client of OpenAI's API names a model; those of the legacy endpoint don't."""
    body = {"messages": QUESTION, "model": "sft/toy"}
    for path, method, fields in ((LEGACY, "POST", body), (LEGACY, "POST", body | {"stream": True}),
                                 ("/models", "GET", None), ("/completions", "POST", {"prompt": "a"})):
        response = client.request(method, path, json=fields)
        assert response.status_code == 404
        assert "base_url of a client of OpenAI's API ends with /v1" in response.json()["error"]["message"]
    response = client.post(LEGACY, json={"messages": QUESTION}, headers={"X-Stainless-Lang": "js"})
    assert response.status_code == 404 and "/v1" in response.json()["error"]["message"]


def test_other_mistakes(client):
    for path, method, status, code in (("/nope", "GET", 404, "unknown_url"), (CHAT, "GET", 405, "method_not_allowed"),
                                       ("/v1/models/gpt-4", "GET", 404, "model_not_found")):
        response = client.request(method, path)
        assert response.status_code == status and response.json()["error"]["code"] == code
    error = client.post(CHAT, json={"messages": QUESTION, "model": "gpt-4"})
    assert error.status_code == 404 and error.json()["error"]["code"] == "model_not_found"
    for path, body in ((CHAT, {"messages": [{"role": "user", "content": "x" * 300}]}), (TEXT, {"prompt": "x" * 300}),
                       (TEXT, {"prompt": [1] * 300})):
        error = client.post(path, json=body)
        assert error.status_code == 400 and error.json()["error"]["code"] == "context_length_exceeded"
    plain = client.post(CHAT, content=json.dumps({"messages": QUESTION}), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 400 and "Content-Type: application/json" in plain.json()["error"]["message"]
