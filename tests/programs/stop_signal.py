"""A script that waits for a signal, saves, and ends: python -m tests.programs.stop_signal"""

import time

from nanochat.common import run_script
from nanochat.run import StopSignal


def main(argv):
    with StopSignal() as stop:
        print("ready", flush=True)
        while not stop.signum:
            time.sleep(0.01)
        print("saved", flush=True)
        stop.end()


run_script(main)
