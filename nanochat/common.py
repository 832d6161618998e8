"""What every other file needs: where state lives, which rank this is, what a mistake is.

But for devices.py and command_line.py, the only file that reads the environment. Loading torch takes seconds, so only
functions import it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import filelock
    import torch


MAX_PROCESSES, MAX_ROWS = 1024, 2**16    # that a script may start side by side; that an engine may decode at once
NVIDIA_DIR = Path("/proc/driver/nvidia")    # there where NVIDIA's driver is loaded


class UserError(Exception):
    """A person's mistake. The message is one sentence: what is wrong, where, and what to do instead."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, so that a smaller step may fit. CUDA's allocator has its own type of error, which
    the compiler wraps into another; other allocators and CUDA's libraries are known by their text only. NCCL may lack
    memory, too, but no step can follow: its communicator is broken."""
    texts = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
             "Storage size calculation overflowed")
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or \
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts) and not is_collective_error(error)


def is_collective_error(error: Exception) -> bool:
    """Whether an error is NCCL's, or torch's own of its collectives."""
    dist = sys.modules.get("torch.distributed")
    return "NCCL" in str(error) or bool(dist) and isinstance(error, dist.DistError)


def printable(path: str | os.PathLike) -> str:
    """A path as one line of UTF-8 in any locale: bytes that aren't UTF-8, and control characters, as escapes."""
    return escape(os.fsencode(path).decode("utf-8", "backslashreplace"))


def escape(text: str) -> str:
    """Text as one line, with escapes for control characters and for what UTF-8 can't hold."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def get_first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0]


def expand_home(path: str | Path, remedy: str = "give it without ~") -> Path:
    """A path that a person typed, with ~ as the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # HOME is not set, and the user has no entry in the system's list
        raise UserError(f"the home folder in {path} isn't known on this system; set HOME, or {remedy}") from None


MAX_NAME_BYTES = 180                            # disks take 255, and files beside a folder have its name and more
RESERVED_ENDS = (".tmp", ".lock")               # of what is beside a folder: unfinished files, its lock


def check_name(name: str, what: str, reserved: tuple[str, ...] = RESERVED_ENDS) -> None:
    """UserError for a name that can't be a folder's.

    what:     the thing that has the name, for the message
    reserved: ends of the names that files and folders beside it have
    """
    if not name or Path(name).name != name or name.startswith(".") or name.endswith(reserved) or \
            len(os.fsencode(name)) > MAX_NAME_BYTES or any(unicodedata.category(char) == "Cc" for char in name):
        raise UserError(f"{what} {name[:MAX_NAME_BYTES]!r} must be a plain folder name, such as d12: at most "
                        f"{MAX_NAME_BYTES} bytes, no control characters, no . at its beginning and none of "
                        f"{', '.join(reserved)} at its end")


def get_base_dir() -> Path:
    """The folder of all state on disk: $NANOCHAT_BASE_DIR, by default ~/.cache/nanochat. Created if missing."""
    base_dir = expand_home(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat",
                           "set NANOCHAT_BASE_DIR to a folder for all state")
    try:
        base_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the base folder {base_dir} can't be made ({error.strerror}); set NANOCHAT_BASE_DIR") from None
    return base_dir


def get_hub() -> tuple[str, str | None]:
    """Where Hugging Face files are fetched from ($HF_ENDPOINT, a mirror) and the person's token ($HF_TOKEN), if any."""
    token = (os.environ.get("HF_TOKEN") or "").strip()    # a file that it came from ends in a newline
    if not (token.isascii() and token.isprintable()):
        raise UserError("HF_TOKEN holds characters that no token has; set it again, or unset it")    # but never shown
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"), token or None


def get_worker_env(worker: int, num_workers: int, num_gpus: int) -> dict[str, str]:
    """The environment for one of several processes that run side by side: `num_gpus` GPUs that are its own, and its
    share of the cores."""
    env = dict(os.environ)
    if num_workers > 1:
        visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_workers * num_gpus)))
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[worker * num_gpus:(worker + 1) * num_gpus])
        env.setdefault("OMP_NUM_THREADS", str(max(1, count_cpus() // (num_workers * num_gpus))))
    return env


def get_collective_timeout() -> timedelta:
    """How long a rank waits for the others before it gives up: $NANOCHAT_TIMEOUT_SEC, by default half an hour."""
    seconds = os.environ.get("NANOCHAT_TIMEOUT_SEC") or "1800"
    with contextlib.suppress(ValueError, OverflowError):
        if float(seconds) > 0:
            return timedelta(seconds=float(seconds))
    raise UserError(f"NANOCHAT_TIMEOUT_SEC={seconds} must be a number of seconds")


def get_mirror_dir() -> Path | None:
    """A local folder that stands in for the hub ($NANOCHAT_MIRROR_DIR/<owner>/<repo>/<file>), if any."""
    mirror_dir = os.environ.get("NANOCHAT_MIRROR_DIR")
    return expand_home(mirror_dir) if mirror_dir else None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a whole file so that a reader, or a crash, sees the old content or the new, never a part.

    Text is UTF-8. Bytes of a file's name that aren't come as lone surrogates, and are escaped as JSON writes them.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk, so that a power cut can't undo a rename in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` on success; until then the old one stays whole. A kill between
    the two renames leaves it under its name of `aside`, from where restore_folder brings it back."""
    link, folder = folder, Path(os.path.realpath(folder))    # a link, such as to a larger disk, stays
    if not folder.parent.is_dir():
        raise UserError(f"{printable(link)} leads to {printable(folder)}, which isn't there; mount its disk, or remove "
                        "the link")
    new, old = aside(folder)
    new.mkdir()
    try:
        yield new
        sync_folder(new)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        sync_folder(folder.parent)
    finally:
        restore_folder(folder)


def restore_folder(folder: Path) -> None:
    """Remove what replaced_folder left; what was there before comes back if nothing has taken its place."""
    folder = Path(os.path.realpath(folder))
    new, old = aside(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in filter(os.path.lexists, (new, old)):
        remove_tree(leftover)


def aside(folder: Path) -> tuple[Path, Path]:
    """Where replaced_folder has the new and the old folder; a person's backup may be NAME.old."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


def remove_tree(path: Path) -> None:
    """Delete a folder and all in it, a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def file_lock(path: Path) -> filelock.BaseFileLock:
    """A lock held by one process at a time, beside `path`; released by the system when its holder dies.
    Where the disk has no locks, as NFS and Lustre may, nothing is locked, and a warning says so."""
    import filelock  # here: scripts.doctor reports missing packages, and loads this file

    class FileLock(filelock.FileLock):
        def acquire(self, *args, **settings):
            try:
                return super().acquire(*args, **settings)
            except (OSError, NotImplementedError) as error:
                number = error.errno if isinstance(error, OSError) else errno.ENOSYS
                if number not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
                    raise
                warn_without_lock(path.parent, os.strerror(number))
                return contextlib.nullcontext(self)
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(path.name + ".lock"))


@functools.cache
def warn_without_lock(folder: Path, reason: str) -> None:
    """Once for each folder of a process."""
    print0(f"warning: the disk of {folder} has no file locks ({reason}); nothing keeps a second process from writing "
           "there too, so start one at a time")


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; one process alone is rank 0 of 1."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def get_ranks() -> Ranks:
    """Which rank this is, as torchrun says in the environment."""
    env = os.environ
    if "RANK" not in env:
        return Ranks()
    rank, local_rank, world_size = env["RANK"], env.get("LOCAL_RANK", "0"), env.get("WORLD_SIZE", "1")
    if not all(map(str.isdecimal, (rank, local_rank, world_size))) or int(rank) >= int(world_size):
        raise UserError(f"RANK={rank}, LOCAL_RANK={local_rank} and WORLD_SIZE={world_size} in the environment don't "
                        "name one of several ranks; start these with torchrun, or unset RANK for one process alone")
    return Ranks(int(rank), int(local_rank), int(world_size))


def count_local_ranks() -> int:
    """Ranks on this machine; all of them, where torchrun doesn't say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or get_ranks().world_size)


def get_process_group():
    """torch.distributed where this process has joined others through it, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_initialized() else None


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over all ranks, in place. Collective. Of host memory it is gloo's, which doesn't wait for the
    work that is queued on the GPU; of a GPU's it is NCCL's, which is queued behind that."""
    if dist := get_process_group():
        dist.all_reduce(values)
    return values


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether any rank has set it, so that all do the same. Collective: all ranks call it."""
    if not get_process_group():
        return list(flags)
    import torch
    return [count > 0 for count in sum_over_ranks(torch.tensor(flags, dtype=torch.int32)).tolist()]


def gather(value: object, group=None) -> list:
    """Every rank's value, in the order of the ranks. For small values, since they are pickled. Collective."""
    values = [value]
    if dist := get_process_group():
        values *= dist.get_world_size()
        dist.all_gather_object(values, value, group=group)
    return values


@contextlib.contextmanager
def failing_together(*errors: type[BaseException]) -> Iterator[None]:
    """One of these errors on one rank raises UserError on all, so that none waits forever. Collective at its end, and
    nothing within may be."""
    reason = None
    try:
        yield
    except errors as error:
        reason = ("" if isinstance(error, UserError) else f"{type(error).__name__}: ") + get_first_line(error)
    if reason := next(filter(None, gather(reason)), None):
        raise UserError(reason)


def print0(*values: object) -> None:
    """Print on rank 0 only, at once and in one piece, since the thread that writes checkpoints prints too."""
    if get_ranks().rank > 0:
        return
    try:
        print(" ".join(map(str, values)) + "\n", end="", flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        lose_output()


def lose_output() -> None:
    """What to do where a pipe's reader has ended or the terminal was closed: a loop that stops at SIGHUP saves first,
    as the signal itself may be late or not come; anything else ends here."""
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    if hang_up is None or not callable(signal.getsignal(hang_up)):
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output any more")
    discard_output()
    signal.raise_signal(hang_up)


def discard_output() -> None:
    """Send stdout to /dev/null, what its buffer holds included, about which Python would complain at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def count_cpus() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def get_git_revision() -> str | None:
    """The commit of this checkout, with '+changes' when files differ from it; None outside a checkout."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, encoding="utf-8",
                              errors="replace", timeout=10, check=True).stdout.strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    return None


def hash_code() -> str:
    """Twelve digits of the sha256 of all code that a run may execute, so that an edit is known without git, too."""
    digest, repo_dir = hashlib.sha256(), Path(__file__).resolve().parent.parent
    for folder in ("nanochat", "scripts", "tasks"):
        for path in sorted((repo_dir / folder).glob("[!.]*.py")):    # not an editor's locks and copies
            with contextlib.suppress(OSError):
                code = path.read_bytes()
                digest.update(f"{folder}/{path.name} {len(code)}\n".encode() + code)
    return digest.hexdigest()[:12]


def now() -> str:
    """The local time, to the second, with its zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what is being waited for, then how long it took."""
    print0(f"{what} ...")
    start = time.perf_counter()
    yield
    print0(f"{what}: {time.perf_counter() - start:.1f} s")
