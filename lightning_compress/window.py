"""Windows: when in a run something begins and ends; floats are fractions of the run, ints are optimizer steps.

A window's begin is the warm-up: nothing happens before it. Its end is followed by the time to recover.
"""

from __future__ import annotations

import math
from itertools import pairwise

__all__ = ["Moment", "check_frequency", "check_sparsity", "resolve_moment", "resolve_window"]

Moment = int | float  # int first: command lines try the types in this order, and a float takes any number


def resolve_moment(moment: Moment, total_steps: int, name: str) -> int:
    """Turn a moment of the run into an optimizer step: floats are fractions of the run, ints are steps.

    >>> resolve_moment(0.5, 200, "begin"), resolve_moment(7, 200, "begin")
    (100, 7)

    Raises:
        TypeError: neither a float nor an int.
        ValueError: a fraction outside [0, 1] or NaN, a negative step, or a step after the run's last one.
    """
    if isinstance(moment, bool) or not isinstance(moment, (int, float)):
        raise TypeError(f"{name} must be a fraction of the run (float) or an optimizer step (int), got {moment!r}")
    if isinstance(moment, float):
        if not (math.isfinite(moment) and 0.0 <= moment <= 1.0):
            raise ValueError(
                f"{name} as a float is a fraction of the run in [0, 1], got {moment}; write an int for a step"
            )
        return round(moment * total_steps)
    if not 0 <= moment <= total_steps:
        raise ValueError(
            f"{name} is step {moment}, but the run has {total_steps} optimizer steps; train longer "
            f"(max_epochs, max_steps) or set {name} to at most {total_steps} or to a fraction such as 0.7"
        )
    return moment


def resolve_window(window: tuple[Moment, ...], total_steps: int, names: tuple[str, ...]) -> tuple[int, ...]:
    """Turn the moments of a window into increasing optimizer steps.

    >>> resolve_window((0.1, 0.7), 100, ("begin", "end"))
    (10, 70)

    Raises:
        ValueError: the wrong number of moments, moments out of order, or a window that the run is too short for.
    """
    what = "(" + ", ".join(names) + ")"
    if len(window) != len(names):
        raise ValueError(f"window must be {what}, got {window!r} with {len(window)} entries")
    if tuple(map(repr, window)) == ("0", "1"):  # 0 and 1 mean fractions to most who write them
        raise ValueError(f"{what} = (0, 1) is optimizer steps 0 and 1; write (0.0, 1.0) for the whole run")
    steps = tuple(
        resolve_moment(moment, total_steps, f"window {name}") for moment, name in zip(window, names, strict=True)
    )
    for (first, second), (earlier, later) in zip(pairwise(names), pairwise(steps), strict=True):
        if earlier >= later:
            raise ValueError(
                f"window {first} must come before {second}, got {what} = {tuple(window)}, which is step {earlier} "
                f"and step {later} of a run of {total_steps} optimizer steps; widen the window or train longer"
            )
    return steps


def check_sparsity(value: float) -> float:
    """Return a sparsity that is a number in [0, 1).

    >>> check_sparsity(0.9)
    0.9
    """
    if isinstance(value, bool) or not (math.isfinite(value) and 0.0 <= value < 1.0):
        raise ValueError(f"sparsity is a fraction of zeros in [0, 1), got {value}; write 0.9 for 90 %")
    return float(value)


def check_frequency(value: Moment) -> Moment:
    """Return a distance between updates that is positive; a float is at most the whole run."""
    valid = not isinstance(value, bool) and math.isfinite(value) and value > 0
    if not valid or (isinstance(value, float) and value > 1.0):
        raise ValueError(f"frequency is optimizer steps (int >= 1) or a fraction of the run in (0, 1], got {value}")
    return value
