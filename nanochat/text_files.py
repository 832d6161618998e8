"""A person's own files as documents: which files of a folder are read, and how each format is.

.txt .text .md .rst         a document, cut where it is long
.json .jsonl .ndjson        rows with a field of text
.csv .tsv                   rows with a column of text; these and the ones above also as .gz or .zst
.parquet                    rows with a column of text

A file that is no text, can't be opened or is damaged raises LeftOut: without it the others can be read. What a person
can mend in a file, its encoding and its syntax, raises UserError with what to do. Nothing is left out without a word:
the account names every file and counts every row that isn't used.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, escape, get_first_line, print0, printable
from nanochat.corpus import cut_text

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}    # suffix -> name, which is the program's too
# The first bytes of what a file may hold against its name
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PAR1": "parquet", b"PK\x03\x04": "zip", b"%PDF-": "PDF",
         b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG"}
BOMS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"))
MAX_NUL_FRAC     = 0.05     # more of a text's characters: UTF-16 or UTF-32, whose spaces alone have one each
MAX_CONTROL_FRAC = 0.05     # more of the bytes that aren't UTF-8: no text in any encoding (assumption, not studied)
MAX_NAMES_CHARS  = 300      # of a table's columns in an error
BLOCK_CHARS      = 2**24    # of a text file in memory at once
MAX_ROWS_WITHOUT = 1000     # rows without the field of text from the first on: then its name is wrong
UNEXPECTED_FRAC  = 0.05     # of the files, bytes, documents or characters: more left out is a warning of its own
MAX_NAMES        = 1000     # of files kept for each reason in the account; all are counted
MAX_PRINTED_NAMES = 20      # in a line


# What is left out


@dataclass
class Account:
    """What was read, what was left out and why: it is printed, and kept in the manifest.

    Every file is read, left out or skipped; every document of the files read is kept or left out.

    A document without text counts as one, and a long text as several. The characters of files that were left out are
    unknown; their bytes stand for them.
    """
    files:      dict[str, int] = field(default_factory=lambda: {"read": 0, "left out": 0, "skipped": 0})
    bytes:      dict[str, int] = field(default_factory=lambda: {"read": 0, "left out": 0})
    documents:  dict[str, int] = field(default_factory=lambda: {"kept": 0})    # and for each reason those left out
    characters: dict[str, int] = field(default_factory=lambda: {"kept": 0})
    formats:    dict[str, int] = field(default_factory=dict)                   # files read, by the end of their names
    reasons:    dict[str, dict] = field(default_factory=dict)    # {reason: {"outcome", "files": number, "names"}}

    def add_file(self, suffix: str, num_bytes: int) -> None:
        """Count a file that was read to its end."""
        self.files["read"] += 1
        self.bytes["read"] += num_bytes
        self.formats[suffix] = self.formats.get(suffix, 0) + 1

    def leave_out(self, name: str, reason: str, num_bytes: int = 0, outcome: str = "left out") -> None:
        """Count a file that was left out, or a folder that can't be looked into.

        outcome: "skipped" where a person expects it, as for hidden files; that never warns
        """
        self.files[outcome] += 1
        if outcome == "left out":
            self.bytes[outcome] += num_bytes
        entry = self.reasons.setdefault(reason, {"outcome": outcome, "files": 0, "names": []})
        entry["files"] += 1
        entry["names"] += [name] if len(entry["names"]) < MAX_NAMES else []

    def count(self, outcome: str, num_chars: int = 0, num_docs: int = 1) -> None:
        """Count documents of a file that is read: "kept", or why they were left out."""
        self.documents[outcome] = self.documents.get(outcome, 0) + num_docs
        self.characters[outcome] = self.characters.get(outcome, 0) + num_chars

    def describe(self) -> list[str]:
        """Lines for a person; the warnings come last."""
        formats = ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(self.formats.items()))
        num_files = self.files["read"] + self.files["left out"]
        lines = [f"read {self.files['read']:,} of {num_files:,} files ({formats or 'none'})", *self.describe_files()]
        why = [f"{number:,} {reason}" for reason, number in self.documents.items() if reason != "kept" and number]
        num_docs, kept = sum(self.documents.values()), self.documents["kept"]
        lines.append(f"left out {num_docs - kept:,} of {num_docs:,} documents" + (f": {', '.join(why)}" if why else ""))
        lines.append(f"kept {kept:,} documents of {self.characters['kept']:,} characters")
        return lines + self.get_warnings()

    def describe_files(self) -> list[str]:
        """A line for each reason, with the files' names."""
        lines = []
        for reason, entry in self.reasons.items():
            names = entry["names"][:MAX_PRINTED_NAMES]
            more = f", and {entry['files'] - len(names):,} more" if entry["files"] > len(names) else ""
            lines.append(f"{entry['outcome']} {', '.join(names)}{more}: {reason}")
        return lines

    def get_warnings(self) -> list[str]:
        """A sentence for each share left out that a person would not expect."""
        warnings = []
        for unit, counts in (("files", self.files), ("bytes", self.bytes), ("documents", self.documents),
                             ("characters", self.characters)):
            counts = {outcome: number for outcome, number in counts.items() if outcome != "skipped"}
            total = sum(counts.values())
            left_out = total - counts.get("read", 0) - counts.get("kept", 0)
            if left_out > UNEXPECTED_FRAC * total:
                warnings.append(f"WARNING: {100 * left_out / total:.3g}% of the {unit} were left out "
                                f"({left_out:,} of {total:,})")
        return warnings


# A file's content


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


# The documents of each format


def read_text(path: Path, text_column: str) -> Iterator[str]:
    """A text file in pieces of at most MAX_DOC_CHARS."""
    with open_text(path) as file:
        rest = ""
        while block := file.read(BLOCK_CHARS):
            *pieces, rest = cut_text(rest + require_text(path, printable(path), block))
            yield from pieces
        yield rest


def read_lines(path: Path, text_column: str) -> Iterator[str | ValueError | None]:
    """The texts of JSON lines."""
    return get_texts(iter_json_lines(path), text_column)


def read_json(path: Path, text_column: str) -> Iterator[str | None]:
    """The texts of a .json file."""
    return get_texts(iter_json_values(path), text_column)


def get_texts(rows: Iterable[tuple[str, object]], text_column: str) -> Iterator[str | ValueError | None]:
    """The texts of JSON objects, None where one has none; `rows` come with their places for an error. A row that is not
    JSON stays the ValueError that it is."""
    num_rows, has_field, mistake, broken = 0, False, None, None
    for num_rows, (where, row) in enumerate(rows, start=1):
        if isinstance(row, ValueError):
            broken = broken or row
            if num_rows == MAX_ROWS_WITHOUT and not has_field:
                break
            yield row
            continue
        if not isinstance(row, dict):
            kind = "null" if row is None else type(row).__name__
            raise UserError(f"{where} has no field {text_column!r} but {kind}; make each row an object with such a "
                            "field")
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
        raise UserError(mistake or f"{broken}; correct or remove the line")


def read_csv(path: Path, text_column: str) -> Iterator[str | None]:
    """The texts of a table, None for rows without one."""
    rows = iter_table(path)
    _, names = next(rows, (0, []))
    column = find_column(path, names, text_column) if names else 0
    for _, row in rows:
        yield row[column] or None if column < len(row) else None


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


# Which files are read

READERS = {".txt": read_text, ".text": read_text, ".md": read_text, ".rst": read_text, ".json": read_json,
           ".jsonl": read_lines, ".ndjson": read_lines, ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
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


def find_text_files(root: Path, account: Account, own_folder: Path | None = None) -> list[TextFile]:
    """The files to read below `root`, or that one file, sorted by path; all others are named in the account.

    own_folder: holds what nanochat makes, and is skipped
    """
    try:
        root.stat()
    except OSError as error:
        raise UserError(f"--path {printable(root)} can't be read ({error.strerror}); give the folder that holds your "
                        "texts") from None
    files = []
    for path in sorted(list_files(root, account, own_folder) if root.is_dir() else [root], key=Path.as_posix):
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


def list_files(root: Path, account: Account, own_folder: Path | None) -> Iterator[Path]:
    """All files below `root`, without hidden ones. Links to folders are followed, each folder once: the real ones come
    first, so that a link to one of them adds nothing."""
    folders, links, seen, parents = [root], [], set(), root.resolve().parents
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        name = printable(folder.relative_to(root))
        try:
            found, target = folder.stat(), folder.resolve()
            if target == own_folder and folder != root:
                account.leave_out(name, "holds what nanochat has made", outcome="skipped")
                continue
            if (found.st_dev, found.st_ino) in seen or target in parents:
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
            if isinstance(text, ValueError):
                if "not JSON" not in account.documents:
                    print0(f"warning: {text}; it is left out, and so is each other row like it")
                account.count("not JSON")
            elif text is None:
                account.count("without text")
            else:
                for piece in cut_text(text):
                    if piece.strip():
                        yield piece
                    else:
                        account.count("blank", len(piece))


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
