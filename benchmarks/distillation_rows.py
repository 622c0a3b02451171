"""The rows of the distillation tables: what teaches the student, beside or instead of the labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch import Tensor, nn

from lightning_compress import Distillation
from lightning_compress.distillation.cache import LogitCache
from lightning_compress.distillation.correlation import Standardized, dist
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.ensembles import Ensemble
from lightning_compress.distillation.features import attention_transfer, feature_mse
from lightning_compress.distillation.losses import (
    decoupled,
    hard_labels,
    jensen_shannon,
    logit_mse,
    reverse_kl,
    soft_targets,
)
from lightning_compress.distillation.own_teachers import MeanTeacher
from lightning_compress.distillation.relations import (
    contrastive,
    relational_angle,
    relational_distance,
    similarity_preserving,
)
from lightning_compress.distillation.terms import LayerTerm

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Lesson:
    """What a row may use.

    Args:
        teacher: trained.
        second: another one of its kind, of another start and other batches.
        alone: the student, trained without a teacher.
        folder: empty, for a cache.
        kept: where the teacher's logits are kept from row to row; None where it answers in each step.
    """

    teacher: nn.Module
    second: Callable[[], nn.Module]
    alone: Callable[[], nn.Module]
    folder: Path
    kept: Path | None = None

    @property
    def details(self) -> Details:
        return Details() if self.kept is None else Details(cache=LogitCache(str(self.kept)))


Row = Callable[[Lesson], list[L.Callback]]


@dataclass(frozen=True)
class Settings:
    """Weight and temperature of each loss of logits, weight of each loss of layers, by row."""

    logits: dict[str, tuple[float, float | None]]
    layers: dict[str, float]


def alone(lesson: Lesson) -> list[L.Callback]:
    return []


def logits(loss: Loss, weight: float, temperature: float | None) -> Row:
    options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
    return lambda lesson: [Distillation(lesson.teacher, weight, loss=loss, details=lesson.details, **options)]


def layers(losses: Iterable[tuple[Loss, str, float]], weight: float) -> Row:
    """Beside the whole task's loss, without one of logits."""
    terms = [LayerTerm(loss, f"net.{layer}", weight=weight * share) for loss, layer, share in losses]
    return lambda lesson: [Distillation(lesson.teacher, 0.0, layers=terms)]


def cached(weight: float, temperature: float) -> Row:
    def row(lesson: Lesson) -> list[L.Callback]:
        return [
            Distillation(lesson.teacher, weight, temperature, details=Details(cache=LogitCache(str(lesson.folder))))
        ]

    return row


def both(weight: float, temperature: float, layer_weight: float) -> Row:
    """Soft targets, and a hint."""
    return lambda lesson: [Distillation(lesson.teacher, weight, temperature, layers=hint(layer_weight))]


def hint(weight: float) -> LayerTerm:
    return LayerTerm(feature_mse, "net.features", weight=weight)


def ensemble(weight: float, temperature: float) -> Row:
    return lambda lesson: [Distillation(Ensemble([lesson.teacher, lesson.second()]), weight, temperature)]


def mean(weight: float, temperature: float) -> Row:
    return lambda lesson: [Distillation(MeanTeacher(0.99), weight, temperature)]


LOGITS: dict[str, Loss] = {
    "soft targets": soft_targets,
    "logits, squared distance": logit_mse,
    "hard labels": hard_labels,
    "reverse KL": reverse_kl,
    "Jensen-Shannon": jensen_shannon,
    "decoupled (DKD)": decoupled,
    "correlation (DIST)": dist,
    "standardized logits": Standardized(),
}
LAYERS: dict[str, list[tuple[Loss, str, float]]] = {
    "hint, learned projection": [(feature_mse, "features", 1.0)],
    "attention transfer": [(attention_transfer, "features", 1.0)],
    "similarity preserving": [(similarity_preserving, "features", 1.0)],
    "relations, distance and angle": [(relational_distance, "embedding", 1.0), (relational_angle, "embedding", 2.0)],
    "contrastive": [(contrastive, "embedding", 1.0)],
}
