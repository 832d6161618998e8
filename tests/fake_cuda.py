"""CUDA graphs on a CPU: the operations of a captured step are recorded, and replayed on the same tensors.

As on a GPU, nothing is computed while they are recorded, a replay runs no Python and knows tensors by their memory, and
neither a copy from the host nor a value read back can be captured.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat import flash_attention

HOST_READS = tuple(getattr(torch.ops.aten, name) for name in (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"))
HOST_COPIES = (torch.ops.aten.lift_fresh,)  # data of Python's: torch.tensor, new_tensor, a list as an index
HOST_CALLS = (torch.tensor, torch.as_tensor, torch.from_numpy, Tensor.new_tensor, Tensor.tolist, Tensor.item)


def list_tensors(*trees):
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


def get_address(tensor):
    return tensor.untyped_storage().data_ptr()


class FakeGraph(TorchDispatchMode):
    """Stands for torch.cuda.CUDAGraph, and for torch.cuda.graph while it is recorded."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = []  # (tensor, value) before each operation that wrote to it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket in HOST_READS + HOST_COPIES:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        arguments = [*args, *(kwargs.get(arg.name) for arg in function._schema.arguments[len(args):])]
        for argument, value in zip(function._schema.arguments, arguments, strict=True):
            if argument.alias_info and argument.alias_info.is_write:
                self.before += [(tensor, tensor.clone()) for tensor in list_tensors(value)]
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, results))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)
        inputs, made = set(), set()
        for _, args, kwargs, results in self.calls:
            inputs |= {get_address(t) for t in list_tensors(args, kwargs) if not t.is_mkldnn} - made
            for result in list_tensors(results):
                if get_address(result) not in inputs:
                    made.add(get_address(result))
                    if result.is_floating_point():
                        result.fill_(float("nan"))

    def replay(self):
        for function, args, kwargs, results in self.calls:
            for old, new in zip(list_tensors(results), list_tensors(function(*args, **kwargs)), strict=True):
                if new.data_ptr() != old.data_ptr():  # neither a view nor what is written in place
                    old.copy_(new)

    def pool(self):
        return id(self)


class NothingOfTheHost(TorchDispatchMode):
    """Fails where a step on the meta device, which goes a GPU's ways, needs data of the host or gives it some."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        assert function.overloadpacket not in HOST_READS + HOST_COPIES, function
        assert all(tensor.is_meta for tensor in list_tensors(args, kwargs, results)), function
        return results


class NoHostCalls(TorchFunctionMode):
    """The same for calls that make a tensor of Python's data, which no dispatch mode sees on the meta device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in HOST_CALLS, function
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            assert not any(isinstance(part, list) for part in (args[1] if isinstance(args[1], tuple) else args[1:2]))
        return function(*args, **(kwargs or {}))


def find_positions(*args):
    """As on CUDA: lengths aren't read."""
    is_compiling, torch.compiler.is_compiling = torch.compiler.is_compiling, lambda: True
    try:
        return flash_attention.find_positions(*args)
    finally:
        torch.compiler.is_compiling = is_compiling


def fake_cuda_graphs(monkeypatch) -> list[FakeGraph]:
    """Let decoding.GraphedStep capture graphs here; those that it does are in the list."""
    graphs = []

    def record(graph, pool, stream, capture_error_mode):
        graphs.append(graph)
        return graph
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {"CUDAGraph": FakeGraph, "graph": record, "Stream": lambda: stream,
                       "stream": lambda stream: contextlib.nullcontext(), "current_stream": lambda: stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("nanochat.kv_cache.find_positions", find_positions)
    return graphs
