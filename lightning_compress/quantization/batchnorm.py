"""Batch norm beside rounding: freeze running statistics while training goes on, or estimate them anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import NothingToCompress

__all__ = ["freeze_batch_norm", "reestimate_batch_norm", "unfreeze_batch_norm"]

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def batch_norms(module: nn.Module) -> dict[str, BatchNorm]:
    """Return the batch norms with running statistics, by name."""
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, BatchNorm)}
    return {name: norm for name, norm in found.items() if norm.running_mean is not None}


def freeze_batch_norm(module: nn.Module) -> list[nn.Module]:
    """Let batch norms compute with their running statistics, which then stay. Runs before each frozen batch.

    Krishnamoorthi 2018, section 3.2.2: towards the end of training, the statistics of inference. Weight and bias go on
    learning.

    Returns:
        The norms that were training, for `unfreeze_batch_norm`; those in eval mode already are the user's affair.

    >>> net = nn.Sequential(nn.BatchNorm1d(2))
    >>> frozen = freeze_batch_norm(net)
    >>> net[0].training
    False
    >>> unfreeze_batch_norm(frozen)
    >>> net[0].training
    True
    """
    frozen: list[nn.Module] = [norm for norm in batch_norms(module).values() if norm.training]
    for norm in frozen:
        norm.training = False
    return frozen


def unfreeze_batch_norm(frozen: Iterable[nn.Module]) -> None:
    """Undo `freeze_batch_norm`. Runs after each frozen batch and after an exception."""
    for norm in frozen:
        norm.training = True


@torch.no_grad()
def reestimate_batch_norm(module: nn.Module, batches: Iterable[Any]) -> int:
    """Estimate the running statistics of every batch norm anew, for weights that pruning or rounding has changed.

    Runs when called, after a fit ("BN adaptation", Li et al. 2020, EagleEye, section 3.3). The statistics are
    plain means over the batches of each batch's mean and unbiased variance. All else is in eval mode and left alone.

    Args:
        module: called as `module(*batch)`, `module(**batch)` for a dict, `module(batch)` for a tensor.
        batches: inputs on the module's device, of equal sizes.

    Returns:
        The number of batches.

    Raises:
        NothingToCompress: the module has no batch norm with running statistics.
        ValueError: no batch was given, or a statistic is not finite; the old statistics are back then.

    >>> net = nn.Sequential(nn.BatchNorm1d(1))
    >>> reestimate_batch_norm(net, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
    2
    >>> net[0].running_mean, net[0].running_var
    (tensor([4.]), tensor([2.]))
    """
    norms = batch_norms(module)
    if not norms:
        raise NothingToCompress(f"{type(module).__name__} has no batch norm with running statistics to estimate")
    modes = {layer: layer.training for layer in module.modules()}
    momenta = {norm: norm.momentum for norm in norms.values()}
    before = {norm: {key: value.clone() for key, value in norm.named_buffers()} for norm in norms.values()}
    count, done = 0, False
    try:
        for layer in modes:
            layer.training = layer in momenta
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over batches
        for batch in batches:
            _call(module, batch)
            count += 1
        _check(norms, count)
        done = True
    finally:
        for layer, mode in modes.items():
            layer.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
            if not (done and norm.num_batches_tracked):  # one that was never called keeps what it had
                for key, value in before[norm].items():
                    norm.get_buffer(key).copy_(value)
    return count


def _call(module: nn.Module, batch: Any) -> None:
    if isinstance(batch, dict):
        module(**batch)
    elif isinstance(batch, Tensor):
        module(batch)
    else:
        module(*batch)


def _check(norms: dict[str, BatchNorm], count: int) -> None:
    if not count:
        raise ValueError("reestimate_batch_norm got no batch; give it some of the training data's inputs")
    for name, norm in norms.items():
        if norm.running_mean is not None and norm.running_var is not None:
            finite = torch.isfinite(norm.running_mean).all() and torch.isfinite(norm.running_var).all()
            if not finite:
                raise ValueError(
                    f"the statistics of batch norm '{name}' are not finite: its inputs hold NaN or infinity, or a "
                    f"batch has one value a channel; look at the batches given"
                )
