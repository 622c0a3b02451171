"""Attributions of two models beside each other, and how alike they are as numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_compress.measure.ranks import spearman, top_overlap

__all__ = ["Attributions"]


@dataclass(frozen=True)
class Attributions:
    """How much each part of the input counted for one class, in two models; `compare_attributions` makes it.

    Args:
        method: how they were computed.
        inputs: (examples, ...) what was given to the models: images, features or token ids.
        targets: (examples,) the class that was explained, the same for both models.
        dense: (examples, ...) attributions in the dense model; of tokens, one a token.
        compressed: the same shape, in the compressed model.
        kept: (examples, tokens) bool, False for padding, which is left out of the agreement; None is everything.
        gaps: for integrated gradients, how far each example's attributions, dense and compressed, are from summing up
            to what they explain, F(input) - F(baseline): that they do is their axiom of completeness.
        words: what the tokens or features are called, for the page.
    """

    method: str
    inputs: Tensor
    targets: Tensor
    dense: Tensor
    compressed: Tensor
    kept: Tensor | None = None
    gaps: tuple[Tensor, Tensor] | None = None
    words: Sequence[Sequence[str]] = ()

    def rank_agreement(self) -> list[float]:
        """Spearman's correlation of both attributions for each example; NaN where one model's are all equal."""
        return [spearman(one, other) for one, other in self._pairs()]

    def top_overlap(self, share: float = 0.1) -> list[float]:
        """Fraction of the parts with the largest attributions, by size, that are so in both models; by example."""
        return [top_overlap(one, other, share) for one, other in self._pairs()]

    def mean_rank_agreement(self) -> float | None:
        """Mean of `rank_agreement` over the examples that have one; None where none has."""
        return _mean(self.rank_agreement())

    def mean_top_overlap(self) -> float | None:
        """Mean of `top_overlap` over the examples."""
        return _mean(self.top_overlap())

    def json(self) -> dict[str, Any]:
        """Method, classes and agreement as plain values; the attributions themselves are not in it."""
        return {
            "method": self.method,
            "targets": self.targets.tolist(),
            "rank_agreement": [None if math.isnan(value) else value for value in self.rank_agreement()],
            "top_tenth_overlap": self.top_overlap(),
            "mean_rank_agreement": self.mean_rank_agreement(),
            "mean_top_tenth_overlap": self.mean_top_overlap(),
            "completeness_gap": None if self.gaps is None else [float(gap.abs().max()) for gap in self.gaps],
        }

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        sides = zip(self.dense.flatten(1), self.compressed.flatten(1), strict=True)
        if self.kept is None:
            return list(sides)
        return [(one[kept], other[kept]) for (one, other), kept in zip(sides, self.kept.flatten(1), strict=True)]


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None
