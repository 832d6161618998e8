"""Live bytes of a training step, traced on fake tensors, against what nanochat.memory predicts.

    python -m dev.bench_memory                                  eager steps at full size, on any machine: a table
    python -m dev.bench_memory --depth 12 26 --attention blocks --world-size 8
    python -m dev.bench_memory --resident --depth 6 --rows 8 --max-seq-len 512 --dtype float32
                                                                peak of a process that trains on a CPU, by each loss
    bash dev/gpu_check.sh --only memory                         compiled steps on a GPU, by its allocator

The trace runs the model's own step on fake tensors, which have shapes but no memory, and counts every tensor from its
birth to its death. What is allocated inside one operation it can't see. --resident computes, and asks the system for
the memory of a process that does nothing else: steps are compiled, the optimizer's included.
"""

import argparse
import contextlib
import subprocess
import sys
import weakref
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dev.gpu_setup import Check, Setup, free_memory, judge
from dev.timing import make_training, print_rows, print_table
from nanochat import flash_attention
from nanochat.command_line import Parser, exit_with, run_script
from nanochat.config import GPTConfig
from nanochat.cross_entropy import LOSSES
from nanochat.devices import COMPUTE_DTYPES, get_peak_memory_bytes, init_compute
from nanochat.fp8 import use_fp8
from nanochat.gpt import GPT
from nanochat.memory import GIB, Machine, Memory, get_usable_frac, measure_free_bytes, predict_memory
from nanochat.optim import MuonAdamW
from nanochat.scaling import JULY26, TrainingRule, check_counts, make_config
from nanochat.train import Batch, add_gradients, train_step

TOLERANCE = 0.10    # relative error of a prediction that passes on a GPU
GPU_DEPTHS = (4, 8, 12, 20)
MAX_ROWS = 16       # of a micro-batch in check_memory


class LiveBytes(TorchDispatchMode):
    """Bytes of all live tensors: those given, and those that operations make while this mode is active."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self.storages: dict[int, tuple[weakref.ref, int]] = {}    # by address: a reference that tells of its end, bytes
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self.storages:
            return

        def forget(_) -> None:
            self.now_bytes -= num_bytes
            del self.storages[key]
        self.storages[key] = (weakref.ref(storage, forget), num_bytes)
        self.now_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_mm.out and type(kwargs["out"]) is FakeTensor:
            return kwargs["out"]    # torch would compute it for real, which takes some CPUs hours
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 8, 12, 20])
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--max-seq-len", type=int, default=2048, help="context in tokens")
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--num-micro", type=int, nargs="+", default=[1, 2], help="micro-batches of a step")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, default="bfloat16")
    parser.add_argument("--attention", choices=("fa2", "sdpa", "blocks"), default="sdpa")
    parser.add_argument("--loss", choices=LOSSES, default="fused")
    parser.add_argument("--world-size", type=int, default=1, help="ranks of the run; the first one's memory is shown")
    parser.add_argument("--resident", action="store_true", help="of the first --depth, by each loss")
    parser.add_argument("--compile", choices=("on", "off"), default="on", help="with --resident")
    parser.add_argument("--resident-of", choices=LOSSES, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    check_counts(rows=args.rows, num_micro=args.num_micro, world_size=args.world_size)
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.resident_of:
        return measure_resident(args)
    if args.resident:
        return compare_resident(sys.argv[1:] if argv is None else argv)
    machine = Machine(args.dtype, args.attention, False, "cpu", args.world_size, args.loss)
    rows = []
    for depth in args.depth:
        config = make_config(depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len)
        for num_micro in args.num_micro:
            measured = trace_step(config, args.max_seq_len, args.rows, machine, num_micro)
            predicted = predict_memory(config, args.max_seq_len, args.rows, machine, num_micro)
            for phase, num_bytes in measured.items():
                expected = join_phases(predicted)[phase]
                rows.append({"depth": depth, "micro-batches": num_micro, "phase": phase,
                             "traced MiB": num_bytes / 2**20, "predicted MiB": expected / 2**20,
                             "error %": 100 * (expected / num_bytes - 1)})
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    return {"rows": rows}


def compare_resident(argv: list[str]) -> dict:
    """Peak resident MiB of a process that trains, for each loss in a process of its own."""
    rows = []
    for loss in LOSSES:
        done = subprocess.run([sys.executable, "-m", "dev.bench_memory", *argv, "--resident-of", loss],
                              stdout=subprocess.PIPE, encoding="utf-8", check=False)
        if done.returncode:
            exit_with(done.returncode, f"bench_memory: the process that trains with the {loss} loss failed, see above")
        rows.append({"loss": loss, "peak MiB": float(done.stdout.split()[-1])})
    most = max(row["peak MiB"] for row in rows)
    print_rows([row | {"part": row["peak MiB"] / most} for row in rows])
    return {"rows": rows}


def measure_resident(args: argparse.Namespace) -> dict:
    """Print the peak resident MiB of whole steps with one of the losses."""
    device, _ = init_compute("cpu")
    config = make_config(args.depth[0], vocab_size=args.vocab_size, sequence_len=args.max_seq_len)
    flash_attention.choose_backend(device, getattr(torch, args.dtype), config)
    model, optimizer, batch = make_training(config, args, device, getattr(torch, args.dtype))
    model.loss = args.resident_of
    for _ in range(3):
        train_step(model, optimizer, batch, args.rows)
    print(get_peak_memory_bytes(device) / 2**20)
    return {}


def join_phases(memory: Memory) -> dict[str, int]:
    """Predicted peaks by the phases of trace_step."""
    return {"loss, backward": max(memory.phases["loss"], memory.phases["backward"]), "update": memory.phases["update"]}


def trace_step(config: GPTConfig, T: int, rows: int, machine: Machine, num_micro: int = 1,
               rule: TrainingRule = JULY26) -> dict[str, int]:
    """Peak bytes of the phases of one eager step as it runs on CPUs: nothing is computed, so any size will do."""
    with fake_step(config, machine, rule) as (model, optimizer), LiveBytes(list_kept(model, optimizer)) as live:
        tokens = torch.zeros((rows * num_micro, T + 1), dtype=torch.int64)
        add_gradients(model, optimizer, Batch(tokens[:, :-1], tokens[:, 1:], None), rows, 1.0)
        peaks = {"loss, backward": live.peak_bytes}
        live.peak_bytes = live.now_bytes
        optimizer.reduce_gradients()  # not train_step, which reads numbers back, and fake tensors have none
        optimizer.step()
    return peaks | {"update": live.peak_bytes}


@contextlib.contextmanager
def fake_step(config: GPTConfig, machine: Machine, rule: TrainingRule = JULY26) -> Iterator[tuple[GPT, MuonAdamW]]:
    """Model and optimizer of rank 0 on fake tensors, whose collectives send nothing. The device is always the CPU:
    fake CUDA tensors abort the process in builds without CUDA, and the meta device has other kernels."""
    if machine.world_size > 1:
        dist.init_process_group("fake", rank=0, world_size=machine.world_size)
    wanted, flash_attention._override_impl = flash_attention._override_impl, machine.attention
    try:
        with FakeTensorMode():
            model = GPT(config, getattr(torch, machine.dtype))
            model.loss = machine.loss
            optimizer = model.setup_optimizer(rule=rule)
            if machine.is_fp8:
                use_fp8(model, optimizer)
            yield model, optimizer
    finally:
        flash_attention._override_impl = wanted
        if machine.world_size > 1:
            dist.destroy_process_group()


def list_kept(model: GPT, optimizer: MuonAdamW) -> list[Tensor]:
    """All that is there before a step: parameters, rotary tables, optimizer state."""
    state = [piece.tensor for piece in optimizer.get_named_state().values()]
    return [*model.parameters(), *model.buffers(), *state]


def measure_step(model: GPT, optimizer: MuonAdamW, batch: Batch, micro_rows: int) -> int:
    """Peak bytes of a training step on a GPU, by CUDA's allocator."""
    train_step(model, optimizer, batch, micro_rows)  # compiling has peaks of its own
    torch.cuda.reset_peak_memory_stats(model.get_device())
    train_step(model, optimizer, batch, micro_rows)
    return torch.cuda.max_memory_allocated(model.get_device())


def check_memory(setup: Setup) -> Iterator[Check]:
    """A section of dev/gpu_check.py: the peak of a step against the prediction, at each depth, with one micro-batch
    and with two, of as many rows as are predicted to fit: a prediction that is too low may run out of memory."""
    on_gpu, T = setup.device.type == "cuda", setup.sizes.T
    if not on_gpu and (setup.use_compile or setup.device.type != "cpu"):
        yield Check("memory", "absent", "only CUDA's allocator and traces of eager steps on a CPU know the peak")
        return
    machine = Machine(str(setup.dtype).removeprefix("torch."), setup.backend, setup.use_compile, setup.device.type)
    for depth in GPU_DEPTHS if on_gpu else setup.sizes.depths:
        free_memory(setup.device)
        config = setup.make_config(depth)
        usable_bytes = get_usable_frac(machine) * (measure_free_bytes(setup.device) or 0)
        before_bytes = torch.cuda.memory_allocated(setup.device) if on_gpu else 0
        # two micro-batches take more, since gradients of the first stand beside the second
        rows = next((n for n in (MAX_ROWS, 8, 4, 2, 1) if n <= setup.sizes.max_rows and
                     predict_memory(config, T, n, machine, num_micro=2).peak <= usable_bytes), 0)
        if not rows:
            yield Check(f"d{depth} memory", "absent", "no row is predicted to fit here")
            continue
        model, optimizer = setup.make_model(depth) if on_gpu else (None, None)
        for num_micro in (1, 2):
            memory = predict_memory(config, T, rows, machine, num_micro)
            measured = measure_step(model, optimizer, setup.make_batch(rows * num_micro), rows) - before_bytes \
                if on_gpu else max(trace_step(config, T, rows, machine, num_micro).values())
            error = memory.peak / measured - 1
            yield Check(f"d{depth} memory, {num_micro} x {rows} rows", judge(abs(error) <= TOLERANCE),
                        f"{measured / GIB:.3f} GiB, predicted {memory.peak / GIB:.3f} ({100 * error:+.1f}%), worst at "
                        f"the {memory.worst_phase}", {"measured_bytes": measured, "predicted_bytes": memory.peak,
                                                       "phases": memory.phases})
        del model, optimizer


if __name__ == "__main__":
    run_script(main)
