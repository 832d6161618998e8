"""Two ranks, forks of one process; from step 2 on rank 1's disk is full, or it stalls.

    python -m tests.programs.two_rank_save PORT full|stalled
"""

import errno
import os
import sys
import time

import torch

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import Checkpointer, get_run_dir
from nanochat.command_line import run_script
from nanochat.devices import init_compute
from nanochat.train import train_step
from tests import helpers


def fill_disk(tensors, path, metadata):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def stall(tensors, path, metadata):
    time.sleep(8)


def train(argv):
    _, ranks = init_compute("cpu")
    model, optimizer = helpers.make_trained()
    with Checkpointer(get_run_dir("base", "d2")) as saver:
        saver.save(1, model, optimizer, helpers.make_meta(optimizer))
        saver.wait()
        if ranks.rank == 1:
            checkpoint_manager.save_file = fill_disk if problem == "full" else stall
        saver.save(2, model, optimizer, helpers.make_meta(optimizer))
        for step in range(10**4):
            saver.due(step, stopping=False, evaluating=False)
            train_step(model, optimizer, helpers.make_batch(step), 4)


port, problem = sys.argv[1:]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
if problem == "stalled":
    os.environ["NANOCHAT_TIMEOUT_SEC"] = "3"
torch.set_num_threads(1)
children = []
for rank in range(2):
    children.append(os.fork())
    if not children[-1]:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        run_script(train)
        os._exit(4)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
