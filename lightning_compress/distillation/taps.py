"""Taps: read what a submodule was called with and what it returned, and leave no hook behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["Call", "StudentSeen", "Tap", "logits_of"]


@dataclass(frozen=True)
class Call:
    """One call of a module: its own name in the tapped tree, arguments, and output."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


class StudentSeen(BaseException):
    """Ends a trial run of a step once its student was called; a BaseException, so that no step catches it."""


@dataclass
class Tap:
    """Collects calls while `open`; calls without gradients (validation, a teacher) are not collected.

    Args:
        open: whether calls are collected now.
        stop: raise `StudentSeen` at the first call.
    """

    open: bool = False
    stop: bool = False
    calls: list[Call] = field(default_factory=list)

    def take(self) -> list[Call]:
        """Return the calls so far and forget them."""
        calls, self.calls = self.calls, []
        return calls

    def collect(self, call: Call) -> None:
        """Take in one call."""
        if self.open and torch.is_grad_enabled():
            self.calls.append(call)
            if self.stop:
                raise StudentSeen

    def attach(self, root: nn.Module, name: str) -> Callable[[], None]:
        """Listen to one submodule of `root`; returns the function that ends it."""
        # A partial of a plain function: the submodule still pickles.
        leave = functools.partial(_collect, self, name)
        return root.get_submodule(name).register_forward_hook(leave, with_kwargs=True).remove

    def attach_outermost(self, root: nn.Module) -> Callable[[], None]:
        """Listen to each trainable submodule of `root` that is not called inside another; returns the end of it.

        Finds out how a step calls its student when nobody said so: `self(x)`, `self.model(x)`, `self.net(**batch)`.
        """
        names = {
            id(module): name
            for name, module in root.named_modules()
            if any(parameter.requires_grad for parameter in module.parameters())
        }
        depth = 0

        def enter(module: nn.Module, args: Any) -> None:
            nonlocal depth
            depth += self.open and id(module) in names

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.open and depth == 1 and id(module) in names:
                self.collect(Call(names[id(module)], args, kwargs, output))

        def close(module: nn.Module, args: Any, output: Any) -> None:  # also when a forward raised
            nonlocal depth
            depth -= self.open and id(module) in names

        before = register_module_forward_pre_hook(enter)
        after = register_module_forward_hook(leave, with_kwargs=True)
        last = register_module_forward_hook(close, always_call=True)

        def remove() -> None:
            for handle in (before, after, last):
                handle.remove()
            # torch's own removal forgets this entry, and each compiled module warns of it.
            torch_module._global_forward_hooks_with_kwargs.pop(after.id, None)

        return remove


def _collect(tap: Tap, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    tap.collect(Call(name, args, kwargs, output))


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output: a tensor, `.logits`, `["logits"]`, or the first of a tuple.

    Raises:
        TypeError: none of these.

    >>> logits_of({"logits": torch.zeros(2, 3)}).shape
    torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):  # a transformers ModelOutput is one, and has the loss first
        output = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    else:
        output = getattr(output, "logits", None)
    if not isinstance(output, Tensor):
        raise TypeError(
            "expected a tensor, an object with .logits, a dict with 'logits' or a tuple that begins with logits; "
            "pass outputs=a function from the model's output to its logits"
        )
    return output
