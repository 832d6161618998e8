"""A run of RL in a process of its own: python -m tests.programs.rl_run TAG [FLAGS OF chat_rl ...]"""

import sys

from tests.rl_helpers import train

train(*sys.argv[1:])
