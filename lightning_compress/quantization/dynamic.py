"""Dynamic quantization: each token's own range, nothing calibrated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_compress.quantization.attach import check_weight
from lightning_compress.quantization.fake import fake_quantize_input, fake_quantize_weight
from lightning_compress.quantization.grid import check_bits, input_grid
from lightning_compress.select import Pattern, patterns_or_none, select_layers
from lightning_compress.shadowing import remember, restore

__all__ = ["dynamically_quantized", "round_per_token"]


def round_per_token(value: Tensor, bits: int = 8) -> Tensor:
    """Round each row of the last dimension on the affine grid over its own values, widened to hold zero.

    Args:
        value: (..., features), floating point; computed in float32.
        bits: width of the unsigned code.

    Returns:
        Same shape and dtype.

    >>> import torch
    >>> round_per_token(torch.tensor([[0.0, 1.1, 3.0], [0.0, 11.0, 30.0]]), 2)
    tensor([[ 0.,  1.,  3.],
            [ 0., 10., 30.]])
    """
    if value.numel() == 0:
        return value
    rows = value.detach().float()
    scale, zero_point = input_grid(rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True), bits)
    return fake_quantize_input(value, scale, zero_point, bits)


@contextmanager
def _rounding(layer: nn.Module, weight_bits: int, input_bits: int) -> Iterator[None]:
    shadowed: list[Any] = []

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        remember(layer, shadowed)
        layer.__dict__["weight"] = fake_quantize_weight(layer.weight, weight_bits)  # type: ignore[arg-type]
        name = next((key for key, value in kwargs.items() if isinstance(value, Tensor)), None)
        if args:
            return (round_per_token(args[0], input_bits), *args[1:]), kwargs
        return args, kwargs if name is None else {**kwargs, name: round_per_token(kwargs[name], input_bits)}

    handles = [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(lambda layer, *_: restore(layer, shadowed), always_call=True, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def dynamically_quantized(
    module: nn.Module,
    weight_bits: int = 8,
    input_bits: int = 8,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern | None = None,
) -> Iterator[nn.Module]:
    """Let a module compute, inside the block, as a runtime with dynamic quantization would: no calibration.

    The weights of Linear layers are rounded by output channel, each token of their inputs on a grid of its own. Nothing
    in the module changes.

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
    check_bits(weight_bits), check_bits(input_bits)
    layers = select_layers(module, (nn.Linear,), patterns_or_none(include), patterns_or_none(exclude)).layers
    for name, layer in layers.items():
        check_weight(name, layer)
    with ExitStack() as stack:
        for layer in layers.values():
            stack.enter_context(_rounding(layer, weight_bits, input_bits))
        yield module
