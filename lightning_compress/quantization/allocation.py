"""One width for each layer under one budget: a multiple-choice knapsack, solved exactly.

Choices are added layer by layer, and only those partial choices are kept that nothing cheaper beats (Nemhauser and
Ullmann 1969) and that could still end below the best known whole choice: what the remaining layers add at least is
the knapsack's linear relaxation (Sinha and Zoltners 1979), whose solution lies on each layer's lower convex hull.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from lightning_compress.quantization.scales import check_bits

__all__ = ["Table", "allocate"]

Table = Mapping[str, Mapping[int, float]]  # layer -> width in bits -> a number

# Sums of the relaxation are rounded otherwise than those of the choices it bounds.
MARGIN = 1e-9


@dataclass(frozen=True)
class _Layer:
    """What each width of one layer costs and harms; widths ascending."""

    widths: tuple[int, ...]
    costs: NDArray[np.int64]
    harms: NDArray[np.float64]


@dataclass(frozen=True)
class _Stage:
    """Partial choices, cheapest first: their sums, and the partial choice and the width they came from."""

    costs: NDArray[np.int64]
    harms: NDArray[np.float64]
    order: NDArray[np.int64]
    before: NDArray[np.int64]
    choice: NDArray[np.int64]


def allocate(sensitivities: Table, costs: Mapping[str, Mapping[int, int]], budget: float) -> dict[str, int]:
    """Choose one width a layer, of least summed sensitivity within the budget; pure, runs once before training.

    Of choices with equal sums the cheapest is taken, and of these the one with smaller widths in earlier layers.
    Sums go from the first layer to the last in float64, and the choice is optimal for these sums.

    Args:
        sensitivities: layer -> width in bits -> how much that width harms; may be negative.
        costs: layer -> width in bits -> a whole number; the same layers and widths.
        budget: the most that the costs may sum up to.

    Raises:
        ValueError: no layers, tables that do not fit together or hold NaN, a budget that is not positive, or below
            what the narrowest choice costs; the message names the smallest budget that is feasible.

    >>> harm = {"first": {4: 8.0, 8: 0.0}, "second": {4: 1.0, 8: 0.0}}
    >>> allocate(harm, {"first": {4: 40, 8: 80}, "second": {4: 400, 8: 800}}, budget=500)
    {'first': 8, 'second': 4}
    """
    layers = _checked(sensitivities, costs, budget)
    slopes = [_relaxed(layers[after:]) for after in range(len(layers) + 1)]
    start = np.zeros(1, np.int64)
    stages, best = [_Stage(start, np.zeros(1), start, start, start)], math.inf
    for layer, rest in zip(layers, slopes[1:], strict=True):
        stage, best = _bounded(_extended(stages[-1], layer), rest, budget, best)
        stages.append(stage)
    last = stages[-1]
    at = int(np.lexsort((last.order, last.costs, last.harms))[0])
    chosen: list[int] = []
    for stage, layer in zip(reversed(stages[1:]), reversed(layers), strict=True):
        chosen.append(layer.widths[int(stage.choice[at])])
        at = int(stage.before[at])
    return dict(zip(sensitivities, reversed(chosen), strict=True))


def _extended(stage: _Stage, layer: _Layer) -> _Stage:
    """Add each width of a layer to each partial choice, and drop those that a cheaper one beats."""
    options = len(layer.widths)
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


def _hull(layer: _Layer) -> list[tuple[int, float]]:
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


def _steps(layers: list[_Layer]) -> list[tuple[float, int, int, float]]:
    """Return the hulls' edges as (slope, layer, extra cost, extra harm), the steepest first."""
    hulls = [_hull(layer) for layer in layers]
    edges = [(index, hull[i], hull[i + 1]) for index, hull in enumerate(hulls) for i in range(len(hull) - 1)]
    return sorted((_slope(a, b), index, b[0] - a[0], b[1] - a[1]) for index, a, b in edges)


def _relaxed(layers: list[_Layer]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the least harm of fractional widths as a piecewise linear function of the budget: costs, harms."""
    starts = [_hull(layer)[0] for layer in layers]
    steps = _steps(layers)
    costs = np.cumsum([float(sum(cost for cost, _ in starts)), *(step[2] for step in steps)])
    harms = np.cumsum([sum(harm for _, harm in starts), *(step[3] for step in steps)])
    return costs, harms


def check_budget(budget: float) -> None:
    """Raise unless a budget is a positive number. Runs before anything is measured.

    >>> check_budget(1e6)
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ValueError(f"budget is a positive number of bytes or bit-operations, got {budget!r}")


def _checked(sensitivities: Table, costs: Mapping[str, Mapping[int, int]], budget: float) -> list[_Layer]:
    check_budget(budget)
    if not sensitivities or sensitivities.keys() != costs.keys():
        raise ValueError(
            f"expected the same layers in both tables, at least one, got sensitivities of {sorted(sensitivities)} and "
            f"costs of {sorted(costs)}"
        )
    layers = [_layer(name, harms, costs[name]) for name, harms in sensitivities.items()]
    least = sum(int(layer.costs.min()) for layer in layers)
    if budget < least:
        raise ValueError(
            f"budget {budget:,} is below what the narrowest widths cost; the smallest feasible budget of these "
            f"{len(layers)} layers is {least:,}; raise it, allow narrower widths or exclude layers"
        )
    return layers


def _layer(name: str, harms: Mapping[int, float], costs: Mapping[int, int]) -> _Layer:
    if not harms or harms.keys() != costs.keys():
        raise ValueError(
            f"expected the same widths in both tables, at least one, got sensitivities at {sorted(harms)} and costs at "
            f"{sorted(costs)} bits in '{name}'"
        )
    widths = tuple(sorted(check_bits(bits) for bits in harms))
    for bits in widths:
        if not math.isfinite(harms[bits]) or costs[bits] < 0:
            raise ValueError(
                f"expected a finite sensitivity and a cost from 0 on, got {harms[bits]} and {costs[bits]} in '{name}' "
                f"at {bits} bits"
            )
    ordered = np.array([costs[bits] for bits in widths], np.int64)
    return _Layer(widths, ordered, np.array([harms[bits] for bits in widths], np.float64))
