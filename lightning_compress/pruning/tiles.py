"""Tiles of a weight that go together: their scores, and masks of weights from masks of tiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from lightning_compress.pruning.scopes import Masks, Scope, Units
from lightning_compress.pruning.targets import Target
from lightning_compress.sharding import complete_part

__all__ = ["Extents", "blocked", "whole_but"]

Extents = tuple[int, ...]


def whole_but(target: Target, axes: tuple[int, ...]) -> tuple[Extents, Extents]:
    """Return a weight's shape, and the extents of tiles that are whole along all dimensions but these."""
    shape = tuple(target.shape)
    return shape, tuple(1 if axis in axes else size for axis, size in enumerate(shape))


def blocked(
    targets: Sequence[Target], sparsity: float, scope: Scope, shapes: Sequence[tuple[Extents, Extents]]
) -> Masks:
    """Prune blocks that tile each weight, seen in a shape, by the mean of their scores."""
    units, whole_blocks = [], []
    for target, (view, extents) in zip(targets, shapes, strict=True):
        part = target.part.viewed(view) if target.part else None
        tiles = part.tiled(extents) if part else None
        cut = target.part is not None and tiles is None  # a block lies on two processes: each compares all of them
        seen = view if part is None or cut else tuple(part.size)
        split = [item for size, extent in zip(seen, extents, strict=True) for item in (size // extent, extent)]
        size, count = prod(extents), target.shape.numel() // prod(extents)
        axis = target.output_axis if len(view) == len(target.shape) else 0
        if cut:
            tiles = complete_part(torch.Size(split[::2]))
        scores = partial(_tile_scores, target, tuple(split), cut)
        units.append(Units(scores, count, size, target.shape, axis=axis, part=tiles))
        whole_blocks.append(cut)
    masks, threshold = scope(units, sparsity)
    return _spread(targets, masks, shapes, whole_blocks), threshold


def _tile_scores(target: Target, split: Extents, gathered: bool) -> Tensor:
    found = target.whole(target.scores()) if gathered else target.scores()
    wide = None if target.weight.dtype == torch.float64 else torch.float32
    return found.reshape(split).mean(dim=tuple(range(1, len(split), 2)), dtype=wide)


def _spread(
    targets: Sequence[Target],
    masks: Iterator[Tensor],
    shapes: Sequence[tuple[Extents, Extents]],
    whole_blocks: Sequence[bool],
) -> Iterator[Tensor]:
    for target, mask, (_, extents), cut in zip(targets, masks, shapes, whole_blocks, strict=True):
        wide = mask.to(target.weight.device)
        for dimension, extent in enumerate(extents):
            wide = wide.repeat_interleave(extent, dim=dimension) if extent > 1 else wide
        yield target.cut(wide.reshape(target.shape)) if cut else wide.reshape(target.weight.shape)
