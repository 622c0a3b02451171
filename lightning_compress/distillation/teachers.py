"""Teachers: built once, frozen in eval mode while they teach, never part of the student's module tree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["TeacherCheckpoint", "build_teacher", "call_teacher"]

Teacher = nn.Module | str | Path | Callable[[], nn.Module]


@dataclass(frozen=True)
class TeacherCheckpoint:
    """A teacher from a LightningModule checkpoint of a class other than the student's.

    Args:
        path: the checkpoint.
        module_class: the LightningModule's class.
    """

    path: str
    module_class: type

    def __call__(self) -> nn.Module:
        """Load the teacher on the CPU."""
        return load_lightning_module(self.module_class, self.path)


def load_lightning_module(module_class: Any, path: str | Path) -> nn.Module:
    """Load a checkpoint into its class, which must have saved its hyperparameters or need none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another class, or no checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the teacher's checkpoint {str(path)!r} does not exist; give a .ckpt file")
    try:
        teacher: nn.Module = module_class.load_from_checkpoint(path, map_location="cpu")
    except (RuntimeError, TypeError, KeyError, UnpicklingError) as error:
        raise ValueError(
            f"the teacher's checkpoint {str(path)!r} does not load into {module_class.__name__}; for a teacher of "
            f"another class pass TeacherCheckpoint(path, TheClass): {error}"
        ) from error
    return teacher


def build_teacher(teacher: Teacher, student: nn.Module) -> nn.Module:
    """Return the teacher's module: as given, loaded from a checkpoint of the student's class, or built by a callable.

    Runs at `setup`.

    Raises:
        TypeError: a class or nothing callable, or a callable that did not return a module.
        ValueError: the teacher shares parameters with the student.
    """
    if isinstance(teacher, (str, Path)):
        built = load_lightning_module(type(student), teacher)
    elif isinstance(teacher, type) or not callable(teacher):
        raise TypeError(
            f"expected a teacher with weights (a module, a checkpoint's path, or a function that builds one), got "
            f"{teacher!r}; a class would make an untrained teacher: pass an instance of it, or TeacherCheckpoint"
        )
    else:
        built = teacher if isinstance(teacher, nn.Module) else teacher()
    if not isinstance(built, nn.Module):
        raise TypeError(f"expected the teacher callable to return a torch.nn.Module, got {type(built).__name__}")
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in built.parameters()):
        raise ValueError("the teacher shares parameters with the student; pass copy.deepcopy(model) as the teacher")
    return built


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    return ", ".join([*map(shown, args), *(f"{name}={shown(value)}" for name, value in kwargs.items())])


@torch.no_grad()
def call_teacher(teacher: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the teacher without gradient with what the student was called with, labels left out. Runs in each step.

    Not under inference mode: tensors made there cannot be saved for the student's backward.

    Raises:
        TypeError: the teacher's forward does not take these inputs.
    """
    passed = {name: value for name, value in kwargs.items() if name != "labels"}
    try:
        inspect.signature(teacher.forward).bind(*args, **passed)
    except TypeError as error:
        raise TypeError(
            f"the teacher {type(teacher).__name__} cannot be called with what the student was called with "
            f"({_shapes(args, passed)}): {error}; pass details=Details(inputs="
            f"a function from the batch to the teacher's inputs)"
        ) from error
    return teacher(*args, **passed)
