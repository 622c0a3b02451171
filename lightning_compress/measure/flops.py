"""Multiply-accumulates of a forward: in all, and for each weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.pruning.tracing import plain_forward
from lightning_compress.sharding import clean_name

__all__ = ["count_macs", "macs_per_weight"]

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def count_macs(module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Count the multiply-accumulates of one forward in the mode the module is in: half of torch's count of FLOPs.

    Matrix products, convolutions and attention count; elementwise operations, norms and pooling do not.

    >>> count_macs(nn.Linear(3, 2), (torch.zeros(5, 3),))
    30
    """
    with plain_forward(), FlopCounterMode(display=False) as counter:
        module(*args, **(kwargs or {}))
    return int(counter.get_total_flops()) // 2


def macs_per_weight(
    module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Return, for each weight of a linear layer or convolution, at how many positions one forward uses it.

    A weight's multiply-accumulates are positions x weights, and positions stay when channels are removed. A weight
    that is used twice has the positions of both; a weight that is computed from others has none.

    >>> macs_per_weight(nn.Conv2d(1, 2, 3), (torch.zeros(1, 1, 8, 8),))
    {'weight': 36.0}
    """
    counter = _Positions({id(parameter): clean_name(name) for name, parameter in module.named_parameters()})
    with plain_forward(), counter:
        module(*args, **(kwargs or {}))
    return counter.positions


class _Positions(TorchFunctionMode):
    """Sees each call of a function of torch, and notes those with a parameter for a weight."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names, self.positions = names, dict[str, float]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = list(args) + [value for key, value in (kwargs or {}).items() if key in ("input", "weight")]
        for weight in (value for value in inputs if isinstance(value, Tensor) and id(value) in self.names):
            positions = _positions(func, inputs, weight, result)
            if positions:
                name = self.names[id(weight)]
                self.positions[name] = self.positions.get(name, 0.0) + positions
        return result


def _positions(func: Any, inputs: Sequence[Any], weight: Tensor, result: Any) -> float:
    if func is F.linear and weight is inputs[1]:
        return float(result.numel() / weight.shape[0])
    if func in CONVOLUTIONS and weight is inputs[1]:
        channels = -weight.dim() + 1
        return float(result.numel() / result.shape[channels])
    if func in TRANSPOSED and weight is inputs[1]:
        return float(inputs[0].numel() / weight.shape[0])
    if func in (torch.addmm, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__) and weight.dim() == 2:
        return float(result.numel() / weight.shape[1])
    return 0.0
