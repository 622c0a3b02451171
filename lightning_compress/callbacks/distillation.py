"""Distillation: a teacher's loss, added around an unmodified `training_step`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lightning_compress.callbacks.clock import restore_data_place
from lightning_compress.callbacks.contract import (
    check_state,
    check_strategy,
    check_unclaimed,
    described,
    is_final_at_setup,
    saved_state,
    state_key,
)
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.callbacks.probe import first_student_call, uncompiled
from lightning_compress.callbacks.step import intercept, with_loss
from lightning_compress.distillation.comparing import takes_temperature
from lightning_compress.distillation.losses import soft_targets
from lightning_compress.distillation.taps import Call, Tap, logits_of
from lightning_compress.distillation.teachers import Teacher, TeacherCheckpoint, build_teacher, call_teacher
from lightning_compress.errors import CompressError

__all__ = ["Distillation"]

DEFAULT_TEMPERATURE = 2.0


class Distillation(L.Callback):
    """Train towards a teacher's outputs as well: `(1 - weight) * task loss + weight * distillation loss`.

    Runs around each `training_step`, which needs no change: the student's inputs and outputs are read where the step
    calls it, the teacher sees the same inputs without gradient. Validation is not touched. Both terms are logged, as
    `compress/loss/task` and `compress/loss/kd`. Hinton, Vinyals & Dean 2015.

    Args:
        teacher: a module; the path of a checkpoint of the student's class; or a callable that builds a module, such
            as `TeacherCheckpoint`. It is held here, never in the LightningModule, its checkpoints or its optimizer.
        weight: share of the distillation loss, in [0, 1]; 0 is plain training.
        temperature: softens both distributions; above 0.
        loss: (student logits, teacher logits, temperature) -> scalar, or without the temperature, as `logit_mse`.
        student: name of the submodule that the step calls; None finds it.
        outputs: model output -> logits; None takes a tensor, `.logits`, `["logits"]` or the first of a tuple.
        inputs: batch -> the teacher's inputs (a tuple, a dict or one tensor); None repeats the student's.
        enabled: False is plain training.

    Raises:
        ValueError: an option out of its range, or logits of another shape than the student's.
        TypeError: the teacher cannot be called with the student's inputs.
        CompressError: the step calls no student, or several.
    """

    def __init__(
        self,
        teacher: nn.Module | TeacherCheckpoint | Callable[[], nn.Module] | str,
        weight: float = 0.5,
        temperature: float = DEFAULT_TEMPERATURE,
        loss: Callable[..., Tensor] = soft_targets,
        student: str | None = None,
        outputs: Callable[[Any], Tensor] | None = None,
        inputs: Callable[[Any], Any] | None = None,
        enabled: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(weight, bool) or not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight is the distillation loss's share in [0, 1], got {weight}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {temperature}")
        self.source: Teacher = teacher
        self.weight, self.temperature = float(weight), float(temperature)
        self.loss, self.student = loss, student
        self._options = (self.temperature,) if takes_temperature(loss) else ()
        if not self._options and temperature != DEFAULT_TEMPERATURE:
            raise ValueError(f"temperature={temperature} was given, but {loss} takes no temperature; leave it out")
        self.outputs = outputs or logits_of
        self.inputs = inputs
        self.enabled = enabled and weight > 0.0
        self.teacher: nn.Module | None = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._tap = Tap()
        self._listening = self._used = False
        self._batch: Any = None
        self._undo: list[Callable[[], None]] = []

    @property
    def complete(self) -> bool:
        """Always: distillation has no target to reach."""
        return True

    def claims(self) -> list[Claim]:
        """Say whose loss this callback changes."""
        return [Claim(type(self).__name__, "distil", frozenset({"training_step"}))] if self.enabled else []

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        return {option: described(getattr(self, option)) for option in ("weight", "temperature", "loss", "student")}

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not self.enabled:
            return
        check_strategy(trainer, self)
        check_together(trainer.callbacks)  # type: ignore[attr-defined]
        self._release()
        self.teacher = build_teacher(self.source, pl_module)
        self._modes = [(module, module.training) for module in self.teacher.modules()]
        self.teacher.eval()
        if is_final_at_setup(pl_module):
            self._try_on_examples(trainer, pl_module)
        self._wrap(pl_module)

    def _wrap(self, pl_module: L.LightningModule) -> None:
        self._undo.append(intercept(pl_module, "training_step", functools.partial(self._around_step, pl_module)))
        backward = torch.compiler.disable(functools.partial(self._around_backward, pl_module))  # type: ignore[no-untyped-call]
        self._undo.append(intercept(pl_module, "manual_backward", backward))

    def _try_on_examples(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check student and teacher on two examples of the training data, before the first batch."""
        found = first_student_call(trainer, pl_module, self.student)
        if found is not None:
            self._batch, call = found
            with torch.no_grad():
                self._term(call)
            self._batch = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.teacher is not None:
            if self.student is not None:
                self._undo.append(self._tap.attach(pl_module, self.student))
                self._listening = True
            self.teacher = trainer.precision_plugin.convert_module(self.teacher).to(pl_module.device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.teacher is not None:
            restore_data_place(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        for undo in reversed(self._undo):
            undo()
        for module, training in self._modes:
            module.training = training
        self._undo, self._modes, self.teacher = [], [], None
        self._tap, self._listening, self._used = Tap(), False, False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback pickles and copies at any time."""
        return {**self.__dict__, "_undo": [], "_tap": Tap(), "_listening": False, "_batch": None}

    # The step

    def _around_step(
        self, pl_module: L.LightningModule, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not pl_module.trainer.training:  # a validation_step that calls training_step wants the task's loss
            return original(*args, **kwargs)
        searching = None if self._listening else self._tap.attach_outermost(pl_module)
        self._batch = args[0] if args else next(iter(kwargs.values()))
        self._tap.open = True
        try:
            with nullcontext() if searching is None else uncompiled():
                output = original(*args, **kwargs)
            self._tap.open = False
            return self._combined(pl_module, output)
        finally:
            self._tap.open = False
            self._tap.take()
            self._batch = None
            if searching is not None:
                searching()

    def _around_backward(
        self, pl_module: L.LightningModule, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Closed meanwhile: activation checkpointing calls the student again inside the backward.
        self._tap.open = False
        try:
            calls = self._tap.take()
            loss = self._mixed(pl_module, args[0], calls) if calls else args[0]
            return original(loss, *args[1:], **kwargs)
        finally:
            self._tap.open = True

    def _combined(self, pl_module: L.LightningModule, output: Any) -> Any:
        calls = self._tap.take()
        if not pl_module.automatic_optimization:
            if calls:
                raise CompressError(
                    "the student was called after the step's last manual_backward, or the step calls loss.backward() "
                    "itself; call self.manual_backward(loss)"
                )
            return output
        if output is None:
            return output
        if not calls and not self._listening:
            raise CompressError(
                f"training_step of {type(pl_module).__name__} called no trainable submodule, so there is no student to "
                f"teach; call the model as self(...) or self.model(...), or pass student='name'"
            )
        if not calls:  # a named student that this step did not use
            return output
        return with_loss(output, lambda task: self._mixed(pl_module, task, calls))

    def _mixed(self, pl_module: L.LightningModule, task: Tensor, calls: list[Call]) -> Tensor:
        self._settle(pl_module, calls)
        terms = [self._term(call) for call in calls]
        term = torch.stack(terms).mean()
        self._used = True
        if not pl_module.trainer.barebones:
            losses = {"compress/loss/task": task.detach(), "compress/loss/kd": term.detach()}
            pl_module.log_dict(losses, batch_size=len(self.outputs(calls[0].output)))
        return (1.0 - self.weight) * task + self.weight * term

    def _settle(self, pl_module: L.LightningModule, calls: list[Call]) -> None:
        names = sorted({call.name for call in calls})
        if len(names) > 1:
            raise CompressError(
                f"training_step calls several models, {', '.join(map(repr, names))}; say whose outputs the teacher "
                f"teaches, such as student='{names[-1]}'"
            )
        if not self._listening:
            self._undo.append(self._tap.attach(pl_module, names[0]))
            self._listening = True

    def _term(self, call: Call) -> Tensor:
        args, kwargs = call.args, call.kwargs
        if self.inputs is not None:
            given = self.inputs(self._batch)
            args, kwargs = ((), dict(given)) if isinstance(given, Mapping) else (given, {})
            args = args if isinstance(args, tuple) else (args,)
        teacher = self.teacher
        if teacher is None:
            raise CompressError("Distillation is not set up; it works inside trainer.fit")
        student_logits, teacher_logits = self.outputs(call.output), self.outputs(call_teacher(teacher, args, kwargs))
        if student_logits.shape != teacher_logits.shape:
            raise ValueError(
                f"teacher and student must have logits of one shape, got {tuple(teacher_logits.shape)} from the "
                f"teacher {type(teacher).__name__} and {tuple(student_logits.shape)} from the student "
                f"'{call.name}'; use a teacher with the same classes, or pass outputs=a function that makes them equal"
            )
        return self.loss(student_logits, teacher_logits, *self._options)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.teacher is not None and not self._used:
            raise CompressError(
                f"a whole epoch passed without a call of the student '{self.student}' that could be taught; "
                f"check student=, or call self.manual_backward(loss) in manual optimization"
            )

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def state_dict(self) -> dict[str, Any]:
        return saved_state(self.recipe()) if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.enabled and state_dict:
            check_state(state_dict, self.recipe(), self)
