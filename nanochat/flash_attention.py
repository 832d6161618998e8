"""One attention call, several backends; tensors (B, T, H, D), FlashAttention 3's signature.

    fa3    FlashAttention 3 (arXiv 2407.08608) on NVIDIA GPUs: an installed package, or the `kernels` hub
    fa2    FlashAttention 2 (arXiv 2307.08691) as torch itself has it: Ampere GPUs and newer, no package
    flex   FlexAttention with a block-sparse sliding window (CUDA)
    blocks products of query blocks with the keys they see, for training on CPUs, where it is 3 to 5 times faster than
           torch's own backward pass (dev/LOG.md, "Attention on CPUs: blocks")
    sdpa   torch's own attention, everywhere; a window is cut into chunks, so no T x T mask exists

A backend counts as there only when its output and gradients on the real device, with the model's own heads, agree with
fp32, and torch.compile can trace it: `choose_backend` probes them in that order. Until it is called, and in any dtype
or device that the others can't take, sdpa serves. fa3, fa2 and flex have never run on a GPU of ours: a CPU checks their
masks, shapes and choice only.

B rows, T tokens, H query heads, Hk key/value heads, D head dim. A window (N, 0) sees itself and the N tokens before it.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError, file_lock, gather, get_base_dir, get_first_line, get_ranks, print0
from nanochat.config import GPTConfig
from nanochat.memory import list_query_blocks

BACKENDS = ("fa3", "fa2", "flex", "blocks", "sdpa")
GPU_BACKENDS = ("fa3", "fa2", "flex")    # bf16 and fp16 only
FA3_PACKAGE = "flash_attn_interface"     # of the wheel flash-attn-3 on torch's own index, or built from source
# A repository of the kernels hub, and its major version, within which functions stay as they are. Its publisher is one
# whom the hub marks as trusted; code of others is not run (trust_remote_code)
FA3_KERNEL, FA3_KERNEL_VERSION = "kernels-community/flash-attn3", 1
# What a library built for another torch says when it is loaded
ABI_ERRORS = ("undefined symbol", "Symbol not found", "cannot open shared object file", "DLL load failed")
NUM_CACHE_PROBES = 4    # tokens that fa3 reads beside a cache, in its probe
PROBE_TOLERANCE = 0.03  # relative error of bf16 or fp16 attention against fp32; a wrong mask or layout gives over 0.3

FLEX_BLOCK = 128                   # flex works on whole blocks of so many queries

_override_impl: str | None = None  # a test's choice, before any other
_chosen: dict[str, str] = {}       # device type -> backend
_fa3_module: ModuleType | None = None    # found by load_fa3; a plain global, which torch.compile can trace


def __getattr__(name: str):
    if name == "HAS_FA3":  # asked for by name, not at import, since finding it loads libraries
        return load_fa3()[0] is not None
    raise AttributeError(name)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = True,
                    window_size: tuple[int, int] = (-1, 0)) -> Tensor:
    """Causal attention over whole sequences. q (B, T, H, D), k and v (B, T, Hk, D) -> (B, T, H, D)."""
    if not causal or window_size[1] > 0:
        raise ValueError("attention here is causal")
    window = window_size[0] if 0 <= window_size[0] < q.size(1) - 1 else -1  # -1: the whole past
    return _TRAIN_CALLS[_backend_of(q)](q, k, v, window)


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None,
                            v: Tensor | None = None, cache_seqlens: Tensor | None = None, causal: bool = True,
                            window_size: tuple[int, int] = (-1, 0)) -> Tensor:
    """Attention of new tokens on what each row's cache holds; k and v, when given, are first written into it.

    q: (B, T, H, D), k and v: (B, T, Hk, D), the new tokens
    k_cache, v_cache: (B, Tmax, Hk, D); without fa3 of any dtype; attention is computed in the wider of q's and it
    cache_seqlens: (B,) int32, tokens in each row's cache: without the new ones where k and v are given, else with them
    """
    if not causal or window_size[1] > 0:
        raise ValueError("attention here is causal")
    if cache_seqlens is None:
        cache_seqlens = torch.zeros(q.size(0), dtype=torch.int32, device=q.device)
    if uses_fa3(q):
        return _fa3_with_cache(q, k_cache, v_cache, k, v, cache_seqlens, window_size[0])
    T = q.size(1)
    positions = find_positions(cache_seqlens if k is not None else cache_seqlens - T, T, k_cache.size(1))
    if k is not None:
        write_to_cache((k_cache[None], v_cache[None]), 0, (k, v), positions)
    keys, mask = find_mask(positions, q, k_cache, window_size[0])
    return attend_to_cache(q, k_cache[:, keys], v_cache[:, keys], mask).to(q.dtype)


flash_attn = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache)


def uses_fa3(q: Tensor) -> bool:
    """Whether FlashAttention 3 serves queries like these, which reads a cache of its own accord."""
    return _backend_of(q) == "fa3"


def _backend_of(q: Tensor) -> str:
    backend = _override_impl or _chosen.get(q.device.type, "sdpa")
    if backend in GPU_BACKENDS and q.dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    if backend == "flex" and q.size(1) % FLEX_BLOCK:
        return "sdpa"  # or each length of a prompt would be compiled for
    if backend == "blocks" and not q.requires_grad:
        return "sdpa"  # whose forward pass is the fast half
    if backend == "fa3" and _fa3_module is None and load_fa3()[0] is None:
        raise UserError(f"fa3 was asked for, but {load_fa3()[1]}")
    return backend


def choose_for_inference(device: torch.device, dtype: torch.dtype, config: GPTConfig) -> str:
    """The backend for a model that doesn't learn: with a cache it is fa3's or torch's own, without one also fa2. What
    the probes say goes to stderr, since stdout is for answers. Collective."""
    if device.type != "cuda":
        return "sdpa"
    with contextlib.redirect_stdout(sys.stderr):
        return choose_backend(device, dtype, config, backends=("fa3", "fa2", "sdpa"), is_traced=False)[0]


def choose_backend(device: torch.device, dtype: torch.dtype, config: GPTConfig, num_tokens: int | None = None, *,
                   wanted: str = "auto", backends: Sequence[str] = BACKENDS,
                   is_traced: bool = True) -> tuple[str, str]:
    """Use the first backend that passes its probe on every rank, or the wanted one; returns its name and why. All ranks
    get the same, or the same error. Collective.

    config:     the model, whose heads are probed
    num_tokens: the length of the sequences to train on, if it is known
    backends:   those to choose from, the best first
    is_traced:  whether torch.compile is to trace it as well
    """
    if wanted != "auto" and wanted not in BACKENDS:
        raise UserError(f"--attention {wanted} is not one of auto, {', '.join(BACKENDS)}")
    reasons = []
    for name in backends if wanted == "auto" else (wanted,):
        found = probe_on_ranks(name, device, dtype, config, num_tokens, is_traced)
        failed = {rank: reason for rank, (works, reason) in found.items() if not works}
        if not failed:
            _chosen[device.type] = name
            return name, "; ".join([*reasons, f"{name} {found[0][1]}"])
        rank, reason = next(iter(failed.items()))
        reasons.append(f"{name}{f' on rank {rank}' if rank > 0 else ''}: {reason}")
    raise UserError(f"no attention backend works here: {'; '.join(reasons)}")


def probe_on_ranks(name: str, device: torch.device, dtype: torch.dtype, config: GPTConfig, num_tokens: int | None,
                   is_traced: bool) -> dict[int, tuple[bool | None, str]]:
    """Rank -> what `probe_backend` finds there; only the ranks that go first where one of these fails. Collective.

    The first rank of each machine goes first. The others find on the disk what it has fetched from the hub or compiled;
    all at once they would fetch it several times, and a hub that limits requests would refuse some.
    """
    ranks, mine, found = get_ranks(), None, {}
    for is_turn in (ranks.local_rank == 0, ranks.local_rank > 0):
        if is_turn:
            mine = probe_backend(name, device, dtype, config, num_tokens, is_traced)
        found = {rank: answer for rank, answer in enumerate(gather(mine)) if answer}
        if not all(works for works, _ in found.values()):
            break
    return found


def probe_report(device: torch.device, dtype: torch.dtype,
                 config: GPTConfig) -> list[tuple[str, bool | None, str]]:
    """(name, works, reason) for each backend, from a small forward and backward pass on the device itself."""
    return [(name, *probe_backend(name, device, dtype, config)) for name in BACKENDS]


def probe_backend(name: str, device: torch.device, dtype: torch.dtype, config: GPTConfig,
                  num_tokens: int | None = None, is_traced: bool = True) -> tuple[bool | None, str]:
    """Does this backend compute attention here? Compares output and gradients, windowed and not, with fp32, and fa3's
    output with a cache, too; fa3 and fa2 are also traced as torch.compile does, without compiling.

    The model's own heads and dtype are probed: whether a GPU's shared memory suffices for a kernel depends on them.
    Returns None in place of False where the backend isn't installed or isn't for this device.
    """
    if obstacle := _find_obstacle(name, device, dtype, num_tokens):
        return None, obstacle
    if device.type == "cuda":
        print0(f"probing attention: {name} ...")
    if name == "flex":  # compiled on its own: its block mask must not become part of the model's graph
        _TRAIN_CALLS[name] = torch.compiler.disable(_flex)  # not at import: that loads the compiler, which takes 1.5 s
    rng = torch.Generator().manual_seed(0)
    shape_q, shape_kv = ((2, 384, num_heads, config.head_dim) for num_heads in (config.n_head, config.n_kv_head))
    values = [torch.randn(shape, generator=rng) for shape in (shape_q, shape_kv, shape_kv, shape_q)]
    try:
        for window in (-1, 128):
            expected = _run_probe(plain_attention, values, torch.device("cpu"), torch.float32, window)
            actual = _run_probe(_TRAIN_CALLS[name], values, device, dtype, window)
            labels = ["output", "dq", "dk", "dv"]
            if name == "fa3":
                labels.append("output with a cache")
                actual += (_run_cache_probe(values, device, dtype, window),)
                expected += (expected[0][:, -NUM_CACHE_PROBES:],)
            for label, a, e in zip(labels, actual, expected, strict=True):
                error = ((a.float().cpu() - e).norm() / e.norm()).item()
                if not error < PROBE_TOLERANCE:
                    return False, f"its {label} is off by {error:.2g} at window {window}"
    except Exception as error:  # a probe's purpose is to find out what goes wrong, whatever it is
        return False, f"{type(error).__name__}: {get_first_line(error)[:200]}"
    if is_traced and name in ("fa3", "fa2"):    # by code of theirs that finds shapes alone
        try:
            traced = torch.compile(_TRAIN_CALLS[name], backend="aot_eager", dynamic=False)
            _run_probe(traced, values, device, dtype, window)
        except Exception as error:
            return False, f"torch.compile can't trace it: {type(error).__name__}: {get_first_line(error)[:200]}"
    return True, "agrees with fp32" + (f", {load_fa3()[1]}" if name == "fa3" else "")


def _find_obstacle(name: str, device: torch.device, dtype: torch.dtype, num_tokens: int | None) -> str:
    """Why a backend isn't here, or isn't for this device, dtype or length; '' if it can be probed."""
    if name == "blocks" and device.type != "cpu":
        return f"is for CPUs, this is {device.type}"
    if name not in GPU_BACKENDS:
        return ""
    if device.type != "cuda":
        return f"needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, this is {dtype}"
    if name == "fa3":
        module, reason = load_fa3()
        return "" if module else reason
    if name == "fa2" and not torch.backends.cuda.is_flash_attention_available():
        return "needs a torch that was built with FlashAttention"
    if name == "fa2" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs an Ampere GPU or a newer one"
    if name == "flex" and (num_tokens or 0) % FLEX_BLOCK:
        return f"needs a context of a multiple of {FLEX_BLOCK}"
    return ""


@torch.no_grad()
def _run_cache_probe(values: list[Tensor], device: torch.device, dtype: torch.dtype, window: int) -> Tensor:
    """fa3's output for the last tokens, on a cache that holds all before them."""
    q, k, v, _ = (t.to(device, dtype) for t in values)
    parts = q.size(1) - NUM_CACHE_PROBES, NUM_CACHE_PROBES
    (_, q), (old_k, k), (old_v, v) = (t.split(parts, dim=1) for t in (q, k, v))
    caches = [torch.cat((old, torch.zeros_like(new)), dim=1) for old, new in ((old_k, k), (old_v, v))]
    lengths = torch.full((len(q),), old_k.size(1), dtype=torch.int32, device=device)
    return _fa3_with_cache(q, *caches, k, v, lengths, window)


def _run_probe(call: Callable, values: list[Tensor], device: torch.device, dtype: torch.dtype, window: int):
    *qkv, grad = (t.to(device, dtype) for t in values)
    out = call(*(t.requires_grad_() for t in qkv), window)
    return out.detach(), *torch.autograd.grad(out, qkv, grad)


# ---------------------------------------------------------------------------------------------------------------------
# The backends; window -1 is the whole past


def plain_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """The definition, with a T x T mask: what every backend must equal."""
    T, D = q.size(1), q.size(-1)
    k, v = _expand_heads(q, k, v)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / D**0.5
    scores = scores.masked_fill(~_window_mask(T, T, window, q.device), -float("inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def _window_mask(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last queries of the keys see themselves and `window` keys before them."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None]
    return _sees(query, key, window)


def _sees(query: Tensor, key: Tensor, window: int) -> Tensor:
    """Whether the query at one position sees the key at another."""
    return (key <= query) & (key >= query - window) if window >= 0 else key <= query


def _expand_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat key/value heads so that there is one for each query head."""
    group = q.size(2) // k.size(2)
    return (k, v) if group == 1 else (k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    k, v = _expand_heads(q, k, v)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    if window < 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    # Cut into chunks as long as the window: a query then sees keys of its own chunk and of the one before only. The
    # first chunk sees itself alone; each other is a small dense attention of c queries on 2c keys, and these are
    # independent rows of a batch under one mask
    B, H, T, D = q.shape
    c = max(window, 1)
    num_others = -(-T // c) - 1
    q, k, v = (F.pad(t, (0, 0, 0, (num_others + 1) * c - T)).contiguous() for t in (q, k, v))
    first = F.scaled_dot_product_attention(q[:, :, :c], k[:, :, :c], v[:, :, :c], is_causal=True)
    q = q[:, :, c:].view(B * H, num_others, c, D)
    k, v = (t.unfold(2, 2 * c, c).transpose(-1, -2).view(B * H, num_others, 2 * c, D) for t in (k, v))
    others = F.scaled_dot_product_attention(q, k, v, attn_mask=_window_mask(c, 2 * c, window, q.device))
    return torch.cat((first, others.reshape(B, H, num_others * c, D)), dim=2)[:, :, :T].transpose(1, 2)


def _blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    k, v = _expand_heads(q, k, v)
    B, T, H, D = q.shape
    q, k, v = (t.transpose(1, 2).reshape(B * H, T, D) for t in (q, k, v))
    outputs = []
    for start, end, first in list_query_blocks(T, window):
        scores = torch.bmm(q[:, start:end], k[:, first:end].mT)  # (B * H, queries, keys)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * D**-0.5
        mask = _window_mask(end - start, end - first, window, q.device)
        probs = scores.masked_fill(~mask, -float("inf")).softmax(-1).to(q.dtype)
        outputs.append(torch.bmm(probs, v[:, first:end]))
    return torch.cat(outputs, dim=1).view(B, H, T, D).transpose(1, 2)


def _fa3(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    out = _fa3_module.flash_attn_func(q, k, v, causal=True, window_size=(window, 0 if window >= 0 else -1))
    return out[0] if isinstance(out, tuple) else out


def _fa3_with_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor,
                    window: int) -> Tensor:
    out = _fa3_module.flash_attn_with_kvcache(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths, causal=True,
                                              window_size=(window, 0))
    return out[0] if isinstance(out, tuple) else out


def _fa2(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """By the operator under F.scaled_dot_product_attention, which offers no windows itself.

    Differentiable, traced by torch.compile without a graph break, and native to fewer key/value heads in both passes
    (mha_fwd and mha_bwd in torch's flash_api.cpp).
    """
    left, right = (window, 0) if window >= 0 else (None, None)
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.size(1), k.size(1), dropout_p=0.0, is_causal=True, return_debug_mask=False,
        window_size_left=left, window_size_right=right)[0]


@functools.cache
def load_fa3() -> tuple[ModuleType | None, str]:
    """The module of FlashAttention 3 and where it is from; or None and why no place has it. Looks once a process."""
    global _fa3_module
    if not torch.cuda.is_available() or torch.version.hip:
        return None, "needs an NVIDIA GPU"
    hub = f"{FA3_KERNEL} version {FA3_KERNEL_VERSION} of the kernels hub"
    reasons = []
    for place, find in ((FA3_PACKAGE, _import_package), (hub, _fetch_kernel)):
        try:
            module = find()
        except Exception as error:  # a broken library, a hub out of reach: each raises another type
            reasons.append(f"{place} {_explain_failure(error)}")
            continue
        missing = [name for name in ("flash_attn_func", "flash_attn_with_kvcache") if not hasattr(module, name)]
        if not missing:
            _fa3_module = module
            return module, ", ".join([f"from {place}", *(f"since {reason}" for reason in reasons)])
        reasons.append(f"{place} has no {missing[0]}")
    return None, ", ".join(reasons)


def _import_package() -> ModuleType:
    if torch.cuda.get_device_capability()[0] not in (8, 9):    # it ends the process where a kernel doesn't start
        raise UserError("is for Ampere and Hopper GPUs")
    return importlib.import_module(FA3_PACKAGE)


def _fetch_kernel() -> ModuleType:
    if torch.cuda.get_device_capability() != (9, 0):  # others have fa2 without a download
        raise UserError("is for Hopper GPUs")
    from kernels import get_kernel
    with file_lock(get_base_dir() / "kernels_hub"):    # a server's engines all start at once
        print0(f"loading {FA3_KERNEL} from the kernels hub ...")
        return get_kernel(FA3_KERNEL, version=FA3_KERNEL_VERSION)


def _explain_failure(error: Exception) -> str:
    """Why FlashAttention 3 can't be had from a place, as the rest of a sentence whose subject is the place."""
    text = get_first_line(error)[:200]
    if isinstance(error, UserError):
        return text
    if isinstance(error, ModuleNotFoundError):
        return "isn't installed" if error.name == FA3_PACKAGE else f"needs the package {error.name}"
    if any(mark in text for mark in ABI_ERRORS):
        return f"is built for another torch than {torch.__version__} ({text})"
    if "build variant" in text:
        return f"has no build for torch {torch.__version__} with CUDA {torch.version.cuda}"
    if "trust status" in text:
        return "can't be had, for the hub doesn't answer"
    if "trusted publisher" in text:
        return "is refused: the hub doesn't mark its publisher as trusted"
    return f"fails: {type(error).__name__}: {text}"


_compile_once = functools.cache(functools.partial(torch.compile, dynamic=False))


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention
    call = _compile_once(flex_attention) if q.device.type == "cuda" else flex_attention
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    y = call(q, k, v, block_mask=_flex_mask(q.size(2), window, q.device), enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


@functools.cache
def _flex_mask(num_tokens: int, window: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask
    with torch.inference_mode(False):  # or a mask first made in evaluation could not serve training
        return create_block_mask(lambda b, h, query, key: _sees(query, key, window), None, None, num_tokens, num_tokens,
                                 device=device)


_TRAIN_CALLS = {"fa3": _fa3, "fa2": _fa2, "flex": _flex, "blocks": _blocks, "sdpa": _sdpa}


# ---------------------------------------------------------------------------------------------------------------------
# On a cache


@dataclass(frozen=True)
class Positions:
    """Where a forward pass's new tokens stand in the rows of a cache."""
    first:   int            # none stands before it
    end:     int            # nor from here on: how much of the cache is in use
    by_row:  Tensor | None  # (B, T); None: first to end - 1 in every row
    rows:    Tensor | None = None  # (B, 1) indices, beside by_row


def find_positions(lengths: Tensor, num_new: int, capacity: int) -> Positions:
    """Positions of the new tokens behind the rows' lengths (B,) in a cache that has room for `capacity` tokens.

    Reading lengths back makes a GPU wait and can't be traced, so only eager CPUs look at just the keys in use.
    """
    first, end = 0, capacity
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        known = lengths.tolist()
        first, end = min(known), max(known) + num_new
        if end - first == num_new:
            return Positions(first, end, None)
    by_row = lengths[:, None].long() + torch.arange(num_new, device=lengths.device)
    return Positions(first, end, by_row, torch.arange(len(lengths), device=lengths.device)[:, None])


def find_mask(positions: Positions, q: Tensor, k_cache: Tensor, window: int) -> tuple[slice, Tensor | None]:
    """Which keys of a cache any new token sees, and the mask of these; the same in all layers with one window.

    The mask is added to scores (B, Hk, G * T, keys), G query heads of each key/value head, in the wider dtype of q and
    the cache; traced, it is boolean and true where they count. None where all queries see all keys.
    """
    num_new, num_groups, device = q.size(1), q.size(2) // k_cache.size(-2), q.device
    first = max(0, positions.first - window) if window >= 0 else 0
    if positions.by_row is None:
        if num_new == 1:
            return slice(first, positions.end), None
        seen = _window_mask(num_new, positions.end - first, window, device).repeat(num_groups, 1)
    else:
        keys = torch.arange(first, positions.end, device=device)
        seen = _sees(positions.by_row[..., None], keys, window)  # (B, T, keys)
        seen = seen.repeat(1, num_groups, 1)[:, None]            # (B, 1, G * T, keys)
    if torch.compiler.is_compiling():
        return slice(None), seen  # which are all
    dtype = torch.promote_types(q.dtype, k_cache.dtype)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -float("inf"))
    return slice(first, positions.end), mask


def write_to_cache(caches: Sequence[Tensor], layer: int, new: Sequence[Tensor], positions: Positions) -> None:
    """Put new keys and values (B, T, Hk, D) into a layer of their caches (layers, B, Tmax, Hk, D)."""
    if positions.by_row is None:
        at = layer, slice(None), slice(positions.first, positions.end)
    else:  # one write into the memory of all layers: traced, one into a layer's view would copy that layer
        at = torch.full((1, 1), layer, device=new[0].device), positions.rows, positions.by_row
    for cache, heads in zip(caches, new, strict=True):
        cache[at] = heads.to(cache.dtype)


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q (B, T, H, D) on keys and values of a cache, (B, keys, Hk, D), in the wider dtype of both."""
    B, T, H, D = q.shape
    Hk = k.size(2)
    if T == 1 and q.device.type == "cpu" and torch.compiler.is_compiling():
        return _attend_with_sums(q, k, v, mask)
    # The query heads that share a key/value head become more queries of that head: no copy of the cache is made
    dtype = torch.promote_types(q.dtype, k.dtype)
    grouped = q.view(B, T, Hk, H // Hk, D).permute(0, 2, 3, 1, 4).reshape(B, Hk, H // Hk * T, D).to(dtype)
    k, v = k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)  # (B, Hk, keys, D)
    y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask)
    return y.view(B, Hk, H // Hk, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)


def _attend_with_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one token as a few loops, which a compiler makes faster than torch's own; mask: (B, 1, G, keys)"""
    B, _, H, D = q.shape
    Hk = k.size(2)
    q = (q.float() * D**-0.5).view(B, Hk, H // Hk, D)
    scores = (q[:, None] * k[:, :, :, None].float()).sum(-1).permute(0, 2, 3, 1)  # (B, Hk, G, keys)
    scores = torch.where(mask, scores, -float("inf"))
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    y = (weights[..., None] * v.float().transpose(1, 2)[:, :, None]).sum(3)       # (B, Hk, G, D)
    return (y / weights.sum(-1, keepdim=True)).view(B, 1, H, D)
