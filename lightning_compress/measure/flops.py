"""Multiply-accumulates of a forward: in all, by module, for each weight, and without those by zero."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_compress.measure.products import ZeroProducts, fused_kernels
from lightning_compress.pruning.tracing import plain_forward
from lightning_compress.sharding import clean_name

__all__ = ["count_macs", "effective_macs", "macs_by_module", "macs_per_weight"]

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def count_macs(module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Count the multiply-accumulates of one forward in the mode the module is in: half of torch's count of FLOPs.

    Matrix products, convolutions, attention and recurrent layers count, also in the fused kernels that torch's counter
    leaves out; elementwise operations, norms, pooling and look-ups do not. A compiled module runs uncompiled for this.

    >>> count_macs(nn.Linear(3, 2), (torch.zeros(5, 3),))
    30
    """
    with _counting() as counter:
        module(*args, **(kwargs or {}))
    return int(counter.get_total_flops()) // 2


def macs_by_module(
    module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return the multiply-accumulates that each module does itself, without those of the modules it calls.

    By name, in the order of `named_modules`; modules that do none are left out, and the module itself is "". The sum is
    that of `count_macs`. A module that is called twice has both, and one with two names has them under its first.

    >>> macs_by_module(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)), (torch.zeros(5, 3),))
    {'0': 30, '2': 10}
    """
    names = {layer: clean_name(name) for name, layer in module.named_modules()}
    own = dict.fromkeys(names.values(), 0)
    with _counting() as counter, _splitting(names, own, counter):
        module(*args, **(kwargs or {}))
    return {name: flops // 2 for name, flops in own.items() if flops}


def effective_macs(module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Count the multiply-accumulates of one forward that are not by a weight of zero.

    `count_macs` less, for each use of a parameter in a linear layer, convolution or recurrent layer, its zeros times
    the positions it is used at. Products of activations, as in attention, all count; so do those with a weight that is
    computed from others (fake-quantized, cast by autocast) or is one of a mixture's experts in a grouped kernel. What
    a kernel saves by leaving products out is another matter: only latency tells.

    Raises:
        ValueError: a parameter on the meta device, whose values nobody knows.

    >>> layer = nn.Linear(3, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 0.0, 0.0], [2.0, 3.0, 0.0]]))
    >>> effective_macs(layer, (torch.zeros(5, 3),))
    15
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"expected weights with values, got '{name}' on the meta device; load them first")
    zeros = ZeroProducts(module.parameters())
    with zeros, _counting() as counter:  # the counter is nearer: what it takes apart goes on to the outer one in parts
        module(*args, **(kwargs or {}))
    return int(counter.get_total_flops()) // 2 - zeros.count


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Count what runs inside, operation by operation."""
    with ExitStack() as stack:
        stack.enter_context(plain_forward())
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled; importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            # of the counter's own hooks, which see a compiled module's wrapper too; nothing is counted by them here
            warnings.filterwarnings("ignore", "Using `torch.compile\\(module\\)` when there are global hooks")
        yield stack.enter_context(FlopCounterMode(display=False, custom_mapping=fused_kernels()))


@contextmanager
def _splitting(names: Mapping[nn.Module, str], own: dict[str, int], counter: FlopCounterMode) -> Iterator[None]:
    """Add to `own`, at each module's end, what was counted since its start outside the modules it called."""
    running: list[list[int]] = []  # of each module that runs: the count at its start, and what those it called have

    def begin(*_: Any) -> None:
        running.append([counter.get_total_flops(), 0])

    def end(layer: nn.Module, *_: Any) -> None:
        start, below = running.pop()
        inside = counter.get_total_flops() - start
        own[names[layer]] += inside - below
        if running:
            running[-1][1] += inside

    handles = [layer.register_forward_pre_hook(begin, prepend=True) for layer in names]
    handles += [layer.register_forward_hook(end) for layer in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
