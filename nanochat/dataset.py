"""The sources of text, and the command that makes or downloads a dataset.

python -m nanochat.dataset                                          climbmix on a machine with a GPU, else python-docs
python -m nanochat.dataset --source climbmix -n 170 -w 8            more shards later: the same with a larger -n
python -m nanochat.dataset --source tinystories -n 1                250 MB of stories that a small model can learn
python -m nanochat.dataset --source files --path FOLDER --name mine your own texts, see text_files.py
python -m nanochat.dataset --source climbmix --verify               check every sha256, make bad shards again

<base dir>/data/<name>/shard_00000.parquet ... val.parquet, and manifest.json, which lists what is complete.

With no network python-docs, made from the Python installation itself, and files always work; climbmix, fineweb-edu and
tinystories can come from a folder, $NANOCHAT_MIRROR_DIR/<owner>/<repo>/<file>, or from a mirror, $HF_ENDPOINT.

files reads .txt .text .md .rst (a document each), .json .jsonl .ndjson .csv .tsv (a row with the field `text` each, or
--text-column), all of these also as .gz or .zst, and .parquet. Text is UTF-8; another encoding is refused with the
command that converts it. Links are followed; hidden files and the base folder are skipped. Every other file is named as
left out, with the reason and what to do: HTML, Word and TeX (convert with `pandoc -t plain`), PDF, packed folders,
damaged files, pipes. An account of all files, documents and characters ends it, and stands in manifest.json and the
report card; where more than 5% were left out, a line says WARNING. Exact repeats are kept once; validation is at most
10% of the distinct text, but for the document that reaches it.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":    # as scripts/__init__.py: before torch is loaded, so that Ctrl-C ends in one sentence
    from nanochat.command_line import prepare_process
    prepare_process()

from nanochat import common, corpus, devices, shards
from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, get_base_dir, print0, printable, replaced_folder, timed
from nanochat.corpus import HUB_SOURCES
from nanochat.download import CorruptFile, Job, download_all
from nanochat.shards import Manifest, Shard, load_shards, read_manifest, write_shard, write_shards
from nanochat.text_files import Account, LeftOut, TextFile, find_text_files, list_names, quote, read_documents

# Sources that are built here: python-docs and files

CORPUS_VERSION = 1          # incremented when the rules below or in corpus.py change: old data is made again
BUCKET_BYTES   = 64 * 2**20 # input bytes per bucket of the shuffle on disk; a bucket in memory takes several times that
MAX_BUCKETS    = 128        # open at once; every system allows 256 open files
# 1% for validation, or more, up to a tenth, where 1% gives too little text for stable bits per byte
VAL_FRAC, MIN_VAL_CHARS, MAX_VAL_FRAC = 0.01, 1_000_000, 0.1


def order_key(text: bytes, seed: int) -> bytes:
    """A hash to sort by, which shuffles: the order depends on the texts and the seed, not on files or machines."""
    return hashlib.blake2b(text, digest_size=8, key=seed.to_bytes(8, "little")).digest()


def make_python_docs(folder: Path, seed: int, command: str, verify: bool) -> None:
    """Build the corpus of corpus.build_python_docs, shuffled, unless it exists for the same package versions."""
    packages = corpus.find_packages()
    settings = {"corpus_version": CORPUS_VERSION, "seed": seed,
                "versions": {package.name: package.version for package in packages}}
    if is_done(folder, settings, verify):
        return
    with timed("collecting Python's documentation and sources"), replaced_folder(folder) as new:
        train, val = ([text for _, text in sorted((order_key(text.encode(), seed), text) for text in side)]
                      for side in corpus.build_python_docs(packages))
        train_shards, val_shard = write_shards(new, train), write_shard(new / "val.parquet", iter(val))
        Manifest("python-docs", settings, command, train_shards, val_shard).save(new)


def make_from_files(folder: Path, path: Path, text_column: str, seed: int, command: str, verify: bool) -> None:
    """Build shards from a person's files, unless they exist and no file has changed since."""
    account = Account()
    files = find_text_files(path, account, get_base_dir().resolve())
    stats = [(printable(file.path.relative_to(path)), file.num_bytes, file.modified_ns) for file in files]
    settings = {"corpus_version": CORPUS_VERSION, "seed": seed, "text_column": text_column, "path": printable(path),
                "files": hashlib.sha256(json.dumps(stats).encode()).hexdigest()}
    if account.files["left out"]:    # another key only where it is needed: data without one stays valid
        left_out = [[why, entry] for why, entry in account.reasons.items() if entry["outcome"] == "left out"]
        settings["left_out"] = hashlib.sha256(json.dumps(left_out).encode()).hexdigest()
    if is_done(folder, settings, verify):
        return
    with timed(f"reading {len(files)} files of {printable(path)}"), replaced_folder(folder) as new:
        num_buckets = min(MAX_BUCKETS, 1 + sum(file.num_bytes for file in files) // BUCKET_BYTES)
        with Buckets(new, num_buckets, seed) as buckets:
            for file in files:
                buckets.add_file(file, text_column, account)
        num_docs, num_chars = buckets.drop_repeats(account)
        if num_docs < 2:
            print0("\n".join(account.describe()))
            left_out = "" if account.files["read"] else f" ({'; '.join(account.describe_files()) or 'it is empty'})"
            raise UserError(f"--path {printable(path)} holds {num_docs} different documents{left_out}; at least two "
                            "are needed, one of them for validation")
        documents = buckets.read()
        val = take_val(documents, num_docs, num_chars)
        train = write_shards(new, documents)
        Manifest("files", settings, command, train, write_shard(new / "val.parquet", iter(val)), account).save(new)


def is_done(folder: Path, settings: dict, verify: bool) -> bool:
    """Whether `folder` holds an undamaged dataset of these settings."""
    if not (folder / "manifest.json").is_file():
        return False
    before, now = (made | {"versions": None} | made.get("versions", {})
                   for made in (read_manifest(folder).settings, settings))
    if changed := [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]:
        print0(f"building it again: it was made with other {', '.join(changed)}; runs that began on that text will "
               "refuse the new one")
        return False
    try:
        load_shards(str(folder), verify)
        return True
    except UserError as error:
        print0(f"building it again: {error}")
        return False


class Buckets:
    """The shuffle on disk: first every document goes to a file, the bucket of its key; then one bucket at a time is
    read in the order of its keys, without repeats."""

    HEADER = struct.Struct("<8sQQ")    # of each document: its key, its bytes, its characters

    def __init__(self, folder: Path, num_buckets: int, seed: int) -> None:
        self.paths = [folder / f"bucket_{idx:03d}" for idx in range(num_buckets)]
        self.seed, self.files, self.stack = seed, [], contextlib.ExitStack()

    def __enter__(self) -> "Buckets":
        self.files = [self.stack.enter_context(open(path, "wb")) for path in self.paths]
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def add_file(self, file: TextFile, text_column: str, account: Account) -> None:
        """Add the documents of a file, all or, where it is damaged, none."""
        starts, read = [bucket.tell() for bucket in self.files], Account()
        try:
            for text in read_documents(file, text_column, read):
                self.add(text)
                read.count("kept", len(text))
        except LeftOut as reason:
            account.leave_out(file.name, str(reason), file.num_bytes)
            for bucket, start in zip(self.files, starts, strict=True):
                bucket.seek(start)
                bucket.truncate()
            return
        account.add_file(file.format, file.num_bytes)
        for outcome, num_docs in read.documents.items():
            account.count(outcome, read.characters[outcome], num_docs)

    def add(self, text: str) -> None:
        data = text.encode()
        key = order_key(data, self.seed)
        self.files[key[0] * len(self.files) // 256].write(self.HEADER.pack(key, len(data), len(text)) + data)

    def drop_repeats(self, account: Account) -> tuple[int, int]:
        """Count the documents that `read` will give, and their characters; the account gets the repeats."""
        num_docs = num_chars = 0
        for path in self.paths:
            seen = set()
            with open(path, "rb") as file:
                while header := file.read(self.HEADER.size):
                    key, num_bytes, chars = self.HEADER.unpack(header)
                    file.seek(num_bytes, os.SEEK_CUR)
                    if key in seen:
                        account.count("kept", -chars, -1)
                        account.count("exact repeats of others", chars)
                    else:
                        seen.add(key)
                        num_docs, num_chars = num_docs + 1, num_chars + chars
        return num_docs, num_chars

    def read(self) -> Iterator[str]:
        """The texts in the order of their keys, without repeats, one bucket in memory at a time."""
        for path in self.paths:
            data, start, records = path.read_bytes(), 0, []
            while start < len(data):
                key, num_bytes, _ = self.HEADER.unpack_from(data, start)
                start += self.HEADER.size + num_bytes
                records.append((key, data[start - num_bytes:start]))
            path.unlink()
            del data
            yield from (text.decode() for (_, text), _ in itertools.groupby(sorted(records)))


def take_val(documents: Iterator[str], num_docs: int, num_chars: int) -> list[str]:
    """The first documents of the shuffled order, for validation. Without repeats, so that none is in training too."""
    wanted_chars = max(VAL_FRAC * num_chars, min(MIN_VAL_CHARS, MAX_VAL_FRAC * num_chars))
    val, val_chars = [], 0
    for text in documents:
        val.append(text)
        val_chars += len(text)
        if val_chars >= wanted_chars or len(val) >= num_docs // 2:
            break
    return val


DEFAULT_NUM_SHARDS, DEFAULT_NUM_WORKERS, DEFAULT_SEED = 8, 4, 42


def fetch_from_hub(folder: Path, source: str, num_shards: int | None, num_workers: int, command: str,
                   verify: bool) -> None:
    """Download the validation shard and at least the first `num_shards` training shards (None: as many as the last
    time, at first DEFAULT_NUM_SHARDS), where they are missing or damaged."""
    hub = HUB_SOURCES[source]
    if num_shards and num_shards > len(hub.train):
        raise UserError(f"--num-shards {num_shards}: {hub.repo} has {len(hub.train):,} training shards")
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(folder) if (folder / "manifest.json").is_file() else \
        Manifest(source, {"repo": hub.repo, "num_shards": min(DEFAULT_NUM_SHARDS, len(hub.train))}, command)
    settings = manifest.settings | ({"num_shards": num_shards} if num_shards else {})
    # Names on this disk -> names on the hub; validation comes first: without it the rest is useless
    remote_names = {"val.parquet": hub.val} | {f"shard_{idx:05d}.parquet": name for idx, name in enumerate(hub.train)}
    wanted, complete = list(remote_names)[:1 + settings["num_shards"]], {}
    for shard in filter(None, (*manifest.train, manifest.val)):
        try:
            shards.check_shard(folder / shard.file, shard, verify)
            complete[shard.file] = shard
        except CorruptFile as error:
            print0(f"{folder / shard.file}: {error}; fetching it again")
            wanted = [*wanted, shard.file]

    def save() -> None:
        train = tuple(shard for name, shard in sorted(complete.items()) if name != "val.parquet")
        replace(manifest, settings=settings, train=train, val=complete.get("val.parquet")).save(folder)

    def keep(job: Job, sha256: str, facts: tuple[int, int, int]) -> None:
        complete[job.path.name] = Shard(job.path.name, sha256, job.path.stat().st_size, *facts)
        save()

    save()
    mirror_dir, (endpoint, token) = common.get_mirror_dir(), common.get_hub()
    sources = {name: mirror_dir / hub.repo / remote_names[name] if mirror_dir else
               f"{endpoint}/datasets/{hub.repo}/resolve/main/{remote_names[name]}" for name in wanted}
    jobs = [Job(source, folder / name) for name, source in sources.items() if name not in complete]
    failed = download_all(jobs, num_workers, shards.inspect_shard, keep, token) if jobs else {}
    if failed:
        reasons = "; ".join(f"{remote_names[name]}{' (validation)' if name == 'val.parquet' else ''}: {reason}"
                            for name, reason in [*failed.items()][:3])    # the others were printed, too
        reasons += f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise UserError(f"{len(failed)} of {len(jobs)} shards could not be fetched ({reasons}); what came is kept, "
                        f"fetch the rest with: {command}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--source", choices=shards.SOURCES, help="default: climbmix on a machine with a GPU, else python-docs")
    add("--name", help="folder under <base dir>/data (default: the source's name)")
    add("-n", "--num-shards", type=int, help="hub sources: training shards to have at least (default: as many as the "
        f"last time, at first {DEFAULT_NUM_SHARDS} or all there are)")
    add("-w", "--num-workers", type=int, help=f"hub sources: downloads at once (default: {DEFAULT_NUM_WORKERS})")
    add("--path", type=Path, help="files: the folder to read")
    add("--text-column", help="files: field or column with the texts (default: text)")
    add("--seed", type=int, help=f"python-docs, files: of the shuffle (default: {DEFAULT_SEED})")
    add("--verify", action="store_true", help="check every sha256, make damaged shards again")
    args = parser.parse_args(argv)
    if not args.source:
        args.source = default_source()
        print0(f"source: {args.source} ({'a' if args.source == 'climbmix' else 'no'} GPU is there; see --source)")
    used = {"files": ("path", "text_column", "seed"), "python-docs": ("seed",)}
    used = used.get(args.source, ("num_shards", "num_workers"))
    for name in ("num_shards", "num_workers", "path", "text_column", "seed"):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is not None and name not in used:
            raise UserError(f"{flag} means nothing for --source {args.source}; leave it out")
        if isinstance(value, int) and not (0 if name == "seed" else 1) <= value < 2**63:
            raise UserError(f"{flag} {value} is out of range; give a positive number")
    if args.source == "files" and args.path is None:
        raise UserError("--source files needs --path FOLDER, the folder with your texts")
    if args.name is not None:
        common.check_name(args.name, "--name")
    return args


def default_source(device_type: str = "auto") -> str:
    """The source where none is named: as much text as a GPU needs, or the text that is on every machine."""
    return "climbmix" if device_type != "cpu" and devices.has_gpu() else "python-docs"


def refuse_other_files(folder: Path) -> None:
    """UserError where the data would take the place of files that aren't a dataset's."""
    if not folder.is_dir() or (folder / "manifest.json").is_file():
        return
    if others := sorted(name for name in os.listdir(folder) if not re.match(r"(shard_\d+|val)\.parquet", name)):
        names = list_names(map(printable, others))
        raise UserError(f"{printable(folder)} holds files that aren't nanochat's ({names}); choose another --name, or "
                        "move them elsewhere")


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    source, folder = args.source, get_base_dir() / "data" / (args.name or args.source)
    command = f"python -m nanochat.dataset --source {source}" + (f" --name {quote(args.name)}" if args.name else "")
    seed = DEFAULT_SEED if args.seed is None else args.seed
    if source not in HUB_SOURCES:
        refuse_other_files(folder)
    with shards.sole_writer(folder):
        if (folder / "manifest.json").is_file() and (made_from := read_manifest(folder).source) != source:
            raise UserError(f"{folder} holds data from {made_from}; choose another --name for {source}")
        if source in HUB_SOURCES:
            fetch_from_hub(folder, source, args.num_shards, args.num_workers or DEFAULT_NUM_WORKERS, command,
                           args.verify)
        elif source == "files":
            path = Path(os.path.realpath(common.expand_home(args.path)))    # resolve() fails for a link to itself
            if path.is_relative_to(os.path.realpath(folder)):
                raise UserError(f"--path {printable(path)} is where the data would be written; choose another --name, "
                                "or put the texts elsewhere")
            text_column = args.text_column or "text"
            command += f" --path {quote(path)} --text-column {quote(text_column)} --seed {seed}"
            make_from_files(folder, path, text_column, seed, command, args.verify)
        else:
            make_python_docs(folder, seed, f"{command} --seed {seed}", args.verify)
        data_hash, manifest = load_shards(str(folder)).hash, read_manifest(folder)
    if manifest.account:
        print0("\n".join(manifest.account.describe()))
    if args.verify:
        print0("every sha256 agrees with the manifest")
    num_docs, num_chars = (sum(getattr(shard, unit) for shard in manifest.train) for unit in ("rows", "chars"))
    print0(f"{printable(folder)}: {len(manifest.train)} training shards of {num_docs:,} documents "
           f"({num_chars / 1e6:,.1f} M characters), validation {manifest.val.rows:,} documents "
           f"({manifest.val.chars / 1e6:,.1f} M), hash {data_hash}")
    return {"folder": str(folder), "hash": data_hash, "num_shards": len(manifest.train), "num_chars": num_chars}


if __name__ == "__main__":
    run_script(main)
