"""A person's own files as documents: which files of a folder are read, and how each format is.

.txt .text .md .rst         a document, cut where it is long
.json .jsonl .ndjson .csv   rows with a field of text; these and the ones above also as .gz or .zst
.parquet                    rows with a column of text

Nothing is left out without a word. What a person can mend in a file (its encoding, its syntax, its fields) raises
UserError with what to do. A file that is no text, can't be opened or is damaged is left out: the account names it.
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
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.account import Account, escape, printable
from nanochat.common import UserError, get_first_line
from nanochat.corpus import cut_text

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}    # suffix -> name, which is the program's too
# The first bytes of what a file may hold against its name
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet", b"PK\x03\x04": "zip", b"%PDF-": "PDF",
         b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}
BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"))
MAX_NUL_FRAC     = 0.05     # more of a text's characters: UTF-16 or UTF-32, whose spaces alone have one each
MAX_CONTROL_FRAC = 0.05     # more of the bytes that aren't UTF-8: no text in any encoding (assumption, not studied)
BLOCK_CHARS      = 2**24    # of a text file in memory at once
MAX_NAMES_CHARS  = 300      # of a table's columns in an error
MAX_ROWS_WITHOUT = 1000     # rows without the field of text from the first on: then its name is wrong


class LeftOut(Exception):
    """A file that can't be read; the message is the reason, and what to do."""


# How each format is read


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


def read_text(path: Path, text_column: str) -> Iterator[str]:
    """A text file in pieces of at most MAX_DOC_CHARS."""
    with open_text(path) as file:
        rest = ""
        while block := file.read(BLOCK_CHARS):
            *pieces, rest = cut_text(rest + require_text(path, printable(path), block))
            yield from pieces
        yield rest


def read_lines(path: Path, text_column: str) -> Iterator[str | None]:
    """The texts of JSON lines."""
    def parse() -> Iterator[tuple[str, object]]:
        name = printable(path)
        for number, line in number_lines(path):
            where = f"{name}:{number}"
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError:
                raise explain_bytes(path, where, line) from None
            try:
                yield where, json.loads(text)
            except (ValueError, RecursionError) as error:
                require_text(path, where, text)
                raise UserError(f"{where} is not JSON ({error}); correct or remove the line") from None
    return get_texts(parse(), text_column)


def number_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, plain, .gz or .zst, with their numbers; blank ones are left out."""
    with open_bytes(path) as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def iter_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """As number_lines, of a file that must be read: UserError where it can't be."""
    try:
        with reading(path):
            yield from number_lines(path)
    except LeftOut as reason:
        raise UserError(f"{printable(path)} {reason}") from None


def read_json(path: Path, text_column: str) -> Iterator[str | None]:
    """The texts of a JSON file: of an array's elements, or of objects one after the other. Its content is in memory."""
    with open_text(path) as file:
        content = require_text(path, printable(path), file.read())
    yield from get_texts(iter_json_values(path, content), text_column)


def iter_json_values(path: Path, content: str) -> Iterator[tuple[str, object]]:
    """The values of a JSON file, each with its place for an error."""
    name, decoder, blanks, number = printable(path), json.JSONDecoder(), re.compile(r"[ \t\r\n]*"), 0
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


def get_texts(rows: Iterable[tuple[str, object]], text_column: str) -> Iterator[str | None]:
    """The texts of JSON objects, None where one has none; `rows` come with their places for an error."""
    num_rows, has_field, mistake = 0, False, None
    for num_rows, (where, row) in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{where} has no field {text_column!r} but {type(row).__name__}; make each row an object "
                            "with such a field")
        has_field |= text_column in row
        mistake = mistake or f"{where} has no field {text_column!r} but {list_names(row)}; choose another with " \
                             "--text-column"
        if num_rows == MAX_ROWS_WITHOUT and not has_field:
            break
        text = row.get(text_column)
        if not isinstance(text, str | None):
            raise UserError(f"{where}: field {text_column!r} holds {type(text).__name__}, not text; choose another "
                            "with --text-column")
        try:
            (text or "").encode()    # raises for a lone surrogate, which JSON allows and UTF-8 doesn't
        except UnicodeEncodeError as error:
            raise UserError(f"{where} is not UTF-8 text ({error.reason}); correct or remove the row") from None
        yield text
    if num_rows and not has_field:
        raise UserError(mistake)


def read_csv(path: Path, text_column: str) -> Iterator[str | None]:
    """The texts of a table whose first line names its columns, which are separated by commas, semicolons or tabs."""
    csv.field_size_limit(2**31 - 1)
    with open_text(path, newline="") as file:
        head = require_text(path, printable(path), file.readline())
        delimiter = next((mark for mark in ",;\t" if text_column in split_row(head, mark)), ",")
        rows = csv.reader(itertools.chain([head], file), strict=True, delimiter=delimiter)
        try:
            names = next(rows, [])
            column = find_column(path, names, text_column) if head.strip() else 0
            for row in filter(None, rows):
                if any(row[len(names):]):
                    raise UserError(f"{printable(path)}:{rows.line_num} has {len(row)} fields, the first line "
                                    f"{len(names)}; put texts with a {delimiter!r} in quotes")
                yield row[column] or None if column < len(row) else None
        except csv.Error as error:
            raise UserError(f"{printable(path)}:{rows.line_num} is not CSV ({error}); correct it") from None


def split_row(line: str, delimiter: str) -> list[str]:
    """The fields of one line of CSV."""
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return []


def read_parquet(path: Path, text_column: str) -> Iterator[str | None]:
    """The texts of a .parquet file, None for rows without one."""
    with open(path, "rb") as source, pq.ParquetFile(source) as file:
        column = find_column(path, file.schema_arrow.names, text_column)
        kind = file.schema_arrow.field(column).type
        if not holds_text(kind):
            raise UserError(f"column {text_column!r} of {printable(path)} holds {kind}, not text; choose another with "
                            "--text-column")
        for batch in file.iter_batches(batch_size=1024, columns=[text_column]):
            yield from batch.column(0).to_pylist()


def find_column(path: Path, names: list[str], text_column: str) -> int:
    """The index of the column; UserError where the name isn't there once."""
    if names.count(text_column) == 1:
        return names.index(text_column)
    if text_column in names:
        raise UserError(f"{printable(path)} has {names.count(text_column)} columns named {text_column!r}; rename all "
                        "but one")
    raise UserError(f"{printable(path)} has no column {text_column!r}; choose one with --text-column: "
                    f"{list_names(names)}")


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


# Which files are read

READERS = {".txt": read_text, ".text": read_text, ".md": read_text, ".rst": read_text, ".json": read_json,
           ".jsonl": read_lines, ".ndjson": read_lines, ".csv": read_csv, ".parquet": read_parquet}
# Known by name: why such a file isn't read, and what to do
OTHER_FORMATS = {
    (".html", ".htm", ".xhtml", ".docx", ".odt", ".epub", ".tex"):
        "is markup, not plain text; convert it with: pandoc -t plain FILE -o FILE.txt",
    (".pdf",): "is PDF, not plain text; convert it with: pdftotext FILE",
    (".zip", ".tar", ".tgz", ".gz", ".zst", ".bz2", ".xz", ".7z", ".rar"):
        "is packed in a way that isn't read; unpack it"}
UNKNOWN_FORMAT = f"has none of the formats {' '.join(READERS)}; if it holds plain text, name it .txt"
SPECIAL_FILES = ((stat.S_ISFIFO, "is a named pipe"), (stat.S_ISSOCK, "is a socket"), (stat.S_ISCHR, "is a device"),
                 (stat.S_ISBLK, "is a device"))


@dataclass(frozen=True)
class TextFile:
    """A file to read; `name` is its printable path below the folder, `format` a key of READERS."""
    path:        Path
    name:        str
    format:      str
    num_bytes:   int
    modified_ns: int


def find_text_files(root: Path, account: Account) -> list[TextFile]:
    """The files to read below `root`, or that one file, sorted by path; all others are named in the account."""
    if not root.exists():
        raise UserError(f"--path {printable(root)} isn't there; give the folder that holds your texts")
    files = []
    for path in sorted(list_files(root, account) if root.is_dir() else [root], key=Path.as_posix):
        name, num_bytes = printable(path.relative_to(root if path != root else root.parent)), 0
        try:
            found = path.stat()
            num_bytes = found.st_size
            files.append(TextFile(path, name, get_format(path, found.st_mode), num_bytes, found.st_mtime_ns))
        except LeftOut as reason:
            account.leave_out(name, str(reason), num_bytes)
        except OSError as error:
            account.leave_out(name, describe_error(error))
    return files


def list_files(root: Path, account: Account) -> Iterator[Path]:
    """All files below `root`, without hidden ones. Links to folders are followed, each folder once: the real ones come
    first, so that a link to one of them adds nothing."""
    folders, links, seen, parents = [root], [], set(), root.resolve().parents
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        name = printable(folder.relative_to(root))
        try:
            found = folder.stat()
            if (found.st_dev, found.st_ino) in seen or folder.resolve() in parents:
                account.leave_out(name, "links to a folder that is read already, or to one above", outcome="skipped")
                continue
            seen.add((found.st_dev, found.st_ino))
            names = sorted(os.listdir(folder))
        except OSError as error:
            account.leave_out(f"{name}/", describe_error(error))
            continue
        for path in (folder / name for name in names):
            if path.name.startswith("."):
                account.leave_out(printable(path.relative_to(root)), "is hidden", outcome="skipped")
            elif os.path.isdir(path):    # unlike path.is_dir(), no error where it can't be looked into
                (links if path.is_symlink() else folders).append(path)
            else:
                yield path


def get_format(path: Path, mode: int) -> str:
    """The key of READERS for a file. Raises LeftOut before a pipe is opened, which would be waited for."""
    if kind := next((kind for is_kind, kind in SPECIAL_FILES if is_kind(mode)), None):
        raise LeftOut(f"{kind}; copy what comes from it to a file")
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]] or [""]
    is_packed = suffixes[-1] in COMPRESSIONS
    suffix = suffixes[0] if is_packed and suffixes[0] != ".parquet" else suffixes[-1]
    if suffix not in READERS:
        suffix = suffixes[-1] if is_packed else suffix
        raise LeftOut(next((why for others, why in OTHER_FORMATS.items() if suffix in others), UNKNOWN_FORMAT))
    if not os.access(path, os.R_OK):
        raise LeftOut("can't be read (no permission); make it readable")
    return suffix


def read_documents(file: TextFile, text_column: str, account: Account) -> Iterator[str]:
    """The documents of one file: pieces of a text, or of rows. Those left out are counted.

    Raises LeftOut where the file is damaged, maybe after some documents, and UserError where a person can mend it.
    """
    with reading(file.path):
        for text in READERS[file.format](file.path, text_column):
            if text is None:
                account.count("without text")
                continue
            for piece in cut_text(text):
                if piece.strip():
                    yield piece
                else:
                    account.count("blank", len(piece))
