"""Shadow a layer's weight for one forward: a value in the instance's `__dict__` is found before the parameter.

Several hooks may shadow one layer's weight, each reading what the one before has put there. The first to run
before the forward must be the last to run after it: gates register their hooks outside those of fake-quantization.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["remember", "restore"]

ABSENT = "absent"  # a string, not an object(): it must stay the same one in copies and pickles


def remember(module: nn.Module, shadowed: list[Any]) -> None:
    """Note what stands for the weight now. Runs before a forward, before the weight is shadowed.

    >>> layer, shadowed = nn.Linear(1, 1), []
    >>> remember(layer, shadowed)
    >>> layer.__dict__["weight"] = 2 * layer.weight
    >>> restore(layer, shadowed)
    >>> isinstance(layer.weight, nn.Parameter)
    True
    """
    shadowed.append(module.__dict__.get("weight", ABSENT))


def restore(module: nn.Module, shadowed: list[Any]) -> None:
    """Put back what stood for the weight. Runs after a forward, after an exception too."""
    if not shadowed:  # an earlier pre-hook raised before ours ran
        return
    before = shadowed.pop()
    if isinstance(before, str):
        module.__dict__.pop("weight", None)
    else:
        module.__dict__["weight"] = before
