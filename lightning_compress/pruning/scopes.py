"""Scopes: how units of all layers compete for the zeros. A unit is a weight, or a group that goes as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from lightning_compress.parts import Part
from lightning_compress.pruning.threshold import Piecewise, Scored, keep_masks
from lightning_compress.sharding import cut, whole

__all__ = ["Masks", "Scope", "Units", "by_output", "erk", "erk_densities", "globally", "lamp", "uniform"]

Masks = tuple[Iterator[Tensor], float]


@dataclass(frozen=True)
class Units:
    """The units of one layer.

    Args:
        scores: gives one score a unit, in any shape; called once in each pass.
        count: number of units, on all processes together.
        size: weights in each.
        shape: of the whole weight.
        lazy: the same scores, where they can be computed a piece at a time.
        axis: dimension of the scores that counts outputs.
        part: which piece of the units this process has; None where it has all.
    """

    scores: Callable[[], Tensor]
    count: int
    size: int
    shape: torch.Size
    lazy: Piecewise | None = None
    axis: int = 0
    part: Part | None = None

    def whole(self) -> Tensor:
        """Return the scores of all processes; every process calls it."""
        return whole(self.scores(), self.part)


Scope = Callable[[Sequence[Units], float], Masks]


def _weights(layers: Sequence[Units]) -> int:
    return sum(units.count * units.size for units in layers)


def _thresholded(layers: Sequence[Units], count: int) -> Masks:
    scores: list[Scored] = [units.lazy or units.scores for units in layers]
    parts = [units.part for units in layers if units.part is not None]
    masks, threshold = keep_masks(scores, count, parts or None)
    return masks, threshold.value


def globally(layers: Sequence[Units], sparsity: float) -> Masks:
    """Keep the highest scores of all layers together: one threshold. Runs at each mask update.

    Exact to one weight, or to less than one unit where units differ in size; ties go by position.

    >>> layer = Units(lambda: torch.tensor([3.0, 1.0]), count=2, size=1, shape=torch.Size([2]))
    >>> masks, threshold = globally([layer, layer], 0.75)
    >>> list(masks), threshold
    ([tensor([False, False]), tensor([ True, False])], 3.0)
    """
    if len({units.size for units in layers}) == 1:
        count = sum(units.count for units in layers)
        return _thresholded(layers, round(sparsity * count))
    # Units that go as a whole are few enough to be compared in one place.
    shapes, scores = [], []
    for units in layers:
        found = units.whole()
        shapes.append(found.shape)
        scores.append(found.flatten().float())
    sizes = torch.cat([torch.full((units.count,), units.size) for units in layers])
    order = torch.sort(torch.cat(scores), stable=True).indices.cpu()
    keep = torch.ones(len(sizes), dtype=torch.bool)
    keep[order[_fitting(sizes[order], round(sparsity * _weights(layers)))]] = False
    threshold_value = float(torch.cat(scores)[~keep.to(scores[0].device)].max()) if not bool(keep.all()) else 0.0
    kept = torch.split(keep, [units.count for units in layers])
    masks = (cut(mask.view(shape), units.part) for mask, shape, units in zip(kept, shapes, layers, strict=True))
    return masks, threshold_value


def _fitting(sizes: Tensor, budget: int) -> Tensor:
    """Choose units in order, leaving out those that no longer fit."""
    chosen = sizes.cumsum(0) <= budget
    left = budget - int(sizes[chosen].sum())
    place = int(chosen.sum())
    while place < len(sizes) and bool((fits := sizes[place:] <= left).any()):
        place += int(fits.nonzero()[0])
        chosen[place] = True
        left -= int(sizes[place])
        place += 1
    return chosen


def _locally(layers: Sequence[Units], dropped: Sequence[int]) -> Masks:
    decided = [_thresholded([units], count) for units, count in zip(layers, dropped, strict=True)]
    return (next(masks) for masks, _ in decided), max(threshold for _, threshold in decided)


def uniform(layers: Sequence[Units], sparsity: float) -> Masks:
    """Prune each layer to the same sparsity. Runs at each mask update.

    Counts are rounded so that their total is exact where units have one size.

    >>> layers = [Units(lambda: torch.arange(3.0), 3, 1, torch.Size([3]))] * 2
    >>> [mask.tolist() for mask in uniform(layers, 0.5)[0]]
    [[False, False, True], [False, True, True]]
    """
    ends = [round(sparsity * count) for count in accumulate((units.count for units in layers), initial=0)]
    return _locally(layers, [later - earlier for earlier, later in pairwise(ends)])


def by_output(layers: Sequence[Units], sparsity: float) -> Masks:
    """Prune the weights of each output to the same sparsity, as Wanda does. Runs at each mask update.

    >>> layer = Units(lambda: torch.tensor([[1.0, 2.0], [8.0, 9.0]]), 4, 1, torch.Size([2, 2]))
    >>> next(by_output([layer], 0.5)[0])
    tensor([[False,  True],
            [False,  True]])
    """
    starts = accumulate((units.count for units in layers), initial=0)
    decided = (
        cut(_rows(units.whole(), units.axis, start, sparsity), units.part)
        for units, start in zip(layers, starts, strict=False)
    )
    return decided, float("nan")


def _rows(scores: Tensor, axis: int, start: int, sparsity: float) -> Tensor:
    by_row = scores.movedim(axis, 0)
    rows = by_row.flatten(1)
    # Rounded along all rows of all layers, so that the total is exact.
    ends = (torch.arange(len(rows) + 1, dtype=torch.float64) * rows.shape[1] + start).mul_(sparsity).round_().long()
    ranks = torch.sort(torch.sort(rows, dim=1, stable=True).indices, dim=1).indices
    return (ranks >= ends.diff().unsqueeze(1).to(ranks.device)).view(by_row.shape).movedim(0, axis).contiguous()


def erk_densities(shapes: Sequence[Sequence[int]], density: float) -> list[float]:
    """Return each layer's share of kept weights under Erdos-Renyi-kernel allocation; pure.

    Proportional to the sum of a weight's dimensions over their product, at most 1, with the asked mean over all
    weights. Evci et al. 2020, "Rigging the Lottery", section 3 (1); Mocanu et al. 2018.

    >>> erk_densities([(10, 10), (100, 100)], 0.1)
    [0.9181..., 0.0918...]
    """
    raw = [sum(shape) / prod(shape) for shape in shapes]
    sizes = [prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        rest = [index for index in range(len(shapes)) if index not in dense]
        wanted = density * sum(sizes) - sum(sizes[index] for index in dense)
        scale = wanted / sum(raw[index] * sizes[index] for index in rest) if rest else 0.0
        full = {index for index in rest if scale * raw[index] >= 1.0}
        if not full or not rest:
            return [1.0 if index in dense else scale * raw[index] for index in range(len(shapes))]
        dense |= full


def erk(layers: Sequence[Units], sparsity: float) -> Masks:
    """Prune each layer by its Erdos-Renyi-kernel share: narrow layers keep more. Runs at each mask update.

    The total is exact; units larger than a weight go while they fit. Formula and paper as in `erk_densities`.

    >>> layers = [Units(lambda: torch.arange(4.0).view(2, 2), 4, 1, torch.Size([2, 2])),
    ...           Units(lambda: torch.arange(64.0).view(8, 8), 64, 1, torch.Size([8, 8]))]
    >>> [int(mask.sum()) for mask in erk(layers, 0.75)[0]]
    [3, 14]
    """
    shares = erk_densities([units.shape for units in layers], 1.0 - sparsity)
    exact = [(1.0 - share) * units.count for share, units in zip(shares, layers, strict=True)]
    dropped = [int(number) for number in exact]
    left = round(sparsity * _weights(layers))
    left -= sum(count * units.size for count, units in zip(dropped, layers, strict=True))
    # Largest remainders first; a layer that ERK leaves dense has none.
    for index in sorted(range(len(exact)), key=lambda index: dropped[index] - exact[index]):
        if layers[index].size <= left and dropped[index] < exact[index]:
            dropped[index] += 1
            left -= layers[index].size
    return _locally(layers, dropped)


def _lamp_scores(units: Units) -> Tensor:
    scores = units.whole()
    ordered, order = scores.flatten().double().sort(stable=True)
    squares = ordered.clamp_min(0.0).square()
    # The sum over this weight and all larger ones of its layer.
    remaining = squares.flip(0).cumsum(0).flip(0).clamp_min(1e-300)
    ranked = torch.where(ordered > 0.0, squares / remaining, ordered)
    return cut(torch.empty_like(ordered).index_copy_(0, order, ranked).float().view(scores.shape), units.part)


def lamp(layers: Sequence[Units], sparsity: float) -> Masks:
    """Compare weights of all layers by their score squared over that of all larger ones in their layer.

    Each layer's largest weight scores 1, so that no layer is emptied first; scores that are not positive stay as they
    are, below all others. Runs at each mask update; each pass sorts each layer. Lee et al. 2021, "Layer-adaptive
    Sparsity for the Magnitude-based Pruning", equation 4.

    >>> layer = Units(lambda: torch.tensor([1.0, 2.0]), 2, 1, torch.Size([2]))
    >>> small = Units(lambda: torch.tensor([0.1, 0.2]), 2, 1, torch.Size([2]))
    >>> [mask.tolist() for mask in lamp([layer, small], 0.5)[0]]
    [[False, True], [False, True]]
    """
    return globally([replace(units, scores=partial(_lamp_scores, units), lazy=None) for units in layers], sparsity)
