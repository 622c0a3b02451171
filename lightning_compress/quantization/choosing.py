"""Which layers are rounded, and on which grids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lightning_compress.quantization.attach import (
    INPUTS,
    ON_REQUEST,
    QUANTIZABLE,
    WEIGHTS,
    check_weight,
)
from lightning_compress.quantization.inputs import Affine, InputGrid
from lightning_compress.quantization.projections import projections_in
from lightning_compress.quantization.weights import Symmetric, WeightGrid
from lightning_compress.select import Pattern, matching_layers, select_layers

__all__ = ["Grids", "Override", "Recipe", "grids_of", "override_of", "select_quantizable"]

Override = tuple[int | WeightGrid, int | InputGrid | None] | int


@dataclass(frozen=True)
class Grids:
    """How one layer is rounded; an input grid of None leaves its input in floating point."""

    weights: WeightGrid = WEIGHTS
    inputs: InputGrid | None = INPUTS


def grids_of(weights: int | WeightGrid, inputs: int | InputGrid | None) -> Grids:
    """Return the grids that an option means; an int is short for the default grid of that width.

    >>> grids_of(4, None)
    Grids(weights=Symmetric(bits=4, group='channel'), inputs=None)

    Raises:
        ValueError: a width outside 2 to 8.
        TypeError: something that is neither a width nor a grid.
    """
    if not isinstance(weights, int) and not _is_grid(weights):
        raise TypeError(f"weights is a width in bits or a grid such as Symmetric(bits=4), got {weights!r}")
    if inputs is not None and not isinstance(inputs, int) and not _is_grid(inputs):
        raise TypeError(f"inputs is a width in bits, a grid such as Affine(bits=4), or None, got {inputs!r}")
    return Grids(
        Symmetric(weights) if isinstance(weights, int) else weights,
        Affine(inputs) if isinstance(inputs, int) else inputs,
    )


def override_of(override: Override, inputs: int | InputGrid | None) -> Grids:
    """Return the grids of a `per_layer` entry: (weights, inputs), or a width of the weights alone.

    >>> override_of(4, 8)
    Grids(weights=Symmetric(bits=4, group='channel'), inputs=Affine(bits=8))

    Raises:
        ValueError: a width outside 2 to 8.
        TypeError: neither a width nor a pair of them.
    """
    if isinstance(override, int):
        return grids_of(override, inputs)
    if not isinstance(override, (tuple, list)) or len(override) != 2:
        raise TypeError(f"per_layer gives each pattern (weights, inputs) or the weights' width, got {override!r}")
    return grids_of(*override)


def _is_grid(value: object) -> bool:
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("bits", "learned", "rounded"))


@dataclass(frozen=True)
class Recipe:
    """The grids of all layers: a default, and overrides by pattern, of which the last that matches a layer counts."""

    default: Grids
    overrides: tuple[tuple[Pattern, Grids], ...] = ()

    def choices(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, bool]]:
        """Return, for each layer, which override counts (-1: none), and whether its input can be rounded at all.

        Raises:
            ValueError: an override's pattern matches none of the layers.
        """
        chosen = dict.fromkeys(layers, -1)
        for index, (pattern, _) in enumerate(self.overrides):
            chosen |= dict.fromkeys(matching_layers(module, layers, pattern, "per_layer"), index)
        return {name: (index, not isinstance(layers[name], nn.Embedding)) for name, index in chosen.items()}

    def grids(self, choice: tuple[int, bool]) -> Grids:
        """Return the grids of a choice."""
        index, has_input = choice
        grids = self.default if index < 0 else self.overrides[index][1]
        return grids if has_input else Grids(grids.weights, None)


def select_quantizable(
    module: nn.Module, include: Iterable[Pattern] | None, exclude: Iterable[Pattern] | None
) -> dict[str, nn.Module]:
    """Select the layers to round, by clean name. Runs at `setup`.

    `include` may also name transposed convolutions and embeddings. An `nn.MultiheadAttention` that is selected stands
    for its projections, by names such as "attention.in_proj" and "attention.out_proj".

    Raises:
        ValueError: a pattern matches nothing, or a weight holds integers.
        NothingToCompress: nothing is left.
        IncompatibleCallbacks: a weight is reparametrized.
    """
    kinds = (*QUANTIZABLE, nn.MultiheadAttention) + (() if include is None else ON_REQUEST)
    projections = projections_in(module)
    layers: dict[str, nn.Module] = {}
    for name, layer in select_layers(module, kinds, include, exclude).layers.items():
        if isinstance(layer, nn.MultiheadAttention):  # its out_proj is a layer of its own, selected or not by itself
            inner = {n: each for n, each in projections.items() if each.attention is layer and each.name != "out_proj"}
            for each in inner.values():
                check_weight(name, each)
            layers |= inner
        else:
            check_weight(name, layer)
            layers[name] = projections.get(name, layer)
    return layers
