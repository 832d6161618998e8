"""scripts.plan where no package is installed: python -m tests.programs.plan_without_torch [plan's flags]"""

import sys

for name in ("torch", "numpy", "pyarrow", "requests", "filelock"):
    sys.modules[name] = None
from scripts import plan  # noqa: E402

plan.main(sys.argv[1:])
