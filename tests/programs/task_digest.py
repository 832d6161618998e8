"""Print the digest of the generated tasks, in a process of its own: python -m tests.programs.task_digest"""

import sys

from tests.task_helpers import digest, make_tasks

sys.stdout.write(digest(make_tasks("train")) + "\n")
