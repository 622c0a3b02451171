"""Teachers that come from the student itself: as it was at the start, its average, or another model of the module."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from lightning_compress.errors import CompressError
from lightning_compress.sharding import is_distributed, is_flattened

__all__ = ["MeanTeacher", "Peer", "StartingModel", "check_small", "check_source", "copy_of", "follow"]


@dataclass(frozen=True)
class StartingModel:
    """The model as it is when fit begins: self-distillation, the usual cure after pruning and quantizing.

    A copy is made at `setup`, before anything is pruned or rounded; checkpoints hold it, so that a resumed run has the
    same. After Hinton et al. 2015, and for quantization Mishra & Marr 2018, "Apprentice".
    """


@dataclass(frozen=True)
class MeanTeacher:
    """The exponential moving average of the student's weights. Tarvainen & Valpola 2017, "Mean teachers", section 2.

    It starts equal to the student and follows after each optimizer step by min(1 - 1 / (step + 1), decay), the warm-up
    of the authors' code; buffers are copied. Checkpoints hold it.

    Args:
        decay: weight of the old average, in [0, 1).

    Raises:
        ValueError: a decay out of its range.
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay is the old average's weight in [0, 1), got {self.decay}")


@dataclass(frozen=True)
class Peer:
    """Another model of the same LightningModule, which learns too: mutual learning (Zhang et al. 2018, equation 3).

    What the step's own call of it gave is taught, without gradient. One `Distillation` for each direction, with
    `weight=1.0, details=Details(task_weight=1.0)` for the paper's sum.

    Args:
        name: of the submodule, such as "second".
    """

    name: str


def check_source(
    teacher: object, student: str | None, layers: bool, cached: bool, precision: str | None = None
) -> None:
    """Raise if a teacher cannot teach what it is asked to. Runs when `Distillation` is made.

    Args:
        teacher: as the user gave it; None only reads a cache.
        student: its name, or None.
        layers: whether it teaches layers.
        cached: whether what it says is kept.
        precision: of `Details`.

    Raises:
        ValueError: with the cure.

    >>> check_source(StartingModel(), None, layers=True, cached=False)
    """
    if isinstance(teacher, Peer) and (layers or student is None):
        raise ValueError("a Peer teaches by its logits a student that is named: pass student='name', and no layers")
    if cached and isinstance(teacher, (StartingModel, MeanTeacher, Peer)):
        raise ValueError(
            f"a cache holds what a teacher says that stays as it is, got {teacher}; pass a module or a checkpoint, or "
            f"leave the cache out"
        )
    check_small(teacher, precision)
    if teacher is None and not cached:
        raise ValueError("teacher=None reads a cache that another run has written: pass details=Details(cache=...)")


def check_small(teacher: object, precision: str | None) -> None:
    """Raise if a teacher's weights cannot be codes. Runs when `Distillation` is made.

    Args:
        teacher: as the user gave it.
        precision: of `Details`.

    Raises:
        ValueError: a teacher that comes from the student, or none.

    >>> check_small(nn.ReLU(), "int8")
    """
    if precision == "int8" and (teacher is None or isinstance(teacher, (StartingModel, MeanTeacher, Peer))):
        raise ValueError(
            f"expected a teacher of its own weights for precision='int8', got {teacher}; pass a module or a checkpoint "
            f"(copy.deepcopy(model) for the starting model), or leave precision out"
        )


def copy_of(student: nn.Module) -> nn.Module:
    """Return a copy to teach with; its parameters get no gradient. Runs at `setup`.

    Raises:
        CompressError: the student is in parts already: its layers were made and sharded in `configure_model`.
    """
    if any(is_distributed(parameter) for parameter in student.parameters()) or is_flattened(student):
        raise CompressError(
            "a copy of the student cannot be made once it is sharded; make its layers in __init__ and only shard them "
            "in configure_model, or teach with another model"
        )
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def follow(average: nn.Module, student: nn.Module, decay: float, step: int) -> None:
    """Move an average towards the student, in place. Runs after each optimizer step.

    Args:
        average: parameters and buffers of the student's names.
        student: where to.
        decay: of `MeanTeacher`.
        step: optimizer steps so far, from 1 on.

    Raises:
        CompressError: the student's shapes have changed.

    >>> average, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(average.weight), nn.init.ones_(student.weight)
    >>> follow(average, student, 0.9, 1000), round(average.weight.item(), 4)
    (None, 0.1)
    """
    kept = min(1.0 - 1.0 / (step + 1), decay)
    own, other = dict(average.named_parameters()), dict(student.named_parameters())
    for name, parameter in own.items():
        if name not in other or other[name].shape != parameter.shape:
            raise CompressError(
                f"the mean teacher cannot follow a student whose '{name}' has changed from {tuple(parameter.shape)}; "
                f"teach with StartingModel() or another teacher while channels are taken out"
            )
        parameter.lerp_(other[name], 1.0 - kept)
    for buffer, value in zip(average.buffers(), student.buffers(), strict=True):
        buffer.copy_(value)
