"""The order of the data on any topology, after any resume, in any epoch; validation's fixed rows."""

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import dataloader
from nanochat.common import Ranks, UserError
from nanochat.dataloader import TextGroups, TrainLoader, choose_num_lanes, validation_batches
from nanochat.packing import PAD, pack_documents
from nanochat.shards import ShardList
from tests.data_helpers import ALONE, BOS, make_loader
from tests.helpers import BYTE_TOKENIZER, start_script

REPO = Path(__file__).resolve().parent.parent
REAL_DATA = REPO.parent / "shared" / "data" / "pretrain_tiny"


# ---------------------------------------------------------------------------------------------------------------------
# Order


def write_shard(path: Path, groups: list[list[str]]) -> Path:
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for texts in groups:
            writer.write_table(pa.table({"text": texts}, schema), row_group_size=max(1, len(texts)))
    return path


def make_texts(rng: np.random.Generator, num_docs: int) -> list[str]:
    return ["".join(chr(97 + letter) for letter in rng.integers(0, 26, size))
            for size in rng.integers(3, 120, num_docs)]


@pytest.fixture
def shards(tmp_path) -> ShardList:
    """11 small groups of unequal sizes in two shards, one of them without any text; 3 groups to validate."""
    rng = np.random.default_rng(4)
    groups = [make_texts(rng, 5 + 9 * i) for i in range(11)]
    groups[3] = ["", ""]
    train = write_shard(tmp_path / "shard_00000.parquet", groups[:6]), write_shard(tmp_path / "b.parquet", groups[6:])
    val = write_shard(tmp_path / "val.parquet", [make_texts(rng, 20) for _ in range(3)])
    return ShardList(name="letters", train=train, val=val, hash="abc")


def step_rows(loader: TrainLoader) -> list[tuple]:
    batch = loader.next_step()
    assert batch.weights is None
    return [(*row, *target) for row, target in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)]


def steps_of(loader: TrainLoader, num_steps: int) -> list[list[tuple]]:
    with loader:
        return [step_rows(loader) for _ in range(num_steps)]


def merge_states(states: list[dict]) -> dict:
    """What the collective in `state_dict` does among connected ranks."""
    return states[0] | {"lanes": np.max([state["lanes"] for state in states], axis=0).tolist()}


def test_a_batch_that_the_lanes_do_not_divide_begins_the_data_anew_where_that_is_allowed(shards, capsys):
    loader = make_loader(shards)
    steps_of(loader, 2)
    options = {"rows_per_step": 20, "state": json.loads(json.dumps(loader.state_dict()))}
    with pytest.raises(UserError, match="20 rows a step don't divide evenly over the 8 lanes of the run; set --total-"):
        make_loader(shards, **options)
    changed = make_loader(shards, **options, allow_mismatch=True)
    assert "belongs to rows_per_step 24, but this run has rows_per_step 20, so the data begins anew" in \
        capsys.readouterr().out
    assert steps_of(changed, 3) == steps_of(make_loader(shards, rows_per_step=20), 3)


def test_num_lanes():
    assert [choose_num_lanes(rows) for rows in (1, 6, 7, 8, 12, 24, 32, 48)] == [1, 2, 1, 8, 4, 8, 8, 8]


@pytest.mark.parametrize("rows_per_step", [16, 48, 20])
def test_sixteen_ranks_see_the_rows_of_one(shards, rows_per_step):
    world_size = 16 if rows_per_step % 16 == 0 else 20
    alone = make_loader(shards, rows_per_step=rows_per_step)
    loaders = [make_loader(shards, Ranks(rank, rank, world_size), rows_per_step=rows_per_step)
               for rank in range(world_size)]
    for _ in range(12):
        parts = [step_rows(loader) for loader in loaders]
        assert [parts[row % world_size][row // world_size] for row in range(rows_per_step)] == step_rows(alone)
    states = [loader.state_dict() for loader in loaders]
    assert merge_states(states)["lanes"] == alone.state_dict()["lanes"]


def test_a_run_keeps_the_lanes_that_it_began_with(shards):
    """Before the rule was one of the rows alone, 16 ranks chose 16 lanes."""
    begun = make_loader(shards, rows_per_step=16, num_lanes=16)
    rows = [step_rows(begun)]
    state = json.loads(json.dumps(begun.state_dict()))
    rows += [step_rows(begun), step_rows(begun)]
    resumed = make_loader(shards, rows_per_step=16, state=state)
    assert resumed.num_lanes == 16 and [step_rows(resumed), step_rows(resumed)] == rows[1:]


def test_batch_is_inputs_and_next_tokens(shards):
    batch = make_loader(shards).next_step()
    assert batch.inputs.shape == batch.targets.shape == (24, 32)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    real = batch.targets >= 0
    assert torch.equal(batch.inputs[:, 1:][real[:, :-1]], batch.targets[:, :-1][real[:, :-1]])
    assert (batch.inputs[:, 0] == BOS).all() and batch.inputs.min() >= 0
    assert (batch.inputs[:, 1:][~real[:, :-1]] == BOS).all()


def test_an_epoch_holds_every_row_once(shards):
    expected = []
    for path, idx in TextGroups(shards, BYTE_TOKENIZER, 32).places:
        docs = BYTE_TOKENIZER.encode(dataloader.read_group(path, idx), BOS)
        expected += [tuple(row) for row in pack_documents(docs, 33)[0].tolist()]
    loader = make_loader(shards, num_lanes=1, rows_per_step=1)
    rows = []
    while loader.stats["epoch"] == 0:
        batch = loader.next_step()
        pads = (batch.targets[0] == PAD).tolist()
        rows.append((BOS, *(PAD if pad else int(token) for pad, token in zip(pads, batch.targets[0], strict=True))))
    assert sorted(rows[:-1]) == sorted(expected)                     # the last row is the first of epoch 2


@pytest.mark.parametrize("packing,long_docs", [("best-fit", "split"), ("best-fit", "crop"), ("stream", "split")])
def test_all_topologies_see_the_same_rows(shards, packing, long_docs):
    alone = steps_of(make_loader(shards, packing=packing, long_docs=long_docs), 12)
    for world_size in (2, 3, 4, 6, 8, 12, 24):
        loaders = [make_loader(shards, Ranks(rank, rank, world_size), num_lanes=8, packing=packing,
                               long_docs=long_docs) for rank in range(world_size)]
        for rows in alone:
            parts = [step_rows(loader) for loader in loaders]
            assert [parts[row % world_size][row // world_size] for row in range(24)] == rows


def test_resume_is_exact_after_every_step_and_on_other_ranks(shards):
    num_steps = 16                                                   # crosses an epoch's end, see below
    loader = make_loader(shards)
    rows, states = [], [json.loads(json.dumps(loader.state_dict()))]
    for _ in range(num_steps):
        rows.append(step_rows(loader))
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert loader.stats["epoch"] >= 1 and loader.stats["repeated_groups"] > 0
    for step in range(num_steps):
        resumed = make_loader(shards, state=states[step])
        assert resumed.state_dict() == states[step]
        assert [step_rows(resumed) for _ in range(num_steps - step)] == rows[step:]
        assert resumed.state_dict() == states[-1]
        assert resumed.stats["repeated_groups"] == loader.stats["repeated_groups"]
    three = [make_loader(shards, Ranks(rank, rank, 3), state=states[5]) for rank in range(3)]
    parts = [step_rows(loader) for loader in three]
    assert [parts[row % 3][row // 3] for row in range(24)] == rows[5]
    assert merge_states([loader.state_dict() for loader in three]) == states[6]


def test_resume_tokenizes_only_the_current_groups(shards, monkeypatch):
    loader = make_loader(shards, num_lanes=2, rows_per_step=2)
    for _ in range(3):
        loader.next_step()
    state = loader.state_dict()
    reads = []
    read_group = dataloader.read_group
    monkeypatch.setattr(dataloader, "read_group", lambda *args: reads.append(args) or read_group(*args))
    make_loader(shards, num_lanes=2, rows_per_step=2, state=state).next_step()
    assert len(reads) == 2


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_change_nothing(shards, num_threads):
    plain, threaded = make_loader(shards), make_loader(shards, num_threads=num_threads)
    with threaded:
        for _ in range(12):
            assert step_rows(threaded) == step_rows(plain)
            # what was prepared ahead must not be in the state
            assert threaded.state_dict() == plain.state_dict()
            assert threaded.stats == plain.stats


def test_epochs_and_seeds_differ_in_order(shards, capsys):
    loader = make_loader(shards, num_lanes=1, rows_per_step=1)
    epochs = {0: [], 1: [], 2: []}
    while loader.stats["epoch"] < 3:
        row = step_rows(loader)[0]
        epochs.setdefault(loader.stats["epoch"], []).append(row)
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    said = [line for line in capsys.readouterr().out.splitlines() if "repeat" in line]
    assert len(said) == 3 and "epoch 2" in said[0] and "letters" in said[0]
    assert loader.stats["repeated_groups"] == 2 * 11 + 1
    other = make_loader(shards, num_lanes=1, rows_per_step=1, seed=2)
    assert [step_rows(other)[0] for _ in epochs[0]] != epochs[0]


def read_epochs(shards, seed, num_rows):
    """The targets of the rows of two epochs, in their order."""
    with make_loader(shards, num_lanes=1, rows_per_step=num_rows, seed=seed) as loader:
        epochs = [loader.next_step().targets.tolist() for _ in range(2)]
        assert loader.stats["epoch"] == 1
    return epochs


@pytest.mark.parametrize("num_groups", [1, 12])
def test_rows_and_groups_are_shuffled_anew_by_each_seed_and_in_each_epoch(tmp_path, num_groups):
    """Rows as they are packed stand by length; a group of its own shows its rows' order, rows alone that of groups."""
    texts = make_texts(np.random.default_rng(0), 40) if num_groups == 1 else ["a" * size for size in range(3, 15)]
    path = write_shard(tmp_path / "a.parquet", [texts] if num_groups == 1 else [[text] for text in texts])
    groups = [texts] if num_groups == 1 else [[text] for text in texts]
    packed = [row[1:] for group in groups for row in pack_documents(BYTE_TOKENIZER.encode(group, BOS), 33)[0].tolist()]
    shards = ShardList("letters", (path,), path, "abc")
    orders = [packed, *read_epochs(shards, 1, len(packed)), *read_epochs(shards, 2, len(packed))]
    assert all(sorted(order) == sorted(packed) for order in orders) and len(packed) > 10
    assert len({json.dumps(order) for order in orders}) == 5


def test_stats_are_those_of_the_groups_handed_out(shards):
    with make_loader(shards, num_threads=2, num_lanes=1, rows_per_step=1) as loader:
        assert set(loader.stats.values()) == {0}
        loader.next_step()
        path, idx = loader.groups.places[dataloader.order_groups(1, 0, len(loader.groups))[0]]
        first = pack_documents(BYTE_TOKENIZER.encode(dataloader.read_group(path, idx), BOS), 33)[1]
        assert loader.lanes[0].pack_stats == first and first.num_docs > 2
        assert loader.stats == first.fractions() | {"epoch": 0, "repeated_groups": 0}
        json.dumps(loader.stats)


# ---------------------------------------------------------------------------------------------------------------------
# Trouble


@pytest.mark.parametrize("changed", [{"seed": 2}, {"T": 64}, {"rows_per_step": 48}, {"packing": "stream"},
                                     {"long_docs": "crop"}, {"num_lanes": 4}])
def test_state_of_another_run_is_refused(shards, changed):
    state = make_loader(shards).state_dict()
    key, value = next(iter(changed.items()))
    with pytest.raises(UserError, match=rf"{key} {state[key]}.* {key} {value}"):
        make_loader(shards, state=state, **changed)
    with pytest.raises(UserError, match="data abc.* data xyz"):
        make_loader(replace(shards, hash="xyz"), state=state)


def test_mistakes_are_told(shards, tmp_path):
    with pytest.raises(UserError, match="24 rows a step don't divide evenly over the 5 ranks"):
        make_loader(shards, Ranks(0, 0, 5))
    with pytest.raises(UserError, match="24 rows a step don't divide evenly over the 16 lanes"):
        make_loader(shards, num_lanes=16)
    with pytest.raises(UserError, match="stream doesn't go with --long-docs crop"):
        make_loader(shards, packing="stream", long_docs="crop")
    empty = write_shard(tmp_path / "empty.parquet", [["", ""], [""]])
    with pytest.raises(UserError, match="train split of letters has no text"):
        make_loader(replace(shards, train=(empty,))).next_step()
    with pytest.raises(UserError, match="val split of letters has no text"):
        validation_batches(replace(shards, val=empty), BYTE_TOKENIZER, 32, None, ALONE)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_error_in_a_thread_names_the_shard_and_keeps_the_state(shards, monkeypatch, num_threads):
    read_group, bad = dataloader.read_group, shards.train[1]

    def read_or_fail(path, group_idx):
        if path == bad:
            raise ValueError("bad page header")
        return read_group(path, group_idx)
    monkeypatch.setattr(dataloader, "read_group", read_or_fail)
    with make_loader(shards, num_threads=num_threads) as loader:
        with pytest.raises(RuntimeError, match=r"row group \d+ of .*b\.parquet can't be made into rows: bad page"):
            for _ in range(50):
                state = loader.state_dict()
                loader.next_step()
        assert loader.state_dict() == state


def test_ctrl_c_does_not_hang(shards):
    run = subprocess.run([sys.executable, "-m", "tests.programs.loader_ctrl_c", shards.train[0]], capture_output=True,
                         text=True, cwd=REPO, timeout=60)
    assert run.returncode == 130, run.stderr
    assert time.time() - float(run.stdout.split()[-1]) < 10


def test_close_drops_what_waits(shards, monkeypatch):
    started = []
    read_group = dataloader.read_group
    monkeypatch.setattr(dataloader, "read_group",
                        lambda *args: started.append(args) or time.sleep(0.05) or read_group(*args))
    with make_loader(shards, num_threads=1) as loader:
        pass
    time.sleep(0.3)
    assert len(started) <= 1                                         # of 8 lanes
    assert not any(thread.is_alive() for thread in loader.pool._threads)


def test_connected_ranks_agree_on_the_state(shards, tmp_path):
    runs = [start_script("tests.programs.loader_state", tmp_path, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    states = [json.loads(run.communicate(timeout=60)[0].splitlines()[-1]) for run in runs]
    alone = make_loader(shards)
    alone.next_step()
    assert states[0] == states[1] == alone.state_dict()


# ---------------------------------------------------------------------------------------------------------------------
# Validation


@pytest.mark.parametrize("num_rows", [None, 1, 17])
@pytest.mark.parametrize("split", ["val", "train"])
def test_validation_rows_are_the_same_however_divided(shards, num_rows, split):
    def read(world_size: int, batch_rows: int) -> list[tuple]:
        sets = [validation_batches(shards, BYTE_TOKENIZER, 32, num_rows, Ranks(rank, rank, world_size),
                                   split).cut(batch_rows) for rank in range(world_size)]
        shapes = [[batch.inputs.shape for batch in batches] for batches in sets]
        assert all(rank_shapes == shapes[0] for rank_shapes in shapes) and len(set(shapes[0])) == 1
        assert [len(batches) for batches in sets] == [len(shapes[0])] * world_size and shapes[0][0][0] <= batch_rows
        parts = [[target for batch in batches for target in batch.targets.tolist()] for batches in sets]
        rows = [tuple(parts[i % world_size][i // world_size]) for i in range(world_size * len(parts[0]))]
        real = [row for row in rows if max(row) >= 0]
        assert len(real) == sets[0].num_rows and rows[:len(real)] == real
        return real
    reference = read(1, 4)
    assert num_rows is None or len(reference) == num_rows
    for world_size, batch_rows in ((1, 1), (1, 1000), (2, 3), (3, 8), (8, 4)):
        assert read(world_size, batch_rows) == reference


def test_the_rule_of_validation_is_the_one_of_every_earlier_figure(shards):
    """Other rows of the same text would move bits per byte by .03 to .05, and no rule's name would tell."""
    rows = validation_batches(shards, BYTE_TOKENIZER, 32, 40, ALONE).rows
    assert hashlib.sha256(rows.astype("<i4").tobytes()).hexdigest()[:16] == "f6c636671eeb969e"


def test_validation_holds_every_token_of_its_groups(shards):
    batches = validation_batches(shards, BYTE_TOKENIZER, 256, None, ALONE).cut(4)
    docs = [doc for _, idx in TextGroups(shards, BYTE_TOKENIZER, 256, split="val").places
            for doc in BYTE_TOKENIZER.encode(dataloader.read_group(shards.val, idx), BOS)]
    targets = torch.cat([batch.targets for batch in batches])
    assert torch.equal(targets, torch.cat([batch.targets for batch in batches]))     # as often as needed
    num_cropped = sum(map(len, docs)) - int((targets >= 0).sum()) - batches.num_rows
    assert 0 <= num_cropped < 0.1 * sum(map(len, docs))
    assert "T 256" in batches.rule and str(batches.num_rows) in batches.rule


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the development data isn't beside this checkout")
def test_real_text_crops_little():
    paths = sorted(REAL_DATA.glob("*.parquet"))
    shards = ShardList("pretrain_tiny", tuple(paths[:-1]), paths[-1], "abc")
    with make_loader(shards, T=512, rows_per_step=8) as loader:
        loader.next_step()
        # Bytes as tokens make rows short and groups of 256 documents leave little choice
        assert loader.stats["crop_frac"] < 0.06
