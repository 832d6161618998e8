"""What an operation of the kernel bench is, and whether a variant of it computes what its definition says.

An operation has inputs by name, a definition, which is run in float64, and variants: calls that take the inputs as
positional arguments and return the result, or change some inputs in place. Where gradients are wanted, the bench runs
the backward pass: the last input, `grad`, is then the gradient of the result, and no variant gets it.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat import compilation
from nanochat.common import get_first_line, is_out_of_memory
from nanochat.compilation import set_compile_kernels
from nanochat.config import GPTConfig

Shape = dict[str, object]     # the sizes of an operation, as its file's legend names them
Inputs = dict[str, object]    # tensors, and numbers that the definition needs

# Relative errors against float64 of what products make. bf16 keeps 8 bits, of which one rounding costs 2e-3 on average;
# GPUs multiply fp32 in tf32, which keeps 10. A wrong mask or layout is off by over 0.3
TOLERANCES = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 2e-3}


@dataclass(frozen=True)
class Setting:
    """Where variants run."""
    device:     torch.device
    dtype:      torch.dtype    # of the activations
    no_compile: str = ""       # why nothing is compiled; '' where variants may be


@dataclass(frozen=True)
class Scale:
    """A model and a micro-batch, from which shapes follow."""
    config:      GPTConfig
    rows:        int           # sequences of sequence_len tokens
    decode_rows: int           # sequences that decode together


@dataclass(frozen=True)
class Variant:
    name:          str
    call:          Callable
    find_obstacle: Callable[[Setting, Shape], str] = lambda setting, shape: ""    # why it isn't available; '' if it is
    plugin:        str = ""    # path of the file that it is from


@dataclass(frozen=True)
class Operation:
    name:         str
    family:       str                                        # a panel of the figure
    about:        str                                        # arguments and result of a variant
    list_shapes:  Callable[[Scale], dict[str, Shape]]
    make_inputs:  Callable[[Shape, Setting], Inputs]         # random; the caller sets the seed
    definition:   Callable                                   # as a variant, in torch's plain words
    count_flops:  Callable[[Shape], int]                     # of products, without recomputation; else of all elements
    tolerances:   dict[torch.dtype, float]                   # relative, of the dtypes that it is for
    variants:     tuple[Variant, ...]                        # the first is what speeds are compared with
    gradients:    tuple[str, ...] = ()                       # inputs whose gradients are wanted
    changes:      tuple[str, ...] = ()                       # inputs that are changed in place
    has_result:   bool = True
    result_dtype: torch.dtype | None = None                  # None: that of the first input
    count_bytes:  Callable[[Shape, Inputs], int] | None = None    # None: inputs are read, outputs are written, once


class WrongResult(Exception):
    """What is wrong with a result, as the rest of a sentence about the variant."""


@dataclass(frozen=True)
class Verdict:
    status: str                  # ok, WRONG, error, no memory
    detail: str                  # the worst error and where, or what went wrong
    errors: dict[str, float]     # relative, by output


# ---------------------------------------------------------------------------------------------------------------------
# One run


def run(operation: Operation, call: Callable, inputs: Inputs, check: Callable | None = None) -> dict[str, Tensor]:
    """Outputs by name: the result, gradients as d<input>, inputs that were changed. check: is given the result before
    the backward pass."""
    args, outputs = {name: value for name, value in inputs.items() if name != "grad"}, {}
    for name in operation.gradients:
        args[name] = args[name].detach().requires_grad_()
    with torch.set_grad_enabled(bool(operation.gradients)):
        result = call(*args.values())
    if check:
        check(result)
    if operation.has_result:
        outputs["result"] = result.detach()
    if operation.gradients:
        grads = torch.autograd.grad(result, [args[name] for name in operation.gradients], inputs["grad"],
                                    allow_unused=True)
        if unused := [name for name, grad in zip(operation.gradients, grads, strict=True) if grad is None]:
            raise WrongResult(f"its result has no gradient of {unused[0]}, which isn't used")
        outputs |= {f"d{name}": grad for name, grad in zip(operation.gradients, grads, strict=True)}
    return outputs | {name: args[name] for name in operation.changes}


def clone(inputs: Inputs) -> Inputs:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


@torch.no_grad()
def fill(own: Inputs, inputs: Inputs) -> Inputs:
    """The same tensors with other numbers."""
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            own[name].copy_(value)
    return own


def widen(value: object) -> object:
    """The same in float64."""
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def find_expected(operation: Operation, inputs: Inputs) -> dict[str, Tensor]:
    """The outputs of the definition in float64."""
    return run(operation, operation.definition, clone({name: widen(value) for name, value in inputs.items()}))


def get_output_dtype(operation: Operation, name: str, inputs: Inputs) -> torch.dtype:
    if name == "result":
        return operation.result_dtype or next(iter(inputs.values())).dtype
    return inputs[name if name in operation.changes else name[1:]].dtype


def count_bytes(operation: Operation, shape: Shape, inputs: Inputs, outputs: dict[str, Tensor]) -> int:
    """What must be moved at least: each input is read once, each output written once. outputs: of any dtype"""
    if operation.count_bytes:
        return operation.count_bytes(shape, inputs)
    return sum(value.nbytes for value in inputs.values() if isinstance(value, Tensor)) + sum(
        value.numel() * get_output_dtype(operation, name, inputs).itemsize for name, value in outputs.items())


# ---------------------------------------------------------------------------------------------------------------------
# Right or wrong


def judge_variant(operation: Operation, variant: Variant, inputs: Inputs, expected: dict[str, Tensor],
                  tolerance: float, own: Inputs | None = None) -> Verdict:
    """Run a variant on a copy of the inputs, and compare. own: tensors to copy the inputs into"""
    def check(result: object) -> None:
        if operation.has_result:
            check_form(result, expected["result"], get_output_dtype(operation, "result", inputs))
            if operation.gradients and not result.requires_grad:
                raise WrongResult("its result has no gradient: it must be made of differentiable operations, or be a "
                                  "torch.autograd.Function's")
    try:
        own = fill(own, inputs) if own else clone(inputs)
        outputs = run(operation, variant.call, own, check)
        for name, value in inputs.items():
            if isinstance(value, Tensor) and name not in operation.changes and not torch.equal(own[name], value):
                raise WrongResult(f"it changes its input {name}")
        errors = {name: find_error(output, expected[name], inputs.get(name)) for name, output in outputs.items()}
    except WrongResult as wrong:
        return Verdict("WRONG", str(wrong), {})
    except (Exception, SystemExit) as error:    # of any kind: what goes wrong in a kernel is the result
        return Verdict("no memory" if is_out_of_memory(error) else "error", describe_error(error, variant), {})
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    if errors[worst] != errors[worst]:
        return Verdict("WRONG", f"{describe_output(operation, worst)} has NaN or infinity", errors)
    detail = f"{describe_output(operation, worst)} is off by {errors[worst]:.1e}, allowed are {tolerance:.0e}"
    return Verdict("ok" if errors[worst] <= tolerance else "WRONG", detail, errors)


def check_form(result: object, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise WrongResult unless type, shape and dtype are those that are wanted."""
    if not isinstance(result, Tensor):
        raise WrongResult(f"it returns a {type(result).__name__}, not a tensor")
    if result.shape != expected.shape:
        raise WrongResult(f"its result has shape {tuple(result.shape)}, not {tuple(expected.shape)}")
    if result.dtype != dtype:
        raise WrongResult(f"its result is {str(result.dtype)[6:]}, not {str(dtype)[6:]}")


def find_error(actual: Tensor, expected: Tensor, start: Tensor | None = None) -> float:
    """||actual - expected|| / ||expected|| in float64, NaN where a number isn't finite; of whole numbers the part that
    differs. start: of an input that was changed, where it began: the error is then of how far it moved, beyond the
    rounding of its dtype."""
    if not actual.is_floating_point():
        return float((actual != expected).double().mean())
    if not torch.isfinite(actual).all():
        return float("nan")
    scale = expected
    if start is not None:
        expected = expected.to(actual.dtype).double()
        scale = expected - start.double()
    # zero is expected of some: of dq where each token sees only itself, say; they are compared with 1
    length, num_elements = scale.norm(), max(1, scale.numel())
    return float((actual.double() - expected).norm() / (length if length > 1e-6 * num_elements**0.5
                                                        else num_elements**0.5))


def find_obstacle(operation: Operation, variant: Variant, setting: Setting, shape: Shape) -> str:
    """Why a variant isn't available here; '' if it is."""
    if setting.dtype not in operation.tolerances:
        return f"{operation.name} isn't for {str(setting.dtype)[6:]}"
    try:
        return str(variant.find_obstacle(setting, shape) or "")
    except (Exception, SystemExit) as error:    # of any kind, for it may be somebody's code
        return f"whether it is there can't be found out: {describe_error(error, variant)}"


def describe_output(operation: Operation, name: str) -> str:
    if name == "result":
        return "its result"
    return f"its {name}" if name in operation.changes else f"its gradient of {name[1:]}"


def describe_error(error: BaseException, variant: Variant) -> str:
    """One line: the place in a plugin, where there is one, type and message."""
    return f"{locate(error, variant.plugin)}{type(error).__name__}: {get_first_line(error)[:200] or 'no message'}"


def locate(error: BaseException, path: str) -> str:
    """The last line of a file that an exception passed through: '' where there is none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    return f"{path}, line {lines[-1]}: " if path and lines else ""


# ---------------------------------------------------------------------------------------------------------------------
# What variants need


def is_compiled(setting: Setting, shape: Shape) -> str:
    """An obstacle of variants that are compiled."""
    return setting.no_compile


def is_cuda(setting: Setting, shape: Shape) -> str:
    return "" if setting.device.type == "cuda" else f"needs a CUDA device, this is {setting.device.type}"


OBSTACLES = {"": lambda setting, shape: "", "compile": is_compiled, "cuda": is_cuda}    # by what a plugin says it needs


def compiled(call: Callable) -> Callable:
    """The call by torch.compile, when it is first made."""
    programs = []

    def run_compiled(*args: object) -> object:
        if not programs:
            programs.append(torch.compile(call, dynamic=False))
        return programs[0](*args)
    return run_compiled


def with_kernels(call: Callable, enabled: bool = True) -> Callable:
    """The call with functions marked @fused compiled, or eager."""
    def run_with_kernels(*args: object) -> object:
        before = compilation._compile_kernels
        set_compile_kernels(enabled)
        try:
            return call(*args)
        finally:
            set_compile_kernels(before)
    return run_with_kernels
