"""Ranges from what was seen: extremes, percentiles, and least mean square error, from histograms that add up.

A histogram has the same bins whatever it counts, so that those of batches, calls and processes are joined by adding:
128 bins an octave, from 2^-32 to 2^32, for either sign. Within a bin values count as spread evenly. Calibration runs
without gradients, so nothing is recomputed and counted twice.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lightning_compress.quantization.scales import SMALLEST_SCALE, input_grid

__all__ = [
    "BINS",
    "count_values",
    "join_extremes",
    "least_error_range",
    "least_error_scale",
    "percentile_range",
    "percentile_scale",
    "require_counts",
    "rounding_error",
]

OCTAVES, PER_OCTAVE, LOWEST_EXPONENT = 64, 128, -32
ONE_SIGN = OCTAVES * PER_OCTAVE
# Negative bins from the largest size down, one for zero, positive bins; the last counts infinities and NaN.
BINS = 2 * ONE_SIGN + 2
FIRST_CODE = (127 + LOWEST_EXPONENT) * PER_OCTAVE  # of a float32's exponent and first 7 bits of its mantissa


def join_extremes(ranges: Tensor, pending: Tensor) -> Tensor:
    """Widen each range to all that was ever seen: the min-max observer. Runs where `observers.move_ranges` would.

    Args:
        ranges: (layers, 2) of (-low, high), float32, NaN where nothing was seen yet.
        pending: (layers, 2) of (-low, high), -inf where a layer was not called; what is not finite changes nothing.

    >>> join_extremes(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 2.0]]))
    tensor([[1., 3.]])
    """
    joined = torch.fmax(ranges, pending)
    return torch.where(torch.isfinite(pending).all(dim=1, keepdim=True), joined, ranges)


@torch.no_grad()
def count_values(value: Tensor) -> Tensor:
    """Return the histogram of a tensor. Runs in each forward of calibration.

    Sizes below 2^-32 count as zero, those above 2^32 as the largest bin's.

    Args:
        value: any shape, floating point.

    Returns:
        (BINS,) int64 on the value's device.

    >>> int(count_values(torch.tensor([-1.0, 0.0, 2.0])).sum())
    3
    """
    wide = value.detach().float().flatten()
    size = (wide.view(torch.int32) & 0x7FFFFFFF) >> 16
    place = (size - (FIRST_CODE - 1)).clamp_(0, ONE_SIGN)
    place = ONE_SIGN + torch.where(wide < 0, -place, place)
    place = torch.where(torch.isfinite(wide), place, BINS - 1)
    return torch.bincount(place, minlength=BINS)


def require_counts(histogram: Tensor, name: str) -> Tensor:
    """Return the histogram of a layer's input if a range can be taken from it. Runs when calibration ends.

    Raises:
        ValueError: it counted nothing, or an infinity or NaN.

    >>> require_counts(count_values(torch.tensor([float("nan")])), "fc")
    Traceback (most recent call last):
    ValueError: calibration saw 1 of 1 values infinite or NaN at the input of 'fc'; look for a batch that ...
    """
    total, broken = int(histogram.sum()), int(histogram[-1])
    if not total:
        raise ValueError(
            f"calibration saw no value at the input of '{name}'; pass batches that reach it, or exclude it"
        )
    if broken:
        raise ValueError(
            f"calibration saw {broken} of {total} values infinite or NaN at the input of '{name}'; look for a batch "
            f"that is broken, or a model that overflows on it"
        )
    return histogram


@functools.cache
def _edges() -> tuple[Tensor, Tensor]:
    """Lower and upper ends of all bins but the last, float64, ascending."""
    place = torch.arange(ONE_SIGN + 1, dtype=torch.float64)
    ends = 2.0 ** (LOWEST_EXPONENT + (place // PER_OCTAVE)) * (1 + (place % PER_OCTAVE) / PER_OCTAVE)
    zero = torch.zeros(1, dtype=torch.float64)
    low = torch.cat([-ends[1:].flip(0), zero, ends[:-1]])
    return low, -low.flip(0)


def _quantile(histogram: Tensor, share: float) -> Tensor:
    low, high = (edge.to(histogram.device) for edge in _edges())
    counts = histogram[:-1].double()
    reached = counts.cumsum(0)
    target = (share * reached[-1]).clamp_min(torch.finfo(torch.float64).tiny)
    place = torch.searchsorted(reached, target).clamp_max(len(counts) - 1)
    within = 1 - (reached[place] - target) / counts[place].clamp_min(1)
    return low[place] + within * (high[place] - low[place])


def percentile_range(histogram: Tensor, share: float = 0.9999) -> tuple[Tensor, Tensor]:
    """Return the range that leaves out a part 1 - share of all values at either end. Runs when calibration ends.

    McKinstry et al. 2018, "Discovering Low-Precision Networks Close to Full-Precision Networks", take 0.9999 and the
    like. An end is exact to a 128th of its size.

    Args:
        histogram: (BINS,) int64, of `count_values`, summed over batches and processes.
        share: in (0.5, 1]; 1 gives the outermost bins' ends.

    Returns:
        low and high, each () float32.

    Raises:
        ValueError: share out of range.

    >>> low, high = percentile_range(count_values(torch.linspace(-1, 3, 4001)), 0.75)
    >>> round(low.item(), 2), round(high.item(), 2)
    (0.0, 2.0)
    """
    if not 0.5 < share <= 1.0:
        raise ValueError(f"share is the part of values below the range's high end, in (0.5, 1], got {share!r}")
    return _quantile(histogram, 1.0 - share).float(), _quantile(histogram, share).float()


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


def least_error_range(histogram: Tensor, bits: int = 8, candidates: int = 100) -> tuple[Tensor, Tensor]:
    """Return the range whose affine grid has the least mean squared error. Runs when calibration ends.

    The outermost values' range is made smaller in `candidates` steps, at both ends at once, then at the low and the
    high end alone. Banner et al. 2019, "Post Training 4-bit Quantization of Convolutional Networks", ask for the same
    minimum under an assumed distribution; here it is the histogram's.

    Args:
        histogram: (BINS,) int64, of `count_values`, summed over batches and processes.
        bits: width of the unsigned code.
        candidates: tried at a time.

    Returns:
        low and high, each () float32.

    >>> low, high = least_error_range(count_values(torch.tensor([0.0, 1.0, 2.0, 3.0] * 999 + [90.0])), 2)
    >>> low.item(), high.item() < 10.0
    (0.0, True)
    """
    low, high = percentile_range(histogram, 1.0)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    shares = torch.arange(1, candidates + 1, device=histogram.device, dtype=torch.float32) / candidates
    ones = torch.ones_like(shares)
    for lows, highs in ((shares, shares), (shares, ones), (ones, shares)):
        grids = input_grid(low * lows, high * highs, bits)
        best = rounding_error(histogram, *grids, bits).argmin()
        low, high = low * lows[best], high * highs[best]
    return low, high


def percentile_scale(weight: Tensor, bits: int = 8, share: float = 0.9999) -> Tensor:
    """Return symmetric scales of output channels that leave a part 1 - share of the largest weights to be clipped.

    Args:
        weight: (out, ...), floating point.
        bits: width of the code, sign included.
        share: in (0, 1].

    Returns:
        (out,) float32; 1 where a channel is all zero.

    >>> percentile_scale(torch.tensor([[1.0, -2.0, 3.0, 400.0]]), bits=2, share=0.75)
    tensor([3.])
    """
    size = weight.detach().float().flatten(1).abs()
    largest = size.kthvalue(max(round(share * size.shape[1]), 1), dim=1).values
    return torch.where(largest > 0, (largest / (2 ** (bits - 1) - 1)).clamp_min(SMALLEST_SCALE), 1.0)


def least_error_scale(weight: Tensor, bits: int = 8, candidates: int = 80) -> Tensor:
    """Return the symmetric scale of each output channel whose rounding has the least squared error.

    Tried are `candidates` parts of max |w| / (2^(bits-1) - 1), the largest first. Runs when weights begin to round.

    Args:
        weight: (out, ...), floating point.
        bits: width of the code, sign included.
        candidates: that are tried.

    Returns:
        (out,) float32; 1 where a channel is all zero.

    >>> least_error_scale(torch.tensor([[1.0, -1.0, 1.0, 1.3]]), bits=2)
    tensor([1.0725])
    """
    rows, top = weight.detach().float().flatten(1), 2 ** (bits - 1) - 1
    largest = percentile_scale(weight, bits, 1.0)
    best, least = largest, torch.full_like(largest, float("inf"))
    for part in range(candidates, 0, -1):
        scale = (largest * (part / candidates)).clamp_min(SMALLEST_SCALE)
        column = scale.unsqueeze(1)
        rounded = (rows / column).round_().clamp_(-top, top).mul_(column)
        error = (rounded - rows).square_().sum(dim=1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
