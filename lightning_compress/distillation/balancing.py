"""Balancing: terms brought to the size of the task's loss, or of its gradient, before their weights count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_compress.errors import CompressError
from lightning_compress.sharding import all_reduce_sum, world_size

__all__ = ["Balance", "RunningSizes", "gradient_norm"]

Balance = Literal["gradient"] | bool

MOMENTUM = 0.99
EVERY = 10  # optimizer steps between the measures of gradients that lie deep in the student
HALF_SCALE = 1024.0  # the gradient of a mean over a large batch falls below what float16 can hold


def gradient_norm(loss: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Return the length of a loss's gradient by some tensors taken together. Runs in steps that are balanced by it.

    Only what lies between the loss and the tensors is differentiated; the graph stays, and no parameter's `.grad` is
    touched. A tensor that the loss does not depend on counts as zero.

    Args:
        loss: () with a graph.
        places: tensors with requires_grad.

    Returns:
        () float32, or float64 of such tensors.

    >>> logits = torch.tensor([3.0, 4.0], requires_grad=True)
    >>> gradient_norm((logits**2).sum() / 2, [logits])
    tensor(5.)
    """
    scale = HALF_SCALE if any(place.dtype == torch.float16 for place in places) else 1.0
    found = torch.autograd.grad(loss, list(places), torch.full_like(loss, scale), retain_graph=True, allow_unused=True)
    own = [gradient for gradient in found if gradient is not None]
    wide = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in own]
    return (
        torch.stack([torch.linalg.vector_norm(value) for value in wide]).norm() / scale if wide else loss.new_zeros(())
    )


class RunningSizes:
    """Running means of the terms' magnitudes, or of their gradients': what `balanced` scales by.

    Over processes they are those of the whole batch, by one reduction of a few numbers: every process scales alike.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, float] = {}

    def scale(self, task: Tensor, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each term times (size of the task's loss / size of the term). Runs in each step, before weights."""
        self._follow({"task": task.detach().abs(), **{name: value.detach().abs() for name, value in terms.items()}})
        return {name: value * (self.sizes["task"] / max(self.sizes[name], 1e-12)) for name, value in terms.items()}

    def scale_gradients(
        self, task: Tensor, terms: Mapping[str, Tensor], places: Mapping[str, Sequence[Tensor]], step: int
    ) -> dict[str, Tensor]:
        """Return each term times (norm of the task's gradient / norm of the term's). Runs in each step, before weights.

        Both gradients are by what the term reads of the student: the outputs, or its tapped layers. From there on down
        both go through the same Jacobian, so that none drowns the other in the weights below. By the outputs that costs
        no backward through the network; by layers a backward down to them, which is made every 10 optimizer steps. A
        norm of exactly 0, as of a student that equals its teacher, says nothing and is left out of its mean. After Chen
        et al. 2018, "GradNorm", with all training rates taken as equal (alpha = 0), which makes it a quotient.

        Args:
            task: the step's own loss.
            terms: by name.
            places: what each term reads of the student.
            step: optimizer steps so far.

        Raises:
            CompressError: the task's loss does not depend on what a term reads.
        """
        due = [name for name in terms if name == "kd" or step % EVERY == 0 or name not in self.sizes]
        norms: dict[str, Tensor] = {}
        for name in due:
            read = [place for place in places[name] if place.requires_grad]
            if not read or not terms[name].requires_grad:
                continue  # nothing that learns
            norms[name] = gradient_norm(terms[name], read)
            norms[_at(name)] = self._of_task(task, name, read)
        self._follow(norms, zeros=False, power=2)
        return {name: value * self._ratio(name) for name, value in terms.items()}

    def _ratio(self, name: str) -> float:
        own, task = self.sizes.get(name), self.sizes.get(_at(name))
        return 1.0 if own is None or task is None else task / own

    @staticmethod
    def _of_task(task: Tensor, name: str, read: Sequence[Tensor]) -> Tensor:
        norm = gradient_norm(task, read) if task.requires_grad else None
        if norm is None or not bool(norm.isfinite()):
            raise CompressError(
                f"the step's loss has no finite gradient by what the term '{name}' reads of the student, so the two "
                f"cannot be balanced by gradients; pass details=Details(balanced=True), which compares sizes"
            )
        return norm

    def _follow(self, values: Mapping[str, Tensor], zeros: bool = True, power: int = 1) -> None:
        if not values:
            return
        # Squares, because the norm over the examples of all processes, each with its share of the mean, adds up so.
        stacked = torch.stack([value.float() for value in values.values()])
        whole = all_reduce_sum(stacked**power) ** (1 / power) / world_size() if world_size() > 1 else stacked
        now = whole.tolist()
        for name, value in zip(values, now, strict=True):
            if value == 0.0 and not zeros:
                continue
            old = self.sizes.get(name, value)
            self.sizes[name] = MOMENTUM * old + (1.0 - MOMENTUM) * value


def _at(name: str) -> str:
    return f"task at {name}"
