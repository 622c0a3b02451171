"""Run a module over a few batches of inputs, without training it; runs where a user prunes outside of a fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["evaluating", "in_forward_order", "run"]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Let a module run, inside the block, in eval mode, without gradients and uncompiled; put back after.

    >>> layer = nn.Dropout()
    >>> with evaluating(layer):
    ...     layer.training, torch.is_grad_enabled()
    (False, False)
    >>> layer.training
    True
    """
    modes = [(child, child.training) for child in module.modules()]
    try:
        # Compiled code does not see hooks that came after it.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            module.eval()
            yield
    finally:
        for child, training in modes:
            child.training = training


def run(module: nn.Module, batches: Iterable[Any]) -> None:
    """Call a module with each batch: a dict of keyword arguments, a tuple or list of positional ones, or one argument.

    >>> run(nn.Linear(2, 1), [torch.zeros(3, 2), (torch.zeros(3, 2),), {"input": torch.zeros(3, 2)}])
    """
    for batch in batches:
        if isinstance(batch, Mapping):
            module(**batch)
        else:
            module(*(batch if isinstance(batch, (tuple, list)) else (batch,)))


def in_forward_order(module: nn.Module, batches: Iterable[Any], layers: Mapping[str, Sequence[nn.Module]]) -> list[str]:
    """Return names of layers in the order of their first call over the batches; those never called are left out.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> in_forward_order(net, [torch.zeros(1, 2)], {"last": [net[1]], "first": [net[0]], "other": [nn.Linear(1, 1)]})
    ['first', 'last']
    """
    called: dict[str, None] = {}
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, own in layers.items()
        for layer in own
    ]
    try:
        run(module, batches)
    finally:
        for handle in handles:
            handle.remove()
    return list(called)
