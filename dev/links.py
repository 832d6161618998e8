"""Links for dev/fabric.py: what stands between our code and its collectives, and ranks in processes that it connects.

A Wire records the messages of a step, and delays them as a link of a given latency and rate would: a message is through
no earlier than its time on the link, which begins when the one before it is through. Without that clock, messages that
overlap would each have the whole link. The messages themselves go as fast as they can.
"""

import contextlib
import ctypes
import json
import math
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from nanochat import optim
from nanochat.common import MAX_PROCESSES, UserError, count_cpus, print0
from nanochat.devices import synchronize
from nanochat.fabric import Event, Network

CPU = torch.device("cpu")
SPIN_SEC = 2e-4    # the end of a wait is spun, since a sleep ends some 50 microseconds late
GRACE_SEC = 10     # for the other ranks to say what they think of one that failed
PR_SET_PDEATHSIG = 1    # of Linux's prctl.h


class Moment(NamedTuple):
    """An event of a step as it ran."""
    event: Event
    begin: float    # perf_counter's seconds
    end:   float


class SentMessage:
    """Stands for the Work of a collective."""

    def __init__(self, wire: "Wire", work: object, key: int, due: float):
        self.wire, self.work, self.key, self.due = wire, work, key, due

    def wait(self) -> None:
        begin = time.perf_counter()
        if self.work is not None:
            self.work.wait()
        synchronize(self.wire.device)
        while (left := self.due - time.perf_counter()) > 0:
            if left > SPIN_SEC:
                time.sleep(left - SPIN_SEC)
        self.wire.moments.append(Moment(Event("wait", "", key=self.key), begin, time.perf_counter()))


class Wire:
    """The collectives of optim.py, common.py and moe.py, recorded and delayed; `network` None adds no delay."""

    def __init__(self, device: torch.device = CPU, network: Network | None = None):
        self.device, self.network, self.free_at, self.num_sent = device, network, 0.0, 0
        self.moments: list[Moment] = []

    def send(self, kind: str, num_bytes: int, call: Callable[[], object], async_op: bool) -> SentMessage | None:
        synchronize(self.device)    # a GPU would begin to send only after what is queued
        begin, due = time.perf_counter(), 0.0
        if self.network:
            due = self.free_at = max(begin, self.free_at) + self.network.time(kind, num_bytes)
        message = SentMessage(self, call(), self.num_sent, due)
        self.moments.append(Moment(Event(kind, "", num_bytes, self.num_sent), begin, time.perf_counter()))
        self.num_sent += 1
        return message if async_op else message.wait()

    def clear(self) -> None:
        self.moments, self.free_at, self.num_sent = [], 0.0, 0

    def meet(self) -> float:
        """Wait for all ranks, by no recorded message; returns the time."""
        if dist.is_initialized():
            dist.barrier()
        return time.perf_counter()

    @contextlib.contextmanager
    def tapped(self) -> Iterator["Wire"]:
        """All messages go through this wire meanwhile."""
        all_reduce, reduce_scatter, all_gather = dist.all_reduce, optim.reduce_scatter, optim.all_gather

        def tap(kind: str, collective: Callable, whole_of: int) -> Callable:
            def send(*tensors, async_op=False, **settings):
                return self.send(kind, tensors[whole_of].nbytes,
                                 lambda: collective(*tensors, async_op=async_op, **settings), async_op)
            return send
        dist.all_reduce = tap("all_reduce", all_reduce, 0)
        optim.reduce_scatter, optim.all_gather = tap("reduce_scatter", reduce_scatter, 1), \
            tap("all_gather", all_gather, 0)
        try:
            yield self
        finally:
            dist.all_reduce, optim.reduce_scatter, optim.all_gather = all_reduce, reduce_scatter, all_gather


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def choose_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(argv: Sequence[str], num_ranks: int, before: Sequence[Sequence[str]] = (), address: str = "127.0.0.1",
              **env: str) -> dict:
    """Run `python -m` with these words, --here and --json FILE once for each rank, on this machine; returns rank 0's
    JSON.
    before: words before each rank's command"""
    if num_ranks > MAX_PROCESSES:
        raise UserError(f"--ranks {num_ranks} are too many for one machine; start at most {MAX_PROCESSES}")
    with tempfile.TemporaryDirectory() as folder:
        path, port, ranks = Path(folder) / "result.json", choose_port(), []
        for rank in range(num_ranks):
            settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks,
                        "MASTER_ADDR": address, "MASTER_PORT": port, **env}
            words = ["env", *(f"{name}={value}" for name, value in settings.items()), sys.executable, "-m", *argv]
            ranks.append(subprocess.Popen([*(before[rank] if before else ()), *words, "--here", "--json", str(path)],
                                          stdout=subprocess.DEVNULL, preexec_fn=end_with_parent))
        codes = wait_for_all(ranks)
        if any(codes):
            raise UserError(f"{sum(map(bool, codes))} of {num_ranks} ranks failed; what they said stands above")
        return json.loads(path.read_text(encoding="utf-8"))


def end_with_parent() -> None:
    """Have Linux kill this process when the one that started it is gone, however it ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_for_all(ranks: Sequence[subprocess.Popen]) -> list[int]:
    """Exit codes. Where a rank fails, the others are killed after GRACE_SEC: those that haven't met it yet would wait
    for it for half an hour."""
    deadline = math.inf
    try:
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            if any(process.poll() for process in ranks):
                deadline = min(deadline, time.monotonic() + GRACE_SEC)
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
    return [process.wait() for process in ranks]


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM, which `timeout` sends, raises SystemExit meanwhile, so that ranks are ended and namespaces deleted."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def warn_of_cores(num_ranks: int) -> None:
    if num_ranks > (cores := count_cpus()):
        print0(f"warning: {num_ranks} ranks share {cores} cores; they wait for each other's computation, too")


# ---------------------------------------------------------------------------------------------------------------------
# Real shaping


def run_tool(*words: str) -> str:
    """The output of a command of the system; UserError where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", check=True)
    except FileNotFoundError:
        raise UserError(f"--shape needs the command {words[0]}, of the package iproute2, which isn't there") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"--shape needs root and network namespaces: `{' '.join(words)}` failed ({reason}); leave it "
                        "out to have links by injection") from None
    return done.stdout


@contextlib.contextmanager
def shaped_namespaces(num_ranks: int, bytes_per_sec: float) -> Iterator[list[list[str]]]:
    """A network namespace for each rank, joined by a bridge, in which tc lets so much out; yields the words before a
    command that runs in each. Rank r has the address 10.77.0.<r + 1>, on eth0."""
    prefix = f"fabric{time.time_ns() % 10**7:07d}"
    switch, spaces = f"{prefix}s", [f"{prefix}r{rank}" for rank in range(num_ranks)]
    made = []
    try:
        for name in (switch, *spaces):
            run_tool("ip", "netns", "add", name)
            made.append(name)
            run_tool("ip", "-n", name, "link", "set", "lo", "up")
        run_tool("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run_tool("ip", "-n", switch, "link", "set", "bridge", "up")
        for rank, name in enumerate(spaces):
            run_tool("ip", "-n", switch, "link", "add", f"port{rank}", "type", "veth", "peer", "name", "eth0", "netns",
                     name)
            run_tool("ip", "-n", switch, "link", "set", f"port{rank}", "master", "bridge", "up")
            run_tool("ip", "-n", name, "address", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
            run_tool("ip", "-n", name, "link", "set", "eth0", "up")
            run_tool("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", "rate",
                     f"{round(bytes_per_sec * 8)}bit", "burst", "256kb", "latency", "200ms")
        yield [["ip", "netns", "exec", name] for name in spaces]
    finally:
        for name in made:
            with contextlib.suppress(UserError):
                run_tool("ip", "netns", "delete", name)
