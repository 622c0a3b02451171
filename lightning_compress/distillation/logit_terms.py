"""The term of the logits, and the sum of all terms with the task's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_compress.distillation.comparing import takes_temperature
from lightning_compress.distillation.taps import Call, logits_of

__all__ = ["LogitTerm", "combined"]


def combined(task: Tensor | None, task_weight: float, terms: Sequence[tuple[float, Tensor]]) -> Tensor | None:
    """Return task_weight * task + sum of weight * term; what has weight 0 is left out, NaN or not. Runs in each step.

    >>> import torch
    >>> combined(torch.tensor(1.0), 0.5, [(2.0, torch.tensor(3.0))])
    tensor(6.5000)
    >>> combined(torch.tensor(torch.nan), 0.0, [(1.0, torch.tensor(3.0))])
    tensor(3.)
    """
    parts = [value if weight == 1.0 else weight * value for weight, value in terms if weight]
    if task is not None and task_weight:
        parts.insert(0, task if task_weight == 1.0 else task_weight * task)
    return sum(parts[1:], parts[0]) if parts else task


@dataclass(frozen=True)
class LogitTerm:
    """The loss of the logits: how it is called, and how logits are read of an output."""

    loss: Callable[..., Tensor]
    outputs: Callable[[Any], Tensor] = logits_of

    def __call__(
        self, who: str, call: Call, teacher: Tensor, temperature: float, options: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the loss between a student's call and a teacher's logits.

        Raises:
            ValueError: logits of different shapes.
        """
        student = self.outputs(call.output)
        if student.shape != teacher.shape:
            raise ValueError(
                f"teacher and student must have logits of one shape, got {tuple(teacher.shape)} from {who} and "
                f"{tuple(student.shape)} from the student '{call.name}'; use a teacher with the same classes (or "
                f"vocabulary), or pass details=Details(outputs=a function that makes them equal)"
            )
        return self.loss(student, teacher, *([temperature] if takes_temperature(self.loss) else []), **options)
