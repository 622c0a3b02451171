"""Singular value decompositions of a matrix: plain, activation-weighted, Fisher-weighted.

Each is a function whose parameters are named after what it needs, and gives left, values and right: what is left out
of ``left[:, :r] @ right[:r]`` adds the squares of the other values to the error that the function is named after.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Decomposition",
    "activation_weighted_svd",
    "fisher_weighted_svd",
    "svd",
]


class Decomposition(NamedTuple):
    """``left @ right`` is the matrix, term by term in falling order of what each is worth; float64.

    Args:
        left: (outputs, terms), the root of the values in it.
        values: (terms,), singular values.
        right: (terms, inputs), the root of the values in it.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def truncated(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the first terms: (outputs, rank) and (rank, inputs)."""
        return self.left[:, :rank], self.right[:rank]


def svd(weight: Tensor) -> Decomposition:
    """Decompose by the error of the weight: truncated, the closest product in Frobenius norm. Runs once a layer.

    ``weight`` is (outputs, inputs) of any floating dtype. Both factors carry the root of the singular values, and the
    largest entry of each column of ``left`` is positive, so that rounding of the weight does not flip signs (Eckart
    and Young, 1936).

    >>> left, right = svd(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).truncated(1)
    >>> [[round(x, 4) for x in row] for row in (left @ right).tolist()]
    [[2.0, 0.0], [0.0, 0.0]]
    """
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    signs = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    root = values.sqrt() * signs
    return Decomposition(left * root, values, root[0][:, None] * right)


def activation_weighted_svd(weight: Tensor, moment: Tensor, damping: float = 0.01) -> Decomposition:
    """Decompose by the mean squared error of the layer's outputs. Runs once a layer.

    ``moment`` is the inputs' second moment E[x x^T], (inputs, inputs), up to a factor. The error of a product P is
    tr((W - P) M (W - P)^T), least for the truncated decomposition of W M^(1/2) (SVD-LLM, Wang 2024, section 3.1, with
    the symmetric root in place of the Cholesky factor, so that M may be singular: a direction that no input has costs
    nothing). ``damping``, times the moment's mean diagonal, is added to its diagonal: a moment of a few batches knows
    little of rare directions. Raises ValueError for a moment of another shape, or one with values that are not finite.
    """
    inputs = weight.shape[1]
    if moment.shape != (inputs, inputs):
        raise ValueError(f"expected a moment of shape {(inputs, inputs)}, got {tuple(moment.shape)}")
    if not moment.isfinite().all():
        raise ValueError("expected a finite moment, got NaN or infinity: look at the calibration batches")
    diagonal = moment.diagonal().double()
    root, directions = _root(moment.double() + torch.diag(damping * diagonal.mean().expand_as(diagonal)))
    inverse = torch.where(root > 0, 1 / root, 0.0)
    left, values, right = svd(weight.double() @ (directions * root) @ directions.T)
    return Decomposition(left, values, right @ (directions * inverse) @ directions.T)


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Roots of the eigenvalues, 0 for those below what rounding leaves, and the eigenvectors."""
    powers, directions = torch.linalg.eigh(moment.double())
    floor = powers[-1].clamp(min=0) * len(moment) * torch.finfo(torch.float64).eps
    return torch.where(powers > floor, powers, 0.0).sqrt(), directions


def fisher_weighted_svd(weight: Tensor, fisher: Tensor) -> Decomposition:
    """Decompose by the error weighted by each output row's Fisher information. Runs once a layer.

    ``fisher`` has the weight's shape: mean squared gradients, not negative. Its row sums weigh the rows (FWSVD, Hsu
    2022, section 3.2; the paper stores the weight as (inputs, outputs)). A row whose sum is 0 becomes zeros. Raises
    ValueError for another shape, a negative or non-finite value.
    """
    if fisher.shape != weight.shape:
        raise ValueError(f"expected Fisher information of shape {tuple(weight.shape)}, got {tuple(fisher.shape)}")
    if not fisher.isfinite().all() or (fisher < 0).any():
        raise ValueError("expected finite Fisher information of at least 0: squared gradients")
    root = fisher.double().sum(1, keepdim=True).sqrt()
    left, values, right = svd(root * weight.double())
    return Decomposition(left * torch.where(root > 0, 1 / root, 0.0), values, right)
