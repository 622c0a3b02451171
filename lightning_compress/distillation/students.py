"""Students made of their teacher: some of its blocks, or all of them narrower, with the teacher's weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.distillation.configs import check_rebuilds, correct_configs, renumber
from lightning_compress.distillation.pairing import blocks_of, pair_by_depth
from lightning_compress.errors import NothingToCompress
from lightning_compress.pruning.channels import Removal, choose, kept_share
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.dependency import check_groups, find_groups
from lightning_compress.pruning.shrink import shrink
from lightning_compress.pruning.survivors import Survivors
from lightning_compress.sharding import clean_name

__all__ = ["keep_layers", "kept_places", "narrow"]

Layers = str | int | Sequence[int | str]


def keep_layers(teacher: nn.Module, layers: Layers, container: str | None = None) -> nn.Module:
    """Return a copy of a teacher with only some of its blocks, weights and all; the teacher is left alone.

    Runs before a fit. Sanh et al. 2019, "DistilBERT", section 3: a student that starts from one of every two layers of
    its teacher; Shleifer & Rush 2020, "Pre-trained Summarization Distillation", for decoders. `narrow` makes blocks
    smaller instead; both may follow each other in this order.

    The blocks are numbered anew, and so are their own numbers of themselves (`layer_idx`), by which they find their
    place in a cache of keys and values. A transformers config gets the new count and shorter lists of layers, so that
    `save_pretrained` and `from_pretrained` give the same student. Mode and `requires_grad` stay the teacher's.

    Args:
        teacher: any module with a list of blocks.
        layers: "every second", counted from the last; "first and last"; how many, evenly spread, as `pair_by_depth`
            spreads them (the last is kept); or which, by place (-1 is the last) or full name. They stay in order.
        container: name of the ModuleList, ModuleDict or Sequential that holds the blocks; None finds it (`blocks_of`).

    Raises:
        ValueError: no blocks, a shared one, none of that place or name, one twice, or a transformers config that cannot
            say what was kept (T5 must keep its first block, which has the position bias of all).
        TypeError: layers of another type.

    >>> teacher = nn.Sequential(nn.Linear(2, 4), nn.Sequential(*(nn.Linear(4, 4) for _ in range(6))), nn.Linear(4, 2))
    >>> student = keep_layers(teacher, 2)
    >>> [next(i for i in range(6) if block.weight.equal(teacher[1][i].weight)) for block in student[1]]
    [2, 5]
    """
    name = _container(teacher, container)
    student = copy.deepcopy(teacher)
    held: Any = _named(student)[name]
    blocks = dict(held.named_children())
    if len(blocks) != len(held):
        raise ValueError(
            f"expected blocks of '{name}' to be different modules, got {len(held)} blocks of {len(blocks)} modules; "
            f"a model that calls one block several times gets no smaller by calling it less"
        )
    kept = kept_places([f"{name}.{child}".removeprefix(".") for child in blocks], layers)
    before = list(blocks.values())
    _keep(held, blocks, kept)
    renumber(before, kept)
    correct_configs(student, name, len(before), kept)
    check_rebuilds(student, name, before)
    return student


def _named(module: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): layer for name, layer in module.named_modules()}


def _container(teacher: nn.Module, name: str | None) -> str:
    if name is None:
        found = blocks_of(teacher)
        if not found:
            raise ValueError(
                f"expected {type(teacher).__name__} to have a ModuleList or Sequential of blocks of one class, found "
                f"none; name the list that holds them: container='encoder.layers'"
            )
        return found[0].rpartition(".")[0]
    lists = [
        key
        for key, layer in _named(teacher).items()
        if isinstance(layer, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) and len(layer)
    ]
    if name not in lists:
        raise ValueError(
            f"expected container to name a ModuleList, ModuleDict or Sequential of {type(teacher).__name__}, got "
            f"'{name}'; it has {', '.join(map(repr, lists)) or 'none'}"
        )
    return name


def kept_places(names: Sequence[str], layers: Layers) -> list[int]:
    """Return the places of the blocks that stay, rising. For `layers` see `keep_layers`.

    Raises:
        ValueError: a place or name that is not there, or twice; or nothing to keep.
        TypeError: layers of another type.

    >>> kept_places([f"layer.{i}" for i in range(6)], "every second")
    [1, 3, 5]
    >>> kept_places([f"layer.{i}" for i in range(6)], [0, "layer.2", -1])
    [0, 2, 5]
    """
    count = len(names)
    if layers == "every second":
        return list(range(count - 1, -1, -2))[::-1]
    if layers == "first and last":
        return sorted({0, count - 1})
    if isinstance(layers, str | bool) or not isinstance(layers, int | Sequence):
        raise TypeError(
            f"expected layers to be 'every second', 'first and last', how many, or a list of places or names, got "
            f"{layers!r}"
        )
    if isinstance(layers, int):
        if not 1 <= layers <= count:
            raise ValueError(f"expected to keep 1 to {count} of the {count} blocks, got {layers}")
        return [names.index(name) for _, name in pair_by_depth([""] * layers, names)]
    places = [_place(names, layer) for layer in layers]
    twice = [layers[at] for at, place in enumerate(places) if place in places[:at]]
    if twice or not places:
        what = f"{twice[0]!r}, which is there already" if twice else "an empty list"
        raise ValueError(f"expected layers to list blocks to keep, each once, got {what}")
    return sorted(places)


def _place(names: Sequence[str], layer: Any) -> int:
    if isinstance(layer, bool) or not isinstance(layer, int | str):
        raise TypeError(f"expected places or names of blocks, got {layer!r}")
    if isinstance(layer, str) and layer in names:
        return names.index(layer)
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return layer % len(names)
    raise ValueError(
        f"expected a block of '{names[0]}' to '{names[-1]}', or its place from {-len(names)} to {len(names) - 1}, got "
        f"{layer!r}"
    )


def _keep(container: nn.Module, blocks: Mapping[str, nn.Module], kept: Sequence[int]) -> None:
    """Leave only these blocks in their container; numbers close up, other names stay."""
    names, modules = list(blocks), list(blocks.values())
    numbered = all(name.isdigit() for name in names)
    for name in names:
        delattr(container, name)
    for at, place in enumerate(kept):
        container.add_module(str(at) if numbered else names[place], modules[place])


def narrow(teacher: nn.Module, example: Any, share: float) -> nn.Module:
    """Return a copy of a teacher with fewer channels, hidden units and heads: those of largest weights stay.

    Runs before a fit: `StructuredPruning` without the training, see `pruning.shrink`. The student's parts remember
    their sizes, a transformers config does not: build the teacher, then `restore_shapes`, to load it again.

    Args:
        teacher: a module whose forward `torch.export` can trace.
        example: one forward's inputs: a dict, a tuple, or one tensor.
        share: of the parameters that stays at most, in (0, 1).

    Raises:
        ValueError: a share outside (0, 1), or so small that a layer would keep less than a tenth.
        NothingToCompress: no channel can go.
        CompressError: the forward cannot be traced.

    >>> import torch
    >>> narrow(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(1, 2), 0.6)
    Sequential(
      (0): Linear(in_features=2, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share is what stays of the parameters, in (0, 1), got {share}")
    args, kwargs = _arguments(example)
    student = copy.deepcopy(teacher)
    groups = check_groups(student, find_groups(student, args, kwargs), args, kwargs)
    free = [group for group in groups if not group.reason]
    if not free:
        reasons = "; ".join(f"'{group.name}': {group.reason}" for group in groups) or "no channels were found"
        raise NothingToCompress(f"no channel of {type(teacher).__name__} can be removed: {reasons}")
    parameters = {clean_name(name): parameter for name, parameter in student.named_parameters()}
    # By matrices and kernels only, as structured pruning scores: norms and biases have no size to compare.
    by_weight = {name: magnitude(parameter) for name, parameter in parameters.items() if parameter.dim() > 1}
    shapes = {clean_name(n): t.shape for n, t in (*student.named_parameters(), *student.named_buffers())}
    costs = {name: float(parameter.numel()) for name, parameter in parameters.items()}
    scores = Survivors(free).scores(by_weight, relative=True)
    limits = Removal(of="parameters")
    shrink(student, choose(scores, lambda kept: kept_share(free, kept, costs, shapes), 1.0 - share, limits), free)
    return student


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, tuple | list) else (example,)), {}
