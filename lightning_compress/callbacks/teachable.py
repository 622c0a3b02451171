"""Under which strategies a teaching works: what it needs of a student that may be in parts."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.strategies import Strategy

from lightning_compress.callbacks.contract import ZERO
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.gradient_terms import GradientTerm
from lightning_compress.distillation.own_teachers import MeanTeacher

__all__ = ["strategies_of"]


def strategies_of(
    source: object, details: Details, terms: Sequence[object] = ()
) -> tuple[tuple[type[Strategy], ...], str]:
    """Return the sharding strategies that a teaching works under, and what would work instead. Runs at `setup`.

    Args:
        source: the teacher as the user gave it.
        details: of the callback.
        terms: of the callback, beside the logits'.

    >>> strategies_of(MeanTeacher(), Details())
    ((), 'teach with StartingModel()')
    """
    if isinstance(source, MeanTeacher):  # whole weights, after each step
        return (), "teach with StartingModel()"
    if details.balanced == "gradient":  # a sharded layer cannot be differentiated twice in a step
        return (), "balance by sizes: Details(balanced=True)"
    if any(isinstance(term, GradientTerm) for term in terms):  # nor have a second derivative
        return (), "teach layers instead: LayerTerm()"
    return ZERO, ""
