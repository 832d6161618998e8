"""Whole training steps on this device: speed, memory, time by phase and kernel, exact resume, cost of a save."""

import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from dev.gpu_setup import Check, Setup, free_memory, judge
from nanochat import flash_attention
from nanochat.common import get_peak_memory_bytes, synchronize
from nanochat.compilation import set_compile_kernels
from nanochat.config import estimate_flops
from nanochat.cross_entropy import linear_cross_entropy
from nanochat.flash_attention import probe_report
from nanochat.memory import get_peak_flops
from nanochat.train import train_step

WARMUP_STEPS = 3        # not counted: compilation, allocation, rising clocks
PROFILE_STEPS = 3
TOP_KERNELS = 8
RESUME_STEPS = 6        # half of them before the stop
# Bytes of activations per token, layer and channel of a compiled bf16 step: an assumption, where the search starts
GUESSED_BYTES = 48
FULL_FRAC = 0.96        # of the device's memory: a batch that uses more may fail later, since memory fragments
# Relative difference of the losses of two correct backends, which round differently, after this few steps
LOSS_TOLERANCE = 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def check_steps(setup: Setup) -> Iterator[Check]:
    """A short run at each depth: tokens/s, MFU, memory, compilation, and the time by phase and by kernel."""
    for depth in setup.sizes.depths:
        free_memory(setup.device)
        num_rows, first_sec = find_device_batch(setup, depth)
        run = TimedRun(setup, depth, num_rows)
        yield run.measure_speed(first_sec)
        yield run.measure_phases()
        yield run.profile_kernels()
        del run


def find_device_batch(setup: Setup, depth: int) -> tuple[int, float]:
    """The largest power of two of rows whose step fits, searched from a guess, and its first step's seconds."""
    num_rows, too_many = guess_rows(setup, depth), setup.sizes.max_rows * 2
    while num_rows >= 1:
        free_memory(setup.device)
        first_sec, used_frac = try_rows(setup, depth, num_rows)
        if used_frac > FULL_FRAC:
            print(f"  depth {depth}: {num_rows} rows don't fit", flush=True)
            num_rows, too_many = num_rows // 2, num_rows
        elif used_frac < 0.45 and num_rows * 2 < too_many:
            num_rows *= 2
        else:
            return num_rows, first_sec
    raise MemoryError(f"not even one row of {setup.sizes.T} tokens fits at depth {depth}")


def try_rows(setup: Setup, depth: int, num_rows: int) -> tuple[float, float]:
    """(seconds of a first step, the part of the device's memory in use after two); infinite where it doesn't fit."""
    start = time.perf_counter()
    try:
        model, optimizer = setup.make_model(depth)
        train_step(model, optimizer, setup.make_batch(num_rows), num_rows)
        synchronize(setup.device)
        first_sec = time.perf_counter() - start
        # now the optimizer's state, which the first step made, stands beside the activations
        train_step(model, optimizer, setup.make_batch(num_rows, 1), num_rows)
    except torch.OutOfMemoryError:
        return math.inf, math.inf
    if setup.device.type != "cuda":
        return first_sec, 0.5  # the sizes there are small
    total_bytes = torch.cuda.get_device_properties(setup.device).total_memory
    return first_sec, torch.cuda.max_memory_reserved(setup.device) / total_bytes


def guess_rows(setup: Setup, depth: int) -> int:
    """A power of two of rows that should fit."""
    if setup.device.type != "cuda":
        return setup.sizes.max_rows
    config = setup.make_config(depth)
    free_bytes, _ = torch.cuda.mem_get_info(setup.device)
    row_bytes = GUESSED_BYTES * config.n_layer * config.n_embd * config.sequence_len
    return min(2 ** int(math.log2(max(1, free_bytes / row_bytes))), setup.sizes.max_rows)


class TimedRun:
    """A model of one depth in training, measured in several ways."""

    def __init__(self, setup: Setup, depth: int, num_rows: int):
        free_memory(setup.device)  # compiled programs too: compiling again now reads inductor's cache on disk
        self.setup, self.depth, self.num_rows, self.step = setup, depth, num_rows, 0
        start = time.perf_counter()
        self.model, self.optimizer = setup.make_model(depth)
        self.losses = [self.train().loss]
        self.warm_sec = time.perf_counter() - start
        self.step_ms = float("nan")

    def train(self):
        stats = train_step(self.model, self.optimizer, self.setup.make_batch(self.num_rows, self.step), self.num_rows)
        synchronize(self.setup.device)
        self.step += 1
        return stats

    def measure_speed(self, first_sec: float) -> Check:
        """Tokens/s and MFU of a training run's steps, one micro-batch each."""
        setup, step_ms = self.setup, []
        for _ in range(setup.sizes.steps - 1):
            start = time.perf_counter()
            self.losses.append(self.train().loss)
            step_ms.append((time.perf_counter() - start) * 1e3)
        self.step_ms = median(step_ms[min(WARMUP_STEPS, len(step_ms) - 1):])
        tokens_per_sec = self.num_rows * setup.sizes.T / self.step_ms * 1e3
        peak_flops, source = get_peak_flops(setup.device, setup.dtype)
        flops = tokens_per_sec * estimate_flops(setup.make_config(self.depth))
        mfu = flops / peak_flops if peak_flops else None
        memory = get_peak_memory_bytes(setup.device)
        compile_sec, warm_compile_sec = (max(0.0, sec - self.step_ms / 1e3) for sec in (first_sec, self.warm_sec))
        learned = math.isfinite(self.losses[-1]) and min(self.losses[1:]) < self.losses[0]
        figures = {"num_rows": self.num_rows, "step_ms": self.step_ms, "tokens_per_sec": tokens_per_sec,
                   "model_flops_per_sec": flops, "mfu_pct": mfu and 100 * mfu, "peak_flops_source": source,
                   "peak_memory_bytes": memory, "start_sec": compile_sec, "warm_start_sec": warm_compile_sec,
                   "losses": self.losses}
        return Check(f"d{self.depth} speed", judge(learned),
                     f"{self.num_rows} rows of {setup.sizes.T}: {tokens_per_sec:,.0f} tok/s, "
                     + (f"MFU {100 * mfu:.1f}%, " if mfu else "")
                     + f"{self.step_ms:.0f} ms, {memory / 2**30:.1f} GiB, start {compile_sec:.0f} s cold "
                     f"{warm_compile_sec:.0f} s warm, loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}", figures)

    def measure_phases(self) -> Check:
        """Milliseconds of forward, loss, backward, gradient norm and optimizer on the device, and what is left over."""
        model, optimizer, device = self.model, self.optimizer, self.setup.device
        samples: dict[str, list[float]] = {}
        for i in range(WARMUP_STEPS + PROFILE_STEPS):
            watch = PhaseWatch(device)
            batch = self.setup.make_batch(self.num_rows, i).to(device)
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
        # the host's part: copies of the batch, and launches after each value that the host reads back
        phases["rest"] = self.step_ms - sum(phases.values())
        return Check(f"d{self.depth} phases", "ok", ", ".join(
            f"{name} {ms:.0f} ms ({100 * ms / self.step_ms:.0f}%)" for name, ms in phases.items()),
            {f"{name}_ms": ms for name, ms in phases.items()})

    def profile_kernels(self) -> Check:
        """The kernels that take most of the step, and how much of its time the device computes at all."""
        on_gpu = self.setup.device.type == "cuda"
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"  # microseconds
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for _ in range(PROFILE_STEPS):
                self.train()
        kernels = [{"kernel": event.key, "ms": getattr(event, key) / 1e3 / PROFILE_STEPS,
                    "calls": event.count / PROFILE_STEPS}
                   for event in profiler.key_averages() if getattr(event, key) > 0]
        kernels.sort(key=lambda kernel: -kernel["ms"])
        top, total_ms = kernels[:TOP_KERNELS], sum(kernel["ms"] for kernel in kernels)
        for kernel in top:
            print(f"  {kernel['ms']:9.2f} ms {100 * kernel['ms'] / self.step_ms:5.1f}% {kernel['calls']:6.0f} calls  "
                  f"{kernel['kernel'][:80]}", flush=True)
        num_calls, busy_frac = sum(kernel["calls"] for kernel in kernels), total_ms / self.step_ms
        return Check(f"d{self.depth} kernels", judge(total_ms > 0),
                     f"{num_calls:.0f} fill {100 * busy_frac:.0f}% of the step; the first {len(top)} kinds take "
                     f"{sum(kernel['ms'] for kernel in top):.0f} of {total_ms:.0f} ms",
                     {"busy_frac": busy_frac, "num_calls": num_calls, "kernel_ms": total_ms, "top": top})


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
    num_rows = max(1, guess_rows(setup, depth) // 2)  # the least economical backend must fit as well
    for name, works, reason in probe_report(setup.device, setup.dtype, setup.make_config(depth)):
        if not works:
            yield Check(name, "absent", reason)
            continue
        with forced_backend(name):
            run = TimedRun(setup, depth, num_rows)
            speed = run.measure_speed(run.warm_sec).figures
        losses = run.losses
        del run
        reference = reference or losses
        gap = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        yield Check(name, judge(gap < LOSS_TOLERANCE * reference[0]),
                    f"d{depth}, {num_rows} rows: {speed['step_ms']:.0f} ms, {speed['peak_memory_bytes'] / 2**30:.1f} "
                    f"GiB, start {speed['start_sec']:.0f} s, losses within {gap:.1e} of the first backend's",
                    {**speed, "loss_gap": gap})


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
    from nanochat import checkpoint_manager as checkpoints  # here, since it needs the tokenizer's packages
    num_rows, depth = min(4, setup.sizes.max_rows), setup.sizes.resume_depth

    def train(model, optimizer, steps: range) -> list[float]:
        return [train_step(model, optimizer, setup.make_batch(num_rows, step), num_rows).loss for step in steps]

    def start():
        free_memory(setup.device)  # a resumed run compiles again, in a new process
        return setup.make_model(depth)

    runs = []
    for _ in range(2):
        model, optimizer = start()
        runs.append((train(model, optimizer, range(RESUME_STEPS)), clone_state(model, optimizer)))
    same = describe_difference(runs[0], runs[1])
    yield Check("same run twice", judge(not same), same or f"{RESUME_STEPS} steps, bit for bit, {setup.backend}")

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
        difference = describe_difference(runs[0], (losses, clone_state(model, optimizer)))
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    half = RESUME_STEPS // 2
    yield Check("resumed run", judge(not difference),
                difference or f"d{depth}, {half} + {half} steps equal {RESUME_STEPS}, bit for bit")


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
    for depth in setup.sizes.depths:
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
