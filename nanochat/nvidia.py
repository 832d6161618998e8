"""NVIDIA's driver and its GPUs, asked without torch: what a machine has, and the build of torch that serves it.

    python -m nanochat.nvidia       prints that build for runs/setup.sh: default, cu126, or cpu where there is no GPU

Only Python's own library is imported, since runs/setup.sh asks before any package is there. Never run on a GPU yet.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PROC_DIR, DEVICE_DIR, PCI_DIR = Path("/proc/driver/nvidia"), Path("/dev"), Path("/sys/bus/pci/devices")
SMI_TIMEOUT_SEC = 30    # without persistence mode the driver starts each GPU first, seconds each
NO_DEVICES = 6          # nvidia-smi's exit code where this process may use no GPU

# CUDA's major version -> the oldest driver's: NVIDIA, "CUDA Compatibility", minor version compatibility, table 1
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Build:
    """A build of the locked torch, and the GPUs that it has kernels for, by compute capability."""
    name:   str      # of its index, https://download.pytorch.org/whl/<name>; default: PyPI's
    cuda:   int      # major version
    oldest: float
    newest: float


# The best first. Source: pytorch's RELEASE.md for 2.13, "PyTorch CUDA Support Matrix"; PyPI's build is for CUDA 13.0
BUILDS = (Build("default", 13, 7.5, math.inf), Build("cu126", 12, 5.0, 9.0))


@dataclass(frozen=True)
class Driver:
    """What the driver says of this machine's GPUs, those that CUDA_VISIBLE_DEVICES hides included."""
    version:      str | None = None             # "580.65.06"
    names:        tuple[str, ...] = ()          # of the GPUs that this process may use
    capabilities: tuple[float, ...] = ()        # their compute capabilities; () where they aren't known
    problem:      str = ""                      # what nvidia-smi complains of

    @property
    def major(self) -> int | None:
        return int(self.version.split(".")[0]) if self.version else None


def find_driver() -> Driver:
    """Ask nvidia-smi, and the driver's own files where nvidia-smi isn't there, fails or hangs."""
    if not PROC_DIR.is_dir() and not shutil.which("nvidia-smi"):
        return Driver()
    problem = ""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,compute_cap,name", "--format=csv,noheader"],
                              capture_output=True, encoding="utf-8", errors="replace", timeout=SMI_TIMEOUT_SEC)
        rows = [line.split(", ", 2) for line in done.stdout.splitlines() if line.count(", ") >= 2]
        if done.returncode == 0 and rows:
            capabilities = tuple(float(row[1]) for row in rows if re.fullmatch(r"\d+\.\d+", row[1]))
            return Driver(rows[0][0], tuple(row[2] for row in rows), capabilities)
        if done.returncode in (0, NO_DEVICES):
            return Driver()
        problem = next((line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()), "")
    except OSError:    # not there
        pass
    except subprocess.TimeoutExpired:
        problem = f"nvidia-smi does not answer within {SMI_TIMEOUT_SEC} s"
    return read_driver(problem)


def read_driver(problem: str = "") -> Driver:
    """What the driver's files in /proc say. A container sees them all, so a GPU counts if its device can be opened."""
    try:
        version = re.search(r"\s(\d{3}\.\d+(\.\d+)?)\s", (PROC_DIR / "version").read_text(encoding="utf-8"))
        facts = [dict(re.findall(r"^([^:\n]+):[ \t]*(.*?)\s*$", path.read_text(encoding="utf-8"), re.MULTILINE))
                 for path in sorted(PROC_DIR.glob("gpus/*/information"))]
    except OSError:
        return Driver(problem=problem)
    names = tuple(fact.get("Model", "GPU") for fact in facts
                  if os.access(DEVICE_DIR / f"nvidia{fact.get('Device Minor')}", os.R_OK | os.W_OK))
    return Driver(version and version[1], names, problem=problem)


def has_pci_gpu() -> bool:
    """Whether Linux sees a GPU of NVIDIA's in the machine, with or without a driver."""
    def read(path: Path) -> str:
        try:
            return path.read_text(encoding="ascii").strip()
        except OSError:
            return ""
    return any(read(path / "vendor") == "0x10de" and read(path / "class").startswith("0x03")    # display controllers
               for path in PCI_DIR.glob("*"))


def count_names(names: tuple[str, ...]) -> str:
    """As in "2 x NVIDIA H100, NVIDIA T4"."""
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in counts.items())


def choose_build(driver: Driver) -> str:
    """The name of the best build of torch for a driver and all its GPUs; "cpu" where it has none.
    Raises ValueError, with a sentence for a person, where no build serves them."""
    if not driver.names:
        return "cpu"
    for build in BUILDS:
        if (driver.major is None or driver.major >= OLDEST_DRIVERS[build.cuda]) \
                and all(build.oldest <= capability <= build.newest for capability in driver.capabilities):
            return build.name
    capabilities = ", ".join(map(str, sorted(set(driver.capabilities)))) or "unknown"
    newest, oldest = OLDEST_DRIVERS[BUILDS[0].cuda], OLDEST_DRIVERS[BUILDS[-1].cuda]
    raise ValueError(f"no build of torch serves {count_names(driver.names)} (compute capability {capabilities}) with "
                     f"the NVIDIA driver {driver.version}; update the driver ({oldest} is the oldest that any GPU can "
                     f"do with, {newest} what the newest need), or go on without the GPU: "
                     "TORCH_INDEX=https://download.pytorch.org/whl/cpu")


def explain_unusable(driver: Driver, torch_cuda: str | None, visible: str | None, error: str) -> str:
    """One sentence on why torch finds none of the GPUs that the driver lists, and what to do.

    torch_cuda: the version of CUDA that torch is built for, None without
    visible:    $CUDA_VISIBLE_DEVICES
    error:      what torch says
    """
    needed = OLDEST_DRIVERS.get(int(torch_cuda.split(".")[0]), 0) if torch_cuda else 0
    again = "rm -r .venv && bash runs/setup.sh"
    if visible is not None and visible.strip() in ("", "-1"):
        why, remedy = f"CUDA_VISIBLE_DEVICES={visible} hides all GPUs", "unset it"
    elif not torch_cuda:
        why, remedy = "this torch is built for CPUs only", again
    elif driver.major is not None and driver.major < needed:
        why = f"this torch is built for CUDA {torch_cuda}, which needs driver {needed} or newer"
        remedy = f"update the driver, or install torch for this one: {again}"
    elif driver.problem:
        why, remedy = f"nvidia-smi says: {driver.problem}", "restart the machine or its container"
    elif visible is not None:
        why, remedy = f"CUDA_VISIBLE_DEVICES={visible} names none of them ({error})", "correct or unset it"
    else:
        why, remedy = error, again
    version = f" {driver.version}" if driver.version else ""
    return f"the NVIDIA driver{version} lists {count_names(driver.names)}, but " \
           f"torch can't use it: {why}; {remedy}, or give --device-type cpu to go on without"


GPU_ERRORS = {    # a part of CUDA's message -> what it means for a person
    "no kernel image": "this torch has no kernels for it; rm -r .venv && bash runs/setup.sh picks a build that has",
    "busy or unavailable": "another process has it for itself alone (nvidia-smi shows which, and the compute mode)",
    "out of memory": "its memory is full; nvidia-smi shows who uses it, and CUDA_VISIBLE_DEVICES names another GPU",
}


def explain_error(error: str) -> str:
    """What CUDA's error at the first use of a GPU means; the error itself where it isn't a known one."""
    return next((meaning for part, meaning in GPU_ERRORS.items() if part in error), error)


def main() -> None:
    try:
        print(choose_build(find_driver()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
