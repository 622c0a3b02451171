"""Criteria: a weight to non-negative scores, higher = keep. A criterion is any `Callable[[Tensor], Tensor]`."""

from __future__ import annotations

from torch import Tensor

__all__ = ["magnitude"]


def magnitude(weight: Tensor) -> Tensor:
    """Score each weight by |w|. Runs at each mask update.

    Han et al. 2015, "Learning both Weights and Connections"; Zhu & Gupta 2017.

    >>> import torch
    >>> magnitude(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return weight.detach().abs()
