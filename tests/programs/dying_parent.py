"""Starts a child that sleeps, and is killed before it ends: python -m tests.programs.dying_parent"""

import os
import signal
import subprocess

from dev.links import end_with_parent

subprocess.Popen(["sleep", "300"], preexec_fn=end_with_parent)
os.kill(os.getpid(), signal.SIGKILL)
