"""Which channels of which parameters go together: groups, found by tracing one forward of the module.

Fang et al. 2023, "DepGraph: Towards Any Structural Pruning", has the idea of the group; here it is found by running
labels of channels through the forward (`labels`), so that concatenations, views, shuffles and heads need no rule.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.pruning.labels import Labels
from lightning_compress.pruning.shrink import shrink
from lightning_compress.pruning.tracing import Place, evaluated_copy, label, tensors_of, traced
from lightning_compress.sharding import clean_name

__all__ = ["Group", "Slot", "check_groups", "find_groups", "zero"]

Unit = dict[int, list[int]]  # number of a place -> positions there


@dataclass(frozen=True)
class Slot:
    """Positions along one dimension of a parameter or buffer that go with the units of a group.

    Args:
        tensor: its clean name in the module.
        dim: the dimension.
        index: int64, units x width.
    """

    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Group:
    """Units (channels, heads) that can go one by one, each from every slot at once.

    Args:
        name: of the first layer that makes them.
        slots: all places where they are.
        units: how many there are.
        reason: why none may go; empty if they may.
    """

    name: str
    slots: tuple[Slot, ...]
    units: int
    reason: str = ""


def find_groups(module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> list[Group]:
    """Find the channels that layers of a module make, and which of them go together. Runs at `setup`; traces once.

    Args:
        module: any module whose forward `torch.export` can trace; it is left as it is.
        args: of one forward, as small as you like.
        kwargs: the same, by name.

    Returns:
        Groups in the order of parameters; those with a reason may not be pruned.

    Raises:
        CompressError: the forward cannot be traced.

    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> for group in find_groups(net, (torch.zeros(1, 2),)):
    ...     print(group.name, group.units, [(slot.tensor, slot.dim) for slot in group.slots], group.reason)
    0 8 [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
    2 3 [('2.weight', 0), ('2.bias', 0)] is an output of the forward
    """
    labels, places = label(module, traced(module, args, kwargs or {}))
    return _groups(labels, places)


def _groups(labels: Labels, places: Sequence[Place]) -> list[Group]:
    made = {root for layer in labels.made for root in set(labels.root(layer[layer != 0]).tolist())}
    reasons: dict[int, str] = {}
    for frozen, reason in labels.frozen:
        for root in set(labels.root(frozen).tolist()):
            reasons.setdefault(root, reason)
    units: dict[int, Unit] = defaultdict(lambda: defaultdict(list))
    for at, place in enumerate(places):
        for position, root in enumerate(labels.root(place.labels).tolist()):
            if root in made:
                units[root][at].append(position)
    alike: dict[Any, list[Unit]] = defaultdict(list)
    for root, unit in units.items():
        widths = tuple((at, len(positions)) for at, positions in unit.items())
        alike[widths, reasons.get(root, "")].append(unit)
    found = sorted(alike.items(), key=lambda item: item[0][0])
    return _numbered([_group(places, [at for at, _ in widths], members, reason) for (widths, reason), members in found])


def _group(places: Sequence[Place], slots: Sequence[int], units: Sequence[Unit], reason: str) -> Group:
    name = places[slots[0]].tensor.rpartition(".")[0] or places[slots[0]].tensor
    if len(units) == 1 and not reason:
        reason = "all its channels depend on each other"
    indexed = (Slot(places[at].tensor, places[at].dim, torch.tensor([unit[at] for unit in units])) for at in slots)
    return Group(name, tuple(indexed), len(units), reason)


def _numbered(groups: Sequence[Group]) -> list[Group]:
    """Tell groups of one layer apart: conv1, conv1:2."""
    seen: dict[str, int] = defaultdict(int)
    named = []
    for group in groups:
        seen[group.name] += 1
        count = seen[group.name]
        named.append(replace(group, name=f"{group.name}:{count}") if count > 1 else group)
    return named


# Checking


def check_groups(
    module: nn.Module, groups: Sequence[Group], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> list[Group]:
    """Remove one unit of each group from a copy, zero it in another, and compare. Runs at `setup`.

    A forward may know sizes by heart, which a graph does not show: groups with which it fails, or computes something
    else than with zeros, get that as their reason. All groups are tried at once, and halved only when that fails.

    Returns:
        The groups, some with a new reason.
    """
    checked = list(groups)
    while failing := _failing(module, [group for group in checked if not group.reason], args, kwargs or {}):
        # And once more: what passes in parts may not pass together.
        checked = [replace(group, reason=failing.get(group.name, group.reason)) for group in checked]
    return checked


def _failing(
    module: nn.Module, groups: Sequence[Group], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, str]:
    failure = _difference(module, groups, args, kwargs) if groups else ""
    if not failure:
        return {}
    if len(groups) == 1:
        return {groups[0].name: failure}
    half = len(groups) // 2
    parts = [_failing(module, part, args, kwargs) for part in (groups[:half], groups[half:])]
    # Each half can go, both cannot: the second one stays.
    return parts[0] | parts[1] or dict.fromkeys((group.name for group in groups[half:]), failure)


@torch.no_grad()
def _difference(module: nn.Module, groups: Sequence[Group], args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Say how a forward without the first unit of each group differs from one with zeros there; "" if it does not."""
    masked, smaller = _perturbed(module), _perturbed(module)
    keep = {group.name: torch.arange(group.units) > 0 for group in groups}
    zero(masked, keep, groups)
    shrink(smaller, keep, groups)
    expected = _outputs(masked, args, kwargs)
    try:
        found = _outputs(smaller, args, kwargs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, KeyError, AttributeError) as error:
        return f"the forward has sizes of its own ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            return f"the forward returns {tuple(other.shape)} without a channel, {tuple(one.shape)} with it"
        if one.is_floating_point() and not _close(one, other):
            return "the forward without a channel is not that with zeros there: it uses channels by number"
    return ""


def _perturbed(module: nn.Module) -> nn.Module:
    """Return a copy whose weights are none of them zero, so that every channel makes a difference."""
    clone = evaluated_copy(module, share=False)
    noise = torch.Generator().manual_seed(0)
    for parameter in clone.parameters():
        if parameter.is_floating_point():
            drawn = torch.randn(parameter.shape, generator=noise, dtype=torch.float32)
            parameter.add_(drawn.to(parameter.device, parameter.dtype), alpha=0.02)
    return clone


def _outputs(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        return tensors_of(module(*args, **kwargs))


def _close(one: Tensor, other: Tensor) -> bool:
    tolerance = 200 * torch.finfo(one.dtype).eps * max(1.0, float(one.abs().max()))
    return bool(torch.isclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True).all())


@torch.no_grad()
def zero(module: nn.Module, keep: Mapping[str, Tensor], groups: Sequence[Group]) -> None:
    """Zero, in place, the channels that `shrink` would take out; running means and variances stay.

    >>> net = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))
    >>> zero(net, {"0": torch.tensor([False, True])}, find_groups(net, (torch.zeros(1, 1),)))
    >>> net[1].weight[0, 0].item()
    0.0
    """
    parameters = {clean_name(name): parameter for name, parameter in module.named_parameters()}
    for group in groups:
        if group.name in keep:
            for slot in group.slots:
                if slot.tensor in parameters:
                    gone = slot.index[~keep[group.name].cpu()].flatten().to(parameters[slot.tensor].device)
                    parameters[slot.tensor].index_fill_(slot.dim, gone, 0.0)
