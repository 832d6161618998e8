"""Rows of the hub's datasets, from local files or through the `datasets` library; rows of a person's own files.

Local files are in $NANOCHAT_MIRROR_DIR or <base dir>/hub, named as on the hub:

    <owner>/<repo>/<subset>/test-00000-of-00001.parquet     or test.parquet, test.jsonl, test.jsonl.gz
    <owner>/<repo>/data/...  or  <owner>/<repo>/...         where the repository has no subsets
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, get_base_dir, get_mirror_dir
from nanochat.file_formats import LeftOut, iter_lines, reading

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")  # the first kind that exists is read


class JsonLines(Sequence):
    """The rows of a .jsonl or .jsonl.gz file, kept as bytes, which take a fraction of the memory of objects.

    All rows are parsed once at the start, so that a damaged line is found then and not hours later.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lines, self.numbers = path, [], []     # numbers: of the lines in the file
        try:
            with reading(path):
                for number, line in iter_lines(path):
                    self.lines.append(line.strip().encode())
                    self.numbers.append(number)
        except LeftOut as reason:
            raise UserError(f"{path} {reason}") from None
        if not self.lines:
            raise UserError(f"{path} is empty; it must hold one JSON object per line")
        for index in range(len(self.lines)):
            try:
                self[index]
            except (ValueError, RecursionError) as error:      # broken UTF-8 is a ValueError, too
                raise UserError(f"{self.where(index)} is not JSON ({error}); correct or remove the line") from None

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> object:
        return json.loads(self.lines[index])

    def where(self, index: int) -> str:
        """File and line of a row, for an error."""
        return f"{self.path}:{self.numbers[index]}"


class TableRows(Sequence):
    """The rows of parquet files, held as an Arrow table."""

    def __init__(self, paths: Sequence[Path]) -> None:
        tables = []
        for path in paths:
            try:
                tables.append(pq.read_table(path))
                if not len(tables[-1]):
                    raise UserError(f"{path} has no rows; fetch it again")
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path} can't be read as parquet ({str(error).splitlines()[0]}); fetch it "
                                "again") from None
        try:
            self.table = pa.concat_tables(tables)
        except pa.ArrowException:
            raise UserError(f"{paths[0].parent} holds files with different columns; fetch them again") from None

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, index: int) -> dict:
        return self.table.slice(range(len(self))[index], 1).to_pylist()[0]


def load_rows(repo: str, subset: str | None, split: str, columns: Sequence[str] = ()) -> Sequence[dict]:
    """The rows of a split of a dataset; UserError where they are missing or lack one of `columns`."""
    folders = [root / repo for root in (get_mirror_dir(), get_base_dir() / "hub") if root]
    paths = next(filter(None, (find_files(folder, subset, split) for folder in folders)), None)
    if paths is None:
        rows, source = load_from_hub(repo, subset, split, folders[-1]), repo
    else:
        rows, source = TableRows(paths) if paths[0].suffix == ".parquet" else JsonLines(paths[0]), str(paths[0])
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
