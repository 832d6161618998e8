"""What a training step keeps in memory, tensor by tensor, against what nanochat.memory predicts.

    python -m dev.bench_memory                                  eager steps on the CPU: a table
    python -m dev.bench_memory --depth 4 6 --dtype float32 --attention blocks
    bash dev/gpu_check.sh --only memory                         compiled steps on a GPU, by its allocator

On a CPU every tensor that an operation makes is counted from its birth to its death: exact, but for what lives inside
one operation.
"""

import argparse
import weakref
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dev.gpu_setup import Check, Setup, free_memory, judge
from dev.timing import print_table
from nanochat import flash_attention
from nanochat.common import COMPUTE_DTYPES, run_script
from nanochat.config import GPTConfig
from nanochat.gpt import GPT
from nanochat.memory import GIB, Machine, get_usable_frac, measure_free_bytes, predict_memory
from nanochat.scaling import make_config
from nanochat.train import Batch, train_step

TOLERANCE = 0.10    # relative error of a prediction that passes
GPU_DEPTHS = (4, 8, 12, 20)
MAX_ROWS = 16       # of a micro-batch in check_memory


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that live: those it is told of, and those that operations make while it is active."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self.storages: dict[int, tuple[weakref.ref, int]] = {}    # by address: how its end is noticed, and its bytes
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
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.add(value)
        return result


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[2, 4, 6, 8])
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-seq-len", type=int, default=512, help="context in tokens")
    parser.add_argument("--rows", type=int, default=2, help="rows of a micro-batch")
    parser.add_argument("--num-micro", type=int, nargs="+", default=[1, 2], help="micro-batches of a step")
    parser.add_argument("--dtype", choices=COMPUTE_DTYPES, default="bfloat16")
    parser.add_argument("--attention", choices=("sdpa", "blocks"), default="sdpa")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    rows = [compare_step(make_config(depth, vocab_size=args.vocab_size, sequence_len=args.max_seq_len),
                         args.max_seq_len, args.rows, num_micro, args.dtype, args.attention)
            for depth in args.depth for num_micro in args.num_micro]
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    return {"rows": rows}


def compare_step(config: GPTConfig, T: int, rows: int, num_micro: int, dtype: str, attention: str) -> dict:
    """One row of the table: the measured and the predicted peak."""
    compute = Machine(dtype, attention, is_compiled=False, device_type="cpu")
    memory = predict_memory(config, T, rows, compute, num_micro)
    flash_attention._override_impl = attention
    try:
        measured = measure_step(config, T, rows, num_micro, getattr(torch, dtype))
    finally:
        flash_attention._override_impl = None
    return {"depth": config.n_layer, "vocab": config.vocab_size, "T": T, "rows": rows, "micro-batches": num_micro,
            "dtype": dtype, "attention": attention, "measured MiB": measured / 2**20,
            "predicted MiB": memory.peak / 2**20, "error %": 100 * (memory.peak / measured - 1),
            "worst at": memory.worst_moment}


def measure_step(config: GPTConfig, T: int, rows: int, num_micro: int, dtype: torch.dtype) -> int:
    """Peak bytes of one eager training step on the CPU, parameters and optimizer state included."""
    torch.manual_seed(0)
    model = GPT(config, dtype)
    model.init_weights()
    optimizer = model.setup_optimizer()
    tokens = torch.randint(config.vocab_size, (rows * num_micro, T + 1))
    return measure_peak_bytes(model, optimizer, Batch(tokens[:, :-1], tokens[:, 1:], None), rows)


def measure_peak_bytes(model, optimizer, batch: Batch, micro_rows: int) -> int:
    """Bytes in use at the worst instant of a training step: by CUDA's allocator, elsewhere by counting tensors."""
    device = model.get_device()
    state = [piece.tensor for piece in optimizer.get_named_state().values()]  # made as a later step finds it
    if device.type == "cuda":
        train_step(model, optimizer, batch, micro_rows)  # compiling has peaks of its own
        torch.cuda.reset_peak_memory_stats(device)
        train_step(model, optimizer, batch, micro_rows)
        return torch.cuda.max_memory_allocated(device)
    live = LiveBytes([*model.parameters(), *model.buffers(), *state])
    with live:
        train_step(model, optimizer, batch, micro_rows)
    return live.peak_bytes


def check_memory(setup: Setup) -> Iterator[Check]:
    """A section of dev/gpu_check.py: the peak of a step against the prediction, at each depth, with one micro-batch
    and with two. They have as many rows as should fit: where a prediction is too low, memory may run out instead."""
    on_gpu, T = setup.device.type == "cuda", setup.sizes.T
    if not on_gpu and (setup.use_compile or setup.device.type != "cpu"):
        yield Check("memory", "absent", "only CUDA's allocator and eager steps on a CPU tell their peak")
        return
    compute = Machine(str(setup.dtype).removeprefix("torch."), setup.backend, setup.use_compile, setup.device.type)
    for depth in GPU_DEPTHS if on_gpu else setup.sizes.depths:
        free_memory(setup.device)
        config = setup.make_config(depth)
        usable_bytes = get_usable_frac(compute) * (measure_free_bytes(setup.device) or 0)
        before_bytes = torch.cuda.memory_allocated(setup.device) if on_gpu else 0
        # two micro-batches take more, since gradients of the first stand beside the second
        rows = next((n for n in (MAX_ROWS, 8, 4, 2, 1) if n <= setup.sizes.max_rows and
                     predict_memory(config, T, n, compute, num_micro=2).peak <= usable_bytes), 0)
        if not rows:
            yield Check(f"d{depth} memory", "absent", "no row is predicted to fit here")
            continue
        model, optimizer = setup.make_model(depth)
        for num_micro in (1, 2):
            memory = predict_memory(config, T, rows, compute, num_micro)
            measured = measure_peak_bytes(model, optimizer, setup.make_batch(rows * num_micro), rows) - before_bytes
            error = memory.peak / measured - 1
            yield Check(f"d{depth} memory, {num_micro} x {rows} rows", judge(abs(error) <= TOLERANCE),
                        f"{measured / GIB:.3f} GiB, predicted {memory.peak / GIB:.3f} ({100 * error:+.1f}%), worst at "
                        f"the {memory.worst_moment}", {"measured_bytes": measured, "predicted_bytes": memory.peak,
                                                       "moments": memory.moments})
        del model, optimizer


if __name__ == "__main__":
    run_script(main)
