"""Rules: the range of a layer's input from what was seen of it, after calibration or when training begins to round."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_compress.errors import CompressError
from lightning_compress.quantization.histograms import BINS, count_values, quantile, rounding_error
from lightning_compress.quantization.observers import flat_values, widen
from lightning_compress.quantization.scales import input_grid

__all__ = ["RangeRule", "Seen", "mean_square_error", "min_max", "moving_average", "percentile"]
__all__ += ["check_rule", "range_by", "reads_counts"]

CANDIDATES = 100


@dataclass
class Seen:
    """What was seen of one layer's input, over batches and processes.

    Args:
        extremes: (low, high), float32, of each call of a calibration; of a training, one of all calls together.
        counts: (BINS,) int64, of `count_values`; zeros for a rule that does not read them.
    """

    extremes: list[Tensor] = field(default_factory=list)
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))

    def add(self, value: Tensor, counted: bool = True) -> None:
        """Note one call's input. Runs in each calibration forward."""
        value = flat_values(value)
        if value.numel() == 0:  # as a detector's layer gets when nothing was found
            return
        self.extremes.append(widen(None, value) * torch.tensor([-1.0, 1.0], device=value.device))
        if counted:
            self.counts = self.counts.to(value.device) + count_values(value)


RangeRule = Callable[[Seen, int], tuple[float, float]]


def min_max(seen: Seen, bits: int = 8) -> tuple[float, float]:
    """Return the smallest and largest value seen: nothing is clipped. Runs once a layer, when all was seen.

    >>> seen = Seen()
    >>> seen.add(torch.tensor([-1.0, 3.0])), seen.add(torch.tensor([0.0, 9.0]))
    (None, None)
    >>> min_max(seen)
    (-1.0, 9.0)
    """
    every = torch.stack(seen.extremes)
    return float(every[:, 0].min()), float(every[:, 1].max())


def moving_average(seen: Seen, bits: int = 8, momentum: float = 0.1) -> tuple[float, float]:
    """Return extremes averaged over a calibration's batches as training does: `range += momentum (seen - range)`.

    Jacob et al. 2018, section 3.1.

    Args:
        seen: at least one call.
        bits: not used.
        momentum: weight of the newest batch, in (0, 1].

    >>> seen = Seen()
    >>> seen.add(torch.tensor([0.0, 1.0])), seen.add(torch.tensor([0.0, 2.0]))
    (None, None)
    >>> moving_average(seen, momentum=0.5)
    (0.0, 1.5)
    """
    average = seen.extremes[0]
    for extremes in seen.extremes[1:]:
        average = torch.lerp(average, extremes, momentum)
    return float(average[0]), float(average[1])


def percentile(seen: Seen, bits: int = 8, share: float = 0.9999) -> tuple[float, float]:
    """Return the range that leaves out 1 - share of the values at either end, exact to a 128th of an end's size.

    McKinstry et al. 2018, "Discovering Low-Precision Networks Close to Full-Precision Networks", take 0.9999 and the
    like.

    Args:
        seen: at least one call.
        bits: not used.
        share: in (0.5, 1]; 1 is `min_max`.

    Raises:
        ValueError: `share` is out of its range.

    >>> seen = Seen()
    >>> seen.add(torch.linspace(-1, 3, 4001))
    >>> low, high = percentile(seen, share=0.75)
    >>> round(low, 2), round(high, 2)
    (0.0, 2.0)
    """
    if not 0.5 < share <= 1.0:
        raise ValueError(f"share is the part of values below the range's high end, in (0.5, 1], got {share!r}")
    outermost = min_max(seen)  # which are known exactly
    ends = (float(quantile(seen.counts, part)) for part in (1.0 - share, share))
    low, high = outermost if share == 1.0 else (min(max(end, outermost[0]), outermost[1]) for end in ends)
    return low, high


def mean_square_error(seen: Seen, bits: int = 8) -> tuple[float, float]:
    """Return the range whose rounding to `bits` has the least mean square error over the values seen.

    Searched: both ends shrunk together to k/100 of what was seen, then each end alone from there. Banner et al. 2019,
    "Post Training 4-bit Quantization of Convolutional Networks", ask for this minimum under an assumed distribution.

    >>> seen = Seen()
    >>> seen.add(torch.cat([torch.linspace(0, 1, 1000), torch.tensor([10.0])]))
    >>> low, high = mean_square_error(seen, 4)
    >>> low, 5.0 < high < 8.0
    (0.0, True)
    """
    low, high = (torch.tensor(end, device=seen.counts.device) for end in min_max(seen))
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # The widest first, so that it is kept where another is no better.
    shares = torch.arange(CANDIDATES, 0, -1, device=low.device, dtype=torch.float32) / CANDIDATES
    ones = torch.ones_like(shares)
    for lows, highs in ((shares, shares), (shares, ones), (ones, shares)):
        best = rounding_error(seen.counts, *input_grid(low * lows, high * highs, bits), bits).argmin()
        low, high = low * lows[best], high * highs[best]
    return float(low), float(high)


def reads_counts(rule: RangeRule) -> bool:
    """Say whether a rule may read `Seen.counts`, which take a pass over each input; a rule of your own may.

    >>> reads_counts(min_max), reads_counts(percentile)
    (False, True)
    """
    return getattr(rule, "func", rule) not in (min_max, moving_average)


def range_by(rule: RangeRule, name: str, seen: Seen, bits: int) -> tuple[float, float]:
    """Return the range that a rule makes of what one layer's input held. Runs once a layer, when all was seen.

    Raises:
        CompressError: the rule gave no finite low <= high; with the layer's name.

    >>> range_by(lambda seen, bits: (1.0, 0.0), "fc", Seen([torch.tensor([0.0, 1.0])]), 8)
    Traceback (most recent call last):
    lightning_compress.errors.CompressError: the rule gave 'fc' the range (1.0, 0.0); expected finite low <= high
    """
    ends = rule(seen, bits)
    if not all(map(math.isfinite, ends)) or ends[0] > ends[1]:
        raise CompressError(f"the rule gave '{name}' the range {ends}; expected finite low <= high")
    return ends


def check_rule(rule: RangeRule) -> None:
    """Raise if a rule cannot make ranges in training; it is tried on three values. Runs where options are made.

    Raises:
        ValueError: it is `moving_average`, which training has of its own, or an option of it is out of range.
        CompressError: as `range_by`.

    >>> check_rule(percentile)
    """
    if getattr(rule, "func", rule) is moving_average:
        raise ValueError("observer=moving_average is what None means, and moves until ranges freeze; give its momentum")
    seen = Seen()
    seen.add(torch.tensor([-1.0, 0.0, 1.0]))
    range_by(rule, "three values", seen, 8)
