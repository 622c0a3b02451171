"""What a search may choose: option paths with their ranges and choices, and steps from one recipe to the next."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Range", "Recipe", "Space", "checked_space", "described_space", "neighbour", "sample"]

Recipe = dict[str, Any]
REACH = 0.2  # of a range: the standard deviation of one step in it


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones where both ends are.

    Args:
        low: the smallest.
        high: the largest.
        step: distance between the numbers that may be chosen, counted from `low`; None is 1 for whole numbers, and
            any distance for others.
        log: choose by orders of magnitude; then `low` is above 0 and there is no step.

    Raises:
        ValueError: ends that are not finite or out of order, a step that is not above 0, a logarithm of no number
            above 0, or with a step.

    >>> Range(0.5, 0.98)
    Range(low=0.5, high=0.98, step=None, log=False)
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range goes from a lower to a higher finite number, got {self.low!r} to {self.high!r}")
        if self.step is not None and not (self.step > 0 and not self.log):
            raise ValueError(f"a step is above 0, and goes without log, got step={self.step!r}, log={self.log!r}")
        if self.log and self.low <= 0:
            raise ValueError(f"a range by orders of magnitude starts above 0, got {self.low!r}")

    @property
    def whole(self) -> bool:
        """Whether it holds whole numbers only."""
        return all(isinstance(end, int) for end in (self.low, self.high, self.step or 1))

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and math.isclose(self.snapped(value), value, rel_tol=1e-9, abs_tol=1e-12)

    def place(self, value: float) -> float:
        """Return where a number lies, from 0 at `low` to 1 at `high`.

        >>> Range(0.01, 1.0, log=True).place(0.1)
        0.5
        """
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low)

    def at(self, place: float) -> float:
        """Return the number at a place from 0 to 1, rounded to the step.

        >>> Range(2, 8).at(0.5), Range(0.5, 0.9, step=0.1).at(0.3)
        (5, 0.6)
        """
        if self.log:
            return self.snapped(math.exp(math.log(self.low) + place * (math.log(self.high) - math.log(self.low))))
        return self.snapped(self.low + place * (self.high - self.low))

    def snapped(self, value: float) -> float:
        """Return the nearest number that may be chosen; numbers without a step keep 6 digits.

        >>> Range(1, 7, step=2).snapped(6.2)
        7
        """
        step = 1 if self.whole and self.step is None else self.step
        if step is None:
            return min(max(float(f"{value:.6g}"), self.low), self.high)
        last = math.floor((self.high - self.low) / step + 1e-9)
        count = min(max(round((value - self.low) / step), 0), last)
        return self.low + count * step if self.whole else round(self.low + count * step, 10)


Space = Mapping[str, Range | Sequence[Any]]


def checked_space(space: Space) -> dict[str, Range | list[Any]]:
    """Return a space with its choices as lists; runs before the first trial.

    Raises:
        ValueError: no options, an option without choices or with one twice, or a choice that JSON cannot write.
        TypeError: neither a range nor a list.

    >>> checked_space({"QuantizationAwareTraining.weights": (8, 4)})
    {'QuantizationAwareTraining.weights': [8, 4]}
    """
    if not space:
        raise ValueError("a space names at least one option to choose, got none")
    checked: dict[str, Range | list[Any]] = {}
    for path, options in space.items():
        if isinstance(options, Range):
            checked[path] = options
            continue
        if isinstance(options, str) or not isinstance(options, Sequence):
            raise TypeError(f"'{path}' is a Range or a list of choices, got {options!r}")
        written = [json.dumps(choice) for choice in options]
        if not written or len(set(written)) < len(written):
            raise ValueError(f"'{path}' needs different choices, at least one, got {list(options)!r}")
        checked[path] = list(options)
    return checked


def described_space(space: Space) -> dict[str, Any]:
    """Return a space as JSON writes it, for the fingerprint of a study.

    >>> described_space({"bits": [8, 4], "sparsity": Range(0.5, 0.9)})
    {'bits': [8, 4], 'sparsity': {'low': 0.5, 'high': 0.9, 'step': None, 'log': False}}
    """
    return {path: vars(own) if isinstance(own, Range) else list(own) for path, own in checked_space(space).items()}


def check_recipe(space: Space, recipe: Mapping[str, Any]) -> None:
    """Raise unless a recipe chooses one of its values for each option of a space.

    Raises:
        ValueError: options that are missing or unknown, or a value that the space does not have.

    >>> check_recipe({"bits": [8, 4]}, {"bits": 4})
    """
    if recipe.keys() != space.keys():
        raise ValueError(f"a recipe chooses {sorted(space)}, got one of {sorted(recipe)}")
    for path, options in space.items():
        if recipe[path] not in options:
            raise ValueError(f"'{path}' has {options!r} to choose from, got {recipe[path]!r}")


def sample(space: Space, generator: np.random.Generator) -> Recipe:
    """Return a recipe, each option drawn evenly on its own.

    >>> sample({"bits": [8]}, np.random.default_rng(0))
    {'bits': 8}
    """
    return {
        path: own.at(generator.random()) if isinstance(own, Range) else own[int(generator.integers(len(own)))]
        for path, own in space.items()
    }


def neighbour(space: Space, recipe: Mapping[str, Any], generator: np.random.Generator, changes: float = 1.5) -> Recipe:
    """Return a recipe that differs in at least one option, on average in about `changes` of them.

    A number moves by a normal step of a fifth of its range, reflected at the ends; of choices, another is drawn, or,
    where they are numbers, the next larger or smaller.

    >>> neighbour({"bits": [8, 6, 4]}, {"bits": 8}, np.random.default_rng(0))
    {'bits': 6}
    """
    open_ = [path for path, own in space.items() if isinstance(own, Range) or len(own) > 1]
    if not open_:
        return dict(recipe)
    chosen = generator.random(len(open_)) < changes / len(open_)
    chosen[int(generator.integers(len(open_)))] = True
    moved = {path: _moved(space[path], recipe[path], generator) for path, now in zip(open_, chosen, strict=True) if now}
    return {**recipe, **moved}


def _moved(own: Range | Sequence[Any], value: Any, generator: np.random.Generator) -> Any:
    if isinstance(own, Range):
        for _ in range(100):  # a step may round to where it started
            place = abs(own.place(value) + REACH * generator.standard_normal()) % 2.0
            if (moved := own.at(min(place, 2.0 - place))) != value:
                return moved
        return own.at(generator.random())
    if all(isinstance(choice, (int, float)) and not isinstance(choice, bool) for choice in own):
        ordered = sorted(own)
        at = ordered.index(value)
        near = [ordered[i] for i in (at - 1, at + 1) if 0 <= i < len(ordered)]
    else:
        near = [choice for choice in own if choice != value]
    return near[int(generator.integers(len(near)))]
