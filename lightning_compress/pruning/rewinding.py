"""Put a model and its optimizers back to an earlier step: what they hold, copies of it, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.sharding import clean_name

__all__ = ["copied", "fresh_state", "live_tensors", "put_back", "restart"]


def live_tensors(module: nn.Module, buffers: bool) -> dict[str, Tensor]:
    """Return the parameters by clean name, and with `buffers` those buffers that a checkpoint has.

    >>> list(live_tensors(nn.BatchNorm1d(2), buffers=True))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    live: dict[str, Tensor] = dict(module.named_parameters())
    if buffers:
        saved = module.state_dict(keep_vars=True).keys()  # the others are caches, and may change their shape
        live |= {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {clean_name(name): tensor for name, tensor in live.items()}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in the host's memory: they are read a few times in a run, a device's memory all the time.

    >>> weight = torch.ones(2)
    >>> copies = copied({"weight": weight})
    >>> weight.zero_(), copies["weight"]
    (tensor([0., 0.]), tensor([1., 1.]))
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def put_back(live: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
    """Write copies into the live tensors of the same names, to the bit. Runs at each round.

    >>> weight = torch.zeros(2)
    >>> put_back({"weight": weight}, {"weight": torch.tensor([1.0, 2.0])})
    >>> weight
    tensor([1., 2.])
    """
    for name in live.keys() & copies.keys():
        # Past autograd's version count: with two optimizers, a backward that is about to be undone may still run.
        live[name].data.copy_(copies[name])


def fresh_state(optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
    """Return a copy of an optimizer's state by parameter; empty for most when new. Runs when the fit begins.

    >>> parameter = nn.Parameter(torch.ones(1))
    >>> fresh_state(torch.optim.Adam([parameter])), list(*fresh_state(torch.optim.Adagrad([parameter])).values())
    ({}, ['step', 'sum'])
    """
    return {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}


def restart(optimizer: torch.optim.Optimizer, fresh: Mapping[Any, Any]) -> None:
    """Forget momentum, moments and step counts; learning rates are left as they are. Runs at each round.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], momentum=0.9)
    >>> fresh = fresh_state(optimizer)
    >>> optimizer.state["momentum"] = 1.0
    >>> restart(optimizer, fresh)
    >>> dict(optimizer.state)
    {}
    """
    optimizer.state.clear()
    optimizer.state.update({parameter: copy.deepcopy(state) for parameter, state in fresh.items()})
