"""The laboratory: results of sweeps and their figures, benchmarks, checks.

Importing nanochat first sets OpenMP's defaults before torch is loaded.
"""

import nanochat  # noqa: F401
