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
from nanochat.memory import GIB, Compute, predict_memory
from nanochat.scaling import make_config
from nanochat.train import Batch, train_step

TOLERANCE = 0.10    # relative error of a prediction that passes


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
    compute = Compute(dtype, attention, is_compiled=False, device_type="cpu")
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
    state = [piece.tensor for piece in optimizer.get_named_state().values()]  # made as a later step finds it
    tokens = torch.randint(config.vocab_size, (rows * num_micro, T + 1))
    live = LiveBytes([*model.parameters(), *model.buffers(), *state])
    with live:
        train_step(model, optimizer, Batch(tokens[:, :-1], tokens[:, 1:], None), rows)
    return live.peak_bytes


def check_memory(setup: Setup, depths: tuple[int, ...] = (4, 8, 12, 20)) -> Iterator[Check]:
    """A section of dev/gpu_check.py: the allocator's peak over two steps against the prediction, at each depth."""
    compute = Compute(str(setup.dtype).removeprefix("torch."), setup.backend, setup.use_compile, setup.device.type)
    for depth in depths if setup.device.type == "cuda" else ():
        config = setup.make_config(depth)
        for rows in (8, 32):
            free_memory(setup.device)
            memory = predict_memory(config, setup.sizes.T, rows, compute)
            if memory.peak > 0.9 * torch.cuda.get_device_properties(setup.device).total_memory:
                continue
            model, optimizer = setup.make_model(depth)
            for step in range(2):
                train_step(model, optimizer, setup.make_batch(rows, step), rows)
                if step == 0:  # compiling has peaks of its own
                    torch.cuda.reset_peak_memory_stats(setup.device)
            measured = torch.cuda.max_memory_allocated(setup.device)
            del model, optimizer
            error = memory.peak / measured - 1
            yield Check(f"d{depth} memory, {rows} rows", judge(abs(error) <= TOLERANCE),
                        f"{measured / GIB:.2f} GiB, predicted {memory.peak / GIB:.2f} ({100 * error:+.1f}%), worst at "
                        f"the {memory.worst_moment}", {"measured_bytes": measured, "predicted_bytes": memory.peak,
                                                       "moments": memory.moments})


if __name__ == "__main__":
    run_script(main)
