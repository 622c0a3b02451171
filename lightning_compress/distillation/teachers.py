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

__all__ = ["PretrainedTeacher", "TeacherCheckpoint", "build_teacher", "built_module", "call_teacher", "check_call"]


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


@dataclass(frozen=True)
class PretrainedTeacher:
    """A teacher from a folder that `save_pretrained` wrote. Loaded at `setup`, in float32 and eval mode, offline.

    Args:
        path: the folder.
        model_class: a transformers class, such as `AutoModelForSequenceClassification`, or any with `from_pretrained`.

    Raises:
        TypeError: a class without `from_pretrained`, or one that gives no module.
    """

    path: str
    model_class: type

    def __post_init__(self) -> None:
        """Refuse a class that cannot load a folder."""
        if not callable(getattr(self.model_class, "from_pretrained", None)):
            raise TypeError(
                f"expected model_class to have from_pretrained, as transformers.AutoModelForSequenceClassification "
                f"has, got {self.model_class!r}; for a LightningModule's checkpoint pass TeacherCheckpoint"
            )

    def __call__(self) -> nn.Module:
        """Load the teacher on the CPU.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: a folder without weights, or without some of those that the class has.
        """
        return load_pretrained(self.model_class, self.path)


# jsonargparse takes a dataclass from a YAML file only where it is named.
Builder = TeacherCheckpoint | PretrainedTeacher | Callable[[], nn.Module]
Teacher = nn.Module | Builder | str | Path


def load_pretrained(model_class: Any, path: str | Path) -> nn.Module:
    """Load a folder into a class with `from_pretrained`, without network, in float32 and eval mode.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it does not load into the class, or leaves some of its weights untrained.
        TypeError: what the class gives is no module.
    """
    if not Path(path).is_dir():  # first: transformers would take it for the name of a model on the Hub
        raise FileNotFoundError(
            f"the teacher's folder {str(path)!r} does not exist; give one that save_pretrained wrote"
        )
    options = _offline(model_class)
    try:
        teacher = model_class.from_pretrained(str(path), **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ValueError(
            f"the teacher's folder {str(path)!r} does not load into {model_class.__name__}; it needs the config and "
            f"the weights that save_pretrained wrote: {error}"
        ) from error
    if "output_loading_info" in options:
        teacher, loaded = teacher
        if loaded["missing_keys"]:  # transformers only warns, and such a teacher would teach noise
            raise ValueError(
                f"the teacher's folder {str(path)!r} has no weights for {', '.join(sorted(loaded['missing_keys']))} of "
                f"{type(teacher).__name__}, which would stay untrained; take the class that was saved, or pass a "
                f"function that loads the teacher, if they are not used"
            )
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"expected {model_class.__name__} to load a torch.nn.Module, got {type(teacher).__name__}")
    return teacher.float().eval()


def _offline(model_class: Any) -> dict[str, bool]:
    """Return the options that keep a class off the network and make it tell what it did not find, if it has them."""
    if any(base.__module__.startswith("transformers.") for base in model_class.__mro__):
        return {"local_files_only": True, "output_loading_info": True}
    known = inspect.signature(model_class.from_pretrained).parameters
    return {"local_files_only": True} if "local_files_only" in known else {}


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
    by_path = isinstance(teacher, (str, Path))
    built = load_lightning_module(type(student), str(teacher)) if by_path else built_module(teacher)
    own = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in own for parameter in built.parameters()):
        raise ValueError("the teacher shares parameters with the student; pass copy.deepcopy(model) as the teacher")
    return built


def built_module(teacher: Any) -> nn.Module:
    """Return a module as it is, or what a callable without arguments builds.

    Raises:
        TypeError: a class or nothing callable, or a callable that did not return a module.

    >>> built_module(lambda: nn.ReLU())
    ReLU()
    """
    if isinstance(teacher, type) or not callable(teacher):
        raise TypeError(
            f"expected a teacher with weights (a module, or a function that builds one), got {teacher!r}; a class "
            f"would make an untrained teacher: pass an instance of it, or TeacherCheckpoint(path, TheClass)"
        )
    built = teacher if isinstance(teacher, nn.Module) else teacher()
    if not isinstance(built, nn.Module):
        raise TypeError(f"expected the teacher callable to return a torch.nn.Module, got {type(built).__name__}")
    return built


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

    return ", ".join([*map(shown, args), *(f"{name}={shown(value)}" for name, value in kwargs.items())])


def call_teacher(teacher: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, gradient: bool = False) -> Any:
    """Call the teacher with what the student was called with, labels left out. Runs in each step.

    Not under inference mode: tensors made there cannot be saved for the student's backward.

    Args:
        teacher: the module.
        args: of the student's call.
        kwargs: the same.
        gradient: keep the graph from the inputs to the output.

    Raises:
        TypeError: the teacher's forward does not take these inputs.
    """
    passed = {name: value for name, value in kwargs.items() if name != "labels"}
    check_call(teacher, args, passed, f"teacher {type(teacher).__name__}")
    with torch.set_grad_enabled(gradient):
        return teacher(*args, **passed)


def check_call(teacher: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    """Refuse inputs that a teacher's forward does not take.

    Raises:
        TypeError: it does not; names the teacher, the inputs' shapes and the cure.

    >>> check_call(nn.ReLU(), (torch.ones(1),), {}, "teacher")
    """
    try:
        inspect.signature(teacher.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"the {name} cannot be called with what the student was called with ({_shapes(args, kwargs)}): {error}; "
            f"pass details=Details(inputs=a function from the batch to the teacher's inputs)"
        ) from error
