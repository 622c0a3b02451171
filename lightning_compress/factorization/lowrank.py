"""Replace a module's Linear layers by two smaller ones each, where that saves weights, and put them back together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError, NothingToCompress
from lightning_compress.factorization.linear import LowRankLinear, factored, merged
from lightning_compress.factorization.svd import (
    activation_weighted_svd,
    rank_for_energy,
    rank_that_saves,
    truncated_svd,
    whitened,
)
from lightning_compress.pruning.calibration import evaluating, run
from lightning_compress.select import Pattern, names_of_parameters, patterns_or_none, select_layers

__all__ = ["factorize", "merge"]


@torch.no_grad()
def factorize(
    module: nn.Module,
    batches: Iterable[Any] | None = None,
    energy: float = 0.95,
    rank: int | None = None,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern | None = None,
) -> dict[str, int]:
    """Replace Linear layers by two smaller ones, in place, where fewer weights and MACs are left. Runs when called.

    With batches by what the layers' inputs make of the error (SVD-LLM, Wang 2024), else by the error of the weight
    alone. Train the module on afterwards; `merge` gives plain layers back. Keys change for the layers that are
    replaced: `a.weight` becomes `a.down.weight` and `a.up.weight`.

    Args:
        module: holds the layers; it runs in eval mode on the batches and is put back.
        batches: inputs on the module's device: a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments each.
        energy: share of the squared singular values, of the weight or of the weight times the root of its inputs'
            second moment, that a layer's rank keeps.
        rank: the same rank for all layers instead.
        include: names, globs, class names or types; None is every Linear but the output head.
        exclude: the same, left as they are.

    Returns:
        Name of a replaced layer -> its rank. Layers that would not get smaller are left and not in it.

    Raises:
        ValueError: an energy out of (0, 1], a rank below 1 or above a layer's full one.
        NothingToCompress: nothing is selected, or no layer would get smaller.
        CompressError: a selected layer is the module itself, shares its weight, has a forward of its own, or never
            runs on the batches; NaN or infinite weights or inputs. No layer has been replaced.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> factorize(net, rank=8), type(net[0]).__name__
    ({'0': 8}, 'LowRankLinear')
    """
    selected = select_layers(module, (nn.Linear,), patterns_or_none(include), patterns_or_none(exclude)).layers
    layers = {name: layer for name, layer in selected.items() if isinstance(layer, nn.Linear)}
    _check(module, layers)
    moments = {} if batches is None else _moments(module, layers, batches)
    ranks = {name: _rank(name, layer.weight, moments.get(name), energy, rank) for name, layer in layers.items()}
    smaller = {name: own for name, own in ranks.items() if own <= rank_that_saves(*layers[name].weight.shape)}
    if not smaller:
        raise NothingToCompress(
            f"no layer of {type(module).__name__} would get smaller: the ranks are "
            f"{', '.join(f'{name} {own}' for name, own in ranks.items())}; lower energy or rank"
        )
    for name, own in smaller.items():
        weight, moment = layers[name].weight, moments.get(name)
        pair = truncated_svd(weight, own) if moment is None else activation_weighted_svd(weight, moment, own)
        module.set_submodule(name, factored(layers[name], *pair))
    return smaller


@torch.no_grad()
def merge(module: nn.Module) -> list[str]:
    """Replace the layers that `factorize` made by one Linear each, in place; its keys are a Linear's again.

    Runs when a user calls it. The weight is the product of the two, rounded once.

    Returns:
        Names of the layers.

    Raises:
        NothingToCompress: there are none.
    """
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LowRankLinear) and name}
    if not layers:
        raise NothingToCompress(f"{type(module).__name__} holds no layer that factorize made; nothing is merged")
    for name, layer in layers.items():
        module.set_submodule(name, merged(layer))
    return list(layers)


def _check(module: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
    holders = names_of_parameters(module)
    for name, layer in layers.items():
        weight, cure = layer.weight, f"exclude '{name}'"
        if not name:
            raise CompressError("a Linear cannot be replaced in itself; give the module that holds it")
        if len(holders.get(id(weight), [])) > 1:
            raise CompressError(f"the weight of '{name}' is shared ({', '.join(holders[id(weight)])}); {cure}")
        if type(layer) is not nn.Linear:
            raise CompressError(f"'{name}' is a {type(layer).__name__}, whose own forward would be lost; {cure}")
        if not bool(weight.isfinite().all()):
            raise CompressError(f"expected finite weights, got NaN or infinity in '{name}'")


def _rank(name: str, weight: Tensor, moment: Tensor | None, energy: float, rank: int | None) -> int:
    if rank is not None:
        full = min(weight.shape)
        if not 1 <= rank <= full:
            raise ValueError(f"expected a rank from 1 to {full}, the full one of '{name}', got {rank}")
        return rank
    return rank_for_energy(weight if moment is None else whitened(weight, moment), energy)


def _moments(module: nn.Module, layers: Mapping[str, nn.Linear], batches: Iterable[Any]) -> dict[str, Tensor]:
    """The second moment of each layer's inputs over the batches, float64."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    with evaluating(module), _gathering(layers, sums, counts):
        run(module, batches)
    missing = [name for name in layers if not counts.get(name)]
    if missing:
        raise CompressError(f"'{missing[0]}' never ran on the batches; give batches that reach it, or exclude it")
    for name, moment in sums.items():
        if not bool(moment.isfinite().all()):
            raise CompressError(f"expected finite inputs, got NaN or infinity in '{name}'; look at the batches")
    return {name: moment / counts[name] for name, moment in sums.items()}


@contextmanager
def _gathering(layers: Mapping[str, nn.Linear], sums: dict[str, Tensor], counts: dict[str, int]) -> Iterator[None]:
    def add(name: str, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).double()
        sums[name] = sums.get(name, torch.zeros((), device=rows.device)) + rows.T @ rows
        counts[name] = counts.get(name, 0) + len(rows)

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0])) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
