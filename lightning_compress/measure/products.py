"""What torch's flop counter does not see: recurrent layers' fused kernels, and products by weights that are zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ZeroProducts", "recurrent_kernels"]

aten = torch.ops.aten
# A library's recurrent kernel -> its weights among the arguments; its input, (..., features), is the first of them.
RECURRENT: dict[str, Callable[[Sequence[Any]], Sequence[Any]]] = {
    "mkldnn_rnn_layer": lambda args: args[1:3],
    "_cudnn_rnn": lambda args: args[1],
    "miopen_rnn": lambda args: args[1],
    "_lstm_mps": lambda args: args[2],
}


def recurrent_kernels() -> dict[Any, Callable[..., int]]:
    """Return formulas of the kernels that nn.LSTM, nn.GRU and nn.RNN run on, as FlopCounterMode takes them.

    At each step of each sequence every weight of every gate is used once: steps x weights multiply-accumulates, biases
    not counted, whether the weights are of inputs, of the hidden state or of its projection.
    """
    return {getattr(aten, name): _formula(weights) for name, weights in RECURRENT.items() if hasattr(aten, name)}


def _formula(weights_of: Callable[[Sequence[Any]], Sequence[Any]]) -> Callable[..., int]:
    def flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        used: int = sum(math.prod(shape) for shape in weights_of(shapes) if len(shape) == 2)
        steps: int = math.prod(shapes[0][:-1])
        return 2 * steps * used

    return flops


class ZeroProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiply-accumulates by zeros of given weights; those of any other tensor are left to others.

    A tensor is a weight's when it has the weight's memory, however it is viewed. Sparse layouts have none to be known by.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages = {_storage(weight) for weight in weights if weight.numel() and weight.layout is torch.strided}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in (aten.mm, aten.bmm):
            self.count += self._of_product(args[0], args[1])
        elif packet in (aten.addmm, aten.baddbmm):
            self.count += self._of_product(args[1], args[2])
        elif packet is aten.convolution:
            transposed = args[6]
            self.count += self._zeros(args[1]) * _positions(args[0] if transposed else result)
        elif func.name().removeprefix("aten::") in RECURRENT:
            weights = RECURRENT[func.name().removeprefix("aten::")](args)
            self.count += math.prod(args[0].shape[:-1]) * sum(self._zeros(w) for w in weights if w.dim() == 2)
        return result

    def _of_product(self, left: Tensor, right: Tensor) -> int:
        """Products by zero in (..., n, k) @ (..., k, m), where either may be a weight."""
        if not (self._is_weight(left) or self._is_weight(right)):
            return 0
        n, m = left.shape[-2], right.shape[-1]
        # For each k: how many elements of its column and of its row are not zeros of a weight.
        columns = (left != 0).sum(dim=-2) if self._is_weight(left) else torch.tensor(n, device=left.device)
        rows = (right != 0).sum(dim=-1) if self._is_weight(right) else torch.tensor(m, device=left.device)
        return left.numel() * m - int((columns * rows).expand(*left.shape[:-2], left.shape[-1]).sum())

    def _zeros(self, weight: Tensor) -> int:
        return weight.numel() - int(torch.count_nonzero(weight)) if self._is_weight(weight) else 0

    def _is_weight(self, tensor: Tensor) -> bool:
        return tensor.layout is torch.strided and _storage(tensor) in self.storages


def _positions(tensor: Tensor) -> int:
    """Of (batch, channels, ...): all but the channels."""
    return tensor.numel() // tensor.shape[1] if tensor.numel() else 0


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()
