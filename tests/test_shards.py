"""nanochat/shards.py: what is written is read, damage is named, the hash is the identity of the data."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.download import CorruptFile
from nanochat.shards import count_groups, inspect_shard, iter_documents, load_shards, read_group, write_shards
from tests.data_helpers import hash_shards, make_files, write_documents


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def texts(tmp_path):
    return write_documents(tmp_path / "texts")


def test_write_and_read(tmp_path):
    docs = [f"document {idx}" for idx in range(5000)]
    shards = write_shards(tmp_path, docs, shard_chars=20_000)
    assert [(shard.file, shard.rows, shard.groups) for shard in shards] == \
        [("shard_00000.parquet", 2048, 2), ("shard_00001.parquet", 2048, 2), ("shard_00002.parquet", 904, 1)]
    paths = [tmp_path / shard.file for shard in shards]
    assert list(iter_documents(paths)) == docs
    assert read_group(paths[1], 1) == docs[3072:4096] and count_groups(paths[0]) == 2
    assert sum(shard.chars for shard in shards) == sum(map(len, docs))
    assert pq.ParquetFile(paths[0]).metadata.row_group(0).column(0).compression == "ZSTD"
    assert inspect_shard(paths[2]) == (904, 1, shards[2].chars)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(),
                                  pa.dictionary(pa.int32(), pa.string())])
def test_a_shard_of_any_type_of_text(tmp_path, kind):
    path, texts = tmp_path / "a.parquet", ["eins", "fünf"]
    pq.write_table(pa.table({"text": pa.array(texts).cast(kind)}), path)
    assert inspect_shard(path) == (2, 1, 8) and read_group(path, 0) == texts


@pytest.mark.parametrize(("names", "columns", "message"), [
    (["text", "text"], [["a"], ["b"]], "it has 2 columns 'text'"),
    (["body"], [["a"]], "it has no columns 'text' among body"),
    (["text"], [[1]], "its column 'text' holds int64, not text")])
def test_a_shard_without_one_column_of_text(tmp_path, names, columns, message):
    pq.write_table(pa.Table.from_arrays(list(map(pa.array, columns)), names), tmp_path / "a.parquet")
    with pytest.raises(CorruptFile, match=message):
        inspect_shard(tmp_path / "a.parquet")


def test_first_documents(tmp_path):
    shards = write_shards(tmp_path, iter(["abc", "de", "f", "g"]))
    paths = [tmp_path / shard.file for shard in shards]
    assert list(iter_documents(paths, 5)) == ["abc", "de"]
    assert list(iter_documents(paths, 100)) == list(iter_documents(paths)) == ["abc", "de", "f", "g"]


def test_read_group_from_many_threads(tmp_path):
    docs = [f"document {idx}" for idx in range(8 * 1024)]
    write_shards(tmp_path, docs)
    path = tmp_path / "shard_00000.parquet"
    with ThreadPoolExecutor(8) as pool:
        groups = list(pool.map(lambda idx: read_group(path, idx % 8), range(200)))
    assert all(group == docs[idx % 8 * 1024:(idx % 8 + 1) * 1024] for idx, group in enumerate(groups))


def test_hash_is_the_identity_of_the_data(texts, base_dir):
    first = make_files(texts)
    assert make_files(texts)["hash"] == first["hash"]
    assert load_shards("mine").hash == load_shards(first["folder"]).hash == first["hash"]
    assert make_files(texts, "--seed", "7")["hash"] != first["hash"]


@pytest.mark.parametrize("damage", ["missing", "short", "garbage", "other"])
def test_damaged_shards_are_named(texts, base_dir, damage):
    folder = Path(make_files(texts)["folder"])
    path, before = folder / "shard_00000.parquet", hash_shards(folder)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"short": content[:-1], "garbage": b"\0" * len(content),
                          "other": content[:100] + bytes([content[100] ^ 1]) + content[101:]}[damage])
    if damage == "other":  # same size, whole footer: only the checksum tells
        load_shards("mine")
    with pytest.raises(UserError, match=r"shard_00000\.parquet is damaged .*--source files .*--verify"):
        load_shards("mine", verify=True)
    make_files(texts, "--verify")
    assert hash_shards(folder) == before


def test_damaged_group_names_the_shard(tmp_path):
    write_shards(tmp_path, (f"{idx} " * 500 for idx in range(2000)))
    path = tmp_path / "shard_00000.parquet"
    content = bytearray(path.read_bytes())
    content[4:2000] = bytes(1996)
    path.write_bytes(content)
    with pytest.raises(UserError, match="shard_00000.parquet is damaged"):
        list(iter_documents([path]))
    path.write_bytes(b"")
    with pytest.raises(UserError, match="shard_00000.parquet is damaged"):
        count_groups(path)


def test_load_shards_says_what_to_type(tmp_path, texts, base_dir):
    with pytest.raises(UserError, match="nanochat.dataset --source python-docs"):
        load_shards("python-docs")
    with pytest.raises(UserError, match="--source files --path FOLDER --name poems"):
        load_shards("poems")
    with pytest.raises(UserError, match=f"--source files --path {texts} --name NAME"):
        load_shards(str(texts))
    folder = Path(make_files(texts)["folder"])
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        load_shards("mine")
