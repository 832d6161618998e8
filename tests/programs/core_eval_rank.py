"""One rank of those that evaluate CORE together: python -m tests.programs.core_eval_rank FOLDER"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.command_line import end_process
from nanochat.common import UserError, get_ranks
from nanochat.loss_eval import evaluate_core
from nanochat.tokenizer import RustBPETokenizer
from tests.eval_helpers import CORE_CONFIG
from tests.helpers import make_model

folder, ranks = Path(sys.argv[1]), get_ranks()
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=ranks.rank, world_size=ranks.world_size)
bundle = "nowhere" if ranks.rank == 1 and (folder / "lacks_bundle").exists() else "bundle"
try:
    core = evaluate_core(make_model(CORE_CONFIG, torch.float64), RustBPETokenizer.from_directory(folder),
                         max_per_task=9, bundle_dir=folder / bundle)
except UserError as error:
    core = str(error)
(folder / f"core_{ranks.rank}.json").write_text(json.dumps(core))
dist.destroy_process_group()
end_process()
