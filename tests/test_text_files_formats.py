"""nanochat/text_files.py: compressions and encodings, and the advice that is given, which works as it is printed."""

import gzip
import json
import os
import subprocess

import pytest

from nanochat.common import UserError
from nanochat.text_files import iter_lines, iter_table, quote
from tests.data_helpers import compress_zst, read_texts


def test_iter_lines(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(compress_zst(b"\xef\xbb\xbfone\r\n\n \ntwo\xc2\x85\xe2\x80\xa8three"))
    assert list(iter_lines(tmp_path / "a.jsonl.zst")) == [(1, "one\r\n"), (4, "two\x85\u2028three")]


def test_iter_table(tmp_path):
    (tmp_path / "a.csv").write_text('id;"name of it"\r\n1;"a\nb"\r\n\r\n2;c;;\r\n3\r\n')
    assert list(iter_table(tmp_path / "a.csv")) == [
        (1, ["id", "name of it"]), (3, ["1", "a\nb"]), (5, ["2", "c", "", ""]), (6, ["3"])]
    (tmp_path / "a.csv").write_text("")
    assert list(iter_table(tmp_path / "a.csv")) == []


@pytest.mark.parametrize(("content", "rows"), [
    ("text\nHello, world\n", [["text"], ["Hello, world"]]),
    ("a, b, c\ttext\n1\tx, y\n", [["a, b, c", "text"], ["1", "x, y"]]),
    ("id,text\n1,x\n", [["id", "text"], ["1", "x"]])])
def test_commas_do_not_part_the_fields_of_a_tsv(tmp_path, content, rows):
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(content.encode()))
    assert [row for _, row in iter_table(tmp_path / "a.tsv.gz")] == rows


RUSSIAN = "Река у камня была тиха. " * 40
ENGLISH = "The river near the stone was quiet. " * 40


@pytest.mark.parametrize(("encoding", "text"), [
    ("latin-1", "café " * 30), ("cp1252", "“quoted” café " * 30), ("utf-16", ENGLISH), ("utf-16-le", ENGLISH),
    ("utf-16-be", ENGLISH), ("utf-16-le", RUSSIAN), ("utf-16-be", RUSSIAN), ("utf-32-le", ENGLISH),
    ("utf-32-be", ENGLISH), ("utf-32", ENGLISH)])
@pytest.mark.parametrize("form", ["a.txt", "it's a.md.gz", "a.rst.zst", "a.csv", "a.jsonl", "a.json.gz"])
def test_the_advice_on_an_encoding_works_as_printed(tmp_path, encoding, text, form):
    path = tmp_path / form
    content = {".csv": f"id,text\n1,{text}\n", ".jsonl": json.dumps({"text": text}, ensure_ascii=False) + "\n",
               ".json": json.dumps([{"text": text}], ensure_ascii=False)}.get(path.suffixes[0], text)
    data = content.encode(encoding)
    path.write_bytes({".gz": gzip.compress, ".zst": compress_zst}.get(path.suffix, bytes)(data))
    with pytest.raises(UserError, match="not UTF-8 text") as error:
        read_texts(tmp_path)
    subprocess.run(["sh", "-c", str(error.value).split("with: ")[1]], check=True)
    assert "".join(read_texts(tmp_path)[0]) == text


def test_the_advice_on_damaged_characters_keeps_the_others(tmp_path):
    (tmp_path / "a.txt").write_bytes("тихая река ".encode() * 20 + b"\xd1 " + "у камня".encode())
    with pytest.raises(UserError, match="some of its characters are damaged") as error:
        read_texts(tmp_path)
    subprocess.run(["sh", "-c", str(error.value).split("with: ")[1]], check=True)
    assert read_texts(tmp_path)[0] == ["тихая река " * 20 + " у камня"]


def test_names_for_a_shell(tmp_path):
    name = b"caf\xe9 it's\n\\new"
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "w") as file:
        file.write("found")
    words = quote(os.fsdecode(path))
    assert words.isascii() and "\n" not in words
    assert subprocess.run(["bash", "-c", f"cat {words}"], capture_output=True, text=True).stdout == "found"
