"""One width for each layer under one budget: the knapsack of `search.knapsack` over bit widths."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_compress.quantization.scales import check_bits
from lightning_compress.search.allocate import layers_of
from lightning_compress.search.knapsack import solve

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
    check_budget(budget)
    ordered = {name: {check_bits(bits): own[bits] for bits in sorted(own)} for name, own in sensitivities.items()}
    layers = layers_of(ordered, costs, " bits")
    least = sum(int(layer.costs.min()) for layer in layers)
    if budget < least:
        raise ValueError(
            f"budget {budget:,} is below what the narrowest widths cost; the smallest feasible budget of these "
            f"{len(layers)} layers is {least:,}; raise it, allow narrower widths or exclude layers"
        )
    picks = solve(layers, budget).picks
    return {name: list(own)[pick] for (name, own), pick in zip(ordered.items(), picks, strict=True)}


def check_budget(budget: float) -> None:
    """Raise unless a budget is a positive number. Runs before anything is measured.

    >>> check_budget(1e6)
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ValueError(f"budget is a positive number of bytes or bit-operations, got {budget!r}")
