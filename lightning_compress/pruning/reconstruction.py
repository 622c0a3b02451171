"""One-shot pruning that lets the remaining weights make up for those that go: layer-wise reconstruction.

Optimal Brain Surgeon (Hassibi & Stork 1993) on a layer's own output error, in the order and with the one factorized
inverse Hessian of SparseGPT (Frantar & Alistarh 2023, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError, NothingToCompress
from lightning_compress.pruning.calibration import evaluating, in_forward_order, run
from lightning_compress.pruning.elimination import inverse_factor
from lightning_compress.pruning.hessians import RECONSTRUCTIBLE, Hessian, as_matrices, as_weight, watching
from lightning_compress.select import Pattern, select_weights
from lightning_compress.window import check_sparsity

__all__ = ["check_groups", "output_error", "reconstruct", "reconstruct_layer", "reconstruct_weight", "share_zeros"]

# Maths


def _lowest(scores: Tensor, pattern: tuple[int, int] | None, count: int) -> Tensor:
    """Return a mask that drops the lowest scores: `count` of all, or `of - keep` in each row."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    if pattern is None:
        kept.view(-1)[scores.flatten().sort(stable=True).indices[:count]] = False
        return kept
    return kept.scatter_(-1, scores.sort(dim=-1, stable=True).indices[..., : pattern[1] - pattern[0]], False)


def _settle(work: Tensor, factor: Tensor, pattern: tuple[int, int] | None, count: int) -> tuple[Tensor, Tensor]:
    """Choose what goes in a block of columns, and eliminate it column by column, in place.

    Args:
        work: the weights, (groups, outputs, columns).
        factor: the block of `inverse_factor` on the diagonal.
        pattern: keep and of, chosen anew at each group's first column; None chooses once.
        count: how many go.

    Returns:
        The mask, and each column's errors: what OBS spreads over the columns after the block.
    """
    diagonal = factor.diagonal(dim1=-2, dim2=-1).unsqueeze(1)
    width = work.shape[-1] if pattern is None else pattern[1]
    kept, errors = torch.ones_like(work, dtype=torch.bool), torch.zeros_like(work)
    for column in range(work.shape[-1]):
        if column % width == 0:
            group = slice(column, column + width)
            kept[..., group] = _lowest((work[..., group] / diagonal[..., group]).square(), pattern, count)
        error = (work[..., column] / diagonal[..., column]).masked_fill(kept[..., column], 0.0)
        work[..., column:] -= error.unsqueeze(-1) * factor[:, column, column:].unsqueeze(1)
        errors[..., column] = error
    return kept, errors


def check_groups(pattern: tuple[int, int] | None, sparsity: float, weights: Mapping[str, Tensor] | None = None) -> None:
    """Raise unless N:M keeps some of each group, leaves the asked sparsity and divides each weight. Runs at `setup`.

    Raises:
        ValueError: a pattern that is none, another sparsity, or a weight whose inputs are no multiple of `of`.
    """
    if pattern is None:
        return
    keep, of = pattern
    if not 1 <= keep < of:
        raise ValueError(f"pattern is (keep, of) with 1 <= keep < of, got {pattern}; write (2, 4) for 2:4")
    if abs(sparsity - (1 - keep / of)) > 1e-9:
        raise ValueError(f"pattern {keep}:{of} gives sparsity {1 - keep / of:g}, got {sparsity:g}; write that sparsity")
    for name, weight in (weights or {}).items():
        if weight.shape[1] % of:
            raise ValueError(
                f"{keep}:{of} needs dimension 1 of '{name}' to be a multiple of {of}, got {weight.shape[1]}; exclude "
                f"it with exclude=['{name.removesuffix('.weight')}']"
            )


@torch.no_grad()
def reconstruct_weight(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prune a weight matrix and move what stays so that W x changes least over the inputs; pure, once for each layer.

    From the first input to the last, a weight w that goes costs w^2 / U_jj^2 and moves those after it in its row by
    -w / U_jj * U_j, with U^T U the inverse Hessian. What goes is chosen `block` inputs at a time, each block having its
    share, or within each group of N:M. Frantar & Alistarh 2023, "SparseGPT", algorithm 1. Inputs that were always zero
    cost nothing: their weights go first, and those that stay are left as they are.

    Args:
        weight: (outputs, inputs), or one matrix a group that share the zeros: (groups, outputs, inputs); any floating
            dtype, computed in float32 or wider.
        hessian: (inputs, inputs) or (groups, inputs, inputs); the mean, or any multiple, of x x^T.
        sparsity: exactly round(sparsity * weight.numel()) weights go.
        pattern: (keep, of): `keep` of each `of` consecutive inputs stay instead, such as (2, 4).
        damping: added to the Hessian's diagonal, by its mean; raised tenfold while it is not positive definite.
        block: inputs at a time.

    Returns:
        The new weight, in the old one's dtype, and the mask, True = keep.

    Raises:
        ValueError: shapes or a pattern that do not fit.
        CompressError: NaN or infinite numbers, or a Hessian that no damping makes positive definite.

    >>> same = torch.tensor([[1.0, 1.0], [1.0, 1.0]])  # two inputs that are always equal
    >>> weight, mask = reconstruct_weight(torch.tensor([[1.0, 2.0]]), same, 0.5, damping=1e-6)
    >>> weight, mask
    (tensor([[0.0000, 3.0000]]), tensor([[False,  True]]))
    """
    if weight.dim() == 2:
        new, kept = reconstruct_weight(weight[None], hessian[None], sparsity, pattern, damping, block)
        return new[0], kept[0]
    groups, outputs, inputs = weight.shape
    if hessian.shape != (groups, inputs, inputs):
        raise ValueError(f"a weight {tuple(weight.shape)} needs a Hessian {(groups, inputs, inputs)}, got "
                         f"{tuple(hessian.shape)}")  # fmt: skip
    if pattern is not None:
        check_groups(pattern, sparsity, {"weight": weight[0]})
        block = max(pattern[1], block - block % pattern[1])
    work = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for what, values in (("weights", work), ("Hessian of the inputs", hessian)):
        if not bool(torch.isfinite(values).all()):
            raise CompressError(f"the {what} hold NaN or infinite numbers")
    factor = inverse_factor(hessian.to(work.dtype), damping)
    kept = torch.ones_like(work, dtype=torch.bool)
    for begin in range(0, inputs, block):
        end = min(begin + block, inputs)
        count = round(sparsity * (groups * outputs * end)) - round(sparsity * (groups * outputs * begin))
        piece = work[..., begin:end].clone()
        kept[..., begin:end], errors = _settle(piece, factor[:, begin:end, begin:end], pattern, count)
        work[..., begin:end] = piece
        work[..., end:] -= errors @ factor[:, begin:end, end:]
    return work.masked_fill_(~kept, 0.0).to(weight.dtype), kept


@torch.no_grad()
def output_error(weight: Tensor, new: Tensor, hessian: Tensor) -> float:
    """Return how far the outputs moved, by their size: |X W - X W'|^2 / |X W|^2 over the inputs of the Hessian.

    >>> output_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 2.0]]), torch.eye(2))
    0.2
    """
    old, moved = weight.to(hessian.dtype), (weight.to(hessian.dtype) - new.to(hessian.dtype))
    size = float(((old @ hessian) * old).sum())
    return float(((moved @ hessian) * moved).sum()) / size if size > 0.0 else 0.0


# Surgery


def share_zeros(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Return each weight's own sparsity, rounded so that all together have exactly the asked count; pure.

    >>> share_zeros({"a": torch.zeros(3), "b": torch.zeros(3)}, 0.5)
    {'a': 0.666..., 'b': 0.333...}
    """
    sizes = [weight.numel() for weight in weights.values()]
    ends = [round(sparsity * total) for total in accumulate(sizes, initial=0)]
    counts = zip(weights, ends, ends[1:], sizes, strict=False)
    return {name: (later - earlier) / max(1, size) for name, earlier, later, size in counts}


@torch.no_grad()
def reconstruct_layer(
    name: str,
    layer: nn.Module,
    weight: Tensor,
    hessian: Hessian,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
) -> tuple[Tensor, float]:
    """Prune one layer's weight in place; the bias stays. Returns the mask and the relative output error.

    Raises:
        ValueError, CompressError: as `reconstruct_weight`, with the weight's name.
    """
    old, mean = as_matrices(layer, weight.detach()), hessian.mean
    try:
        new, kept = reconstruct_weight(old, mean, sparsity, pattern, damping)
    except (ValueError, CompressError) as error:
        raise type(error)(f"'{name}' cannot be reconstructed: {error}") from error
    moved = output_error(old, new, mean)
    weight.copy_(as_weight(layer, new, weight.shape))
    return as_weight(layer, kept, weight.shape).contiguous(), moved


def _calibrated(
    module: nn.Module,
    inputs: list[Any],
    weights: Mapping[str, Tensor],
    shares: Mapping[str, float],
    pattern: tuple[int, int] | None,
    damping: float,
    sequential: bool,
) -> dict[str, Tensor]:
    """Run the module over the batches, once or once for each layer, and prune what was calibrated."""
    with evaluating(module), watching(module, weights) as hessians:
        order = in_forward_order(module, inputs[:1] if sequential else inputs, hessians.layers)
        if not order:
            raise NothingToCompress(f"none of the selected layers runs in these batches: {', '.join(weights)}")
        order += [name for name in weights if name not in order]
        masks: dict[str, Tensor] = {}
        for together in [[name] for name in order] if sequential else [order]:
            hessians.start(together)
            run(module, inputs)
            for name in together:
                layer, share = hessians.layers[name][0], shares[name]
                masks[name], _ = reconstruct_layer(name, layer, weights[name], hessians[name], share, pattern, damping)
            hessians.stop(together)
    return {name: masks[name] for name in weights}


def reconstruct(
    module: nn.Module,
    batches: Iterable[Any],
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] | None = None,
    damping: float = 0.01,
    sequential: bool = True,
) -> dict[str, Tensor]:
    """Prune a trained module in place from a few batches of its inputs, without training. Runs when a user calls it.

    Each selected layer loses its share of weights, and the others make up for them (`reconstruct_weight`). A later
    fine-tune keeps these zeros, which have the smallest magnitude there is, with
    `GradualPruning(Constant(sparsity), window=(0, 2))` and the same selection; or prune while fine-tuning, with the
    callback `Reconstruction`. A layer that never runs, as the projection inside `nn.MultiheadAttention`, has no inputs
    to make up for: it loses its smallest weights.

    Args:
        module: in any mode; it runs in eval mode and is put back.
        batches: inputs on the module's device: a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments each. They are held as a list.
        sparsity: fraction of zeros over all selected weights, exact to one weight, and in each layer; in [0, 1).
        pattern: (keep, of), N:M along the inputs of a Linear and the input channels of a Conv, such as (2, 4).
        include: names, globs, class names or types; None is every Linear, Conv1d and Conv2d but the output head.
        exclude: the same, left out.
        damping: added to each Hessian's diagonal, by its mean.
        sequential: later layers are calibrated on the outputs of pruned earlier ones: one pass over the batches for
            each layer, one Hessian at a time. False is one pass for all on the dense module, all Hessians at once
            (inputs^2 numbers each).

    Returns:
        The masks by the weights' clean names, True = keep.

    Raises:
        ValueError: no batches, a sparsity or pattern out of its range or that does not fit a layer.
        NothingToCompress: nothing is selected, or no selected layer runs.
        CompressError: NaN or infinite inputs or weights; layers before the named one are pruned already.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> masks = reconstruct(net, [torch.randn(32, 4)], 0.75)
    >>> int((net[0].weight == 0).sum()), list(masks)
    (24, ['0.weight'])
    """
    inputs, sparsity = list(batches), check_sparsity(sparsity)
    if not inputs:
        raise ValueError("reconstruct needs at least one batch of inputs to calibrate on, got none")
    weights = select_weights(module, RECONSTRUCTIBLE, include, exclude)
    check_groups(pattern, sparsity, weights)
    return _calibrated(module, inputs, weights, share_zeros(weights, sparsity), pattern, damping, sequential)
