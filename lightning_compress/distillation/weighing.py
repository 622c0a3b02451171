"""Weights and temperatures that are numbers or schedules of progress."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["Weight", "check_temperatures", "check_weights", "value_at"]

Weight = float | Callable[[float], float]
MOMENTS = (0.0, 0.5, 1.0)


def value_at(weight: Weight, progress: float) -> float:
    """Return a number, or what a schedule says of the run's progress in [0, 1]. Runs in each step.

    >>> value_at(0.5, 0.0), value_at(lambda progress: 1.0 - progress, 0.75)
    (0.5, 0.25)
    """
    return float(weight(progress)) if callable(weight) else float(weight)


def check_weights(weight: Weight) -> Weight:
    """Return a weight of the logits' loss, a number as float. Runs when `Distillation` is made.

    Raises:
        ValueError: it, or a schedule at the start, the middle or the end, is not in [0, 1].

    >>> check_weights(1)
    1.0
    """
    for progress in MOMENTS:
        value = weight(progress) if callable(weight) else weight
        if isinstance(value, bool) or not 0.0 <= value <= 1.0:
            raise ValueError(f"weight is the distillation loss's share in [0, 1], got {value}{_when(weight, progress)}")
    return weight if callable(weight) else float(weight)


def check_temperatures(temperature: Weight) -> Weight:
    """Return a temperature, a number as float. Runs when `Distillation` is made.

    Raises:
        ValueError: it, or a schedule at the start, the middle or the end, is no positive number.

    >>> check_temperatures(2)
    2.0
    """
    for progress in MOMENTS:
        value = temperature(progress) if callable(temperature) else temperature
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"temperature must be a positive number, got {value}{_when(temperature, progress)}")
    return temperature if callable(temperature) else float(temperature)


def _when(weight: Weight, progress: float) -> str:
    return f" from {weight} at progress {progress}" if callable(weight) else ""
