"""A script that waits for a signal, saves, and ends: python -m tests.programs.stop_signal [FILE: saved to, not said]"""

import sys
import time
from pathlib import Path

from nanochat.command_line import run_script
from nanochat.common import print0
from nanochat.run import StopSignal


def main(argv):
    with StopSignal() as stop:
        print0("ready")
        while not stop.signum:
            time.sleep(0.01)
        print0("saved")
        for path in sys.argv[1:]:
            Path(path).write_text("saved", encoding="utf-8")
        stop.end()


run_script(main)
