"""Dynamic quantization: each token's own range, nothing calibrated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from lightning_compress.quantization.attach import check_weight, fake_quantized
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.inputs import PerToken
from lightning_compress.quantization.weights import Symmetric
from lightning_compress.select import Pattern, patterns_or_none, select_layers

__all__ = ["dynamically_quantized"]


@contextmanager
def dynamically_quantized(
    module: nn.Module,
    weight_bits: int = 8,
    input_bits: int = 8,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern | None = None,
) -> Iterator[nn.Module]:
    """Let a module compute, inside the block, as a runtime with dynamic quantization would: no calibration.

    The weights of Linear layers are rounded by output channel, each token of their inputs on an affine grid over
    its own values (`PerToken(symmetric=False)`). Nothing in the module changes.

    Args:
        module: in any mode.
        weight_bits: width of weight codes, 2 to 8.
        input_bits: width of input codes, 2 to 8.
        include: names, globs, class names or types; None is every Linear but the output head.
        exclude: the same, left in floating point.

    Raises:
        ValueError: bits out of range, a pattern that matches nothing.
        NothingToCompress: nothing is selected.
        IncompatibleCallbacks: a selected weight is reparametrized.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(3, 1, bias=False))
    >>> _ = net[0].weight.data.fill_(1.0)
    >>> with torch.no_grad(), dynamically_quantized(net, input_bits=2, include="0"):
    ...     net(torch.tensor([[0.0, 1.1, 3.0], [0.0, 11.0, 30.0]]))
    tensor([[ 4.],
            [40.]])
    """
    inputs = PerToken(input_bits, symmetric=False)
    trained = Range(0.0, 0.0, input_bits, Symmetric(weight_bits).bits, inputs=inputs)  # no range is observed
    layers = select_layers(module, (nn.Linear,), patterns_or_none(include), patterns_or_none(exclude)).layers
    for name, layer in layers.items():
        check_weight(name, layer)
    with fake_quantized(module, dict.fromkeys(layers, trained)):
        yield module
