"""Whole training steps on this device: speed, memory, time by phase and kernel, exact resume, cost of a save."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dev.gpu_copies import predict_peak
from dev.gpu_setup import Candidate, Check, Setup, free_memory, guarded, is_no_memory, judge
from dev.timing import time_in_turn
from nanochat import flash_attention
from nanochat.compilation import set_compile_kernels
from nanochat.config import estimate_flops
from nanochat.cross_entropy import linear_cross_entropy
from nanochat.devices import get_peak_flops, get_peak_memory_bytes, synchronize
from nanochat.flash_attention import probe_report
from nanochat.memory import GIB, Machine, predict_memory
from nanochat.train import OutOfMemory, queue_step, train_step

WARMUP_STEPS = 3        # not counted: compilation, allocation, rising clocks
MIN_STEPS = 3           # that are timed
TOP_KERNELS = 8
RESUME_STEPS = 6        # half of them before the stop
# Relative difference of the losses of two correct backends or builds, which round differently, after a few steps
LOSS_TOLERANCE = 0.02
# What a run does where nothing else is asked for
DEFAULT_BUILD = "blocks"


# ---------------------------------------------------------------------------------------------------------------------
# Speed


@dataclass(frozen=True)
class StepCase:
    """How a step is computed."""
    depth:    int
    num_rows: int             # of a micro-batch
    build:    str = DEFAULT_BUILD

    @property
    def name(self) -> str:
        return f"d{self.depth} {self.num_rows} rows {self.build}"


def check_steps(setup: Setup) -> Iterator[Check]:
    """Steps of some micro-batches at each depth: compiled block by block, as one, and tuned; with the weights cast once
    a step. The first run of a depth is profiled, too. Runs of the same rows have the same losses, but for rounding."""
    losses: dict[tuple[int, int], list[float]] = {}
    for case in list_cases(setup):
        if reason := find_obstacle(setup, case.build):
            yield Check(case.name, "absent", reason)
        else:
            yield from measure_case(setup, case, losses)


def find_obstacle(setup: Setup, build: str) -> str:
    """Why this setup has nothing to show of a build; '' where it has."""
    if build == "copies":
        return "" if setup.dtype.itemsize < 4 else f"in {setup.dtype} the weights are read as they are"
    return "" if build == DEFAULT_BUILD or setup.use_compile else "nothing is compiled here"


def list_cases(setup: Setup) -> list[StepCase]:
    """Those first that tell most: the time may not suffice for all."""
    small, large = setup.sizes.step_rows
    most, others = setup.sizes.depths[:2], setup.sizes.depths[2:]
    order = ((DEFAULT_BUILD, small), ("trunk", small), (DEFAULT_BUILD, large), ("max-autotune", small),
             ("trunk", large), ("copies", small), ("max-autotune", large))
    return [StepCase(depth, num_rows, build) for depths in (most, others) for build, num_rows in order
            for depth in depths]


def measure_case(setup: Setup, case: StepCase, losses: dict[tuple[int, int], list[float]]) -> Iterator[Check]:
    """Speed; of a depth's first run the queue, phases, kernels and pauses as well. `losses` are those of the first run
    of each depth and rows."""
    runs: list[TimedRun] = []

    def start() -> Check:
        runs.append(TimedRun(setup, case))
        check = runs[0].measure_speed(losses.get((case.depth, case.num_rows)))
        losses.setdefault((case.depth, case.num_rows), runs[0].losses)
        return check
    yield guarded(case.name, setup.device, start)
    is_first = case.build == DEFAULT_BUILD and case.num_rows == setup.sizes.step_rows[0]
    for suffix, measure in (("queue", TimedRun.measure_queue), ("phases", TimedRun.measure_phases),
                            ("kernels", TimedRun.profile_kernels)) * is_first:
        if runs:
            yield guarded(f"d{case.depth} {suffix}", setup.device, lambda measure=measure: measure(runs[0]))
    runs.clear()
    free_memory(setup.device)


def find_device_batch(setup: Setup, depth: int) -> int:
    """The largest of max_rows and its halves whose step fits."""
    num_rows = setup.sizes.max_rows
    while num_rows >= 1:
        free_memory(setup.device)
        if fits(setup, depth, num_rows):
            return num_rows
        print(f"  depth {depth}: {num_rows} rows don't fit", flush=True)
        num_rows //= 2
    raise MemoryError(f"not even one row of {setup.sizes.T} tokens fits at depth {depth}")


def fits(setup: Setup, depth: int, num_rows: int) -> bool:
    """Whether two steps find memory: in the second the optimizer's state stands beside the activations."""
    try:
        model, optimizer = setup.make_model(depth)
        for step in range(2):
            train_step(model, optimizer, setup.make_batch(num_rows, step), num_rows)
    except (OutOfMemory, RuntimeError) as error:  # of the step, which catches the allocator's; of all around it
        if not is_no_memory(error):
            raise
        return False
    return True


class TimedRun:
    """A model in training, measured in several ways."""

    def __init__(self, setup: Setup, case: StepCase, num_micro: int | None = None):
        free_memory(setup.device)  # compiled programs too: compiling again reads inductor's cache on disk
        self.setup, self.case, self.step = setup, case, 0
        self.num_micro = num_micro or setup.sizes.num_micro
        self.before_bytes = torch.cuda.memory_allocated(setup.device) if setup.device.type == "cuda" else 0
        start = time.perf_counter()
        self.model, self.optimizer = setup.make_model(case.depth, case.build)
        self.losses = [self.train().loss]
        self.start_sec = time.perf_counter() - start
        self.step_ms = float("nan")

    def train(self):
        num_rows = self.case.num_rows
        batch = self.setup.make_batch(num_rows * self.num_micro, self.step)
        stats = train_step(self.model, self.optimizer, batch, num_rows)
        synchronize(self.setup.device)
        self.step += 1
        return stats

    def measure_speed(self, expected: list[float] | None = None) -> Check:
        """Tokens/s and MFU, memory beside its prediction, and the losses beside those of another run."""
        setup, case, step_ms = self.setup, self.case, []
        start = time.perf_counter()
        while len(step_ms) < WARMUP_STEPS + MIN_STEPS or time.perf_counter() - start < setup.sizes.step_sec:
            step_start = time.perf_counter()
            self.losses.append(self.train().loss)
            step_ms.append((time.perf_counter() - step_start) * 1e3)
        self.step_ms = median(step_ms[WARMUP_STEPS:])
        num_tokens = case.num_rows * self.num_micro * setup.sizes.T
        tokens_per_sec = num_tokens / self.step_ms * 1e3
        peak_flops, source = get_peak_flops(setup.device, setup.dtype)
        flops = tokens_per_sec * estimate_flops(setup.make_config(case.depth))
        mfu = flops / peak_flops if peak_flops else None
        start_sec = max(0.0, self.start_sec - self.step_ms / 1e3)
        learned = math.isfinite(self.losses[-1]) and min(self.losses[1:]) < self.losses[0]
        gap = get_loss_gap(self.losses, expected or self.losses)
        figures = {"num_rows": case.num_rows, "num_micro": self.num_micro, "build": case.build,
                   "step_ms": self.step_ms, "tokens_per_sec": tokens_per_sec, "model_flops_per_sec": flops,
                   "mfu_pct": mfu and 100 * mfu, "peak_flops_source": source, "start_sec": start_sec,
                   "losses": self.losses, "loss_gap": gap, **self.measure_memory()}
        memory = f"{figures['peak_memory_bytes'] / GIB:.1f} GiB, {figures['predicted_bytes'] / GIB:.1f} predicted, " \
            if "peak_memory_bytes" in figures else ""
        return Check(case.name, judge(learned and gap < LOSS_TOLERANCE * self.losses[0]),
                     f"{self.num_micro} x {case.num_rows} rows of {setup.sizes.T}: {tokens_per_sec:,.0f} tok/s, "
                     + (f"MFU {100 * mfu:.1f}%, " if mfu else "")
                     + f"{self.step_ms:.0f} ms, {memory}start {start_sec:.0f} s, loss {self.losses[0]:.3f} -> "
                     f"{self.losses[-1]:.3f}" + (f", within {gap:.1e} of the first run's" if expected else ""), figures,
                     Candidate(f"compilation and rows at depth {case.depth}",
                               f"{case.build}, {case.num_rows} rows", 1e6 / tokens_per_sec,
                               (case.build, case.num_rows) == (DEFAULT_BUILD, setup.sizes.step_rows[0])))

    def measure_memory(self) -> dict[str, int]:
        """The peak so far and the predicted one; nothing on a CPU, where only the whole process's is known."""
        setup, case = self.setup, self.case
        if setup.device.type != "cuda":
            return {}
        machine = Machine(str(setup.dtype).removeprefix("torch."), setup.backend, setup.use_compile, "cuda",
                          is_fp8=case.build == "fp8")
        predicted = predict_memory(setup.make_config(case.depth), setup.sizes.T, case.num_rows, machine, self.num_micro)
        return {"peak_memory_bytes": get_peak_memory_bytes(setup.device) - self.before_bytes,
                "predicted_bytes": predict_peak(predicted) if case.build == "copies" else predicted.peak}

    def measure_queue(self) -> Check:
        """Steps whose figures are read when the next one is queued, as a run reads them, against steps that are waited
        for: the difference is what the host takes between two steps."""
        batches = [self.setup.make_batch(self.case.num_rows * self.num_micro, self.step + i) for i in range(MIN_STEPS)]

        def run(num_late: int) -> None:
            pending = []
            for batch in batches:
                pending.append(queue_step(self.model, self.optimizer, batch, self.case.num_rows))
                if len(pending) > num_late:
                    pending.pop(0).read()
            for stats in pending:
                stats.read()
        ms = time_in_turn({"late": lambda: run(1), "waited": lambda: run(0)}, self.setup.device, rounds=3, warmup=1)
        ms = {option: total_ms / MIN_STEPS for option, total_ms in ms.items()}
        return Check(f"d{self.case.depth} queue", "ok", f"{ms['late']:.2f} ms a step, waited for {ms['waited']:.2f} ms",
                     {f"{option}_ms": value for option, value in ms.items()})

    def measure_phases(self) -> Check:
        """Milliseconds of forward, loss, backward, gradient norm and optimizer on the device, in a step of one
        micro-batch."""
        model, optimizer, device, num_rows = self.model, self.optimizer, self.setup.device, self.case.num_rows
        samples: dict[str, list[float]] = {}
        for i in range(WARMUP_STEPS + MIN_STEPS):
            watch = PhaseWatch(device)
            batch = self.setup.make_batch(num_rows, i).to(device)
            x = watch.run("forward", lambda b=batch: model.forward_trunk(b.inputs))
            loss = watch.run("loss", lambda x=x, b=batch: linear_cross_entropy(
                x, model.lm_head.weight, b.targets, model.config.vocab_size))
            watch.run("backward", loss.backward)
            optimizer.reduce_gradients()
            watch.run("norm", optimizer.get_grad_norm)
            watch.run("optimizer", optimizer.step)
            del x, loss  # or the next forward pass stands beside this one's graph
            if i >= WARMUP_STEPS:
                for name, ms in watch.read_ms().items():
                    samples.setdefault(name, []).append(ms)
        phases = {name: median(values) for name, values in samples.items()}
        total_ms = sum(phases.values())
        return Check(f"d{self.case.depth} phases", "ok", "one micro-batch: " + ", ".join(
            f"{name} {ms:.0f} ms ({100 * ms / total_ms:.0f}%)" for name, ms in phases.items()),
            {f"{name}_ms": ms for name, ms in phases.items()})

    def profile_kernels(self) -> Check:
        """The kernels that take most of the step, how much of its time the device computes at all, and its longest
        pauses: between two steps it waits for the host."""
        on_gpu, num_steps = self.setup.device.type == "cuda", self.setup.sizes.profile_steps
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for _ in range(num_steps):
                self.train()
        kernels = [{"kernel": event.key, "ms": getattr(event, key) / 1e3 / num_steps,
                    "calls": event.count / num_steps}
                   for event in profiler.key_averages() if getattr(event, key) > 0]
        kernels.sort(key=lambda kernel: -kernel["ms"])
        top, total_ms = kernels[:TOP_KERNELS], sum(kernel["ms"] for kernel in kernels)
        for kernel in top:
            print(f"  {kernel['ms']:9.2f} ms {100 * kernel['ms'] / self.step_ms:5.1f}% {kernel['calls']:6.0f} calls  "
                  f"{kernel['kernel'][:80]}", flush=True)
        num_calls, busy_frac = sum(kernel["calls"] for kernel in kernels), total_ms / self.step_ms
        pauses = find_pauses([(event.time_range.start, event.time_range.end) for event in profiler.events()
                              if not on_gpu or event.device_type != DeviceType.CPU])
        pauses_ms = [pause / 1e3 for pause in pauses[:num_steps]]
        return Check(f"d{self.case.depth} kernels", judge(total_ms > 0),
                     f"{num_calls:.0f} fill {100 * busy_frac:.0f}% of the step; the first {len(top)} kinds take "
                     f"{sum(kernel['ms'] for kernel in top):.0f} of {total_ms:.0f} ms; longest pauses "
                     f"{', '.join(f'{ms:.2f}' for ms in pauses_ms) or 'none'} ms in {num_steps} steps, all "
                     f"together {sum(pauses) / 1e3 / num_steps:.2f} ms a step",
                     {"busy_frac": busy_frac, "num_calls": num_calls, "kernel_ms": total_ms, "top": top,
                      "pauses_ms": pauses_ms, "paused_ms_per_step": sum(pauses) / 1e3 / num_steps})


def find_pauses(spans: list[tuple[float, float]]) -> list[float]:
    """The stretches that no span covers between the first and the last, the longest first."""
    pauses, end = [], None
    for span_start, span_end in sorted(spans):
        if end is not None and span_start > end:
            pauses.append(span_start - end)
        end = span_end if end is None else max(end, span_end)
    return sorted(pauses, reverse=True)


def get_loss_gap(losses: list[float], expected: list[float]) -> float:
    """The largest difference in the steps that every run takes."""
    return max(abs(a - b) for a, b in zip(losses[:WARMUP_STEPS + MIN_STEPS], expected, strict=False))


class PhaseWatch:
    """Times of successive phases: by events in the device's queue, on a CPU by the clock."""

    def __init__(self, device: torch.device):
        self.on_gpu, self.marks = device.type == "cuda", []
        self.mark("")

    def mark(self, name: str) -> None:
        if self.on_gpu:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((name, mark))

    def run(self, name: str, phase):
        """Run a phase and keep its time under `name`; time between two phases isn't counted."""
        self.mark("")
        result = phase()
        self.mark(name)
        return result

    def read_ms(self) -> dict[str, float]:
        """Milliseconds of each phase; waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {name: before.elapsed_time(after) if self.on_gpu else (after - before) * 1e3
                for (_, before), (name, after) in pairs if name}


def check_backends(setup: Setup) -> Iterator[Check]:
    """The same steps with each attention backend: time, and losses that agree with the first one's."""
    depth = setup.sizes.depths[0]
    reference = None
    num_rows = max(1, find_device_batch(setup, depth) // 2)  # the least economical backend must fit as well
    for name, works, reason in probe_report(setup.device, setup.dtype, setup.make_config(depth)):
        if not works:
            yield Check(name, "absent", reason)
            continue
        with forced_backend(name):
            run = TimedRun(setup, StepCase(depth, num_rows), num_micro=1)
            speed = run.measure_speed().figures
        reference = reference or run.losses
        gap = get_loss_gap(run.losses, reference)
        del run
        yield Check(name, judge(gap < LOSS_TOLERANCE * reference[0]),
                    f"d{depth}, {num_rows} rows: {speed['step_ms']:.0f} ms, start {speed['start_sec']:.0f} s, losses "
                    f"within {gap:.1e} of the first backend's", {**speed, "loss_gap": gap},
                    Candidate(f"--attention, by steps at depth {depth}", name, speed["step_ms"],
                              name == setup.backend))


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Use one attention backend, whatever a run would choose."""
    flash_attention._override_impl = name
    try:
        yield
    finally:
        flash_attention._override_impl = None


# ---------------------------------------------------------------------------------------------------------------------
# State on disk


def check_resume(setup: Setup) -> Iterator[Check]:
    """Steps, a save, a load into a new model and more steps must give the bits of an uninterrupted run."""
    num_rows, depth = min(4, setup.sizes.max_rows), setup.sizes.resume_depth

    def train(model, optimizer, steps: range) -> list[float]:
        return [train_step(model, optimizer, setup.make_batch(num_rows, step), num_rows).loss for step in steps]

    def start():
        free_memory(setup.device)  # a resumed run compiles again, in a new process
        return setup.make_model(depth)

    def run_whole() -> tuple[list[float], dict[str, torch.Tensor]]:
        model, optimizer = start()
        return train(model, optimizer, range(RESUME_STEPS)), clone_state(model, optimizer)

    runs = [run_whole() for _ in range(2)]
    same = describe_difference(*runs)
    # FlashAttention sums the gradient of the queries in no fixed order: two runs that differ by that are no fault, but
    # then only deterministic algorithms can show what a resume loses
    is_inexact = bool(same) and setup.device.type == "cuda" and setup.backend != "sdpa"
    gap = max(abs(a - b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    yield Check("same run twice", judge(not same or is_inexact and gap < LOSS_TOLERANCE * runs[0][0][0]),
                (same and f"{same}, {setup.backend}") or f"{RESUME_STEPS} steps, bit for bit, {setup.backend}")
    with deterministic(is_inexact):
        resumed = _check_resumed(setup, start, train, run_whole() if is_inexact else runs[0])
    yield resumed


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Only algorithms that repeat bit for bit, as --deterministic has it: slower, and attention by sdpa."""
    if not enabled:
        yield
        return
    torch.use_deterministic_algorithms(True)    # with warn_only attention would only warn, and not repeat
    try:
        with forced_backend("sdpa"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _check_resumed(setup: Setup, start: Callable, train: Callable, whole: tuple[list[float], dict]) -> Check:
    """Half of the steps, a save, a load into a new model, and the other half."""
    from nanochat import checkpoint_manager as checkpoints  # here, since it needs the tokenizer's packages
    run_dir = setup.out_dir / "gpu_check_resume"
    shutil.rmtree(run_dir, ignore_errors=True)
    try:
        model, optimizer = start()
        losses = train(model, optimizer, range(RESUME_STEPS // 2))
        checkpoints.save_checkpoint(run_dir, RESUME_STEPS // 2, model, optimizer,
                                    {"optimizer_steps": optimizer.num_steps})
        model, optimizer = start()
        checkpoints.restore(run_dir, RESUME_STEPS // 2, model, optimizer)
        losses += train(model, optimizer, range(RESUME_STEPS // 2, RESUME_STEPS))
        difference = describe_difference(whole, (losses, clone_state(model, optimizer)))
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    half = RESUME_STEPS // 2
    return Check("resumed run", judge(not difference),
                 difference or f"d{setup.sizes.resume_depth}, {half} + {half} steps equal {RESUME_STEPS}, bit for bit")


def clone_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Copies of all parameters and all optimizer state, by name."""
    state = model.state_dict() | {name: piece.tensor for name, piece in optimizer.get_named_state().items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def describe_difference(run: tuple[list[float], dict], other: tuple[list[float], dict]) -> str:
    """'' if two runs' losses and states are equal bit for bit, else the differences."""
    differing = [name for name in run[1] if not torch.equal(run[1][name], other[1][name])]
    steps = [step for step, (a, b) in enumerate(zip(run[0], other[0], strict=True)) if a != b]
    if not differing and not steps:
        return ""
    gap = max(abs(a - b) for a, b in zip(run[0], other[0], strict=True))
    return (f"{len(differing)} of {len(run[1])} tensors differ ({', '.join(differing[:2])}), losses differ "
            + (f"from step {steps[0]} on, by up to {gap:.1e}" if steps else "nowhere"))


def check_saves(setup: Setup) -> Iterator[Check]:
    """The pause of the training for a checkpoint, and the time of a load."""
    for depth in setup.sizes.depths[:2]:
        free_memory(setup.device)
        set_compile_kernels(False)  # for one step, to have state to save
        model, optimizer = setup.make_model(depth)
        optimizer.step()
        set_compile_kernels(setup.use_compile)
        num_bytes = sum(t.nbytes for t in clone_state(model, optimizer).values())
        if shutil.disk_usage(setup.out_dir).free < 1.2 * num_bytes:
            yield Check(f"d{depth}", "skipped", f"{num_bytes / 1e9:.1f} GB don't fit on the disk of {setup.out_dir}")
            continue
        figures = {"num_bytes": num_bytes, **time_checkpoint(setup, model, optimizer)}
        model = optimizer = None
        yield Check(f"d{depth}", "ok", f"{num_bytes / 1e9:.2f} GB: training pauses for "
                    f"{figures['first_stop_ms']:.0f} ms the first time, {figures['stop_ms']:.0f} ms later; on "
                    f"disk in {figures['save_sec']:.1f} s, loaded in {figures['load_sec']:.1f} s", figures)


def time_checkpoint(setup: Setup, model, optimizer) -> dict[str, float]:
    """The pauses for two saves (the first allocates host memory), the whole time of the second, and of a load."""
    from nanochat import checkpoint_manager as checkpoints
    run_dir = setup.out_dir / "gpu_check_save"
    shutil.rmtree(run_dir, ignore_errors=True)
    times = []
    try:
        with checkpoints.Checkpointer(run_dir, checkpoints.SaveRules(keep_last=1)) as saver:
            for step in (1, 2):
                synchronize(setup.device)
                times.append(time.perf_counter())
                saver.save(step, model, optimizer, {"optimizer_steps": optimizer.num_steps})
                times.append(time.perf_counter())
                saver.wait()
                times.append(time.perf_counter())
        checkpoints.restore(run_dir, 2, model, optimizer)
        synchronize(setup.device)
        return {"first_stop_ms": 1e3 * (times[1] - times[0]), "stop_ms": 1e3 * (times[4] - times[3]),
                "save_sec": times[5] - times[3], "load_sec": time.perf_counter() - times[5]}
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
