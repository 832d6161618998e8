"""The engines as the server sees them: who gets a request, and what happens when an engine dies or hangs.

    pool = EnginePool(start, num_workers=2, max_rows=32, max_waiting=64)
    pool.start()                                          # returns when all engines are ready
    answer = pool.submit([Request(...)], timeout_sec=60)  # in the server's event loop; Busy when the queue is full
    events = await answer.next_events()                   # EngineError when time is over or the engine is lost
    answer.close()                                        # at any time; its rows are free at once

    server process:  event loop --requests, cancels--> inbox thread -> Engine.step()  :engine process, one per device
                     event loop <-- reader thread <--- the events of each step -----

A process apart keeps the engine's steps and the server's work from waiting for each other, and what kills an engine
(no memory, a fault of a kernel) kills nothing else: its requests are told, a new one is started. One that hangs gives
no sign of life any more (see engine_process.py) and is killed. All but the threads runs in the event loop, so there are
no locks.
"""

import asyncio
import contextlib
import itertools
import json
import math
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Process
from multiprocessing.connection import Connection
from statistics import median, quantiles

from nanochat.common import UserError
from nanochat.engine_process import PULSE_SEC, decode_event, encode_request
from nanochat.engine_request import Event, Request

START_TIMEOUT_SEC = 600       # for a model to be loaded
STOP_TIMEOUT_SEC = 5          # for an engine to end its step, before it is killed
MAX_SILENT_SEC = 20           # without a sign of life, before an engine is killed; a busy machine may skip some
MAX_RESTART_PAUSE_SEC = 30.0  # between attempts to start an engine that dies at once
HANDOVER_SEC = 0.04           # at least, between two pieces of an answer: fewer are less work for server and client
                              # (dev/LOG.md), and nobody reads faster
RATE_WINDOW_SEC = 10          # over which tokens per second are counted
NUM_LATENCIES = 1000          # of the last requests, from which percentiles are computed
AFFINITY_TOKENS = 64          # of a prompt that decide which worker gets it, where several are as free


class EngineError(Exception):
    """There is no engine for an answer, or none any more."""


class Busy(EngineError):
    """All rows are taken and the queue is full."""

    def __init__(self, retry_after_sec: int):
        super().__init__("all rows are taken and the queue is full; try again later")
        self.retry_after_sec = retry_after_sec


class TimeOver(EngineError):
    """It took longer than the server allows."""


class Refused(EngineError):
    """The engine can't answer such a request."""


class Answer:
    """The events of one HTTP request's generations, in the order that they come."""

    def __init__(self, pool: "EnginePool", worker: "EngineWorker", requests: Sequence[Request], timeout_sec: float):
        self.pool, self.worker = pool, worker
        self.num_prompt_tokens = len(requests[0].tokens)
        self.num_tokens = 0
        self.samples = {next(pool.ids): i for i in range(len(requests))}  # generation -> which of the requests
        self.unfinished = set(self.samples)
        self.start = time.perf_counter()
        self.first_token_sec: float | None = None
        self._events: list[Event] = []
        self._error: EngineError | None = None
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._next_handover_sec = 0.0             # by the loop's clock
        self._handover: asyncio.TimerHandle | None = None
        self._deadline = self._loop.call_later(timeout_sec, self.fail, TimeOver(
            f"the answer was not finished within {timeout_sec:g} s"))

    def receive(self, event: Event) -> None:
        """Take the next event of one of the generations."""
        if self.first_token_sec is None:
            self.first_token_sec = time.perf_counter() - self.start
            self.pool.first_token_secs.append(self.first_token_sec)
        self.num_tokens += 1
        if event.finish_reason:
            self._end(event.request_id)
            if not self.unfinished:
                self._deadline.cancel()
                self.pool.answer_secs.append(time.perf_counter() - self.start)
        self._events.append(event)
        if not self.unfinished:
            self._wake.set()
        elif self._handover is None:
            self._handover = self._loop.call_at(self._next_handover_sec, self._wake.set)

    def fail(self, error: EngineError) -> None:
        """End what is unfinished; whoever waits gets the error after the events that came before it."""
        if self.unfinished:
            self.close()
            self._error = error
            self._wake.set()

    def close(self) -> None:
        """Drop what is unfinished, at once."""
        self._deadline.cancel()
        for generation_id in list(self.unfinished):
            self._end(generation_id)
            self.worker.cancel(generation_id)

    def _end(self, generation_id: int) -> None:
        self.unfinished.discard(generation_id)
        self.worker.answers.pop(generation_id, None)

    async def wait(self) -> None:
        """Wait until there are events; raises EngineError where there won't be any."""
        await self._wake.wait()
        if self._error and not self._events:
            raise self._error

    async def next_events(self) -> list[Event]:
        """The events since the last call, at least one; their request_id is a key of `samples`.

        The first comes at once, and the last; between them so many at a time that there is HANDOVER_SEC between calls.
        """
        await self.wait()
        events, self._events = self._events, []
        self._handover, self._next_handover_sec = None, self._loop.time() + HANDOVER_SEC
        if not self._error:
            self._wake.clear()
        return events

    def has_more(self) -> bool:
        return bool(self.unfinished or self._events or self._error)


class EngineWorker:
    """One engine's process: starts it, watches it, starts it again."""

    def __init__(self, pool: "EnginePool", worker_idx: int):
        self.pool, self.worker_idx = pool, worker_idx
        self.answers: dict[int, Answer] = {}       # of the generations that are under way
        self.connection: Connection | None = None  # None while there is no engine
        self.description = ""                      # of device and dtype
        self.failure: str | None = None            # why the last engine could not be loaded
        self.num_restarts = 0
        self.silent_sec = 0.0                      # since the engine was heard, or started
        self.process: Process | None = None
        self.started = threading.Event()           # the first engine is ready, or failed
        self.thread = threading.Thread(target=self._watch, name=f"engine-{worker_idx}", daemon=True)
        self.outbox = ThreadPoolExecutor(1, f"outbox-{worker_idx}")

    def send(self, message: bytes) -> None:
        """To the engine, if there is one, without waiting: one that hangs reads nothing. Errors are the reader's."""
        connection = self.connection  # the thread may forget it meanwhile
        if connection is not None:
            self.outbox.submit(connection.send_bytes, message)

    def cancel(self, generation_id: int) -> None:
        self.send(json.dumps({"cancel": generation_id}).encode())

    def check_pulse(self) -> None:
        """Kill an engine that has been silent for too long; call it every PULSE_SEC.

        Calls are counted, not the time: that stands still for the engine, too, while the whole program is suspended.
        """
        self.silent_sec += PULSE_SEC
        if self.process is not None and self.silent_sec > (MAX_SILENT_SEC if self.connection else START_TIMEOUT_SEC):
            self.failure = f"no sign of life for {self.silent_sec:g} s"
            self.process.kill()

    def _watch(self) -> None:
        """The thread: start an engine, read what it says to its end, and again."""
        pause_sec = 1.0
        while not self.pool.closing:
            start = time.monotonic()
            self._run_engine()
            self.started.set()
            if self.pool.closing:
                return
            self.pool.log(event="engine_lost", worker=self.worker_idx, failure=self.failure,
                          exit_code=getattr(self.process, "exitcode", None))
            self.num_restarts += 1
            lived_long = time.monotonic() - start > 2 * MAX_RESTART_PAUSE_SEC
            pause_sec = 1.0 if lived_long else min(2 * pause_sec, MAX_RESTART_PAUSE_SEC)
            self.pool.closed.wait(pause_sec)

    def _run_engine(self) -> None:
        """The thread: one engine, from its start to its end."""
        self.silent_sec = 0.0
        try:
            connection, self.process = self.pool.start_engine(self.worker_idx)
        except OSError as error:
            self.failure = f"engine {self.worker_idx} can't be started ({error.strerror})"
            return
        with connection, contextlib.suppress(EOFError, OSError):
            while True:
                self._read(connection, json.loads(connection.recv_bytes()))
        self.connection = None
        self.pool.call_soon(self._fail_answers)
        self.process.join(STOP_TIMEOUT_SEC)
        self.process.kill()  # if it has closed its end and is there all the same
        self.process.join(STOP_TIMEOUT_SEC)

    def _read(self, connection: Connection, message: dict) -> None:
        """The thread: one message of the engine."""
        self.failure, self.silent_sec = message.get("failure"), 0.0
        if "ready" in message:
            self.description, self.connection = message["ready"], connection
            self.pool.log(event="engine_ready", worker=self.worker_idx, device=self.description)
            self.started.set()
        elif "events" in message:
            self.pool.call_soon(self._receive, list(map(decode_event, message["events"])), message["refusals"])

    def _receive(self, events: list[Event], refusals: list[tuple[int, str]]) -> None:
        self.pool.count_tokens(len(events))
        for event in events:
            if answer := self.answers.get(event.request_id):  # else it was cancelled meanwhile
                answer.receive(event)
        for generation_id, reason in refusals:
            if answer := self.answers.get(generation_id):
                answer.fail(Refused(reason))

    def _fail_answers(self) -> None:
        for answer in set(self.answers.values()):
            answer.fail(EngineError("the engine of this request has ended; a new one is being started, try again"))


class EnginePool:
    def __init__(self, start_engine: Callable[[int], tuple[Connection, Process]], num_workers: int, max_rows: int,
                 max_waiting: int, log: Callable[..., None]):
        """max_rows: of each engine; max_waiting: generations beyond the rows, of all workers together

        start_engine: worker index -> (connection, process or thread) that does run_engine at its other end
        """
        self.start_engine, self.log = start_engine, log
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.ids = itertools.count()
        self.loop: asyncio.AbstractEventLoop | None = None  # of the server, while it runs
        self.closed = threading.Event()
        self.tokens_by_second: deque[tuple[int, int]] = deque(maxlen=RATE_WINDOW_SEC + 1)
        self.first_token_secs: deque[float] = deque(maxlen=NUM_LATENCIES)
        self.answer_secs: deque[float] = deque(maxlen=NUM_LATENCIES)
        self.workers = [EngineWorker(self, i) for i in range(num_workers)]

    @property
    def closing(self) -> bool:
        return self.closed.is_set()

    def start(self) -> None:
        """Start all engines and wait until they are ready; UserError where one can't be."""
        for worker in self.workers:
            worker.thread.start()
        threading.Thread(target=self._check_pulses, name="pulses", daemon=True).start()
        for worker in self.workers:
            if not worker.started.wait(START_TIMEOUT_SEC):
                self.close()
                raise UserError(f"engine {worker.worker_idx} was not ready after {START_TIMEOUT_SEC} s; try a smaller "
                                "model or --device-type cpu")
            if worker.connection is None:
                self.close()
                raise UserError(worker.failure or f"engine {worker.worker_idx} ended while it loaded the model; the "
                                "reason stands above, or it was killed for want of memory")

    def close(self) -> None:
        """End all engines; those that don't, or that are still loading, are killed."""
        self.closed.set()
        for worker in self.workers:
            worker.send(b"null")
        for worker in self.workers:
            if worker.connection is not None:
                worker.thread.join(STOP_TIMEOUT_SEC)
            if worker.thread.is_alive() and worker.process is not None:
                worker.process.kill()
                worker.thread.join()
            worker.outbox.shutdown()

    def _check_pulses(self) -> None:
        """The thread: see that the engines are alive."""
        while not self.closed.wait(PULSE_SEC):
            for worker in self.workers:
                worker.check_pulse()

    def call_soon(self, function: Callable, *args) -> None:
        """Call a function in the server's event loop, from a thread."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(function, *args)

    def submit(self, requests: Sequence[Request], timeout_sec: float) -> Answer:
        """Give the samples of a prompt to the engine that is the least busy; Busy where there is no room for them."""
        ready = [worker for worker in self.workers if worker.connection is not None]
        if not ready:
            raise EngineError("no engine is ready; one is being started, try again")
        if len(requests) > self.max_rows + self.max_waiting:
            raise Refused(f"{len(requests)} samples at once are more than this server's rows and queue hold")
        num_active = sum(len(worker.answers) for worker in ready)
        if num_active + len(requests) > len(ready) * self.max_rows + self.max_waiting:
            raise Busy(self._estimate_wait_sec())
        # Where several are as free, the prompt's beginning decides, so that a conversation finds its own prefix again
        begin = zlib.crc32(json.dumps(list(requests[0].tokens[:AFFINITY_TOKENS])).encode())
        worker = min(ready, key=lambda worker: (len(worker.answers), (worker.worker_idx - begin) % len(self.workers)))
        answer = Answer(self, worker, requests, timeout_sec)
        for generation_id, request in zip(answer.samples, requests, strict=True):
            worker.answers[generation_id] = answer
            worker.send(encode_request(generation_id, request))
        return answer

    def _estimate_wait_sec(self) -> int:
        """In about what time a request of the queue's end may be answered."""
        answer_sec = median(self.answer_secs) if self.answer_secs else 1.0
        return min(max(1, math.ceil(answer_sec * self.max_waiting / (self.max_rows * len(self.workers)))), 60)

    def count_tokens(self, num_tokens: int) -> None:
        second = int(time.monotonic())
        if self.tokens_by_second and self.tokens_by_second[-1][0] == second:
            num_tokens += self.tokens_by_second.pop()[1]
        self.tokens_by_second.append((second, num_tokens))

    def get_stats(self) -> dict:
        """Rows, queue, tokens per second and latencies, for /stats."""
        oldest = int(time.monotonic()) - RATE_WINDOW_SEC
        num_tokens = sum(number for second, number in self.tokens_by_second if second >= oldest)
        workers = [{"worker": worker.worker_idx, "ready": worker.connection is not None,
                    "device": worker.description, "restarts": worker.num_restarts,
                    "running": min(len(worker.answers), self.max_rows),
                    "waiting": max(0, len(worker.answers) - self.max_rows)} for worker in self.workers]
        return {"rows": self.max_rows * len(workers), "running": sum(worker["running"] for worker in workers),
                "waiting": sum(worker["waiting"] for worker in workers), "max_waiting": self.max_waiting,
                "tokens_per_sec": round(num_tokens / RATE_WINDOW_SEC, 1),
                "first_token_ms": compute_percentiles(self.first_token_secs),
                "answer_ms": compute_percentiles(self.answer_secs), "workers": workers}


def compute_percentiles(seconds: Sequence[float]) -> dict:
    """p50, p95 and p99 in milliseconds; None where nothing was measured."""
    if not seconds:
        return {"p50": None, "p95": None, "p99": None}
    cuts = quantiles([*seconds, seconds[-1]] if len(seconds) == 1 else seconds, n=100, method="inclusive")
    return {f"p{percent}": round(cuts[percent - 1] * 1e3, 1) for percent in (50, 95, 99)}
