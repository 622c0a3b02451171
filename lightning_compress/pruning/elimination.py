"""The factor that second-order methods eliminate by: what settling one input's weights does to those after it.

Pruning (`reconstruction.py`) settles them at zero, error feedback (`quantization/error_feedback.py`) on a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.errors import CompressError

__all__ = ["inverse_factor"]

UNSEEN = 1e-12  # curvature, by the mean one, of an input that was always zero: its weights cost nothing and go first
ATTEMPTS = 4


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return upper triangular U with U^T U the inverse of the damped Hessian, by its mean diagonal; pure.

    Row j of U over its diagonal is what OBS does to columns >= j once those before j are settled. From the Cholesky
    factor of the Hessian in reversed order, so that no inverse is made and factorized once more.
    Frantar & Alistarh 2023 ("SparseGPT"), section 3.3, and Frantar et al. 2023 ("GPTQ"), section 3.3, step 3.

    Args:
        hessian: (groups, inputs, inputs), float32 or float64; any multiple of the mean of x x^T.
        damping: added to the diagonal, by its mean; raised tenfold while that is not positive definite.

    Raises:
        CompressError: no damping makes it positive definite.

    >>> factor = inverse_factor(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), 0.0)
    >>> factor.mT @ factor  # of the Hessian over its mean diagonal
    tensor([[[ 1.3333, -0.6667],
             [-0.6667,  1.3333]]])
    """
    curvature = hessian.diagonal(dim1=-2, dim2=-1)
    mean, unseen = curvature.mean(), curvature <= 0
    normal = hessian / torch.where(mean > 0, mean, torch.ones_like(mean))
    for attempt in range(ATTEMPTS):
        extra = damping if attempt == 0 else max(damping, 0.001) * 10**attempt
        damped = normal.flip(-2, -1)
        damped.diagonal(dim1=-2, dim2=-1).add_(torch.full_like(curvature, extra).masked_fill_(unseen, UNSEEN).flip(-1))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            unit = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False)
            return inverse.flip(-2, -1)
    raise CompressError(
        f"the Hessian of the inputs is not positive definite even with damping {extra:g} of its mean diagonal; "
        f"calibrate with more inputs, or without those that are huge beside the others"
    )
