"""How alike two models are: metrics between their logits, to measure a student, pruned or quantized model by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_compress.distillation.comparing import check_mask, divergence
from lightning_compress.measure.calibration import check_judged, check_logits

__all__ = ["Agreement", "Flips", "MeanDivergence"]

CHUNK = 2**24  # elements that are in float64 at one time


class Agreement(Metric):
    """The share of examples, or tokens, for which two models find the same class most likely.

    A torchmetrics metric: `update` runs in each validation step, `compute` at the epoch's end; counts are exact over
    batches of any size and summed over processes. Of classes that are equally likely the first counts, and logits with
    NaN among them agree with nothing. `compute` gives a float64 in [0, 1], NaN where nothing was kept.

    Args:
        kwargs: options of every torchmetrics metric, such as sync_on_compute.

    >>> metric = Agreement()
    >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[9.0, 0.0], [1.0, 0.0]]))
    >>> metric.compute()
    tensor(0.5000, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    agreeing: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("agreeing", "total"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor, mask: Tensor | None = None) -> None:
        """Take in a batch.

        Args:
            first: (..., classes) logits, any floating dtype.
            second: the same shape.
            mask: (...) bool or 0 and 1, what counts (`kept_tokens` makes it); None is everything.

        Raises:
            ValueError: other shapes.
            TypeError: no logits.
        """
        kept = _kept(first, second, mask)
        (one, top), (other, its_top) = first.max(dim=-1), second.max(dim=-1)
        self.agreeing += ((top == its_top) & ~one.isnan() & ~other.isnan() & kept).sum()
        self.total += kept.sum()

    def compute(self) -> Tensor:
        """Return the share so far."""
        return self.agreeing.double() / self.total


class MeanDivergence(Metric):
    """The mean KL(first || second) of two models' distributions over examples, or tokens, in nats.

    A torchmetrics metric, as `Agreement` is. Take the teacher, or the model before compression, as the first. All is
    computed and summed in float64, for models so alike that float32 would only show its own rounding; MPS has none.
    A class that the first rules out adds nothing; one that only the second rules out makes the mean infinite.

    Args:
        kwargs: options of every torchmetrics metric, such as sync_on_compute.

    >>> metric = MeanDivergence()
    >>> metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    >>> metric.compute()
    tensor(0.3278, dtype=torch.float64)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    divergence: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("divergence", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, first: Tensor, second: Tensor, mask: Tensor | None = None) -> None:
        """Take in a batch; arguments and errors are those of `Agreement.update`."""
        kept = _kept(first, second, mask).flatten()
        rows = max(1, CHUNK // first.shape[-1])
        one, other = (torch.split(logits.reshape(-1, logits.shape[-1]), rows) for logits in (first, second))
        for mine, its, counted in zip(one, other, torch.split(kept, rows), strict=True):
            each = divergence(mine.double().log_softmax(dim=-1), its.double().log_softmax(dim=-1))
            # What is left out may be NaN. Not in place: a Trainer in bf16-true has made the state bfloat16.
            self.divergence = self.divergence + each.masked_fill(~counted, 0.0).sum()
        self.total += kept.sum()

    def compute(self) -> Tensor:
        """Return the mean so far."""
        return self.divergence / self.total


class Flips(Metric):
    """How many examples only one of two models gets right: what their accuracies' difference is made of.

    A torchmetrics metric, as `Agreement` is; counts are summed over processes. `compute` gives a dict of int64
    tensors, `right_to_wrong` and `wrong_to_right`, which `self.log_dict` takes. Logits with NaN among them are wrong.

    Args:
        kwargs: options of every torchmetrics metric, such as sync_on_compute.

    >>> metric = Flips()
    >>> metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    >>> metric.compute()
    {'right_to_wrong': tensor(1), 'wrong_to_right': tensor(0)}
    """

    full_state_update = False
    is_differentiable = False
    right_to_wrong: Tensor
    wrong_to_right: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("right_to_wrong", "wrong_to_right"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, labels: Tensor) -> None:
        """Take in a batch; arguments and errors are those of `CalibrationGap.update`."""
        check_judged(before, after, labels)
        (one, first), (other, second) = before.max(dim=-1), after.max(dim=-1)
        right, still = (first == labels) & ~one.isnan(), (second == labels) & ~other.isnan()
        self.right_to_wrong += (right & ~still).sum()  # a label below 0 is nobody's answer
        self.wrong_to_right += (~right & still).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the counts so far."""
        return {"right_to_wrong": self.right_to_wrong, "wrong_to_right": self.wrong_to_right}


def _kept(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    """Check a batch; returns what counts, as bool, over all dimensions but the classes."""
    check_logits(first, second)
    if mask is None:
        return torch.ones(first.shape[:-1], dtype=torch.bool, device=first.device)
    check_mask(mask, first.shape[:-1])
    return mask.bool()
