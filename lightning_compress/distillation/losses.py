"""Distillation losses: (student logits, teacher logits) to a scalar."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

__all__ = ["soft_targets"]


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Return T^2 * KL(teacher || student) of the softened distributions, averaged over examples. Runs in each step.

    Hinton, Vinyals & Dean 2015, section 2: T^2 keeps the gradient's size when T changes. The sum over classes is
    kept whole, so the value does not shrink with the number of classes.

    Args:
        student: (..., classes) logits, any floating dtype; computed in float32.
        teacher: the same shape.
        temperature: T > 0.

    Returns:
        () float32.

    >>> import torch
    >>> round(float(soft_targets(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), 1.0)), 4)
    0.3278
    """
    wanted = functional.log_softmax(teacher.float() / temperature, dim=-1)
    got = functional.log_softmax(student.float() / temperature, dim=-1)
    terms = functional.kl_div(got, wanted, reduction="none", log_target=True)
    divergence = terms.masked_fill(wanted == -math.inf, 0.0).sum(dim=-1)  # a class masked out: 0 log 0 = 0
    return divergence.mean() * temperature**2
