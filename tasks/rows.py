"""Rows of the hub's datasets, from local files or through the `datasets` library; rows of a person's own files.

Local files are in $NANOCHAT_MIRROR_DIR or <base dir>/hub, named as on the hub:

    <owner>/<repo>/<subset>/test-00000-of-00001.parquet     or test.parquet, test.jsonl, test.jsonl.gz
    <owner>/<repo>/data/...  or  <owner>/<repo>/...         where the repository has no subsets
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, get_base_dir, get_first_line, get_mirror_dir, printable
from nanochat.text_files import (
    COMPRESSIONS,
    LeftOut,
    iter_json_values,
    iter_lines,
    iter_table,
    list_names,
    parse_json,
    reading,
    require_text,
)

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")  # the first kind that exists is read, of the hub's


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
        return parse_json(self.lines[index].decode())    # of bytes, json would guess the encoding

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
    return next((suffix for suffix in reversed(path.suffixes) if suffix.lower() not in COMPRESSIONS), "").lower()


def iter_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """The rows of a file as JSON, each with the number of its line (.json: of the row). By the end of the name, without
    .gz or .zst: .json is an array, or values one after the other; .csv has names in its first line; others have a value
    on each line. UserError where the file can't be read as a whole."""
    reader = {".json": iter_values, ".csv": iter_objects, ".tsv": iter_objects}.get(get_format(path), iter_json)
    try:
        with reading(path):
            yield from reader(path)
    except LeftOut as reason:
        raise UserError(f"{printable(path)} {reason}") from None


def iter_json(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that aren't blank, as they are."""
    for number, line in iter_lines(path):
        yield number, require_text(path, f"{printable(path)}:{number}", line).strip().encode()


def iter_values(path: Path) -> Iterator[tuple[int, bytes]]:
    """The values of a JSON file; an array of messages is one conversation."""
    values = [value for _, value in iter_json_values(path)]
    if any(isinstance(value, dict) and "role" in value for value in values):
        values = [values]
    yield from ((number, json.dumps(value).encode()) for number, value in enumerate(values, start=1))


def iter_objects(path: Path) -> Iterator[tuple[int, bytes]]:
    """The rows of a table as objects."""
    names = []
    for number, row in iter_table(path):
        if names:
            yield number, json.dumps(dict(zip(names, row, strict=False))).encode()
        elif len(set(row)) < len(row):
            raise UserError(f"{printable(path)} has two columns of the same name among {list_names(row)}; rename one")
        else:
            names = row


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


def check_file(path: Path) -> None:
    """UserError where a person's file isn't one."""
    if not path.is_file():    # a pipe would be waited for
        raise UserError(f"{printable(path)} can't be read, {'it is no file' if path.exists() else 'it is not there'}; "
                        "give a file, such as a .jsonl")


def read_rows(path: Path) -> JsonLines | TableRows:
    """The rows of a person's file."""
    check_file(path)
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
        reason = get_first_line(error).rstrip(". ")
        raise UserError(f"{repo} can't be had from the hub ({reason}); connect to the network, or put "
                        f"{split}.parquet or {split}.jsonl into {folder / (subset or '')}") from None
