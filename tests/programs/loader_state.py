"""One rank of two: print the loader's state after a step. python -m tests.programs.loader_state FOLDER"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from nanochat.command_line import end_process
from nanochat.common import get_ranks
from nanochat.shards import ShardList
from tests.data_helpers import make_loader

ranks, folder = get_ranks(), Path(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=ranks.rank, world_size=ranks.world_size)
shards = ShardList("letters", (folder / "shard_00000.parquet", folder / "b.parquet"), folder / "val.parquet", "abc")
loader = make_loader(shards, ranks)
loader.next_step()
sys.stdout.write(json.dumps(loader.state_dict()) + "\n")
sys.stdout.flush()
dist.destroy_process_group()
end_process()
