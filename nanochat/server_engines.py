"""The engines of a server: one process per device, and the pool that hands requests to them.

    server process:  event loop --requests, cancels--> inbox thread -> Engine.step()  :engine process, one per device
                     event loop <-- reader thread <--- the events of each step -----

Separate processes keep the engine's steps and the server's event loop from delaying each other. An engine that crashes
(out of memory, a kernel's fault) takes nothing with it: its requests get an error, and a new engine is started. An
engine that sends no heartbeat for MAX_SILENT_SEC is killed and replaced. All state but the threads' lives in the event
loop, so there are no locks.

The messages of a connection are pickled tuples, which only these two processes can write: no other has its ends:
    to an engine:    ("submit", id, Request)   ("cancel", id)   None: end
    from an engine:  ("ready", where it runs) or ("failure", reason), once
                     ("events", [Event, ...], [(id, reason of a refusal), ...]) after each step
                     ("alive",) each second, also in the middle of a step
"""

import asyncio
import contextlib
import itertools
import json
import math
import multiprocessing
import queue
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median, quantiles

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.command_line import end_process
from nanochat.common import UserError, count_cpus
from nanochat.devices import find_device_type, get_compute_dtype, init_compute
from nanochat.engine import Engine, Event, Request
from nanochat.flash_attention import choose_for_inference

PULSE_SEC = 1.0               # between two heartbeats of an engine
MAX_STEP_SEC = 300            # a longer step counts as endless and stops the heartbeat; assumption: prefilling 512
                              # tokens takes a 2 B parameter model a minute on two cores
MAX_SILENT_SEC = 20           # without a heartbeat, before an engine is killed; a busy machine may delay some
START_TIMEOUT_SEC = 600       # for an engine to load its model
STOP_TIMEOUT_SEC = 5          # for an engine to end its step, before it is killed
MAX_RESTART_PAUSE_SEC = 30.0  # between two starts of an engine that crashes at once
RETRY_SEC = 5                 # that a client is told to wait where an engine is lost
HANDOVER_SEC = 0.04           # least time between two pieces of a stream: fewer pieces are less work for server and
                              # client (dev/LOG.md, "Tokens of a stream in pieces")
RATE_WINDOW_SEC = 10          # of tokens per second
NUM_COUNTS = 20_000           # steps of all engines in that time, at most
NUM_LATENCIES = 1000          # most recent requests in the latency percentiles
AFFINITY_TOKENS = 64          # prefix of a prompt that chooses among equally free engines


@dataclass(frozen=True)
class EngineSettings:
    """What an engine's process needs to load its model."""
    stage:       str
    tag:         str
    step:        int
    dtype:       str
    device_type: str
    max_rows:    int
    num_workers: int
    compile:     bool = False  # the decoding step, on a CPU, before the engine is ready


def start_process(worker_idx: int, settings: EngineSettings) -> tuple[Connection, multiprocessing.Process]:
    """Start an engine; returns our end of its connection, and its process."""
    context = multiprocessing.get_context("spawn")  # CUDA can't be used in a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=run_process, args=(worker_idx, settings, theirs), daemon=True)
    process.start()
    theirs.close()  # or a closed end would never be noticed
    return ours, process


def run_process(worker_idx: int, settings: EngineSettings, connection: Connection) -> None:
    """The main function of an engine's process; ends with the connection, so signals are left to the server."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows lacks the last one
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    try:
        device_type = find_device_type(settings.device_type)
        if device_type in ("cuda", "xpu"):  # the workers are distributed over the GPUs in turn
            device_type += f":{worker_idx % max(1, torch.accelerator.device_count())}"
        device, _ = init_compute(device_type)
        if device.type == "cpu":
            torch.set_num_threads(max(1, count_cpus() // settings.num_workers))
        dtype, reason = get_compute_dtype(settings.dtype, device)
        model, tokenizer, _ = load_model(settings.stage, device, tag=settings.tag, step=settings.step, dtype=dtype)
        backend = choose_for_inference(device, dtype, model.config)
        engine = Engine(model, tokenizer, max_rows=settings.max_rows, kept_rows=settings.max_rows,
                        compile=settings.compile)
    except UserError as error:
        connection.send(("failure", str(error)))
        return
    run_engine(engine, connection, f"{device} in {str(dtype).removeprefix('torch.')} ({reason}), attention {backend}")
    end_process()  # Python's own exit takes seconds to tear torch down, and the server waits


def run_engine(engine: Engine, connection: Connection, description: str = "") -> None:
    """Answer the requests of a connection until it is closed."""
    inbox: queue.SimpleQueue[tuple | None] = queue.SimpleQueue()
    sending = threading.Lock()
    step_start = math.inf  # of the current step, in seconds

    def send(*message) -> None:
        with sending:
            connection.send(message)

    def read() -> None:
        with contextlib.suppress(EOFError, OSError):
            while message := connection.recv():
                inbox.put(message)
        inbox.put(None)

    def pulse() -> None:
        with contextlib.suppress(OSError):  # the connection is closed
            while True:
                time.sleep(PULSE_SEC)
                if time.monotonic() - step_start < MAX_STEP_SEC:
                    send("alive")
    threading.Thread(target=read, name="inbox", daemon=True).start()
    threading.Thread(target=pulse, name="pulse", daemon=True).start()
    with connection, contextlib.suppress(BrokenPipeError):  # the server has ended
        send("ready", description)
        while True:
            refusals = []
            while not inbox.empty() or not (engine.has_work() or refusals):
                match inbox.get():
                    case None:
                        return
                    case "cancel", request_id:
                        engine.cancel(request_id)
                    case "submit", request_id, request:
                        try:
                            engine.submit(request, request_id)
                        except UserError as error:
                            refusals.append((request_id, str(error)))
            step_start = time.monotonic()
            events = engine.step()
            step_start = math.inf
            if events or refusals:
                send("events", events, refusals)


class EngineError(Exception):
    """An answer that no engine can give, or finish; kind: refused, busy, timeout, lost (engine), gone (client)."""

    def __init__(self, kind: str, message: str, retry_after_sec: int | None = None):
        super().__init__(message)
        self.kind, self.retry_after_sec = kind, retry_after_sec


class Answer:
    """The events of one HTTP request, which may ask for several samples, in the order of their arrival."""

    def __init__(self, pool: "EnginePool", worker: "EngineWorker", requests: Sequence[Request], timeout_sec: float):
        self.pool, self.worker = pool, worker
        self.num_prompt_tokens = sum(len(request.tokens) for request in requests if request.sample == 0)
        self.num_tokens = 0
        self.request_ids = [next(pool.ids) for _ in requests]  # of the samples
        self.start = time.perf_counter()
        self.first_token_sec: float | None = None
        self._events: list[Event] = []
        self._error: EngineError | None = None
        self._wake = asyncio.Event()
        self._next_handover_sec = 0.0             # by the event loop's clock
        self._handover: asyncio.TimerHandle | None = None
        self._deadline = pool.loop.call_later(timeout_sec, self.fail, EngineError(
            "timeout", f"the answer was not finished within {timeout_sec:g} s"))

    def find_unfinished(self) -> list[int]:
        """The ids of the requests that still generate."""
        return [request_id for request_id in self.request_ids if request_id in self.worker.answers]

    def receive(self, event: Event) -> None:
        """Take the next event of one of the samples."""
        if self.first_token_sec is None:
            self.first_token_sec = time.perf_counter() - self.start
            self.pool.first_token_secs.append(self.first_token_sec)
        self.num_tokens += 1
        self._events.append(event)
        if event.finish_reason:
            del self.worker.answers[event.request_id]
            if not self.find_unfinished():
                self._deadline.cancel()
                self.pool.answer_secs.append(time.perf_counter() - self.start)
                self._wake.set()
        if self._handover is None:
            self._handover = self.pool.loop.call_at(self._next_handover_sec, self._wake.set)

    def fail(self, error: EngineError) -> None:
        """Drop the unfinished samples; `iterate` raises the error after the events that came before it."""
        if self.find_unfinished():
            self.close()
            self._error = error
            self._wake.set()

    def close(self) -> None:
        """Drop the unfinished samples, at once."""
        self._deadline.cancel()
        for request_id in self.find_unfinished():
            del self.worker.answers[request_id]
            self.worker.send(("cancel", request_id))

    async def wait(self) -> None:
        """Wait until there are events; raises EngineError where there won't be any."""
        await self._wake.wait()
        if self._error and not self._events:
            raise self._error

    async def iterate(self) -> AsyncIterator[list[Event]]:
        """The first and the last event come at once, those between them in pieces, HANDOVER_SEC apart.

        EngineError after a timeout or where the engine is lost. An event's request_id is one of `request_ids`.
        """
        while self._events or self._error or self.find_unfinished():
            await self.wait()
            events, self._events = self._events, []
            self._handover, self._next_handover_sec = None, self.pool.loop.time() + HANDOVER_SEC
            if not self._error:
                self._wake.clear()
            yield events


class EngineWorker:
    """One engine's process: starts it, watches it, restarts it."""

    def __init__(self, pool: "EnginePool", worker_idx: int):
        self.pool, self.worker_idx = pool, worker_idx
        self.answers: dict[int, Answer] = {}       # of the unfinished requests, by request id
        self.connection: Connection | None = None  # None while there is no engine
        self.description = ""                      # device, dtype and attention
        self.failure: str | None = None            # reason why the last engine could not be loaded
        self.num_restarts = 0
        self.num_messages = 0                      # of all its engines
        self.process: multiprocessing.Process | None = None
        self.started = threading.Event()           # the first engine is ready, or failed
        self.thread = threading.Thread(target=self._watch, name=f"engine-{worker_idx}", daemon=True)
        self.outbox = ThreadPoolExecutor(1, f"outbox-{worker_idx}")

    def send(self, message: tuple | None) -> None:
        """Send to the engine, if there is one, without blocking: a hung engine reads nothing."""
        connection = self.connection  # the thread may reset it meanwhile
        if connection is not None:
            self.outbox.submit(connection.send, message)  # the reader thread notices a failure

    def _watch(self) -> None:
        """The thread: start an engine, watch it until it ends, and again."""
        pause_sec = 1.0
        while not self.pool.closed.is_set():
            start = time.monotonic()
            self._run_engine()
            self.started.set()
            if self.pool.closed.is_set():
                return
            self.pool.log(event="engine_lost", worker=self.worker_idx, failure=self.failure,
                          exit_code=getattr(self.process, "exitcode", None))
            self.num_restarts += 1
            lived_long = time.monotonic() - start > 2 * MAX_RESTART_PAUSE_SEC
            pause_sec = 1.0 if lived_long else min(2 * pause_sec, MAX_RESTART_PAUSE_SEC)
            self.pool.closed.wait(pause_sec)

    def _run_engine(self) -> None:
        """The thread: one engine, from its start to its end; a silent engine is killed.

        The silence is counted in waits, not by the clock: a suspended machine suspends the engine, too.
        """
        try:
            connection, self.process = self.pool.start_engine(self.worker_idx)
        except OSError as error:
            self.failure = f"engine {self.worker_idx} can't be started ({error.strerror})"
            return
        self.failure = None
        if self.pool.closed.is_set():    # since the engine was begun: nobody would tell it to end
            self.process.kill()
        reader = threading.Thread(target=self._read, args=(connection,), name=f"reader-{self.worker_idx}", daemon=True)
        reader.start()
        silent_sec, num_seen = 0.0, self.num_messages
        while reader.is_alive():
            reader.join(PULSE_SEC)
            silent_sec = silent_sec + PULSE_SEC if num_seen == self.num_messages else 0.0
            num_seen = self.num_messages
            if silent_sec > (MAX_SILENT_SEC if self.connection else START_TIMEOUT_SEC):
                hint = "" if self.connection else "; try a smaller model or --device-type cpu"
                self.failure = self.failure or f"no sign of life for {silent_sec:g} s{hint}"
                self.process.kill()
        self.connection = None
        self.pool.call_soon(self._fail_answers)
        self.process.join(STOP_TIMEOUT_SEC)
        self.process.kill()  # a process may outlive its end of the connection
        self.process.join(STOP_TIMEOUT_SEC)

    def _read(self, connection: Connection) -> None:
        """The reader thread: the messages of one engine, until it ends. Half a message makes it wait, too."""
        with connection, contextlib.suppress(EOFError, OSError):  # the engine has ended
            while True:
                self._handle(connection, connection.recv())
                self.num_messages += 1

    def _handle(self, connection: Connection, message: tuple) -> None:
        """The reader thread: one message of the engine."""
        self.failure = None
        match message:
            case "ready", description:
                self.description, self.connection = description, connection
                self.pool.log(event="engine_ready", worker=self.worker_idx, device=self.description)
                self.started.set()
            case "failure", reason:
                self.failure = reason
            case "events", events, refusals:
                self.pool.call_soon(self._receive, events, refusals)

    def _receive(self, events: list[Event], refusals: list[tuple[int, str]]) -> None:
        self.pool.token_counts.append((time.monotonic(), len(events)))
        for event in events:
            if answer := self.answers.get(event.request_id):  # None: cancelled meanwhile
                answer.receive(event)
        for request_id, reason in refusals:
            if answer := self.answers.get(request_id):
                answer.fail(EngineError("refused", reason))

    def _fail_answers(self) -> None:
        for answer in set(self.answers.values()):
            answer.fail(EngineError("lost", "the engine of this request has ended; a new one is being started, "
                                    "try again", RETRY_SEC))


class EnginePool:
    def __init__(self, start_engine: Callable[[int], tuple[Connection, multiprocessing.Process]], num_workers: int,
                 max_rows: int, max_waiting: int, log: Callable[..., None]):
        """start_engine: worker index -> (our end of a connection, the process or thread with run_engine at the other)
        max_rows:     of each engine
        max_waiting:  requests beyond the rows, of all workers together
        """
        self.start_engine, self.log = start_engine, log
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.ids = itertools.count()
        self.loop: asyncio.AbstractEventLoop | None = None  # the server's, from the first request on
        self.closed = threading.Event()
        self.token_counts: deque[tuple[float, int]] = deque(maxlen=NUM_COUNTS)  # (time in seconds, tokens) of a step
        self.first_token_secs: deque[float] = deque(maxlen=NUM_LATENCIES)
        self.answer_secs: deque[float] = deque(maxlen=NUM_LATENCIES)
        self.workers = [EngineWorker(self, i) for i in range(num_workers)]

    def start(self) -> None:
        """Start all engines and wait until they are ready; UserError where one fails."""
        for worker in self.workers:
            worker.thread.start()
        for worker in self.workers:
            worker.started.wait()
            if worker.connection is None:
                self.close()
                raise UserError(worker.failure or f"engine {worker.worker_idx} ended while it loaded the model; the "
                                "reason stands above, or it was killed for want of memory")

    def close(self) -> None:
        """End all engines; those that don't end, or still load, are killed."""
        self.closed.set()
        for worker in self.workers:
            worker.send(None)
        for worker in self.workers:
            if worker.connection is not None:
                worker.thread.join(STOP_TIMEOUT_SEC)
            if worker.thread.is_alive() and worker.process is not None:
                worker.process.kill()
                worker.thread.join()
            worker.outbox.shutdown()

    def call_soon(self, function: Callable, *args) -> None:
        """Call a function in the server's event loop, from a thread."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(function, *args)

    def check_size(self, num_requests: int) -> None:
        """EngineError where there would never be room for as many requests at once."""
        if num_requests > self.max_rows + self.max_waiting:
            raise EngineError("refused", f"{num_requests} choices at once are more than the "
                              f"{self.max_rows + self.max_waiting} that this server's rows and queue hold")

    def submit(self, requests: Sequence[Request], timeout_sec: float) -> Answer:
        """Send the samples of some prompts to the least busy engine; EngineError where there is no room for them."""
        self.loop = asyncio.get_running_loop()
        ready = [worker for worker in self.workers if worker.connection is not None]
        if not ready:
            raise EngineError("lost", "no engine is ready; one is being started, try again", RETRY_SEC)
        num_active = sum(len(worker.answers) for worker in ready)
        if num_active + len(requests) > len(ready) * self.max_rows + self.max_waiting:
            rounds = self.max_waiting / (self.max_rows * len(self.workers))  # of answers, until the queue is empty
            raise EngineError("busy", "all rows are taken and the queue is full; try again later",
                              min(max(1, math.ceil(rounds * median(self.answer_secs or [1.0]))), 60))
        # Among equally free engines the prompt's prefix decides, so that a conversation finds its cached prefix again
        prefix_hash = zlib.crc32(json.dumps(list(requests[0].tokens[:AFFINITY_TOKENS])).encode())
        worker = min(ready, key=lambda worker: (len(worker.answers),
                                                (worker.worker_idx - prefix_hash) % len(self.workers)))
        answer = Answer(self, worker, requests, timeout_sec)
        for request_id, request in zip(answer.request_ids, requests, strict=True):
            worker.answers[request_id] = answer
            worker.send(("submit", request_id, request))
        return answer

    def get_stats(self) -> dict:
        """Rows, queue, tokens per second and latencies, for /stats."""
        oldest_sec = time.monotonic() - RATE_WINDOW_SEC
        num_tokens = sum(number for time_sec, number in self.token_counts if time_sec >= oldest_sec)
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
