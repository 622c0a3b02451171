"""Taps: read what a submodule was called with and what it returned, and leave no hook behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressError
from lightning_compress.select import Pattern, matching_modules
from lightning_compress.sharding import is_distributed, undistributed

__all__ = ["Call", "LayerTap", "Read", "StudentSeen", "Tap", "first_tensor", "logits_of", "unwrapped"]

Read = Literal["output", "input", "attention"]


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
        enter: called with name, module and positional arguments before each call that `attach_outermost` listens to;
            what it returns, unless None, takes the arguments' place.
    """

    open: bool = False
    stop: bool = False
    enter: Callable[[str, nn.Module, tuple[Any, ...]], tuple[Any, ...] | None] | None = None
    calls: list[Call] = field(default_factory=list)

    def take(self) -> list[Call]:
        """Return the calls so far and forget them."""
        calls, self.calls = self.calls, []
        return calls

    def collect(self, call: Call) -> None:
        """Take in one call; what tensor parallelism has spread over processes is put together."""
        if self.open and torch.is_grad_enabled():
            seen = (call.args, call.kwargs, call.output)
            if any(is_distributed(leaf) for leaf in pytree.tree_leaves(seen)):
                call = Call(call.name, *pytree.tree_map(undistributed, seen))
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

        def enter(module: nn.Module, args: Any) -> Any:
            nonlocal depth
            mine = self.open and id(module) in names
            depth += mine
            return self.enter(names[id(module)], module, args) if mine and depth == 1 and self.enter else None

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


@dataclass
class LayerTap:
    """Reads what layers of one model take in or give out while it is called inside `reading`, and keeps nothing after.

    Hooks are attached once, before a compiled model's first call, which would not see later ones. Outside of `reading`
    they do nothing.

    Args:
        read: "output" or "input", the first tensor of either; or "attention", the maps that an attention layer gives
            as its second output.
        gradient: leave out calls without gradient, as validation makes them; False for a teacher, whose values are
            kept without their graph.
        seen: what was read, by layer, in the order of its calls.
    """

    read: Read = "output"
    gradient: bool = True
    seen: dict[str, list[Tensor]] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    opened: bool = False

    def attach(self, root: nn.Module, patterns: Iterable[Pattern] | Pattern) -> Callable[[], None]:
        """Listen to the layers of `root` that names, globs, class names or types match; returns the end of it.

        Names are the user's, without the prefixes of DDP, FSDP, activation checkpointing and compiling.

        Raises:
            ValueError: a pattern matches nothing.
        """
        layers = matching_modules(unwrapped(root), patterns, "layers")
        self.names = tuple(layers)
        # Partials of a plain function: the layers still pickle.
        handles = [
            layer.register_forward_hook(functools.partial(_read, self, name), with_kwargs=True)
            for name, layer in layers.items()
        ]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        return remove

    @contextmanager
    def reading(self) -> Iterator[dict[str, list[Tensor]]]:
        """Read inside the block, and let go of everything at its end, after an exception too.

        End it before the backward: activation checkpointing calls the layers again there.
        """
        self.opened = True
        try:
            yield self.seen
        finally:
            self.opened = False
            self.seen.clear()

    def take(self) -> dict[str, list[Tensor]]:
        """Return what was read so far and forget it."""
        seen, self.seen = self.seen, {}
        return seen

    def check_all_called(self) -> None:
        """Refuse a step that did not call each tapped layer; runs inside `reading`, after the first step.

        Raises:
            CompressError: it called some, or none of them.
        """
        missing = [name for name in self.names if name not in self.seen]
        if missing:
            raise CompressError(
                f"the step did not call the tapped layers {', '.join(map(repr, missing))}"
                f"{' with gradients enabled' if self.gradient else ''}; fused code may pass them by: tap what is "
                f"called around them, or what they are made of"
            )


def _read(tap: LayerTap, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    if not tap.opened or (tap.gradient and not torch.is_grad_enabled()):
        return
    if tap.read == "input":
        value = first_tensor((*args, *kwargs.values()))
    elif tap.read == "output":
        value = first_tensor(output)
    else:
        value = first_tensor(output[1:2]) if isinstance(output, (tuple, list)) else None
    if value is None:
        cure = "tap another layer"
        if tap.read == "attention":
            cure = (
                'load the model with attn_implementation="eager" (or call nn.MultiheadAttention with its weights), or '
                "take query_key_relation of its query and key layers"
            )
        raise TypeError(f"expected {tap.read} of '{name}' ({type(module).__name__}) to be a tensor, got none; {cure}")
    tap.seen.setdefault(name, []).append(value if tap.gradient else value.detach())


def first_tensor(value: Any) -> Tensor | None:
    """Return a tensor itself, or the first in a tuple, list or dict; None where there is none.

    >>> first_tensor((None, {"hidden": torch.ones(1)}))
    tensor([1.])
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if not isinstance(value, (tuple, list)):
        return None
    return next((found for found in map(first_tensor, value) if found is not None), None)


def unwrapped(root: nn.Module) -> nn.Module:
    """Return the model inside a DistributedDataParallel or DataParallel.

    >>> unwrapped(nn.DataParallel(nn.ReLU()))
    ReLU()
    """
    if isinstance(root, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inside: nn.Module = root.module
        return inside
    return root


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
            "pass details=Details(outputs=a function from the model's output to its logits)"
        )
    return output
