"""How honest a model's confidences are: the expected calibration error, and by how much compression moved it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["CalibrationGap", "calibration_error"]

BINS = 15  # as in the paper


def calibration_error(confidences: Tensor, correct: Tensor, bins: int = BINS) -> float:
    r"""Return the expected calibration error of one model's answers. Runs after an evaluation.

    ECE = \sum_b |B_b| / n |acc(B_b) - conf(B_b)|, where bin b holds the confidences in ((b-1)/bins, b/bins]
    (C. Guo, G. Pleiss, Y. Sun and K. Weinberger, "On Calibration of Modern Neural Networks", 2017, equation 3).

    Args:
        confidences: (examples,) the probability of the most likely class, in [0, 1].
        correct: (examples,) bool, whether that class is the label.
        bins: of equal width.

    >>> calibration_error(torch.tensor([0.9, 0.9, 0.6]), torch.tensor([True, False, True]))
    0.4
    """
    return float(_error(*_binned(confidences, correct, bins)))


class CalibrationGap(Metric):
    """The expected calibration error after compression less that before, each over all examples seen.

    A torchmetrics metric: `update` runs in each validation step with both models' logits, `compute` at the epoch's
    end; sums by bin are added over processes, so the number is that of one process. Above 0: compression has made the
    confidences less honest. `compute` gives a float64, NaN where nothing was seen.

    Args:
        bins: of equal width, as in `calibration_error`.
        kwargs: options of every torchmetrics metric, such as sync_on_compute.

    >>> metric = CalibrationGap()
    >>> metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
    >>> metric.compute()
    tensor(0.3808, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    counts: Tensor
    correct: Tensor
    confidence: Tensor

    def __init__(self, bins: int = BINS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if bins < 1:
            raise ValueError(f"expected at least one bin, got bins={bins}; the usual number is {BINS}")
        self.bins = bins
        for name, dtype in (("counts", torch.int64), ("correct", torch.int64), ("confidence", torch.float64)):
            self.add_state(name, torch.zeros((2, bins), dtype=dtype), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, labels: Tensor) -> None:
        """Take in a batch.

        Args:
            before: (..., classes) logits of the model before compression.
            after: the same shape, of the compressed model.
            labels: (...) integer classes; those below 0 (-100) are left out.

        Raises:
            ValueError: other shapes.
            TypeError: no logits.
        """
        check_judged(before, after, labels)
        kept = labels >= 0
        both = []
        for logits in (before, after):
            confidence, answer = logits[kept].double().softmax(dim=-1).max(dim=-1)
            both.append(_binned(confidence, (answer == labels[kept]) & ~confidence.isnan(), self.bins))
        counts, correct, confidence = (torch.stack(column) for column in zip(*both, strict=True))
        self.counts += counts
        self.correct += correct
        # Not in place: a Trainer in bf16-true has made the state bfloat16.
        self.confidence = self.confidence + confidence

    def compute(self) -> Tensor:
        """Return the gap so far."""
        before, after = (
            _error(self.counts[side], self.correct[side], self.confidence[side].double()) for side in (0, 1)
        )
        return after - before


def check_logits(before: Tensor, after: Tensor) -> None:
    """Check two models' logits. Runs before they are compared.

    Raises:
        ValueError: other shapes.
        TypeError: no logits.
    """
    if not before.is_floating_point() or not after.is_floating_point():
        raise TypeError(f"expected logits of a floating dtype, got {before.dtype} and {after.dtype}; not classes")
    if before.shape != after.shape or before.dim() == 0 or before.shape[-1] == 0:
        raise ValueError(
            f"expected two models' logits of one shape (..., classes), got {tuple(before.shape)} and "
            f"{tuple(after.shape)}; compare models with the same classes on the same examples"
        )


def check_judged(before: Tensor, after: Tensor, labels: Tensor) -> None:
    """Check two models' logits with labels. Runs before they are compared.

    Raises:
        ValueError: other shapes.
        TypeError: no logits, or labels that are no integers.
    """
    check_logits(before, after)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"expected integer labels, got {labels.dtype}; take the arg max of soft labels first")
    if labels.shape != before.shape[:-1]:
        raise ValueError(f"expected labels of shape {tuple(before.shape[:-1])}, got {tuple(labels.shape)}")


def _binned(confidences: Tensor, correct: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many, how many correct, and the sum of confidences, by bin; NaN is no confidence at all."""
    confidences = confidences.double().nan_to_num(nan=0.0)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidences.device)
    index = torch.bucketize(confidences, edges[1:-1])  # the first edge that is not below: ((b-1)/bins, b/bins]
    counts = torch.bincount(index, minlength=bins)
    hits = torch.bincount(index[correct.bool()], minlength=bins)
    sums = torch.zeros(bins, dtype=torch.float64, device=confidences.device).index_add_(0, index, confidences)
    return counts, hits, sums


def _error(counts: Tensor, correct: Tensor, confidence: Tensor) -> Tensor:
    return (correct - confidence).abs().sum() / counts.sum()
