"""What a teacher teaches in one step: each term's value, and their sum with the task's loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_compress.distillation.balancing import RunningSizes
from lightning_compress.distillation.batches import labels_of, mask_of
from lightning_compress.distillation.comparing import keywords_of
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.gradient_terms import PlacedTerm, place_of
from lightning_compress.distillation.logit_terms import LogitTerm
from lightning_compress.distillation.places import Place
from lightning_compress.distillation.recall import Recall
from lightning_compress.distillation.rows import Answers
from lightning_compress.distillation.running import RunningTeacher
from lightning_compress.distillation.taps import Call, LayerTap, logits_of
from lightning_compress.distillation.terms import TappedTerm
from lightning_compress.distillation.weighing import Weight
from lightning_compress.errors import CompressError
from lightning_compress.measure.agreement import Agreement

__all__ = ["Teaching"]


@dataclass
class Teaching:
    """A teacher at work on a student: the terms of each step.

    Args:
        logits: the loss of the logits; None teaches by layers only.
        details: of the callback.
        teacher: None where outputs come from elsewhere.
        same_part: the teacher is a copy of the whole LightningModule, of which the student's own part is called.
        terms: of layers.
        gradient: the term of input gradients.
        sizes: of the terms, for `balanced`.
        recall: a store of what the teacher says, which is asked first.
        agreement: counts where both models find the same class most likely; None does not.
        read: what each term read of the student in this step, where terms are balanced by gradients.
    """

    logits: LogitTerm | None
    details: Details
    teacher: RunningTeacher | None = None
    same_part: bool = False
    terms: list[TappedTerm] = field(default_factory=list)
    gradient: PlacedTerm | None = None
    sizes: RunningSizes = field(default_factory=RunningSizes)
    recall: Recall | None = None
    agreement: Agreement | None = None
    read: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Weight]:
        """What each term beside the logits' is multiplied by, by name."""
        own = {each.name: each.term.weight for each in self.terms}
        return own if self.gradient is None else {**own, self.gradient.name: self.gradient.term.weight}

    @property
    def students(self) -> list[LayerTap | Place]:
        """What reads the student's layers and inputs."""
        return [each.student for each in (*self.terms, self.gradient) if each is not None]

    @property
    def teachers(self) -> list[LayerTap | Place]:
        """What reads the teacher's."""
        return [each.teacher for each in (*self.terms, self.gradient) if each is not None]

    def logits_of(self, call: Call) -> Tensor:
        """Return the student's logits."""
        return (self.details.outputs or logits_of)(call.output)

    def values(
        self, calls: Sequence[Call], batch: Any, temperature: float, given: Sequence[Any] | None = None
    ) -> dict[str, Tensor]:
        """Return each term's value by name, "kd" for the logits', averaged over the step's calls of the student.

        Args:
            calls: of the student.
            batch: what the step got.
            temperature: of this step.
            given: the teacher's outputs, where it is not called here.
        """
        seen = [term.student.take() for term in self.terms]
        places = [] if self.gradient is None else self.gradient.student.take()
        if self.details.balanced == "gradient" and torch.is_grad_enabled():
            self.read = self._places(calls, seen)
        found: dict[str, list[Tensor]] = {}
        for index, call in enumerate(calls):
            with _opened(self.teachers):
                output = self._output(call, batch) if given is None else given[index]
                for name, value in self._terms(index, len(calls), call, output, batch, temperature, seen):
                    found.setdefault(name, []).append(value)
                if self.gradient is not None:
                    logits = self.logits_of(call), (self.details.outputs or logits_of)(output)
                    value = self.gradient.value(
                        place_of(places, index, len(calls)), *logits, mask_of(self.details, call, batch)
                    )
                    found.setdefault(self.gradient.name, []).append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def forget(self) -> None:
        """Let go of what was read in a step. Runs at its end."""
        self.read = {}
        for tap in self.students:
            tap.take()

    def forget_trial(self) -> None:
        """Let go of what two examples have made. Runs at `setup`."""
        for term in self.terms:
            term.projections.clear()
        if self.gradient is not None:
            self.gradient.proven = False

    def state_dict(self) -> dict[str, Any]:
        """Return what is learned: the terms' sizes and projections."""
        projections = {term.name: term.projections.state_dict() for term in self.terms}
        return {"sizes": dict(self.sizes.sizes)} | ({"projections": projections} if projections else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; other keys are not looked at."""
        self.sizes.sizes = dict(state["sizes"])
        for term in self.terms:
            term.projections.load_state_dict(state["projections"][term.name])

    def balanced(self, task: Tensor, values: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the terms in the proportion to the task's loss that `Details(balanced=...)` asks for.

        Args:
            task: the step's own loss.
            values: of `values`, for the same calls.
            step: optimizer steps so far.
        """
        if not self.details.balanced:
            return values
        if self.details.balanced == "gradient":
            return self.sizes.scale_gradients(task, values, self.read, step)
        return self.sizes.scale(task, values)

    def _places(self, calls: Sequence[Call], seen: Sequence[Mapping[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
        """Return what each term reads of the student, as tensors that the task's loss depends on too."""
        layers = zip(self.terms, seen, strict=True)
        found = {term.name: [value for values in own.values() for value in values] for term, own in layers}
        return {"kd": [leaf for call in calls for leaf in self._outputs_of(call)], **found}

    def _outputs_of(self, call: Call) -> list[Tensor]:
        leaves = [leaf for leaf in pytree.tree_leaves(call.output) if isinstance(leaf, Tensor) and leaf.requires_grad]
        logits = self.logits_of(call)
        # Hidden states among the outputs lie deep in the network; logits made by `outputs` are not the task's.
        return [logits] if not leaves or any(leaf is logits for leaf in leaves) else leaves

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Read the student in the block though nothing has a gradient. Runs at `setup`."""
        for term in self.terms:
            term.student.gradient = False
        for tap in self.students:
            tap.opened = True
        try:
            yield
        finally:
            for tap in self.students:
                tap.opened = False
            for term in self.terms:
                term.student.gradient = True

    def _output(self, call: Call, batch: Any) -> Any:
        arguments = self.arguments(call, batch)
        if self.recall is not None:
            answers = self.recall(arguments, self._device(call), self._answers)
            for term in self.terms:
                term.hear(answers.layers)
            return answers.logits
        return self._ask(*arguments, part=call.name if self.same_part else "")

    def _ask(self, args: tuple[Any, ...], kwargs: dict[str, Any], part: str = "") -> Any:
        if self.teacher is None:
            raise CompressError("Distillation is not set up; it works inside trainer.fit")
        if self.gradient is not None:
            args, kwargs = self.gradient.asked((args, kwargs), self.teacher.part(part))
        return self.teacher(part, args, kwargs, gradient=self.gradient is not None)

    def _answers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answers:
        """Return what a cache keeps of a call of the teacher."""
        output = self._ask(args, kwargs)
        logits = None if self.logits is None else self.logits.outputs(output)
        return Answers(logits, {held: own for term in self.terms for held, own in term.said().items()})

    def _device(self, call: Call) -> torch.device:
        leaves = (leaf for leaf in pytree.tree_leaves((call.output, call.args)) if isinstance(leaf, Tensor))
        return next((leaf.device for leaf in leaves), torch.device("cpu"))

    @torch.no_grad()
    def _note(self, student: Tensor, teacher: Tensor) -> None:
        """Take in how often both find the same class most likely."""
        if self.agreement is not None and student.dim() > 1 and student.shape[-1] > 1:
            self.agreement.to(student.device).update(student, teacher)

    def arguments(self, call: Call, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the teacher is called with."""
        if self.details.inputs is None:
            return call.args, {name: value for name, value in call.kwargs.items() if name != "labels"}
        given = self.details.inputs(batch)
        if isinstance(given, Mapping):
            return (), dict(given)
        return given if isinstance(given, tuple) else (given,), {}

    def _terms(
        self, index: int, count: int, call: Call, output: Any, batch: Any, temperature: float, seen: Sequence[Any]
    ) -> list[tuple[str, Tensor]]:
        found = []
        if self.logits is not None:
            who = "its peer" if self.recall is None else "the cache"
            who = who if self.teacher is None else f"the teacher {type(self.teacher.module).__name__}"
            wanted = output if self.recall is not None else self.logits.outputs(output).detach()
            found.append(("kd", self.logits(who, call, wanted, temperature, self._options(call, batch))))
            self._note(self.logits_of(call), wanted)
        mask = mask_of(self.details, call, batch) if self.terms else None
        for term, values in zip(self.terms, seen, strict=True):
            found.append((term.name, term.value(index, count, values, mask)))
        return found

    def _options(self, call: Call, batch: Any) -> dict[str, Tensor]:
        """Return what the logits' loss has parameters for."""
        options: dict[str, Tensor] = {}
        if self.logits is None:
            return options
        wanted = keywords_of(self.logits.loss)
        if "labels" in wanted:
            options["labels"] = labels_of(self.details, call, batch)
        if "mask" in wanted:
            mask = mask_of(self.details, call, batch)
            if mask is not None and mask.shape == self.logits_of(call).shape[:-1]:
                options["mask"] = mask
        return options


@contextmanager
def _opened(taps: Sequence[LayerTap | Place]) -> Iterator[None]:
    """Read one call of the teacher in the block, and forget it at the end."""
    for tap in taps:
        tap.opened = True
    try:
        yield
    finally:
        for tap in taps:
            tap.opened = False
            tap.take()
