"""Distillation: a teacher's loss, added around an unmodified `training_step`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as L
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.callbacks.clock import Clock, run_length
from lightning_compress.callbacks.contract import (
    check_state,
    check_unclaimed,
    described,
    is_whole_at_setup,
    saved_state,
    state_key,
)
from lightning_compress.callbacks.lesson import Lesson
from lightning_compress.callbacks.lifecycle import go_on, release
from lightning_compress.callbacks.order import Claim, check_together
from lightning_compress.callbacks.preparing import OWN, prepare
from lightning_compress.callbacks.sameness import takes_part
from lightning_compress.callbacks.teachable import strategies_of
from lightning_compress.distillation.comparing import takes_temperature
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.gradient_terms import GradientTerm, check_gradients
from lightning_compress.distillation.logit_terms import LogitTerm
from lightning_compress.distillation.losses import soft_targets
from lightning_compress.distillation.own_teachers import MeanTeacher, Peer, StartingModel, check_source, follow
from lightning_compress.distillation.taps import logits_of
from lightning_compress.distillation.teachers import Builder, Teacher
from lightning_compress.distillation.teaching import Teaching
from lightning_compress.distillation.terms import LayerTerm
from lightning_compress.distillation.weighing import Weight, check_temperatures, check_weights
from lightning_compress.errors import CompressError
from lightning_compress.sharding import copy_whole

__all__ = ["Distillation"]

DEFAULT_TEMPERATURE = 2.0


class Distillation(L.Callback):
    """Train towards a teacher as well: `(1 - weight) * task loss + weight * distillation loss`, and terms of layers.

    Runs around each `training_step`, which needs no change: the student's inputs and outputs are read where the step
    calls it, the teacher sees the same inputs without gradient. Validation is not touched. Each term is logged as
    `compress/loss/<name>`: "task", "kd" for the logits', and the names of the layers' losses. Hinton, Vinyals & Dean
    2015.

    Args:
        teacher: a module; the path of a checkpoint of the student's class; a callable that builds a module, such as
            `TeacherCheckpoint`; one of the student's own, `StartingModel()`, `MeanTeacher()`, `Peer(name)`; or None, to
            read a cache. It is held here, never in the LightningModule, its checkpoints or its optimizer.
        weight: share of the logits' loss, in [0, 1], or a schedule of progress; 0 is plain training but for `layers`.
        temperature: softens both distributions; above 0, or a schedule.
        loss: (student logits, teacher logits, temperature) -> scalar, or without the temperature, as `logit_mse`. It
            gets `labels` and a `mask` of the tokens if it has parameters of these names.
        student: name of the submodule that the step calls; None finds it.
        layers: further terms, of layers' values: `LayerTerm`; of input gradients: `GradientTerm`.
        enabled: False is plain training.
        details: what most runs leave as it is.

    Raises:
        ValueError: an option out of its range, or values of shapes that cannot be compared.
        TypeError: the teacher cannot be called with the student's inputs.
        CompressError: the step calls no student, or several.
    """

    def __init__(
        self,
        teacher: nn.Module
        | StartingModel
        | MeanTeacher
        | Peer
        | Builder
        | str
        | None,  # jsonargparse takes them in turn
        weight: float | Callable[[float], float] = 0.5,
        temperature: float | Callable[[float], float] = DEFAULT_TEMPERATURE,
        loss: Callable[..., Tensor] = soft_targets,
        student: str | None = None,
        layers: LayerTerm | GradientTerm | Sequence[LayerTerm | GradientTerm] = (),
        enabled: bool = True,
        details: Details | None = None,
    ) -> None:
        super().__init__()
        self.source: Teacher | StartingModel | MeanTeacher | Peer | None = teacher
        self.weight: Weight = check_weights(weight)
        self.temperature: Weight = check_temperatures(temperature)
        self.loss, self.student = loss, student
        if not takes_temperature(loss) and temperature != DEFAULT_TEMPERATURE:
            raise ValueError(f"temperature={temperature} was given, but {loss} takes no temperature; leave it out")
        self.layers = (layers,) if isinstance(layers, (LayerTerm, GradientTerm)) else tuple(layers)
        self.details = details or Details()
        check_gradients(self.layers, self.details)
        check_source(teacher, student, bool(self.layers), self.details.cache is not None, self.details.precision)
        self.enabled = enabled and (weight != 0.0 or bool(self.layers))
        self.teacher: nn.Module | None = None
        self.clock = Clock()
        self.lesson: Lesson | None = None
        self._undo: list[Callable[[], None]] = []
        self._restored: dict[str, Any] | None = None
        self._followed, self._prepared = 0, False

    @property
    def complete(self) -> bool:
        """Always: distillation has no target to reach."""
        return True

    def claims(self) -> list[Claim]:
        """Say whose loss this callback changes: the whole step's, or a named student's."""
        taught = "training_step" if self.student is None else f"training_step of '{self.student}'"
        return [Claim(type(self).__name__, "distil", frozenset({taught}))] if self.enabled else []

    @property
    def follows(self) -> str:
        """Say what of it cannot follow a model whose channels go, for `check_together`; "" is nothing."""
        fixed = [f"the term {term.name}" for term in self.layers if term.of_one_width]
        named = ["MeanTeacher"] if isinstance(self.source, MeanTeacher) else fixed
        return named[0] if self.enabled and named else ""

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives, as a checkpoint and a logger keep them."""
        named = ("weight", "temperature", "loss", "student")
        options: dict[str, Any] = {option: described(getattr(self, option)) for option in named}
        own = {"teacher": described(self.source)} if isinstance(self.source, (*OWN, Peer)) else {}
        layers = {"layers": described(self.layers)} if self.layers else {}
        return options | own | layers | ({} if self.details == Details() else {"details": described(self.details)})

    # Attaching and detaching

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        strategies = strategies_of(self.source, self.details, self.layers)
        if stage != "fit" or not takes_part(self, trainer, pl_module, stage, *strategies):
            return
        check_together(trainer.callbacks)  # type: ignore[attr-defined]
        self._release()
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.clock.reset()
            self._restored, self._followed = None, 0
        self.lesson = Lesson(self._teaching(), self.student, self.weight, self.temperature)
        self._prepared = is_whole_at_setup(trainer, pl_module)
        if self._prepared:
            self._prepare(self.lesson, trainer, pl_module)
        self._undo += self.lesson.attach(pl_module)

    def _teaching(self) -> Teaching:
        term = LogitTerm(self.loss, self.details.outputs or logits_of) if self.weight != 0.0 else None
        return Teaching(term, self.details)

    def _prepare(self, lesson: Lesson, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.teacher = prepare(lesson, self.source, self.layers, trainer, pl_module, self._undo)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.lesson is None:
            return
        if not self._prepared:
            self._prepare(self.lesson, trainer, pl_module)
        self.lesson.start(pl_module, run_length(trainer, [0.0]) if self.lesson.scheduled else None)
        running = self.lesson.teaching.teacher
        if running is not None:
            if isinstance(self.source, OWN):
                copy_whole(pl_module, running.module, trainer.strategy.model or pl_module)
            running.move(trainer.precision_plugin.convert_module, pl_module.device)
        self.clock.attach(trainer.optimizers, functools.partial(self._after_step, trainer, pl_module))
        self.lesson.clock = self.clock
        self.lesson.before_step = functools.partial(self._follow, pl_module)

    def _after_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer, time_moved: bool
    ) -> None:
        if self.lesson is None or not time_moved:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.lesson.teaching.sizes.settle()
        for term in self.lesson.teaching.terms:
            term.projections.step(1.0 if scaler is None else scaler.get_scale())

    def _follow(self, pl_module: L.LightningModule) -> None:
        """Move the student's average on, once others have done what they do to weights after a step."""
        if isinstance(self.source, MeanTeacher) and self.teacher is not None and self.clock.steps > self._followed:
            self._followed = self.clock.steps
            follow(self.teacher, pl_module, self.source.decay, self.clock.steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.lesson is None:
            return
        if go_on(trainer, self.clock, self._restored, self._take_over):
            self._followed = self.clock.steps
        self._restored = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._follow(pl_module)

    teardown = on_exception = release

    def _release(self) -> None:
        self.clock.detach()
        for undo in reversed(self._undo):
            undo()
        if self.lesson is not None:
            self._restored = self._state()  # for more epochs with the same Trainer
            if self.lesson.teaching.teacher is not None:
                self.lesson.teaching.teacher.release()
        self._undo, self.teacher, self.lesson = [], None, None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback pickles and copies at any time."""
        return {**self.__dict__, "_undo": [], "lesson": None}

    def on_train_epoch_start(self, *_: Any) -> None:
        if self.lesson is not None and self.lesson.teaching.recall is not None:
            self.lesson.teaching.recall.store.refresh()  # what other processes have written

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.lesson is None:
            return
        self.lesson.epoch_ends(trainer, pl_module)
        if not self.lesson.used:
            raise CompressError(
                f"a whole epoch passed without a call of the student '{self.student}' that could be taught; "
                f"check student=, or call self.manual_backward(loss) in manual optimization"
            )

    # Checkpoints

    state_key = property(state_key)
    on_load_checkpoint = check_unclaimed

    def _state(self) -> dict[str, Any]:
        if self.lesson is None:
            return self._restored or {}
        state: dict[str, Any] = {"clock": self.clock.state_dict(), **self.lesson.teaching.state_dict()}
        if isinstance(self.source, OWN) and self.teacher is not None:
            state["followed"] = self._followed
            state["teacher"] = {name: value.detach().cpu().clone() for name, value in self.teacher.state_dict().items()}
        return state

    def _take_over(self, state: dict[str, Any]) -> None:
        if self.lesson is None or not state:
            return
        self.clock.load_state_dict(state["clock"])
        self.lesson.teaching.load_state_dict(state)
        if "teacher" in state and self.teacher is not None:
            self._followed = state["followed"]
            self.teacher.load_state_dict(state["teacher"])

    def state_dict(self) -> dict[str, Any]:
        return saved_state(self.recipe(), **self._state()) if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.enabled and state_dict:
            check_state(state_dict, self.recipe(), self)
            self._restored = {key: value for key, value in state_dict.items() if key not in ("format", "recipe")}
