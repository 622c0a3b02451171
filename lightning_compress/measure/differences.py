"""What changed between two models' answers: which examples flipped, and whom it hurt."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_compress.distillation.comparing import divergence
from lightning_compress.measure.calibration import calibration_error, check_judged, check_logits

__all__ = ["Differences", "Flip", "SliceRow", "compare_predictions", "mcnemar_p"]

CHUNK = 2**22  # elements that are in float64 at one time
NO_CLASS = -1  # what logits with NaN among them say


@dataclass(frozen=True)
class Flip:
    """One example whose most likely class is another one now.

    Both confidences are of the class before: how sure the model was of it, and how sure it is still. `label` is None
    where no labels were given; class -1 stands for logits with NaN among them.
    """

    index: int
    label: int | None
    before: int
    after: int
    confidence_before: float
    confidence_after: float


@dataclass(frozen=True)
class SliceRow:
    """Accuracy of some of the examples, before and after; None where there are none.

    `p_value` is McNemar's exact two-sided one (`mcnemar_p`), not corrected for how many rows are looked at: of 1000
    classes that did not change, up to 50 are below 0.05.
    """

    name: str
    count: int
    accuracy_before: float | None
    accuracy_after: float | None
    delta: float | None
    p_value: float


@dataclass(frozen=True)
class Differences:
    """How the answers of two models differ on the same examples; `compare_predictions` makes it.

    `agreement` is the share of examples with the same most likely class, `kl_nats` the mean KL(before || after),
    `ece_*` the expected calibration errors (`calibration_error`). What needs labels is None or empty without them.
    `flips` begin with the one that lost most confidence in its class.
    """

    count: int
    agreement: float
    kl_nats: float
    accuracy_before: float | None
    accuracy_after: float | None
    ece_before: float | None
    ece_after: float | None
    right_to_wrong: int | None
    wrong_to_right: int | None
    p_value: float | None
    flips: tuple[Flip, ...]
    classes: tuple[SliceRow, ...]
    slices: tuple[SliceRow, ...]

    def worst_slices(self, k: int = 5) -> tuple[SliceRow, ...]:
        """Return the `k` rows, of classes and of slices, whose accuracy fell most; those of equal delta by p value."""
        rows = [row for row in (*self.classes, *self.slices) if row.delta is not None]
        return tuple(sorted(rows, key=lambda row: (row.delta, row.p_value, row.name))[:k])

    def json(self) -> dict[str, Any]:
        """Return it as what json.dumps takes; an infinite or undefined divergence is None there."""
        return {**asdict(self), "kl_nats": self.kl_nats if math.isfinite(self.kl_nats) else None}


@dataclass(frozen=True)
class _Answers:
    """Per example: both most likely classes, their probabilities, that of the class before after, and the KL."""

    before: Tensor
    after: Tensor
    confidence_before: Tensor
    confidence_after: Tensor
    kept_confidence: Tensor
    kl_nats: Tensor


@torch.no_grad()
def compare_predictions(
    before_logits: Tensor,
    after_logits: Tensor,
    labels: Tensor | None = None,
    slices: Mapping[str, Tensor] | None = None,
) -> Differences:
    """Compare what two models answer on the same examples. Runs after training, on logits that were kept.

    Args:
        before_logits: (..., classes) of the model before compression, any floating dtype.
        after_logits: the same shape, of the compressed model.
        labels: (...) integer classes; examples with a label below 0 (-100) are left out of everything.
        slices: name to (...) bool, which examples are of that slice; slices may overlap. They need labels.

    Raises:
        TypeError: no logits, labels that are no integers, slices that are not bool.
        ValueError: other shapes, a label that is no class, slices without labels, or no examples.

    >>> before, after = torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    >>> found = compare_predictions(before, after, torch.tensor([0, 1]))
    >>> found.agreement, found.right_to_wrong, found.worst_slices(1)[0].name
    (0.5, 1, 'class 0')
    """
    _check(before_logits, after_logits, labels, slices or {})
    kept = torch.arange(before_logits[..., 0].numel(), device=before_logits.device)
    if labels is not None:
        labels = labels.to(before_logits.device).flatten()
        kept = kept[labels >= 0]
        labels = labels[kept]
    if len(kept) == 0:
        raise ValueError("expected examples to compare, got none; labels below 0 are left out")
    classes = before_logits.shape[-1]
    answers = _answers(before_logits.reshape(-1, classes), after_logits.reshape(-1, classes), kept)
    masks = {name: mask.to(kept.device).flatten()[kept] for name, mask in (slices or {}).items()}
    same = (answers.before == answers.after) & (answers.before != NO_CLASS)
    return Differences(
        count=len(kept),
        agreement=_mean(same),
        kl_nats=float(answers.kl_nats.mean()),
        **_judged(answers, labels),
        flips=_flips(answers, kept, labels),
        classes=() if labels is None else _class_rows(answers, labels, classes),
        slices=() if labels is None else tuple(_row(name, answers, labels, mask) for name, mask in masks.items()),
    )


def mcnemar_p(right_to_wrong: int, wrong_to_right: int) -> float:
    r"""Return the exact two-sided p value that flips this uneven, or more so, are chance.

    Of n examples that only one of two models gets right, each model has half by chance:
    p = min(1, 2 \sum_{i <= min} C(n, i) / 2^n) (Q. McNemar, "Note on the sampling error of the difference between
    correlated proportions or percentages", 1947; the exact form is the binomial's). Without flips it is 1.

    >>> mcnemar_p(5, 0)
    0.0625
    """
    n, least = right_to_wrong + wrong_to_right, min(right_to_wrong, wrong_to_right)
    share = total = 1.0  # of the largest term, C(n, least): those below it, until they add nothing
    for i in range(least, 0, -1):
        share *= i / (n - i + 1)
        if share < 1e-17 * total:
            break
        total += share
    return min(1.0, 2 * _binomial(n, least) * total)


def _binomial(n: int, k: int) -> float:
    """C(n, k) / 2^n: exact to a float's precision, or to nine digits where the integers would take seconds."""
    if n <= 4096:
        return math.comb(n, k) / (1 << n)
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))


def _answers(before: Tensor, after: Tensor, kept: Tensor) -> _Answers:
    rows = max(1, CHUNK // before.shape[-1])
    parts = [_answers_of(before[some].double(), after[some].double()) for some in torch.split(kept, rows)]
    return _Answers(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _answers_of(before: Tensor, after: Tensor) -> tuple[Tensor, ...]:
    one, other = before.log_softmax(dim=-1), after.log_softmax(dim=-1)
    (top, first), (its_top, second) = one.max(dim=-1), other.max(dim=-1)
    lost = other.gather(-1, first[:, None])[:, 0]
    classes = [where.masked_fill(best.isnan(), NO_CLASS) for where, best in ((first, top), (second, its_top))]
    # NaN is no confidence at all
    confidences = [value.exp().nan_to_num(nan=0.0) for value in (top, its_top, lost)]
    return (*classes, *confidences, divergence(one, other))


def _judged(answers: _Answers, labels: Tensor | None) -> dict[str, Any]:
    """Return all numbers over the whole that need labels."""
    names = (
        "accuracy_before",
        "accuracy_after",
        "ece_before",
        "ece_after",
        "right_to_wrong",
        "wrong_to_right",
        "p_value",
    )
    if labels is None:
        return dict.fromkeys(names)
    right, still = answers.before == labels, answers.after == labels
    errors = (
        calibration_error(answers.confidence_before, right),
        calibration_error(answers.confidence_after, still),
    )
    lost, won = _flipped(right, still)
    return dict(zip(names, (_mean(right), _mean(still), *errors, lost, won, mcnemar_p(lost, won)), strict=True))


def _flips(answers: _Answers, kept: Tensor, labels: Tensor | None) -> tuple[Flip, ...]:
    changed = (answers.before != answers.after).nonzero()[:, 0]
    lost = (answers.confidence_before - answers.kept_confidence)[changed]
    changed = changed[lost.argsort(descending=True, stable=True)]
    columns: list[Iterable[Any]] = [
        kept[changed].tolist(),
        [None] * len(changed) if labels is None else labels[changed].tolist(),
        *(values[changed].tolist() for values in (answers.before, answers.after)),
        *(values[changed].tolist() for values in (answers.confidence_before, answers.kept_confidence)),
    ]
    return tuple(Flip(*values) for values in zip(*columns, strict=True))


def _class_rows(answers: _Answers, labels: Tensor, classes: int) -> tuple[SliceRow, ...]:
    there = [label for label in range(classes) if bool((labels == label).any())]
    return tuple(_row(f"class {label}", answers, labels, labels == label) for label in there)


def _row(name: str, answers: _Answers, labels: Tensor, mask: Tensor) -> SliceRow:
    right, still = (answers.before == labels)[mask], (answers.after == labels)[mask]
    p_value = mcnemar_p(*_flipped(right, still))
    if len(right) == 0:
        return SliceRow(name, 0, None, None, None, p_value)
    delta = (int(still.sum()) - int(right.sum())) / len(right)
    return SliceRow(name, len(right), _mean(right), _mean(still), delta, p_value)


def _flipped(right: Tensor, still: Tensor) -> tuple[int, int]:
    return int((right & ~still).sum()), int((~right & still).sum())


def _mean(mask: Tensor) -> float:
    return int(mask.sum()) / len(mask)


def _check(before: Tensor, after: Tensor, labels: Tensor | None, slices: Mapping[str, Tensor]) -> None:
    if labels is not None:
        check_judged(before, after, labels)
        if labels.numel() and int(labels.max()) >= before.shape[-1]:
            raise ValueError(
                f"expected labels below {before.shape[-1]}, the number of classes, got {int(labels.max())}"
            )
    else:
        check_logits(before, after)
        if slices:
            raise ValueError(f"the accuracy of slice '{next(iter(slices))}' needs labels, got none; pass labels=")
    for name, mask in slices.items():
        if mask.dtype != torch.bool:
            raise TypeError(f"expected slice '{name}' to be bool, got {mask.dtype}; write it as a comparison")
        if mask.shape != before.shape[:-1]:
            raise ValueError(f"expected slice '{name}' of shape {tuple(before.shape[:-1])}, got {tuple(mask.shape)}")
