"""A disk with step 1 on it becomes read-only: before the next process, or while this one trains.

    python -m tests.programs.read_only_disk DISK
"""

import os
import subprocess
import sys

from nanochat import checkpoint_manager as checkpoints
from nanochat.command_line import run_script
from nanochat.tokenizer import get_tokenizer_dir
from tests import helpers

os.environ["NANOCHAT_BASE_DIR"] = sys.argv[1]
helpers.BYTE_TOKENIZER.save(get_tokenizer_dir())
run_dir = helpers.save_run(steps=(1,))
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
for begin in (lambda argv: checkpoints.locked_run(run_dir).__enter__(), lambda argv: helpers.save_run(steps=(2,))):
    try:
        run_script(begin)
    except SystemExit as ending:
        print(ending.code, checkpoints.load_model("base", helpers.CPU)[2]["step"])
