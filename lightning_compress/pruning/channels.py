"""Channels that go together: scores of a group's units, which of them go for a budget, and the masks that say so.

All functions speak of the module as it was first traced: a group's units keep their numbers for the whole run,
whatever has been removed of them (`present`) or zeroed (`dropped`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.parts import Part
from lightning_compress.pruning.dependency import Group, Slot
from lightning_compress.sharding import sum_of_pieces

__all__ = ["Removal", "checked", "choose", "group_scores", "kept_share", "masks_of", "remaining", "unit_scores"]

Kept = Mapping[str, Tensor]


@dataclass(frozen=True)
class Removal:
    """What is removed, when, and what must stay.

    Args:
        of: the budget: "macs", "parameters", "channels" or "latency" (measured, seconds of a forward).
        multiple_of: a layer's remaining channels are rounded up to a multiple of this.
        most: largest share of one group's channels that may go.
        least: smallest number of channels that stay.
        times: how often channels are taken out of the module, evenly over the window, the last time at its end; until
            then they are zero. 0 leaves the zeros in.
    """

    of: Literal["macs", "parameters", "channels", "latency"] = "macs"
    multiple_of: int = 1
    most: float = 0.9
    least: int = 1
    times: int = 1

    def __post_init__(self) -> None:
        """Raise on values that leave nothing or mean nothing."""
        whole = {"multiple_of": self.multiple_of, "least": self.least, "times": self.times}
        if any(type(value) is not int for value in whole.values()) or not isinstance(self.most, (int, float)):
            raise TypeError(f"expected whole numbers and a share for most, got {whole} and most={self.most!r}")
        if self.of not in ("macs", "parameters", "channels", "latency"):
            raise ValueError(f"a budget is of 'macs', 'parameters', 'channels' or 'latency', got {self.of!r}")
        if self.multiple_of < 1 or self.least < 1 or self.times < 0 or not 0.0 < self.most <= 1.0:
            raise ValueError(
                f"expected multiple_of >= 1, least >= 1, times >= 0 and most in (0, 1], got {self.multiple_of}, "
                f"{self.least}, {self.times}, {self.most}"
            )


def checked(removal: Removal | None) -> Removal:
    """Return the removal, by default `Removal()`.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(removal, Removal | None):
        raise TypeError(f"removal is a Removal, such as Removal(of='macs'), or None, got {removal!r}")
    return removal or Removal()


def remaining(groups: Sequence[Group], present: Kept) -> list[Group]:
    """Return the groups with only the present units, their positions as they are after the others were removed."""
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for group in groups:
        for slot in group.slots:
            gone.setdefault((slot.tensor, slot.dim), []).append(slot.index[~present[group.name]].flatten())
    removed = {place: torch.cat(indices).sort().values for place, indices in gone.items()}

    def moved(slot: Slot, units: Tensor) -> Slot:
        index = slot.index[units]
        return replace(slot, index=index - torch.searchsorted(removed[slot.tensor, slot.dim], index))

    return [
        replace(group, slots=tuple(moved(slot, present[group.name]) for slot in group.slots), units=int(units.sum()))
        for group in groups
        for units in (present[group.name],)
    ]


def _channel_means(scores: Tensor, dim: int, part: Part | None) -> Tensor:
    """Return the mean over each slice along a dimension, in float64; every process calls it."""
    part = None if part is None or part.replicated else part
    own = scores if part is None else part.placed(scores)
    means = own.movedim(dim, 0).flatten(1).double().mean(dim=1)
    return means if part is None else sum_of_pieces(means, part)


def group_scores(
    group: Group, scores: Mapping[str, Tensor], relative: bool, parts: Mapping[str, Part] | None = None
) -> Tensor:
    """Return one score a unit: the mean over its weights in all layers it passes through.

    Args:
        group: with positions as the tensors are now.
        scores: of each weight, by name; slots of other tensors (biases, norms) have none and take no part.
        relative: divide by the mean over units, for criteria whose values mean nothing across layers.
        parts: which piece of each weight the scores are of; without one they are of the whole.

    >>> group = Group("a", (Slot("a.weight", 0, torch.tensor([[0], [1]])),), 2)
    >>> group_scores(group, {"a.weight": torch.tensor([[1.0, 3.0], [4.0, 4.0]])}, relative=False)
    tensor([2., 4.], dtype=torch.float64)
    """
    means = []
    for slot in group.slots:
        if slot.tensor in scores:
            by_position = _channel_means(scores[slot.tensor], slot.dim, (parts or {}).get(slot.tensor))
            mean = by_position[slot.index.to(by_position.device)].mean(dim=1).cpu()
            means.append(mean / mean.mean().abs().clamp_min(1e-300) if relative else mean)
    return torch.stack(means).mean(dim=0) if means else torch.zeros(group.units, dtype=torch.float64)


def unit_scores(
    groups: Sequence[Group],
    present: Kept,
    kept: Kept,
    scores: Mapping[str, Tensor],
    relative: bool,
    parts: Mapping[str, Part] | None = None,
) -> dict[str, Tensor]:
    """Return `group_scores` of each group as first traced; -inf for units that are zero or removed already."""
    by_group = {}
    for group in remaining(groups, present):
        full = torch.full((len(present[group.name]),), float("-inf"), dtype=torch.float64)
        full[present[group.name]] = group_scores(group, scores, relative, parts)
        by_group[group.name] = full.masked_fill(~kept[group.name], float("-inf"))
    return by_group


def masks_of(groups: Sequence[Group], kept: Kept, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return a mask for each tensor that any group passes through: False where a unit that is not kept lies.

    >>> group = Group("a", (Slot("a.weight", 0, torch.tensor([[0], [1]])),), 2)
    >>> masks_of([group], {"a": torch.tensor([True, False])}, {"a.weight": torch.Size([2, 2])})
    {'a.weight': tensor([[ True,  True],
            [False, False]])}
    """
    masks = {
        slot.tensor: torch.ones(shapes[slot.tensor], dtype=torch.bool)
        for g in groups
        for slot in g.slots
        if slot.tensor in shapes
    }
    for group in groups:
        for slot in group.slots:
            if slot.tensor in masks:
                masks[slot.tensor].index_fill_(slot.dim, slot.index[~kept[group.name]].flatten(), False)
    return masks


def kept_share(
    groups: Sequence[Group], kept: Kept, costs: Mapping[str, float], shapes: Mapping[str, torch.Size]
) -> float:
    """Return the share of cost that stays with the kept units: a weight's cost is proportional to its size.

    Args:
        groups: as traced.
        kept: units by group.
        costs: of each tensor at its full size: MACs, or its number of parameters.
        shapes: full ones.
    """
    extents = {name: list(shape) for name, shape in shapes.items()}
    for group in groups:
        for slot in group.slots:
            if slot.tensor in extents:
                extents[slot.tensor][slot.dim] -= int(slot.index[~kept[group.name]].numel())
    left = sum(
        cost * float(torch.tensor(extents[name]).double().prod() / max(1, shapes[name].numel()))
        for name, cost in costs.items()
    )
    return left / sum(costs.values())


def _rounded(scores: Tensor, dropped: Tensor, limits: Removal) -> Tensor:
    """Take the best of the dropped back until the group's limits hold; returns what is kept."""
    units = len(scores)
    least = max(limits.least, units - int(limits.most * units))
    kept = max(least, units - int(dropped.sum()))
    kept = min(units, -(-kept // limits.multiple_of) * limits.multiple_of)
    # What was not asked to go comes first, then what scored best.
    order = torch.argsort(scores.masked_fill(~dropped, float("inf")), descending=True, stable=True)
    keep = torch.zeros(units, dtype=torch.bool)
    keep[order[:kept]] = True
    return keep


def choose(
    scores: Mapping[str, Tensor], share: Callable[[Kept], float], amount: float, limits: Removal
) -> dict[str, Tensor]:
    """Return which units stay, so that at least `amount` of the budget goes: the lowest scores of all groups first.

    Args:
        scores: one a unit, by group; -inf for units that have gone already, which go first.
        share: kept units -> share of the budget that stays.
        amount: share that is to go.
        limits: per group.

    Raises:
        ValueError: the limits do not allow that much.

    >>> scores = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    >>> choose(scores, lambda kept: float(kept["a"].double().mean()), 0.5, Removal())
    {'a': tensor([False, False,  True,  True])}
    """
    sizes = [len(values) for values in scores.values()]
    order = torch.argsort(torch.cat(list(scores.values())), stable=True)

    def kept_after(count: int) -> dict[str, Tensor]:
        dropped = torch.zeros(len(order), dtype=torch.bool)
        dropped[order[:count]] = True
        parts = zip(scores.items(), torch.split(dropped, sizes), strict=True)
        return {name: _rounded(values, part, limits) for (name, values), part in parts}

    low, high = int(torch.cat(list(scores.values())).isneginf().sum()), len(order)
    most = 1.0 - share(kept_after(high))
    if most < amount - 1e-9:
        raise ValueError(
            f"{amount:g} of the budget cannot go: with every group at its limit {most:.3g} goes; lower the amount, "
            f"select more layers, or loosen multiple_of={limits.multiple_of}, most={limits.most}"
        )
    while low < high:
        middle = (low + high) // 2
        enough = 1.0 - share(kept_after(middle)) >= amount - 1e-9
        low, high = (low, middle) if enough else (middle + 1, high)
    return kept_after(low)
