"""Save steps 1 and 2, then fork children that save STEP and die of SIGKILL just before their n-th call into the file
system; the state after each is checked by a fresh load and printed as a line of JSON.

    python -m tests.programs.kill_save STEP
"""

import json
import os
import shutil
import signal
import sys

import torch

from nanochat import checkpoint_manager as checkpoints
from nanochat import common
from tests import helpers


def die_before(n):
    calls = iter(range(10**6))

    def wrap(function):
        def call(*args, **kwargs):
            if next(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for module, name in ((checkpoints, "save_file"), (common, "write_atomic"), (common, "hash_file"),
                         (common, "sync_folder"), (os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")):
        setattr(module, name, wrap(getattr(module, name)))


torch.set_num_threads(1)
saved_step = int(sys.argv[1])
run_dir = helpers.save_run(steps=(1, 2))
model, optimizer = helpers.make_trained(num_steps=saved_step)
meta = helpers.make_meta(optimizer)
expected = {step: helpers.make_trained(num_steps=step)[0] for step in (1, 2, 3)}
status, n = None, 0
while status != 0:
    backup = run_dir.with_name("backup")
    shutil.copytree(run_dir, backup)
    if not os.fork():
        die_before(n)
        checkpoints.save_checkpoint(run_dir, saved_step, model, optimizer, meta, keep_last=2)
        os._exit(0)
    status = os.wait()[1]
    try:
        step = checkpoints.find_step(run_dir)
        loaded = checkpoints.load_model("base", helpers.CPU)[0]
        helpers.assert_same_weights(loaded, expected[step])
        print(json.dumps({"n": n, "status": status, "step": step}))
    except Exception as error:
        print(json.dumps({"n": n, "status": status, "error": repr(error)}))
    shutil.rmtree(run_dir)
    backup.rename(run_dir)
    n += 1
