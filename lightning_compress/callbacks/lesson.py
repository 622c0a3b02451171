"""One fit's lesson: what happens around a `training_step`, from listening to the student to the sum of the losses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from lightning_compress.callbacks.clock import Clock
from lightning_compress.callbacks.probe import uncompiled
from lightning_compress.callbacks.step import intercept, with_loss
from lightning_compress.distillation.logit_terms import combined
from lightning_compress.distillation.taps import Call, Tap
from lightning_compress.distillation.teaching import Teaching
from lightning_compress.distillation.weighing import Weight, value_at
from lightning_compress.errors import CompressError
from lightning_compress.measure.agreement import Agreement
from lightning_compress.pruning.calibration import evaluating
from lightning_compress.sharding import world_size

__all__ = ["Lesson"]

Undo = Callable[[], None]


class Lesson:
    """Listens to the student while the step runs, and adds the teacher's terms to its loss.

    Args:
        teaching: the terms.
        student: name of the submodule that the step calls; None finds it in the first step.
        weight: of the logits' loss.
        temperature: of the logits' loss.
    """

    def __init__(self, teaching: Teaching, student: str | None, weight: Weight, temperature: Weight) -> None:
        self.teaching, self.student = teaching, student
        self.weight, self.temperature = weight, temperature
        self.used = False
        self.clock = Clock()
        self.before_step: Callable[[], None] = lambda: None
        self._length: int | None = None
        self._tap, self._peer = Tap(), Tap()
        self._peer_name: str | None = None
        self._listening, self._placed = False, False
        self._batch: Any = None
        self._undo: list[Undo] = []
        self._search_ends: Undo | None = None

    @property
    def scheduled(self) -> bool:
        """Whether a weight or the temperature moves with the run's progress."""
        weights = (self.weight, self.temperature, self.teaching.details.task_weight)
        return any(callable(weight) for weight in (*weights, *self.teaching.weights.values()))

    def attach(self, pl_module: L.LightningModule) -> list[Undo]:
        """Stand around the step and the backward of manual optimization; return what ends it. Runs at `setup`."""
        step = intercept(pl_module, "training_step", functools.partial(self._around_step, pl_module))
        backward = torch.compiler.disable(functools.partial(self._around_backward, pl_module))  # type: ignore[no-untyped-call]
        return [step, intercept(pl_module, "manual_backward", backward), self._end]

    def start(self, pl_module: L.LightningModule, length: int | None) -> None:
        """Listen to a student that has a name. Runs at `on_fit_start`, before a compiled model's first call.

        Args:
            pl_module: the module.
            length: of the run in optimizer steps; None where nothing is scheduled.
        """
        self._length = length
        self.teaching.agreement = None if pl_module.trainer.barebones else Agreement()
        if self.student is not None:
            self._listen(pl_module, self.student)
        if self._peer_name is not None:
            self._undo.append(self._peer.attach(pl_module, self._peer_name))

    def listen_to_peer(self, pl_module: L.LightningModule, name: str) -> None:
        """Take the teacher's outputs from the step's own calls of another model.

        Raises:
            ValueError: there is none of this name.
        """
        if name == self.student or name not in dict(pl_module.named_modules()):
            raise ValueError(
                f"expected the name of another submodule than the student '{self.student}' in Peer('{name}'), such as "
                f"{sorted(dict(pl_module.named_children()))}"
            )
        self._peer_name = name

    def _listen(self, pl_module: L.LightningModule, name: str) -> None:
        self._undo.append(self._tap.attach(pl_module, name))
        self._place(pl_module, name)
        self._listening = True

    def _place(self, pl_module: L.LightningModule, name: str) -> None:
        """Let the student's inputs have a gradient: of the one that was named, or seen in a trial or the first step."""
        gradient = self.teaching.gradient
        if gradient is not None and gradient.by_inputs and not self._placed:
            self._undo.append(gradient.student.attach_inputs(pl_module, name))
            self._placed = True

    def _end(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo, self._listening, self._placed = [], False, False

    def tried_on(self, pl_module: L.LightningModule, batch: Any, call: Call) -> None:
        """Compute each term once for two examples, and forget what came of it. Runs at `setup`."""
        teaching = self.teaching
        learning = functools.partial(torch.set_grad_enabled, teaching.gradient is not None)
        self._place(pl_module, call.name)
        with learning(), self._manner(searching=False):
            if teaching.students:
                part = pl_module.get_submodule(call.name) if call.name else pl_module
                with evaluating(part), teaching.trying(), learning():
                    call = dataclasses.replace(call, output=part(*call.args, **call.kwargs))
            teaching.values([call], batch, value_at(self.temperature, 0.0))
        teaching.forget_trial()

    # The step

    def _open(self, opened: bool) -> None:
        for tap in (self._tap, self._peer):
            tap.open = opened
        for reader in self.teaching.students:
            reader.opened = opened

    def _forget(self) -> None:
        self._tap.take(), self._peer.take()
        self.teaching.forget()

    def _around_step(
        self, pl_module: L.LightningModule, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not pl_module.trainer.training:  # a validation_step that calls training_step wants the task's loss
            return original(*args, **kwargs)
        self.before_step()
        searching = not self._listening
        if searching:
            gradient = self.teaching.gradient
            waiting = gradient is not None and gradient.by_inputs and not self._placed
            self._tap.enter = gradient.student.enter if gradient is not None and waiting else None
            self._search_ends = self._tap.attach_outermost(pl_module)
        self._batch = args[0] if args else next(iter(kwargs.values()))
        self._open(True)
        try:
            with self._manner(searching):
                output = original(*args, **kwargs)
                self._open(False)
                return self._combined(pl_module, output)
        finally:
            self._open(False)
            self._forget()
            self._batch = None
            self._stop_searching()

    def _manner(self, searching: bool) -> ExitStack:
        """How the step runs: torch.compile and fused attention have no second derivatives."""
        twice, manner = self.teaching.gradient is not None, ExitStack()
        if searching or twice:
            manner.enter_context(uncompiled())
        if twice:
            manner.enter_context(sdpa_kernel(SDPBackend.MATH))
        return manner

    def _around_backward(
        self, pl_module: L.LightningModule, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        # Closed meanwhile: activation checkpointing calls the student again inside the backward.
        self._open(False)
        try:
            calls = self._tap.take()
            loss = self._taught(pl_module, args[0], calls) if calls else args[0]
            return original(loss, *args[1:], **kwargs)
        finally:
            self._open(True)

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
            return self._taught(pl_module, None, calls) if calls and self.teaching.details.task_weight == 0 else None
        if not calls and not self._listening:
            raise CompressError(
                f"training_step of {type(pl_module).__name__} called no trainable submodule, so there is no student to "
                f"teach; call the model as self(...) or self.model(...), or pass student='name'"
            )
        if not calls:  # a named student that this step did not use
            return output
        return with_loss(output, lambda task: self._taught(pl_module, task, calls))

    def _taught(self, pl_module: L.LightningModule, task: Tensor | None, calls: list[Call]) -> Tensor:
        self._settle(pl_module, calls)
        teaching, progress = self.teaching, self._progress()
        given = None if self._peer_name is None else self._peer_outputs(len(calls))
        values = teaching.values(calls, self._batch, value_at(self.temperature, progress), given)
        self.used = True
        if not pl_module.trainer.barebones:
            losses = {f"compress/loss/{name}": value.detach() for name, value in values.items()}
            losses |= {} if task is None else {"compress/loss/task": task.detach()}
            pl_module.log_dict(losses, batch_size=len(teaching.logits_of(calls[0])))
        if task is not None:
            values = teaching.balanced(task, values, self.clock.steps)
        weight = value_at(self.weight, progress)
        own = teaching.details.task_weight
        weights = {name: value_at(each, progress) for name, each in teaching.weights.items()} | {"kd": weight}
        loss = combined(
            task, 1.0 - weight if own is None else value_at(own, progress),
            [(weights[name], value) for name, value in values.items()],
        )  # fmt: skip
        return next(iter(values.values())) * 0.0 if loss is None else loss

    def epoch_ends(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the share of examples whose most likely class is the teacher's. Every process calls it."""
        agreement, recall = self.teaching.agreement, self.teaching.recall
        if agreement is not None and agreement.update_called:
            pl_module.log("compress/agreement", agreement.compute(), sync_dist=world_size() > 1)
            agreement.reset()
        if recall is not None:
            recall.all_seen = recall.all_seen or trainer.limit_train_batches == 1.0

    def _progress(self) -> float:
        return 0.0 if self._length is None else min(self.clock.steps / max(self._length, 1), 1.0)

    def _peer_outputs(self, wanted: int) -> list[Any]:
        outputs = [call.output for call in self._peer.take()]
        if len(outputs) != wanted:
            raise CompressError(
                f"the step called '{self.student}' {wanted} times and its peer '{self._peer_name}' {len(outputs)} "
                f"times before the loss; call both on each batch"
            )
        return [pytree.tree_map_only(Tensor, Tensor.detach, output) for output in outputs]

    def _settle(self, pl_module: L.LightningModule, calls: list[Call]) -> None:
        names = sorted({call.name for call in calls})
        if len(names) > 1:
            raise CompressError(
                f"training_step calls several models, {', '.join(map(repr, names))}; say whose outputs the teacher "
                f"teaches, such as student='{names[-1]}'"
            )
        if not self._listening:
            self._listen(pl_module, names[0])
            self._stop_searching()  # a step may go on to call the student again

    def _stop_searching(self) -> None:
        if self._search_ends is not None:
            self._search_ends()
            self._search_ends = None
