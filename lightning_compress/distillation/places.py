"""Places: the inputs of a model, or a layer's output, by which its outputs are to be differentiated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.taps import unwrapped
from lightning_compress.errors import CompressError
from lightning_compress.select import matching_modules
from lightning_compress.sharding import clean_name

__all__ = ["Arguments", "Place", "checked_input", "only_layer"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Place:
    """Lets the tensors at one place of a model have a gradient, in calls made while it is `opened`, and keeps them.

    Args:
        opened: whether it acts now; outside of that it does nothing, nor in calls without gradient.
        seen: the tensors, in the order of the calls.
    """

    opened: bool = False
    seen: list[Tensor] = field(default_factory=list)

    def attach_inputs(self, root: nn.Module, name: str) -> Callable[[], None]:
        """Act on the first input of a submodule; returns the end of it. Runs once, before a compiled model's call."""
        # Partials of plain functions: the layers still pickle.
        enter = functools.partial(_at_inputs, self, clean_name(name))
        return root.get_submodule(name).register_forward_pre_hook(enter, with_kwargs=True).remove

    def attach_layer(self, root: nn.Module, name: str) -> Callable[[], None]:
        """Act on the output of a layer, by its clean name; returns the end of it. Runs once, as `attach_inputs`."""
        layer = matching_modules(unwrapped(root), name, "GradientTerm")[name]
        return layer.register_forward_hook(functools.partial(_at_output, self, name)).remove

    def enter(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return positional arguments with a gradient for the first tensor. Runs in a step that looks for its student.

        Raises:
            TypeError: the first tensor has no gradient.
            CompressError: there are none.
        """
        if not self.opened or not torch.is_grad_enabled():
            return None
        if not args:
            raise CompressError(
                f"GradientTerm must meet the inputs of '{name}', which the step gives by keyword, before it is known "
                f"to be the student; pass student='{name}' to Distillation"
            )
        return self.entered((args, {}), module, name)[0]

    def take(self) -> list[Tensor]:
        """Return the tensors so far and forget them."""
        seen, self.seen = self.seen, []
        return seen

    def entered(self, arguments: Arguments, model: nn.Module, name: str = "") -> Arguments:
        """Return a model's arguments with a gradient for the first tensor, and keep that tensor.

        Args:
            arguments: positional and by keyword.
            model: what they are for.
            name: of the model in the module that the user names layers of.

        Raises:
            TypeError: the first tensor has no gradient, as token ids have none.
        """
        args, kwargs = arguments
        given: list[tuple[Any, Any]] = [*enumerate(args), *kwargs.items()]
        key, value = next(((k, v) for k, v in given if isinstance(v, Tensor) and k != "labels"), (0, None))
        own = _differentiable(checked_input(value, model, name))
        self.seen.append(own)
        if isinstance(key, int):
            return (*args[:key], own, *args[key + 1 :]), kwargs
        return args, kwargs | {key: own}


def only_layer(root: nn.Module, pattern: str) -> str:
    """Return the clean name of the one layer that a name, glob or class name matches. Runs at `setup`.

    Raises:
        ValueError: it matches none, or several.

    >>> only_layer(nn.Sequential(nn.Embedding(2, 2), nn.Linear(2, 2)), "Embedding")
    '0'
    """
    found = list(matching_modules(unwrapped(root), pattern, "GradientTerm"))
    if len(found) > 1:
        raise ValueError(
            f"expected GradientTerm to name one layer, {pattern!r} matches {len(found)}: {', '.join(found[:3])}; name "
            f"one of them"
        )
    return found[0]


def checked_input(value: Tensor | None, model: nn.Module, name: str = "") -> Tensor:
    """Return a model's first input, by which its outputs can be differentiated. Runs in each step.

    Args:
        value: the input; None is no tensor.
        model: whose layers of embeddings may be named instead.
        name: of the model in the module that the user names layers of.

    Raises:
        TypeError: it has no gradient.

    >>> checked_input(torch.zeros(1), nn.Linear(1, 1))
    tensor([0.])
    """
    if value is not None and value.is_floating_point():
        return value
    got = "no tensor" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
    tables = [clean_name(own) for own, part in model.named_modules() if isinstance(part, nn.Embedding)]
    layer = f"{name}.{tables[0]}".strip(".") if tables else "the layer that embeds them"
    raise TypeError(
        f"expected the first input of {type(model).__name__} to be floating point, for GradientTerm to differentiate "
        f"by, got {got}; tokens have no gradient, but what they are embedded as has one: "
        f"GradientTerm(student={layer!r})"
    )


def _differentiable(value: Tensor) -> Tensor:
    return value if value.requires_grad else value.detach().requires_grad_()


def _at_inputs(place: Place, name: str, module: nn.Module, args: Any, kwargs: Any) -> Arguments | None:
    if not place.opened or not torch.is_grad_enabled():
        return None
    return place.entered((args, kwargs), module, name)


def _at_output(place: Place, name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
    if not place.opened or not torch.is_grad_enabled():
        return None
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise TypeError(
            f"expected '{name}' ({type(module).__name__}) to give one floating point tensor, by which GradientTerm "
            f"differentiates, got {type(output).__name__}; name a layer inside it, such as one of embeddings"
        )
    own = _differentiable(output)
    place.seen.append(own)
    return own
