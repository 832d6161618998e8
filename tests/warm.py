"""Processes forked from a warm one, which has imported torch and nanochat: a start costs some 0.1 s of CPU, not 2 to 3.

Each runs a module as `python -m` does, with an environment of its own. What a fork can't show (how a script begins, the
settings that torch's threads read when torch is loaded, an interpreter's flags) needs `subprocess`.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

REPO_DIR = Path(__file__).resolve().parents[1]
FORKS = get_context("forkserver")
# Imported late by others: the compiler by the first step of an optimizer, pandas (where it is installed) by pyarrow
PRELOADED = ["tests.helpers", "tests.data_helpers", "tests.server_helpers", "nanochat.chat_stage", "nanochat.core_eval",
             "nanochat.rl", "torch._inductor.compile_fx", "pandas"]


def start_warm_process() -> None:
    """Start the process that others are forked from, once; it holds what they share, and no threads."""
    FORKS.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPO_DIR), *sys.path])))
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


def run_module(words: list[str], env: dict[str, str], pipes: dict[int, Connection]) -> None:
    """What a fork does: `python -u -m` with these words."""
    for fd, pipe in pipes.items():
        os.dup2(pipe.fileno(), fd)
        pipe.close()
    sys.stdin = open(0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(REPO_DIR)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-m", *words[1:]]
    sys.modules.pop(words[0], None)     # helpers may have imported it
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


class WarmProcess:
    """A fork that runs a module, to be used as a `subprocess.Popen` with text pipes for stdin, stdout and stderr."""

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        start_warm_process()
        theirs, ours = {}, {}
        for fd in range(3):
            reader, writer = FORKS.Pipe(duplex=False)
            theirs[fd], ours[fd] = (reader, writer) if fd == 0 else (writer, reader)
        self.args = words
        self.process = FORKS.Process(target=run_module, args=(words, env, theirs))
        self.process.start()
        self.pid = self.process.pid
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
