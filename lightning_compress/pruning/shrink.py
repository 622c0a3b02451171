"""Channels taken out of a module: parameters, buffers, attributes and the optimizers' state, in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.errors import CompressError
from lightning_compress.pruning.shapes import (
    PER_HEAD,
    describe_shapes,
    fit_attributes,
    owners,
    restore_shapes,
    set_tensor,
)

if TYPE_CHECKING:
    from lightning_compress.pruning.dependency import Group

__all__ = ["check_optimizers", "describe_shapes", "restore_shapes", "shrink"]

Kept = dict[tuple[str, int], Tensor]


@torch.no_grad()
def shrink(
    module: nn.Module, keep: Mapping[str, Tensor], groups: Sequence[Group], optimizers: Sequence[Optimizer] = ()
) -> None:
    """Take channels out of a module, in place. Runs between optimizer steps.

    Changed parameters are new objects with the old `requires_grad` and the kept part of the gradient; optimizers hold
    them at the same place, with the kept part of their state.

    Args:
        module: the module that `find_groups` saw, or a copy.
        keep: by group name, bool, one a unit, True = stays; other groups stay whole.
        groups: as `find_groups` returned them.
        optimizers: whose parameters change.

    Raises:
        ValueError: a mask of another size, one that leaves nothing, or one of a group that may not go.
        CompressError: an optimizer's state cannot follow.
    """
    chosen = [group for group in groups if group.name in keep and not bool(keep[group.name].all())]
    for group in chosen:
        _check(group, keep[group.name])
    named = owners(module)
    kept = _kept(chosen, keep, {name: getattr(*places[0]) for name, places in named.items()})
    shrunken = {id(getattr(*named[name][0])): _axes(kept, name) for name, _ in kept}
    states = [_states(optimizer, shrunken) for optimizer in optimizers]  # first: it may refuse
    counts = {name: _groups_left(named[name][0][0], kept, name) for name, _ in kept}
    moved: dict[Tensor, Tensor] = {}
    for name in dict.fromkeys(name for name, _ in kept):
        old, axes = getattr(*named[name][0]), _axes(kept, name)
        moved[old] = set_tensor(named[name], _sliced(old.detach(), axes))
        moved[old].grad = None if old.grad is None else _sliced(old.grad, axes)
    for name in counts:
        for layer, _ in named[name]:
            fit_attributes(layer, counts[name])
    _fit_heads(module, chosen, keep, named)
    for optimizer, state in zip(optimizers, states, strict=True):
        _follow(optimizer, moved, state)


def _check(group: Group, keep: Tensor) -> None:
    if group.reason:
        raise ValueError(f"channels of '{group.name}' cannot go: {group.reason}")
    if keep.shape != (group.units,) or keep.dtype != torch.bool or not bool(keep.any()):
        raise ValueError(
            f"'{group.name}' needs a bool mask of {group.units} units of which one at least stays, got {keep.dtype} of "
            f"shape {tuple(keep.shape)} that keeps {int(keep.sum())}"
        )


def _kept(groups: Sequence[Group], keep: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Kept:
    """Return the positions that stay along each dimension that loses any."""
    stays: Kept = {}
    for group in groups:
        for slot in group.slots:
            place = (slot.tensor, slot.dim)
            if place not in stays:
                stays[place] = torch.ones(tensors[slot.tensor].shape[slot.dim], dtype=torch.bool)
            stays[place][slot.index[~keep[group.name].cpu()].flatten()] = False
    return {place: mask.nonzero().flatten() for place, mask in stays.items()}


def _axes(kept: Kept, name: str) -> dict[int, Tensor]:
    return {dim: index for (tensor, dim), index in kept.items() if tensor == name}


def _sliced(tensor: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    for dim, index in axes.items():
        tensor = tensor.index_select(dim, index.to(tensor.device))
    return tensor.contiguous()


def _groups_left(layer: nn.Module, kept: Kept, name: str) -> int | None:
    """Return how many groups a grouped convolution or group norm is left with; None if it has as many as before."""
    groups = getattr(layer, "num_groups" if isinstance(layer, nn.GroupNorm) else "groups", 1)
    if not isinstance(groups, int) or groups == 1 or (name, 0) not in kept or not name.endswith("weight"):
        return None
    size = getattr(*_place(layer)).shape[0]
    if size % groups or (name, 1) in kept:
        return None
    left = torch.bincount(kept[name, 0] // (size // groups), minlength=groups)
    return int((left > 0).sum()) if set(left.tolist()) <= {0, size // groups} else None


def _place(layer: nn.Module) -> tuple[nn.Module, str]:
    return layer, "weight"


def _fit_heads(
    module: nn.Module,
    groups: Sequence[Group],
    keep: Mapping[str, Tensor],
    named: Mapping[str, list[tuple[nn.Module, str]]],
) -> None:
    """Scale the numbers that an attention module remembers about its heads, when some of them are gone."""
    parents = {id(child): parent for parent in module.modules() for child in parent.children()}
    for group in groups:
        made = [slot for slot in group.slots if slot.index.shape[1] > 1]
        layers = {id(layer): layer for slot in made for layer, _ in named[slot.tensor]}
        holders = {id(parents[key]): parents[key] for key in layers if key in parents}
        for holder in holders.values():
            for name in PER_HEAD:
                value = vars(holder).get(name)
                if type(value) is int and value % group.units == 0:
                    setattr(holder, name, value // group.units * int(keep[group.name].sum()))


# Optimizers


def check_optimizers(
    optimizers: Sequence[Optimizer],
    lost: str = "from which no channel can be taken out",
    instead: str = "GradualPruning, which masks",
) -> None:
    """Raise on optimizers whose state can never follow parameters that change. Runs before the first step.

    Args:
        optimizers: of the run.
        lost: what cannot be done with their state.
        instead: what can be used with them.

    Raises:
        CompressError: LBFGS.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise CompressError(
            f"LBFGS keeps its state as one flat vector of all parameters, {lost}; use SGD, Adam or another optimizer "
            f"that keeps its state by parameter, or {instead}"
        )


def _states(optimizer: Optimizer, shrunken: Mapping[int, dict[int, Tensor]]) -> dict[Tensor, dict[str, Any]]:
    """Return the kept part of the state of each parameter that changes, by the old parameter."""
    check_optimizers([optimizer])
    kept = {}
    for old in [parameter for parameter in optimizer.state if id(parameter) in shrunken]:
        what = {key: f"'{key}' of {type(optimizer).__name__}" for key in optimizer.state[old]}
        state = optimizer.state[old].items()
        kept[old] = {key: _kept_state(value, old, shrunken[id(old)], what[key]) for key, value in state}
    return kept


def _kept_state(value: Any, old: Tensor, axes: Mapping[int, Tensor], what: str) -> Any:
    """Return the kept part of one entry; sizes of 1 stay, as in Adafactor's rows and columns."""
    if not isinstance(value, (Tensor, list, tuple)) or (isinstance(value, Tensor) and value.numel() <= 1):
        return value
    if isinstance(value, Tensor) and value.dim() == old.dim():
        sizes = list(zip(value.shape, old.shape, strict=True))
        if all(mine in (1, whole) for mine, whole in sizes):
            return _sliced(value, {dim: index for dim, index in axes.items() if value.shape[dim] != 1})
    raise CompressError(
        f"state {what} does not have its parameter's shape {tuple(old.shape)}, so that channels cannot be taken out of "
        f"it; use an optimizer that keeps its state in the parameter's shape (SGD, Adam, ...)"
    )


def _follow(optimizer: Optimizer, moved: Mapping[Tensor, Tensor], states: Mapping[Tensor, dict[str, Any]]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [moved.get(parameter, parameter) for parameter in group["params"]]
    for old, state in states.items():
        del optimizer.state[old]
        optimizer.state[moved[old]] = state
