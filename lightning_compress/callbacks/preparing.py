"""Before the first batch of a lesson: the teacher is built, layers are found, and both models tried on two examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as L
from torch import nn

from lightning_compress.callbacks.lesson import Lesson
from lightning_compress.callbacks.probe import first_student_call
from lightning_compress.distillation.gradient_terms import GradientTerm, PlacedTerm
from lightning_compress.distillation.keys import fingerprint
from lightning_compress.distillation.own_teachers import MeanTeacher, Peer, StartingModel, copy_of
from lightning_compress.distillation.pairing import pair_called
from lightning_compress.distillation.recall import recall_from
from lightning_compress.distillation.running import RunningTeacher
from lightning_compress.distillation.taps import Call
from lightning_compress.distillation.teachers import Teacher, build_teacher
from lightning_compress.distillation.terms import LayerTerm, recalled_terms, tapped_terms

__all__ = ["prepare"]

OWN = (StartingModel, MeanTeacher)
Undo = Callable[[], None]


def prepare(
    lesson: Lesson,
    source: Teacher | StartingModel | MeanTeacher | Peer | None,
    terms: Sequence[LayerTerm | GradientTerm],
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    undo: list[Undo],
) -> nn.Module | None:
    """Make a lesson ready for its first step. Runs once all layers of the module exist.

    Args:
        lesson: not yet started.
        source: the teacher, as the user gave it.
        terms: beside the logits' loss.
        trainer: of this run.
        pl_module: with the student.
        undo: gets what takes taps off again, also where this raises.

    Returns:
        the teacher; None where its answers come from elsewhere.
    """
    teaching = lesson.teaching
    if isinstance(source, Peer):
        lesson.listen_to_peer(pl_module, source.name)
        return None
    if source is None:
        teaching.recall = recall_from(teaching.details.cache, None, logits=teaching.logits is not None)
        teaching.terms = recalled_terms(_of_layers(terms), pl_module, teaching.recall.store.layers)
        undo += [end for term in teaching.terms for end in term.attach(pl_module, None)]
        return None
    teaching.same_part = isinstance(source, OWN)
    built = copy_of(pl_module) if isinstance(source, OWN) else build_teacher(source, pl_module)
    teacher = teaching.teacher = RunningTeacher(built, teaching.details)
    found = first_student_call(trainer, pl_module, lesson.student)
    undo += _tap_layers(lesson, terms, built, pl_module, found)
    gradient = next((term for term in terms if isinstance(term, GradientTerm)), None)
    if gradient is not None:
        teaching.gradient = PlacedTerm(gradient, pl_module)
        undo += teaching.gradient.attach(teacher.module)
    if found is not None:
        lesson.tried_on(pl_module, *found)
    if teaching.details.cache is not None:
        known_by = f"{fingerprint(built)} {teaching.details.precision}"
        layers = {held for term in teaching.terms for held in term.reads}
        teaching.recall = recall_from(teaching.details.cache, known_by, layers, teaching.logits is not None)
    # A converted one stands for the one that was built, whose memory can go.
    return built if teaching.same_part else teacher.module


def _of_layers(terms: Sequence[LayerTerm | GradientTerm]) -> list[LayerTerm]:
    return [term for term in terms if isinstance(term, LayerTerm)]


def _tap_layers(
    lesson: Lesson,
    terms: Sequence[LayerTerm | GradientTerm],
    built: nn.Module,
    pl_module: L.LightningModule,
    found: tuple[Any, Call] | None,
) -> list[Undo]:
    """Attach to the layers of both models, paired by name, or by running both on two examples."""
    teaching, own = lesson.teaching, _of_layers(terms)
    if teaching.teacher is None or not own:
        return []
    part = found[1].name if found and teaching.same_part else ""
    inputs = None if found is None else teaching.arguments(found[1], found[0])
    pairs = functools.partial(pair_called, pl_module, found and found[1], built, part, inputs)
    teacher = teaching.teacher.module
    teaching.terms = tapped_terms(own, pl_module, teacher, pairs)
    return [undo for term in teaching.terms for undo in term.attach(pl_module, teacher)]
