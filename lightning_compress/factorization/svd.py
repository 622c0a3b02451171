"""Truncated singular value decompositions of a matrix: plain, activation-weighted, Fisher-weighted."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "activation_weighted_svd",
    "fisher_weighted_svd",
    "rank_for_energy",
    "rank_that_saves",
    "truncated_svd",
    "whitened",
]


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The closest product of rank ``rank`` in Frobenius norm, as (left, right) with weight ~ left @ right.

    ``weight`` is (outputs, inputs); ``left`` is (outputs, rank), ``right`` (rank, inputs), in the
    weight's dtype. Both factors carry the square root of the singular values (Eckart and Young, 1936).
    Raises ValueError for a rank below 1 or above full.

    >>> left, right = truncated_svd(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), rank=1)
    >>> [[round(abs(x), 4) for x in row] for row in (left @ right).tolist()]
    [[2.0, 0.0], [0.0, 0.0]]
    """
    _check_rank(weight, rank)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    root = values[:rank].sqrt()
    return (left[:, :rank] * root).to(weight.dtype), (root[:, None] * right[:rank]).to(weight.dtype)


def activation_weighted_svd(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of rank ``rank`` with the least mean squared error of the layer's outputs.

    ``moment`` is the inputs' second moment E[x x^T], (inputs, inputs). The error is
    tr((W - LR) M (W - LR)^T), minimal for the truncated SVD of W M^(1/2) (SVD-LLM, Wang 2024,
    section 3.1, with the symmetric root in place of the Cholesky factor, so that M may be singular:
    a direction that no input has costs nothing). Raises ValueError for a moment of another shape,
    one with values that are not finite, and a rank below 1 or above full.
    """
    inputs = weight.shape[1]
    if moment.shape != (inputs, inputs):
        raise ValueError(f"expected a moment of shape {(inputs, inputs)}, got {tuple(moment.shape)}")
    if not moment.isfinite().all():
        raise ValueError("expected a finite moment, got NaN or infinity: look at the calibration batches")
    root, directions = _root(moment)
    inverse = torch.where(root > 0, 1 / root, 0.0)
    left, right = truncated_svd(whitened(weight, moment), rank)
    unscaled = right @ (directions * inverse) @ directions.T
    return left.to(weight.dtype), unscaled.to(weight.dtype)


def whitened(weight: Tensor, moment: Tensor) -> Tensor:
    """The weight times the symmetric root of its inputs' second moment, float64: its squares are those of outputs.

    >>> whitened(torch.tensor([[1.0, 1.0]]), torch.diag(torch.tensor([4.0, 0.0])))
    tensor([[2., 0.]], dtype=torch.float64)
    """
    root, directions = _root(moment)
    return weight.double() @ (directions * root) @ directions.T


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Roots of the eigenvalues, 0 for those below what rounding leaves, and the eigenvectors."""
    powers, directions = torch.linalg.eigh(moment.double())
    floor = powers[-1].clamp(min=0) * len(moment) * torch.finfo(torch.float64).eps
    return torch.where(powers > floor, powers, 0.0).sqrt(), directions


def fisher_weighted_svd(weight: Tensor, fisher: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The product of rank ``rank`` with the least error weighted by each output row's Fisher information.

    ``fisher`` has the weight's shape: mean squared gradients, not negative. Its row sums weigh the
    rows (FWSVD, Hsu 2022, section 3.2; the paper stores the weight as (inputs, outputs)). A row
    whose sum is 0 becomes zeros. Raises ValueError for another shape, a negative or non-finite value, and a rank
    below 1 or above full.
    """
    if fisher.shape != weight.shape:
        raise ValueError(f"expected Fisher information of shape {tuple(weight.shape)}, got {tuple(fisher.shape)}")
    if not fisher.isfinite().all() or (fisher < 0).any():
        raise ValueError("expected finite Fisher information of at least 0: squared gradients")
    root = fisher.double().sum(1, keepdim=True).sqrt()
    left, right = truncated_svd(root * weight.double(), rank)
    return (left * torch.where(root > 0, 1 / root, 0.0)).to(weight.dtype), right.to(weight.dtype)


def rank_for_energy(weight: Tensor, energy: float) -> int:
    """The least rank that keeps the fraction ``energy`` in (0, 1] of the sum of squared singular values.

    >>> rank_for_energy(torch.diag(torch.tensor([3.0, 1.0])), 0.9)
    1
    """
    if not 0 < energy <= 1:
        raise ValueError(f"expected an energy in (0, 1], got {energy}")
    kept = torch.linalg.svdvals(weight.double()).square().cumsum(0)
    below = int((kept < energy * kept[-1]).sum())
    return min(below + 1, min(weight.shape))


def rank_that_saves(outputs: int, inputs: int) -> int:
    """The largest rank whose two factors hold fewer weights, so fewer MACs and bytes; 0 where none does.

    >>> rank_that_saves(100, 100), rank_that_saves(1, 10)
    (49, 0)
    """
    return (outputs * inputs - 1) // (outputs + inputs)


def _check_rank(weight: Tensor, rank: int) -> None:
    full = min(weight.shape)
    if not 1 <= rank <= full:
        raise ValueError(f"expected a rank from 1 to {full}, full for {tuple(weight.shape)}, got {rank}")
