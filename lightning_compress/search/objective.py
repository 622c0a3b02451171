"""What makes one trial better than another: the smallest that keeps a metric, or a front of several metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lightning_compress.search.refusals import MetricMissing

__all__ = ["Axis", "Objective", "Pareto", "Smallest", "dominates"]

Result = Mapping[str, float]
PRICE = 5.0  # of losing twice what may be lost: as bad as exp(5) times the size


@dataclass(frozen=True)
class Axis:
    """A metric and whether less of it is better."""

    metric: str
    less: bool

    def cost(self, result: Result) -> float:
        """Return the metric, signed so that less is better.

        >>> Axis("accuracy", less=False).cost({"accuracy": 0.9})
        -0.9
        """
        return float(result[self.metric]) * (1.0 if self.less else -1.0)


class Objective(Protocol):
    """What a search asks of an objective."""

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The metrics it reads; the front is over these."""
        ...

    def costs(self, result: Result) -> list[float]:
        """Return what an optimizer makes small: one number, or one an axis."""
        ...

    def violation(self, result: Result) -> float:
        """Return by how much a result breaks what must be kept; 0 or less where it keeps it."""
        ...

    def energies(self, results: Sequence[Result]) -> list[float]:
        """Return one number a result, less is better, for strategies that walk."""
        ...


@dataclass(frozen=True)
class Smallest:
    """The least of one metric among trials that keep another: the smallest file with accuracy down by <= `drop`.

    Args:
        metric: what gets small, above 0: bytes or milliseconds.
        keep: what must be kept, a fraction of which more is better.
        drop: how much of it may be lost, in its own units: 0.01 is one point of accuracy.
        dense: what the uncompressed model has of it.

    Raises:
        ValueError: a drop below 0, or a number that is not finite.

    >>> Smallest(dense=0.90, drop=0.01).violation({"size_bytes": 100.0, "accuracy": 0.895}) <= 0
    True
    """

    metric: str = "size_bytes"
    keep: str = "accuracy"
    drop: float = 0.01
    dense: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.drop) and self.drop >= 0 and math.isfinite(self.dense)):
            raise ValueError(f"drop is a number from 0 on and dense a finite one, got {self.drop!r} and {self.dense!r}")

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Less of `metric`, more of `keep`."""
        return (Axis(self.metric, less=True), Axis(self.keep, less=False))

    def costs(self, result: Result) -> list[float]:
        """Return the metric alone; what must be kept is a constraint."""
        return [float(result[self.metric])]

    def violation(self, result: Result) -> float:
        """Return how much more than `drop` was lost, with room for rounding."""
        return self.dense - float(result[self.keep]) - self.drop - 1e-9

    def energies(self, results: Sequence[Result]) -> list[float]:
        """Return log(metric) + 5 x what was lost too much, in units of `drop`."""
        scale = self.drop or 0.01
        return [
            math.log(max(float(result[self.metric]), 1e-9)) + PRICE * max(0.0, self.violation(result)) / scale
            for result in results
        ]


@dataclass(frozen=True)
class Pareto:
    """Several metrics at once; what is found is their front.

    Args:
        metrics: metric -> "min" or "max", at least two.

    Raises:
        ValueError: fewer than two metrics, or another word.

    >>> Pareto({"size_bytes": "min", "accuracy": "max"}).costs({"size_bytes": 10, "accuracy": 0.5})
    [10.0, -0.5]
    """

    metrics: Mapping[str, Literal["min", "max"]]

    def __post_init__(self) -> None:
        if len(self.metrics) < 2 or not set(self.metrics.values()) <= {"min", "max"}:
            raise ValueError(f"a front is of two or more metrics, each 'min' or 'max', got {dict(self.metrics)!r}")

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The metrics in the order given."""
        return tuple(Axis(metric, way == "min") for metric, way in self.metrics.items())

    def costs(self, result: Result) -> list[float]:
        """Return one number a metric."""
        return [axis.cost(result) for axis in self.axes]

    def violation(self, result: Result) -> float:
        """Return 0: nothing must be kept."""
        return 0.0

    def energies(self, results: Sequence[Result]) -> list[float]:
        """Return the share of results that dominate each one."""
        costs = [self.costs(result) for result in results]
        return [sum(dominates(other, own) for other in costs) / len(costs) for own in costs]


def dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    """Say whether the first costs are nowhere higher than the second and somewhere lower.

    >>> dominates([1.0, 2.0], [1.0, 3.0]), dominates([1.0, 2.0], [1.0, 2.0])
    (True, False)
    """
    return all(a <= b for a, b in zip(first, second, strict=True)) and any(
        a < b for a, b in zip(first, second, strict=True)
    )


def checked_result(objective: Objective, result: Any) -> dict[str, float]:
    """Return a trial's result as numbers; runs after each trial.

    Raises:
        TypeError: no mapping.
        MetricMissing: a metric of the objective is not in it.
        ValueError: a metric of the objective is NaN or infinite.

    >>> checked_result(Smallest(), {"size_bytes": 10, "accuracy": 0.5, "note": 1})
    {'size_bytes': 10.0, 'accuracy': 0.5, 'note': 1.0}
    """
    if not isinstance(result, Mapping):
        raise TypeError(f"run(recipe, report) returns a mapping of metrics, got {type(result).__name__}")
    for axis in objective.axes:
        if axis.metric not in result:
            raise MetricMissing(
                f"expected '{axis.metric}' in a trial's result, got {', '.join(sorted(result)) or 'none'}; name one of "
                f"these, or let the run return it"
            )
        if not math.isfinite(result[axis.metric]):
            raise ValueError(f"'{axis.metric}' of this trial is {result[axis.metric]}")
    return {metric: float(value) for metric, value in result.items()}
