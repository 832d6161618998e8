"""torch.compile where it works and pays, eager with one printed line where it doesn't."""

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from nanochat.common import UserError, print0

COMPILE_SEC = 40          # what a cold compilation takes, and the part of an eager run that it saves: measured at
COMPILE_SAVING = 0.4      # depths 4 to 6 on two cores (dev/LOG.md, 2026-11-21)
_compile_kernels = False


def set_compile_kernels(enabled: bool) -> None:
    """Whether functions marked @fused run compiled from now on; off at start, since compiling takes seconds."""
    global _compile_kernels
    _compile_kernels = enabled
    if not enabled:
        return
    # torch goes on eagerly, unsaid, after 8 variants: two kinds of blocks and a first one, two windows, with gradients
    # and without, whole batches and the rest of one; with --seq-len-warmup, the first of these for every length of rows
    torch._dynamo.config.recompile_limit = 128


def choose_compile(wanted: str, device: torch.device, eager_sec: float | None) -> tuple[bool, str]:
    """Whether to compile the model, and why; `wanted` is auto, on or off.

    eager_sec: what the run would take without compiling, None if nobody knows
    """
    if wanted == "off" or wanted == "auto" and device.type not in ("cpu", "cuda", "xpu"):
        return False, "asked for" if wanted == "off" else f"not known to pay on {device.type}"
    if wanted == "auto" and eager_sec is not None and eager_sec * COMPILE_SAVING < COMPILE_SEC:
        return False, f"the run is too short to pay for compiling: about {eager_sec:.0f} s"
    broken = remove_broken_kernels()
    if broken:
        print0(f"deleted {broken} half-written compiled kernels that a killed process left behind")
    reason = probe_compiler(device)
    if reason and wanted == "on":
        raise UserError(f"--compile on can't be had here: {reason}")
    return (False, f"torch.compile doesn't work here: {reason}") if reason else (True, "it works here")


def probe_compiler(device: torch.device) -> str:
    """'' if torch.compile works on this device, else why not; takes a few seconds the first time."""
    try:
        torch.compile(lambda x: (x * 2 + 1).sum(), dynamic=False)(torch.ones(64, device=device))
    except Exception as error:  # no compiler, no headers, a broken toolchain: each raises something of its own
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return ""


def remove_broken_kernels() -> int:
    """Delete empty compiled files, which a process killed in mid-compile leaves, and which no later run survives."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    def find_empty() -> dict[Path, float]:
        empty = {}
        for path in Path(cache_dir()).rglob("*.so"):
            with contextlib.suppress(FileNotFoundError):  # another rank deletes it as well
                if (stat := path.stat()).st_size == 0:
                    empty[path] = stat.st_mtime
        return empty
    if any(time.time() - mtime < 5 for mtime in find_empty().values()):
        time.sleep(5)  # it may be another process's, being written now
    broken = find_empty()
    for path in broken:
        path.unlink(missing_ok=True)
    return len(broken)


def fused(function: Callable) -> Callable:
    """Mark an elementwise function whose operations become one kernel when compilation is on, and run eagerly else."""
    compiled = None

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal compiled
        if not _compile_kernels or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function, dynamic=False, fullgraph=True)
        return compiled(*args, **kwargs)
    return call
