"""Stands in for the package where a script is started as a file: python scripts/base_train.py

Python then looks for modules beside that file instead of in the repository, and finds this one. It starts the script
again as the README does, python -m scripts.base_train, in the same process.
"""

import runpy
import sys
from pathlib import Path

del sys.modules["nanochat"]
sys.path[0] = str(Path(__file__).resolve().parents[1])
runpy.run_module(f"scripts.{Path(sys.argv[0]).stem}", run_name="__main__", alter_sys=True)
sys.exit()
