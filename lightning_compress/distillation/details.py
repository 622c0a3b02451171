"""What most runs of Distillation leave as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_compress.distillation.balancing import Balance
from lightning_compress.distillation.cache import LogitCache

__all__ = ["Details"]

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "int8"]
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "int8")


@dataclass(frozen=True)
class Details:
    """What most runs leave as it is; all of it is read at `setup`.

    Args:
        task_weight: what the step's own loss is multiplied by, at least 0, or a schedule; None is 1 - weight. At 0
            that loss is left out, and `training_step` may return None: no labels are needed.
        outputs: model output -> logits, of both models; None takes a tensor, `.logits`, `["logits"]` or the first of a
            tuple.
        inputs: batch -> the teacher's inputs (a tuple, a dict or one tensor); None repeats the student's.
        labels: batch -> labels, for a loss that has a parameter `labels`; None looks for "labels" in the student's
            call, then for "labels", "label" or the second item in the batch.
        mask: batch -> what counts, for a loss that has a parameter `mask`; None takes the call's `attention_mask`, and
            labels that are not -100, where they fit the value.
        balanced: bring each term to the size of the task's loss, both as running means, before its weight counts;
            "gradient" compares the norms of their gradients by what the term reads of the student instead. Means are of
            the optimizer steps before, so that the first step is the task's alone.
        precision: the teacher's, as the Trainer writes it; None is the run's. "int8" is the run's too, with weights as
            codes of one byte that are floating point only while they are used.
        compiled: compile the teacher with `torch.compile`.
        cache: folder that keeps the teacher's logits and the values of its layers that terms read, or a `LogitCache`:
            the first epoch writes them, later epochs and runs read them (a run with `teacher=None` only reads). Inputs
            must repeat: no random augmentation.
        device: the teacher's, such as "cuda:1"; None is the student's. Inputs and outputs are moved.

    Raises:
        ValueError: a negative task_weight, or an option that is none.
    """

    task_weight: float | Callable[[float], float] | None = None
    outputs: Callable[[Any], Tensor] | None = None
    inputs: Callable[[Any], Any] | None = None
    labels: Callable[[Any], Tensor] | None = None
    mask: Callable[[Any], Tensor] | None = None
    balanced: Balance = False
    precision: Precision | None = None
    compiled: bool = False
    device: str | None = None
    cache: str | LogitCache | None = None

    def __post_init__(self) -> None:
        if isinstance(self.task_weight, (int, float)) and not 0.0 <= self.task_weight < float("inf"):
            raise ValueError(f"task_weight multiplies the step's own loss, at least 0, got {self.task_weight}")
        if self.balanced not in (True, False, "gradient"):
            raise ValueError(f"expected balanced to be True, False or 'gradient', got {self.balanced!r}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(f"expected the teacher's precision as one of {PRECISIONS}, got {self.precision!r}")
