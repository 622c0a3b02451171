"""Stopping a trial early, from what it reported and what the others had reported by then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_compress.search.strategies import Trial

__all__ = ["Median", "Stopped"]


class Stopped(Exception):
    """Raised inside a run by `report` when its trial is stopped early; let it pass."""


@dataclass(frozen=True)
class Median:
    """Stop a trial whose best value so far is below the median of what the others had reported by the same step.

    Golovin et al. 2017, "Google Vizier", section 3.2.2; the rule of Optuna's MedianPruner.

    Args:
        startup: complete trials before any is stopped.
        warmup: steps of a trial before it may be stopped.

    Raises:
        ValueError: a number below 1, or a warm-up below 0.

    >>> done = [Trial(i, {}, reports={1: value}) for i, value in enumerate([0.2, 0.5, 0.8])]
    >>> rule = Median(startup=3)
    >>> rule({1: 0.4}, done), rule({1: 0.6}, done)
    (True, False)
    """

    startup: int = 5
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.startup < 1 or self.warmup < 0:
            raise ValueError(f"startup is from 1 on and warmup from 0 on, got {self.startup!r} and {self.warmup!r}")

    def __call__(self, reports: Mapping[int, float], history: Sequence[Trial]) -> bool:
        """Say whether to stop the trial that reported these values, step -> value, more is better."""
        step = max(reports)
        complete = [trial for trial in history if trial.state == "complete"]
        others = [trial.reports[step] for trial in complete if step in trial.reports]
        if step < self.warmup or len(complete) < self.startup or not others:
            return False
        return max(reports.values()) < median(others)
