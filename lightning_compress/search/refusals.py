"""What a search refuses; each message says what was expected, what came, where, and the cure."""

from __future__ import annotations

from lightning_compress.errors import CompressError

__all__ = ["AnotherStudy", "ImpossibleBudget", "MetricMissing", "NoTrialSucceeded", "NothingKept"]


class AnotherStudy(CompressError):
    """A file of trials or of sensitivities belongs to another space, objective, model or data; raised on opening."""


class ImpossibleBudget(CompressError, ValueError):
    """No amounts fit into a budget; `nearest` is the smallest budget that some do; raised before anything is chosen.

    >>> ImpossibleBudget("no", nearest=400).nearest
    400
    """

    def __init__(self, message: str, nearest: int) -> None:
        super().__init__(message)
        self.nearest = nearest


class MetricMissing(CompressError, KeyError):
    """A trial's result lacks a metric that the objective reads; raised after the first such trial."""

    def __str__(self) -> str:
        return str(self.args[0])


class NoTrialSucceeded(CompressError):
    """Every trial of a search failed or was stopped early; raised at its end, with the first one's message."""


class NothingKept(CompressError):
    """No trial kept what the objective says must be kept; raised where the best is asked for, naming the nearest."""
