"""One rank of those that evaluate chat tasks together, MMLU without data on rank 1.

python -m tests.programs.chat_eval_rank FOLDER
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import chat_eval
from nanochat.chat_eval import AnswerSettings, Solver, evaluate_task
from nanochat.command_line import end_process
from nanochat.common import UserError, get_ranks
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import RustBPETokenizer
from tasks.catalog import get_task
from tests.helpers import make_model

folder, ranks = Path(sys.argv[1]), get_ranks()
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=ranks.rank, world_size=ranks.world_size)


def get_or_fail(name, split, words):
    if name == "MMLU" and ranks.rank == 1:
        raise UserError("this rank has no data")
    return get_task(name, split, words)


chat_eval.get_task = get_or_fail
config = GPTConfig(**json.loads((folder / "config.json").read_text()))
solver = Solver(make_model(config, torch.float64), RustBPETokenizer.from_directory(folder),
                AnswerSettings(max_new_tokens=12))
results = {}
for name in ("ARC-Easy", "GSM8K", "MMLU"):
    try:
        results[name] = evaluate_task(solver, name, max_problems=7, records_dir=folder / "records")
    except UserError as error:
        results[name] = str(error)
(folder / f"chat_{ranks.rank}.json").write_text(json.dumps(results))
dist.destroy_process_group()
end_process()
