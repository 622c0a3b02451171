"""Layer by layer: zeros and bits of two models beside each other, and groups of layers where there are many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_compress.measure.size import LayerRow

__all__ = ["LayerChange", "grouped_layers", "layer_changes"]


@dataclass(frozen=True)
class LayerChange:
    """One weight in two models; a side that does not have it is None."""

    name: str
    before: LayerRow | None
    after: LayerRow | None

    def json(self) -> dict[str, Any]:
        """Name, then shape, sparsity and bits of both sides, None where a side lacks the weight."""
        plain: dict[str, Any] = {"name": self.name}
        for side, row in (("before", self.before), ("after", self.after)):
            plain[f"shape_{side}"] = None if row is None else list(row.shape)
            plain[f"sparsity_{side}"] = None if row is None else row.sparsity
            plain[f"bits_{side}"] = None if row is None else row.bits
        return plain


def layer_changes(before: Iterable[LayerRow], after: Iterable[LayerRow]) -> tuple[LayerChange, ...]:
    """Pair the rows of two models by name, in the order of the first; what only the second has comes last.

    Take the rows from `per_layer`, or from the two files with `python -m lightning_compress report`.

    >>> row = LayerRow("head.weight", (2, 2), 4, 1, 0.75, 8)
    >>> [(each.name, each.before) for each in layer_changes([], [row])]
    [('head.weight', None)]
    """
    first, second = ({row.name: row for row in rows} for rows in (before, after))
    return tuple(LayerChange(name, first.get(name), second.get(name)) for name in dict.fromkeys([*first, *second]))


def grouped_layers(layers: Sequence[LayerChange], most: int = 60) -> tuple[LayerChange, ...]:
    """Return the layers, or where there are more than `most`, sums over layers whose names begin alike.

    The longest beginnings, cut at dots, that give at most `most` groups; where even the first words are more, the
    largest stay and the rest is one group. Sparsity and bits of a group are those of all its weights together.

    >>> rows = [LayerRow(f"blocks.{i // 2}.{'ab'[i % 2]}", (2,), 2, i % 2, 1 - i % 2 / 2, 8) for i in range(4)]
    >>> [(each.name, each.after.sparsity) for each in grouped_layers(layer_changes([], rows), most=2)]
    [('blocks.0 (2 weights)', 0.75), ('blocks.1 (2 weights)', 0.75)]
    """
    if len(layers) <= most:
        return tuple(layers)
    for words in range(max(layer.name.count(".") for layer in layers), 0, -1):
        groups: dict[str, list[LayerChange]] = {}
        for layer in layers:
            groups.setdefault(".".join(layer.name.split(".")[:words]), []).append(layer)
        if len(groups) <= most:
            return tuple(_sum(name, members) for name, members in groups.items())
    kept = {layer.name for layer in sorted(layers, key=_size, reverse=True)[: most - 1]}
    rest = [layer for layer in layers if layer.name not in kept]
    return (*(layer for layer in layers if layer.name in kept), _sum("all others", rest))


def _size(layer: LayerChange) -> int:
    return max(row.total for row in (layer.before, layer.after) if row is not None)


def _sum(name: str, members: Sequence[LayerChange]) -> LayerChange:
    if len(members) == 1:
        return members[0]
    name = f"{name} ({len(members)} weights)"
    before = [layer.before for layer in members if layer.before is not None]
    after = [layer.after for layer in members if layer.after is not None]
    return LayerChange(name, _row(name, before), _row(name, after))


def _row(name: str, rows: Sequence[LayerRow]) -> LayerRow | None:
    if not rows:
        return None
    total, nonzero = sum(row.total for row in rows), sum(row.nonzero for row in rows)
    bits = math.fsum(row.bits * row.total for row in rows) / total if total else 0.0
    # A group of unequal widths has a mean that no single weight has: LayerRow holds whole bits, so it is rounded.
    return LayerRow(name, (total,), total, nonzero, 1.0 - nonzero / total if total else 0.0, round(bits))
