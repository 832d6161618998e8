"""How a program of ours begins and ends: its process, its flags, its exit code. Needs no torch, which takes seconds to
load."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import functools
import importlib
import io
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from nanochat.common import (
    NVIDIA_DIR,
    UserError,
    discard_output,
    get_collective_timeout,
    get_first_line,
    get_process_group,
    get_ranks,
    is_collective_error,
    is_out_of_memory,
    printable,
)
from nanochat.devices import COMPUTE_DTYPES, check_dtype


def take_text(text: str) -> str:
    """What a person typed; a value that is blank is mostly a variable of the shell that isn't set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the value is empty; give one or leave it out")
    return text


def take_number(kind: type, text: str) -> float:
    """A number that is finite and, as a whole one, of 64 bits."""
    number = kind(text)    # ValueError: argparse says which flag and value
    if not -2**63 <= number < 2**63 if kind is int else not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:40]} must be a " + (
            "number of 64 bits" if kind is int else "finite number"))
    return number


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        """The help of a flag and its default, where it has one and the help doesn't speak of it."""
        default = getattr(action.type, "keywords", {}).get("word") if action.default is None else action.default
        is_none = default is None or default is False or default in ([], argparse.SUPPRESS)
        if is_none or not action.option_strings or "default" in action.help:
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)
        return f"{action.help} (default: {shown.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """argparse's parser, for all our programs: it refuses empty values and numbers out of reach, says what is wrong in
    one line, and shows each flag's default. A flag whose value may be empty has `type=str`."""

    def __init__(self, **settings):
        super().__init__(**{"formatter_class": HelpFormatter} | settings)
        self.register("type", None, take_text)
        self.register("type", Path, lambda text: Path(take_text(text)))
        for kind in (int, float):
            self.register("type", kind, functools.partial(take_number, kind))

    def add_subparsers(self, **settings):
        commands = super().add_subparsers(**settings)
        commands.type = str    # all that follows a command is its value: that of each flag is checked in its turn
        return commands

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")    # not all flags, above a sentence of one

    def refuse_unused(self, args: argparse.Namespace, names: Iterable[str], beside: str) -> None:
        """UserError for a flag of these that isn't as by default: `beside` another one it would be dropped."""
        for name in names:
            if getattr(args, name) != self.get_default(name):
                raise UserError(f"--{name.replace('_', '-')} means nothing beside {beside}; leave one of them out")


def int_or_word(text: str, word: str) -> int | None:
    """The type of a flag that is a number or a word, which is None; -1, as the word was once spelled, is understood."""
    try:
        return None if text == word or int(text) < 0 else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be a number, or {word}") from None


int_or_never = functools.partial(int_or_word, word="never")    # steps between events
int_or_all = functools.partial(int_or_word, word="all")        # the largest number of something


def json_file(text: str) -> Path:
    """The type of the flag --json of programs that measure: a fault is told before the minutes, not after them."""
    path = Path(take_text(text))
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--json {path} must be a file in a folder that is there")
    return path


def take_device_type(text: str) -> str:
    """The type of the flag --device-type: a name that torch knows; whether it has such a device here is told later."""
    if take_text(text) == "auto":
        return text
    import torch
    try:
        torch.device(text)
    except RuntimeError as error:
        raise UserError(f"--device-type {text} can't be used here: {get_first_line(error)}") from None
    return text


def add_compute_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of each script that computes with a model."""
    parser.add_argument("--device-type", type=take_device_type, default="auto",
                        help="cuda, cpu, mps, xpu; auto: the best that is there")
    parser.add_argument("-d", "--dtype", type=check_dtype, default="auto", help=f"auto, {', '.join(COMPUTE_DTYPES)}")


def check_flags(name: str, words: list[str]) -> None:
    """Parse the flags of a module that is to run later as a program: UserError, or argparse's own end with exit code 2,
    where it would refuse them."""
    module = importlib.import_module(name)
    if not hasattr(module, "parse_args"):    # it takes none
        return
    program, sys.argv[0] = sys.argv[0], module.__file__    # which argparse names
    try:
        parsed = module.parse_args(words)
        if isinstance(parsed, tuple):    # of a training stage: its arguments, and the same as choices.StageFlags
            parsed[1].check_together()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    finally:
        sys.argv[0] = program


SPIN_COUNT = "600"    # GOMP_SPINCOUNT of training, see prepare_process


def prepare_process() -> None:
    """Set up a process of ours before it loads torch, which takes seconds; scripts/__init__.py calls it.

    OpenMP reads how idle threads wait when torch is loaded. Workers that spin while they wait slow a step 3 times down
    beside one busy process; workers that sleep at once cost a tenth of a step where nothing else runs. A short spin has
    the best of both (dev/LOG.md, "How OpenMP's threads wait").
    CUDA's allocator is told beside NVIDIA's driver only: segments that grow lose less memory to gaps between blocks
    (PyTorch's notes on CUDA, "Optimizing memory usage with PYTORCH_ALLOC_CONF"; never measured here).
    A setting that a person made stays.
    """
    prepare_streams()
    try:
        sys.prefix.encode()
    except UnicodeEncodeError:
        exit_with(2, f"error: torch can't be loaded from {sys.prefix!a}, a path that isn't UTF-8; move it, or set "
                     f"PYTHONUTF8=1 if only this locale ({sys.getfilesystemencoding()}) is to blame")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if NVIDIA_DIR.is_dir() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

    def report_exception(kind, error, trace) -> None:
        """While modules are loaded no script can catch Ctrl-C yet."""
        if issubclass(kind, KeyboardInterrupt):
            print("stopped by Ctrl-C", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)
    sys.excepthook = report_exception


def prepare_streams() -> None:
    """Make the standard streams safe to use, whatever the terminal and the locale.

    A closed one is /dev/null from now on: the next file to be opened would get its number, and what is printed.
    Characters that stdout can't show are replaced, as Python does for stderr.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)    # the lowest number that is free
            os.set_inheritable(descriptor, descriptor == number)
            setattr(sys, name, open(descriptor, "w" if number else "r", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def let_threads_spin() -> None:
    """Let the threads of processes that are started from here on spin longer while they wait.

    Decoding's operations are shorter than training's, for which SPIN_COUNT was chosen (dev/LOG.md, "Decoding many rows
    on CPUs"). A count that a person chose stays; ours is known by its value, which child processes inherit.
    """
    if os.environ.get("GOMP_SPINCOUNT") == SPIN_COUNT:
        os.environ["GOMP_SPINCOUNT"] = "2000"


def run_script(main: Callable[[list[str] | None], object]) -> None:
    """Run a script's `main` and turn how it ended into an exit code: 0 done, 2 a person's mistake, 130 Ctrl-C.
    Any other error is a bug and keeps its traceback."""
    prepare_streams()
    try:
        main(None)
        if dist := get_process_group():
            dist.destroy_process_group()
            # gloo now and then aborts a process at its end (dev/LOG.md, "A rank on gloo that is aborted")
            end_process()
    except BrokenPipeError:  # the reader of our output has ended, as in `... | head -1`
        discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except SystemExit as error:  # a rank that a signal told to stop, as before a time limit
        if get_process_group() and isinstance(error.code, int):
            exit_with(error.code)
        raise
    except (Exception, KeyboardInterrupt) as error:
        if ending := explain_ending(error):
            exit_with(*ending)
        if not get_process_group():
            raise
        exit_with(1, traceback.format_exc().rstrip())


def explain_ending(error: BaseException) -> tuple[int, str] | None:
    """The exit code and the sentence for an error that is no bug of ours, else None."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by Ctrl-C"
    if isinstance(error, UnicodeEncodeError):
        character = error.object[error.start]
        if "\udc80" <= character <= "\udcff":  # how Python keeps a byte of a file's name that it can't decode
            return 2, f"error: {ascii(error.object)[:500]} has the byte 0x{ord(character) - 0xdc00:x}, which isn't " \
                      f"{error.encoding}, and what is to open it takes nothing else; rename the file or the folder"
        if error.encoding != "utf-8" and error.encoding == sys.getfilesystemencoding():
            return 2, f"error: a file's name has the character {character!a}, which the encoding of this locale, " \
                      f"{error.encoding}, lacks; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    if isinstance(error, (RuntimeError, MemoryError)):
        dist = sys.modules.get("torch.distributed")  # where it isn't loaded, none of its errors can be raised
        if is_collective_error(error) and "out of memory" in str(error):
            return 2, f"error: NCCL, which connects the GPUs, is out of memory on rank {get_ranks().rank} " \
                      f"({get_first_line(error)}); set a smaller --device-batch-size, where the script has it, and " \
                      "run again to go on from the last checkpoint"
        is_gloos = any(text in str(error).lower() for text in ("gloo", "caused pair closure"))    # not all name it
        if dist and (isinstance(error, dist.DistError) or (dist.is_initialized() and is_gloos)):
            return 1, f"error: rank {get_ranks().rank} can't reach the other ranks any more: one of them has ended " \
                      "(what it said stands above) or did not answer for " \
                      f"{get_collective_timeout().total_seconds():g} s; run the same command again to go on from " \
                      f"the last checkpoint ({get_first_line(error)})"
        if is_out_of_memory(error):
            return 2, f"error: out of memory ({get_first_line(error)}); set a smaller --device-batch-size, where the " \
                      "script has it, or take a smaller model"
    if isinstance(error, OSError):
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
            return 2, f"error: no permission for {error.filename} ({error.strerror}); change it, or set " \
                      "NANOCHAT_BASE_DIR to a folder that you can write to"
        if error.errno in (errno.ENAMETOOLONG, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ELOOP) and \
                isinstance(error.filename, str | bytes):
            return 2, f"error: {printable(error.filename2 or error.filename)} can't be used ({error.strerror}); name " \
                      "another one"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" while writing {error.filename}" if error.filename else ""
            return 2, f"error: the disk is full{where}; what was saved before is intact, free some space and run again"
    return None


def end_process(code: int = 0) -> None:
    """End this process with exit code `code`, without Python's own teardown of all that is loaded."""
    atexit._run_exitfuncs()  # the compiler's, which would leave processes and semaphores behind, and wandb's
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def exit_with(code: int, message: str = "") -> None:
    """Print `message`, if there is one, to stderr and end this process with `code`."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stderr.write(message and message + "\n")  # in one piece, unlike print: ranks share a terminal
        sys.stderr.flush()
    if get_process_group():
        time.sleep(1)  # other ranks may still be reading this one's last message before they end alike
        # Torn down alive, NCCL's communicator waits for kernels that need the other ranks (never seen, no GPU was
        # there); gloo's may abort the process
        end_process(code)
    sys.exit(code)
