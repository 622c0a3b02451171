"""Batch norms folded into the layers before them, exactly as an exporter does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.chains import layers_with_norm

__all__ = ["fold_batch_norm", "folded"]


def folded(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias of one layer that computes layer and batch norm in eval mode; pure.

    W' = W g / sqrt(v + eps), b' = (b - m) g / sqrt(v + eps) + beta, in float64. Jacob et al. 2018, equation 14.

    Args:
        weight: (out, ...).
        bias: (out,) or None.
        norm: a batch norm with running statistics, with or without weight and bias.

    >>> norm = nn.BatchNorm1d(1, eps=0.0).eval()
    >>> _ = norm.running_mean.fill_(1.0), norm.running_var.fill_(4.0)
    >>> folded(torch.tensor([[3.0]]), None, norm)
    (tensor([[1.5000]]), tensor([-0.5000]))
    """
    channels = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    mean, variance, gain, shift = (
        value.detach().double() if isinstance(value, Tensor) else channels + default
        for value, default in ((norm.running_mean, 0.0), (norm.running_var, 1.0), (norm.weight, 1.0), (norm.bias, 0.0))
    )
    factor = gain / (variance + float(norm.eps)).sqrt()  # type: ignore[arg-type]
    old = torch.zeros_like(mean) if bias is None else bias.detach().double()
    scaled = weight.detach().double() * factor.view(-1, *[1] * (weight.dim() - 1))
    return scaled.to(weight.dtype), ((old - mean) * factor + shift).to(weight.dtype)


@torch.no_grad()
def fold_batch_norm(module: nn.Module, batch: Any) -> dict[str, str]:
    """Fold each batch norm into the Conv or Linear whose output it alone reads, in place; an Identity takes its place.

    Keys change: the norms' go, and a layer without a bias gets one. So this is for a module that is not trained any
    more. Neither `export_onnx` nor `equalize` needs it; grids of a whole tensor do, whose range is that of the folded
    weight. Norms without running statistics, and layers whose weight is shared, are left.

    Args:
        module: any module that `torch.export` can trace; its function in eval mode stays the same up to rounding.
        batch: one batch of inputs, for the trace: a tensor, a tuple, a list or a dict.

    Returns:
        Name of a layer -> name of the norm that it took in.

    Raises:
        CompressError: the forward cannot be traced.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    >>> fold_batch_norm(net, torch.zeros(2, 1, 8, 8)), net[1], net[0].bias is not None
    ({'0': '1'}, Identity(), True)
    """
    pairs = layers_with_norm(module, batch)
    for layer_name, norm_name in pairs.items():
        layer, norm = module.get_submodule(layer_name), module.get_submodule(norm_name)
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        weight, shift = folded(layer.get_parameter("weight"), bias, norm)
        layer.get_parameter("weight").copy_(weight)
        if bias is None:
            layer.bias = nn.Parameter(shift)
        else:
            bias.copy_(shift)
        parent, _, own = norm_name.rpartition(".")
        setattr(module.get_submodule(parent), own, nn.Identity())
    return pairs
