"""Replace a module's layers by two smaller ones each, where that saves weights, and put them back together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError, NothingToCompress
from lightning_compress.factorization.factors import FACTORABLE, factor, factored_layers, unfactor
from lightning_compress.factorization.ranks import Energy, Rank, chosen_ranks
from lightning_compress.factorization.svd import Decomposition, activation_weighted_svd, svd
from lightning_compress.pruning.calibration import evaluating, run
from lightning_compress.pruning.hessians import as_matrices, watching
from lightning_compress.select import Pattern, patterns_or_none, select_layers
from lightning_compress.sharding import clean_name

__all__ = ["Decompose", "check_weights", "decomposed", "factorize", "merge", "select_factorable", "wants"]

Decompose = Callable[..., Decomposition]
KNOWN = frozenset({"weight", "moment", "fisher"})


@torch.no_grad()
def factorize(
    module: nn.Module,
    batches: Iterable[Any] | None = None,
    rank: Rank | None = None,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern | None = None,
) -> dict[str, int]:
    """Replace layers by two smaller ones, in place, where fewer weights and MACs are left. Runs when called.

    With batches by what the layers' inputs make of the error (`activation_weighted_svd`), else by the error of the
    weight alone (`svd`). Train the module on afterwards; `merge` gives plain layers back. Keys change for the layers
    that are replaced: `a.weight` becomes `a.down.weight` and `a.up.weight`. `LowRank` does the same within a run.

    Args:
        module: holds the layers; it runs in eval mode on the batches and is put back.
        batches: inputs on the module's device: a tensor, a tuple or list of positional arguments, or a dict of keyword
            arguments each.
        rank: one for all layers, or a rule such as `ranks.Budget(0.5)`; None is `ranks.Energy(0.95)`.
        include: names, globs, class names or types; None is every Linear, Conv1d and Conv2d but the output head.
        exclude: the same, left as they are.

    Returns:
        Name of a replaced layer -> its rank. Layers that would not get smaller are left and not in it.

    Raises:
        ValueError: a rank below 1, or a rule's option out of its range.
        NothingToCompress: nothing is selected, or no layer would get smaller.
        CompressError: an included layer shares its weight, has groups or a forward of its own; one never runs on the
            batches; NaN or infinite weights or inputs. No layer has been replaced.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    >>> factorize(net, rank=8), type(net[0]).__name__
    ({'0': 8}, 'Factored')
    """
    layers, _ = select_factorable(module, patterns_or_none(include), patterns_or_none(exclude))
    if not layers:
        raise NothingToCompress(f"every selected layer of {type(module).__name__} is factored already")
    check_weights(layers)
    moments = {} if batches is None else _moments(module, layers, batches)
    method = svd if batches is None else activation_weighted_svd
    return decomposed(
        layers, {name: {"moment": moment} for name, moment in moments.items()}, method, rank or Energy(0.95)
    )


@torch.no_grad()
def merge(module: nn.Module) -> list[str]:
    """Replace the layers that `factorize` or `LowRank` made by a plain one each, in place, under its own keys.

    Runs when a user calls it. The weight is the product of the two, rounded once.

    Returns:
        Names of the layers.

    Raises:
        NothingToCompress: there are none.
    """
    layers = factored_layers(module)
    if not layers:
        raise NothingToCompress(f"{type(module).__name__} holds no layer that factorize made; nothing is merged")
    for layer in layers.values():
        unfactor(layer)
    return list(layers)


# What `factorize` and `LowRank` share


def select_factorable(
    module: nn.Module,
    include: tuple[Pattern, ...] | None,
    exclude: tuple[Pattern, ...] | None,
    frozen: bool = True,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that can be two, by clean name, and why others cannot. Runs when called, and at `setup`.

    Layers that are two already are passed over.

    Args:
        module: holds the layers.
        include: patterns; None is everything but the output head, and but what cannot be two.
        exclude: patterns; they win over `include`.
        frozen: take weights that do not learn without being named.

    Raises:
        NothingToCompress: nothing is selected.
        CompressError: a layer that `include` selects cannot be two.
    """
    factored = factored_layers(module)
    parts = {id(part) for layer in factored.values() for part in (layer.down, layer.up)}
    selection = select_layers(module, FACTORABLE, include, exclude)
    holders = _holders(module)
    layers: dict[str, nn.Module] = {}
    skipped = dict(selection.skipped)
    for name, layer in selection.layers.items():
        if id(layer) in parts:
            continue
        reason = _why_not(layer, holders, frozen or include is not None)
        if reason and include is not None:
            raise CompressError(f"'{name}' {reason}; exclude '{name}'")
        if reason:
            skipped[name] = reason
        else:
            layers[name] = layer
    if not layers and not factored:
        reasons = "; ".join(f"'{name}' {reason}" for name, reason in skipped.items())
        raise NothingToCompress(f"no layer of {type(module).__name__} can be factored: {reasons}")
    return layers, skipped


def _holders(module: nn.Module) -> dict[int, list[str]]:
    """Names of the layers that hold each parameter as their own, by its id; a layer with two names comes once."""
    found: dict[int, list[str]] = {}
    for name, layer in module.named_modules():
        for parameter in dict(layer.named_parameters(recurse=False)).values():
            found.setdefault(id(parameter), []).append(clean_name(name))
    return found


def _why_not(layer: nn.Module, holders: Mapping[int, list[str]], frozen: bool) -> str:
    if type(layer) not in FACTORABLE:
        return f"is a {type(layer).__name__}, whose own forward would be lost"
    if int(getattr(layer, "groups", 1)) > 1:
        return f"has {layer.groups} groups, whose matrices are small already"
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return "computes its weight in each forward (weight_norm, torch.nn.utils.prune), so that nothing can replace it"
    if not frozen and not weight.requires_grad:
        return "is frozen, so that nothing could make up for what is lost"
    names = holders[id(weight)]
    return f"shares its weight ({', '.join(names)})" if len(names) > 1 else ""


def wants(method: Decompose) -> frozenset[str]:
    """Return what a decomposition asks for: the names of its parameters without a default. Runs at construction.

    >>> sorted(wants(activation_weighted_svd))
    ['moment', 'weight']

    Raises:
        TypeError: it asks for something unknown.
    """
    parameters = inspect.signature(method).parameters.values()
    asked = frozenset(each.name for each in parameters if each.default is each.empty)
    if not asked <= KNOWN or "weight" not in asked:
        raise TypeError(
            f"a decomposition takes weight, and may ask for moment or fisher, by these names; got "
            f"{getattr(method, '__name__', method)}({', '.join(sorted(asked))})"
        )
    return asked


def check_weights(layers: Mapping[str, nn.Module], then: str = "") -> None:
    """Raise on NaN or infinite weights, before any layer is changed.

    Args:
        layers: by name.
        then: the end of the message.

    Raises:
        CompressError: with the first name.
    """
    for name, layer in layers.items():
        if not bool(layer.get_parameter("weight").isfinite().all()):
            raise CompressError(f"NaN or infinite weights of '{name}.weight'{then}")


@torch.no_grad()
def decomposed(
    layers: Mapping[str, nn.Module], known: Mapping[str, Mapping[str, Tensor]], method: Decompose, rank: Rank
) -> dict[str, int]:
    """Decompose layers, choose ranks, and turn those into two that get smaller. Returns their ranks.

    Args:
        layers: by name.
        known: of each layer, what the method asks for besides the weight, as matrices.
        method: of `factorization.svd`.
        rank: one for all, or a rule.

    Raises:
        ValueError: as `chosen_ranks`.
        NothingToCompress: no layer would get smaller. None has been changed.
    """
    matrices = {name: as_matrices(layer, layer.get_parameter("weight").detach())[0] for name, layer in layers.items()}
    asked = wants(method) - {"weight"}
    terms = {
        name: method(weight=matrix, **{each: known[name][each] for each in asked}) for name, matrix in matrices.items()
    }
    shapes = {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in matrices.items()}
    values = {name: each.values for name, each in terms.items()}
    ranks = chosen_ranks(rank, values, shapes)
    if not ranks:
        full = ", ".join(f"{name} {len(each)}" for name, each in values.items())
        raise NothingToCompress(f"no layer would get smaller at rank={rank!r} (full ranks: {full}); lower it")
    for name, own in ranks.items():
        factor(layers[name], *terms[name].truncated(own))
    return ranks


def _moments(module: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]) -> dict[str, Tensor]:
    """The second moment of each layer's inputs over the batches, up to a factor."""
    weights: dict[str, Tensor] = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    with evaluating(module), watching(module, weights) as hessians:
        hessians.start(weights)
        run(module, batches)
        found = {name: hessians[name] for name in weights}
    for name, hessian in found.items():
        if not int(hessian.samples):
            raise CompressError(f"'{name}' never ran on the batches; give batches that reach it, or exclude it")
        if not bool(hessian.mean.isfinite().all()):
            raise CompressError(f"expected finite inputs, got NaN or infinity in '{name}'; look at the batches")
    return {name: hessian.mean[0] for name, hessian in found.items()}
