"""Rounding that lets the weights still to be rounded make up for those that were: GPTQ (Frantar et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.errors import CompressError
from lightning_compress.pruning.elimination import inverse_factor
from lightning_compress.quantization.clipping import codes_of, largest_code, row_scale
from lightning_compress.quantization.scales import check_bits

__all__ = ["check_group", "error_feedback"]


def check_group(group: int | None, inputs: int, name: str = "weight") -> None:
    """Raise unless a group size is None or divides the number of inputs. Runs before anything is changed.

    Raises:
        ValueError: it does not; says in which layer.

    >>> check_group(4, 16)
    """
    if group is None:
        return
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ValueError(f"group is a number of inputs >= 1, or None for one scale an output, got {group!r}")
    if inputs % group:
        raise ValueError(
            f"group={group} does not divide the {inputs} inputs of '{name}'; take a divisor of {inputs}, or "
            f"exclude=['{name}']"
        )


def check_matrices(weight: Tensor, hessian: Tensor) -> None:
    """Raise unless a weight (groups, outputs, inputs) and its Hessian fit and are finite. Runs once a layer.

    Raises:
        ValueError: shapes that do not fit.
        CompressError: NaN or infinite numbers.
    """
    groups, _, inputs = weight.shape
    if hessian.shape != (groups, inputs, inputs):
        raise ValueError(
            f"a weight {tuple(weight.shape)} needs a Hessian {(groups, inputs, inputs)}, got {tuple(hessian.shape)}"
        )
    for what, values in (("weights", weight), ("Hessian of the inputs", hessian)):
        if not bool(torch.isfinite(values).all()):
            raise CompressError(f"the {what} hold NaN or infinite numbers")


def _grid(work: Tensor, hessian: Tensor, bits: int, clipped: bool) -> tuple[Tensor, Tensor]:
    """Return a scale for each row, and codes that are settled before: the largest weight's; NaN for all others.

    The largest weight would be moved by the feedback off the largest code, and the grid not be found again.
    """
    scale = row_scale(work, bits, hessian.diagonal(dim1=-2, dim2=-1).unsqueeze(-2), clipped)
    place = work.abs().argmax(-1, keepdim=True)
    largest = work.gather(-1, place).sign() * largest_code(bits)
    return scale, torch.full_like(work, float("nan")).scatter_(-1, place, largest)


def _settle(piece: Tensor, factor: Tensor, scale: Tensor, settled: Tensor, bits: int) -> Tensor:
    """Round a block of columns one by one, in place; return the errors that columns after the block take over."""
    errors = torch.zeros_like(piece)
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    for column in range(piece.shape[-1]):
        value = piece[..., column]
        codes, known = codes_of(value, scale[..., 0], bits), settled[..., column]
        rounded = torch.where(known.isnan(), codes, known) * scale[..., 0]
        error = (value - rounded) / diagonal[:, None, column]
        piece[..., column:] -= error.unsqueeze(-1) * factor[:, column, column:].unsqueeze(1)
        piece[..., column], errors[..., column] = rounded, error
    return errors


def _order(hessian: Tensor, group: int | None) -> Tensor:
    """Return the columns in the order in which they are rounded, (groups, inputs)."""
    curvature = hessian.diagonal(dim1=-2, dim2=-1)
    if group is None:
        return curvature.argsort(dim=-1, descending=True, stable=True)
    return torch.arange(curvature.shape[-1], device=hessian.device).expand_as(curvature)


def _rounded(
    work: Tensor, hessian: Tensor, bits: int, group: int | None, factor: Tensor, clipped: bool, block: int
) -> Tensor:
    """Round the columns in the order given, a block at a time, in place; return them."""
    pruned = work == 0
    scale, settled = _grid(work, hessian, bits, clipped)
    for begin in range(0, work.shape[-1], group or block):
        part = slice(begin, min(begin + (group or block), work.shape[-1]))
        piece, known = work[..., part].clone(), settled[..., part]
        if group is not None:
            scale, known = _grid(piece.masked_fill(pruned[..., part], 0.0), hessian[:, part, part], bits, clipped)
        known = known.masked_fill(pruned[..., part], 0.0)
        errors = _settle(piece, factor[:, part, part], scale, known, bits)
        work[..., part] = piece
        work[..., part.stop :] -= errors @ factor[:, part, part.stop :]
    return work


@torch.no_grad()
def error_feedback(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group: int | None = None,
    damping: float = 0.01,
    clipped: bool = True,
    block: int = 128,
) -> Tensor:
    """Round a weight column by column, each time moving what is left so that W x changes least; pure, once a layer.

    With U^T U the inverse Hessian, rounding w_j to q_j moves the weights after it in its row by
    -(w_j - q_j) / U_jj * U_j. Frantar et al. 2023, "GPTQ", algorithm 1. With one scale a row the columns with the
    largest inputs come first (the authors' `act_order`); with groups of inputs the order is theirs, and a group's scale
    is made when it is reached. Zeros stay zero, and each row (of each group) keeps a weight of the largest code, so
    that rounding by abs-max gives the result back.

    Args:
        weight: (outputs, inputs), or one matrix a group of a Conv: (groups, outputs, inputs); any floating dtype,
            computed in float32 or wider.
        hessian: (inputs, inputs) or (groups, inputs, inputs); the mean, or any multiple, of x x^T.
        bits: width of the code, sign included, 2 to 8.
        group: inputs that share a scale; None is one scale an output.
        damping: added to the Hessian's diagonal, by its mean; raised tenfold while it is not positive definite.
        clipped: search each scale for the least error (`row_scale`); False is abs-max.
        block: inputs at a time; changes the speed only.

    Returns:
        The weight on its grid, in the old one's shape and dtype.

    Raises:
        ValueError: bits out of range, shapes or a group that do not fit.
        CompressError: NaN or infinite numbers, or a Hessian that no damping makes positive definite.

    >>> same = torch.tensor([[1.0, 0.99], [0.99, 1.0]])  # two inputs that are nearly equal
    >>> error_feedback(torch.tensor([[3.0, 0.4, 0.4]]), torch.block_diag(torch.eye(1), same), 3, clipped=False)
    tensor([[3., 0., 1.]])
    """
    check_bits(bits)
    if weight.dim() == 2:
        return error_feedback(weight[None], hessian[None], bits, group, damping, clipped, block)[0]
    check_matrices(weight, hessian)
    check_group(group, weight.shape[-1])
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    hessian = hessian.to(work.dtype)
    order = _order(hessian, group)
    columns = order.unsqueeze(1)
    work = work.gather(-1, columns.expand_as(work))
    hessian = hessian.gather(-1, columns.expand_as(hessian)).gather(-2, columns.mT.expand_as(hessian))
    work = _rounded(work, hessian, bits, group, inverse_factor(hessian, damping), clipped, block)
    return torch.empty_like(work).scatter_(-1, columns.expand_as(work), work).to(weight.dtype)
