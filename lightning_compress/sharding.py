"""The only file that knows `torch.distributed`: reductions over processes, and names free of wrappers' prefixes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_reduce_max", "all_reduce_sum", "clean_name", "process_rank", "world_size"]

WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "_forward_module"})


def clean_name(name: str) -> str:
    """Return a parameter's or module's name as the user wrote it, without the prefixes of wrappers.

    >>> clean_name("model._orig_mod.0.weight")
    'model.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def world_size() -> int:
    """Return the number of processes of this run; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """Return which process of this run this is; 0 without `torch.distributed`."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def all_reduce_max(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its elementwise maximum over all processes; every process must call it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its elementwise sum over all processes; every process must call it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor
