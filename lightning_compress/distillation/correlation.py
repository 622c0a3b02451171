"""Logit losses that do not see the size of a logit: correlation (DIST) and standardized logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.distillation.comparing import (
    check_temperature,
    kept_mean,
    paired_logits,
    possible,
    unit,
    widened,
)
from lightning_compress.distillation.losses import soft_targets

__all__ = ["Standardized", "dist", "standardize"]


def dist(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    inter: float = 1.0,
    intra: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return T^2 * (inter * distance of each example's classes + intra * of each class's examples). Runs in each step.

    Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (DIST), section 4: the distance is 1 minus
    Pearson's correlation of the probabilities. The mean over examples (inter) does not depend on the batch; the mean
    over classes (intra) compares the examples of this batch, so shards do not average to the whole. Where one of the
    two does not vary, 1/2 stands for the undefined correlation, without gradient; where neither does, 0.

    Args:
        student: (..., classes) logits.
        teacher: the same shape. A class that is -inf in both is in no mean.
        temperature: T > 0.
        inter: weight of the relation between classes, at least 0 (the paper's beta).
        intra: weight of the relation within a class, at least 0 (the paper's gamma).
        mask: (...) what counts.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes, or a temperature that is not positive.

    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    >>> float(dist(logits, logits)), float(dist(logits, -logits)) > 1
    (0.0, True)
    """
    check_temperature(temperature)
    student, teacher = paired_logits(student, teacher, mask)
    present = possible(student, teacher)
    if mask is not None:
        present = present & mask.bool().unsqueeze(-1)
    present = present.reshape(-1, student.shape[-1])
    got, wanted = (
        functional.softmax(value / temperature, dim=-1).reshape(present.shape) for value in (student, teacher)
    )
    between, within = (
        (_centred(got, present, dim) - _centred(wanted, present, dim)).square().sum(dim=dim) / 2 for dim in (1, 0)
    )
    loss = inter * kept_mean(between, present.any(dim=1)) + intra * kept_mean(within, present.any(dim=0))
    return loss * temperature**2


def standardize(logits: Tensor) -> Tensor:
    """Return (logits - mean) / standard deviation over the classes. Runs in each step.

    Sun et al. 2024, "Logit Standardization in Knowledge Distillation", section 4, algorithm 1 (its division by T is
    the loss's own). Classes that are -inf stay so and do not count; logits that are all alike become zeros.

    Args:
        logits: (..., classes), any floating dtype.

    Returns:
        (..., classes) float32.

    >>> standardize(torch.tensor([[1.0, 3.0, -torch.inf]]))
    tensor([[-1., 1., -inf]])
    """
    logits, _ = widened(logits, logits)
    present = logits != -math.inf
    count = present.sum(dim=-1, keepdim=True)
    return (_centred(logits, present, -1) * count.to(logits.dtype).sqrt()).masked_fill(~present, -math.inf)


@dataclass(frozen=True)
class Standardized:
    """A logit loss of standardized logits: the student need not learn the teacher's scale. Runs in each step.

    Args:
        loss: (student logits, teacher logits, ...) -> scalar. The paper takes soft targets at T = 2 with a weight of 9.

    >>> logits = torch.tensor([[1.0, 2.0, 4.0]])
    >>> round(float(Standardized()(logits, 3 * logits + 1, 2.0)), 6)
    0.0
    """

    loss: Callable[..., Tensor] = soft_targets

    def __call__(
        self, student: Tensor, teacher: Tensor, *args: Any, mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Return the loss of the standardized logits; what else is given goes to it."""
        student, teacher = (standardize(value) for value in paired_logits(student, teacher, mask))
        return self.loss(student, teacher, *args, **kwargs, **({} if mask is None else {"mask": mask}))


def _centred(values: Tensor, present: Tensor, dim: int) -> Tensor:
    """Return values less their mean along `dim`, at length 1; zeros where they vary by no more than rounding."""
    values = values.masked_fill(~present, 0.0)
    mean = values.sum(dim=dim, keepdim=True) / present.sum(dim=dim, keepdim=True).clamp_min(1)
    rounding = 4 * torch.finfo(values.dtype).eps * torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return unit((values - mean).masked_fill(~present, 0.0), dim, rounding.detach())
