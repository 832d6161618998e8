"""A loader that is interrupted while a thread of it tokenizes: python -m tests.programs.loader_ctrl_c SHARD"""

import sys
import time
from pathlib import Path

from nanochat.command_line import run_script
from nanochat.common import Ranks
from nanochat.dataloader import RowOrder, TextGroups, TrainLoader
from nanochat.shards import ShardList
from tests.helpers import BYTE_TOKENIZER

encode = BYTE_TOKENIZER.encode


def encode_slowly(*args, **options):
    time.sleep(0.1)
    return encode(*args, **options)


def main(argv):
    shards = ShardList("letters", (Path(sys.argv[1]),), Path(sys.argv[1]), "abc")
    loader = TrainLoader(TextGroups(shards, BYTE_TOKENIZER, T=32), RowOrder(rows_per_step=8, seed=0), Ranks(),
                         num_threads=1)
    loader.next_step()
    print("stepped", time.time(), flush=True)
    raise KeyboardInterrupt


BYTE_TOKENIZER.encode = encode_slowly
run_script(main)
