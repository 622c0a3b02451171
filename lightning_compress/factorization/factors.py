"""A layer as two smaller ones, in place, and back.

The layer stays the same object, so that hooks, ties and whoever holds it go on; it changes its class, as
`torch.nn.utils.parametrize` does, since its own forward would want the weight that is gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CheckpointMismatch
from lightning_compress.pruning.hessians import as_matrices, as_weight
from lightning_compress.pruning.shapes import fit_attributes
from lightning_compress.sharding import clean_name

__all__ = ["FACTORABLE", "Factored", "describe_factors", "factor", "factored_layers", "restore_factors", "unfactor"]

FACTORABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Factored(nn.Module):
    """``up(down(x))`` in place of a layer. A Conv's `down` has its kernel, `up` is 1 wide; the bias is on `up`."""

    plain_class: type[nn.Module]
    down: nn.Module
    up: nn.Module

    def forward(self, input: Tensor) -> Tensor:  # by the name that the plain layers give it
        """Return the layer's outputs for what the layer took."""
        outputs: Tensor = self.up(self.down(input))
        return outputs

    @property
    def weight(self) -> Tensor:
        """The product of the two, in the plain layer's shape: for modules that look at a layer's weight."""
        return _product(self)

    @property
    def bias(self) -> Tensor | None:
        """The bias, which is added last."""
        bias: Tensor | None = self.up.bias  # type: ignore[assignment]
        return bias

    @property
    def rank(self) -> int:
        """How many numbers lie between the two."""
        down: Any = self.down  # its weight a strategy may hold in parts
        return int(down.out_features if isinstance(down, nn.Linear) else down.out_channels)

    def extra_repr(self) -> str:
        """Say what it stands for."""
        return f"{self.plain_class.__name__} of {'x'.join(map(str, _shape(self)))}, rank {self.rank}"


def _shape(layer: Factored) -> torch.Size:
    """The plain layer's, by what the two hold: channels may have been taken out of them."""
    outputs = layer.up.get_parameter("weight").shape[0]
    return torch.Size((outputs, *layer.down.get_parameter("weight").shape[1:]))


def _product(layer: Factored, dtype: torch.dtype | None = None) -> Tensor:
    down, up = (each.get_parameter("weight").to(dtype) for each in (layer.down, layer.up))
    return as_weight(layer.down, (up.flatten(1) @ as_matrices(layer.down, down)[0])[None], _shape(layer))


def factored_layers(module: nn.Module) -> dict[str, Factored]:
    """Return the layers that are two by now, by clean name."""
    return {clean_name(name): layer for name, layer in module.named_modules() if isinstance(layer, Factored)}


@torch.no_grad()
def factor(layer: nn.Module, left: Tensor, right: Tensor) -> None:
    """Turn a layer into two, in place. Runs when layers are factorized.

    The factors get the weight's dtype and device and learn if it did; the bias stays the parameter it was.

    Args:
        layer: a Linear, or a Conv1d or Conv2d of one group.
        left: (outputs, rank).
        right: (rank, inputs), inputs as `pruning.hessians.as_matrices` lays them out.

    Raises:
        ValueError: the factors do not fit the layer.
    """
    weight = layer.get_parameter("weight")
    outputs, inputs = as_matrices(layer, weight)[0].shape
    rank = left.shape[-1]
    if left.shape != (outputs, rank) or right.shape != (rank, inputs):
        raise ValueError(
            f"expected factors (outputs, rank) and (rank, inputs) of a weight {(outputs, inputs)}, "
            f"got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    down, up = _two(layer, rank)
    first = as_weight(layer, right[None].to(weight), torch.Size((rank, *weight.shape[1:])))
    last = left.to(weight).reshape(up.get_parameter("weight").shape)
    for part, values in ((down, first), (up, last)):  # of their own memory, row by row, as FSDP2 wants them
        part.weight = nn.Parameter(values.clone(memory_format=torch.contiguous_format), weight.requires_grad)
    up.register_parameter("bias", layer.bias)  # type: ignore[arg-type]
    plain, training = type(layer), layer.training
    del layer.weight, layer.bias
    layer.__class__ = Factored
    layer.plain_class = plain  # type: ignore[assignment]
    layer.down, layer.up = down.train(training), up.train(training)


def _two(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """Two layers of the right kind, their weights on no device."""
    options: Any = layer
    if isinstance(layer, nn.Linear):
        return (
            nn.Linear(layer.in_features, rank, bias=False, device="meta"),
            nn.Linear(rank, layer.out_features, bias=False, device="meta"),
        )
    how = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    down = type(options)(options.in_channels, rank, options.kernel_size, bias=False, device="meta", **how)
    return down, type(options)(rank, options.out_channels, 1, bias=False, device="meta")


@torch.no_grad()
def unfactor(layer: Factored) -> None:
    """Turn the two back into one plain layer, in place, under its own keys; the product is rounded once."""
    like, bias = layer.up.get_parameter("weight"), layer.bias
    weight = _product(layer, torch.float64).to(like).contiguous()
    plain = layer.plain_class
    del layer.down, layer.up, layer.plain_class
    layer.__class__ = plain  # type: ignore[assignment]
    layer.register_parameter("weight", nn.Parameter(weight, like.requires_grad))
    layer.register_parameter("bias", bias)  # type: ignore[arg-type]
    fit_attributes(layer)


# Checkpoints


def describe_factors(module: nn.Module) -> dict[str, int]:
    """Write down which layers are two, and their ranks. Runs on saving."""
    return {name: layer.rank for name, layer in factored_layers(module).items()}


@torch.no_grad()
def restore_factors(module: nn.Module, described: Mapping[str, int]) -> None:
    """Give a module the layers that `describe_factors` wrote down, so that a state dict of them loads strictly.

    Runs before weights are loaded; the new ones hold anything.

    Raises:
        CheckpointMismatch: the module has no such layer.
    """
    layers = {clean_name(name): layer for name, layer in module.named_modules()}
    for name, layer in factored_layers(module).items():
        if described.get(name) != layer.rank:
            unfactor(layer)
    for name, rank in described.items():
        layer = layers.get(name, module)
        if isinstance(layer, Factored):
            continue
        if name not in layers or not isinstance(layer, FACTORABLE):
            raise CheckpointMismatch(
                f"the checkpoint has '{name}' as two layers of rank {rank}, but {type(module).__name__} has no Linear "
                f"or Conv of that name; build the module with the arguments it was trained with"
            )
        weight = layer.get_parameter("weight")
        outputs, inputs = as_matrices(layer, weight)[0].shape
        factor(layer, weight.new_zeros(outputs, rank), weight.new_zeros(rank, inputs))
