"""Weights of one or two bits: binary (XNOR-Net) and ternary (TWN, TTQ).

Each class is a grid for `QuantizationAwareTraining(weights=...)`. Zeros of pruning stay zeros under all but `Binary`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_compress.quantization.slopes import column, straight, with_slopes

__all__ = [
    "Binary",
    "Ternary",
    "TrainedTernary",
    "mean_size",
    "ternary_signs",
]

TWN_SHARE = 0.7  # of mean |w|: Li et al. as of 2016; the revision of 2022 has 0.75


def mean_size(weight: Tensor, *, per_channel: bool) -> Tensor:
    """Return mean |w| of each output channel, (out,), or of the layer, (), float32; 0 of nothing. Runs in each forward.

    >>> mean_size(torch.tensor([[1.0, -3.0], [0.0, 0.0]]), per_channel=True)
    tensor([2., 0.])
    """
    size = weight.detach().float().abs()
    count = weight.numel() // max(weight.shape[0], 1) if per_channel else weight.numel()
    return (size.flatten(1).sum(dim=1) if per_channel else size.sum()) / max(count, 1)


def _for_export(scale: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """A scale of each channel that divides, 1 where a channel is all zero, and codes 0 there."""
    scale = scale.expand(codes.shape[0])
    empty = scale == 0
    codes = torch.where(column(empty, codes), 0, codes)
    return codes.to(torch.int8), torch.where(empty, torch.ones_like(scale), scale)


def _binary(weight: Tensor, per_channel: bool) -> Tensor:
    scale = column(mean_size(weight, per_channel=per_channel), weight)
    return torch.where(weight < 0, -scale, scale).to(weight.dtype)


def _binary_slopes(weight: Tensor, per_channel: bool, paper_gradient: bool) -> tuple[Tensor]:
    inside = weight.abs() <= 1.0
    if not paper_gradient:
        return (inside,)
    scale = column(mean_size(weight, per_channel=per_channel), weight)
    count = max(weight.numel() // max(scale.numel(), 1), 1)
    return (torch.where(inside, scale, 0.0) + 1.0 / count,)


@dataclass(frozen=True)
class Binary:
    """Weights of one bit: sign(w) times mean |w|. Rastegari et al. 2016, "XNOR-Net", section 3.1; sign(0) is +1.

    The gradient is the identity's where |w| <= 1 and 0 elsewhere (Courbariaux et al. 2016, "Binarized Neural Networks",
    equation 4). There is no zero: a pruned weight comes back, so do not prune and binarize the same layer.

    Args:
        per_channel: one scale for each output channel, as in the paper; False gives the layer one, as DoReFa's 1 bit.
        paper_gradient: use XNOR-Net's own gradient, g (1/n + scale 1[|w| <= 1]), with n the weights of a scale.

    >>> Binary().rounded(torch.tensor([[1.0, -3.0]]), {})
    tensor([[ 2., -2.]])
    """

    per_channel: bool = True
    paper_gradient: bool = False

    @property
    def bits(self) -> int:
        """1."""
        return 1

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}: the scale follows from the weight."""
        return {}

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the scaled signs."""
        slopes = partial(_binary_slopes, per_channel=self.per_channel, paper_gradient=self.paper_gradient)
        return with_slopes(partial(_binary, per_channel=self.per_channel), slopes, weight)

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return -1 and 1, and the scale of each output channel."""
        signs = torch.where(weight.detach() < 0, -1, 1)
        return _for_export(mean_size(weight, per_channel=self.per_channel), signs)


def ternary_signs(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return -1, 0 or 1, float32: the sign where |w| > threshold, else 0. Runs in each forward.

    >>> ternary_signs(torch.tensor([-2.0, 0.5, 1.0]), torch.tensor(0.9))
    tensor([-1.,  0.,  1.])
    """
    wide = weight.detach().float()
    # The last term is 0, or NaN where the threshold says that the weights are not finite: they shall not become zeros.
    return (wide > threshold).float() - (wide < -threshold).float() + 0.0 * threshold


def _twn(weight: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Signs, and the scale that fits them best: mean |w| of those that are not 0."""
    threshold = column(TWN_SHARE * mean_size(weight, per_channel=per_channel), weight)
    signs = ternary_signs(weight, threshold)
    chosen = torch.where(signs != 0, weight.detach().float().abs(), 0.0)
    if per_channel:
        return signs, chosen.flatten(1).sum(dim=1) / signs.abs().flatten(1).sum(dim=1).clamp_min(1.0)
    return signs, chosen.sum() / signs.abs().sum().clamp_min(1.0)


def _ternary(weight: Tensor, per_channel: bool) -> Tensor:
    signs, scale = _twn(weight, per_channel)
    return (signs * column(scale, weight)).to(weight.dtype)


@dataclass(frozen=True)
class Ternary:
    """Weights -s, 0, s: 0 up to the threshold 0.7 mean |w|, s the mean |w| beyond it, with the identity's gradient.

    Li et al. 2016, "Ternary Weight Networks", with one threshold and scale a layer; the paper's revision of 2022 has
    0.75 for weights that are normally distributed.

    Args:
        per_channel: a threshold and a scale for each output channel.

    >>> Ternary().rounded(torch.tensor([[0.1, -2.0, 1.0, 0.5]]), {})
    tensor([[ 0.0000, -1.5000,  1.5000,  0.0000]])
    """

    per_channel: bool = False

    @property
    def bits(self) -> int:
        """2: three values."""
        return 2

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}: threshold and scale follow from the weight."""
        return {}

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the ternary weight."""
        return with_slopes(partial(_ternary, per_channel=self.per_channel), straight, weight)

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return -1, 0 and 1, and the scale of each output channel."""
        signs, scale = _twn(weight, self.per_channel)
        return _for_export(scale, signs)


def _ttq_signs(weight: Tensor, share: float) -> Tensor:
    size = weight.detach().float().abs()
    largest = size.amax() if weight.numel() else size.sum()
    return ternary_signs(weight, share * largest)


def _ttq(weight: Tensor, positive: Tensor, negative: Tensor, share: float) -> Tensor:
    signs = _ttq_signs(weight, share)
    return torch.where(signs > 0, positive, torch.where(signs < 0, -negative, signs)).to(weight.dtype)


def _ttq_slopes(weight: Tensor, positive: Tensor, negative: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor]:
    signs = _ttq_signs(weight, share)
    weight_slope = torch.where(signs > 0, positive, torch.where(signs < 0, negative, 1.0))
    return weight_slope, signs > 0, -(signs < 0).float()


@dataclass(frozen=True)
class TrainedTernary:
    """TTQ: weights -n, 0, p with two learned scales a layer. Zhu et al. 2017, "Trained Ternary Quantization".

    0 up to the threshold `share` max |w|. The gradient to p is the sum over the positive weights', that to n minus the
    sum over the negative ones' (the paper leaves the minus out, though its negative weights are -n); that to the
    weight is the gradient times p, 1 or n. The scales begin with the mean size of their weights. Two scales in one
    channel have no integer form.

    Args:
        share: of the largest weight, in (0, 1).

    Raises:
        ValueError: a share out of range.
    """

    share: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"share is a part of the largest weight, in (0, 1), got {self.share!r}")

    @property
    def bits(self) -> int:
        """2: three values."""
        return 2

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the first `positive` and `negative`, each () float32."""
        signs, size = _ttq_signs(weight, self.share), weight.detach().float().abs()
        sides = {"positive": signs > 0, "negative": signs < 0}
        return {name: torch.where(side, size, 0.0).sum() / side.sum().clamp_min(1) for name, side in sides.items()}

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return the ternary weight."""
        arguments = (weight, learned["positive"], learned["negative"])
        return with_slopes(partial(_ttq, share=self.share), partial(_ttq_slopes, share=self.share), *arguments)

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return None."""
        return None
