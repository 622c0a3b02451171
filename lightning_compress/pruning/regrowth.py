"""Dynamic sparse training: patterns that drop the smallest kept weights and grow others, at one sparsity throughout."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.pruning.criteria import gradient_magnitude, magnitude
from lightning_compress.pruning.scopes import Masks, Units, erk
from lightning_compress.pruning.targets import Criterion, Target

__all__ = ["SET", "RigL", "fresh_random", "regrow"]


def fresh_random(weight: Tensor, name: str, step: int) -> Tensor:
    """Score by numbers drawn anew at each update from the layer's name and the step: the same on each process.

    >>> bool((fresh_random(torch.zeros(9), "a", 1) == fresh_random(torch.zeros(9), "a", 2)).any())
    False
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def regrow(scores: Tensor, growth: Tensor, mask: Tensor, count: int) -> Tensor:
    """Return a mask in which `count` kept weights of the lowest scores went and as many others of highest growth came.

    The just dropped may come back at once, as in RigL's algorithm 1. Ties go by position.

    >>> mask = torch.tensor([True, True, False, False])
    >>> regrow(torch.tensor([1.0, 5.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 2.0, 3.0]), mask, 1)
    tensor([False,  True, False,  True])
    """
    kept = mask.flatten().nonzero().flatten()
    lowest = scores.flatten()[kept].sort(stable=True).indices[:count]
    new = mask.flatten().clone()
    new[kept[lowest]] = False
    free = (~new).nonzero().flatten()
    highest = growth.flatten()[free].sort(stable=True, descending=True).indices[:count]
    new[free[highest]] = True
    return new.view(mask.shape)


def _updated(targets: Sequence[Target], growth: Criterion, fraction: float) -> Iterator[Tensor]:
    for target in targets:
        if target.mask is None:
            raise ValueError(f"'{target.name}' has no mask yet; the first update makes one by the scope")
        mask = target.whole(target.mask)
        count = int(fraction * int(mask.sum()))
        if not count:
            yield target.mask
            continue
        scores, wanted = (target.whole(target.evaluate(criterion)) for criterion in (magnitude, growth))
        yield target.cut(regrow(scores, wanted, mask, count))


def _dynamic(
    targets: Sequence[Target], sparsity: float, progress: float, scope: Any, growth: Criterion, fraction: float
) -> Masks:
    if any(target.mask is None for target in targets):
        units = [Units(t.scores, t.shape.numel(), 1, t.shape, t.piecewise, part=t.part) for t in targets]
        masks: Masks = scope(units, sparsity)
        return masks
    now = fraction / 2 * (1 + math.cos(math.pi * min(1.0, progress)))
    return _updated(targets, growth, now), float("nan")


def _check_fraction(pattern: RigL | SET) -> None:
    if not 0.0 < pattern.fraction <= 1.0:
        raise ValueError(
            f"fraction is the share of kept weights that an update replaces, in (0, 1], got {pattern.fraction}"
        )


@dataclass(frozen=True)
class RigL:
    """Drop the smallest kept weights, grow where the gradient is largest. A mask update every `frequency` steps.

    The share dropped falls with progress p through the window: fraction / 2 (1 + cos(pi p)). Grown weights start at
    0 with empty optimizer state. The criterion and the scope make only the first masks, at the window's begin: for
    training from scratch `criterion=random`. Evci et al. 2020, "Rigging the Lottery", section 3 and algorithm 1; the
    gradient is the mean since the last update.
    """

    fraction: float = 0.3
    scope: Callable[..., Any] = erk

    def __post_init__(self) -> None:
        _check_fraction(self)

    @property
    def growth(self) -> Criterion:
        """What free places are grown by."""
        return gradient_magnitude

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return _dynamic(targets, sparsity, progress, self.scope, self.growth, self.fraction)


@dataclass(frozen=True)
class SET:
    """Drop the smallest kept weights, grow as many at random places. A mask update every `frequency` steps.

    Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive sparse connectivity", algorithm
    1, with the cosine decay of RigL; start and grown weights as in `RigL`.
    """

    fraction: float = 0.3
    scope: Callable[..., Any] = erk

    def __post_init__(self) -> None:
        _check_fraction(self)

    @property
    def growth(self) -> Criterion:
        """What free places are grown by."""
        return fresh_random

    def __call__(self, targets: Sequence[Target], sparsity: float, progress: float) -> Masks:
        """Return the masks."""
        return _dynamic(targets, sparsity, progress, self.scope, self.growth, self.fraction)
