"""One operation of a traced forward, and what to do with one that is not known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lightning_compress.pruning.labels import Labels, Value

__all__ = ["Call", "unknown", "unlabelled"]


@dataclass(frozen=True)
class Call:
    """One operation: its name, what it was called with (Values for tensors), and its results' shapes."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Any

    def arg(self, place: int, default: Any = None) -> Any:
        """Return a positional argument, or the default."""
        return self.args[place] if len(self.args) > place else default

    @property
    def values(self) -> list[Value]:
        """All tensors that go in."""
        leaves = pytree.tree_leaves((self.args, self.kwargs), is_leaf=lambda leaf: isinstance(leaf, Value))
        return [leaf for leaf in leaves if isinstance(leaf, Value)]


def unlabelled(shapes: Any) -> Any:
    """Return values without labels in the structure of the results' shapes; None for what is no tensor."""
    if isinstance(shapes, (list, tuple)) and not isinstance(shapes, torch.Size):
        return [unlabelled(shape) for shape in shapes]
    return None if shapes is None else Value(tuple(shapes))


def unknown(labels: Labels, call: Call) -> Any:
    """Freeze all that flows in."""
    labels.freeze_all(call.values, f"passes through {call.name}, for which there is no rule")
    return unlabelled(call.shapes)
