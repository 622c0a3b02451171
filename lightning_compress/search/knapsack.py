"""One amount for each layer under one budget: a multiple-choice knapsack, solved exactly, or greedily with its gap.

Choices are added layer by layer, and only those partial choices are kept that nothing cheaper beats (Nemhauser and
Ullmann 1969) and that could still end below the best known whole choice: what the remaining layers add at least is
the knapsack's linear relaxation (Sinha and Zoltners 1979), whose solution lies on each layer's lower convex hull.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

__all__ = ["Layer", "Picked", "solve"]

# Sums of the relaxation are rounded otherwise than those of the choices it bounds.
MARGIN = 1e-9


@dataclass(frozen=True)
class Layer:
    """What each amount of one layer costs, from 0 on, and how much it harms, in the caller's order."""

    costs: NDArray[np.int64]
    harms: NDArray[np.float64]


@dataclass(frozen=True)
class Picked:
    """One amount a layer, by index: their sums, and a number that no choice within the budget sums to less than."""

    picks: tuple[int, ...]
    cost: int
    harm: float
    bound: float


@dataclass(frozen=True)
class _Stage:
    """Partial choices, cheapest first: their sums, and the partial choice and the amount they came from."""

    costs: NDArray[np.int64]
    harms: NDArray[np.float64]
    order: NDArray[np.int64]
    before: NDArray[np.int64]
    choice: NDArray[np.int64]


def solve(layers: list[Layer], budget: float, limit: int = 10_000_000) -> Picked:
    """Choose one amount a layer, of least summed harm within the budget; pure.

    Of choices with equal sums the cheapest is taken, and of these the one with earlier amounts in earlier layers. Sums
    go from the first layer to the last in float64, and the choice is optimal for these sums. With more than `limit`
    partial choices at once it is the greedy one, along the hulls' steepest edges, bounded by the relaxation.

    Args:
        layers: at least one, each with at least one amount.
        budget: at least the sum of the cheapest amounts.
        limit: partial choices that are held at once.

    >>> first = Layer(np.array([40, 80]), np.array([8.0, 0.0]))
    >>> second = Layer(np.array([400, 800]), np.array([1.0, 0.0]))
    >>> solve([first, second], 500)
    Picked(picks=(1, 0), cost=480, harm=1.0, bound=1.0)
    """
    slopes = [_relaxed(layers[after:]) for after in range(len(layers) + 1)]
    start = np.zeros(1, np.int64)
    stages, best = [_Stage(start, np.zeros(1), start, start, start)], math.inf
    for layer, rest in zip(layers, slopes[1:], strict=True):
        if len(stages[-1].costs) * len(layer.costs) > limit:
            return _greedy(layers, budget)
        stage, best = _bounded(_extended(stages[-1], layer), rest, budget, best)
        stages.append(stage)
    last = stages[-1]
    at = int(np.lexsort((last.order, last.costs, last.harms))[0])
    cost, harm, picks = int(last.costs[at]), float(last.harms[at]), []
    for stage in reversed(stages[1:]):
        picks.append(int(stage.choice[at]))
        at = int(stage.before[at])
    return Picked(tuple(reversed(picks)), cost, harm, harm)


def _greedy(layers: list[Layer], budget: float) -> Picked:
    """Go along the hulls' edges from the steepest on, leaving out what no longer fits and what would follow it."""
    at = [_hull(layer)[0] for layer in layers]
    left, stuck = budget - sum(cost for cost, _ in at), set[int]()
    for _, index, extra, gain in _steps(layers):
        if index in stuck or extra > left:
            stuck.add(index)
            continue
        at[index] = (at[index][0] + extra, at[index][1] + gain)
        left -= extra
    picks = tuple(_cheapest_below(layer, cost) for layer, (cost, _) in zip(layers, at, strict=True))
    cost = sum(int(layer.costs[pick]) for layer, pick in zip(layers, picks, strict=True))
    harm = sum(float(layer.harms[pick]) for layer, pick in zip(layers, picks, strict=True))
    return Picked(picks, cost, harm, float(np.interp(budget, *_relaxed(layers))))


def _cheapest_below(layer: Layer, cost: int) -> int:
    """Return the least harmful amount of at most this cost, of several the cheapest."""
    fitting = np.flatnonzero(layer.costs <= cost)
    return int(fitting[np.lexsort((layer.costs[fitting], layer.harms[fitting]))[0]])


def _extended(stage: _Stage, layer: Layer) -> _Stage:
    """Add each width of a layer to each partial choice, and drop those that a cheaper one beats."""
    options = len(layer.costs)
    costs = (stage.costs[:, None] + layer.costs).ravel()
    harms = (stage.harms[:, None] + layer.harms).ravel()
    key = (stage.order[:, None] * options + np.arange(options)).ravel()
    ascending = np.lexsort((key, harms, costs))
    # Adding the same number keeps the order of two sums, also when rounded: what is beaten now is beaten at the end.
    lowest = np.minimum.accumulate(harms[ascending])
    kept = ascending[np.concatenate([[True], harms[ascending][1:] < lowest[:-1]])]
    order = np.argsort(np.argsort(key[kept]))
    return _Stage(costs[kept], harms[kept], order, kept // options, kept % options)


def _bounded(
    stage: _Stage, rest: tuple[NDArray[np.float64], NDArray[np.float64]], budget: float, best: float
) -> tuple[_Stage, float]:
    """Drop partial choices that cannot be finished within the budget, or not as well as the best one known.

    Returns:
        What is left, and the harm of the best whole choice known now.
    """
    costs, harms = rest
    left = budget - stage.costs
    fitting = left >= costs[0]
    # The relaxation's corners are whole choices: the last one that there is room for finishes a partial choice.
    finished = stage.harms + harms[np.searchsorted(costs, left, side="right") - 1]
    best = min(best, float(finished[fitting].min()))
    least = stage.harms + np.interp(left, costs, harms)
    kept = fitting & (least <= best + MARGIN * (1.0 + abs(best) + np.abs(harms).max()))
    return _Stage(*(getattr(stage, field.name)[kept] for field in fields(stage))), best


def _hull(layer: Layer) -> list[tuple[int, float]]:
    """Return a layer's lower convex hull as (cost, harm), from its cheapest width to its least harmful one."""
    corners: list[tuple[int, float]] = []
    for cost, harm in sorted(zip(layer.costs.tolist(), layer.harms.tolist(), strict=True)):
        if corners and harm >= corners[-1][1]:
            continue
        while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-2], (cost, harm)):
            corners.pop()
        corners.append((cost, harm))
    return corners


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])


def _steps(layers: list[Layer]) -> list[tuple[float, int, int, float]]:
    """Return the hulls' edges as (slope, layer, extra cost, extra harm), the steepest first."""
    hulls = [_hull(layer) for layer in layers]
    edges = [(index, hull[i], hull[i + 1]) for index, hull in enumerate(hulls) for i in range(len(hull) - 1)]
    return sorted((_slope(a, b), index, b[0] - a[0], b[1] - a[1]) for index, a, b in edges)


def _relaxed(layers: list[Layer]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the least harm of fractional widths as a piecewise linear function of the budget: costs, harms."""
    starts = [_hull(layer)[0] for layer in layers]
    steps = _steps(layers)
    costs = np.cumsum([float(sum(cost for cost, _ in starts)), *(step[2] for step in steps)])
    harms = np.cumsum([sum(harm for _, harm in starts), *(step[3] for step in steps)])
    return costs, harms
