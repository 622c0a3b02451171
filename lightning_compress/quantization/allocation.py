"""One width for each layer under one budget: the knapsack of `search.knapsack` over bit widths."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from lightning_compress.quantization.scales import check_bits
from lightning_compress.search.knapsack import Layer, solve

__all__ = ["Table", "allocate"]

Table = Mapping[str, Mapping[int, float]]  # layer -> width in bits -> a number


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
    layers, widths = _checked(sensitivities, costs, budget)
    picks = solve(layers, budget).picks
    return {name: own[pick] for name, own, pick in zip(sensitivities, widths, picks, strict=True)}


def check_budget(budget: float) -> None:
    """Raise unless a budget is a positive number. Runs before anything is measured.

    >>> check_budget(1e6)
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ValueError(f"budget is a positive number of bytes or bit-operations, got {budget!r}")


def _checked(
    sensitivities: Table, costs: Mapping[str, Mapping[int, int]], budget: float
) -> tuple[list[Layer], list[tuple[int, ...]]]:
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
    return layers, [tuple(sorted(harms)) for harms in sensitivities.values()]


def _layer(name: str, harms: Mapping[int, float], costs: Mapping[int, int]) -> Layer:
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
    return Layer(ordered, np.array([harms[bits] for bits in widths], np.float64))
