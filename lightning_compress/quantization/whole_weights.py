"""Weights of layers whole, whatever part of them a process holds, and what tensor parallelism cannot round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.errors import UnsupportedStrategy
from lightning_compress.quantization.attach import channels_first
from lightning_compress.quantization.choosing import Grids
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.inputs import Affine
from lightning_compress.quantization.weights import Symmetric
from lightning_compress.sharding import local, sharded_parts_of, whole

__all__ = ["WholeWeights", "check_tensor_parallel"]


class WholeWeights:
    """The weights of some layers, by the layers' names.

    Args:
        layers: by clean name.
        root: the model as the strategy has wrapped it.
    """

    def __init__(self, layers: Mapping[str, nn.Module], root: nn.Module) -> None:
        self.layers = layers
        self.parts = sharded_parts_of(root, {n: layer.get_parameter("weight") for n, layer in layers.items()})

    def size(self, name: str) -> int:
        """Return the number of a layer's weights."""
        part = self.parts.get(name)
        return self.layers[name].get_parameter("weight").numel() if part is None else part.shape.numel()

    def of(self, name: str) -> Tensor:
        """Return a layer's weight with output channels first, without gradient; every process calls it."""
        layer = self.layers[name]
        return channels_first(layer, whole(local(layer.get_parameter("weight")), self.parts.get(name)))

    def start(self, name: str, grids: Grids) -> dict[str, Tensor]:
        """Return what the grid of a layer's weight starts to learn from; every process calls it.

        Raises:
            ValueError: the grid cannot round it, such as a group that does not divide it; with the name.
        """
        part = self.parts.get(name)
        if part is not None and isinstance(grids.weights, Symmetric):  # it looks at the shape alone
            weight = channels_first(self.layers[name], torch.empty(part.shape, device="meta"))
        else:
            weight = self.of(name)
        try:
            return grids.weights.learned(weight)
        except ValueError as error:
            raise ValueError(f"'{name}' cannot be rounded: {error}; or give it another grid in per_layer") from error


def check_tensor_parallel(grids: Mapping[str, Grids], details: Details, who: str) -> None:
    """Raise if layers that several processes compute together are rounded in a way that needs them whole.

    Runs at `on_fit_start`, under tensor parallelism.

    Raises:
        UnsupportedStrategy: with the first layer, or the option.
    """
    named = {"outputs": details.outputs, "attention": details.attention, "noise": details.noise.some}
    found = [f"Details({option}=...)" for option, asked in named.items() if asked]
    found += [f"{unlike} in '{name}'" for name, each in grids.items() for unlike in _unlike(each)]
    if found:
        raise UnsupportedStrategy(
            f"{who} cannot use {found[0]} under tensor parallelism, where a process sees a part of each layer; use "
            f"Symmetric weights by channel or tensor and Affine inputs there, or tensor_parallel_size=1"
        )


def _unlike(grids: Grids) -> Iterable[object]:
    if not isinstance(grids.weights, Symmetric) or not isinstance(grids.weights.group, str):
        yield grids.weights
    if grids.inputs is not None and not isinstance(grids.inputs, Affine):
        yield grids.inputs
