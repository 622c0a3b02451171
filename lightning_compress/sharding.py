"""The only file that knows `torch.distributed`: this process's part of a parameter, reductions, wrappers' names.

A parameter may be whole on every process (one device, DDP), a DTensor (FSDP2, tensor parallel) or a flat slice (FSDP1).
`Part` says which piece of the whole a process holds, so that masks are made on pieces and are those of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_compress.errors import CompressError
from lightning_compress.parts import Part

__all__ = [
    "Part",
    "all_reduce_max",
    "all_reduce_sum",
    "clean_name",
    "complete_part",
    "copy_whole",
    "cut",
    "gathered_objects",
    "is_distributed",
    "is_flattened",
    "local",
    "on_piece",
    "parts_of",
    "process_rank",
    "raise_together",
    "sharded_parts_of",
    "sum_of_pieces",
    "undistributed",
    "whole",
    "world_size",
]

WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "_forward_module"})


def clean_name(name: str) -> str:
    """Return a parameter's or module's name as the user wrote it, without the prefixes of wrappers.

    >>> clean_name("model._orig_mod.0.weight")
    'model.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


# Processes


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


def gathered_objects(value: Any) -> list[Any]:
    """Return what each process has passed, in the order of ranks; every process must call it."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def raise_together(error: Exception | None, device: torch.device) -> None:
    """Raise on all processes what one of them found, so that none waits for the others; every process must call it.

    Args:
        error: this process's; None where all is well.
        device: where a number to be reduced must be.
    """
    if world_size() == 1 or not int(all_reduce_max(torch.tensor(int(error is not None), device=device))):
        if error is not None:
            raise error
        return
    messages = gathered_objects(None if error is None else str(error))
    if error is not None:
        raise error
    rank = next(rank for rank, message in enumerate(messages) if message is not None)
    raise CompressError(f"process {rank} stopped: {messages[rank]}")


# Parts of parameters


def complete_part(shape: torch.Size) -> Part:
    """Return the part of a tensor that every process holds whole; the first one's counts."""
    return Part(shape, (0,) * len(shape), shape, process_rank() == 0, replicated=True)


def local(tensor: Tensor) -> Tensor:
    """Return this process's piece of a tensor, in the same memory, without gradient."""
    detached = tensor.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def is_flattened(root: nn.Module) -> bool:
    """Say whether FSDP1 has wrapped a model."""
    return any(isinstance(module, FullyShardedDataParallel) for module in root.modules())


@torch.no_grad()
def copy_whole(source: nn.Module, target: nn.Module, root: nn.Module) -> None:
    """Copy all values of a model into another of the same names that is whole; every process calls it.

    Args:
        source: whole or in parts.
        target: whole.
        root: the source as the strategy has wrapped it.
    """
    parameters = {clean_name(name): parameter for name, parameter in source.named_parameters()}
    parts = parts_of(root, parameters)
    for name, parameter in target.named_parameters():
        parameter.copy_(whole(local(parameters[clean_name(name)]), parts[clean_name(name)]))
    for own, other in zip(target.buffers(), source.buffers(), strict=True):
        own.copy_(local(other))


def undistributed(value: Any) -> Any:
    """Return a DTensor as a whole tensor, with its gradient, and anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_distributed(value: object) -> bool:
    """Say whether a value is a DTensor, as a layer's weight and input are under tensor parallelism."""
    return isinstance(value, DTensor)


def on_piece(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Return an elementwise function of a DTensor, computed on this process's piece; gradients flow through it."""
    if not isinstance(value, DTensor):
        return function(value)
    piece = function(value.to_local())
    return DTensor.from_local(
        piece, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
    )


def cut(tensor: Tensor, part: Part | None) -> Tensor:
    """Return this process's piece of a whole; all of it without a part."""
    return tensor if part is None else part.cut(tensor)


@torch.no_grad()
def whole(piece: Tensor, part: Part | None) -> Tensor:
    """Return the whole of which each process has a piece: every process calls it. Without a part it is the piece.

    One weight at a time is as much as a sharded model gathers in a forward; the bytes sent are those of the weight.
    """
    if part is None or part.replicated:
        return piece
    if piece.dtype == torch.bool:
        return whole(piece.to(torch.uint8), part).bool()
    return sum_of_pieces(part.placed(piece), part)


def sum_of_pieces(tensor: Tensor, part: Part) -> Tensor:
    """Return the sum of what each process has made of its piece, of replicas one; every process calls it."""
    return all_reduce_sum(tensor if part.counted else torch.zeros_like(tensor))


def sharded_parts_of(root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Part]:
    """Return `parts_of`, or nothing where every process holds every parameter whole."""
    parts = parts_of(root, parameters)
    return parts if any(not part.replicated for part in parts.values()) else {}


def parts_of(root: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Part]:
    """Return which part of each parameter this process holds; every process calls it. Runs at `on_fit_start`.

    Args:
        root: the model as the strategy has wrapped it.
        parameters: of it.

    Raises:
        CompressError: FSDP1 with `use_orig_params=False`, which leaves no parameter by its own name.
    """
    units = [module for module in root.modules() if isinstance(module, FullyShardedDataParallel)]
    if units:
        places = _flat_places(units, parameters)
    elif any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        places = {name: _place(parameter) for name, parameter in parameters.items()}
    else:
        return {name: complete_part(parameter.shape) for name, parameter in parameters.items()}
    held = gathered_objects([place[1:] for place in places.values()])
    parts = {}
    for index, (name, (shape, start, size)) in enumerate(places.items()):
        first = next(rank for rank, others in enumerate(held) if others[index] == (start, size))
        everywhere = all(others[index] == (start, size) for others in held) and math.prod(size) == math.prod(shape)
        borders = () if len(start) < len(shape) else _borders([others[index] for others in held])
        parts[name] = Part(torch.Size(shape), start, torch.Size(size), first == process_rank(), everywhere, borders)
    return parts


Place = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # shape of the whole, start and size of the piece


def _borders(held: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[frozenset[int], ...]:
    dims = range(len(held[0][0]))
    return tuple(frozenset(b for start, size in held for b in (start[dim], start[dim] + size[dim])) for dim in dims)


def _place(parameter: Tensor) -> Place:
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return shape, (0,) * len(shape), shape
    size, start = compute_local_shape_and_global_offset(shape, parameter.device_mesh, parameter.placements)
    return shape, tuple(start), tuple(size)


def _flat_places(units: list[FullyShardedDataParallel], parameters: Mapping[str, nn.Parameter]) -> dict[str, Place]:
    held_shapes = {name: parameter.shape for name, parameter in parameters.items()}
    shapes = dict(held_shapes)
    for unit in units:
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            shapes |= {name: p.shape for name, p in parameters.items() if p.shape != held_shapes[name]}
    held = gathered_objects([shape.numel() for shape in held_shapes.values()])
    places: dict[str, Place] = {}
    for index, name in enumerate(parameters):
        # Ranks hold consecutive slices; replicas (HYBRID_SHARD, NO_SHARD) begin anew once a whole is full.
        total, counts = shapes[name].numel(), [each[index] for each in held]
        if total == 0 or sum(counts) % total:
            raise CompressError(
                f"the processes hold {counts} of the {total} weights of '{name}', which are no slices of it; use "
                f"FSDPStrategy(use_orig_params=True)"
            )
        before = sum(counts[: process_rank()]) % total
        size = tuple(held_shapes[name])
        places[name] = (tuple(shapes[name]), (before,), size)
    return places
