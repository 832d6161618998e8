"""Text and conversations -> packed rows -> Batch: lanes fix the order of the rows, threads tokenize and pack ahead.

The order of the data is a pure function: rows = f(seed, epoch, group), where a group (of text: a parquet row group; of
conversations: 1,024 of them) is tokenized and packed on its own. Groups, permuted anew in every epoch, form one endless
list whose n-th group goes to lane n % L; row j of a step is the next row of lane j % L, and rank r takes the rows j
with j % world == r. So every topology sees the same rows at every step, and a place in the data is three integers per
lane.

B rows, T tokens a row feeds to the model (a packed row holds T+1), R rows of a group, L lanes.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch

from nanochat.common import Ranks, UserError, count_cpus, gather, print0, sum_over_ranks, timed
from nanochat.packing import PAD, PackStats, hide, pack_documents, pack_whole
from nanochat.shards import ShardList, count_groups, read_group
from nanochat.train import Batch

MAX_LANES  = 8      # a power of two. More ranks share lanes, and each tokenizes and packs all groups of its own
PACKINGS   = {"best-fit": ("split", "crop"), "stream": ("split",)}   # each with the long_docs that it can do
GROUP_SIZE = 1024   # conversations of a group
MAX_HASHED = 1024   # conversations, evenly spread, that identify a list; hashing all of it would take minutes


class Groups:
    """A list of groups of texts or conversations. Each group is packed into rows on its own.

    identity: all that the rows follow from, as JSON can store it
    empty:    the error where no group has a row: what is wrong and what to do

    A subclass has a length, its number of groups, and load_rows(group), which returns the group's rows (R, T+1) and
    PackStats, always the same, and is called in threads.
    """

    def __init__(self, name: str, tokenizer, T: int, identity: dict, empty: str):
        self.name, self.tokenizer, self.T, self.identity, self.empty = name, tokenizer, T, identity, empty
        self.bos_id = tokenizer.get_bos_token_id()


class TextGroups(Groups):
    """The parquet row groups of a dataset's training or validation files."""

    def __init__(self, shards: ShardList, tokenizer, T: int, *, split: str = "train", packing: str = "best-fit",
                 long_docs: str = "split", keep_tail: bool = False):
        if long_docs not in PACKINGS.get(packing, ()):
            raise UserError(f"--packing {packing} doesn't go with --long-docs {long_docs}; choose best-fit with split "
                            "or crop, or stream with split")
        options = {"packing": packing, "long_docs": long_docs}
        super().__init__(shards.name, tokenizer, T, {"data": shards.hash, "T": T} | options,
                         f"the {split} split of {shards.name} has no text; make it again: python -m nanochat.dataset")
        self.pack = partial(pack_documents, row_tokens=T + 1, keep_tail=keep_tail, **options)
        paths = (shards.val,) if split == "val" else shards.train
        self.places = [(path, idx) for path in paths for idx in range(count_groups(path))]

    def __len__(self) -> int:
        return len(self.places)

    def load_rows(self, group: int) -> tuple[np.ndarray, PackStats]:
        path, group_idx = self.places[group]
        try:
            return self.pack(self.tokenizer.encode(read_group(path, group_idx), prepend=self.bos_id, num_threads=1))
        except UserError:
            raise
        except Exception as error:
            raise RuntimeError(f"row group {group_idx} of {path} can't be made into rows: {error}") from error


class ConversationGroups(Groups):
    """Groups of a list of conversations, such as a task or a mixture of tasks. What the assistant writes is learned.

    keep_whole: no conversation is cropped: one longer than T+1 tokens is truncated, rows are filled with padding.
                Otherwise as text with long_docs 'crop': rows are filled up, and some conversations lose their end
    """

    def __init__(self, name: str, conversations: Sequence[dict], tokenizer, T: int, *, keep_whole: bool):
        # "supervise" was an option; the key stays, so that runs of before continue or are refused
        super().__init__(name, tokenizer, T, {"data": hash_conversations(conversations), "T": T,
                                              "supervise": "assistant", "keep_whole": keep_whole},
                         f"there is nothing to learn in {name}: no answer of weight 1 begins within {T} tokens")
        self.conversations = conversations
        self.pack = pack_whole if keep_whole else partial(pack_documents, long_docs="crop")

    def __len__(self) -> int:
        return -(-len(self.conversations) // GROUP_SIZE)

    def load_rows(self, group: int) -> tuple[np.ndarray, PackStats]:
        docs = []    # all tokens of each conversation, those not to be learned hidden
        for idx in range(group * GROUP_SIZE, min((group + 1) * GROUP_SIZE, len(self.conversations))):
            conversation = self.conversations[idx]
            try:
                ids, mask = self.tokenizer.render_conversation(conversation, max_tokens=None)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"a conversation of {self.name} can't be learned from: {error}; it begins "
                                f"{json.dumps(conversation, ensure_ascii=False, default=str)[:100]}") from None
            docs.append([token if learned else hide(token) for token, learned in zip(ids, mask, strict=True)])
        # Tokens beyond a row are cut off, so an answer that begins there can't be learned
        useful = [doc for doc in docs if max(doc[1:self.T + 1], default=-1) >= 0]
        rows, stats = self.pack(useful, self.T + 1)
        num_docs, num_tokens = len(docs) - len(useful), sum(map(len, docs)) - sum(map(len, useful))
        return rows, stats + PackStats(in_tokens=num_tokens, piece_tokens=num_tokens, num_docs=num_docs,
                                       skipped_docs=num_docs)


def hash_conversations(conversations: Sequence[dict]) -> str:
    """16 hex digits that tell one list from another by its length and MAX_HASHED of its conversations."""
    digest, num = hashlib.sha256(str(len(conversations)).encode()), len(conversations)
    for i in range(min(num, MAX_HASHED)):
        conversation = conversations[i * num // min(num, MAX_HASHED)]
        digest.update(json.dumps(conversation, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def make_batch(rows: np.ndarray, bos_id: int, pin_memory: bool = False) -> Batch:
    """Rows (B, T+1) to inputs and next-token targets (B, T); padding reads bos, hidden tokens are no targets."""
    tokens = np.where(rows < PAD, hide(rows), np.where(rows == PAD, bos_id, rows))
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64))
    targets = torch.from_numpy(np.maximum(rows[:, 1:], PAD).astype(np.int64))
    if pin_memory:
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return Batch(inputs, targets, None)


def choose_num_lanes(rows_per_step: int) -> int:
    """The largest power of two up to MAX_LANES that divides the rows of a step: a rule without the ranks in it."""
    return math.gcd(rows_per_step, MAX_LANES)


@lru_cache(maxsize=4)
def order_groups(seed: int, epoch: int, num_groups: int) -> np.ndarray:
    """The order of the groups in one epoch, (num_groups,)."""
    return make_generator(seed, epoch, 0).permutation(num_groups)


def make_generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    """A generator seeded by these three alone; stream 0 orders an epoch's groups, 1 + g the rows of group g."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, stream]))


@dataclass
class Lane:
    """One of the L sequences of groups that a step draws from."""
    serial: int                                            # index of the open group in the endless list of groups
    row:    int                                            # rows of that group handed out so far
    pack_stats: PackStats                                  # of all groups opened so far
    is_counted: bool                                       # a saved state's pack_stats include the open group
    rows:   np.ndarray | None = None                       # (R, T+1) of that group; None until the first is needed
    ahead:  Callable[[], tuple[np.ndarray, PackStats]] | None = None   # the result of the group to open next


@dataclass(frozen=True)
class RowOrder:
    """All that the order of a run's rows follows from, besides the groups."""
    rows_per_step:  int                # of all ranks together
    seed:           int
    num_lanes:      int | None = None  # None: the state's, else chosen. With one, an epoch ends before the next begins
    num_epochs:     int | None = None  # after so many epochs all rows are padding; needs one lane
    allow_mismatch: bool = False       # a state of another order starts the data anew instead of raising UserError


class TrainLoader(contextlib.AbstractContextManager):
    """Endless training rows, one whole optimizer step at a time; the next group of each lane is prepared in threads.

    state:       from `state_dict`, of any number of ranks; the rows continue exactly there
    num_threads: read, tokenize and pack ahead; 0: the caller does it, when a row is needed

    Its threads end with its context: none prepares a group when the process ends.
    """

    def __init__(self, groups: Groups, order: RowOrder, ranks: Ranks, *, state: dict | None = None,
                 num_threads: int | None = None, pin_memory: bool = False):
        rows_per_step, seed, num_lanes, num_epochs = order.rows_per_step, order.seed, order.num_lanes, order.num_epochs
        if num_lanes is None:
            num_lanes = state["num_lanes"] if state else choose_num_lanes(rows_per_step)
            if rows_per_step % num_lanes and order.allow_mismatch:    # another batch: the data begins anew below
                num_lanes = choose_num_lanes(rows_per_step)
        for count, what in ((ranks.world_size, "ranks"), (num_lanes, "lanes of the run")):
            if rows_per_step % count:
                raise UserError(f"{rows_per_step} rows a step don't divide evenly over the {count} {what}; "
                                f"set --total-batch-size to a multiple of {count} x {groups.T} tokens")
        if num_epochs is not None and num_lanes != 1:
            raise ValueError("lanes reach the end of an epoch at different steps")
        if not len(groups):
            raise UserError(groups.empty)
        self.groups, self.T, self.ranks, self.seed, self.pin_memory = groups, groups.T, ranks, seed, pin_memory
        self.end = math.inf if num_epochs is None else num_epochs * len(groups)   # of the list of groups
        self.identity = groups.identity | {"seed": seed, "rows_per_step": rows_per_step, "num_lanes": num_lanes}
        other = next((key for key, ours in self.identity.items() if state and state.get(key) != ours), None)
        if other:
            sides = f"the saved position in the data belongs to {other} {state.get(other)}, but this run has {other} " \
                    f"{self.identity[other]}"
            if not order.allow_mismatch:
                raise UserError(f"{sides}; continue with the saved setting or start a new run")
            print0(f"warning: {sides}, so the data begins anew (--allow-mismatch)")
            state = None
        self.num_lanes, self.rows_per_step = num_lanes, rows_per_step
        self.lanes: dict[int, Lane] = {}                   # those that this rank's rows come from
        for idx in sorted({row % num_lanes for row in range(ranks.rank, rows_per_step, ranks.world_size)}):
            epoch, ordinal, row = state["lanes"][idx] if state else (0, idx, 0)
            pack_stats = PackStats(*state["pack_stats"][idx]) if state else PackStats()
            self.lanes[idx] = Lane(epoch * len(groups) + ordinal, row, pack_stats, is_counted=pack_stats.num_docs > 0)
        self.epoch = max(map(self._get_epoch, self.lanes.values())) if state else 0
        self.empty_groups: set[int] = set()
        self.places = self.places_before = self._get_places()
        if num_threads is None:
            num_threads = max(1, min(4, count_cpus() // (2 * ranks.world_size)))
        self.pool = ThreadPoolExecutor(num_threads, "loader") if num_threads else None
        for lane in self.lanes.values():
            lane.ahead = self._prepare(lane.serial)

    def next_step(self) -> Batch:
        """This rank's rows of the next optimizer step, (rows_per_step / world, T) on the CPU."""
        L, world, rank = self.num_lanes, self.ranks.world_size, self.ranks.rank
        rows = np.empty((self.rows_per_step // world, self.T + 1), np.int32)
        for idx, lane in self.lanes.items():
            step_rows = np.arange(idx, self.rows_per_step, L)              # the lane's rows of the step
            mine = step_rows % world == rank
            rows[step_rows[mine] // world] = self._take_rows(lane, len(step_rows))[mine]
        self.places_before, self.places = self.places, self._get_places()
        return make_batch(rows, self.groups.bos_id, self.pin_memory)

    def give_back(self) -> None:
        """Undo `next_step` in the state: nothing was learned from that step, so a resumed run begins with it."""
        self.places = self.places_before

    def state_dict(self) -> dict:
        """The position after the last step, as JSON can store it: [epoch, group of the epoch, row] of each lane.
        Collective: all ranks call it, since a rank knows only the lanes of its own rows."""
        places = (self.places if self.ranks.world_size == 1 else np.max(gather(self.places), axis=0)).tolist()
        return self.identity | {"lanes": [place[:3] for place in places], "pack_stats": [place[3:] for place in places]}

    @property
    def stats(self) -> dict[str, float | int]:
        """For the metrics: losses in packing of the groups that this rank opened, the epoch, repeated groups."""
        beyond = [min(lane.serial, self.end - 1) - len(self.groups) for lane in self.lanes.values()]
        repeated_groups = sum(count // self.num_lanes + 1 for count in beyond if count >= 0)
        pack_stats = sum((lane.pack_stats for lane in self.lanes.values()), PackStats())
        return pack_stats.fractions() | {"epoch": self.epoch, "repeated_groups": repeated_groups}

    def __exit__(self, *_) -> None:
        """Stop preparing groups: drop those that wait; each thread ends after its current one."""
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def _get_epoch(self, lane: Lane) -> int:
        """The epoch of the lane's group; padding after the last epoch belongs to that one."""
        return min(lane.serial, self.end - 1) // len(self.groups)

    def _get_places(self) -> np.ndarray:
        """(L, 3 + 8) int64: epoch, group of the epoch, row and pack_stats of each lane; -1 for lanes of other ranks."""
        places = np.full((self.num_lanes, 3 + len(astuple(PackStats()))), -1, np.int64)
        for idx, lane in self.lanes.items():
            places[idx] = *divmod(lane.serial, len(self.groups)), lane.row, *astuple(lane.pack_stats)
        return places

    def _take_rows(self, lane: Lane, num_rows: int) -> np.ndarray:
        """The lane's next rows, (num_rows, T+1), from one or more groups."""
        parts = []
        while num_rows:
            if lane.rows is not None and lane.row >= len(lane.rows):
                lane.serial, lane.row, lane.rows = lane.serial + self.num_lanes, 0, None
            if lane.rows is None:
                self._open_group(lane)
            parts.append(lane.rows[lane.row:lane.row + num_rows])
            lane.row, num_rows = lane.row + len(parts[-1]), num_rows - len(parts[-1])
        return np.concatenate(parts)

    def _open_group(self, lane: Lane) -> None:
        """Wait for the lane's group, start preparing the one after it, and count its statistics."""
        lane.rows, pack_stats = lane.ahead()
        lane.ahead = self._prepare(lane.serial + self.num_lanes)
        lane.pack_stats, lane.is_counted = lane.pack_stats + (PackStats() if lane.is_counted else pack_stats), False
        if len(lane.rows) == 0:
            self.empty_groups.add(self._find_group(lane.serial)[1])
            if len(self.empty_groups) == len(self.groups):
                raise UserError(self.groups.empty)
        if (epoch := self._get_epoch(lane)) > self.epoch:
            self.epoch = epoch
            print0(f"data: all {len(self.groups)} groups of {self.groups.name} were begun, they repeat from here "
                   f"(epoch {self.epoch + 1})")

    def _prepare(self, serial: int) -> Callable[[], tuple[np.ndarray, PackStats]]:
        """Start loading a group of the endless list; the result waits for its rows."""
        return self.pool.submit(self._load_group, serial).result if self.pool else partial(self._load_group, serial)

    def _find_group(self, serial: int) -> tuple[int, int]:
        """Epoch and group at an index of the endless list."""
        epoch, ordinal = divmod(serial, len(self.groups))
        return epoch, int(order_groups(self.seed, epoch, len(self.groups))[ordinal])

    def _load_group(self, serial: int) -> tuple[np.ndarray, PackStats]:
        """The rows (R, T+1) of a group of the endless list, in the order they are handed out. Runs in a thread."""
        if serial >= self.end:
            return np.full((self.rows_per_step, self.T + 1), PAD, np.int32), PackStats()
        epoch, group = self._find_group(serial)
        rows, pack_stats = self.groups.load_rows(group)
        return rows[make_generator(self.seed, epoch, 1 + group).permutation(len(rows))], pack_stats


@dataclass(frozen=True)
class Epoch:
    """The rows of one pass over all groups, and what packing did to the conversations."""
    num_rows: int
    stats:    PackStats

    def to_json(self) -> dict:
        return {"num_rows": self.num_rows, "stats": astuple(self.stats)}

    @staticmethod
    def from_json(value: dict) -> "Epoch":
        return Epoch(value["num_rows"], PackStats(*value["stats"]))

    def describe(self) -> dict[str, float]:
        """For the metrics: counts, and the losses as fractions."""
        return {"num_conversations": self.stats.num_docs, "num_rows": self.num_rows,
                "num_shortened": self.stats.cropped_docs, "num_skipped_conversations": self.stats.skipped_docs,
                **self.stats.fractions()}


def count_epoch(groups: ConversationGroups, ranks: Ranks) -> Epoch:
    """Pack all groups once: counts the rows and checks every conversation. Collective: all ranks call it."""
    num_threads = max(1, count_cpus() // ranks.world_size)
    with timed(f"packing {len(groups.conversations):,} conversations"), ThreadPoolExecutor(num_threads) as pool:
        packed = pool.map(groups.load_rows, range(ranks.rank, len(groups), ranks.world_size))
        sums = sum((np.array([len(rows), *astuple(stats)]) for rows, stats in packed),
                   np.zeros(1 + len(astuple(PackStats())), np.int64))
    num_rows, *sums = sum_over_ranks(torch.from_numpy(sums)).tolist()
    if not num_rows:
        raise UserError(groups.empty)
    stats = PackStats(*sums)
    print0(f"conversations: {stats.num_docs:,} an epoch, in {num_rows:,} rows of {groups.T} tokens; "
           f"{stats.cropped_docs:,} shortened ({stats.fractions()['crop_frac']:.2%} of the tokens), "
           f"{stats.skipped_docs:,} with nothing to learn, padding {stats.fractions()['pad_frac']:.2%}")
    return Epoch(num_rows, stats)


@dataclass(frozen=True)
class ValidationBatches:
    """This rank's part of a fixed set of rows to evaluate. Each iteration gives all Batches again.

    Every rank gives equally many batches of the same shape, so that collectives on them can't deadlock; missing rows
    are filled up with padding, whose targets are ignored.
    """
    rows:       np.ndarray   # (rows, T+1) int32, as many on each rank
    batch_rows: int
    num_rows:   int          # real rows, all ranks together
    rule:       str          # how the rows were made; a bpb is comparable under the same rule only
    bos_id:     int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_rows)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), self.batch_rows):
            yield make_batch(pad_rows(self.rows[start:start + self.batch_rows], self.batch_rows), self.bos_id)

    def cut(self, batch_rows: int) -> "ValidationBatches":
        """The same rows in batches of `batch_rows`, or fewer where there are fewer rows."""
        return replace(self, batch_rows=min(batch_rows, len(self.rows)))


def validation_batches(shards: ShardList, tokenizer, T: int, num_rows: int | None, ranks: Ranks,
                       split: str = "val") -> ValidationBatches:
    """The first `num_rows` rows (None: all) of the 'val' or 'train' split as one batch, the same for any ranks, by one
    rule, whatever the training uses: the rule alone moves bpb by 0.03-0.05."""
    rule = f"{split} split, best-fit, long documents split, last rows padded"
    groups = TextGroups(shards, tokenizer, T, split=split, keep_tail=True)
    batches, _ = take_first_rows(groups, num_rows, rule, ranks)
    if batches is None:
        raise UserError(groups.empty)
    return batches


def validation_conversations(name: str, conversations: Sequence[dict], tokenizer, T: int, num_rows: int,
                             ranks: Ranks) -> ValidationBatches | None:
    """A fixed set of held-out conversations as one batch, by one rule for all stages; None where none can be scored."""
    rule = f"held-out conversations of {name}; what the assistant writes; whole, truncated to the context, padded"
    groups = ConversationGroups(name, conversations, tokenizer, T, keep_whole=True)
    batches, stats = take_first_rows(groups, num_rows, rule, ranks)
    if stats.skipped_docs:
        print0(f"validation: {stats.skipped_docs:,} of {stats.num_docs:,} held-out conversations have no answer to "
               f"score within {T} tokens" + ("" if batches else "; so there is no validation"))
    return batches


def take_first_rows(groups: Groups, num_rows: int | None, rule: str,
                    ranks: Ranks) -> tuple[ValidationBatches | None, PackStats]:
    """(the first `num_rows` rows, None: all, of the groups in their order; what packing did to the groups read).

    Each group is shuffled in one fixed way: else a part of it would be its longest documents. Row i of the set goes to
    rank i % world. None instead of the rows where there are none.
    """
    parts, all_stats = [], PackStats()
    for group in range(len(groups)):
        if num_rows is None or sum(map(len, parts)) < num_rows:
            group_rows, stats = groups.load_rows(group)
            parts.append(group_rows[make_generator(0, 0, 1 + group).permutation(len(group_rows))])
            all_stats += stats
    if not any(map(len, parts)):
        return None, all_stats
    rows = np.concatenate(parts)[:num_rows]
    rank_rows = -(-len(rows) // ranks.world_size)
    return ValidationBatches(pad_rows(rows[ranks.rank::ranks.world_size], rank_rows), rank_rows, len(rows),
                             f"{rule}, T {groups.T}, {len(rows)} rows", groups.bos_id), all_stats


def pad_rows(rows: np.ndarray, num_rows: int) -> np.ndarray:
    """Rows of padding after `rows`, (num_rows, T+1) in all."""
    return np.pad(rows, ((0, num_rows - len(rows)), (0, 0)), constant_values=PAD)
