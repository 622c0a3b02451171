"""What torch's flop counter does not see: some fused kernels, and products by weights that are zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ZeroProducts", "fused_kernels"]

aten = torch.ops.aten
# A library's recurrent kernel -> its weights among the arguments; its input, (..., features), is the first of them.
RECURRENT: dict[str, Callable[[Sequence[Any]], Sequence[Any]]] = {
    "mkldnn_rnn_layer": lambda args: args[1:3],
    "_cudnn_rnn": lambda args: args[1],
    "miopen_rnn": lambda args: args[1],
    "_lstm_mps": lambda args: args[2],
}


# Attention in one kernel, of queries, keys and values (..., tokens, width): those that torch's counter leaves out.
ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
PRODUCTS = ("_int_mm", "_grouped_mm")


def fused_kernels() -> dict[Any, Callable[..., int]]:
    """Return formulas of kernels that torch has none for, as FlopCounterMode takes them. Runs at each count.

    Of nn.LSTM, nn.GRU and nn.RNN: at each step of each sequence every weight of every gate is used once, so it is steps
    x weights multiply-accumulates, biases not counted, whether the weights are of inputs, of the hidden state or of its
    projection. Of attention: queries times keys, and probabilities times values, masked or not. Of integers, and of a
    mixture's experts: as of any product of matrices.
    """
    formulas = {name: _recurrent(weights) for name, weights in RECURRENT.items()}
    formulas |= {**dict.fromkeys(ATTENTION, _attention), **dict.fromkeys(PRODUCTS, _product)}
    return {getattr(aten, name): formula for name, formula in formulas.items() if hasattr(aten, name)}


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    queries: int = math.prod(query[:-1])
    return 2 * queries * int(key[-2]) * int(query[-1] + value[-1])


def _product(left: Any, right: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    groups = int(left[0]) if len(left) == len(right) == 3 else 1  # else each row meets one group alone
    return 2 * groups * int(left[-2]) * int(left[-1]) * int(right[-1])


def _recurrent(weights_of: Callable[[Sequence[Any]], Sequence[Any]]) -> Callable[..., int]:
    def flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        used: int = sum(math.prod(shape) for shape in weights_of(shapes) if len(shape) == 2)
        steps: int = math.prod(shapes[0][:-1])
        return 2 * steps * used

    return flops


class ZeroProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiply-accumulates by zeros of given weights; those of any other tensor are left to others.

    A tensor is a weight's when it has the weight's memory, however it is viewed; one of sparse layout is none.
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
