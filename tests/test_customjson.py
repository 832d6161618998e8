"""tasks/customjson.py: a person's own conversations, and the line that is wrong."""

import json

import pytest

from nanochat.common import UserError
from tasks.customjson import CustomJSON
from tests.data_helpers import write_lines

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
    assert list(CustomJSON(path, stop=1)) == [{"messages": TALK}]


@pytest.mark.parametrize(("row", "message"), [
    ([{"role": "robot", "content": "x"}], "has role 'robot'"),
    ([{"role": "user", "content": ""}, TALK[1]], r"message 0 \(user\) is empty"),
    ([TALK[0], {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "of type 'image'"),
    ([{"role": "user"}], "message 0 is not"),
    ([{"role": "user", "content": 5}], "not text"),
    ({"text": "x"}, "a conversation is"), ({"messages": []}, "at least one"), ([], "at least one"), (5, "at least one"),
])
def test_custom_json_names_line_and_reason(tmp_path, row, message):
    path = write_lines(tmp_path / "mine.jsonl", [TALK, row, TALK])
    with pytest.raises(UserError, match=message) as error:
        CustomJSON(path)
    assert str(error.value).startswith(f"{path}:2: ")


def test_custom_json_that_is_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=f"{path} can't be read"):
            CustomJSON(path)
