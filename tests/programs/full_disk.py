"""Save step 2 on a disk of which all but 100 KB are taken: python -m tests.programs.full_disk DISK"""

import os
import shutil
import sys

from nanochat import checkpoint_manager as checkpoints
from nanochat.command_line import run_script
from nanochat.tokenizer import get_tokenizer_dir
from tests import helpers


def save_on_full_disk(argv):
    (run_dir / "filling").write_bytes(bytes(shutil.disk_usage(run_dir).free - 100_000))
    helpers.save_run(steps=(2,))


os.environ["NANOCHAT_BASE_DIR"] = sys.argv[1]
helpers.BYTE_TOKENIZER.save(get_tokenizer_dir())
run_dir = helpers.save_run(steps=(1,))
try:
    run_script(save_on_full_disk)
finally:
    step = checkpoints.load_model("base", helpers.CPU)[2]["step"]
    print(sorted(path.name for path in run_dir.iterdir()), step)
