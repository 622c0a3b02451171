"""Histograms of values, whose bins are the same whatever is counted: those of calls, steps and processes add up.

A bin is a float32's sign, exponent and first 7 bits of its mantissa, which is 128 bins an octave, from 2^-32 to 2^32.
Within a bin values count as spread evenly.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lightning_compress.quantization.observers import flat_values

__all__ = ["BINS", "count_values", "quantile", "rounding_error"]

PER_OCTAVE, LOWEST_EXPONENT, HIGHEST_EXPONENT = 128, -32, 32
ONE_SIGN = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * PER_OCTAVE
# Negative bins from the largest size down, one for zero, positive bins; the last counts infinities and NaN.
BINS = 2 * ONE_SIGN + 2
PATTERNS = 1 << 16  # of a float32's first 16 bits
LOWEST, HIGHEST, NOT_FINITE = ((127 + e) * PER_OCTAVE for e in (LOWEST_EXPONENT, HIGHEST_EXPONENT, 128))
CHUNK = 1 << 22  # values counted at a time: their places take 12 bytes each


@torch.no_grad()
def count_values(value: Tensor) -> Tensor:
    """Return the histogram of a tensor. Runs in each forward that a rule of histograms observes.

    Sizes below 2^-32 count as zero, those above 2^32 as the largest bin's.

    Args:
        value: any shape, floating point; may be nested.

    Returns:
        (BINS,) int64 on the value's device.

    >>> int(count_values(torch.tensor([-1.0, 0.0, 2.0])).sum())
    3
    """
    patterns = torch.zeros(PATTERNS, dtype=torch.int64, device=value.device)
    one = torch.ones((), dtype=torch.int64, device=value.device)
    for piece in torch.split(flat_values(value), CHUNK):
        # Not `bincount`: an accelerator would have to be waited for, and a compiled graph would break.
        places = (piece.float().view(torch.int32) >> 16).add_(PATTERNS // 2).long()
        patterns.scatter_add_(0, places, one.expand(places.shape))
    sizes = patterns.view(2, -1)  # of negative and of positive values
    largest, broken = sizes[:, HIGHEST - 1 : NOT_FINITE].sum(dim=1, keepdim=True), sizes[:, NOT_FINITE:].sum()
    negative, positive = torch.cat([sizes[:, LOWEST : HIGHEST - 1], largest], dim=1)
    return torch.cat([negative.flip(0), sizes[:, :LOWEST].sum()[None], positive, broken[None]])


@functools.cache
def _edges() -> tuple[Tensor, Tensor]:
    """Lower and upper ends of all bins but the last, float64, ascending."""
    place = torch.arange(ONE_SIGN + 1, dtype=torch.float64)
    ends = 2.0 ** (LOWEST_EXPONENT + (place // PER_OCTAVE)) * (1 + (place % PER_OCTAVE) / PER_OCTAVE)
    zero = torch.zeros(1, dtype=torch.float64)
    low = torch.cat([-ends[1:].flip(0), zero, ends[:-1]])
    return low, -low.flip(0)


def quantile(histogram: Tensor, share: float) -> Tensor:
    """Return the value below which a share of what was counted lies, exact to a 128th of its size; () float64.

    >>> round(quantile(count_values(torch.linspace(-1, 3, 4001)), 0.75).item(), 2)
    2.0
    """
    low, high = (edge.to(histogram.device) for edge in _edges())
    counts = histogram[:-1].double()
    reached = counts.cumsum(0)
    target = (share * reached[-1]).clamp_min(torch.finfo(torch.float64).tiny)
    place = torch.searchsorted(reached, target).clamp_max(len(counts) - 1)
    within = 1 - (reached[place] - target) / counts[place].clamp_min(1)
    return low[place] + within * (high[place] - low[place])


def _integral(place: Tensor, low: Tensor, high: Tensor, scale: Tensor) -> Tensor:
    """Integral from 0 to `place` of the squared error of clipping to [low, high] and rounding to multiples of scale."""
    clipped = place.clamp(low, high)
    steps = clipped / scale
    whole = steps.round()
    return scale**3 * (whole / 12 + (steps - whole) ** 3 / 3) + (place - clipped) ** 3 / 3


def rounding_error(histogram: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Return the mean squared error of rounding what a histogram counted to affine grids, by integrals over its bins.

    Args:
        histogram: (BINS,) int64.
        scale: (grids,) steps.
        zero_point: (grids,) whole numbers, codes of 0.0.
        bits: width of the unsigned code.

    Returns:
        (grids,) float64.

    >>> rounding_error(count_values(torch.tensor([3.0])), torch.tensor([1.0]), torch.tensor([0.0]), 1) > 3.9
    tensor([True])
    """
    used = histogram[:-1].nonzero().squeeze(1)
    start, end = (edge.to(histogram.device)[used] for edge in _edges())
    scale, zero_point = scale.double().unsqueeze(1), zero_point.double().unsqueeze(1)
    low, high = -zero_point * scale, (2**bits - 1 - zero_point) * scale
    area = _integral(end, low, high, scale) - _integral(start, low, high, scale)
    counts = histogram[used].double()
    # The bin of zero has no width, and no error.
    return (area / (end - start).clamp_min(1e-300) * counts).sum(dim=1) / counts.sum().clamp_min(1)
