"""Weights and inputs on levels that are no whole multiples of a step: powers of two, normal quantiles, or your own.

Each class is a grid for `QuantizationAwareTraining(weights=..., inputs=...)`. The gradient is straight-through for
weights and one that is 0 beyond the levels for inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_compress.quantization.scales import SMALLEST_SCALE
from lightning_compress.quantization.slopes import column, straight, with_slopes, within

__all__ = [
    "LevelInputs",
    "Levels",
    "largest_size",
    "nearest_level",
    "normal_levels",
    "power_of_two_levels",
    "scale_onto",
]

LARGEST_CODE = 127


def scale_onto(largest: Tensor, top: float) -> Tensor:
    """Return the scale that puts the largest size on the top level; 1 where all is 0, as after pruning a channel.

    >>> scale_onto(torch.tensor([2.0, 0.0]), 4.0)
    tensor([0.5000, 1.0000])
    """
    return torch.where(largest > 0, (largest / top).clamp_min(SMALLEST_SCALE), torch.ones_like(largest))


def largest_size(weight: Tensor, *, per_channel: bool) -> Tensor:
    """Return max |w| of each output channel, (out,), or of the layer, (), float32; 0 of nothing.

    >>> largest_size(torch.tensor([[1.0, -3.0], [0.5, 0.0]]), per_channel=True)
    tensor([3.0000, 0.5000])
    """
    rows = weight.detach().float().flatten(1) if per_channel else weight.detach().float().reshape(1, -1)
    largest = torch.linalg.vector_norm(rows, ord=float("inf"), dim=1) if rows.shape[1] else rows.sum(dim=1)
    return largest if per_channel else largest[0]


def power_of_two_levels(bits: int) -> list[float]:
    """Return 0 and, of either sign, 2^(bits-1) - 1 powers of two from 1: products with them are shifts.

    Zhou et al. 2017, "Incremental Network Quantization", equation 1. Up to 4 bits they have an int8 form.

    >>> power_of_two_levels(3)
    [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]
    """
    powers = [2.0**k for k in range(2 ** (bits - 1) - 1)]
    return [-power for power in reversed(powers)] + [0.0, *powers]


def normal_levels(bits: int) -> list[float]:
    """Return 2^bits levels in [-1, 1], 0 among them, that values of a normal distribution use equally often.

    Quantiles of it, half of them below 0 and half above, with one level more above. Dettmers et al. 2023, "QLoRA",
    section 3 and appendix E: 4 bits give NF4.

    >>> normal_levels(2)
    [-1.0, 0.0, 0.435..., 1.0]
    """
    half, quantile = 2 ** (bits - 1), NormalDist().inv_cdf
    outermost = (1 - 1 / (4 * half) + 1 - 1 / (4 * half - 2)) / 2
    largest = quantile(outermost)
    above = [quantile(0.5 + (outermost - 0.5) * k / half) / largest for k in range(1, half + 1)]
    below = [quantile(0.5 + (outermost - 0.5) * k / (half - 1)) / largest for k in range(1, half)]
    return [-level for level in reversed(below)] + [0.0, *above]


def nearest_level(value: Tensor, levels: Sequence[float], scale: Tensor) -> Tensor:
    """Return the nearest of `scale * levels`, a tie going to the lower; without gradient. Runs in each forward.

    Args:
        value: any shape, floating point.
        levels: ascending.
        scale: float32, expands to the value's shape.

    Returns:
        Same shape and dtype as `value`.

    >>> nearest_level(torch.tensor([-3.0, 0.2, 0.6]), (-1.0, 0.0, 1.0), torch.tensor(1.0))
    tensor([-1.,  0.,  1.])
    """
    position = value.detach().float() / scale
    points = torch.tensor(levels, dtype=torch.float32, device=value.device)
    chosen = points[torch.bucketize(position, (points[:-1] + points[1:]) / 2)]
    return torch.where(position.isnan(), position, chosen * scale).to(value.dtype)


def _checked(levels: Sequence[float] | Callable[[int], Sequence[float]], bits: int) -> tuple[float, ...]:
    found = tuple(sorted(float(level) for level in (levels(bits) if callable(levels) else levels)))
    distinct = len(set(found)) == len(found) >= 2 and all(math.isfinite(level) for level in found)
    if not distinct or 0.0 not in found:
        raise ValueError(f"levels are distinct finite numbers with 0 among them, which zeros need, got {found}")
    if len(found) > 2**bits:
        raise ValueError(f"{bits} bits tell {2**bits} levels apart, got {len(found)}; raise bits or leave out levels")
    return found


def _top(levels: Sequence[float]) -> float:
    return max(-levels[0], levels[-1])


@dataclass(frozen=True)
class Levels:
    """Weights on levels of any kind, scaled so that the largest weight falls on the level farthest from 0.

    Args:
        levels: numbers of any unit, 0 among them, or a function from `bits` to them, such as `power_of_two_levels` or
            `normal_levels`; kept as a sorted tuple.
        bits: width of a stored code; at most 2^bits levels.
        per_channel: a scale for each output channel, else one for the layer.

    Raises:
        ValueError: levels without 0, that are not distinct, or more than the bits can tell apart.

    >>> Levels([-4, -1, 0, 1, 4], bits=3).rounded(torch.tensor([[8.0, 2.9, -0.9]]), {})
    tensor([[8., 2., 0.]])
    """

    levels: Sequence[float] | Callable[[int], Sequence[float]] = power_of_two_levels
    bits: int = 4
    per_channel: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", _checked(self.levels, self.bits))

    @property
    def points(self) -> tuple[float, ...]:
        """The levels, ascending."""
        return tuple(self.levels)  # type: ignore[arg-type]

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}: the scale follows from the weight."""
        return {}

    def scale(self, weight: Tensor) -> Tensor:
        """Return what a level is multiplied by: (out,) or () float32."""
        return scale_onto(largest_size(weight, per_channel=self.per_channel), _top(self.points))

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the weight on the levels."""
        return with_slopes(self._values, straight, weight)

    def _values(self, weight: Tensor) -> Tensor:
        return nearest_level(weight, self.points, column(self.scale(weight), weight))

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return levels as int8 and their scale, where all levels are whole numbers up to 127; None elsewhere."""
        if any(level != round(level) or abs(level) > LARGEST_CODE for level in self.points):
            return None
        scale = self.scale(weight)
        ones = torch.ones((), device=weight.device)
        codes = nearest_level(weight.detach().float() / column(scale, weight), self.points, ones)
        return codes.to(torch.int8), scale.expand(weight.shape[0]).clone()


@dataclass(frozen=True)
class LevelInputs:
    """Inputs on levels of any kind, scaled so that none of the observed range is clipped.

    Args:
        levels: as of `Levels`; without negative ones (`[0, 1, 2, 4]`) they fit inputs after a ReLU.
        bits: width of a stored code; at most 2^bits levels.

    Raises:
        ValueError: levels without 0, that are not distinct, or more than the bits can tell apart.

    >>> LevelInputs([0, 1, 4], 2).rounded(torch.tensor([-1.0, 2.0, 9.0]), torch.tensor(0.0), torch.tensor(8.0), {})
    tensor([0., 2., 8.])
    """

    levels: Sequence[float] | Callable[[int], Sequence[float]] = power_of_two_levels
    bits: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", _checked(self.levels, self.bits))

    @property
    def points(self) -> tuple[float, ...]:
        """The levels, ascending."""
        return tuple(self.levels)  # type: ignore[arg-type]

    def learned(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Return {}: the scale follows from the range."""
        return {}

    def rounded(self, value: Tensor, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the input on the levels; the gradient is 1 between the outermost and 0 beyond."""
        first, last = self.points[0], self.points[-1]
        # An end without levels on its side is clipped to 0, whatever was seen there.
        below, above = (low / first if first else low * 0.0), (high / last if last else high * 0.0)
        scale = scale_onto(torch.maximum(below, above), 1.0)
        rounding = partial(nearest_level, levels=self.points, scale=scale)
        return with_slopes(rounding, partial(within, low=first * scale, high=last * scale), value)

    def affine(self, low: Tensor, high: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return None."""
        return None
