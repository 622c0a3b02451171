"""Whether tensors that every process should hold alike are the same: a number of each is compared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_compress.errors import ProcessesDiffer
from lightning_compress.sharding import all_reduce_max, world_size

__all__ = ["check_same", "digest"]

CHUNK = 1 << 16
POSITIVE = (1 << 62) - 1
FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio: neighbours get far apart


def digest(tensor: Tensor) -> Tensor:
    """Return a number, () int64 in [0, 2^62), that changes with each bit of a tensor and its place.

    >>> bool(digest(torch.tensor([True, False])) == digest(torch.tensor([False, True])))
    False
    """
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    words = torch.nn.functional.pad(raw, (0, -len(raw) % 8)).view(torch.int64)
    total = words.new_zeros(())
    for start in range(0, len(words), CHUNK):
        piece = words[start : start + CHUNK]
        places = torch.arange(start + 1, start + 1 + len(piece), device=piece.device) * FACTOR
        total = total + ((piece ^ places) * (places | 1)).sum()
    return (total ^ (total >> 31)) & POSITIVE


def check_same(tensors: Mapping[str, Tensor], what: str, step: int) -> None:
    """Raise if tensors that each process holds whole differ between processes; every process calls it.

    Sixteen bytes a tensor go around, in one reduction.

    Args:
        tensors: by name, the same names everywhere.
        what: how they are called in the message.
        step: optimizer steps so far.

    Raises:
        ProcessesDiffer: with the first name.
    """
    if world_size() == 1 or not tensors:
        return
    own = torch.stack([digest(tensor) for tensor in tensors.values()])
    highest, lowest = all_reduce_max(torch.cat([own, -own])).chunk(2)
    differing = [name for name, same in zip(tensors, (highest == -lowest).tolist(), strict=True) if not same]
    if differing:
        raise ProcessesDiffer(
            f"the {what} of '{differing[0]}' is not the same on all {world_size()} processes after optimizer step "
            f"{step}; stop what changes weights on one process alone, and resume from the last checkpoint"
        )
