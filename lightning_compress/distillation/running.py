"""A teacher at work: in its own precision, on its own device, compiled or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.distillation.details import Details
from lightning_compress.distillation.small_weights import shrink_weights
from lightning_compress.distillation.teachers import call_teacher
from lightning_compress.errors import CompressError

__all__ = ["RunningTeacher"]

DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}


class RunningTeacher:
    """Calls a teacher as `Details` asks, without gradient unless one is asked for. Modes are put back by `release`.

    Args:
        module: in any mode; it is put into eval mode.
        details: precision, device, compiled.
    """

    def __init__(self, module: nn.Module, details: Details) -> None:
        bits, _, kind = (details.precision or "").partition("-")
        self.dtype = DTYPES.get(bits)
        self.converted = kind == "true" and self.dtype is not None
        self.autocast = kind == "mixed"
        changed = self.converted and any(parameter.dtype != self.dtype for parameter in module.parameters())
        self.module = copy.deepcopy(module).to(self.dtype) if changed else module
        if details.precision == "int8":
            self.module = shrink_weights(copy.deepcopy(module))
        self.device = None if details.device is None else torch.device(details.device)
        self.modes = [(part, part.training) for part in self.module.modules()]
        self.module.eval()
        self.called: nn.Module = torch.compile(self.module) if details.compiled else self.module  # type: ignore[assignment]
        self.checked = False

    def part(self, name: str) -> nn.Module:
        """Return a submodule of the teacher; "" is the teacher itself."""
        return self.module.get_submodule(name) if name else self.module

    def move(self, convert: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
        """Take the run's precision and device where no others were asked for. Runs at `on_fit_start`."""
        if self.dtype is None:
            self.module = convert(self.module)
        self.module.to(self.device or device)

    def __call__(self, part: str, args: tuple[Any, ...], kwargs: dict[str, Any], gradient: bool = False) -> Any:
        """Return the output for a student's inputs. Runs in each step.

        Args:
            part: name of the submodule to call; "" is the teacher.
            args: of the student's call, or of `inputs`.
            kwargs: the same.
            gradient: keep the graph from the inputs to the output.

        Raises:
            TypeError: it does not take these inputs.
            CompressError: the first output has a NaN.
        """
        called = self.called.get_submodule(part) if part else self.called
        given = (args, kwargs)
        home = next((leaf.device for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)), None)
        if self.device is not None or self.converted:
            given = pytree.tree_map_only(Tensor, self._moved, given)
        elif not (home is not None and torch.is_autocast_enabled(home.type)):
            given = pytree.tree_map_only(Tensor, self._widened, given)
        with self._context(self.device or home):
            output = call_teacher(called, *given, gradient=gradient)
        if self.device is not None or self.converted:
            output = pytree.tree_map_only(Tensor, lambda value: value.to(home), output)
        if not self.checked:
            self._check(output)
        return output

    def _moved(self, value: Tensor) -> Tensor:
        dtype = self.dtype if self.converted and value.is_floating_point() else None
        return value.to(device=self.device, dtype=dtype)

    def _widened(self, value: Tensor) -> Tensor:
        # FSDP1 hands its own half precision to the student's inputs, without autocast on a CPU.
        if value.dtype not in (torch.bfloat16, torch.float16):
            return value
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), value.dtype)
        return value.float() if dtype == torch.float32 else value

    def _context(self, device: torch.device | None) -> AbstractContextManager[Any]:
        if self.dtype is None or device is None:
            return nullcontext()
        return torch.autocast(device.type, self.dtype if self.autocast else None, enabled=self.autocast)

    def _check(self, output: Any) -> None:
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.isnan().any()):
                raise CompressError(
                    f"the teacher {type(self.module).__name__} gives NaN for the first examples; load weights that are "
                    f"finite, or run it in another precision: Details(precision='32-true')"
                )
        self.checked = True

    def release(self) -> None:
        """Put the modes of the teacher's parts back."""
        for part, training in self.modes:
            part.training = training
