"""A person's own files as documents: which files of a folder are read, and how each format is.

.txt .text .md .rst         a document, cut where it is long
.json .jsonl .ndjson        rows with a field of text
.csv .tsv                   rows with a column of text; these and the ones above also as .gz or .zst
.parquet                    rows with a column of text

Nothing is left out without a word: the account names every file and counts every row that isn't used.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from nanochat.account import Account, printable
from nanochat.common import UserError, print0
from nanochat.corpus import cut_text
from nanochat.file_formats import (
    COMPRESSIONS,
    LeftOut,
    describe_error,
    holds_text,
    iter_json_lines,
    iter_json_values,
    iter_table,
    list_names,
    open_text,
    reading,
    require_text,
)

BLOCK_CHARS      = 2**24    # of a text file in memory at once
MAX_ROWS_WITHOUT = 1000     # rows without the field of text from the first on: then its name is wrong


# How each format is read


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
