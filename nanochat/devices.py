"""The machine's devices: which one computes and in which dtype, what it can do, and what NVIDIA's driver says of GPUs.

    python -m nanochat.devices      prints the build of torch for this machine's driver and GPUs, for runs/setup.sh:
                                    default, cu126, or cpu where there is no GPU

Only Python's own library is imported at the top, since runs/setup.sh and scripts.doctor ask before any package is
there. What concerns the driver was never run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import (
    NVIDIA_DIR,
    Ranks,
    UserError,
    count_cpus,
    count_local_ranks,
    gather,
    get_base_dir,
    get_collective_timeout,
    get_first_line,
    get_git_revision,
    get_process_group,
    get_ranks,
    hash_code,
    print0,
)

if TYPE_CHECKING:
    import torch

# Which device computes

COMPUTE_DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}  # name in torch -> bytes
FREE_GPU_FRAC = 0.7  # a GPU with less of its memory free is used by others too; assumption, not studied


def init_compute(device_type: str = "auto", deterministic: bool = False) -> tuple[torch.device, Ranks]:
    """Choose the device, join the other ranks, set process-wide torch options.
    deterministic: only algorithms that give the same bits each time; for a GPU, a CPU has no others here"""
    import torch
    import torch.distributed as dist

    from nanochat.compilation import find_plain_path
    ranks = get_ranks()
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    device = get_device(device_type, ranks)
    # Compiled kernels stay with the rest of the state: /tmp, torch's choice, doesn't outlive a reboot. But not those of
    # several nodes: the base folder's disk is theirs together, and slow for thousands of small files
    chosen_dir = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if chosen_dir or count_local_ranks() == ranks.world_size:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(find_plain_path(Path(chosen_dir or get_base_dir() / "compiled")))
    else:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    is_cuda = device.type == "cuda"
    if device.type == "cpu":
        keep_freed_memory()
        if ranks.world_size > 1:
            torch.set_num_threads(max(1, count_cpus() // count_local_ranks()))
    elif is_cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if ranks.world_size > 1 and not dist.is_initialized():
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
            raise UserError(f"RANK and WORLD_SIZE are set, but {' and '.join(missing)} not, where the ranks meet; "
                            "start them with torchrun, or unset RANK for one process alone")
        if not os.environ["MASTER_PORT"].isdecimal():
            raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']} is no number; start the ranks with torchrun")
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo", device_id=device if is_cuda else None,
                                timeout=get_collective_timeout())
    if is_cuda:
        check_gpus(device)
        # On Hopper and Blackwell F.scaled_dot_product_attention takes cuDNN first, which makes a plan for each new
        # shape, and each token decoded has one: .44 s each on a B200 (FunASR, issue 3704). There it also spoils what
        # some models write (pytorch, issue 193893)
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device, ranks


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks for the next step instead of returning them to the system.

    Above the threshold a block that is freed goes back, and the next step pays for its pages again: a product with a
    256 MiB result was 1.8 times slower (dev/LOG.md, "Freed memory"). It must exceed the largest temporary of a step.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold, m_arena_max, keep_bytes = -1, -2, -3, -8, 2**31 - 1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such switch
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for key, value in ((m_mmap_threshold, keep_bytes), (m_trim_threshold, keep_bytes), (m_top_pad, 64 * 2**20),
                           (m_arena_max, 1)):
            mallopt(key, value)


def find_device_type(device_type: str) -> str:
    """'auto' as the accelerator that torch sees, else the CPU; a GPU that the driver lists and torch can't use is an
    error, since training would take months on the CPU."""
    import torch
    if device_type not in ("auto", ""):
        return device_type
    if accelerator := torch.accelerator.current_accelerator(check_available=True):
        return accelerator.type
    if (driver := find_driver()).names:
        raise UserError(explain_unusable_gpu(driver))
    return "cpu"


def has_gpu() -> bool:
    """Whether this process has a GPU that "cuda" means: also one that the driver lists and torch can't use yet."""
    import torch
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return torch.cuda.is_available() or not is_hidden and bool(find_driver().names)


def get_device(device_type: str, ranks: Ranks) -> torch.device:
    """The torch device of this rank, which computes; 'auto' as in `find_device_type`."""
    import torch
    device_type = find_device_type(device_type)
    is_numbered = device_type in ("cuda", "xpu")  # to torch ROCm is "cuda" too; MPS has one device and takes no number
    if is_numbered and ranks.world_size > 1:
        num_devices, num_ranks = torch.get_device_module(device_type).device_count(), count_local_ranks()
        if 0 < num_devices < num_ranks:
            raise UserError(f"{num_ranks} ranks run on this machine, and torch sees {num_devices} of its GPUs; start "
                            f"torchrun with --nproc-per-node={num_devices}, or name more in CUDA_VISIBLE_DEVICES")
    try:
        device = torch.device(device_type, *((ranks.local_rank,) if is_numbered else ()))
        float(torch.ones(1, device=device))  # a kernel runs
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = get_first_line(error)
        if device_type.startswith("cuda"):
            why = explain_error(why)
            if not torch.cuda.is_available():
                driver = find_driver()
                why = explain_unusable_gpu(driver) if driver.names else \
                    f"{driver.problem or 'no NVIDIA driver lists a GPU'} ({why})"
        raise UserError(f"--device-type {device_type} can't be used here: {why}") from None
    return device


@functools.cache
def check_gpus(device: torch.device) -> None:
    """Warn of the ranks' GPUs where they are of different kinds, or used by other processes; once a process, since
    later this one uses them too. Collective.
    """
    import torch
    if dist := get_process_group():  # NCCL takes its buffers at its first collective: before free memory is measured
        dist.all_reduce(torch.zeros(1, device=device))
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    gpus = gather((torch.cuda.get_device_name(device), has_bf16_units(device), free_bytes, total_bytes))
    names = tuple(name for name, *_ in gpus)
    if len({has_bf16 for _, has_bf16, *_ in gpus}) > 1:
        raise UserError(f"only some of the ranks' GPUs have bf16 matrix units ({count_names(names)}); choose "
                        "GPUs of one kind by CUDA_VISIBLE_DEVICES")
    if len(set(names)) > 1:
        print0(f"warning: the ranks' GPUs differ ({count_names(names)}): each step waits for the slowest, and "
               "batches fit the smallest; CUDA_VISIBLE_DEVICES chooses among them")
    for rank, (name, _, free_bytes, total_bytes) in enumerate(gpus):
        if free_bytes < FREE_GPU_FRAC * total_bytes:
            print0(f"warning: only {free_bytes / 2**30:.1f} of {total_bytes / 2**30:.1f} GiB are free on rank {rank}'s "
                   f"GPU ({name}), another process uses it (nvidia-smi shows which)")


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work; nothing to wait for on a CPU."""
    import torch
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def get_peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use at once so far: the device's, or on a CPU this process's resident size."""
    import torch
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource  # not on Windows
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


# In which dtype


def has_bf16_units(device: torch.device) -> bool:
    """Whether a GPU ("cuda" to torch) multiplies matrices in bf16 itself."""
    import torch
    return torch.cuda.get_device_capability(device) >= (8, 0) or bool(torch.version.hip)


def check_dtype(name: str) -> str:
    """The type of the flag --dtype."""
    if name not in ("auto", *COMPUTE_DTYPES):
        raise UserError(f"--dtype {name} is not one of auto, {', '.join(COMPUTE_DTYPES)}")
    return name


def get_compute_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The activations' dtype for `name` ('auto' or a key of COMPUTE_DTYPES) and one sentence on why. Collective: ranks
    may measure differently, and a model in two dtypes would be evaluated as if it were one, so rank 0's counts."""
    return gather(_find_compute_dtype(name, device))[0]


def _find_compute_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    import torch
    if name != "auto":
        check_dtype(name)
        if name == "bfloat16" and device.type == "cuda" and not has_bf16_units(device):
            return torch.bfloat16, "asked for, though the GPU has no bf16 matrix units and emulates them slowly"
        if name == "bfloat16" and device.type == "cpu" and (gain := measure_bf16_gain()) < 0.7:
            return torch.bfloat16, (f"asked for, though this CPU emulates it at {gain:.2f}x the matmul rate of fp32; "
                                    "--dtype float32 is faster")
        return getattr(torch, name), "asked for"
    if device.type == "cuda":
        if has_bf16_units(device):
            return torch.bfloat16, "the GPU has bf16 matrix units"
        if torch.cuda.get_device_capability(device) >= (7, 0):
            return torch.float16, "the GPU has no bf16 matrix units; fp16 with a gradient scaler"
        return torch.float32, "the GPU has no matrix units for bf16 or fp16"
    if device.type == "cpu":
        gain = measure_bf16_gain()
        # A busy machine blurs the measurement, so the gain must be clear: native units gave 2.2 to 5.6 here, with other
        # load and without; that emulation stays under 1.4 is an assumption, not studied
        if gain > 1.4:
            return torch.bfloat16, f"measured {gain:.1f}x the matmul rate of fp32 on this CPU"
        return torch.float32, f"bf16 measured only {gain:.2g}x the matmul rate of fp32 on this CPU"
    if device.type == "xpu":
        return torch.bfloat16, "XPU devices have bf16 matrix units"
    return torch.float32, f"no faster dtype is known to be safe on {device.type}"


def measure_bf16_gain() -> float:
    """Rate of bf16 products over that of fp32 on this machine's CPU. A smaller product comes first: without units for
    bf16 a large one takes seconds (0.01x on an AVX2 machine)."""
    import torch
    for size in (512, 1024):
        gain = measure_matmul_rate(torch.bfloat16, size) / measure_matmul_rate(torch.float32, size)
        if gain < 0.3:
            break
    return gain


@functools.cache
def measure_matmul_rate(dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a (size, size) matrix product on this machine's CPU, best of several; measured once a process."""
    import torch
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    out, best = left @ right, math.inf
    deadline = time.perf_counter() + (0.15 if size > 512 else 0.03)
    while time.perf_counter() < deadline or best == math.inf:
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


# How fast it is

# (name, dense bf16 FLOP/s, GiB) as the makers state them; a device's name is matched from top to bottom. Of a GPU that
# comes with several sizes of memory it is the usual one.
GPUS = (
    ("gb300", 2.5e15, 279), ("gb200", 2.5e15, 186), ("grace blackwell", 2.5e15, 186),
    ("b300", 2.25e15, 270), ("b200", 2.25e15, 180), ("b100", 1.8e15, 180),
    ("h200 nvl", 836e12, 141), ("h200", 989e12, 141), ("h100 nvl", 835e12, 94), ("h100 pcie", 756e12, 80),
    ("h100", 989e12, 80), ("h800 pcie", 756e12, 80), ("h800", 989e12, 80), ("h20", 148e12, 96), ("gh200", 989e12, 96),
    ("a100", 312e12, 80), ("a800", 312e12, 80), ("a40", 149.7e12, 48), ("a30", 165e12, 24), ("a10g", 70e12, 24),
    ("a10", 125e12, 24), ("l40s", 362e12, 48), ("l40", 181e12, 48), ("l4", 121e12, 24),
    ("a6000 ada", 364e12, 48), ("6000 ada", 364e12, 48), ("rtx pro 6000", 503.8e12, 96),
    ("a6000", 154.8e12, 48), ("a5000", 111e12, 24), ("a4000", 76.7e12, 16),
    ("5090", 209.5e12, 32), ("5080", 112.6e12, 16), ("5070 ti", 87.9e12, 16), ("5070", 61.7e12, 12),
    ("4090", 165.2e12, 24), ("4080 super", 104.4e12, 16), ("4080", 97.5e12, 16), ("4070 ti", 80.2e12, 12),
    ("4070", 58.3e12, 12), ("3090 ti", 80e12, 24), ("3090", 71e12, 24), ("3080 ti", 68.2e12, 12), ("3080", 59.5e12, 10),
    ("3070", 40.6e12, 8), ("v100", 125e12, 16), ("t4", 65e12, 16), ("2080 ti", 53.8e12, 11),
    ("mi355x", 2.5e15, 288), ("mi350x", 2.3e15, 288), ("mi325x", 1.3074e15, 256), ("mi300x", 1.3074e15, 192),
    ("mi300a", 980.6e12, 128), ("mi250x", 191.5e12, 64), ("mi210", 181e12, 64),
    ("data center gpu max 1550", 839e12, 128), ("data center gpu max 1100", 355e12, 48),
)
# (depth, MFU) of pretraining on 8 H100 in bf16, as published for this recipe in 2026; not measured by this code yet
PUBLISHED_MFU = ((12, 0.41), (18, 0.46), (24, 0.50))
CPU_MFU = 0.5    # compiled, of the measured matmul rate: 51-61% at depths 4 and 6 (dev/LOG.md, "The whole step")


# Rent of one GPU, US dollars per hour: assumptions, rounded from list prices of 2026. CPUs and all other GPUs have no
# price unless a person gives one
GPU_PRICES = (("b300", 6.0), ("b200", 5.0), ("h200", 3.5), ("h100", 3.0), ("a100", 1.8), ("l40s", 1.0), ("4090", 0.5),
              ("t4", 0.35))


def find_gpu(name: str, table: tuple[tuple, ...] = GPUS) -> tuple | None:
    """The line of GPUS, or of GPU_PRICES, for a device's name as its driver gives it, or as a person does."""
    return next((line for line in table if re.search(rf"\b{line[0]}\b(?!.*laptop)", name.lower())), None)


def expect_mfu(gpu: str, depth: int) -> tuple[float, str]:
    """MFU to expect of a compiled run, and what it rests on; `gpu` may be 'cpu'."""
    if gpu == "cpu":
        return CPU_MFU, "measured at depths 4 and 6 on a 2-core machine: 51-61% of its matmul rate"
    smallest, largest = PUBLISHED_MFU[0][0], PUBLISHED_MFU[-1][0]
    too_small = f"; depth {depth} will reach less" if depth < smallest else ""
    depth = min(max(depth, smallest), largest)  # beyond the table its nearest end
    (d0, mfu0), (d1, mfu1) = next(pair for pair in itertools.pairwise(PUBLISHED_MFU) if depth <= pair[1][0])
    mfu = mfu0 + (mfu1 - mfu0) * (depth - d0) / (d1 - d0)
    source = "published for 8 H100 in bf16: " + ", ".join(f"{100 * m:.0f}% at depth {d}" for d, m in PUBLISHED_MFU)
    return mfu, source + too_small + ("" if gpu == "h100" else f"; assumed to hold on {gpu}, not measured there")


def get_peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float | None, str]:
    """FLOP/s that MFU is measured against, and where the figure comes from; None when nothing is known.
    A GPU's is its maker's figure for dense bf16; a CPU's is the measured rate of a large product in `dtype`."""
    import torch
    if device.type == "cpu":
        is_bf16 = dtype == torch.bfloat16
        size = 256 if is_bf16 and measure_bf16_gain() < 0.3 else 2048 if is_bf16 else 1024
        return float(f"{measure_matmul_rate(dtype, size):.3g}"), "measured matmul rate"
    if device.type in ("cuda", "xpu"):
        name = torch.get_device_module(device).get_device_name(device)
        if gpu := find_gpu(name):
            return gpu[1], f"maker's bf16 figure for {gpu[0]}"
        return None, f"no peak figure is listed for {name}"
    return None, f"no peak figure is known for {device.type}"


# What a run was made with


def get_environment(device: torch.device) -> dict:
    """Hardware, operating system and package versions, as stored in run.json and shown in reports."""
    import torch
    packages = {}
    for name in ("torch", "numpy", "pyarrow", "tiktoken", "rustbpe", "safetensors", "triton", "kernels"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    hardware = {"device": device.type, "cpu": get_cpu_name(), "num_cpus": count_cpus(), "ram_bytes": get_ram_bytes()}
    if device.type in ("cuda", "xpu"):
        properties = torch.get_device_module(device).get_device_properties(device)
        hardware |= {"gpu": properties.name, "gpu_bytes": properties.total_memory,
                     "num_gpus": torch.get_device_module(device).device_count()}
    return {"git_revision": get_git_revision(), "code": hash_code(), "python": platform.python_version(),
            "system": platform.platform(), "packages": packages, "hardware": hardware, "host": platform.node()}


def get_cpu_name() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def get_ram_bytes() -> int | None:
    """Physical memory, or None where the system doesn't say."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


# NVIDIA's driver and its GPUs

DEVICE_DIR, PCI_DIR = Path("/dev"), Path("/sys/bus/pci/devices")
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
    if not NVIDIA_DIR.is_dir() and not shutil.which("nvidia-smi"):
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
        version = re.search(r"\s(\d{3}\.\d+(\.\d+)?)\s", (NVIDIA_DIR / "version").read_text(encoding="utf-8"))
        facts = [dict(re.findall(r"^([^:\n]+):[ \t]*(.*?)\s*$", path.read_text(encoding="utf-8"), re.MULTILINE))
                 for path in sorted(NVIDIA_DIR.glob("gpus/*/information"))]
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
    "operation not supported": "a virtual GPU, perhaps, on which memory can't grow in place: set PYTORCH_ALLOC_CONF=",
    "out of memory": "its memory is full; nvidia-smi shows who uses it, and CUDA_VISIBLE_DEVICES names another GPU",
}


def explain_error(error: str) -> str:
    """What CUDA's error at the first use of a GPU means; the error itself where it isn't a known one."""
    return next((meaning for part, meaning in GPU_ERRORS.items() if part in error), error)


def explain_unusable_gpu(driver: Driver) -> str:
    """One sentence on GPUs that `driver` lists and torch can't use."""
    import torch
    error = "torch gives no reason"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as cause:
        error = get_first_line(cause)
    return explain_unusable(driver, torch.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES"), error)


def main() -> None:
    try:
        print(choose_build(find_driver()))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
