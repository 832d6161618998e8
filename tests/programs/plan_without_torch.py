"""scripts.plan where torch can't be imported: python -m tests.programs.plan_without_torch [plan's flags]"""

import sys

sys.modules["torch"] = None
from scripts import plan  # noqa: E402

plan.main(sys.argv[1:])
