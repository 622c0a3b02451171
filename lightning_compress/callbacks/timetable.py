"""When a window's updates are due: from moments of the run to optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as L

from lightning_compress.callbacks.clock import run_length
from lightning_compress.schedule import Moment, resolve_window

__all__ = ["Timetable", "timetable"]


@dataclass(frozen=True)
class Timetable:
    """First and last update and the distance between, in optimizer steps.

    >>> table = Timetable(10, 30, 10)
    >>> [step for step in range(50) if table.due(step)], table.progress(20)
    ([10, 20, 30], 0.5)
    """

    begin: int = 0
    end: int = 1
    interval: int = 1

    def progress(self, step: int) -> float:
        """Return how far through the window a step is, in [0, 1]."""
        return min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))

    def due(self, step: int) -> bool:
        """Say whether an update follows this step; the last one always does."""
        if step in (self.begin, self.end):
            return True
        regular = self.begin < step < self.end and (step - self.begin) % self.interval == 0
        return regular and 2 * (self.end - step) >= self.interval  # not two updates close to each other at the end


def timetable(trainer: L.Trainer, window: tuple[Moment, ...], frequency: Moment) -> Timetable:
    """Resolve a window and a frequency for this run. Runs at `setup`.

    Raises:
        ValueError: out of order, longer than the run, or fractions of a run without a known length.
    """
    total = run_length(trainer, (*window, frequency))
    begin, end = resolve_window(window, total, ("begin", "end"))
    interval = round(frequency * total) if isinstance(frequency, float) else frequency
    return Timetable(begin, end, max(1, interval))
