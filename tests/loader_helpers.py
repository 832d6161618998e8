"""What the tests of the loader and their programs share: bytes as tokens, and a loader of text."""

from nanochat.common import Ranks
from nanochat.dataloader import Groups, RowOrder, TextGroups, TrainLoader
from nanochat.shards import ShardList

BOS = 256
ALONE = Ranks()


class ByteTokenizer:
    """Bytes as tokens: enough to follow every token through the loader."""

    def get_bos_token_id(self) -> int:
        return BOS

    def encode(self, texts: list[str], prepend: int, num_threads: int) -> list[list[int]]:
        return [[prepend, *text.encode()] for text in texts]


def make_loader(shards: ShardList, ranks: Ranks = ALONE, **options) -> TrainLoader:
    group_options = {key: options.pop(key) for key in ("packing", "long_docs") if key in options}
    groups = TextGroups(shards, ByteTokenizer(), options.pop("T", 32), **group_options)
    return order_rows(groups, ranks, {"rows_per_step": 24, "seed": 1} | options)


def order_rows(groups: Groups, ranks: Ranks, options: dict) -> TrainLoader:
    """A loader whose options are those of RowOrder and its own, by default without threads."""
    order = {key: value for key, value in options.items() if key in RowOrder.__dataclass_fields__}
    return TrainLoader(groups, RowOrder(**order), ranks, **({"num_threads": 0} | {
        key: value for key, value in options.items() if key not in order}))
