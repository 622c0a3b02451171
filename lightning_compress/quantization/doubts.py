"""What looks wrong about observed ranges: sentences to warn with, by the layer's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["exploded", "unlike_calls", "zero_ranges"]

# Sixteen times the other range: with 8 bits, the narrow one is left with 4.
UNLIKE = 16.0
EXPLODED = 1000.0


def zero_ranges(extremes: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a sentence for each layer whose input was zero all the time. Runs when inputs begin to be rounded.

    >>> list(zero_ranges({"fc": torch.tensor([-0.0, 0.0])}))[0]
    "the input of 'fc' was 0 as long as it was observed: rounded, whatever comes later is 0 too; observe later or \
longer, or exclude=['fc']"
    """
    for name, row in extremes.items():
        low, high = _ends(row)
        if low == high == 0.0:
            yield (
                f"the input of '{name}' was 0 as long as it was observed: rounded, whatever comes later is 0 too; "
                f"observe later or longer, or exclude=['{name}']"
            )


def unlike_calls(calls: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[str]:
    """Yield a sentence for each layer whose calls in one step had very different ranges. Runs at the same moment.

    Args:
        calls: (-low, high) of the call with the smallest magnitude, and of all calls of the step.

    >>> list(unlike_calls({"fc": (torch.tensor([1.0, 1.0]), torch.tensor([0.0, 100.0]))}))[0][:79]
    "'fc' is called with inputs in [-1, 1] and in [0, 100], which get one grid: the "
    """
    for name, (narrow, wide) in calls.items():
        (low, high), (lower, higher) = _ends(narrow), _ends(wide)
        small, large = max(-low, high), max(-lower, higher)
        if 0.0 < small * UNLIKE < large < float("inf"):
            yield (
                f"'{name}' is called with inputs in [{low:.4g}, {high:.4g}] and in [{lower:.4g}, {higher:.4g}], which "
                f"get one grid: the narrow ones lose {torch.tensor(large / small).log2():.0f} bits; use a module for "
                f"each, or exclude=['{name}']"
            )


def exploded(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a sentence for each layer whose range is 1000 times as wide as when rounding began. Runs at the freeze.

    >>> list(exploded({"fc": torch.tensor([0.0, 1.0])}, {"fc": torch.tensor([0.0, 5e3])}))[0][:70]
    "the input of 'fc' was in [0, 1] when rounding began and is in [0, 5000"
    """
    for name in before.keys() & now.keys():
        (low, high), (lower, higher) = _ends(before[name]), _ends(now[name])
        if high - low > 0.0 and higher - lower > EXPLODED * (high - low):
            yield (
                f"the input of '{name}' was in [{low:.4g}, {high:.4g}] when rounding began and is in "
                f"[{lower:.4g}, {higher:.4g}] now: training diverges there; lower the learning rate, observe later, or "
                f"exclude=['{name}']"
            )


def _ends(extremes: Tensor) -> tuple[float, float]:
    negated, high = extremes.tolist()
    return 0.0 - negated, high
