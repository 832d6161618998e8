"""Rows of the hub's datasets, from local files or through the `datasets` library; rows of a person's own files.

Local files are in $NANOCHAT_MIRROR_DIR or <base dir>/hub, named as on the hub:

    <owner>/<repo>/<subset>/test-00000-of-00001.parquet     or test.parquet, test.jsonl, test.jsonl.gz
    <owner>/<repo>/data/...  or  <owner>/<repo>/...         where the repository has no subsets
"""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import json
import re
import shlex
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, get_base_dir, get_first_line, get_mirror_dir

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")  # the first kind that exists is read, of the hub's
PACKED = {".gz": "gzip", ".zst": "zstd"}


class JsonLines(Sequence):
    """The rows of a file other than .parquet, kept as JSON in bytes, which take a fraction of the memory of objects.

    A row that is not JSON raises ValueError when it is asked for; `check` does so for all, as UserError.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.numbers = path, [], []     # numbers: of the file's lines, .json: of its rows
        self.unit = "row" if get_format(path) == ".json" else "line"
        for number, line in iter_rows(path):
            self.lines.append(line)
            self.numbers.append(number)
        if not self.lines:
            raise UserError(f"{path} is empty; it must hold one JSON object per line")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> object:
        try:
            return json.loads(self.lines[index].decode())    # of bytes, json would guess the encoding
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def check(self) -> "JsonLines":
        """Itself; UserError for a damaged row, so that it is found now and not hours later."""
        for index in range(len(self.lines)):
            try:
                self[index]
            except ValueError as error:      # broken UTF-8 is one, too
                raise UserError(f"{self.path}:{self.numbers[index]} is not JSON ({error}); correct or remove the "
                                "line") from None
        return self


def get_format(path: Path) -> str:
    """The end of a file's name, such as .json, without .gz or .zst."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix.lower() not in PACKED), "").lower()


def iter_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """The rows of a file as JSON, each with the number of its line (.json: of the row). By the end of the name, without
    .gz or .zst: .json is an array, or values one after the other; .csv has names in its first line; others have a value
    on each line. UserError where the file is damaged as a whole."""
    reader = {".json": iter_values, ".csv": iter_table, ".tsv": iter_table}.get(get_format(path), iter_lines)
    if path.exists() and not path.is_file():    # a pipe would be waited for
        raise UserError(f"{path} can't be read, it is no file; give a file, such as a .jsonl")
    number = 0
    try:
        with open_bytes(path) as file:
            for number, row in reader(file):
                yield number, row
    except UnicodeDecodeError as error:
        encoding = "UTF-16" if b"\0" in error.object else "CP1252"
        place = f" is UTF-8 text up to line {number} alone" if number else " is not UTF-8 text"
        raise UserError(f"{path}{place}; it may be {encoding}, then convert it with: iconv -f {encoding} "
                        f"-t UTF-8 {shlex.quote(str(path))} > NEW_FILE") from None
    except (EOFError, zlib.error, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:    # the system's; libraries give none
            raise UserError(f"{path} can't be read ({error.strerror}); give a file, such as a .jsonl") from None
        raise UserError(f"{path} is not a whole {PACKED.get(path.suffix.lower(), path.suffix)} file "
                        f"({get_first_line(error)}); make it again") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({get_first_line(error)}); correct it") from None


@contextlib.contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """A file's content, decompressed."""
    with open(path, "rb") as file:
        if path.suffix.lower() == ".gz":
            yield gzip.GzipFile(fileobj=file)
        elif path.suffix.lower() == ".zst":
            yield io.BufferedReader(pa.CompressedInputStream(file, "zstd"))
        else:
            yield file


def iter_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The lines that aren't blank."""
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
        if line:
            decode(line)
            yield number, line


def decode(content: bytes) -> str:
    """UTF-8 as text. A NUL is no character of JSON, but half of one in UTF-16."""
    if b"\0" in content:
        raise UnicodeDecodeError("utf-8", content, 0, 1, "it has NULs")
    return content.decode("utf-8-sig")


def iter_values(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The elements of an array, or values one after the other; an array of messages is one conversation."""
    content, decoder, blanks, rows, start = decode(file.read()).strip(), json.JSONDecoder(), re.compile(r"\s*"), [], 0
    while start < len(content):
        row, end = decoder.raw_decode(content, start)
        rows.append(row)
        start = blanks.match(content, end).end()
    if len(rows) == 1 and isinstance(rows[0], list) and not any(isinstance(row, dict) and "role" in row
                                                                for row in rows[0]):
        rows = rows[0]
    yield from ((number, json.dumps(row).encode()) for number, row in enumerate(rows, start=1))


def iter_table(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The rows of a .csv as objects; its columns are separated by commas, semicolons or tabs."""
    csv.field_size_limit(2**31 - 1)
    lines = map(decode, file)
    head, number = next(lines, ""), 2
    table = csv.DictReader(itertools.chain([head], lines), strict=True, delimiter=max(",;\t", key=head.count))
    names = table.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError(f"it has two columns of the same name among {', '.join(names)}")
    for row in table:
        if None in row:
            raise ValueError(f"line {number} has more fields than the first line; put texts in quotes")
        yield number, json.dumps(row).encode()
        number = table.line_num + 1


class TableRows(Sequence):
    """The rows of parquet files, held as an Arrow table."""

    unit = "row"

    def __init__(self, paths: Sequence[Path]) -> None:
        tables = []
        for path in paths:
            try:
                with open(path, "rb") as source, pq.ParquetFile(source) as file:   # arrow opens no path beside UTF-8
                    if len(set(names := file.schema_arrow.names)) < len(names):
                        raise UserError(f"{path} has two columns of the same name among {', '.join(names)}; rename one")
                    tables.append(file.read())
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path} can't be read as parquet ({get_first_line(error)}); fetch or make it "
                                "again") from None
            if not len(tables[-1]):
                raise UserError(f"{path} has no rows; fetch or make it again")
        try:
            self.table = pa.concat_tables(tables)
        except pa.ArrowException:
            raise UserError(f"{paths[0].parent} holds files with different columns; fetch them again") from None
        self.numbers = range(1, self.table.num_rows + 1)

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict:
        return self.table.slice(range(len(self))[index], 1).to_pylist()[0]


def read_rows(path: Path) -> JsonLines | TableRows:
    """The rows of a person's file."""
    return TableRows([path]) if path.suffix.lower() == ".parquet" else JsonLines(path)


def load_rows(repo: str, subset: str | None, split: str, columns: Sequence[str] = ()) -> Sequence[dict]:
    """The rows of a split of a dataset; UserError where they are missing or lack one of `columns`."""
    folders = [root / repo for root in (get_mirror_dir(), get_base_dir() / "hub") if root]
    paths = next(filter(None, (find_files(folder, subset, split) for folder in folders)), None)
    if paths is None:
        rows, source = load_from_hub(repo, subset, split, folders[-1]), repo
    else:
        rows = TableRows(paths) if paths[0].suffix == ".parquet" else JsonLines(paths[0]).check()
        source = str(paths[0])
    check_columns(rows[0], columns, source)
    return rows


def check_columns(row: object, columns: Sequence[str], source: str) -> None:
    """UserError for rows without the hub's columns."""
    if missing := [column for column in columns if not isinstance(row, dict) or column not in row]:
        raise UserError(f"{source} has no column {missing[0]!r}; fetch it again, as the hub has it: "
                        f"{', '.join(columns)}")


def find_files(folder: Path, subset: str | None, split: str) -> list[Path] | None:
    """The files of a split in a local repository, in order. None if there are none, UserError if some are missing."""
    for place in (folder / subset, folder / subset / "data") if subset else (folder, folder / "data"):
        for suffix in SUFFIXES:
            part = r"(-\d+-of-(?P<total>\d+)\b.*)?" if suffix == ".parquet" else "(?P<total>)"
            name = re.compile(re.escape(split) + part + re.escape(suffix))
            found = {path: match for path in sorted(place.glob(f"{split}*")) if (match := name.fullmatch(path.name))}
            if found:
                total = int(next(iter(found.values()))["total"] or 1)
                if len(found) != total:
                    raise UserError(f"{place} has {len(found)} of {total} files of the split {split}; copy all of "
                                    f"{total} there")
                return list(found)
    return None


def load_from_hub(repo: str, subset: str | None, split: str, folder: Path) -> Sequence[dict]:
    """The rows through the `datasets` library, which keeps its own cache and maps it into memory."""
    import datasets  # here, since the import takes seconds
    try:
        return datasets.load_dataset(repo, subset, split=split)
    except Exception as error:  # its own, those of huggingface_hub, of the HTTP client, of the file system ...
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UserError(f"{repo} can't be had from the hub ({reason}); connect to the network, or put "
                        f"{split}.parquet or {split}.jsonl into {folder / (subset or '')}") from None
