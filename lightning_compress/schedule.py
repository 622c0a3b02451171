"""Schedules: frozen, pure functions from progress in [0, 1] through a window to a value.

A schedule is any `Callable[[float], float]`; these are the usual ones. It is read at the window's updates only, whose
distance is the callback's `frequency`. No schedule waits: a window that begins later is a warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_compress.window import Moment, check_frequency, check_sparsity, resolve_moment, resolve_window

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Alternating",
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Linear",
    "Moment",
    "OneCycle",
    "Schedule",
    "Steps",
    "check_frequency",
    "check_sparsity",
    "resolve_moment",
    "resolve_window",
]

Schedule = Callable[[float], float]
BOUNDARY = 1e-9  # a step that lies on a boundary, up to rounding, belongs to what begins there


def _plot(schedule: Schedule, window: tuple[Moment, Moment] | None = None, path: str | Path | None = None) -> Figure:
    """Draw the schedule; runs when a user asks. See `measure.chart.plot_schedule`."""
    from lightning_compress.measure.chart import plot_schedule  # pictures cost nothing where none is drawn

    return plot_schedule(schedule, window, path)


def _between(initial: float, final: float, share: float) -> float:
    return initial + (final - initial) * share if share < 1.0 else final


def _check_progress(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is progress through the window, in [0, 1], got {value!r}")


@dataclass(frozen=True)
class Constant:
    """The same value throughout; used for one-shot changes.

    >>> Constant(0.5)(0.0)
    0.5
    """

    value: float
    plot = _plot

    def __call__(self, progress: float) -> float:
        """Return the value, whatever the progress."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """A straight line from `initial` to `final`.

    >>> Linear(0.8)(0.5)
    0.4
    """

    final: float
    initial: float = 0.0
    plot = _plot

    def __call__(self, progress: float) -> float:
        """Return `initial + (final - initial) * progress`."""
        return _between(self.initial, self.final, progress)


@dataclass(frozen=True)
class Cubic:
    """Fast first, slow near the end: `final + (initial - final) * (1 - progress)^3`.

    Zhu & Gupta 2017, "To prune, or not to prune", equation 1 (the AGP schedule).

    >>> Cubic(0.5)(0.5)
    0.4375
    """

    final: float
    initial: float = 0.0
    plot = _plot

    def __call__(self, progress: float) -> float:
        """Return the value at `progress`."""
        return self.final + (self.initial - self.final) * (1.0 - progress) ** 3 if progress > 0.0 else self.initial


@dataclass(frozen=True)
class Cosine:
    """Slow at both ends: `initial + (final - initial) * (1 - cos(pi * progress)) / 2`.

    Loshchilov & Hutter 2017, "SGDR", equation 5 with one period, which they use for the learning rate.

    >>> Cosine(0.8)(0.25) < Linear(0.8)(0.25), Cosine(0.8)(1.0)
    (True, 0.8)
    """

    final: float
    initial: float = 0.0
    plot = _plot

    def __call__(self, progress: float) -> float:
        """Return the value at `progress`."""
        return _between(self.initial, self.final, (1.0 - math.cos(math.pi * progress)) / 2.0)


@dataclass(frozen=True)
class Exponential:
    """Fast first, slower at each update by the same factor.

    `initial + (final - initial) * (1 - exp(-rate * progress)) / (1 - exp(-rate))`. Without a `rate` it is
    `log((1 - initial) / (1 - final))`: each update then removes the same share of the weights that are left, as the
    rounds of iterative magnitude pruning do; Frankle & Carbin 2019, "The Lottery Ticket Hypothesis", section 1.
    A larger rate is faster first, 0 a straight line, a negative one slow first.

    >>> schedule = Exponential(0.75)
    >>> schedule(0.5), schedule(1.0)  # half of the weights, and half of that half
    (0.5, 0.75)

    Raises:
        ValueError: a rate outside [-100, 100], or none and a value that is no sparsity below 1.
    """

    final: float
    initial: float = 0.0
    rate: float | None = None
    plot = _plot

    def __post_init__(self) -> None:
        if self.rate is None and not (self.final < 1.0 and self.initial < 1.0):
            raise ValueError(f"{self} has no rate of its own: give one, or values below 1")
        if self.rate is not None and not abs(self.rate) <= 100.0:
            raise ValueError(f"rate is a number in [-100, 100], got {self.rate!r}; 3 covers 95 % of its way")

    def __call__(self, progress: float) -> float:
        """Return the value at `progress`."""
        rate = math.log((1.0 - self.initial) / (1.0 - self.final)) if self.rate is None else self.rate
        share = math.expm1(-rate * progress) / math.expm1(-rate) if rate else progress
        return _between(self.initial, self.final, share)


@dataclass(frozen=True)
class Steps:
    """Piecewise constant: (progress from which on, value) pairs; 0 before the first.

    Rounds of prune and retrain; Han et al. 2015, "Learning both Weights and Connections", section 3.

    >>> rounds = Steps(((0.0, 0.5), (0.5, 0.75)))
    >>> rounds(0.0), rounds(0.49), rounds(0.5), rounds(1.0)
    (0.5, 0.5, 0.75, 0.75)

    Raises:
        ValueError: no pair, a progress outside [0, 1], or one that does not rise.
    """

    levels: tuple[tuple[float, float], ...]
    plot = _plot

    def __post_init__(self) -> None:
        levels = tuple((moment, value) for moment, value in self.levels)
        object.__setattr__(self, "levels", levels)  # lists, as files give them, cannot be hashed
        for moment, _ in levels:
            _check_progress("the first number of a level", moment)
        if not levels or any(late <= early for (early, _), (late, _) in pairwise(levels)):
            raise ValueError(f"levels are (progress, value) pairs with rising progress, got {levels!r}")

    def __call__(self, progress: float) -> float:
        """Return the value of the last level that has begun."""
        return next((value for moment, value in reversed(self.levels) if progress >= moment - BOUNDARY), 0.0)


@dataclass(frozen=True)
class OneCycle:
    """Slow, fast in the middle, slow: a logistic curve, for pruning from the first step to the last.

    `initial + (final - initial) * (1 + exp(shift - steepness)) / (1 + exp(shift - steepness * progress))`. Hubens et
    al. 2022, "One-Cycle Pruning"; 14 and 6 are the settings of its authors' library. It begins 0.25 % of the
    way from `initial`, its middle lies at progress `shift / steepness`, and it ends at `final` exactly.

    >>> round(OneCycle(0.8)(6 / 14), 2), OneCycle(0.8)(1.0)
    (0.4, 0.8)

    Raises:
        ValueError: a steepness outside (0, 100], or a shift outside [0, steepness].
    """

    final: float
    initial: float = 0.0
    steepness: float = 14.0
    shift: float = 6.0
    plot = _plot

    def __post_init__(self) -> None:
        if not (0.0 < self.steepness <= 100.0 and 0.0 <= self.shift <= self.steepness):
            raise ValueError(
                f"steepness is in (0, 100] and shift in [0, steepness], got {self.steepness!r} and {self.shift!r}"
            )

    def __call__(self, progress: float) -> float:
        """Return the value at `progress`."""
        share = (1.0 + math.exp(self.shift - self.steepness)) / (1.0 + math.exp(self.shift - self.steepness * progress))
        return _between(self.initial, self.final, share)


@dataclass(frozen=True)
class Alternating:
    """Compressed and dense in turn, and compressed at the end: AC/DC.

    After a dense share `warmup` of the window, `cycles` times a phase at `final` and a phase at 0 of the same length,
    then `final` from progress `1 - last` on. What lies outside the window comes on top: its begin is dense warm-up,
    its end is followed by the compressed model's own training. Peste et al. 2021, "AC/DC", algorithm 1; on ImageNet
    they took 10 % of the run for the warm-up, 5 % for a phase and 15 % for the last one: `Alternating(0.9, cycles=7)`
    in a window of (0.1, 0.85).

    >>> schedule = Alternating(0.9, cycles=2)
    >>> [schedule(progress) for progress in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.9, 0.0, 0.9, 0.0, 0.9]

    Raises:
        ValueError: no cycle, or shares that leave no room for one.
    """

    final: float
    cycles: int = 4
    warmup: float = 0.0
    last: float = 0.0
    plot = _plot

    def __post_init__(self) -> None:
        _check_progress("warmup", self.warmup)
        _check_progress("last", self.last)
        if self.cycles < 1 or self.warmup + self.last >= 1.0:
            raise ValueError(f"{self} leaves no cycle: it needs cycles >= 1 and warmup + last < 1")

    def __call__(self, progress: float) -> float:
        """Return `final` or 0."""
        if progress >= 1.0 - self.last - BOUNDARY:
            return self.final
        phases = (progress - self.warmup) / (1.0 - self.warmup - self.last) * 2 * self.cycles
        return self.final if math.floor(phases + BOUNDARY) % 2 == 0 and phases >= -BOUNDARY else 0.0
