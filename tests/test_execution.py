"""Programs that try to escape, to exceed limits, to survive, or to feign success, in the real sandbox."""

import functools
import gzip
import json
import os
import platform
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat import execution, execution_child
from nanochat.common import UserError
from nanochat.execution import ExecutionResult, check_isolation, execute_code, execute_many
from tests.helpers import REPO_DIR, run_forked

HUMANEVAL_PATH = REPO_DIR.parent / "shared" / "data" / "tasks" / "humaneval_dev.jsonl.gz"
METHOD, REASON = execution.find_method()
isolated = pytest.mark.skipif(METHOD == "none", reason=f"no isolation on this machine: {REASON}")
probe = functools.cache(execution._probe)


@pytest.fixture(params=["namespaces", pytest.param("bubblewrap", marks=pytest.mark.slow)])
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each method that this machine has, whichever it would choose."""
    if reason := probe(request.param):
        pytest.skip(f"{request.param}: {reason}")
    monkeypatch.setattr(execution, "find_method", lambda: (request.param, ""))
    return request.param


def find_processes(caller_pid: int) -> list[str]:
    """Processes of sandboxes that this caller started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(word.endswith("execution_child.py") for word in words) and str(caller_pid) in words:
            found.append(path.parent.name)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds


# ---------------------------------------------------------------------------------------------------------------------
# Programs that mean well

@pytest.mark.parametrize(("code", "stdout"), [
    ("print('héllo', 1 + 1)", "héllo 2\n"),
    ("", ""),
    ("def f(n):\n    return n * f(n - 1) if n else 1\nprint(f(20))", "2432902008176640000\n"),  # sees its own globals
    ("if __name__ == '__main__':\n    print(__name__)", "__main__\n"),
    ("import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int'\nprint(A(1))", "A(x=1)\n"),
    ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))) is A)", "True\n"),
    ("import math, re, collections, itertools, typing, heapq, random, hashlib, sqlite3, decimal, datetime\n"
     "print(hashlib.md5(b'').hexdigest()[:4], sqlite3.connect(':memory:').execute('select 2').fetchone())",
     "d41d (2,)\n"),
    ("import threading, time\ndef f():\n    time.sleep(0.05)\n    print('thread')\nthreading.Thread(target=f).start()",
     "thread\n"),
    ("from concurrent.futures import ThreadPoolExecutor\nprint(list(ThreadPoolExecutor(4).map(abs, [-1, 2])))",
     "[1, 2]\n"),
    ("import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    return 5\nprint(asyncio.run(f()))", "5\n"),
    ("import tempfile\nwith tempfile.TemporaryFile() as f:\n    f.write(b'x' * 1000)\n    print(f.tell())", "1000\n"),
    ("import os\nprint(os.getcwd(), os.listdir(), dict(os.environ), len(os.urandom(4)))", "/tmp [] {} 4\n"),
    ("open('/dev/null', 'w').write('x')\nprint(open('/dev/zero', 'rb').read(2))", "b'\\x00\\x00'\n"),
    ("import sys\nprint(sys.argv, sys.stdin.read() == '', sys.flags.isolated)", "[''] True 1\n"),
    ("import atexit\natexit.register(print, 'bye')", "bye\n"),
    ("import sys\nsys.stdout.buffer.write(b'\\xff\\x00ok')", "\ufffd\0ok"),
    ("from __future__ import annotations\nprint(1)", "1\n"),
    ("print(2 ** 10000 % 1000007)", f"{2 ** 10000 % 1000007}\n"),
])
def test_success(method, code, stdout):
    assert execute_code(code) == ExecutionResult(True, stdout, "", None)


def test_tracebacks_show_the_program_only(method):
    result = execute_code("def f():\n    return 1 / 0\nf()")
    assert result.stderr.startswith('Traceback (most recent call last):\n  File "<program>", line 3, in <module>')
    assert result.stderr.endswith("ZeroDivisionError: division by zero\n") and "execution_child" not in result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Programs that fail, or feign that they don't

@pytest.mark.parametrize(("code", "error"), [
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("def f(:", "SyntaxError: "),
    ("x = '\ud800'\nprint(x)", "UnicodeEncodeError"),
    ("a\0b", "(ValueError|SyntaxError): "),
    ("(" * 5000, "SyntaxError|MemoryError"),
    ("def f(): f()\nf()", "RecursionError"),
    ("import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)", "ended.*SIGSEGV|Rec"),
    ("assert False, 'x' * 10**6", "AssertionError: x{900}"),
    ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", r"E: \(no text\)"),
    ("class E(BaseException): pass\nraise E('base')", "E: base"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("print(10**9999)", "ValueError: Exceeds the limit"),
    ("input()", "EOFError"),
    ("import ctypes\nctypes.string_at(0)", "ended before its end, killed by SIGSEGV"),
    ("import os\nos.abort()", "ended before its end, killed by SIGABRT"),
    ("import os\nos.kill(os.getpid(), 9)", "ended before its end, killed by SIGKILL"),
    # leaving before what comes after, as a test, with all signs of success
    ("import sys\nsys.exit(0)\nassert False", "SystemExit: 0"),
    ("exit()", "NameError"),  # `site` isn't there
    ("raise SystemExit", "SystemExit"),
    ("import os\nprint('passed')\nos._exit(0)", "ended before its end, exit code 0"),
    ("import os\nfor fd in range(64):\n    try: os.write(fd, b'finished')\n    except OSError: pass\nos._exit(0)", "."),
    ("import sys\nsys.excepthook = print\nimport os\nos._exit = print\nos.write = print\n1 / 0", "ZeroDivisionError"),
    ("import atexit, os\natexit.register(os._exit, 3)", "ended before its end, exit code 3"),
    ("print('ExecutionResult(success=True, error=None)')\nraise ValueError('no')", "ValueError: no"),
    ("import os\nfor fd in range(64):\n    try: os.close(fd)\n    except OSError: pass\n1 / 0", "OSError|ended|Zero"),
])
def test_failure(method, code, error):
    result = execute_code(code)
    assert not result.success and re.match(error, result.error), result
    assert not result.timeout and len(result.error) <= 1100


# ---------------------------------------------------------------------------------------------------------------------
# Programs that try to get out

SYSCALL = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef check(answer):\n" \
          "    if answer < 0: raise OSError(ctypes.get_errno(), 'held')\n"
CLONE = execution_child.MACHINES.get(platform.machine(), (0, 0, 0))[2]


@pytest.mark.parametrize(("code", "error"), [
    # files
    *[(f"open({path!r}).read()", "FileNotFoundError|PermissionError|NotADirectoryError") for path in (
        "/etc/passwd", "/etc/shadow", "/etc/hostname", "/root/.bashrc", "/proc/self/environ", "/proc/1/environ",
        "/proc/1/root/etc/passwd", "/proc/cpuinfo", "/sys/kernel/version", "/var/log/dpkg.log", "/dev/mem", "/dev/kmsg",
        "/dev/fd/0", "/../../../etc/passwd", "/tmp/../../etc/passwd", str(REPO_DIR / "README.md"),
        sys.prefix + "/pyvenv.cfg", "/run/docker.sock", "/usr/bin/env", "/bin/sh")],
    *[(f"import os\nos.listdir({str(path)!r})", "FileNotFoundError") for path in (
        REPO_DIR, Path(sys.prefix), "/proc", "/sys", "/etc/ssl", "/home", "/var", "/usr/bin")],
    *[(f"open({path!r}, 'w')", "OSError: .Errno 30. Read-only|PermissionError") for path in (
        "/new", "/usr/lib/new", f"{execution.PYTHON.parents[1]}/lib/new", os.__file__, "/dev/new", "/etc/new")],
    ("import os\nos.remove(os.__file__)", "OSError: .Errno 30. Read-only|PermissionError"),
    ("import os\nos.chmod(os.__file__, 0o777)", "OSError: .Errno 30. Read-only|PermissionError"),
    ("import os\nos.symlink('/etc/passwd', 'link')\nopen('link')", "FileNotFoundError"),
    ("import os\nos.symlink('/', 'link')\nos.listdir('link/etc/ssl')", "FileNotFoundError"),
    ("import os\nos.symlink('/proc/self/root', 'link')\nos.listdir('link')", "FileNotFoundError"),
    ("import os\nos.mkdir('a')\nd = os.open('/', 0)\nos.chroot('a')", "PermissionError"),
    ("import os\nd = os.open('.', 0)\nfor _ in range(99): os.chdir('..')\nos.stat('etc/passwd')", "FileNotFoundError"),
    ("import os\nos.mknod('disk', 0o60600, os.makedev(8, 0))", "PermissionError"),
    ("import os\nopen('su', 'w').close()\nos.chmod('su', 0o4755)\nos.execv('su', ['su'])", "PermissionError"),
    # network; 1 is filled in with the port of a live listener
    ("import socket\nsocket.create_connection(('127.0.0.1', 1), timeout=2)", "PermissionError"),
    ("import socket\nsocket.getaddrinfo('example.com', 80)", "socket.gaierror|gaierror|PermissionError"),
    ("import socket\nsocket.socket(socket.AF_UNIX).connect('\\0/tmp/.X11-unix/X0')", "PermissionError"),
    ("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM)", "PermissionError"),
    ("import socket\nsocket.socket(getattr(socket, 'AF_VSOCK', 40), socket.SOCK_STREAM)", "PermissionError"),
    ("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "PermissionError"),
    ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1', timeout=2)", "URLError.*not permitted"),
    # processes
    ("import os\nos.fork()", "PermissionError"),
    ("while True:\n    import os\n    os.fork()", "PermissionError"),
    ("import subprocess\nsubprocess.run(['true'])", "PermissionError|FileNotFoundError"),
    ("import multiprocessing\nmultiprocessing.get_context('fork').Process(target=print).start()", "PermissionError"),
    ("import os\nassert os.system('true') != 0\nraise OSError('held')", "OSError: held"),
    ("import os, sys\nos.execv(sys.executable, ['python'])", "PermissionError|FileNotFoundError"),
    ("import os\nos.kill(CALLER, 0)", "ProcessLookupError"),
    ("import os\nos.kill(PARENT, 9)", "ProcessLookupError"),
    ("import os\nos.sched_setaffinity(CALLER, [0])", "ProcessLookupError"),
    ("import os\nos.kill(-1, 9)\nraise OSError('only itself')", "OSError|ProcessLookupError|ended"),
    # the kernel
    *[(f"{SYSCALL}check(libc.{code})", "PermissionError: .Errno 1. held") for code in (
        "ptrace(16, 1, 0, 0)", "process_vm_readv(1, bytes(16), 1, bytes(16), 1, 0)", "sethostname(b'x', 1)",
        "unshare(0x10000000)", "setns(0, 0)", "reboot(0)", "umount2(b'/tmp', 2)", "chroot(b'/tmp')",
        "mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None)", "mount(b'/', b'/tmp', None, 4096, None)",
        "mount(None, b'/', None, 4128, None)", "syscall(442, -100, b'/', 0, bytes(32), 32)",
        "memfd_create(b'x', 0)", "shmget(0, 1 << 30, 0o1600)", "syscall(425, 8, None)",
        f"syscall({CLONE}, 0x10000000 | 17, 0, 0, 0, 0)", f"syscall({CLONE}, 17, 0, 0, 0, 0)")],
    (SYSCALL + "check(libc.setuid(0))", "(Permission|OS)Error: .Errno (1|22). held"),
    (SYSCALL + "check(libc.syscall(435, bytes(88), 88))", "OSError: .Errno 38. held"),  # clone3
    (SYSCALL + "if libc.prctl(39, 0, 0, 0, 0) == 1 and libc.prctl(21, 0, 0, 0, 0) == 2: check(-1)", "OSError: .* held"),
    ("import resource as r\nr.setrlimit(r.RLIMIT_AS, (2**40, 2**40))", "ValueError: not allowed to raise"),
])
def test_stays_inside(method, code, error):
    # numbers of processes differ from run to run, which a test's name may not
    code = code.replace("CALLER", str(os.getpid())).replace("PARENT", str(os.getppid()))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = execute_code(code.replace("'127.0.0.1', 1", f"'127.0.0.1', {port}").replace(":1'", f":{port}'"))
    assert not result.success and re.match(error, result.error), result


def test_signals_to_everyone_reach_nobody_else(method):
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append("SIGTERM"))
    try:
        for target in ("os.getppid()", "0", "-1", "1"):
            execute_code(f"import os, signal\nsignal.signal(15, signal.SIG_IGN)\nos.kill({target}, 15)")
        time.sleep(0.05)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not received


def test_secrets_of_the_caller_are_not_there(method, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_TEST_SECRET", "hush")
    secret = tmp_path / "secret"
    secret.write_text("hush")
    secret.chmod(0o666)
    with open(secret) as inherited:
        os.set_inheritable(inherited.fileno(), True)
        result = execute_code(f"import os\nprint(dict(os.environ), os.path.exists({str(secret)!r}))\n"
                              "for fd in range(3, 64):\n    try: print('open', os.fstat(fd).st_size)\n"
                              "    except OSError: pass")
    assert result.stdout in ("{} False\nopen 0\n", "{} False\n")  # the pipe to the caller
    result = execute_code("from ctypes import CDLL, POINTER, c_char_p\n"
                          "e = POINTER(c_char_p).in_dll(CDLL(None), 'environ')\nn = 0\n"
                          "while e and e[n]:\n    print(e[n]); n += 1")
    assert "hush" not in result.stdout and "HOME" not in result.stdout


def test_nothing_is_kept_from_one_program_to_the_next(method):
    assert execute_code("open('mine', 'w').write('x')\nopen('/tmp/mine')").success
    assert execute_code("import os\nassert os.listdir('/tmp') == []").success
    assert not Path("/tmp/mine").exists()


def test_the_whole_tree(method):
    """Every file that a program can see is one that it was given; the folders above hold nothing else."""
    code = "import json, os\nprint(json.dumps([os.path.join(f, n) for f, d, ns in os.walk('/') for n in ns + d\n" \
           f"    if not os.path.join(f, n).startswith({(*execution.find_paths(), '/tmp')!r})]))"
    given = [str(path) for top in execution.find_paths() for path in Path(top).parents]
    extra = {"/execution_child.py", *map(str, (execution.PYTHON, *execution.PYTHON.parents))}   # of bubblewrap
    seen = set(json.loads(execute_code(code, timeout=60).stdout))
    assert seen <= {*given, *(extra if method == "bubblewrap" else ())}


@isolated
def test_user_and_names():
    result = execute_code("import os\nprint(os.getuid(), os.getgid(), os.getpid(), os.getppid(), len(os.listdir('/')))")
    uid, gid, pid, parent_pid, num_folders = map(int, result.stdout.split())
    assert (pid, parent_pid) == (2, 1) and num_folders < 12
    if os.geteuid() == 0:
        assert uid == gid == execution_child.NOBODY


# ---------------------------------------------------------------------------------------------------------------------
# Programs that take too much, or stay

@pytest.mark.parametrize("code", [
    "bytes(2**30)", "x = []\nwhile True: x.append('a' * 100000)", "x = []\nwhile True: x.append(len(x) + 10**6)",
    "x = 'a'\nwhile True: x += x", "x = {}\nfor i in range(10**9): x[i] = [i]", "import mmap\nmmap.mmap(-1, 2**30)",
    "x = 1\nwhile True: x <<= 10**8",
])
def test_memory(method, code):
    result = execute_code(code, timeout=20, maximum_memory_bytes=2**27)
    assert not result.success and not result.timeout
    assert result.memory_exceeded == (result.error == "MemoryError")
    assert result.memory_exceeded or "Cannot allocate memory" in result.error


def test_memory_that_is_enough(method):
    code = "x = bytes(100 * 2**20)"
    assert execute_code(code).success and execute_code(code, maximum_memory_bytes=None).success
    assert execute_code(code, maximum_memory_bytes=2**26).memory_exceeded
    assert execute_code("try:\n    bytes(2**30)\nexcept MemoryError:\n    print('caught')").stdout == "caught\n"


def test_disk(method):
    codes = ["f = open('big', 'wb')\nwhile True: f.write(bytes(2**20))",
             "for i in range(10**9):\n    open(str(i), 'wb').write(bytes(2**16))",
             "for i in range(10**9):\n    open(str(i), 'wb').close()"]
    for code in codes[:3 if method == "namespaces" else 2]:  # bwrap doesn't bound the number of files
        result = execute_code(code)
        assert re.match("OSError: .Errno (27|28). (File too large|No space left)", result.error), result


@pytest.mark.parametrize("code", [
    "while True: pass", "import time\ntime.sleep(60)", "x = 9**9**9", "import re\nre.match('(a+)+$', 'a' * 50 + 'b')",
    "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
    "while True: pass",
    "import threading\nthreading.Thread(target=threading.Event().wait).start()",
    "import atexit, time\natexit.register(time.sleep, 60)",
    "import os\nos.close(1)\nos.close(2)\nwhile True: pass",
    "print('before')\nimport threading\nthreading.Lock().__enter__()\nwhile True: pass",
])
def test_time(method, code):
    start = time.monotonic()
    result = execute_code(code, timeout=0.2)
    assert time.monotonic() - start < 5
    assert result.timeout and result.error == "timeout" and not result.success
    assert result.stdout == ("before\n" if "before" in code else "")
    assert wait_until(lambda: not find_processes(os.getpid()))


def test_output(method):
    for stream in ("stdout", "stderr"):
        result = execute_code(f"import sys\nwhile True: print('a' * 9999, file=sys.{stream})", timeout=60)
        assert result.error == f"more than 1,048,576 bytes of {stream}" and not result.timeout
        assert len(getattr(result, stream)) == execution.MAX_OUTPUT_BYTES
    result = execute_code("import os\nwhile True:\n    for fd in range(1, 64):\n"
                          "        try: os.write(fd, b'a' * 9999)\n        except OSError: pass", timeout=60)
    assert result.error.startswith("more than 1,048,576 bytes of")
    assert execute_code("print('a' * 10**6)").success


@isolated
def test_threads_are_bounded():
    result = execute_code("import threading\nthreading.stack_size(2**16)\nstop = threading.Event()\n"
                          "for n in range(10**6): threading.Thread(target=stop.wait, daemon=True).start()", timeout=20)
    assert result.error.startswith("RuntimeError: can't start new thread"), result


def test_nothing_survives_the_caller(method):
    """A caller that is killed can't clean up; the kernel must."""
    if not (pid := os.fork()):
        execution._execute(method, "import time\ntime.sleep(60)", timeout=60, maximum_memory_bytes=None)
        os._exit(0)
    assert wait_until(lambda: len(find_processes(pid)) >= 3)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert wait_until(lambda: not find_processes(pid))


def test_nothing_survives_a_kill_at_any_time(method):
    """Also while the isolation is being built: no process may go on without someone who watches it."""
    pids = []
    for delay_ms in range(0, 60, 3):
        if not (pid := os.fork()):
            execution._execute(method, "import time\ntime.sleep(60)", timeout=60, maximum_memory_bytes=None)
            os._exit(0)
        time.sleep(delay_ms / 1000)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        pids.append(pid)
    time.sleep(0.2)  # a process that hasn't called exec yet isn't found
    assert wait_until(lambda: not any(map(find_processes, pids)))


def test_no_leak_over_a_hundred_calls(method):
    def count() -> tuple[int, int]:
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
        return len(os.listdir("/proc/self/fd")), len(children)
    execute_code("")
    before = count()
    codes = ["pass", "1 / 0", "import os\nos._exit(1)", "print('a' * 2**21)"] * 24
    for code in codes:
        execute_code(code)
    for _ in range(4):
        execute_code("while True: pass", timeout=0.05)
    assert count() == before
    assert wait_until(lambda: not find_processes(os.getpid()))


def test_many_at_once(method):
    results = execute_many([f"print({n})\nassert {n} % 3" for n in range(24)], num_workers=8)
    assert [result.stdout for result in results] == [f"{n}\n" for n in range(24)]
    assert [result.success for result in results] == [n % 3 > 0 for n in range(24)]


# ---------------------------------------------------------------------------------------------------------------------
# Which isolation there is

@isolated
def test_self_test():
    sentence = check_isolation()
    assert re.fullmatch(rf"{METHOD}: no network, .* \d+ ms a program", sentence), sentence


def test_self_test_finds_what_is_not_held(monkeypatch):
    assert re.match("SystemExit: it can read files outside", execution._probe("none"))
    monkeypatch.setattr(execution, "find_method", lambda: ("none", "no reason"))
    with pytest.raises(UserError, match="can't be isolated on this machine .no reason"):
        check_isolation()


@isolated
@pytest.mark.parametrize(("attack", "harmless"), [(r"for path in \(.*\)", "for path in ()"), ("open,.*$", "print, 1")])
def test_probe_needs_every_part(monkeypatch, attack, harmless):
    """Each line of the probe can fail: without isolation it names the first thing that it could do."""
    weaker = re.sub(attack, harmless, execution.PROBE, flags=re.MULTILINE)
    assert weaker != execution.PROBE
    monkeypatch.setattr(execution, "PROBE", weaker)
    assert execution._probe("none")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root, to become someone else")
@pytest.mark.parametrize("name", execution.METHODS)
def test_unprivileged(monkeypatch, name):
    """The same isolation for a user without rights."""
    if name == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bwrap isn't installed")
    pythons = [execution.PYTHON, Path(os.path.realpath("/usr/bin/python3"))]  # root's own may be in root's folder
    python = next((path for path in pythons
                   if run_forked(lambda p=path: os.access(p, os.X_OK), execution_child.NOBODY)), None)
    if not python:
        pytest.skip("no Python that user nobody may run")
    monkeypatch.setattr(execution, "PYTHON", python)
    monkeypatch.setattr(execution, "METHODS", (name,))
    monkeypatch.setattr(execution.tempfile, "tempdir", "/tmp")

    def check() -> str:
        execution.find_method.cache_clear()
        return check_isolation()
    answer = run_forked(check, execution_child.NOBODY)
    assert answer.startswith(f"{name}: no network"), answer


# ---------------------------------------------------------------------------------------------------------------------
# Without isolation

@pytest.fixture
def no_isolation(monkeypatch):
    monkeypatch.setattr(execution, "find_method", lambda: ("none", "bubblewrap: bwrap isn't installed"))


def test_refuses_without_isolation(no_isolation):
    with pytest.raises(UserError, match="bwrap isn't installed.*--allow-unsafe"):
        execute_code("print(1)")
    with pytest.raises(UserError):
        execute_many(["print(1)"])


def test_limits_hold_without_isolation(no_isolation):
    def execute(code: str, **kwargs: float) -> ExecutionResult:
        return execute_code(code, allow_unsafe=True, **kwargs)
    result = execute("import os\nopen('x', 'w').close()\nprint(os.getcwd(), os.listdir(), dict(os.environ))")
    folder, rest = result.stdout.split(" ", 1)
    assert rest == "['x'] {}\n" and not Path(folder).exists() and Path(folder) != Path.cwd()
    assert execute("while True: pass", timeout=0.2).timeout
    assert execute("bytes(2**30)").memory_exceeded
    assert execute("while True: print('a' * 9999)").error.startswith("more than")
    assert execute("open('big', 'wb').write(bytes(2**26))").error.startswith("OSError")
    assert execute("import os\nos._exit(0)").error == "ended before its end, exit code 0"
    assert execute("import os\nos.makedirs('a/b')\nos.chmod('a', 0)").success
    if sys.platform == "linux":
        assert execute("import os\nos.fork()").error.startswith("PermissionError")
        assert execute("import socket\nsocket.socket()").error.startswith("PermissionError")


def test_sandbox_that_does_not_start_is_no_wrong_answer(monkeypatch, no_isolation):
    monkeypatch.setattr(execution, "CHILD", Path("/nowhere/execution_child.py"))
    with pytest.raises(RuntimeError, match="the sandbox didn't start: .*No such file"):
        execute_code("print(1)", allow_unsafe=True)


# ---------------------------------------------------------------------------------------------------------------------
# HumanEval

@isolated
@pytest.mark.skipif(not HUMANEVAL_PATH.exists(), reason="HumanEval isn't there")
def test_humaneval_reference_solutions_pass():
    with gzip.open(HUMANEVAL_PATH, "rt") as file:
        problems = [json.loads(line) for line in file]
    check = "{prompt}{solution}\n{test}\ncheck({entry_point})\n"
    results = execute_many([check.format(solution=row["canonical_solution"], **row) for row in problems])
    assert len(problems) == 131
    assert {row["task_id"]: result.error for row, result in zip(problems, results, strict=True) if result.error} == {}
    wrong = execute_many([check.format(solution="    return None\n", **row) for row in problems[:20]])
    assert not any(result.success for result in wrong)
