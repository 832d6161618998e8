"""torch.compile where it works and saves time; elsewhere eager, with the reason as one printed line."""

import contextlib
import functools
import gc
import hashlib
import os
import stat
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from nanochat.common import UserError, get_first_line, print0

# Seconds of a cold compilation, and the part of an eager run that it saves: both measured at depths 4 to 6 on two cores
# (dev/LOG.md, "The whole step, and where its time goes")
COMPILE_SEC, COMPILE_SAVING = 40, 0.4
_compile_kernels = False


def set_compile_kernels(enabled: bool) -> None:
    """Whether functions marked @fused run compiled from now on; off at first, since compiling takes seconds."""
    global _compile_kernels
    _compile_kernels = enabled
    if enabled:
        # After 8 variants of a function torch goes on eagerly, without a word. A block has more: with value embeddings
        # and without, the first layer, two windows, with gradients and without, full batches and a last smaller one;
        # and --seq-len-warmup multiplies those by the lengths of its rows
        torch._dynamo.config.recompile_limit = 128


def choose_compile(wanted: str, device: torch.device, eager_sec: float | None) -> tuple[bool, str]:
    """Whether to compile the model, and why; `wanted` is auto, on (each block), trunk (all of them as one) or off,
    `eager_sec` the run's seconds without."""
    if wanted == "off":
        return False, "asked for"
    if wanted == "auto" and device.type not in ("cpu", "cuda", "xpu"):
        return False, f"not known to pay on {device.type}"
    if wanted == "auto" and eager_sec is not None and eager_sec * COMPILE_SAVING < COMPILE_SEC:
        return False, f"the run is too short to pay for compiling: about {eager_sec:.0f} s"
    if broken := remove_broken_kernels():
        print0(f"deleted {broken} half-written compiled kernels that a killed process left behind")
    reason = probe_compiler(device)
    if reason and wanted != "auto":
        raise UserError(f"--compile {wanted} can't be had here: {reason}")
    if reason:
        return False, f"torch.compile doesn't work here: {reason}"
    return True, "asked for, all blocks as one" if wanted == "trunk" else "it works here"


@contextlib.contextmanager
def pause_collector() -> Iterator[None]:
    """Without Python's garbage collector, which goes through a compiler's living objects again and again, and they only
    become more: 1.5 of the 12 s that a step at depth 12 takes to trace with all kernels cached."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def probe_compiler(device: torch.device) -> str:
    """'' if torch.compile works on this device, else the reason; takes a few seconds the first time."""
    try:
        if awkward := link_awkward_paths():
            return (f"the path {awkward} has a blank or a quote, which torch leaves unquoted for the C++ compiler, and "
                    f"no link to it can be made in {tempfile.gettempdir()}; move it, or set TMPDIR")
        if device.type != "cpu" or not compiles_for_this_cpu():
            compile_probe(device)
    except Exception as error:  # no compiler, no headers, a broken toolchain: each raises another type
        return f"{type(error).__name__}: {get_first_line(error)[:200]}"
    return ""


def compile_probe(device: torch.device) -> None:
    """Compile and run a small kernel, with the exponential that torch itself tries vector instructions with."""
    torch.compile(lambda x: (x * 2 + 1).exp().sum(), dynamic=False)(torch.ones(64, device=device))


def compiles_for_this_cpu() -> bool:
    """Whether a kernel with this CPU's best vector instructions can be compiled and run; if so, torch trusts them.

    Left alone, torch tries each set of instructions in a process of its own, in every run: 1.3 s, kernels cached or not
    (dev/LOG.md, "A compiled engine's warm start").
    """
    from torch._inductor import config, cpu_vec_isa
    if config.cpp.vec_isa_ok is not None:  # TORCHINDUCTOR_VEC_ISA_OK is set, or this has been asked before
        return False
    config.cpp.vec_isa_ok = True
    try:
        compile_probe(torch.device("cpu"))
    except Exception:  # of any type: an old compiler, say
        config.cpp.vec_isa_ok = None
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        for isa in cpu_vec_isa.supported_vec_isa_list:  # some keep an answer of their own
            getattr(type(isa).__bool__, "cache_clear", lambda: None)()
        return False
    return True


def link_awkward_paths() -> str:
    """Where torch, Python or the compiled kernels lie under a path with a blank or a quote, let the compiler reach them
    by links (up to torch 2.13 at least, it quotes the paths of headers only). Returns a path that can't be linked."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # init_compute has set a plain one, if it could
    paths, settings = [cache_dir()], sysconfig.get_config_vars()
    if not is_plain(settings.get("LIBDIR") or ""):
        settings["LIBDIR"] = str(find_plain_path(Path(settings["LIBDIR"])))
        paths.append(settings["LIBDIR"])
    if not is_plain(torch.__path__[0]):
        from torch.utils import cpp_extension
        cpp_extension.TORCH_LIB_PATH = str(find_plain_path(Path(cpp_extension.TORCH_LIB_PATH)))
        paths.append(cpp_extension.TORCH_LIB_PATH)
    return next((path for path in paths if not is_plain(path)), "")


def is_plain(path: str | Path) -> bool:
    """Whether a command line can hold a path without quotes; on Windows torch.compile writes these itself."""
    return os.name == "nt" or not set(str(path)) & set(" \t\n'\"\\")


def find_plain_path(folder: Path) -> Path:
    """`folder`, or a link to it without blanks, quotes and backslashes: torch.compile leaves them unquoted in a
    compiler's command line. The links are in a folder of this user's own among the temporary files."""
    if is_plain(folder):
        return folder
    folder = folder.absolute()
    links = Path(tempfile.gettempdir(), f"nanochat-links-{os.getuid()}")
    link = links / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        links.mkdir(mode=0o700, exist_ok=True)
        if links.lstat().st_uid == os.getuid() and stat.S_ISDIR(links.lstat().st_mode):  # not made by someone else
            with contextlib.suppress(FileExistsError):
                link.symlink_to(folder)
            return link
    return folder


def remove_broken_kernels() -> int:
    """Delete empty compiled files: a process killed while it compiled leaves them, and later runs crash on them."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    def find_empty() -> dict[Path, float]:
        empty = {}
        for path in Path(cache_dir()).rglob("*.so"):
            with contextlib.suppress(FileNotFoundError):  # deleted by another rank meanwhile
                if (found := path.stat()).st_size == 0:
                    empty[path] = found.st_mtime
        return empty
    if any(time.time() - mtime < 5 for mtime in find_empty().values()):
        time.sleep(5)  # another process may be writing it now
    broken = find_empty()
    for path in broken:
        path.unlink(missing_ok=True)
    return len(broken)


def fused(function: Callable) -> Callable:
    """Mark a function whose operations become one kernel when compilation is on; otherwise it runs eagerly."""
    compile_once = functools.cache(lambda: torch.compile(function, dynamic=False, fullgraph=True))

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not _compile_kernels or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return compile_once()(*args, **kwargs)
    return call
