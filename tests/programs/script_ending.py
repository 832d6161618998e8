"""A script that ends as it is told: python -m tests.programs.script_ending error|ctrl_c|full_disk|bug"""

import sys

from nanochat.command_line import run_script
from nanochat.common import UserError


def main(argv):
    ending = sys.argv[1]
    if ending == "error":
        raise UserError("no data here")
    if ending == "ctrl_c":
        raise KeyboardInterrupt
    if ending == "full_disk":
        with open("/dev/full", "w") as file:
            file.write("x" * 10**6)
    raise ValueError("a bug")


run_script(main)
