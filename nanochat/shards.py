"""Datasets on disk, see dataset.py: parquet shards, the manifest that lists what is complete, reading by groups."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.common import (
    UserError,
    expand_home,
    file_lock,
    get_base_dir,
    get_first_line,
    hash_file,
    print0,
    printable,
    restore_folder,
    write_json,
)
from nanochat.download import CorruptFile, put_in_place
from nanochat.text_files import Account, holds_text, list_names

SOURCES     = ("python-docs", "climbmix", "fineweb-edu", "tinystories", "files")  # what nanochat.dataset can make
GROUP_ROWS  = 1024         # documents per row group: the unit of packing, of shuffling and of resuming
SHARD_CHARS = 250_000_000  # as long as the shards of the hub's repositories; a shard ends with a whole row group
SCHEMA      = pa.schema([("text", pa.string())])

@dataclass(frozen=True)
class Shard:
    """The manifest's entry of one parquet file."""
    file:   str
    sha256: str
    bytes:  int
    rows:   int
    groups: int
    chars:  int


@dataclass(frozen=True)
class Manifest:
    """The complete shards of a dataset, and how to make them again."""
    source:   str
    settings: dict               # that determine the content
    command:  str                # makes missing or damaged shards again
    train:    tuple[Shard, ...] = ()
    val:      Shard | None      = None
    account:  Account | None    = None    # of a person's files

    def save(self, folder: Path) -> None:
        write_json(folder / "manifest.json", asdict(self))


@dataclass(frozen=True)
class ShardList:
    """The shards of one dataset as a run uses them."""
    name:  str
    train: tuple[Path, ...]
    val:   Path
    hash:  str  # the identity of the data, see hash_shards


def load_shards(name_or_folder: str, verify: bool = False, train_files: Sequence[str] | None = None) -> ShardList:
    """The shards of a dataset in the base folder, or of any folder of that layout; UserError if one is damaged.

    verify:      compare each file's sha256, not only its size and footer
    train_files: the training shards that a run began with; shards that arrived later are left out
    """
    while True:
        folder = find_folder(name_or_folder)
        # Another process may rebuild the data meanwhile: the result counts only if the manifest still agrees
        with contextlib.suppress(FileNotFoundError):
            manifest = read_manifest(folder)
            try:
                used = check_shards(folder, manifest, verify, train_files)
            except UserError:
                if read_manifest(folder) == manifest:
                    raise
                continue
            after = read_manifest(folder)
            if {*used} <= {*after.train, after.val}:
                break
    expected_sha256.update({folder / shard.file: shard.sha256 for shard in used})
    *train, val = [folder / shard.file for shard in used]
    return ShardList(folder.name, tuple(train), val, hash_shards(used))


def hash_shards(used: Sequence[Shard]) -> str:
    """The identity of the data: of the files' names, order and contents."""
    return hashlib.sha256(json.dumps([(shard.file, shard.sha256) for shard in used]).encode()).hexdigest()[:16]


def check_shards(folder: Path, manifest: Manifest, verify: bool, train_files: Sequence[str] | None) -> list[Shard]:
    """The training shards to use, then the validation shard; UserError if one is missing or damaged."""
    if not manifest.val or not manifest.train:
        missing = "training" if manifest.val else "validation"
        raise UserError(f"{folder} has no {missing} shard yet; fetch it with: {manifest.command}")
    shards = [shard for shard in manifest.train if train_files is None or shard.file in train_files] + [manifest.val]
    for shard in shards:
        with naming_shard(folder / shard.file):
            check_shard(folder / shard.file, shard, verify)
    return shards


def find_folder(name_or_folder: str) -> Path:
    """The folder of a dataset by name, which comes first, or by path."""
    named = get_base_dir() / "data" / name_or_folder
    for folder in (named, expand_home(name_or_folder)):
        if (folder / "manifest.json").is_file():
            return folder.resolve()
    if expand_home(name_or_folder).is_dir():
        raise UserError(f"{name_or_folder} has no manifest.json; make shards of its texts with: python -m "
                        f"nanochat.dataset --source files --path {name_or_folder} --name NAME, then use that NAME")
    source = name_or_folder if name_or_folder in SOURCES else "files --path FOLDER --name " + Path(name_or_folder).name
    raise UserError(f"there is no data {name_or_folder!r} ({printable(named)}); make it with: python -m "
                    f"nanochat.dataset --source {printable(source)}")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder."""
    try:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        train, val = tuple(Shard(**shard) for shard in content["train"]), content["val"]
        account = content.get("account")    # older manifests have none
        return Manifest(**content | {"train": train, "val": Shard(**val) if val else None,
                                     "account": Account(**account) if account else None})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'manifest.json'} is damaged ({error}); delete {folder} and run nanochat.dataset "
                        f"again") from None


def check_shard(path: Path, shard: Shard, verify: bool) -> None:
    """Compare a file with its manifest entry; raises CorruptFile."""
    if not path.is_file():
        raise CorruptFile("it is missing")
    if path.stat().st_size != shard.bytes:
        raise CorruptFile(f"it has {path.stat().st_size:,} bytes, not {shard.bytes:,}")
    with open_shard(path) as file:
        if not 0 < file.metadata.num_rows == shard.rows:
            raise CorruptFile(f"it has {file.metadata.num_rows:,} rows, not {shard.rows:,}")
    if verify and hash_file(path) != shard.sha256:
        raise CorruptFile("its sha256 is not the manifest's")


def inspect_shard(path: Path) -> tuple[int, int, int]:
    """Rows, row groups and characters of a file, which is read completely; raises CorruptFile where it is damaged."""
    num_chars = 0
    with open_shard(path) as file, reading_parquet():
        for group_idx in range(file.num_row_groups):
            texts = file.read_row_group(group_idx, columns=["text"], use_threads=False).column(0)
            texts.validate(full=True)
            num_chars += pc.sum(pc.utf8_length(texts.cast(pa.large_string()))).as_py() or 0
            if texts.null_count:
                raise CorruptFile(f"row group {group_idx} has {texts.null_count} rows without text")
        if not num_chars:
            raise CorruptFile("it holds no text")
        return file.metadata.num_rows, file.num_row_groups, num_chars


@contextlib.contextmanager
def reading_parquet() -> Iterator[None]:
    """Turn the errors of pyarrow and the system into CorruptFile."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorruptFile(f"not readable as parquet: {get_first_line(error)}") from None


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file with a whole footer and a column `text`; raises CorruptFile."""
    with contextlib.ExitStack() as stack:
        with reading_parquet():
            source = stack.enter_context(open(path, "rb"))    # arrow itself opens no path that isn't UTF-8
            file = stack.enter_context(pq.ParquetFile(source))
        names = file.schema_arrow.names
        if names.count("text") != 1:
            raise CorruptFile(f"it has {names.count('text') or 'no'} columns 'text' among {list_names(names)}")
        if not holds_text(kind := file.schema_arrow.field("text").type):
            raise CorruptFile(f"its column 'text' holds {kind}, not text")
        yield file


@contextlib.contextmanager
def naming_shard(path: Path) -> Iterator[None]:
    """Turn CorruptFile into a UserError: which shard, how it is damaged, and the command that makes it again."""
    try:
        yield
    except CorruptFile as error:
        command = f" with: {read_manifest(path.parent).command} --verify" if (path.parent / "manifest.json").is_file() \
            else ""
        raise UserError(f"shard {path} is damaged ({error}); make it again{command}") from None


expected_sha256: dict[Path, str] = {}   # as load_shards saw it in the manifest
verifying = threading.Lock()
hash_once = functools.cache(lambda path, inode, num_bytes, modified_ns: hash_file(path))


def require_unchanged(path: Path) -> None:
    """Verify a file's sha256 on a process's first read, and again whenever the file was replaced. Parquet itself misses
    most damage: 105 of 200 flipped bits in a shard of prose gave other text without an error."""
    if (sha256 := expected_sha256.get(path)) is None:
        return
    with verifying:
        stat = path.stat()
        found_sha256 = hash_once(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if found_sha256 == sha256:
        return
    manifest = read_manifest(path.parent)
    if found_sha256 in {shard.sha256 for shard in (*manifest.train, manifest.val) if shard}:
        raise UserError(f"{path} was replaced with other text since this run loaded {path.parent}; begin a new run, or "
                        "make the old data again")
    raise CorruptFile("its sha256 is not the manifest's")


def count_groups(path: Path) -> int:
    """Row groups of a shard. Safe to call from several threads."""
    with naming_shard(path), open_shard(path) as file:
        return file.num_row_groups


def read_group(path: Path, group_idx: int) -> list[str]:
    """The documents of one row group of a shard. Safe to call from several threads."""
    with naming_shard(path), reading_parquet():
        require_unchanged(path)
        with open_shard(path) as file:
            # No threads: the callers are threads themselves
            return file.read_row_group(group_idx, columns=["text"], use_threads=False).column(0).to_pylist()


def iter_documents(paths: Sequence[Path], max_chars: float = math.inf) -> Iterator[str]:
    """The documents of the shards in order, a row group in memory at a time, up to the one that reaches `max_chars`."""
    num_chars = 0
    for path in paths:
        for text in itertools.chain.from_iterable(read_group(path, idx) for idx in range(count_groups(path))):
            yield text
            num_chars += len(text)
            if num_chars >= max_chars:
                return


def write_shards(folder: Path, documents: Iterable[str], shard_chars: int = SHARD_CHARS) -> tuple[Shard, ...]:
    """Write documents in order as shard_00000.parquet, ..., each up to the row group that reaches `shard_chars`."""
    documents, shards = iter(documents), []
    for first in documents:
        path = folder / f"shard_{len(shards):05d}.parquet"
        shards.append(write_shard(path, itertools.chain([first], documents), shard_chars))
    return tuple(shards)


def write_shard(path: Path, documents: Iterator[str], shard_chars: float = math.inf) -> Shard:
    """Write one parquet file in row groups of GROUP_ROWS; takes no more of `documents` than it writes."""
    part = path.with_name(path.name + ".part")
    rows = groups = chars = 0
    # A dictionary and statistics of long, unique texts would repeat the texts
    with open(part, "wb") as file, \
            pq.ParquetWriter(file, SCHEMA, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        while chars < shard_chars and (group := list(itertools.islice(documents, GROUP_ROWS))):
            writer.write_table(pa.table({"text": group}, SCHEMA), row_group_size=GROUP_ROWS)
            rows, groups, chars = rows + len(group), groups + 1, chars + sum(map(len, group))
    put_in_place(part, path)
    return Shard(path.name, hash_file(path), path.stat().st_size, rows, groups, chars)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, after waiting for it; repairs first what a killed writer left."""
    lock = file_lock(folder)
    try:
        held = lock.acquire(blocking=False)
    except filelock.Timeout:
        print0(f"waiting for another process that works on {folder}")
        held = lock.acquire()
    with held:
        clear_leftovers(folder)
        yield


def clear_leftovers(folder: Path) -> None:
    """Restore a folder that `replaced_folder` had moved aside, and delete unfinished files, but not a download's .part:
    the next download continues it."""
    restore_folder(folder)
    for leftover in (*folder.glob("*.tmp"), *folder.glob("*.copy")):
        leftover.unlink()
