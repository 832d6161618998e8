"""nanochat/text_files.py: which files are read, how each format is, and which sentence for which mistake."""

import csv
import gzip
import io
import json
import os
import random
import signal
import socket
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import text_files
from nanochat.common import UserError
from nanochat.shards import read_manifest
from nanochat.text_files import Account, LeftOut, find_text_files
from tests.data_helpers import compress_zst, make_files, read_texts
from tests.helpers import run_forked

NOBODY = 65534


def test_reads_all_formats(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("\ufeffплоский текст", encoding="utf-8")
    (tmp_path / "b.MD").write_text("# 标题\n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "eins"}\n\n{"text": "zwei", "id": 2}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "drei"}\n'))
    pq.write_table(pa.table({"text": ["vier", None, "f\u00fcnf", "  "]}), tmp_path / "e.parquet")
    (tmp_path / "f.json").write_text('\n [{"text": "sechs"}, {"text": null, "id": 1}\n, {"text": "sieben"}] ')
    (tmp_path / "g.json").write_text('{"text": "acht"}\n{\n"text":\n"neun"}')
    (tmp_path / "h.ndjson").write_text('{"text": "zehn"}')
    (tmp_path / "i.csv").write_text('\ufeffid,text\r\n1,"elf, mit\nKomma"\r\n2,\r\n\r\n3,zwölf\r\n', encoding="utf-8")
    (tmp_path / "j.csv").write_text("text;id\ndreizehn;1\n")
    (tmp_path / "k.TEXT").write_text("vierzehn\r\n")
    (tmp_path / "l.rst.zst").write_bytes(compress_zst("fünfzehn".encode()) + compress_zst(b" sechzehn"))
    (tmp_path / "m.tsv.zst").write_bytes(compress_zst(b"id\ttext\n1\tsiebzehn\n"))
    (tmp_path / "n.json.gz").write_bytes(gzip.compress(b"[]"))
    texts, account = read_texts(tmp_path)
    assert texts == ["# 标题\n", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn",
                     "elf, mit\nKomma", "zwölf", "dreizehn", "vierzehn\n", "fünfzehn sechzehn", "siebzehn",
                     "плоский текст"]
    assert account.documents == {"kept": 0, "without text": 3, "blank": 1}
    assert account.files == {"read": 0, "left out": 0, "skipped": 0}
    assert read_texts(tmp_path / "b.MD")[0] == ["# 标题\n"]


def test_every_other_file_is_named(tmp_path):
    for name in ("page.html", "book.epub", "scan.pdf", "old.txt.bz2", "texts.tar.gz", "rows.parquet.gz", "README",
                 "image.png", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".git").mkdir()
    (tmp_path / "nothing.txt").symlink_to("nowhere.txt")
    os.mkfifo(tmp_path / "pipe.txt")    # must not be waited for
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket.txt"))
    (tmp_path / "null.txt").symlink_to("/dev/null")
    (tmp_path / "good.txt").write_text("good")
    texts, account = read_texts(tmp_path)
    assert texts == ["good"] and account.files["left out"] == 12 and account.files["skipped"] == 2
    reasons = {name: reason for reason, entry in account.reasons.items() for name in entry["names"]}
    for name, part in {"page.html": "pandoc", "book.epub": "pandoc", "scan.pdf": "pdftotext", "old.txt.bz2": "unpack",
                       "texts.tar.gz": "unpack", "rows.parquet.gz": "unpack", "README": "name it .txt",
                       "image.png": "none of the formats .txt", "nothing.txt": "No such file", "pipe.txt": "named pipe",
                       "socket.txt": "a socket", "null.txt": "a device", ".git": "hidden",
                       ".hidden.txt": "hidden"}.items():
        assert part in reasons.pop(name), name
    assert not reasons


def test_links_are_followed_but_no_loops(tmp_path):
    root = tmp_path / "up" / "texts"
    (root / "real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (root / "real" / "a.txt").write_text("a")
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    for name in ("aa", "zz"):    # one before and one after the folder that they lead to
        (root / name).symlink_to("real")
    (root / "real" / "loop").symlink_to("..")
    (root / "above").symlink_to(tmp_path)
    (root / "other").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    (root / "file.txt").symlink_to(tmp_path / "elsewhere" / "b.txt")
    (root / "self").symlink_to("self")
    account = Account()
    assert [file.name for file in find_text_files(root, account)] == ["file.txt", "other/b.txt", "real/a.txt"]
    assert account.files == {"read": 0, "left out": 1, "skipped": 5}    # self is a link to nothing
    assert sorted(name for entry in account.reasons.values() for name in entry["names"]) == \
        ["aa", "above", "other/back", "real/loop", "self", "zz"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become someone else")
def test_what_may_not_be_read_is_named():
    def look():
        account = Account()
        return [file.name for file in find_text_files(folder, account)], account.reasons
    with tempfile.TemporaryDirectory() as folder:    # tmp_path itself is closed to others
        folder = Path(folder)
        folder.chmod(0o755)
        (folder / "sub").mkdir()
        for name in ("a.txt", "b.txt", "sub/c.txt"):
            (folder / name).write_text(name)
        (folder / "b.txt").chmod(0)
        (folder / "sub").chmod(0)
        names, reasons = run_forked(look, NOBODY)
        folder.chmod(0)
        root = run_forked(look, NOBODY)
    assert names == ["a.txt"]
    assert {name: reason for reason, entry in reasons.items() for name in entry["names"]} == {
        "b.txt": "can't be read (no permission); make it readable",
        "sub/": "can't be read (Permission denied); make it readable"}
    assert root[0] == [] and "can't be read" in next(iter(root[1]))


def test_long_text_file_is_cut_whatever_the_block(tmp_path, monkeypatch):
    text = "".join(f"Line {idx} of a long book.\n{'' if idx % 7 else chr(10)}" for idx in range(9_000))
    (tmp_path / "book.txt").write_text(text)
    whole, _ = read_texts(tmp_path / "book.txt")
    assert "".join(whole) == text and len(whole) > 3
    monkeypatch.setattr(text_files, "BLOCK_CHARS", 7_001)
    assert read_texts(tmp_path / "book.txt")[0] == whole


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl",    b'{"text": \n{"text": "x", \n',         r"a\.jsonl:1 is not JSON .*; correct or remove the line"),
    ("a.jsonl",    b'{"text": \n{"body": "x"}\n',         r"a\.jsonl:2 has no field 'text' but body"),
    ("a.jsonl",    b'{"text": \n' * 1000 + b'{"text": ""}', r"a\.jsonl:1 is not JSON"),
    ("a.json",     b'[{"text": "x", "text": "y"}]',       r"a\.json, row 1 is not JSON \(two fields are named 'text'"),
    ("a.jsonl",    b'{"text": "x"}\n[1]\n',               r"a\.jsonl:2 has no field 'text' but list"),
    ("a.jsonl",    b'{"body": "x"}\n',                    r"a\.jsonl:1 has no field 'text' but body; .*--text-column"),
    ("a.jsonl",    b'{"text": 5}\n',                      r"a\.jsonl:1: field 'text' holds int"),
    ("a.jsonl",    b'{"text": "caf\xe9"}\n',              r"a\.jsonl:1 is not UTF-8.* iconv -f CP1252"),
    ("a.jsonl",    b'{"text": "\\ud800"}\n',              r"a\.jsonl:1 is not UTF-8"),
    ("a.json",     b'[{"text": "x"}, {"text": }]',        r"a\.json, row 2 is not JSON"),
    ("a.json",     b'[{"text": "x"}, ',                   r"a\.json, row 2 is not JSON"),
    ("a.json",     b'[{"text": "x"}] [1]',                r"a\.json goes on after its array of 1 rows"),
    ("a.json",     b'{"data": [{"text": "x"}]}',          r"a\.json, row 1 has no field 'text' but data"),
    ("a.json",     b"[" * 100_000,                        r"a\.json, row 1 is not JSON"),
    ("a.jsonl",    b'null\n',                             r"a\.jsonl:1 has no field 'text' but null"),
    ("a.json",     b'"text"',                             r"a\.json, row 1 has no field 'text' but str"),
    ("a.csv",      b"id,body\n1,x\n",                     r"a\.csv has no column 'text'; .*--text-column: id, body"),
    ("a.csv",      b"text,id,text\nx,1,y\n",              r"a\.csv has 2 columns named 'text'"),
    ("a.csv",      b"id,text\n1,Hello, world\n",          r"a\.csv:2 has 3 fields, the first line 2"),
    ("a.csv",      b'id,text\n1,"never closed\n2,x\n',    r"a\.csv:3 is not CSV"),
])
def test_mistakes_name_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path)


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9],       "is not a whole gzip file"),
    ("a.jsonl.gz", b'{"text": "x"}\n',                                  "is not a whole gzip file"),
    ("a.txt.zst",  compress_zst(b"some text " * 1000)[:-9],             "is not a whole zstd file"),
    ("a.csv.zst",  b"text\nplain\n",                                    "is not a whole zstd file"),
    ("a.parquet",  b"PAR1 and then nothing",                            "is not a whole parquet file"),
    ("a.parquet",  b"",                                                 "is not a whole parquet file"),
    ("a.txt",      gzip.compress(b"text", mtime=0),                     "holds gzip data"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(b"text", mtime=0), mtime=0), "holds gzip data"),
    ("a.txt",      bytes(range(256)) * 9,                               "holds binary data"),
])
def test_damaged_files_are_left_out(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LeftOut, match=reason):
        read_texts(tmp_path)


def test_damaged_lines_are_left_out_counted_and_named(tmp_path, capsys):
    """A download that broke off, or two texts under one name, of which json would take the second without a word."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "y", "text": "z"}\n{"text": "w"}\n{"te')
    texts, account = read_texts(tmp_path)
    assert texts == ["x", "w"] and account.documents["not JSON"] == 2
    assert capsys.readouterr().out == (f"warning: {tmp_path}/a.jsonl:2 is not JSON (two fields are named 'text'); it "
                                       "is left out, and so is each other row like it\n")


def test_rows_without_the_field(tmp_path):
    rows = [{"id": 0}, {"text": "x"}, {"id": 1}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts, account = read_texts(tmp_path)
    assert texts == ["x"] and account.documents["without text"] == 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [{"body": "y"}] * 1000 + rows)))
    with pytest.raises(UserError, match="a.jsonl:1 has no field 'text' but body"):
        read_texts(tmp_path)


TEXTS = ["one", None, "two", "one"]


@pytest.mark.parametrize("column", [
    pa.array(TEXTS), pa.array(TEXTS, pa.large_string()), pa.array(TEXTS, pa.string_view()),
    pa.array(TEXTS).dictionary_encode(), pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    pa.ExtensionArray.from_storage(pa.json_(pa.string()), pa.array(TEXTS))], ids=lambda column: str(column.type))
def test_parquet_types_of_text(tmp_path, column):
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    texts, account = read_texts(tmp_path)
    assert texts == ["one", "two", "one"] and account.documents["without text"] == 1


def test_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"body": ["x"], "id": [1], "raw": pa.array([b"\xe9"], pa.binary()), "none": pa.nulls(1),
                      "a.b": ["y"], "list": [["z"]]})
    pq.write_table(table, path)
    with pytest.raises(UserError, match=r"no column 'text'; .*--text-column: body, id, raw"):
        read_texts(path)
    for name, kind in (("id", "int64"), ("raw", "binary"), ("list", "list<")):
        with pytest.raises(UserError, match=f"column '{name}' of .* holds {kind}"):
            read_texts(path, name)
    assert read_texts(path, "body")[0] == ["x"] and read_texts(path, "a.b")[0] == ["y"]
    assert read_texts(path, "none")[1].documents["without text"] == 1
    invalid = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xe9"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": invalid}), path)
    with pytest.raises(UserError, match="not UTF-8"):
        read_texts(path)
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array([1])], ["text", "text"]), path)
    with pytest.raises(UserError, match="a.parquet has 2 columns named 'text'"):
        read_texts(path)
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] + [pa.array([1])] * 2, ["text", "id", "id"]), path)
    assert read_texts(path)[0] == ["x"]


def test_no_such_folder(tmp_path):
    (tmp_path / "self").symlink_to("self")
    for name, reason in (("nowhere", "No such file"), ("self", "levels of symbolic links")):
        with pytest.raises(UserError, match=rf"{name} can't be read \(.*{reason}"):
            find_text_files(tmp_path / name, Account())


# ---------------------------------------------------------------------------------------------------------------------
# Mutated files

NUM_FILES = 500
FUZZ_TEXTS = [*(f'The river № {idx} was "quiet", señor. 标题\n' * (1 + idx % 5) for idx in range(12)), None, " "]
FUZZ_ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "shift_jis", "gb18030", "koi8-r",
                  "utf-7", "utf-8-sig")
SUFFIXES = {"text": (".txt", ".md", ".rst", ".text", ".html"), "json": (".json",), "lines": (".jsonl", ".ndjson"),
            "csv": (".csv",), "parquet": (".parquet",)}


def make_contents(rng):
    """The same rows in every format."""
    rows = [{"id": idx, "text": text} for idx, text in enumerate(FUZZ_TEXTS)]
    table, parquet = io.StringIO(newline=""), pa.BufferOutputStream()
    csv.writer(table).writerows([["id", "text"], *([row["id"], row["text"]] for row in rows)])
    column = rng.choice([pa.array(FUZZ_TEXTS), pa.array(FUZZ_TEXTS, pa.string_view()),
                         pa.array(FUZZ_TEXTS).dictionary_encode()])
    pq.write_table(pa.table({"text": column}), parquet, rng.choice([5, 50]),
                   compression=rng.choice(["none", "snappy", "gzip", "zstd"]))
    return {"text": "\n".join(text or "" for text in FUZZ_TEXTS).encode(), "csv": table.getvalue().encode(),
            "json": json.dumps(rows, ensure_ascii=False).encode(), "parquet": parquet.getvalue().to_pybytes(),
            "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()}


def mutate(rng, data):
    """Cut, flip, overwrite, drop, insert; or leave as it is."""
    start, stop = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 3, 30]) if data else 0):
        flipped[rng.randrange(len(data))] ^= rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255])
    return rng.choice([data, data[:start], bytes(flipped), data[:start] + data[stop:],
                       data[:start] + rng.randbytes(rng.choice([1, 4, 200])) + data[start:]])


def make_mutated(rng, idx):
    """A file's name and content: other encodings, mixed formats, damage before and after the compression."""
    contents = make_contents(rng)
    kind = rng.choice(list(contents))
    data = contents[kind]
    if kind != "parquet" and rng.random() < 0.3:
        data = data.decode().encode(rng.choice(FUZZ_ENCODINGS), "replace")
    if rng.random() < 0.5:
        data = mutate(rng, data)
    if rng.random() < 0.15:
        data += contents[rng.choice(list(contents))]
    packed = rng.choice(["", "", ".gz", ".zst"])
    data = {".gz": gzip.compress, ".zst": compress_zst}.get(packed, bytes)(data)
    if rng.random() < 0.5:
        data = mutate(rng, data)
    said = kind if rng.random() < 0.75 else rng.choice(list(contents))
    return f"{idx:03d}{rng.choice(SUFFIXES[said])}{packed if rng.random() < 0.9 else '.gz'}", data


@pytest.fixture
def alarm():
    """Restarts a clock of 10 s; when it runs out, the test fails."""
    def fail(*args):
        raise TimeoutError("a file took 10 s")
    before = signal.signal(signal.SIGALRM, fail)
    yield lambda: signal.alarm(10)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_mutated_files(tmp_path, monkeypatch, alarm):
    """Each is read, left out or refused in one sentence; without those refused, the account adds up."""
    folder, outcomes, expected = tmp_path / "mutated", Counter(), Account()
    folder.mkdir()
    for idx in range(NUM_FILES):
        name, data = make_mutated(random.Random(idx), idx)
        (folder / name).write_bytes(data)
        alarm()
        one = Account()
        try:
            num_chars = [len(text) for text in read_texts(folder / name, account=one)[0]]
            outcomes["read" if not one.files["left out"] else "left out"] += 1
            expected.count("kept", sum(num_chars), len(num_chars))
            for outcome, number in one.documents.items():
                expected.count(outcome, one.characters[outcome], number)
        except LeftOut as reason:
            outcomes["left out"] += 1
            assert str(reason).isprintable() and len(str(reason)) < 500
        except UserError as error:
            outcomes["refused"] += 1
            assert str(error).isprintable() and name in str(error) and len(str(error)) < 1500
            (folder / name).unlink()
    alarm()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    manifest = read_manifest(Path(make_files(folder)["folder"]))
    account, shards = manifest.account, [*manifest.train, manifest.val]
    assert min(outcomes.values()) > NUM_FILES / 10 and outcomes.total() == NUM_FILES
    assert account.files == {"read": outcomes["read"], "left out": outcomes["left out"], "skipped": 0}
    assert sum(account.bytes.values()) == sum(path.stat().st_size for path in folder.iterdir())
    assert sum(entry["files"] for entry in account.reasons.values()) == outcomes["left out"]
    assert account.documents["kept"] == sum(shard.rows for shard in shards)
    assert account.characters["kept"] == sum(shard.chars for shard in shards)
    for counts, all_counts in ((account.documents, expected.documents), (account.characters, expected.characters)):
        repeats = counts.pop("exact repeats of others")
        assert repeats > 0 and counts | {"kept": counts["kept"] + repeats} == all_counts
