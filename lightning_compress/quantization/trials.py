"""A module's loss while something else stands for a layer's weight or input; afterwards the module is as it was.

Nothing is written to the module: a value in the layer's `__dict__` is found before the parameter (`shadowing`), and a
pre-hook hands the layer another input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_compress.errors import NothingToCompress
from lightning_compress.pruning.calibration import evaluating
from lightning_compress.pruning.tracing import plain_forward
from lightning_compress.quantization.attach import QUANTIZABLE, check_weight
from lightning_compress.quantization.observers import widen
from lightning_compress.select import Pattern, select_layers
from lightning_compress.shadowing import remember, restore

__all__ = ["Group", "Loss", "first_pass", "inputs_changed", "loss_of", "mean_loss", "measuring", "standing_in"]
__all__ += ["weight_groups", "weight_of"]

Loss = Callable[[nn.Module, Any], Tensor]
Patterns = Iterable[Pattern] | None
Group = dict[str, nn.Module]


def weight_groups(module: nn.Module, include: Patterns = None, exclude: Patterns = None) -> dict[str, Group]:
    """Return the selected layers by name, those that share one weight together under the first of their names.

    Raises:
        ValueError: a pattern matches nothing.
        NothingToCompress: nothing is left besides the projections of `nn.MultiheadAttention`, which stay float.
        IncompatibleCallbacks: a weight is reparametrized.

    >>> list(weight_groups(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))))
    ['0']
    """
    # They are used without being called, so that nothing can round them.
    projections = {id(layer.out_proj) for layer in module.modules() if isinstance(layer, nn.MultiheadAttention)}
    by_weight: dict[int, Group] = {}
    for name, layer in select_layers(module, QUANTIZABLE, include, exclude).layers.items():
        if id(layer) not in projections:
            check_weight(name, layer)
            by_weight.setdefault(id(layer.weight), {})[name] = layer
    if not by_weight:
        raise NothingToCompress("only nn.MultiheadAttention projections are selected, which stay in floating point")
    return {next(iter(group)): group for group in by_weight.values()}


def weight_of(group: Group) -> nn.Parameter:
    """Return the weight of a group's layers.

    >>> weight_of({"a": nn.Linear(3, 2)}).shape
    torch.Size([2, 3])
    """
    return next(iter(group.values())).get_parameter("weight")


@contextmanager
def measuring(module: nn.Module) -> Iterator[None]:
    """Let a module run, inside the block, in eval mode, uncompiled, without gradients and fused layers; put back after.

    >>> layer = nn.Dropout()
    >>> with measuring(layer):
    ...     layer.training
    False
    """
    with evaluating(module), plain_forward():
        yield


@contextmanager
def standing_in(groups: Mapping[str, Group], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a tensor stand, inside the block, for the weight of each group's layers.

    >>> import torch
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> with standing_in({"a": {"a": layer}}, {"a": torch.ones(1, 1)}):
    ...     layer(torch.ones(1, 1))
    tensor([[1.]])
    """
    noted: list[tuple[nn.Module, list[Any]]] = [(layer, []) for name in weights for layer in groups[name].values()]
    try:
        for layer, before in noted:
            remember(layer, before)
        for name, weight in weights.items():
            for layer in groups[name].values():
                layer.__dict__["weight"] = weight
        yield
    finally:
        for layer, before in noted:
            restore(layer, before)


@contextmanager
def inputs_changed(layers: Group, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Give each layer, inside the block, `change(name, input)` for its input: its first tensor.

    >>> import torch
    >>> layer = nn.Linear(1, 1)
    >>> with inputs_changed({"a": layer}, lambda name, value: 0 * value):
    ...     torch.equal(layer(torch.ones(1)), layer.bias)
    True
    """

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args and isinstance(args[0], Tensor):
            return (change(name, args[0]), *args[1:]), kwargs
        # A foreign forward may have its own name for the input.
        key = "input" if "input" in kwargs else next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
        return (args, kwargs) if key is None else (args, {**kwargs, key: change(name, kwargs[key])})

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


def loss_of(loss: Loss, module: nn.Module, batch: Any, place: str) -> Tensor:
    """Return the loss of one batch as a tensor of no dimensions.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has several elements, or is NaN or infinite.

    >>> import torch
    >>> loss_of(lambda module, batch: module(batch).sum(), nn.ReLU(), torch.ones(2), "batch 0")
    tensor(2.)
    """
    value = loss(module, batch)
    if not isinstance(value, Tensor):
        raise TypeError(f"loss(module, batch) returns a scalar tensor, got {type(value).__name__} from {place}")
    if value.numel() != 1:
        raise ValueError(
            f"loss(module, batch) returns a scalar, got a tensor of shape {tuple(value.shape)} from {place}; "
            f"return its mean"
        )
    if not bool(value.isfinite()):
        raise ValueError(f"loss(module, batch) is {value.item()} in {place}; look at the batch, or exclude the layer")
    return value.reshape(())


def mean_loss(module: nn.Module, batches: Sequence[Any], loss: Loss, place: str = "") -> float:
    """Return the mean of the batches' losses, each weighing the same; what `place` says is added to an error.

    >>> import torch
    >>> mean_loss(nn.ReLU(), [torch.ones(2), torch.zeros(2)], lambda module, batch: module(batch).sum())
    1.0
    """
    values = [loss_of(loss, module, batch, f"batch {i}{place}").item() for i, batch in enumerate(batches)]
    return sum(values) / len(values)


def first_pass(
    module: nn.Module, batches: Sequence[Any], loss: Loss, groups: Mapping[str, Group]
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss as it is, and the extremes (-low, high) of each layer's input.

    Raises:
        ValueError: there are no batches, a loss is not finite, or a layer never runs.
        TypeError: a loss is no tensor.
    """
    if not batches:
        raise ValueError("expected batches to measure the loss on, got none")
    layers = {name: layer for group in groups.values() for name, layer in group.items()}
    extremes: dict[str, Tensor] = {}

    def watched(name: str, value: Tensor) -> Tensor:
        extremes[name] = widen(extremes.get(name), value)
        return value

    with inputs_changed(layers, watched):
        value = mean_loss(module, batches, loss)
    idle = [name for name in layers if name not in extremes]
    if idle:
        raise ValueError(
            f"expected every selected layer to run in loss(module, batch), but {', '.join(map(repr, idle))} did not; "
            f"use batches that reach it, or exclude={idle}"
        )
    return value, extremes
