"""A loader that is interrupted while a thread of it tokenizes: python -m tests.programs.loader_ctrl_c SHARD"""

import sys
import time
from pathlib import Path

from nanochat.common import Ranks, run_script
from nanochat.dataloader import RowOrder, TextGroups, TrainLoader
from nanochat.shards import ShardList
from tests.loader_helpers import ByteTokenizer


class SlowTokenizer(ByteTokenizer):
    def encode(self, texts, prepend, num_threads):
        time.sleep(0.1)
        return super().encode(texts, prepend, num_threads)


def main(argv):
    shards = ShardList("letters", (Path(sys.argv[1]),), Path(sys.argv[1]), "abc")
    loader = TrainLoader(TextGroups(shards, SlowTokenizer(), T=32), RowOrder(rows_per_step=8, seed=0), Ranks(),
                         num_threads=1)
    loader.next_step()
    print("stepped", time.time(), flush=True)
    raise KeyboardInterrupt


run_script(main)
