"""Observers in two phases: a forward notes the extremes it saw; once a step the moving average takes them in.

Noting is idempotent, so activation checkpointing, modules called twice and several micro-batches are all right.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from lightning_compress.sharding import all_reduce_max

__all__ = ["Observing", "flat_values", "fold_extremes", "move_ranges", "widen"]


class Observing(Protocol):
    """What a layer's input or a module's output keeps of its range: what it is, and what was seen since it moved."""

    extremes: Tensor
    pending: Tensor | None


def flat_values(value: Tensor) -> Tensor:
    """Return all values of a tensor in one dimension, without gradient; those of a nested one too.

    >>> flat_values(torch.nested.nested_tensor([torch.zeros(2, 2), torch.ones(1, 2)], layout=torch.jagged))
    tensor([0., 0., 0., 0., 1., 1.])
    """
    value = value.detach()
    return torch.cat([row.flatten() for row in value.unbind()]) if value.is_nested else value.flatten()


def widen(pending: Tensor | None, value: Tensor) -> Tensor:
    """Return the extremes (-low, high) of `value` joined with those already pending. Runs in each training forward.

    The low end is kept negated, so that one maximum (over calls, or over processes) serves both ends.

    >>> widen(None, torch.tensor([-1.0, 3.0]))
    tensor([1., 3.])
    """
    if value.numel() == 0:  # as a detector's layer gets when nothing was found
        return value.new_full((2,), float("-inf"), dtype=torch.float32) if pending is None else pending
    low, high = torch.aminmax(flat_values(value) if value.is_nested else value.detach())
    seen = torch.stack([-low, high]).float()
    return seen if pending is None else torch.maximum(pending, seen)


def move_ranges(ranges: Tensor, pending: Tensor, momentum: float | None) -> Tensor:
    """Move each range towards what the last step saw. Runs once after each optimizer step while ranges are learned.

    `range += momentum * (seen - range)`; a range that was never set (NaN) takes the first sight as it is, and one
    that saw nothing finite this step stays.

    Args:
        ranges: (layers, 2) of (-low, high), float32, NaN where nothing was seen yet.
        pending: (layers, 2) of (-low, high), -inf where a layer was not called.
        momentum: weight of the newest step, in (0, 1]; None widens each range to all that was ever seen.

    >>> move_ranges(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]]), 0.5)
    tensor([[0.0000, 1.5000]])
    >>> move_ranges(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 2.0]]), None)
    tensor([[1., 3.]])
    """
    newer = torch.maximum(ranges, pending) if momentum is None else torch.lerp(ranges, pending, momentum)
    moved = torch.where(torch.isnan(ranges), pending, newer)
    return torch.where(torch.isfinite(pending).all(dim=1, keepdim=True), moved, ranges)


@torch.no_grad()
def fold_extremes(states: Collection[Observing], momentum: float | None) -> Tensor:
    """Move all ranges by what the last step saw on any process. Runs once after each optimizer step, on every process.

    Args:
        states: in the same order on every process; their extremes move and nothing is pending afterwards.
        momentum: as in `move_ranges`.

    Returns:
        (states, 2) of (-low, high): what was seen, -inf where nothing was and inf where it was not finite.
    """
    ranges = torch.stack([state.extremes for state in states])
    nothing = torch.full_like(ranges[0], float("-inf"))
    seen = torch.stack([nothing if state.pending is None else state.pending for state in states])
    # A maximum over processes may lose a NaN, but not an infinity. One all-reduce serves all ranges.
    seen = all_reduce_max(seen.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf))
    for state, row in zip(states, move_ranges(ranges, seen, momentum).unbind(), strict=True):
        state.extremes.copy_(row)
        state.pending = None
    return seen
