"""Import the library, which changes nothing here, then the scripts: python -m tests.programs.import_library"""

import os
import sys

before = dict(os.environ), sys.excepthook

import nanochat.common  # noqa: E402, F401

assert (dict(os.environ), sys.excepthook) == before

import scripts  # noqa: E402, F401

assert os.environ["GOMP_SPINCOUNT"] == "600" and sys.excepthook != before[1]
