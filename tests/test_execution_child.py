"""Each layer of the sandbox by itself, in a fork of this process: limits, system calls, user, namespaces."""

import mmap
import os
import platform
import socket
import sys
import threading
from pathlib import Path

import pytest

from nanochat import execution, execution_child
from tests.helpers import run_forked

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux"),
    pytest.mark.skipif(platform.machine() not in execution_child.MACHINES, reason="its system calls aren't known")]


def try_calls(*calls) -> list[str]:
    """For each call the name of its error, or "done"."""
    answers = []
    for call in calls:
        try:
            call()
            answers.append("done")
        except Exception as error:
            answers.append(type(error).__name__)
    return answers


def give_up_rights(memory_bytes: int) -> None:
    """With so much memory beyond what this fork has mapped already, which the limit counts: often more than 2 GiB."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    execution_child.give_up_rights(memory_bytes=mapped + memory_bytes, cpu_seconds=5)


def test_limits_are_the_kernels():
    def attempt():
        before = try_calls(lambda: mmap.mmap(-1, 2**31))
        give_up_rights(memory_bytes=2**30)
        files = [lambda: open("/dev/null") for _ in range(2 * execution_child.MAX_OPEN_FILES)]
        kept = []
        opened = try_calls(*(lambda call=call: kept.append(call()) for call in files))
        return before, try_calls(lambda: mmap.mmap(-1, 2**31)), opened.count("done") <= execution_child.MAX_OPEN_FILES
    assert run_forked(attempt) == [["done"], ["OSError"], True]


def test_refused_system_calls():
    """No process, program or socket can be made; a thread, a pipe and a file can."""
    def attempt():
        give_up_rights(memory_bytes=2**30)
        refused = try_calls(os.fork, lambda: os.execv(sys.executable, [sys.executable]), socket.socket,
                            lambda: execution_child.call("unshare", execution_child.CLONE_NEWUSER),
                            lambda: execution_child.call("ptrace", 0, 0, 0, 0))
        thread = threading.Thread(target=print)
        return refused, try_calls(thread.start, os.pipe, lambda: open(__file__).close())
    assert run_forked(attempt) == [["PermissionError"] * 5, ["done"] * 3]


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() != 0, reason="needs root's capabilities, to lose them")
def test_capabilities_are_dropped():
    def attempt():
        give_up_rights(memory_bytes=2**30)
        return [line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm"))]
    assert run_forked(attempt) == ["0" * 16] * 2


def test_unknown_machine_is_named(monkeypatch):
    monkeypatch.setattr(execution_child, "MACHINES", {})
    with pytest.raises(OSError, match=f"system calls of {platform.machine()} aren't known"):
        execution_child.get_machine()


def test_kernel_that_allows_no_namespaces():
    """The real refusal: a user namespace in which the kernel makes no other."""
    def attempt() -> tuple[str, str]:
        execution_child.call("unshare", execution_child.CLONE_NEWUSER)
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
        execution.find_method.cache_clear()
        return execution.find_method()
    method, reason = run_forked(attempt)
    assert method == "none" and "namespaces: the sandbox didn't start: OSError" in reason, reason
