"""A save that takes a minute, and two Ctrl-C: the first is remembered, the second doesn't wait for the save."""

import time

from nanochat import checkpoint_manager, run
from nanochat.checkpoint_manager import Checkpointer, get_run_dir
from nanochat.command_line import run_script
from tests import helpers


def train(argv):
    with run.StopSignal() as stop, Checkpointer(get_run_dir("base", "d2")) as saver:
        saver.save(2, model, optimizer, helpers.make_meta(optimizer))
        print("saving", flush=True)
        while not stop.signum:
            time.sleep(0.01)
        print("stopping", flush=True)
        saver.wait()


run.ECHO_SEC = 0
model, optimizer = helpers.make_trained()
helpers.save_run(steps=(1,))
checkpoint_manager.save_file = lambda *args: time.sleep(60)
run_script(train)
