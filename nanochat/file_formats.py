"""Files of a person, whatever their format, compression and encoding: their text, lines, values and rows.

A file that is no text, can't be opened or is damaged raises LeftOut: without it the others can be read. What a person
can mend in a file, its encoding and its syntax, raises UserError with what to do.
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

import pyarrow as pa

from nanochat.account import escape, printable
from nanochat.common import UserError, get_first_line

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}    # suffix -> name, which is the program's too
# The first bytes of what a file may hold against its name
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet", b"PK\x03\x04": "zip", b"%PDF-": "PDF",
         b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}
BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"))
MAX_NUL_FRAC     = 0.05     # more of a text's characters: UTF-16 or UTF-32, whose spaces alone have one each
MAX_CONTROL_FRAC = 0.05     # more of the bytes that aren't UTF-8: no text in any encoding (assumption, not studied)
MAX_NAMES_CHARS  = 300      # of a table's columns in an error


class LeftOut(Exception):
    """A file that can't be read; the message is the reason, and what to do."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of the system and of the libraries into LeftOut, and those of encodings into UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise explain_bytes(path, printable(path), error.object) from None
    except (EOFError, zlib.error, pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):    # the system's; libraries give none
            raise LeftOut(describe_error(error)) from None
        raise LeftOut(describe_damage(path, error)) from None


def describe_error(error: OSError) -> str:
    return f"can't be read ({error.strerror}); make it readable"


def describe_damage(path: Path, error: Exception) -> str:
    suffix, reason = path.suffix.lower(), escape(get_first_line(error))
    return f"is not a whole {COMPRESSIONS.get(suffix, suffix[1:])} file ({reason}); make it again"


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file's content, decompressed."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))    # arrow itself opens no path that isn't UTF-8
        if path.suffix.lower() == ".gz":
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        elif path.suffix.lower() == ".zst":
            file = stack.enter_context(io.BufferedReader(pa.CompressedInputStream(file, "zstd")))
        head = file.peek(8)
        if kind := next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None):
            raise LeftOut(f"holds {kind} data, which its name doesn't say; rename or convert it")
        yield file


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    with open_bytes(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
        yield text


def require_text(path: Path, where: str, text: str) -> str:
    """`text`; UserError for UTF-16 or UTF-32, whose bytes may pass as UTF-8, but hold many NULs."""
    if text.count("\0") > MAX_NUL_FRAC * len(text):
        raise explain_bytes(path, where, text.encode())
    return text


# Lines, values and rows


def iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that aren't blank, with their numbers. A line ends with a newline alone."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError:
                raise explain_bytes(path, f"{printable(path)}:{number}", line) from None
            if text.strip():
                yield number, text


def make_object(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError where two fields have one name, of which json would take the last without a word."""
    fields, names = dict(pairs), [name for name, _ in pairs]
    if len(fields) < len(names):
        repeated = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"two fields are named {escape(repeated)[:MAX_NAMES_CHARS]!r}")
    return fields


def parse_json(text: str) -> object:
    """The value of one row; ValueError for anything else."""
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def iter_json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """The values of JSON lines, each with its place for an error. A line that is not JSON comes as a ValueError."""
    name = printable(path)
    for number, line in iter_lines(path):
        where = f"{name}:{number}"
        try:
            yield where, parse_json(line)
        except ValueError as error:
            require_text(path, where, line)
            yield where, ValueError(f"{where} is not JSON ({error})")


def iter_json_values(path: Path) -> Iterator[tuple[str, object]]:
    """The values of a JSON file, each with its place for an error: of an array, or one after the other. The file's
    content is in memory."""
    with open_text(path) as file:
        content = require_text(path, printable(path), file.read())
    name, blanks, number = printable(path), re.compile(r"[ \t\r\n]*"), 0
    decoder = json.JSONDecoder(object_pairs_hook=make_object)
    start = blanks.match(content).end()
    is_array = content.startswith("[", start)
    start = blanks.match(content, start + is_array).end()
    while not content.startswith("]", start) if is_array else start < len(content):
        where = f"{name}, row {number + 1}"
        try:
            value, start = decoder.raw_decode(content, start)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}); correct it") from None
        yield where, value
        number += 1
        start = blanks.match(content, start).end()
        if is_array and content.startswith(",", start):
            start = blanks.match(content, start + 1).end()
    if is_array and content[start + 1:].strip():
        raise UserError(f"{name} goes on after its array of {number:,} rows; correct it")


def iter_table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a .csv or .tsv with the numbers of their last lines, the names of its columns first. Fields are
    separated by commas, semicolons or tabs, whichever gives the first line most fields; tabs come first in a .tsv."""
    csv.field_size_limit(2**31 - 1)
    is_tsv = ".tsv" in map(str.lower, path.suffixes[-2:])
    with open_text(path, newline="") as file:
        head = require_text(path, printable(path), file.readline())
        marks = "\t" if is_tsv and "\t" in head else "\t,;" if is_tsv else ",;\t"
        delimiter = max(marks, key=lambda mark: len(next(csv.reader([head], delimiter=mark), [])))
        rows = csv.reader(itertools.chain([head], file), strict=True, delimiter=delimiter)
        num_columns = None
        try:
            for row in filter(None, rows):
                num_columns = num_columns or len(row)
                if any(row[num_columns:]):
                    raise UserError(f"{printable(path)}:{rows.line_num} has {len(row)} fields, the first line "
                                    f"{num_columns}; put texts with a {delimiter!r} in quotes")
                yield rows.line_num, row
        except csv.Error as error:
            raise UserError(f"{printable(path)}:{rows.line_num} is not CSV ({error}); correct it") from None


def list_names(names: Iterable[str]) -> str:
    """Names of fields, which may be anything, for an error."""
    text = ", ".join(names)
    return escape(text[:MAX_NAMES_CHARS]) + (" ..." if len(text) > MAX_NAMES_CHARS else "")


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text; one of nulls alone does."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    return any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view,
                                             pa.types.is_null))


# Other encodings


def explain_bytes(path: Path, where: str, part: bytes) -> UserError | LeftOut:
    """The error for a file that isn't UTF-8 text: which encoding it seems to have, and the command that converts it.

    part: bytes of the file, decompressed, that show it
    """
    if path.suffix.lower() == ".parquet":
        return UserError(f"{where} is not UTF-8 text, as parquet's texts must be; make it again")
    try:
        with reading(path), open_bytes(path) as file:
            head = file.read(2**16)
    except LeftOut as reason:
        return reason
    if (encoding := guess_encoding(head, part)) is None:
        return LeftOut("holds binary data, not text; remove it, or convert it")
    command = f"iconv -f {encoding} -t UTF-8"
    seems = f"it seems to be {encoding}, convert it with"
    if not encoding.startswith("UTF"):    # any bytes pass for these
        seems = f"it may be {encoding} (else give the encoding's name after -f), convert it with"
    if encoding == "UTF-8":
        command, seems = f"{command} -c", "some of its characters are damaged, drop them with"
    name, new, program = quote(path), quote(f"{path}.utf8"), COMPRESSIONS.get(path.suffix.lower())
    if program:    # the last program's exit code counts, so that nothing is deleted where iconv fails
        new = quote(path.with_name(f"{path.stem.removesuffix(path.suffixes[-2])}.utf8{path.suffixes[-2]}"))
        return UserError(f"{where} is not UTF-8 text; {seems}: {program} -dc {name} | {command} > {new} && rm {name}")
    return UserError(f"{where} is not UTF-8 text; {seems}: {command} {name} > {new} && mv {new} {name}")


def guess_encoding(head: bytes, part: bytes) -> str | None:
    """The encoding, by iconv's name, of a file that begins with `head` and has `part`, which isn't UTF-8; "UTF-8" where
    only some characters are damaged, None for binary data."""
    if name := next((name for mark, name in BOMS if head.startswith(mark)), None):
        return name
    # NULs stand where the high bytes of ASCII's characters are
    nuls = [4 * head[idx::4].count(0) / max(1, len(head)) for idx in range(4)]
    if min(nuls[2:]) > 0.8 or min(nuls[:2]) > 0.8:
        return "UTF-32LE" if nuls[3] > nuls[0] else "UTF-32BE"
    if sum(nuls) > 4 * MAX_NUL_FRAC:
        low, high = nuls[0] + nuls[2], nuls[1] + nuls[3]
        return None if min(low, high) > 0.2 * max(low, high) else "UTF-16LE" if high > low else "UTF-16BE"
    num_controls = sum(part.count(byte) for byte in range(32) if byte not in b"\t\n\v\f\r\x1b")
    if num_controls > MAX_CONTROL_FRAC * len(part):
        return None
    text = (head + part).decode("utf-8", "replace")
    num_bad = text.count("\N{REPLACEMENT CHARACTER}")
    if sum(char > "\x7f" for char in text) > 2 * num_bad:    # most are whole
        return "UTF-8"
    has_all = not any(part.count(byte) for byte in b"\x81\x8d\x8f\x90\x9d")    # those that CP1252 lacks
    return "CP1252" if has_all else "ISO-8859-1"


def quote(path: str | os.PathLike) -> str:
    """A path as a word for a shell; one that isn't printable as bash, zsh and ksh spell it."""
    if (text := printable(path)) == os.fspath(path):
        return shlex.quote(text)
    escaped = "".join(chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}"
                      for byte in os.fsencode(path))
    return f"$'{escaped}'"
