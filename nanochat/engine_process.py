"""An engine in a process of its own: loads a model, then does what comes over a connection until that is closed.

    connection, process = start_process(worker_idx, settings)

    comes   {"id": 7, ...} (the fields of a Request)    {"cancel": 7}    null, and nothing more
    goes    {"ready": "where it runs"} or {"failure": "why not"}, once
            {"events": [...], "refusals": [[id, reason], ...]} after each step; ids are the sender's
            {} each second from then on, also in the middle of a step: whoever falls silent is stuck
"""

import contextlib
import json
import math
import multiprocessing
import queue
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, count_cpus, end_process, get_compute_dtype, init_compute
from nanochat.engine import Engine
from nanochat.engine_request import Event, Logprobs, Request, Usage

PULSE_SEC = 1.0     # between signs of life
MAX_STEP_SEC = 300  # a step that takes longer is taken for one that never ends: assumption, 512 tokens of a prompt take
                    # a 2 B parameter model a minute on two cores


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
    """Start an engine; returns our end of the connection to it, too."""
    context = multiprocessing.get_context("spawn")  # CUDA can't be used in a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=main_of_process, args=(worker_idx, settings, theirs), daemon=True)
    process.start()
    theirs.close()  # or its end would never be noticed
    return ours, process


def main_of_process(worker_idx: int, settings: EngineSettings, connection: Connection) -> None:
    """The life of an engine's process; it ends with the connection, so a signal to all of a group is the server's."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        engine, description = load_engine(worker_idx, settings)
    except UserError as error:
        connection.send_bytes(json.dumps({"failure": str(error)}).encode())
        return
    run_engine(engine, connection, description)
    end_process()  # Python's own end takes seconds to take torch apart, and the server waits


def load_engine(worker_idx: int, settings: EngineSettings) -> tuple[Engine, str]:
    """The engine on this worker's device, and a sentence on where it runs."""
    device, _ = init_compute(name_device(settings.device_type, worker_idx))
    if device.type == "cpu":
        torch.set_num_threads(max(1, count_cpus() // settings.num_workers))
    dtype, reason = get_compute_dtype(settings.dtype, device)
    model, tokenizer, _ = load_model(settings.stage, device, tag=settings.tag, step=settings.step, dtype=dtype)
    engine = Engine(model, tokenizer, max_rows=settings.max_rows, kept_rows=settings.max_rows,
                    compile=settings.compile)
    return engine, f"{device} in {str(dtype).removeprefix('torch.')} ({reason})"


def name_device(device_type: str, worker_idx: int) -> str:
    """The device of a worker: they take turns on the GPUs that there are."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device_type = device_type or (accelerator.type if accelerator else "cpu")
    if device_type not in ("cuda", "xpu"):
        return device_type
    return f"{device_type}:{worker_idx % max(1, torch.accelerator.device_count())}"


def run_engine(engine: Engine, connection: Connection, description: str = "") -> None:
    """Drive an engine by what comes over `connection`, until that is closed."""
    inbox: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
    sending = threading.Lock()
    step_start = math.inf  # seconds; of the step under way

    def send(message: dict) -> None:
        with sending:
            connection.send_bytes(json.dumps(message).encode())

    def read() -> None:
        with contextlib.suppress(EOFError, OSError):
            while message := json.loads(connection.recv_bytes()):
                inbox.put(message)
        inbox.put(None)

    def pulse() -> None:
        with contextlib.suppress(OSError):  # until the connection is closed
            while True:
                time.sleep(PULSE_SEC)
                if time.monotonic() - step_start < MAX_STEP_SEC:
                    send({})
    threading.Thread(target=read, name="inbox", daemon=True).start()
    threading.Thread(target=pulse, name="pulse", daemon=True).start()
    engine_ids: dict[int, int] = {}  # of the generations under way: the server's id -> the engine's
    with connection, contextlib.suppress(BrokenPipeError):  # the server is gone
        send({"ready": description})
        while True:
            refusals = []
            while not inbox.empty() or not (engine.has_work() or refusals):
                if (message := inbox.get()) is None:
                    return
                if "cancel" in message:
                    engine.cancel(engine_ids.pop(message["cancel"], -1))
                    continue
                try:
                    engine_ids[message["id"]] = engine.submit(decode_request(message))
                except UserError as error:
                    refusals.append([message["id"], str(error)])
            server_ids = {engine_id: server_id for server_id, engine_id in engine_ids.items()}
            step_start = time.monotonic()
            events = engine.step()
            step_start = math.inf
            for event in events:
                if event.finish_reason:
                    del engine_ids[server_ids[event.request_id]]
            if events or refusals:
                encoded = [encode_event(server_ids[event.request_id], event) for event in events]
                send({"events": encoded, "refusals": refusals})


def encode_request(request_id: int, request: Request) -> bytes:
    return json.dumps({"id": request_id} | vars(request)).encode()


def decode_request(message: dict) -> Request:
    fields = {name: value for name, value in message.items() if name != "id"}
    return Request(**fields | {"stop": tuple(message["stop"])})


def encode_event(request_id: int, event: Event) -> list:
    """As a list, in the order of Event's fields; there are thousands a second."""
    return [request_id, event.token, event.mask, event.part, event.text,
            event.logprobs and [event.logprobs.chosen, event.logprobs.likeliest],
            event.finish_reason, event.usage and list(vars(event.usage).values())]


def decode_event(fields: list) -> Event:
    *plain, logprobs, finish_reason, usage = fields
    if logprobs:
        logprobs = Logprobs(logprobs[0], tuple(map(tuple, logprobs[1])))
    return Event(*plain, logprobs, finish_reason, usage and Usage(*usage))
