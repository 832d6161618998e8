"""What a model writes and wants run: the calculator's expressions, and Python programs in a sandbox.

The calculator, which engine.py calls within an answer, is a walk over the syntax tree of arithmetic; nothing is
executed. A program runs in a fresh, isolated process with limits; without isolation it is refused.

The sandbox has no network, no environment and no other process. Of the host's files it sees only Python's own and the
system's shared libraries, read-only; its /tmp is empty and is deleted afterwards. A program may start threads, but no
process. Its results are its stdout and how it ended. execution_child.py is the program that runs inside.

Not promised: that a program which attacks its own interpreter can't feign success. Its tests run in the same process,
so code that manipulates the frames below it could; printing, exiting early and guessing don't help it.
"""

import ast
import contextlib
import functools
import math
import operator
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nanochat.common import UserError, count_cpus
from nanochat.execution_child import NOBODY, SCRATCH_BYTES

PYTHON = Path(os.path.realpath(sys._base_executable or sys.executable))  # not the venv's, so that no package is visible
CHILD = Path(__file__).with_name("execution_child.py")
MAX_OUTPUT_BYTES = 2**20        # of stdout, and of stderr
START_SECONDS = 30              # until the program runs; usually milliseconds
# Ours comes first: it also turns root into nobody and bounds the number of files. bwrap is for systems that allow user
# namespaces to it alone.
METHODS = ("namespaces", "bubblewrap")
TIMEOUT = "timeout"


@dataclass(frozen=True)
class ExecutionResult:
    """How a program ended, and its output, up to MAX_OUTPUT_BYTES."""
    success:         bool           # it ran to its end: no exception, no exit(), no limit
    stdout:          str
    stderr:          str            # tracebacks included
    error:           str | None     # one line: why it was no success
    timeout:         bool = False
    memory_exceeded: bool = False


def execute_code(code: str, timeout: float = 5.0, maximum_memory_bytes: int | None = 256 * 2**20,
                 allow_unsafe: bool = False) -> ExecutionResult:
    """Run a Python program in the sandbox; UserError where this machine has none, unless `allow_unsafe`.

    timeout:              wall-clock seconds from when the program starts
    maximum_memory_bytes: of address space, interpreter included (some 15 MiB); None = no limit
    allow_unsafe:         where there is no isolation, run the program with this user's rights and the limits alone
    """
    method, reason = find_method()
    if method == "none" and not allow_unsafe:
        raise UserError(f"code that a model wrote isn't run: it can't be isolated on this machine ({reason}); "
                        "install bubblewrap, allow user namespaces, or accept the risk with --allow-unsafe")
    return _execute(method, code, timeout, maximum_memory_bytes)


def execute_many(codes: Sequence[str], timeout: float = 5.0, maximum_memory_bytes: int | None = 256 * 2**20,
                 allow_unsafe: bool = False, num_workers: int | None = None) -> list[ExecutionResult]:
    """execute_code for each program, several at once (by default one for each core); the results in order."""
    with ThreadPoolExecutor(num_workers or count_cpus()) as pool:
        return list(pool.map(lambda code: execute_code(code, timeout, maximum_memory_bytes, allow_unsafe), codes))


# Does the isolation hold on this machine?

# Tries everything that the sandbox must prevent; succeeds only if every attempt fails. _probe fills in the {}
PROBE = """
import ctypes, os, socket
def attempt(what, function, *args):
    try:
        function(*args)
    except OSError:
        return
    raise SystemExit("it can " + what)
def connect():
    socket.create_connection(("127.0.0.1", {port}), timeout=2)
attempt("reach the network", connect)
attempt("read files outside", open, {path!r})
attempt("write files outside", open, {path!r}, "a")
attempt("make files outside", open, {path!r} + ".new", "x")
attempt("write beside the system's files", open, "/new", "x")
attempt("see other processes", os.kill, {pid}, 0)
attempt("start processes", os.fork)
if os.environ:
    raise SystemExit("it can read the environment")
if any(os.path.exists(path) for path in ("/proc/self", "/etc/passwd", "/sys/kernel", "/var/log", "/run")):
    raise SystemExit("it can see the system's files")
open("/tmp/mine", "w").write("fine")
"""


@functools.cache
def find_method() -> tuple[str, str]:
    """The first of METHODS that withstands the probe here, else 'none'; and why each of them failed."""
    if sys.platform != "linux":
        return "none", f"{sys.platform} has no namespaces"
    reasons = []
    for method in METHODS:
        if not (reason := _probe(method)):
            return method, ""
        reasons.append(f"{method}: {reason}")
    return "none", "; ".join(reasons)


def check_isolation() -> str:
    """Test on this machine that programs are isolated and limited; one sentence on how. UserError where they aren't."""
    execute_code("")  # raises where there is no isolation; probes once, so that later calls are faster
    method, _ = find_method()
    start, num_calls = time.perf_counter(), 5
    holds = {"no limit":  all(execute_code("").success for _ in range(num_calls))}
    call_ms = (time.perf_counter() - start) * 1000 / num_calls
    holds |= {"memory": execute_code("bytes(2**30)").memory_exceeded,
              "time":   execute_code("while True: pass", timeout=0.3).timeout,
              "output": (execute_code("while True: print('a' * 9999)").error or "").startswith("more than")}
    if failed := ", ".join(name for name, is_held in holds.items() if not is_held):
        raise UserError(f"programs are isolated by {method}, but their limits fail on this machine: {failed}")
    return (f"{method}: no network, files, processes or environment; memory, time and output limited; "
            f"{call_ms:.0f} ms a program")


def _probe(method: str) -> str:
    """Run PROBE in `method`; '' if the isolation held, else what the probe could do."""
    if method == "bubblewrap" and not shutil.which("bwrap"):
        return "bwrap isn't installed"
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        secret = Path(folder, "secret")
        secret.touch()
        os.chmod(folder, 0o777)  # open to all, so that only the isolation can keep a program away
        os.chmod(secret, 0o666)
        code = PROBE.format(port=server.getsockname()[1], path=str(secret), pid=os.getpid())
        try:
            return _execute(method, code, timeout=10, maximum_memory_bytes=256 * 2**20).error or ""
        except (OSError, RuntimeError) as error:
            return str(error)


def _execute(method: str, code: str, timeout: float, maximum_memory_bytes: int | None) -> ExecutionResult:
    """Start the process, collect its output, kill all that is left. RuntimeError if the program couldn't start."""
    nonce = secrets.token_hex(16)
    status_reader, status_writer = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, os.fdopen(status_reader, "rb") as status:
        try:
            process = subprocess.Popen(_make_command(method, status_writer, timeout, maximum_memory_bytes),
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       pass_fds=[status_writer], env={}, cwd=folder, start_new_session=True)
        finally:
            os.close(status_writer)
        with process:
            try:
                with contextlib.suppress(BrokenPipeError), process.stdin:  # it died early; its stderr has the reason
                    process.stdin.write(f"{nonce}\n{code}".encode("utf-8", "surrogatepass"))
                output, limit = _collect({"stdout": process.stdout, "stderr": process.stderr, "status": status},
                                         timeout)
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: the latter of a zombie
                    os.killpg(process.pid, signal.SIGKILL)  # nobody waited yet, so the pid is still its own
    stdout, stderr = (output[name][:MAX_OUTPUT_BYTES].decode("utf-8", "replace") for name in ("stdout", "stderr"))
    _, *messages = output["status"].decode("utf-8", "replace").split(nonce)
    if not messages:
        reason = stderr.strip().splitlines()[-1:] or [limit or f"exit code {process.returncode}"]
        raise RuntimeError(f"the sandbox didn't start: {reason[0]}")
    error = limit
    if not limit and messages[-1] not in ("started", "finished"):
        error = messages[-1]
    elif not limit and (messages[-1] == "started" or process.returncode):
        # Signal n arrives as -n, or as 128 + n through a process in between
        number = -process.returncode if process.returncode < 0 else process.returncode - 128
        error = "ended before its end, " + (f"killed by {signal.Signals(number).name}"
                                            if number in set(signal.Signals) else f"exit code {process.returncode}")
    return ExecutionResult(error is None, stdout, stderr, error, timeout=limit == TIMEOUT,
                           memory_exceeded=error == "MemoryError")


def _make_command(method: str, status_fd: int, timeout: float, maximum_memory_bytes: int | None) -> list[str]:
    """The command line: execution_child.py, inside bwrap for that method."""
    cpu_seconds = math.ceil(timeout * count_cpus()) + 1  # over all threads; the timeout is shorter
    python = [str(PYTHON), "-I", "-S", "-u", "-X", "utf8"]
    args = [method, str(status_fd), str(os.getpid()), str(maximum_memory_bytes or 0), str(cpu_seconds)]
    if method == "bubblewrap":
        bwrap = [shutil.which("bwrap"), "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
                 "--uid", str(NOBODY), "--gid", str(NOBODY),
                 "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp",
                 "--ro-bind", str(CHILD), "/execution_child.py", "--ro-bind", str(PYTHON), str(PYTHON)]
        for path in find_paths():
            is_link, is_device = os.path.islink(path), path.startswith("/dev")
            bwrap += ["--symlink", os.readlink(path), path] if is_link and not is_device else \
                ["--dev-bind" if is_device else "--ro-bind", path, path]
        return [*bwrap, "--remount-ro", "/", *python, "/execution_child.py", *args]
    return [*python, str(CHILD), *args, *find_paths()]


def find_paths() -> list[str]:
    """The host's files that a program may read: Python's library, the system's libraries, three devices."""
    prefix = PYTHON.parents[1]
    paths = [str(prefix / "lib"), str(prefix / "lib64"), "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache",
             "/dev/null", "/dev/zero", "/dev/urandom"]
    return [path for path in dict.fromkeys(paths)
            if os.path.exists(path) and not any(str(parent) in paths for parent in Path(path).parents)]


def _collect(pipes: dict[str, BinaryIO], timeout: float) -> tuple[dict[str, bytearray], str | None]:
    """Read all pipes to their ends or up to a limit; returns the output and the limit that was reached."""
    output = {name: bytearray() for name in pipes}
    deadline = time.monotonic() + START_SECONDS
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        while selector.get_map():
            is_started = bool(output["status"])
            if time.monotonic() >= deadline:
                return output, TIMEOUT
            for key, _ in selector.select(max(0, deadline - time.monotonic())):
                block = os.read(key.fd, 2**16)
                output[key.data] += block
                if not block:
                    selector.unregister(key.fileobj)
                if len(output[key.data]) > MAX_OUTPUT_BYTES:
                    return output, f"more than {MAX_OUTPUT_BYTES:,} bytes of {key.data}"
            if output["status"] and not is_started:
                deadline = time.monotonic() + timeout
    return output, None


# The calculator

MAX_CHARS = 256         # of the expression
MAX_DEPTH = 128         # of the syntax tree; a sum of n numbers is n - 1 deep
MAX_MAGNITUDE = 10**18  # of every number, intermediate results included; bounds the result's length, too
FLOAT_DIGITS = 12       # significant digits of a result: too few to show 0.1 + 0.2 as 0.30000000000000004

OPERATORS = {
    ast.UAdd: operator.pos,     ast.USub:     operator.neg,
    ast.Add:  operator.add,     ast.Sub:      operator.sub,      ast.Mult: operator.mul,
    ast.Div:  operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod:  operator.mod,
}
ODD_NUMBER = re.compile(r"[0-9]_|\b0[xXbBoO]")
WARNINGS_LOCK = threading.Lock()    # tasks are read in threads
THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def calculate(expression: str) -> str | None:
    """The value of an expression as text; None where it is refused or undefined (division by zero).

        1,234 * (2 + 0.5)           numbers, + - * / // %, parentheses, commas between thousands
        'strawberry'.count('r')     how often one string occurs in another

    The expression is untrusted text: everything else is refused, and length, depth and magnitude are bounded, so that
    a result takes microseconds. There is no power operator, which makes huge numbers from short expressions.
    """
    # Python's grammar has more numbers than arithmetic (0x10, 1_000) and strings with escapes
    if len(expression) > MAX_CHARS or "\\" in expression or ODD_NUMBER.search(expression):
        return None
    if not set("'\"") & set(expression):  # a comma inside a string is a character to count
        expression = THOUSANDS_COMMA.sub("", expression)
    try:
        with WARNINGS_LOCK, warnings.catch_warnings():    # whose state is the whole process's
            warnings.simplefilter("ignore")  # the parser's, about text such as 1or 2
            tree = ast.parse(expression.strip(), mode="eval")
        value = _evaluate(tree.body, depth=0)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None  # the last two: the parser, for deep nesting
    if isinstance(value, int) or (value.is_integer() and abs(value) < 10**15):  # larger floats skip whole numbers
        return str(int(value))
    return f"{value:.{FLOAT_DIGITS}g}"


def _evaluate(node: ast.expr, depth: int) -> int | float:
    """The value of a syntax tree; ValueError for anything but arithmetic, and beyond the bounds."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_evaluate(left, depth + 1), _evaluate(right, depth + 1))
        case ast.UnaryOp(op, operand) if type(op) in OPERATORS:
            value = OPERATORS[type(op)](_evaluate(operand, depth + 1))
        case ast.Call(ast.Attribute(ast.Constant(str() as text), "count"), [ast.Constant(str() as part)], []):
            value = text.count(part)
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")
    if not abs(value) <= MAX_MAGNITUDE:
        raise ValueError("too large")  # infinity included
    return value
