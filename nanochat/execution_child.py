"""The child process of execution.py: isolate this process, then run the program that arrives on stdin.

    python -I -S -u execution_child.py METHOD STATUS_FD CALLER_PID MEMORY_BYTES CPU_SECONDS [PATH ...]

METHOD namespaces builds the isolation here; with bubblewrap this process is inside bwrap's already; none has no
isolation. PATHs are the host's files that the program may read. All three add the kernel's resource limits, an empty
set of capabilities and a system call filter. Only the standard library is imported, so that this starts in 20 ms.

    this process, outside -> pid 1 of the new namespaces -> the program, pid 2

The kernel kills a pid namespace when its pid 1 ends. Pid 1 ends when the program ends or the process outside is killed,
so no process survives. See namespaces(7), seccomp(2), mount_setattr(2).
"""

import ctypes
import errno
import os
import struct
import sys

ROOT = "/proc"              # the new root is mounted here: the folder is on every Linux and holds none of PATHs
NOBODY = 65534
SCRATCH_BYTES = 32 * 2**20  # of the sandbox's /tmp, the only writable folder; it is memory, on top of MEMORY_BYTES
MAX_OPEN_FILES = 64
MAX_THREADS = 256           # of all programs together where the caller is root, and before Linux 5.14
MAX_ERROR_CHARS = 1000

# Linux's numbers, from signal.h, sched.h, mount.h, prctl.h, capability.h; the module signal takes 6 ms to import
SIGKILL = 9
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWCGROUP, CLONE_THREAD = 0x20000000, 0x40000000, 0x2000000, 0x10000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 0x1000, 0x4000, 0x40000
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MNT_DETACH = -100, 0x8000, 1, 2, 2
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
NO_CAPABILITIES = struct.pack("Ii", 0x20080522, 0), bytes(24)   # _LINUX_CAPABILITY_VERSION_3
SYS_MOUNT_SETATTR, SYS_CLONE3 = 442, 435

# System calls that the filter refuses, by the machine: (number on x86_64, number on aarch64; None = it has none)
REFUSED = {
    # other processes and programs: without fork, the memory limit of one process bounds the whole program
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_getfd": (438, 438), "kcmp": (312, 272),
    # sockets of every family: some, as AF_VSOCK to a virtual machine's host, know no namespaces
    "socket": (41, 198),
    # nested namespaces, in which a process would have all capabilities again
    "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51), "pivot_root": (155, 41), "mount": (165, 40),
    "umount2": (166, 39), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    # memory that RLIMIT_AS doesn't count
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "mq_open": (240, 180),
    # large parts of the kernel that no test needs
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "open_by_handle_at": (304, 265),
}
MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column above, AUDIT_ARCH, clone's number


def main() -> None:
    method, status_fd, caller_pid, memory_bytes, cpu_seconds, *paths = sys.argv[1:]
    # The first line is a nonce that begins each message to the caller, so that the program can't forge one by accident
    nonce, _, code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").partition("\n")
    if method != "bubblewrap" and sys.platform == "linux":  # bwrap --die-with-parent
        call("prctl", PR_SET_PDEATHSIG, SIGKILL)
        if os.getppid() != int(caller_pid):
            sys.exit("the caller is gone")
    if method == "namespaces":
        enter_namespaces(paths)
    try:
        give_up_rights(int(memory_bytes), int(cpu_seconds))
    except (OSError, ValueError, AttributeError):  # the last: no prctl in this C library
        if method != "none":
            raise
    run(code, int(status_fd), nonce)


def call(name: str, *args: object) -> None:
    """Call a function of the C library; OSError where it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*(ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def enter_namespaces(paths: list[str]) -> None:
    """Move into new namespaces: `paths`, an empty /tmp, no network, no other process. Returns in the inner process."""
    os.umask(0o022)
    namespaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
    try:
        call("unshare", namespaces)
        is_root = True
    except PermissionError:  # only root may; anyone else needs a user namespace
        is_root = False
        uid, gid = os.geteuid(), os.getegid()
        call("unshare", namespaces | CLONE_NEWUSER)
        for name, line in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
                file.write(line)
    outside_reader, outside_writer = os.pipe()  # reads its end when the process outside is dead
    fork_and_follow()
    os.close(outside_writer)
    change_root(paths)
    if is_root:  # after the mounts, which may need root's rights, as for a Python in /root
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("capset", *NO_CAPABILITIES)
    call("prctl", PR_SET_PDEATHSIG, SIGKILL)  # after the change of user, which clears it ...
    os.set_blocking(outside_reader, False)
    try:
        os._exit(len(os.read(outside_reader, 1)))    # ... and the caller may be dead by then
    except BlockingIOError:
        os.close(outside_reader)
    fork_and_follow()
    os.setsid()  # else kill(0) would reach the process outside


def fork_and_follow() -> None:
    """Fork; the child returns, this process waits for it and ends with its exit code."""
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os._exit(code if code >= 0 else 128 - code)


def change_root(paths: list[str]) -> None:
    """Make a root file system of `paths`, read-only, and an empty /tmp. There is no /proc either."""
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    call("mount", b"tmpfs", ROOT.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"size=1m,mode=755")
    for path in paths:
        target = ROOT + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):  # as /lib -> usr/lib
            os.symlink(os.readlink(path), target)
            continue
        if os.path.isdir(path):
            os.mkdir(target)
        else:
            open(target, "xb").close()
        call("mount", os.fsencode(path), os.fsencode(target), None, MS_BIND | MS_REC, None)
    os.mkdir(ROOT + "/tmp")
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    call("syscall", SYS_MOUNT_SETATTR, AT_FDCWD, ROOT.encode(), AT_RECURSIVE, attributes, len(attributes))
    call("mount", b"tmpfs", f"{ROOT}/tmp".encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC,
         f"size={SCRATCH_BYTES},nr_inodes=4096,mode=1777".encode())
    os.chdir(ROOT)
    # Puts the old root on top of the new, see pivot_root(2)
    call("syscall", REFUSED["pivot_root"][get_machine()[0]], b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/tmp")


def give_up_rights(memory_bytes: int, cpu_seconds: int) -> None:
    """Set the kernel's resource limits, drop all capabilities, forbid new ones, refuse the system calls in REFUSED. The
    kernel never undoes this. `memory_bytes` 0 is no limit on memory."""
    import resource  # not on Windows, where execution.py imports this file and says what is missing
    limits = {"CORE": 0, "CPU": cpu_seconds, "FSIZE": SCRATCH_BYTES, "NOFILE": MAX_OPEN_FILES, "NPROC": MAX_THREADS}
    for name, value in (limits | ({"AS": memory_bytes} if memory_bytes else {})).items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    call("capset", *NO_CAPABILITIES)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    instructions = make_filter(*get_machine())
    buffer = ctypes.create_string_buffer(b"".join(instructions))
    program = struct.pack("HxxxxxxQ", len(instructions), ctypes.addressof(buffer))  # struct sock_fprog
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def get_machine() -> tuple[int, int, int]:
    """This machine's row of MACHINES; OSError where there is none."""
    if (name := os.uname().machine) not in MACHINES:
        raise OSError(errno.ENOSYS, f"the numbers of the system calls of {name} aren't known here")
    return MACHINES[name]


def make_filter(column: int, arch: int, clone: int) -> list[bytes]:
    """The program that the kernel runs at each system call, one `struct sock_filter` each, see seccomp(2)."""
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ .., BPF_RET
    number_offset, arch_offset, flags_offset = 0, 4, 16                 # in struct seccomp_data
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x50000               # SECCOMP_RET_..; an errno is added to the last

    def step(code: int, value: int, jump_true: int = 0, jump_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, jump_true, jump_false, value)

    steps = [step(load, arch_offset), step(equal, arch, 1, 0), step(end, kill),  # 32-bit calls have other numbers
             step(load, number_offset),
             step(at_least, 0x40000000, 0, 1), step(end, refuse + errno.EPERM),  # x32: the same calls, other numbers
             step(equal, SYS_CLONE3, 0, 1), step(end, refuse + errno.ENOSYS)]    # so that libraries use clone instead
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            steps += [step(equal, numbers[column], 0, 1), step(end, refuse + errno.EPERM)]
    return steps + [step(equal, clone, 0, 3), step(load, flags_offset), step(any_bit, CLONE_THREAD, 1, 0),
                    step(end, refuse + errno.EPERM),  # threads yes, processes no
                    step(end, allow)]


def run(code: str, status_fd: int, nonce: str) -> None:
    """Run `code` as __main__ and report to the caller on `status_fd`: started, then finished or the error. "finished"
    is sent before the program's remaining threads and exit handlers; the exit code tells how those end."""
    write, leave, show = os.write, os._exit, sys.excepthook  # before the program can replace them
    started, finished, no_memory = (f"{nonce}{word}".encode() for word in ("started", "finished", "MemoryError"))
    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv = [""]
    os.environ.clear()  # bwrap and Python set one each
    write(status_fd, started)
    try:
        exec(compile(code, "<program>", "exec", dont_inherit=True), module.__dict__)
    except MemoryError:
        write(status_fd, no_memory)  # made before: now there may be no memory for a string
        leave(1)
    except BaseException as error:  # SystemExit too: an early exit skips the tests that follow
        try:
            text = str(error)
        except BaseException:  # a broken __str__ of the program's
            text = "(no text)"
        message = f"{nonce}{type(error).__name__}: {text}"[:len(nonce) + MAX_ERROR_CHARS]
        write(status_fd, message.encode("utf-8", "replace"))
        show(type(error), error.with_traceback(error.__traceback__.tb_next), None)  # without this function's line
        leave(1)
    write(status_fd, finished)


if __name__ == "__main__":
    main()
