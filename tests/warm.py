"""Processes forked from a warm one, which has imported torch and nanochat: a start costs some 0.1 s of CPU, not 2 to 3.

Each runs a module as `python -m` does, with an environment of its own. What a fork can't show (how a script begins, the
settings that torch's threads read when torch is loaded, an interpreter's flags) needs `subprocess`.
"""

import atexit
import contextlib
import fcntl
import functools
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

import pytest

REPO_DIR = Path(__file__).resolve().parents[1]
FORKS = get_context("forkserver")
# Imported late by others: the compiler by the first step of an optimizer, pandas (where it is installed) by pyarrow
PRELOADED = ["tests.helpers", "tests.data_helpers", "tests.server_helpers", "nanochat.chat_stage", "nanochat.loss_eval",
             "nanochat.rl", "torch._inductor.compile_fx", "pandas"]


def start_warm_process() -> None:
    """Start the process that others are forked from, once; it holds what they share, and no threads."""
    FORKS.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPO_DIR), *sys.path])))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


def run_module(words: list[str], env: dict[str, str], cwd: str, pipes: dict[int, Connection],
               is_terminal: bool = False) -> None:
    """What a fork does: `python -u -m` with these words."""
    for fd, pipe in pipes.items():
        os.dup2(pipe.fileno(), fd)
    for pipe in pipes.values():
        pipe.close()
    if is_terminal:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)    # so that Ctrl-C reaches it
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.executable = env.get("WARM_PYTHON", sys.executable)     # what it starts is a fork, too
    sys.argv = ["-m", *words[1:]]
    sys.modules.pop(words[0], None)     # helpers may have imported it
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


class WarmProcess:
    """A fork that runs a module, to be used as a `subprocess.Popen` with text pipes for stdin, stdout and stderr; or at
    a terminal, the file descriptor `terminal`, of which it is the only process."""

    def __init__(self, words: list[str], env: dict[str, str], terminal: int | None = None) -> None:
        start_warm_process()
        theirs, ours = {}, {}
        for fd in range(3):
            if terminal is not None:
                theirs[fd] = Connection(os.dup(terminal))
                continue
            reader, writer = FORKS.Pipe(duplex=False)
            theirs[fd], ours[fd] = (reader, writer) if fd == 0 else (writer, reader)
        self.args = words
        self.process = FORKS.Process(target=run_module, args=(words, env, str(REPO_DIR), theirs, terminal is not None))
        self.process.start()
        self.pid = self.process.pid
        if terminal is None:
            self.stdin, self.stdout, self.stderr = (
                open(os.dup(pipe.fileno()), "r" if fd else "w", encoding="utf-8") for fd, pipe in ours.items())
        for pipe in (*theirs.values(), *ours.values()):
            pipe.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.wait()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, minus the number of a signal that killed it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.process.exitcode

    def communicate(self, input: str = "", timeout: float | None = None) -> tuple[str, str]:
        """All that it prints until its end; it is killed if that takes longer than `timeout` seconds."""
        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, self.kill)
        timer.start()
        errors = []
        thread = threading.Thread(target=lambda: errors.append(self.stderr.read()))
        thread.start()
        with contextlib.suppress(BrokenPipeError):
            if not self.stdin.closed:   # by an earlier call
                self.stdin.write(input)
                self.stdin.close()
        output = self.stdout.read()
        thread.join()
        self.wait()
        timer.cancel()
        return output, errors[0]

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------------
# A `python` for what starts processes by itself: recipes, torchrun, sweeps

STARTING = threading.Lock()     # multiprocessing's own records aren't safe from threads


@functools.cache
def make_warm_python() -> Path:
    """An executable to be called as python: `-m MODULE ...` runs in a fork, all else in a fresh interpreter."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    path = folder / "python"
    client = REPO_DIR / "tests" / "programs" / "warm_client.py"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{client}" "{folder}/socket" "$@"\n')
    path.chmod(0o755)
    start_warm_process()

    def accept() -> None:
        while True:
            threading.Thread(target=serve_client, args=(listener.accept()[0],), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()
    return path


def serve_client(client: socket.socket) -> None:
    """Run what a client asks for, on its own files; it is told the exit code. If it dies, so does the fork."""
    _, fds, *_ = socket.recv_fds(client, 1, 3)
    request = json.loads(client.makefile().readline())
    pipes = {fd: Connection(theirs, writable=fd > 0, readable=fd == 0) for fd, theirs in enumerate(fds)}
    process = FORKS.Process(target=run_module, args=(request["words"], request["env"], request["cwd"], pipes))
    with STARTING:
        process.start()
    for pipe in pipes.values():
        pipe.close()
    if process.sentinel not in wait([process.sentinel, client]):
        process.kill()
        wait([process.sentinel])
    with STARTING:
        process.join()
    with contextlib.suppress(BrokenPipeError):
        client.sendall(f"{process.exitcode}\n".encode())
    client.close()


def use_warm_python(env: dict[str, str]) -> dict[str, str]:
    """`env`, in which the commands python and torchrun of a bash script mean forks, and so does what they start."""
    path = str(make_warm_python())
    return env | {"WARM_PYTHON": path, "BASH_FUNC_python%%": f'() {{ "{path}" "$@"; }}',
                  "BASH_FUNC_torchrun%%": f'() {{ "{path}" -m torch.distributed.run "$@"; }}'}
