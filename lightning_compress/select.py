"""Selection: names, globs, class names and types say which layers are compressed, by the names the user wrote.

By default biases, norms, embeddings and the output head (the last Linear or Conv in registration order) are left
out; an explicit `include` may name the head.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_compress.errors import NothingToCompress
from lightning_compress.sharding import clean_name

__all__ = [
    "Pattern",
    "Selection",
    "layers_of",
    "matching_layers",
    "matching_modules",
    "names_of_parameters",
    "patterns_or_none",
    "select_layers",
    "select_weights",
]

Pattern = str | type
HEADS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Selection:
    """Layers to compress, and why each other layer of the same kinds is skipped; both by clean name."""

    layers: Mapping[str, nn.Module]
    skipped: Mapping[str, str] = field(default_factory=dict)


def _matches(pattern: Pattern, name: str, layer: nn.Module) -> bool:
    if isinstance(pattern, type):
        return isinstance(layer, pattern)
    return fnmatchcase(name, pattern) or pattern in (type(layer).__name__, f"{name}.weight")


def _matches_within(pattern: Pattern, name: str, modules: Mapping[str, nn.Module]) -> bool:
    # A pattern that matches a container selects what is inside it.
    parts = name.split(".")
    inside = (".".join(parts[:end]) for end in range(len(parts) + 1))
    return any(_matches(pattern, path, modules[path]) for path in inside if path in modules)


def patterns_or_none(patterns: Iterable[Pattern] | Pattern | None) -> tuple[Pattern, ...] | None:
    """Freeze a selection's patterns; a single pattern stands for a tuple of one."""
    if patterns is None:
        return None
    return (patterns,) if isinstance(patterns, (str, type)) else tuple(patterns)


def _check_patterns(patterns: Iterable[Pattern], modules: Mapping[str, nn.Module], option: str) -> None:
    for pattern in patterns:
        if any(_matches(pattern, name, layer) for name, layer in modules.items()):
            continue
        known = sorted({*filter(None, modules), *(type(layer).__name__ for layer in modules.values())})
        near = difflib.get_close_matches(str(pattern), known, n=3) or known[:5]
        raise ValueError(f"{option} pattern {pattern!r} matches no module; near names: {', '.join(near)}")


def select_layers(
    module: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] | None = None,
) -> Selection:
    """Select the layers of the given kinds. Runs at `setup`, and again once the module's own setup is done.

    A pattern is a module's name, a glob, a class name or a type; one that matches a container selects all in it.

    Args:
        module: the module whose layers are named.
        kinds: classes that can be compressed.
        include: patterns; None is everything except the output head.
        exclude: patterns; they win over `include`.

    Raises:
        ValueError: a pattern matches nothing, or nothing of these kinds.
        NothingToCompress: nothing is left, or a lazy layer has no weight yet.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> chosen = select_layers(net, (nn.Linear,))
    >>> list(chosen.layers), dict(chosen.skipped)
    (['0'], {'2': 'output head'})
    """
    modules = {clean_name(name): layer for name, layer in module.named_modules()}
    included, excluded = patterns_or_none(include) or (), patterns_or_none(exclude) or ()
    _check_patterns(included, modules, "include")
    _check_patterns(excluded, modules, "exclude")
    head = next((name for name, layer in reversed(modules.items()) if isinstance(layer, HEADS)), None)
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, layer in modules.items():
        if not isinstance(layer, kinds):
            continue
        if any(_matches_within(pattern, name, modules) for pattern in excluded):
            skipped[name] = "excluded"
        elif include is not None and not any(_matches_within(pattern, name, modules) for pattern in included):
            skipped[name] = "not included"
        elif include is None and name == head:
            skipped[name] = "output head"
        elif isinstance(getattr(layer, "weight", None), UninitializedParameter):
            raise NothingToCompress(
                f"'{name}' is lazy and has no weight yet; run one forward before fit, or exclude it"
            )
        else:
            layers[name] = layer
    if not layers:
        raise NothingToCompress(_nothing(module, kinds, skipped))
    _check_kinds(included, modules, kinds)
    return Selection(layers, skipped)


def _check_kinds(included: Iterable[Pattern], modules: Mapping[str, nn.Module], kinds: tuple[type, ...]) -> None:
    for pattern in included:
        matched = {name: layer for name, layer in modules.items() if _matches_within(pattern, name, modules)}
        if not any(isinstance(layer, kinds) for layer in matched.values()):
            name, layer = next(iter(matched.items()))
            raise ValueError(
                f"include pattern {pattern!r} selects nothing here: it stands for '{name}', a {type(layer).__name__}, "
                f"and only {', '.join(kind.__name__ for kind in kinds)} can be selected; take it out of include"
            )


def _nothing(module: nn.Module, kinds: tuple[type[nn.Module], ...], skipped: Mapping[str, str]) -> str:
    wanted = ", ".join(kind.__name__ for kind in kinds)
    if not skipped:
        return f"expected layers of kind {wanted} in {type(module).__name__}, found none; nothing can be compressed"
    reasons = "; ".join(f"'{name}': {reason}" for name, reason in skipped.items())
    return (
        f"the selection in {type(module).__name__} is empty. Layers of kind {wanted}, and why each was left out: "
        f"{reasons}. "
        f"Name what to compress with include=[...] or take patterns out of exclude"
    )


def names_of_parameters(module: nn.Module) -> dict[int, list[str]]:
    """Return every name of each parameter, by its id; one that is tied has several.

    >>> layer = nn.Linear(2, 2)
    >>> [len(names) for names in names_of_parameters(nn.ModuleList([layer, layer])).values()]
    [2, 2]
    """
    found: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def select_weights(
    module: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    include: Iterable[Pattern] | None = None,
    exclude: Iterable[Pattern] | None = None,
) -> dict[str, nn.Parameter]:
    """Select weight parameters by `select_layers`; a weight tied to an embedding is left out, a shared one comes once.

    Raises:
        ValueError: as `select_layers`.
        NothingToCompress: nothing is left.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> list(select_weights(net, (nn.Linear,)))
    ['0.weight']
    """
    selection = select_layers(module, kinds, include, exclude)
    embedded = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    weights: dict[str, nn.Parameter] = {}
    for name, layer in selection.layers.items():
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        if weight is None or id(weight) in embedded or any(weight is other for other in weights.values()):
            continue
        weights[f"{name}.weight" if name else "weight"] = weight
    if not weights:
        raise NothingToCompress(
            f"every selected weight of {type(module).__name__} is tied to an embedding or reparametrized: "
            f"{', '.join(selection.layers)}; include other layers"
        )
    return weights


def layers_of(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    """Return the layer that each selected weight belongs to; of several that share it, the first.

    >>> net = nn.Sequential(nn.Linear(4, 4))
    >>> layers_of(net, {"0.weight": net[0].weight})
    {'0.weight': Linear(in_features=4, out_features=4, bias=True)}
    """
    layers = {id(layer.weight): layer for layer in reversed(list(module.modules())) if hasattr(layer, "weight")}
    return {name: layers[id(weight)] for name, weight in weights.items()}


def matching_modules(module: nn.Module, patterns: Iterable[Pattern] | Pattern, option: str) -> dict[str, nn.Module]:
    """Return the modules that patterns name themselves, by clean name, in the module's order. Runs at `setup`.

    Unlike a selection of layers, a pattern that names a container does not stand for what is in it; what stands is the
    innermost of several wrappers. "" is the module itself.

    Raises:
        ValueError: a pattern, written in `option`, matches nothing.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> list(matching_modules(net, ["Linear", "1"], "layers"))
    ['0', '1', '2']
    """
    modules = {clean_name(name): layer for name, layer in module.named_modules()}
    given = patterns_or_none(patterns) or ()
    _check_patterns(given, modules, option)
    return {
        name: layer
        for name, layer in modules.items()
        if any(_matches(pattern, name, layer) and (name or pattern == "") for pattern in given)
    }


def matching_layers(module: nn.Module, layers: Iterable[str], pattern: Pattern, option: str) -> list[str]:
    """Return which of these layers, by clean name, one pattern selects, itself or as a container around them.

    Raises:
        ValueError: the pattern, written in `option`, matches nothing in the module, or none of the layers.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> matching_layers(net, ["0", "2"], "Linear", "per_layer")
    ['0', '2']
    """
    modules = {clean_name(name): layer for name, layer in module.named_modules()}
    _check_patterns([pattern], modules, option)
    names = list(layers)
    found = [name for name in names if _matches_within(pattern, name, modules)]
    if not found:
        raise ValueError(
            f"{option} pattern {pattern!r} matches none of the selected layers, which are {', '.join(names)}; name it "
            f"in include, or take the pattern out"
        )
    return found
