"""How many terms of its decomposition each layer keeps: the same number, a share of its energy, or a budget of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.errors import NothingToCompress

__all__ = ["Budget", "Energy", "Rank", "RankRule", "check_rank", "chosen_ranks", "rank_that_saves"]

Shape = tuple[int, int]  # outputs, inputs
# (singular values of each layer, shape of each layer's matrix) -> rank of each layer.
RankRule = Callable[[Mapping[str, Tensor], Mapping[str, Shape]], dict[str, int]]
Rank = int | RankRule


def rank_that_saves(outputs: int, inputs: int) -> int:
    """The largest rank whose two factors hold fewer weights, so fewer MACs and bytes; 0 where none does.

    >>> rank_that_saves(100, 100), rank_that_saves(1, 10)
    (49, 0)
    """
    return (outputs * inputs - 1) // (outputs + inputs)


@dataclass(frozen=True)
class Energy:
    """Each layer keeps the least rank that holds a share of the sum of its squared singular values.

    Args:
        share: in (0, 1].

    >>> Energy(0.9)({"a": torch.tensor([3.0, 1.0])}, {"a": (2, 2)})
    {'a': 1}
    """

    share: float

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not 0 < self.share <= 1:
            raise ValueError(f"expected an energy share in (0, 1], got {self.share!r}")

    def __call__(self, values: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, int]:
        """Return each layer's rank."""
        kept = {name: each.double().square().cumsum(0) for name, each in values.items()}
        return {name: min(int((sums < self.share * sums[-1]).sum()) + 1, len(sums)) for name, sums in kept.items()}


@dataclass(frozen=True)
class Budget:
    """All layers together lose a share of their weights, those terms first that matter least for what they cost.

    Terms are taken in the order of squared value over weights, which is the best choice for independent errors, since
    values fall within a layer; each layer keeps one term at least, and no more than saves weights.

    Args:
        amount: share of the layers' weights that go, in (0, 1).
        absolute: compare squared values as they are, which is right where they are changes of the loss
            (`fisher_weighted_svd`); else as shares of their layer's sum.

    >>> values = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0]), "b": torch.tensor([4.0, 0.0, 0.0, 0.0])}
    >>> Budget(0.5)(values, {"a": (8, 8), "b": (8, 8)})
    {'a': 3, 'b': 1}
    """

    amount: float
    absolute: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.amount, bool) or not (math.isfinite(self.amount) and 0 < self.amount < 1):
            raise ValueError(f"amount is the share of weights that go, in (0, 1), got {self.amount!r}")

    def __call__(self, values: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, int]:
        """Return each layer's rank.

        Raises:
            ValueError: with rank 1 the layers would still hold more weights.
        """
        most = {name: rank_that_saves(*shapes[name]) for name in values}
        able = [name for name in values if most[name] >= 1]
        left = (1 - self.amount) * sum(math.prod(shapes[name]) for name in able) - sum(sum(shapes[n]) for n in able)
        if left < 0:
            raise ValueError(
                f"amount {self.amount} leaves fewer weights than rank 1 of each layer takes; lower it, or exclude "
                f"small layers"
            )
        worth, owner = self._terms({name: values[name][: most[name]] for name in able}, shapes)
        order = worth.argsort(descending=True, stable=True)
        costs = torch.tensor([sum(shapes[name]) for name in able])[owner[order]]
        taken = owner[order][costs.cumsum(0) <= left]
        ranks = {name: 1 + int((taken == index).sum()) for index, name in enumerate(able)}
        return {name: ranks.get(name, len(each)) for name, each in values.items()}

    def _terms(self, values: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> tuple[Tensor, Tensor]:
        """What each term but a layer's first is worth for a weight, and the index of its layer."""
        worth, owner = [], []
        for index, (name, each) in enumerate(values.items()):
            squares = each.double().cpu().square()
            total = 1.0 if self.absolute else max(float(squares.sum()), 1e-300)
            worth.append(squares[1:] / total / sum(shapes[name]))
            owner.append(torch.full((len(squares) - 1,), index))
        return torch.cat(worth), torch.cat(owner)


def chosen_ranks(rank: Rank, values: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Ranks of the layers that get smaller; the others are not in it. Runs when layers are decomposed.

    Raises:
        ValueError: a rank below 1, or a rule's rank above a layer's full one.
    """
    ranks = dict.fromkeys(values, rank) if isinstance(rank, int) else rank(values, shapes)
    for name, own in ranks.items():
        if own < 1 or (own > len(values[name]) and not isinstance(rank, int)):
            raise ValueError(f"expected a rank from 1 to {len(values[name])}, the full one of '{name}', got {own}")
    return {name: own for name, own in ranks.items() if own <= rank_that_saves(*shapes[name])}


def check_rank(rank: Rank, shapes: Mapping[str, Shape]) -> None:
    """Raise where what is known before anything is decomposed says that a rank cannot be. Runs at `setup`.

    Raises:
        ValueError: a budget that rank 1 of each layer does not meet.
        NothingToCompress: a number that makes no layer smaller.

    >>> check_rank(3, {"a": (64, 64)})
    """
    if isinstance(rank, Budget):
        rank({name: torch.ones(min(shape)) for name, shape in shapes.items()}, shapes)
    if isinstance(rank, int) and all(rank > rank_that_saves(*shape) for shape in shapes.values()):
        most = ", ".join(f"{name} {rank_that_saves(*shape)}" for name, shape in shapes.items())
        raise NothingToCompress(f"no layer would get smaller at rank={rank}; the largest ranks that save: {most}")
