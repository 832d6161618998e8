"""nanochat: from raw text to a chat model of your own, on whatever hardware you have."""

import os
import sys

# The one thing that must happen at import, and before torch is loaded, which is when OpenMP reads this. Workers that
# spin while they wait slow a step 3 times down beside one busy process; workers that sleep at once cost a tenth of a
# step where nothing else runs. A short spin has the best of both (dev/LOG.md, 2026-11-21).
SPIN_COUNT = "600"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def _report_exception(kind, error, trace) -> None:
    """Loading torch takes seconds in which no script can catch Ctrl-C yet."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _report_exception
