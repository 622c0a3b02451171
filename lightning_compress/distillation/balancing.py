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
SMALLEST = 1e-12
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

    A step is scaled by what the optimizer steps before it have shown, so that it is the same whether its batch comes at
    once or in parts that accumulate; a term that nothing is known of yet waits with weight 0, as all do in the first
    step. Over parts and processes the values are those of the whole batch, by one reduction of a few numbers a step:
    every process scales alike.
    """

    def __init__(self) -> None:
        self.sizes: dict[str, float] = {}
        self._noted: dict[str, list[Tensor]] = {}
        self._gradients = False

    def scale(self, task: Tensor, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each term times (size of the task's loss / size of the term). Runs in each step, before weights."""
        self._note("task", task.detach().abs())
        for name, value in terms.items():
            self._note(name, value.detach().abs())
        return {name: value * self._ratio(name, "task") for name, value in terms.items()}

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
        self._gradients, scaled = True, {}
        for name, value in terms.items():
            read = [place for place in places[name] if place.requires_grad]
            if not read or not value.requires_grad:
                scaled[name] = value  # nothing of the student learns by it
                continue
            if name == "kd" or step % EVERY == 0 or name not in self.sizes:
                self._note(name, gradient_norm(value, read))
                self._note(_at(name), self._of_task(task, name, read))
            scaled[name] = value * self._ratio(name, _at(name))
        return scaled

    def settle(self) -> None:
        """Take in what an optimizer step's batches have shown. Runs after it; every process calls it."""
        noted, self._noted = self._noted, {}
        if not noted:
            return
        # Squares of norms add up: each part and process has its share of the mean.
        power = 2 if self._gradients else 1
        sums = torch.stack([torch.stack(values).float().pow(power).sum() for values in noted.values()])
        whole = (all_reduce_sum(sums) if world_size() > 1 else sums) ** (1 / power)
        for (name, values), total in zip(noted.items(), whole.tolist(), strict=True):
            value = total / (len(values) * world_size())
            if value != 0.0 or not self._gradients:
                old = self.sizes.get(name, value)
                self.sizes[name] = MOMENTUM * old + (1.0 - MOMENTUM) * value

    def _note(self, name: str, value: Tensor) -> None:
        self._noted.setdefault(name, []).append(value)

    def _ratio(self, name: str, reference: str) -> float:
        own, task = self.sizes.get(name), self.sizes.get(reference)
        return 0.0 if own is None or task is None else task / max(own, SMALLEST)

    @staticmethod
    def _of_task(task: Tensor, name: str, read: Sequence[Tensor]) -> Tensor:
        norm = gradient_norm(task, read) if task.requires_grad else None
        if norm is None or not bool(norm.isfinite()):
            raise CompressError(
                f"the step's loss has no finite gradient by what the term '{name}' reads of the student, so the two "
                f"cannot be balanced by gradients; pass details=Details(balanced=True), which compares sizes"
            )
        return norm


def _at(name: str) -> str:
    return f"task at {name}"
