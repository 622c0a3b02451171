"""An amount for each layer under one budget of bytes or MACs, from how much each amount harms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_compress.measure.size import Count, packed_bits
from lightning_compress.search.knapsack import Layer, solve
from lightning_compress.search.refusals import ImpossibleBudget

__all__ = ["Allocation", "allocate", "joint_amounts", "layers_of", "stored_bytes"]

LIMIT = 10_000_000  # partial choices that the exact solution may hold at once: about 400 MB


@dataclass(frozen=True)
class Allocation:
    """One amount a layer.

    Args:
        amounts: layer -> the amount chosen.
        cost: what they cost together, in the budget's unit.
        harm: what they harm together.
        bound: no choice within the budget harms less.
    """

    amounts: dict[str, Any]
    cost: int
    harm: float
    bound: float

    @property
    def gap(self) -> float:
        """How much less a better choice could harm at most; 0 where the choice is exact."""
        return max(0.0, self.harm - self.bound)


def allocate(
    harms: Mapping[str, Mapping[Any, float]],
    costs: Mapping[str, Mapping[Any, int]],
    budget: float,
    limit: int = LIMIT,
) -> Allocation:
    """Choose one amount a layer, of least summed harm within the budget; pure, runs once before training.

    Exact (`search.knapsack`), and of equal choices the cheapest. Where more than `limit` partial choices would be
    held at once: greedy, and `gap` says how far from the exact one it can be (the linear relaxation's bound).

    Args:
        harms: layer -> amount -> how much it harms; may be negative. Amounts are anything hashable.
        costs: layer -> amount -> a whole number from 0 on; the same layers and amounts.
        budget: the most that the costs may sum up to, above 0.
        limit: partial choices that are held at once.

    Raises:
        ValueError: no layers, tables that do not fit together or hold NaN, a budget that is not positive.
        ImpossibleBudget: a budget below what the cheapest amounts cost; names the nearest that is possible.

    >>> harm = {"first": {0.9: 8.0, 0.5: 0.0}, "second": {0.9: 1.0, 0.5: 0.0}}
    >>> allocate(harm, {"first": {0.9: 40, 0.5: 200}, "second": {0.9: 400, 0.5: 2000}}, budget=700).amounts
    {'first': 0.5, 'second': 0.9}
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise ValueError(f"budget is a positive number, in the unit of the costs, got {budget!r}")
    layers = layers_of(harms, costs)
    least = sum(int(layer.costs.min()) for layer in layers)
    if budget < least:
        raise ImpossibleBudget(
            f"budget {budget:,} is below what the cheapest amounts of these {len(layers)} layers cost; the nearest "
            f"that is possible is {least:,}; raise it, allow stronger amounts or exclude layers",
            nearest=least,
        )
    picked = solve(layers, budget, limit)
    amounts = {name: list(own)[pick] for (name, own), pick in zip(harms.items(), picked.picks, strict=True)}
    return Allocation(amounts, picked.cost, picked.harm, picked.bound)


def layers_of(
    harms: Mapping[str, Mapping[Any, float]], costs: Mapping[str, Mapping[Any, int]], unit: str = ""
) -> list[Layer]:
    """Check that two tables fit together, and return them as the knapsack's layers, in the order of the harms.

    Args:
        harms: layer -> amount -> how much it harms.
        costs: the same layers and amounts -> a whole number from 0 on.
        unit: what stands behind an amount in a message.

    Raises:
        ValueError: no layers, other layers or amounts in one of them, NaN, or a negative cost.
    """
    if not harms or harms.keys() != costs.keys():
        raise ValueError(
            f"expected the same layers in both tables, at least one, got harms of {sorted(harms)} and costs of "
            f"{sorted(costs)}"
        )
    return [_layer(name, own, costs[name], unit) for name, own in harms.items()]


def _layer(name: str, harms: Mapping[Any, float], costs: Mapping[Any, int], unit: str) -> Layer:
    if not harms or harms.keys() != costs.keys():
        raise ValueError(
            f"expected the same amounts in both tables, at least one, got harms at {list(harms)}{unit} and costs at "
            f"{list(costs)}{unit} in '{name}'"
        )
    for amount, harm in harms.items():
        if not math.isfinite(harm) or costs[amount] < 0:
            raise ValueError(
                f"expected a finite harm and a cost from 0 on, got {harm} and {costs[amount]} in '{name}' at "
                f"{amount!r}{unit}"
            )
    return Layer(
        np.array([costs[amount] for amount in harms], np.int64), np.array(list(harms.values()), dtype=np.float64)
    )


def stored_bytes(weights: int, outputs: int, sparsity: float = 0.0, bits: int = 32) -> int:
    """Return what a layer's weight takes: codes of the non-zeros, a bit a weight that says where they are, scales.

    Without the bits where all codes together are smaller. What a general-purpose compressor makes of it differs by some
    percent; it ranks amounts, and the file is measured afterwards.

    Args:
        weights: elements of the weight.
        outputs: its output channels, a float32 scale each below 32 bits.
        sparsity: fraction of zeros.
        bits: width of a code.

    >>> stored_bytes(1000, 10, sparsity=0.9, bits=8), stored_bytes(1000, 10, bits=8)
    (265, 1040)
    """
    codes = packed_bits(Count(round((1.0 - sparsity) * weights), weights), bits)
    return math.ceil(codes / 8) + (4 * outputs if bits < 32 else 0)


def joint_amounts(
    harms: Mapping[str, Mapping[tuple[str, float], float]], shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, dict[tuple[float, int], float]], dict[str, dict[tuple[float, int], int]]]:
    """Return harms and bytes of each sparsity with each width, for `allocate`; pure.

    Harms are added: measured one by one, they say nothing of both together. A harm below 0 counts as 0.

    Args:
        harms: layer -> ("sparsity", fraction) or ("bits", width) -> harm, as in `Sensitivity.harms`.
        shapes: layer -> its weights and its output channels.

    Returns:
        (layer -> (sparsity, bits) -> harm, layer -> (sparsity, bits) -> bytes). Layers without a sparsity have 0.0,
        layers without a width 32.

    >>> joint_amounts({"a": {("sparsity", 0.9): 0.1, ("bits", 8): 0.25}}, {"a": (1000, 10)})
    ({'a': {(0.9, 8): 0.35}}, {'a': {(0.9, 8): 265}})
    """
    summed: dict[str, dict[tuple[float, int], float]] = {}
    taken: dict[str, dict[tuple[float, int], int]] = {}
    for name, own in harms.items():
        zeros = {value: harm for (technique, value), harm in own.items() if technique == "sparsity"} or {0.0: 0.0}
        widths = {int(value): harm for (technique, value), harm in own.items() if technique == "bits"} or {32: 0.0}
        pairs = [(sparsity, bits) for sparsity in zeros for bits in widths]
        summed[name] = {(s, b): max(zeros[s], 0.0) + max(widths[b], 0.0) for s, b in pairs}
        taken[name] = {(s, b): stored_bytes(*shapes[name], s, b) for s, b in pairs}
    return summed, taken
