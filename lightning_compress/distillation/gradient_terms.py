"""The term of input gradients: the student's outputs are to change with the inputs as the teacher's do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_compress.distillation.details import Details
from lightning_compress.distillation.gradients import gradient_matching, input_gradient, likeliest
from lightning_compress.distillation.places import Arguments, Place, only_layer
from lightning_compress.distillation.taps import unwrapped
from lightning_compress.distillation.terms import same_name
from lightning_compress.errors import CompressError
from lightning_compress.sharding import clean_name

__all__ = ["GradientTerm", "PlacedTerm", "check_gradients", "check_twice_differentiable", "place_of"]

ENDS = ("::NotImplemented", "::Error")  # functions of torch that only raise


@dataclass(frozen=True)
class GradientTerm:
    """A term of `Distillation(layers=...)`: the outputs' gradient by the inputs is to be the teacher's.

    Srinivas & Fleuret 2018, "Knowledge Transfer with Jacobian Matching", section 3: the row of the Jacobian of the
    teacher's most likely class. Student and teacher take the same inputs, whose first is floating point; of tokens,
    name the layer that embeds them, by whose output the gradient is then.

    Args:
        weight: what the term is multiplied by, at least 0, or a schedule of progress.
        student: name of one layer of the LightningModule by whose output the gradient is; None is by the first input.
        teacher: the same in the teacher; None is the layer of the same name.
        normalize: compare directions, each example's gradient being scaled to length 1.
        direction: teacher's logits -> what the outputs are multiplied by before they are summed, of the same shape.

    Raises:
        ValueError: a negative weight, or a teacher's layer without one of the student.
    """

    weight: float | Callable[[float], float] = 1.0
    student: str | None = None
    teacher: str | None = None
    normalize: bool = True
    direction: Callable[[Tensor], Tensor] = likeliest

    def __post_init__(self) -> None:
        if isinstance(self.weight, (int, float)) and not 0.0 <= self.weight < math.inf:
            raise ValueError(f"a gradient term's weight is at least 0, got {self.weight}")
        if self.student is None and self.teacher is not None:
            raise ValueError(f"teacher={self.teacher!r} was given without student; name the student's layer too")

    @property
    def name(self) -> str:
        """What it is logged as."""
        return gradient_matching.__name__

    @property
    def of_one_width(self) -> bool:
        """Whether it needs a layer that keeps its width."""
        return self.student is not None


def check_gradients(terms: Sequence[object], details: Details) -> None:
    """Raise if a term of input gradients cannot be had with the other options. Runs when `Distillation` is made.

    Raises:
        ValueError: with the cure.

    >>> check_gradients([GradientTerm()], Details())
    """
    found = sum(isinstance(term, GradientTerm) for term in terms)
    if found > 1:
        raise ValueError(f"expected one GradientTerm at most, got {found}; leave out the others")
    if found and details.balanced == "gradient":
        raise ValueError(
            "GradientTerm reads nothing of the student that the task's loss has a gradient by, so the two cannot be "
            "balanced by gradients; pass Details(balanced=True), which compares sizes"
        )
    if found and details.cache is not None:
        raise ValueError("a cache holds no gradients of a teacher: leave out GradientTerm, or the cache")


@dataclass
class PlacedTerm:
    """One such term at work, attached to both models."""

    term: GradientTerm
    root: nn.Module
    student: Place = field(default_factory=Place)
    teacher: Place = field(default_factory=Place)
    proven: bool = False

    @property
    def name(self) -> str:
        """What it is logged as."""
        return self.term.name

    @property
    def by_inputs(self) -> bool:
        """Whether the gradient is by the models' inputs."""
        return self.term.student is None

    def attach(self, teacher: nn.Module) -> list[Callable[[], None]]:
        """Listen to the layers of both models; return what ends it. Runs once, before a compiled model's first call.

        Of inputs there is nothing to do: the teacher is given them, the student is listened to once it is known.

        Raises:
            ValueError: a name matches no layer, or several.
        """
        if self.term.student is None:
            return []
        own = only_layer(self.root, self.term.student)
        names = {clean_name(name) for name, _ in unwrapped(teacher).named_modules()}
        other = same_name(own, names) if self.term.teacher is None else only_layer(teacher, self.term.teacher)
        return [self.student.attach_layer(self.root, own), self.teacher.attach_layer(teacher, other)]

    def asked(self, arguments: Arguments, model: nn.Module) -> Arguments:
        """Return what the teacher is called with, so that its outputs can be differentiated. Runs in each step.

        Args:
            arguments: of the student's call, or of `Details(inputs=...)`.
            model: the teacher, or the part of it that is called.

        Raises:
            TypeError: its first input has no gradient.
        """
        self.teacher.take()
        if not self.by_inputs:
            return arguments
        args, kwargs = arguments
        own = tuple(_plain(value) for value in args), {name: _plain(value) for name, value in kwargs.items()}
        return self.teacher.entered(own, model)

    def value(self, place: Tensor, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        """Return the term for one call of the student. Runs in each step.

        Args:
            place: of the student's call, from `student.seen`.
            student: its logits.
            teacher: the teacher's, with their graph.
            mask: what of the logits counts, or None.

        Raises:
            ValueError: logits, inputs or layers' outputs of different shapes.
            CompressError: the student cannot be differentiated twice.
        """
        if student.shape != teacher.shape:
            raise ValueError(
                f"expected student and teacher to have logits of one shape for GradientTerm, got "
                f"{tuple(student.shape)} and {tuple(teacher.shape)}; pass details=Details(outputs=a function that "
                f"makes them equal)"
            )
        direction = self.term.direction(teacher.detach())
        if mask is not None and mask.shape == direction.shape[:-1]:
            direction = direction * mask.unsqueeze(-1)
        with torch.autocast(student.device.type, enabled=False):
            wanted = input_gradient(teacher, self._teachers(), direction, create_graph=False)
            got = input_gradient(student, place, direction)
            loss = gradient_matching(got, wanted.to(got.device), normalize=self.term.normalize)
        if not self.proven:
            check_twice_differentiable(loss)
            self.proven = True
        return loss

    def _teachers(self) -> Tensor:
        seen = self.teacher.take()
        if len(seen) != 1:
            raise CompressError(
                f"the teacher called '{self.term.teacher or self.term.student}' {len(seen)} times in one forward; "
                f"GradientTerm needs a layer that is called once"
            )
        return seen[0]


def check_twice_differentiable(loss: Tensor) -> None:
    """Raise if a backward through a loss of gradients would fail, which torch says only then. Runs in the first step.

    Raises:
        CompressError: a function that made the gradients has no second derivative.

    >>> value = torch.ones(1, requires_grad=True)
    >>> check_twice_differentiable(torch.autograd.grad(value**3, value, create_graph=True)[0].sum())
    """
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
        if node.name().endswith(ENDS):
            raise CompressError(
                "GradientTerm needs second derivatives of the student, and a part of it has none: a fused kernel, such "
                "as flash attention's or a recurrent layer's on a GPU, or an autograd function that is differentiable "
                "once; use plain layers there (attn_implementation='eager' or 'sdpa'), or leave the term out"
            )


def _plain(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def place_of(places: Sequence[Tensor], index: int, calls: int) -> Tensor:
    """Return the place of one of the student's calls in a step.

    Raises:
        CompressError: the place was not met once in each call.

    >>> place_of([torch.zeros(1), torch.ones(1)], 1, 2)
    tensor([1.])
    """
    if len(places) != calls:
        raise CompressError(
            f"the step called its student {calls} times, and the place of GradientTerm was met {len(places)} times "
            f"with gradients enabled; name a layer that each call uses once, or the student: Distillation(student=...)"
        )
    return places[index]
