"""tasks/customjson.py: a person's own conversations, the forms and files that they come in, and what is left out."""

import gzip
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from tasks.customjson import CustomJSON
from tasks.mixtures import make_mixture
from tests.data_helpers import write_lines
from tests.helpers import BYTE_TOKENIZER

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_custom_json(tmp_path):
    parts = [{"type": "text", "text": "It is "}, {"type": "python", "text": "1+1"},
             {"type": "python_output", "text": "2"}]
    rows = [TALK, {"messages": [{"role": "system", "content": "Be kind."}, *TALK], "source": "me"}, TALK[:1],
            [TALK[0], {"role": "assistant", "content": parts}]]
    path = tmp_path / "mine.jsonl"
    path.write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n")
    task = CustomJSON(path)
    assert [conversation["messages"] for conversation in task] == [rows[0], rows[1]["messages"], rows[2], rows[3]]
    assert list(CustomJSON(path, stop=1)) == list(task.cut(0, 1)) == [{"messages": TALK}]
    assert list(task.cut(3, None)) == [{"messages": rows[3]}]
    assert task.account.describe() == ["mine.jsonl: 4 conversations of 36 characters in 4 rows",
                                       "mine.jsonl: not read: source (1 rows)",
                                       "mine.jsonl: no conversation is held out for validation: 1 of 20 would be"]


@pytest.mark.parametrize(("row", "message"), [
    ([{"role": "robot", "content": "x"}], "message 0 has role 'robot'"),
    ([{"role": "user", "content": ""}, TALK[1]], "message 0 is empty; a user message needs a text"),
    ([TALK[0], {"role": "assistant", "content": "x", "weight": 2}], "message 1 has weight 2"),
    ({"messages": []}, "at least one"), ([], "at least one"), ({"messages": "x"}, "at least one"),
    ({"messages": ""}, "a row of messages is no form"),
    (5, "a row that is int"), (None, "a row that is null"), ({}, "a row of nothing"),
    ({"question": "x", "answer": "y"}, "a row of question, answer is no form .* that is known"),
    ({"text": "x"}, "a row of text is no conversation, but for pretraining"),
    ({"prompt": "x", "chosen": "y", "rejected": "z"}, r"pairs of a better and a worse answer \(chosen, rejected\)"),
    ({"conversations": TALK, "chosen": "y", "rejected": "z"}, "pairs of a better and a worse answer"),
    ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "pairs of a better and a worse answer"),
    ({"prompt": "x", "completion": "y", "label": False}, r"answers with a rating \(KTO\)"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "message 0 has role 'robot'"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, "message 0 has a tool call that is not"),
    ({"instruction": "x", "output": "y", "history": [3]}, "a history that is int"),
    ({"prompt": {"x": 1}, "completion": "y"}, "a content that is dict"),
    ({"prompt": "x", "completion": 1}, "a content that is int"), ({"a\nb": 1}, r"a row of a\\nb is no form"),
])
def test_what_is_no_conversation_is_left_out_and_counted(tmp_path, row, message):
    path = write_lines(tmp_path / "mine.jsonl", [TALK, row, *[TALK] * 30, row])
    account = CustomJSON(path).account
    ((reason, numbers),) = account.reasons.items()
    assert (account.rows, account.kept, numbers) == (33, 31, [2, 33])
    assert f"mine.jsonl: left out line 2, 33: {reason}" in account.describe()
    assert account.describe()[-1].startswith("WARNING: 6% of the rows of mine.jsonl were left out (2 of 33)")
    with pytest.raises(UserError, match=f"holds no conversation .line 1: .*{message}.*; give rows of") as error:
        CustomJSON(write_lines(tmp_path / "bad.jsonl", [row]))
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_row_with_two_fields_of_one_name_is_left_out(tmp_path):
    """json would take the second answer without a word."""
    rows = [json.dumps(TALK)] * 30
    rows[3] = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]'
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    account = CustomJSON(tmp_path / "mine.jsonl").account
    assert account.kept == 29 and account.reasons == {"two fields are named 'content'": [4]}


@pytest.mark.parametrize(("num", "num_val"), [(19, 0), (20, 1), (40, 2)])
def test_what_is_held_out_for_validation(tmp_path, num, num_val):
    """A file too small for any says so, where other tasks have some: nothing else would."""
    mixture = make_mixture(["Arithmetic:30"], [str(write_lines(tmp_path / "mine.jsonl", [TALK] * num))])
    assert len(mixture.val) - 30 == num_val
    said = [line for line in mixture.accounts[0].describe() if "validation" in line]
    assert said == ["mine.jsonl: no conversation is held out for validation: 1 of 20 would be"][:num_val == 0]


def test_account_is_bounded(tmp_path):
    rows = [{f"field {i}": i} for i in range(12) for _ in range(1 + i)] + [TALK, {"messages": TALK} | {
        f"more {i}": 1 for i in range(12)}]
    account = CustomJSON(write_lines(tmp_path / "mine.jsonl", rows)).account
    lines = account.describe()
    assert len(lines) == 1 + 10 + 1 + 1 + 1 + 1
    assert "left out line 67, 68, 69, 70, 71 and 7 more: a row of field 11" in lines[1]
    assert lines[11] == "mine.jsonl: left out 3 rows more for 2 other reasons" and "and 2 other fields" in lines[12]
    assert len(account.to_json()["reasons"]) == len(account.to_json()["unused"]) == 10
    assert account.to_json()["left_out"] == 78


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text} | fields


@pytest.mark.parametrize(("form", "row", "messages", "unused"), [
    ("ShareGPT", {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "a"},
                                    {"from": "gpt", "value": "b", "weight": 0}], "id": 7},
     [{"role": "system", "content": "S"}, user("a"), assistant("b", weight=0)], {"id"}),
    ("ShareGPT", {"conversations": json.dumps([{"from": "user", "value": "a"}, {"from": "model", "value": "b"}]),
                  "system": "S"}, [{"role": "system", "content": "S"}, user("a"), assistant("b")], set()),
    ("ShareGPT", {"conversation": [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(
        {"name": "get", "arguments": {"x": 1}})}, {"from": "observation", "value": "2"}]},
     [user("a"), assistant([{"type": "python", "text": 'get({"x": 1})'}]),
      assistant([{"type": "python_output", "text": "2"}], weight=0)], set()),
    ("OpenAI's messages", {"conversations": TALK, "mood": ""}, TALK, set()),
    ("OpenAI's messages", {"messages": [user("a") | {"name": "Eve"}, assistant("b", weight=1)], "tools": [1]},
     [user("a"), assistant("b")], {"tools", "name of user messages"}),
    ("OpenAI's messages", {"messages": json.dumps(TALK), "prompt": "x"}, TALK, {"prompt"}),
    ("alpaca", {"instruction": "a", "input": "", "output": "b", "text": "a b"}, [user("a"), assistant("b")], {"text"}),
    ("alpaca", {"instruction": "a", "input": "c", "output": "b", "history": [["d", "e"]], "system": "S"},
     [{"role": "system", "content": "S"}, user("d"), assistant("e"), user("a\n\nc"), assistant("b")], set()),
    ("OpenAI's messages", [user("a \ud83d"), assistant("b") | {"x\n": 1}], [user("a \ufffd"), assistant("b")],
     {"halves of surrogate pairs, which become U+FFFD", r"x\n of assistant messages"}),
    ("dolly", {"instruction": "a", "context": "c", "response": "b"}, [user("a\n\nc"), assistant("b")], set()),
    ("prompt and completion", {"prompt": "a", "completion": " b"}, [user("a"), assistant(" b")], set()),
    ("prompt and completion", {"prompt": [user("a")], "completion": [assistant("b")]}, [user("a"), assistant("b")],
     set()),
])
def test_other_forms_are_converted(tmp_path, form, row, messages, unused):
    task = CustomJSON(write_lines(tmp_path / "mine.jsonl", [row]))
    assert list(task) == [{"messages": messages}] and set(task.account.unused) == unused
    assert dict(task.account.forms) == {form: 1}
    said = "mine.jsonl: converted from " + form + ": 1 rows" in task.account.describe()
    assert said == (form != "OpenAI's messages")


def test_answers_that_are_not_learned_are_said(tmp_path):
    rows = [[user("a"), assistant("BAD", weight=0), user("c"), assistant("good", weight=1)], [user("a"), assistant("")],
            [user("a"), assistant(None)], [user("a"), assistant("b"), {"role": "tool", "content": "x"}, assistant("c")]]
    task = CustomJSON(write_lines(tmp_path / "mine.jsonl", rows))
    assert any("3 conversations have an answer that is read, but not learned" in line
               for line in task.account.describe())
    ids, mask = BYTE_TOKENIZER.render_conversation(task[0])
    learned = BYTE_TOKENIZER.decode([token for token, is_learned in zip(ids, mask, strict=True) if is_learned])
    assert learned == "good<|assistant_end|>"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def pack(path, content):
    """Write `content` as the end of the name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pa.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


ROWS = [{"prompt": f"Was ist {i}, \"ß\"?\nSag's!", "completion": f"Es ist {i}."} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLE = "prompt;completion\r\n" + "".join('"' + row["prompt"].replace('"', '""') + f'";{row["completion"]}\r\n'
                                          for row in ROWS)


@pytest.mark.parametrize(("name", "content"), [
    ("a.jsonl", LINES), ("a.ndjson", LINES), ("a", LINES), ("a.JSONL", "\n" + LINES.replace("\n", "\r\n\n")),
    ("a.json", LINES), ("a.json", json.dumps(ROWS, indent=1)), ("a.json", "\ufeff" + json.dumps(ROWS)),
    ("a.csv", TABLE), ("a.csv", TABLE.replace("completion", "completion ", 1).replace("completion ", "completion")),
    ("my data.v2.csv", "\ufeff" + TABLE)])
@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_every_kind_of_file(tmp_path, name, content, packed):
    task = CustomJSON(pack(tmp_path / (name + packed), content.encode()))
    assert list(task) == [{"messages": [user(row["prompt"]), assistant(row["completion"])]} for row in ROWS]


def test_tables(tmp_path):
    """Parquet gives null where a row lacks a field; a column may hold JSON."""
    rows = [{"messages": [user("a"), assistant("b", weight=0), assistant("c")]}, {"messages": None}, {"messages": TALK}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = CustomJSON(tmp_path / "a.parquet")
    assert list(task) == [{"messages": rows[0]["messages"]}, {"messages": TALK}]
    assert task.account.describe()[1].startswith("a.parquet: left out row 2: a row of nothing is no form")
    pq.write_table(pa.table({"messages": [json.dumps(TALK)]}), tmp_path / "b.parquet")
    assert list(CustomJSON(tmp_path / "b.parquet")) == [{"messages": TALK}]
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match="two columns of the same name among prompt, prompt"):
        CustomJSON(tmp_path / "c.parquet")


def test_one_conversation_over_several_lines(tmp_path):
    for content in (TALK, {"messages": TALK}):
        (tmp_path / "talk.json").write_text(json.dumps(content, indent=2))
        assert list(CustomJSON(tmp_path / "talk.json")) == [{"messages": TALK}]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", b"", "is empty"), ("a.json", b"[]", "is empty"), ("a.csv", b"prompt,completion\n", "is empty"),
    ("a.jsonl", LINES.encode("utf-16"), "is not UTF-8 text; .*iconv -f UTF-16 -t UTF-8 .*a.jsonl"),
    ("a.jsonl", LINES.encode("utf-16-le"), "is not UTF-8 text"), ("a.csv", TABLE.encode("utf-16-le"), "is not UTF-8"),
    ("a.json", LINES.encode("utf-16-le"), "is not UTF-8 text"), ("a.csv", TABLE.encode("latin-1"), "is not UTF-8"),
    ("a.jsonl", json.dumps(ROWS, ensure_ascii=False).encode("latin-1"), "is not UTF-8 text; .*iconv -f CP1252"),
    ("a.json", b'[{"prompt": "a"', "(is damaged|is not JSON) .*correct it"), ("a.json", b"[" * 100_000, "correct it"),
    ("a.csv", b"prompt,completion\na,b,c\n", "2 has (more|3) fields.*quotes"), ("a.csv", b'a,b\n"x', "correct it"),
    ("a.csv", b"prompt,prompt\na,b\n", "two columns .* the same name among prompt, prompt"),
    ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-20], "is not a whole gzip file"),
    ("a.jsonl.gz", b"x", "not a whole gzip"),
    ("a.jsonl.zst", pa.compress(LINES.encode(), codec="zstd", asbytes=True)[:-9], "is not a whole zstd file"),
    ("a.parquet", b"PAR1", "can't be read as parquet"), ("a.jsonl", b"[" * 100_000, "nested too deeply"),
])
def test_damaged_files_are_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        CustomJSON(tmp_path / name)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_custom_json_that_is_no_file(tmp_path):
    names = ["pipe.jsonl", "pipe.parquet"]
    for name in names:
        os.mkfifo(tmp_path / name)
    for path in (tmp_path, *(tmp_path / name for name in (*names, "none.jsonl", "none.parquet"))):
        with pytest.raises(UserError, match=f"{path} can't be read"):
            CustomJSON(path)


# ---------------------------------------------------------------------------------------------------------------------
# Any file at all

SEEDS = [{"messages": [user("Hé"), assistant("Hello", weight=0), {"role": "tool", "content": "x"}]}, TALK,
         {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "日本"}]},
         {"instruction": "a", "input": "b", "output": "c"}, {"prompt": "a", "completion": "b", "label": None},
         {"messages": [user("a"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])]},
         {"chosen": "a", "rejected": "b"}, None, 5, "text", {"messages": None}, {"messages": [[]]}]


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Cut, flip, repeat, insert or recode a part of a file."""
    start, stop = sorted(rng.choices(range(len(content) + 1), k=2))
    part = content[start:stop]
    noise = [bytes(rng.choices(range(256), k=3)), b"null", b"[", b"]", b"}", b'"', b"\\ud800", b"1e999", b"\0", b"\r",
             b",,;", b"[" * 9999, content]
    names = [(b'"role"', b'"from"'), (b'"user"', b"5"), (b'"Hi"', b"{}"), (b"content", b"value"), (b"\n", b"\r")]
    return rng.choice([
        content[:start], content[start:], content[:stop] + part + content[stop:], content[:start] + content[stop:],
        content[:start] + rng.choice(noise) + content[start:], content[:start] + rng.choice(noise) + content[stop:],
        content.decode(errors="replace").encode(rng.choice(["utf-16", "utf-16-be", "utf-32", "utf-8-sig"])),
        content.replace(*rng.choice(names))])


def test_any_file_is_conversations_or_one_sentence(tmp_path):
    """The account adds up, and whatever is taken can be learned from and continued."""
    rng, outcomes = random.Random(0), {"taken": 0, "partly": 0, "refused": 0}
    for i in range(500):
        rows = rng.choices(SEEDS[:6] if rng.random() < 0.5 else SEEDS, k=rng.randrange(1, 6))
        kind = rng.choice([".jsonl", ".json", ".csv", ".parquet", ".ndjson"])
        content = "".join(json.dumps(row, ensure_ascii=rng.random() < 0.5) + "\n" for row in rows).encode()
        if kind == ".json" and rng.random() < 0.5:
            content = json.dumps(rows).encode()
        elif kind == ".csv":
            content = b"prompt,completion,messages\n" + b"".join(rng.choices([
                b"a,b,\n", b'"a ""x""\n y",b\n', b',,"' + json.dumps(TALK).replace('"', '""').encode() + b'"\n'], k=4))
        elif kind == ".parquet":
            talks = [row["messages"] if isinstance(row, dict) and "messages" in row else row for row in rows]
            pq.write_table(pa.table({"messages": list(map(json.dumps, talks))}), tmp_path / "seed.parquet")
            content = (tmp_path / "seed.parquet").read_bytes()
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            content = mutate(content, rng)
        path = pack(tmp_path / f"{i}{kind}{rng.choice(['', '', '.gz', '.zst']) if kind != '.parquet' else ''}", content)
        if path.suffix in (".gz", ".zst") and rng.random() < 0.3:
            path.write_bytes(mutate(path.read_bytes(), rng))
        try:
            task = CustomJSON(path)
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 1000
            outcomes["refused"] += 1
            continue
        account = task.account
        assert account.kept == len(task) == sum(account.forms.values()) > 0
        assert account.rows == account.kept + sum(map(len, account.reasons.values()))
        assert json.dumps(account.to_json()) and all("\n" not in line for line in account.describe())
        for conversation in task:
            ids, mask = BYTE_TOKENIZER.render_conversation(conversation, max_tokens=None)
            assert len(ids) == len(mask) and json.dumps(conversation, ensure_ascii=False).encode()
            assert BYTE_TOKENIZER.render_for_completion(conversation)
        outcomes["partly" if account.reasons else "taken"] += 1
    assert min(outcomes.values()) > 50, outcomes
