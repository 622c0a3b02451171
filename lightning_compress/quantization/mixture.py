"""Widths that are learned: a weight as a mixture of its roundings, and what its bits cost, both differentiable.

Pure functions for a training step of your own: one logit a layer and candidate width, moved by the optimizer together
with the weights, on the task's loss plus a price times the cost. At the end each layer takes its most likely width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_compress.quantization.fake import fake_quantize_weight
from lightning_compress.quantization.sensitivity import check_widths

__all__ = ["expected_cost", "likeliest_bits", "mixed_weight"]


def mixed_weight(weight: Tensor, logits: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the softmax mixture of a weight's roundings at each width. Runs in each forward while widths are learned.

    sum_k softmax(logits)_k Q_k(W): one convolution with the mixed weight equals the mixture of the convolutions, so
    that all widths cost one forward (the composite layer of Cai and Vasconcelos 2020; Wu et al. 2018 draw
    the width instead). The gradient to the weight is the straight-through one, and exact to the logits.

    Args:
        weight: (out, ...), floating point.
        logits: (widths,) floating point.
        widths: ascending, 2 to 8 bits.

    Returns:
        Same shape and dtype as `weight`. Zeros of pruning stay zero.

    Raises:
        ValueError: widths out of 2 to 8 or not ascending, or another number of logits.

    >>> mixed_weight(torch.tensor([[1.0, 0.4]]), torch.tensor([0.0, 0.0]), (2, 3))
    tensor([[1.0000, 0.1667]])
    """
    _check(logits, widths)
    shares = torch.softmax(logits.float(), dim=0)
    roundings = [fake_quantize_weight(weight, bits) for bits in widths]
    mixed = torch.stack([share * rounded for share, rounded in zip(shares, roundings, strict=True)]).sum(dim=0)
    return mixed.to(weight.dtype)


def expected_cost(logits: Mapping[str, Tensor], costs: Mapping[str, Mapping[int, int]]) -> Tensor:
    """Return the cost of all layers in the mean over their widths' shares, over the cost at the widest; in (0, 1].

    Added to the loss, times a price: more of it buys fewer bits. Cai and Vasconcelos 2020, over the cost at the
    widest width so that the price has no unit.

    Args:
        logits: layer -> (widths,), widths ascending.
        costs: layer -> width -> bytes or bit-operations, as from `weight_bytes`.

    Returns:
        () float32, with its gradient to the logits.

    Raises:
        ValueError: other layers, or another number of logits than of widths.

    >>> expected_cost({"a": torch.zeros(2)}, {"a": {4: 50, 8: 100}})
    tensor(0.7500)
    """
    if not logits or logits.keys() != costs.keys():
        raise ValueError(f"expected costs of the layers {sorted(logits)}, at least one, got those of {sorted(costs)}")
    total, most = torch.zeros(()), 0.0
    for name, values in logits.items():
        widths = sorted(costs[name])
        _check(values, widths)
        own = torch.tensor([float(costs[name][bits]) for bits in widths], device=values.device)
        total = total.to(values.device) + (torch.softmax(values.float(), dim=0) * own).sum()
        most += float(own[-1])
    return total / most


def likeliest_bits(logits: Mapping[str, Tensor], widths: Sequence[int]) -> dict[str, int]:
    """Return each layer's width of the largest logit, the narrower of equals. Runs once, when the widths are learned.

    Raises:
        ValueError: widths out of 2 to 8 or not ascending, or another number of logits.

    >>> likeliest_bits({"a": torch.tensor([0.1, 2.0]), "b": torch.tensor([0.0, 0.0])}, (4, 8))
    {'a': 8, 'b': 4}
    """
    for values in logits.values():
        _check(values, widths)
    return {name: widths[values.tolist().index(max(values.tolist()))] for name, values in logits.items()}


def _check(logits: Tensor, widths: Sequence[int]) -> None:
    if tuple(widths) != check_widths(widths):
        raise ValueError(f"widths of a mixture are ascending, got {tuple(widths)}")
    if logits.shape != (len(widths),):
        raise ValueError(f"expected one logit for each of {len(widths)} widths, got shape {tuple(logits.shape)}")
