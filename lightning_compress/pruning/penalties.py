"""Penalties: differentiable functions from a weight to one number that falls as the weight gets sparser.

`SparsityRegularization` adds them up over layers; any function like these is a penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_compress.pruning.targets import described_function

__all__ = ["Penalty", "group_hoyer_square", "group_lasso", "hoyer_square", "l1", "penalties_of"]

Penalty = Callable[[Tensor], Tensor]


def l1(weight: Tensor) -> Tensor:
    """Return sum |w|: every weight is pulled towards 0 by the same force. Runs in each training step.

    Tibshirani 1996, "Regression Shrinkage and Selection via the Lasso"; Han et al. 2015, section 3.1.

    >>> l1(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    tensor(7.)
    """
    return weight.abs().sum()


def group_lasso(weight: Tensor) -> Tensor:
    """Return the L2 norms of the rows of dimension 0, times the root of a row's size: rows go to 0 as a whole.

    Runs in each training step. Yuan & Lin 2006, "Model Selection and Estimation in Regression with Grouped
    Variables", equation 2.1; Wen et al. 2016, "Learning Structured Sparsity", equation 2.

    Args:
        weight: (rows, ...); a row is an output of a Linear or Conv, an input channel of a transposed Conv.

    >>> group_lasso(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))  # sqrt(2) * (5 + 0)
    tensor(7.0711)
    """
    rows = weight.flatten(1)
    return _norms(rows).sum() * math.sqrt(rows.shape[1])


def hoyer_square(weight: Tensor) -> Tensor:
    """Return (sum |w|)^2 / sum w^2, from 1 (one weight is left) to the number of weights (all are alike).

    It does not change when all weights are scaled, so it moves small ones to 0 and leaves large ones large; 0 for a
    weight of zeros. Runs in each training step. Yang et al. 2020, "DeepHoyer", equation 4.

    >>> hoyer_square(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))  # 49 / 25
    tensor(1.9600)
    """
    smallest = torch.finfo(weight.dtype).tiny
    return weight.abs().sum().square() / weight.square().sum().clamp_min(smallest)


def group_hoyer_square(weight: Tensor) -> Tensor:
    """Return `hoyer_square` of the L2 norms of the rows of dimension 0, from 1 to the number of rows.

    Runs in each training step. Yang et al. 2020, "DeepHoyer", equation 6.

    Args:
        weight: (rows, ...), as in `group_lasso`.

    >>> group_hoyer_square(torch.tensor([[3.0, -4.0], [0.0, 5.0]]))  # (5 + 5)^2 / (25 + 25)
    tensor(2.)
    """
    return hoyer_square(_norms(weight.flatten(1)))


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def penalties_of(term: Penalty, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the term of each weight, computed in float32 or wider. Runs in each training step.

    Raises:
        ValueError: the term gives no scalar.

    >>> penalties_of(l1, {"a": torch.ones(2, 2, dtype=torch.bfloat16), "b": -torch.ones(1)})
    [tensor(4.), tensor(1.)]
    """
    values = [term(weight.to(torch.promote_types(weight.dtype, torch.float32))) for weight in weights.values()]
    for name, value in zip(weights, values, strict=True):
        if not isinstance(value, Tensor) or value.dim() > 0:
            raise ValueError(
                f"term {described_function(term)} must return a tensor without dimensions for each weight, got "
                f"{tuple(value.shape) if isinstance(value, Tensor) else value!r} for '{name}'; end it with .sum()"
            )
    return values
