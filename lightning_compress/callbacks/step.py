"""Wrap one method of a LightningModule instance for the time of a fit; many clients, any order of removal.

There is one wrapper for each instance and method, however many clients it has, because two nested wrappers taken off
in the wrong order leave one behind.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

__all__ = ["Interception", "around_loss", "intercept", "with_loss"]

# client(original, args, kwargs) -> result; it calls the original itself.
Client = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Interception:
    """Stands in an instance's `__dict__` for one of its methods and calls the clients around it.

    A copy or pickle of the module gets its own plain method back, so that weight averaging's copies neither train
    the original nor drag a teacher along.
    """

    def __init__(self, pl_module: L.LightningModule, method: str) -> None:
        self.owner, self.method = pl_module, method
        self.replaced = pl_module.__dict__.get(method)
        self.original = getattr(pl_module, method)
        self.clients: list[Client] = []
        self.outside: list[Client] = []
        functools.update_wrapper(self, self.original, updated=())
        # Lightning peels exactly one __wrapped__ to read the signature of the user's method.
        self.__wrapped__ = getattr(self.original, "__wrapped__", self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the clients, the last one outermost, around the original."""
        return self._through((*self.clients, *self.outside), args, kwargs)

    def _through(self, clients: tuple[Client, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not clients:
            return self.original(*args, **kwargs)

        def inner(*inner_args: Any, **inner_kwargs: Any) -> Any:
            return self._through(clients[:-1], inner_args, inner_kwargs)

        return clients[-1](inner, args, kwargs)

    def remove(self, client: Client) -> None:
        """Take a client off; the last one restores the instance, unless somebody has patched it on top of us."""
        for clients in (self.clients, self.outside):
            if client in clients:
                clients.remove(client)
        if self.clients or self.outside or self.owner.__dict__.get(self.method) is not self:
            return
        del self.owner.__dict__[self.method]
        if self.replaced is not None:
            self.owner.__dict__[self.method] = self.replaced

    def _plain(self) -> Callable[..., Any]:
        # A method that the user put on this instance alone goes with the copy; a compiled one is bound to the original.
        if isinstance(self.replaced, types.MethodType) and self.replaced.__self__ is self.owner:
            return self.replaced.__func__
        return getattr(type(self.owner), self.method)  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        """Give a copy of the module the plain method, bound to the copy."""
        return types.MethodType(self._plain(), memo.get(id(self.owner), self.owner))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the plain method."""
        return _bound, (self._plain(), self.owner)


def _bound(function: Callable[..., Any], owner: L.LightningModule) -> types.MethodType:
    return types.MethodType(function, owner)  # a function of ours, because the type itself has no name to pickle


def intercept(
    pl_module: L.LightningModule, method: str, client: Client, *, outside: bool = False
) -> Callable[[], None]:
    """Let `client` run around `pl_module.method` on this instance; its class is not touched. Runs at `setup`.

    Args:
        pl_module: the module.
        method: such as "training_step" or "manual_backward".
        client: called as `client(original, args, kwargs)`.
        outside: around all clients that are not, whoever came first.

    Returns:
        A function that takes the client off again.
    """
    interception = pl_module.__dict__.get(method)
    if not isinstance(interception, Interception):
        interception = Interception(pl_module, method)
        # Not setattr: nn.Module's would look the name up among parameters and modules first.
        pl_module.__dict__[method] = interception
    (interception.outside if outside else interception.clients).append(client)
    return functools.partial(interception.remove, client)


def with_loss(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return what a `training_step` returned with its loss changed: a tensor, a mapping with "loss", or None.

    >>> with_loss({"loss": 1.0, "extra": 2}, lambda loss: loss + 1.0)
    {'loss': 2.0, 'extra': 2}
    """
    if isinstance(output, Tensor):
        return change(output)
    if output is None or "loss" not in output:  # a skipped batch; or Lightning says what is wrong
        return output
    changed = copy.copy(output)
    changed["loss"] = change(output["loss"])
    return changed


def around_loss(pl_module: L.LightningModule, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Let `change` have the last word on each training step's loss. Runs at `on_fit_start`.

    It is called outside all other clients: with what `training_step` returns, or in manual optimization with what each
    `manual_backward` is given; not in validation.

    Returns:
        A function that ends it.
    """

    def around_step(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = original(*args, **kwargs)
        # A validation_step that calls training_step wants the task's loss.
        mine = pl_module.trainer.training and pl_module.automatic_optimization
        return with_loss(output, change) if mine else output

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def around_backward(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return original(change(args[0]), *args[1:], **kwargs)

    ends = (
        intercept(pl_module, "training_step", around_step, outside=True),
        intercept(pl_module, "manual_backward", around_backward, outside=True),
    )

    def end_both() -> None:
        for end in ends:
            end()

    return end_both
