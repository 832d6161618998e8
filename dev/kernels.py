"""The operations of the kernel bench, all of our kernels among their variants, and those that a person's file adds.

A plugin is a Python file that defines `variants(registry)` and calls registry.add(operation, name, call) there.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dev import kernel_attention, kernel_optim, kernel_training
from dev.kernel_ops import OBSTACLES, Operation, Setting, Shape, Variant, locate
from nanochat.common import UserError, get_first_line


class Registry:
    """Operations by name."""

    def __init__(self):
        families = (kernel_attention, kernel_training, kernel_optim)
        self.operations: dict[str, Operation] = {operation.name: operation for family in families
                                                 for operation in family.OPERATIONS}
        self.plugin = ""    # path of the file whose variants are being added

    def add(self, operation: str, name: str, call: Callable,
            needs: str | Callable[[Setting, Shape], str] = "") -> None:
        """Add a variant: a call with the arguments that `--list` shows.

        needs: "cuda", "compile", or what returns the reason why it isn't available here, '' where it is
        """
        name = str(name)
        if operation not in self.operations:
            raise UserError(f"there is no operation {operation!r} to add to; there are {', '.join(self.operations)}")
        if not callable(call):
            raise UserError(f"{name!r} of {operation} must be a function, not a {type(call).__name__}")
        if not callable(needs) and needs not in OBSTACLES:
            raise UserError(f"{name!r} of {operation} can't need {needs!r}; needs is one of "
                            f"{', '.join(word for word in OBSTACLES if word)}, or a function")
        known = self.operations[operation]
        if any(variant.name == name for variant in known.variants):
            raise UserError(f"{operation} has a variant {name!r} already; choose another name")
        variant = Variant(name, call, needs if callable(needs) else OBSTACLES[needs], self.plugin)
        self.operations[operation] = replace(known, variants=(*known.variants, variant))

    def load_plugin(self, path: Path) -> None:
        """Add what a file's `variants(registry)` adds; whatever goes wrong in it is one sentence."""
        if not path.is_file():
            raise UserError(f"--plugin {path}: there is no such file")
        self.plugin = str(path.absolute())
        spec = importlib.util.spec_from_file_location(f"kernel_plugin_{path.stem}", self.plugin)
        if spec is None:
            raise UserError(f"--plugin {path} must be a Python file, with a name that ends in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module    # where torch's compiler looks a function's module up
        try:
            spec.loader.exec_module(module)
            if not callable(getattr(module, "variants", None)):
                raise UserError("it must define a function variants(registry), which calls registry.add(operation, "
                                "name, call)")
            module.variants(self)
        except (Exception, SystemExit) as error:    # of any kind, for it is somebody's code
            place = locate(error, self.plugin) or f"{self.plugin}: "
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            raise UserError(f"--plugin {place}{kind}{get_first_line(error)}") from None
        finally:
            self.plugin = ""
