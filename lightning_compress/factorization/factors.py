"""A layer as two smaller ones, in place, and back.

The layer stays the same object, so that hooks, ties and whoever holds it go on; it changes its class, as
`torch.nn.utils.parametrize` does, since its own forward would want the weight that is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_compress.pruning.hessians import as_matrices, as_weight
from lightning_compress.pruning.shapes import fit_attributes
from lightning_compress.sharding import clean_name

__all__ = [
    "FACTORABLE", "Factored", "as_plain", "factor", "factored_layers", "factors_in", "restore_factors", "take_factors",
    "unfactor",
]  # fmt: skip

FACTORABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Factored(nn.Module):
    """``up(down(x))`` in place of a layer. A Conv's `down` has its kernel, `up` is 1 wide; the bias is on `up`."""

    __jit_unused_properties__ = ("weight", "bias", "rank")
    if TYPE_CHECKING:  # TorchScript reads annotations of a class, and knows no nn.Module
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


@contextmanager
def as_plain(layers: Mapping[str, Factored]) -> Iterator[dict[str, nn.Parameter]]:
    """Let layers be plain ones inside the block, with weights that stand for their factors; yields these by name.

    Runs around a user's `configure_optimizers`, which shall find what it found when the run began. Layers get their
    own factors back.
    """
    parts = {name: (layer.down, layer.up, layer.plain_class) for name, layer in layers.items()}
    for layer in layers.values():
        unfactor(layer)
    try:
        yield {name: layer.get_parameter("weight") for name, layer in layers.items()}
    finally:
        for name, layer in layers.items():
            down, up, plain = parts[name]
            del layer.weight, layer.bias
            layer.__class__ = Factored
            layer.plain_class, layer.down, layer.up = plain, down, up


# Checkpoints


def factors_in(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Return names of layers that may be two in a state dict, and their ranks. Runs before one is loaded.

    >>> factors_in({"a.down.weight": torch.zeros(2, 5), "a.up.weight": torch.zeros(5, 2), "b.weight": torch.zeros(2)})
    {'a': 2}
    """
    shapes = {clean_name(name): value.shape for name, value in state.items() if isinstance(value, Tensor)}
    bases = [name.removesuffix(".down.weight") for name in shapes if name.endswith(".down.weight")]
    return {
        base: shapes[f"{base}.down.weight"][0]
        for base in bases
        if f"{base}.up.weight" in shapes and f"{base}.weight" not in shapes
    }


def restore_factors(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make those layers of a module two that are two in a state dict, and no others, so that it loads strictly.

    Runs before weights are loaded; the new ones hold anything.
    """
    wanted = factors_in(state)
    for name, layer in factored_layers(module).items():
        if name not in wanted:
            unfactor(layer)
    take_factors(module, wanted)


@torch.no_grad()
def take_factors(module: nn.Module, ranks: Mapping[str, int]) -> None:
    """Make layers of a module two of these ranks, whose weights hold anything; other names are passed over."""
    layers = {clean_name(name): layer for name, layer in module.named_modules()}
    for name, rank in ranks.items():
        layer = layers.get(name)
        if isinstance(layer, Factored) and layer.rank != rank:
            unfactor(layer)
        if isinstance(layer, FACTORABLE):
            weight = layer.get_parameter("weight")
            outputs, inputs = as_matrices(layer, weight)[0].shape
            factor(layer, weight.new_zeros(outputs, rank), weight.new_zeros(rank, inputs))
