"""Take channels out of a trained module that pruning has left at zero: what a run with `Removal(times=0)` ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import NothingToCompress
from lightning_compress.pruning.dependency import Group, find_groups
from lightning_compress.pruning.shrink import shrink

__all__ = ["remove_zero_channels"]


@torch.no_grad()
def remove_zero_channels(
    module: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Remove channels and heads whose every parameter is zero, in place; outputs stay what they are. Runs after a fit.

    Strategies that shard parameters cannot take channels out while they train: `StructuredPruning` with
    `removal=Removal(times=0)` leaves them at zero, and this makes the module small, on one process.

    Args:
        module: whole, such as `YourModule.load_from_checkpoint(path).model`.
        args: of one forward, as small as you like.
        kwargs: the same, by name.

    Returns:
        Name of a group of channels -> how many of it went.

    Raises:
        NothingToCompress: no channel is zero in all layers it passes through.
        CompressError: the forward cannot be traced.

    >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> with torch.no_grad():
    ...     _ = net[0].weight[1:3].zero_(), net[0].bias[1:3].zero_(), net[2].weight[:, 1:3].zero_()
    >>> remove_zero_channels(net, (torch.zeros(1, 2),))
    {'0': 2}
    >>> net[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    groups = [group for group in find_groups(module, args, kwargs) if not group.reason]
    parameters = dict(module.named_parameters(remove_duplicate=False))
    keep = {group.name: ~_zero_units(group, parameters) for group in groups}
    gone = {name: int((~units).sum()) for name, units in keep.items() if not bool(units.all())}
    if not gone:
        raise NothingToCompress(
            f"none of the {sum(group.units for group in groups)} channels of {type(module).__name__} that may go is "
            f"zero in all layers it passes through; prune with StructuredPruning(removal=Removal(times=0)) first"
        )
    shrink(module, {name: keep[name] for name in gone}, groups)
    return gone


def _zero_units(group: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    zero = torch.ones(group.units, dtype=torch.bool)
    for slot in group.slots:
        if slot.tensor in parameters:  # statistics of a norm mean nothing once its weight is zero
            weight = parameters[slot.tensor].movedim(slot.dim, 0)
            empty = (weight == 0).flatten(1).all(dim=1) if weight.dim() > 1 else weight == 0
            zero &= empty.cpu()[slot.index].all(dim=1)
    if bool(zero.all()):  # something has to stay
        zero[0] = False
    return zero
