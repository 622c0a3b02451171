"""Terms of layers: which layers of the student learn what from which of the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_compress.distillation.comparing import any_width, keywords_of
from lightning_compress.distillation.features import feature_mse
from lightning_compress.distillation.pairing import pair_by_depth
from lightning_compress.distillation.projections import Projections, channel_dim
from lightning_compress.distillation.taps import LayerTap, Read, unwrapped
from lightning_compress.errors import CompressError
from lightning_compress.select import Pattern, matching_modules, patterns_or_none
from lightning_compress.sharding import clean_name

__all__ = ["LayerTerm", "TappedTerm", "held_as", "name_of", "recalled_terms", "same_name", "tapped_terms"]

Patterns = Pattern | Sequence[Pattern]


@dataclass(frozen=True)
class LayerTerm:
    """One term of `Distillation(layers=...)`: a loss between layers of student and teacher, averaged over the pairs.

    Args:
        loss: (student's value, teacher's value) -> scalar; it gets a `mask` of the tokens if it has such a parameter.
        student: names, globs or class names of layers in the LightningModule; None pairs layers by depth, or in a CNN
            by spatial size (`pairing.pair_layers`).
        teacher: the same in the teacher, paired in order, or by depth if they are more; None is the layers of the same
            names, with or without the parts before them ("model.encoder.0" and "encoder.0").
        weight: what the term is multiplied by, at least 0, or a schedule of progress.
        read: "output", "input" or "attention": which value of the layers.
        project: learn a linear projection to the teacher's width: True, False, or None: where widths differ, unless the
            loss takes any width, as those of relations do.
        learning_rate: of the projections' Adam.

    Raises:
        ValueError: a negative weight.
    """

    loss: Callable[..., Tensor] = feature_mse
    student: Patterns | None = None
    teacher: Patterns | None = None
    weight: float | Callable[[float], float] = 1.0
    read: Read = "output"
    project: bool | None = None
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if isinstance(self.weight, (int, float)) and not 0.0 <= self.weight < math.inf:
            raise ValueError(f"a layer term's weight is at least 0, got {self.weight}")
        if self.student is None and self.teacher is not None:
            raise ValueError(f"teacher={self.teacher!r} was given without student; name the student's layers too")

    @property
    def name(self) -> str:
        """What it is logged as, the first of its kind."""
        return name_of(self.loss)

    @property
    def of_one_width(self) -> bool:
        """Whether it needs layers that keep their widths."""
        return not any_width(self.loss)


def name_of(loss: Any) -> str:
    """Return what a term is logged as: the name of its function.

    >>> from functools import partial
    >>> name_of(partial(feature_mse))
    'feature_mse'
    """
    return str(getattr(getattr(loss, "func", loss), "__name__", type(loss).__name__))


@dataclass
class TappedTerm:
    """One term at work: its pairs, and the taps on both sides."""

    name: str
    term: LayerTerm
    pairs: list[tuple[str, str]]
    student: LayerTap
    teacher: LayerTap
    projections: Projections

    def attach(self, student: nn.Module, teacher: nn.Module | None) -> list[Callable[[], None]]:
        """Listen to the layers of both; return what ends it. Runs once, before a compiled model's first call.

        Args:
            student: the LightningModule.
            teacher: None where a cache stands for it.
        """
        own, other = (list(dict.fromkeys(names)) for names in zip(*self.pairs, strict=True))
        ends = [self.student.attach(student, own)]
        if teacher is None:
            self.teacher.names = tuple(other)
            return ends
        return [*ends, self.teacher.attach(teacher, other)]

    @property
    def reads(self) -> dict[str, str]:
        """What a cache calls each of the teacher's layers that the term reads."""
        return {held_as(self.term.read, name): name for name in self.teacher.names}

    def said(self) -> dict[str, list[Tensor]]:
        """Return what the teacher's layers have just given, as a cache takes it in."""
        return {held: self.teacher.seen[name] for held, name in self.reads.items() if name in self.teacher.seen}

    def hear(self, layers: Mapping[str, Sequence[Tensor]]) -> None:
        """Take what a cache holds for what the teacher's layers give."""
        self.teacher.seen = {name: list(layers[held]) for held, name in self.reads.items()}

    def value(self, call: int, calls: int, seen: Mapping[str, list[Tensor]], mask: Tensor | None) -> Tensor:
        """Return the mean over pairs for one call of the student; what the teacher gave is in its tap."""
        self.teacher.check_all_called()
        losses = []
        for pair in self.pairs:
            got, wanted = _of_call(seen.get(pair[0], []), call, calls), self.teacher.seen[pair[1]]
            if len(got) != len(wanted) or not got:
                raise CompressError(
                    f"the step called the student's layer '{pair[0]}' {len(got)} times and the teacher's '{pair[1]}' "
                    f"{len(wanted)} times; tap layers that are called alike (fused code passes layers by)"
                )
            losses += [self._loss(pair, *values, mask) for values in zip(got, wanted, strict=True)]
        total: Tensor = sum(losses[1:], losses[0])
        return total / len(losses)

    def _loss(self, pair: tuple[str, str], student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        term, dim = self.term, channel_dim(student)
        differ = student.dim() == teacher.dim() and student.shape[dim] != teacher.shape[dim]
        wanted = differ and term.read != "attention" and not any_width(term.loss)
        if wanted if term.project is None else term.project:
            student = self.projections(f"{self.name}: {pair[0]} -> {pair[1]}", student, teacher)
        options = (
            {"mask": mask} if mask is not None and _fits(mask, student) and "mask" in keywords_of(term.loss) else {}
        )
        try:
            return term.loss(student, teacher, **options)
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"{self.name} cannot compare '{pair[0]}' of the student, {tuple(student.shape)}, with '{pair[1]}' of "
                f"the teacher, {tuple(teacher.shape)}: {error}"
            ) from error


def _of_call(values: list[Tensor], call: int, calls: int) -> list[Tensor]:
    each = len(values) // calls
    return values[call * each : (call + 1) * each]


def _fits(mask: Tensor, value: Tensor) -> bool:
    """Whether a mask of (batch, tokens) says what counts in hidden states or in attention maps."""
    return value.dim() > 2 and mask.shape in (value.shape[:2], (value.shape[0], value.shape[-1]))


def tapped_terms(
    terms: Iterable[LayerTerm], module: nn.Module, teacher: nn.Module, found: Callable[[], list[tuple[str, str]]]
) -> list[TappedTerm]:
    """Return the terms with their pairs and own taps, not yet attached. Runs once, at `setup`.

    Args:
        terms: as the user gave them.
        module: the LightningModule: the student's names are its.
        teacher: the teacher.
        found: gives the pairs of terms without names.

    Raises:
        ValueError: a pattern matches nothing, or the two sides do not pair.
    """
    return _tapped(terms, lambda term: found() if term.student is None else _named(term, module, teacher))


def _tapped(terms: Iterable[LayerTerm], pairs: Callable[[LayerTerm], list[tuple[str, str]]]) -> list[TappedTerm]:
    tapped: list[TappedTerm] = []
    for term in terms:
        name, same = name_of(term.loss), sum(name_of(term.loss) == name_of(other.term.loss) for other in tapped)
        name = f"{name}_{same + 1}" if same else name
        taps = LayerTap(term.read), LayerTap(term.read, gradient=False)
        tapped.append(TappedTerm(name, term, pairs(term), *taps, Projections(term.learning_rate)))
    return tapped


def held_as(read: str, name: str) -> str:
    """Return what a cache calls a value of a layer.

    >>> held_as("output", "encoder.0")
    'output of encoder.0'
    """
    return f"{read} of {name}"


def recalled_terms(terms: Iterable[LayerTerm], module: nn.Module, held: Sequence[str]) -> list[TappedTerm]:
    """Return the terms with their pairs, the teacher's layers being those that a cache holds. Runs once, at `setup`.

    Args:
        terms: as the user gave them.
        module: the LightningModule.
        held: what the cache has of which layers.

    Raises:
        ValueError: a pattern matches nothing, or the two sides do not pair.
    """

    def pairs(term: LayerTerm) -> list[tuple[str, str]]:
        start = held_as(term.read, "")
        names = [name.removeprefix(start) for name in held if name.startswith(start)]
        patterns = patterns_or_none(term.teacher) or ()
        wanted = [name for name in names if any(fnmatchcase(name, str(pattern)) for pattern in patterns)]
        if term.student is None or (patterns and not wanted):
            raise ValueError(
                f"without a teacher LayerTerm needs names of the student's layers, and of the teacher's those in the "
                f"cache, got student={term.student!r}, teacher={term.teacher!r}; the cache holds "
                f"{', '.join(held) or 'logits only'}"
            )
        own = list(matching_modules(unwrapped(module), term.student, "student's layers"))
        return _paired(own, wanted, term) if patterns else [(name, same_name(name, names)) for name in own]

    return _tapped(terms, pairs)


def _named(term: LayerTerm, module: nn.Module, other: nn.Module) -> list[tuple[str, str]]:
    own = list(matching_modules(unwrapped(module), term.student or (), "student's layers"))
    if term.teacher is None:
        names = {clean_name(name) for name, _ in unwrapped(other).named_modules()}
        return [(name, same_name(name, names)) for name in own]
    return _paired(own, list(matching_modules(unwrapped(other), term.teacher, "teacher's layers")), term)


def _paired(own: list[str], wanted: list[str], term: LayerTerm) -> list[tuple[str, str]]:
    if len(wanted) < len(own):
        raise ValueError(
            f"expected as many layers of the teacher as of the student or more, {term.student!r} matches {len(own)} "
            f"and {term.teacher!r} {len(wanted)}; name fewer of the student's"
        )
    return list(zip(own, wanted, strict=True)) if len(own) == len(wanted) else pair_by_depth(own, wanted)


def same_name(name: str, names: Collection[str]) -> str:
    """Return a layer's name in another model: its own, less the first parts of it that only one of the two has.

    Raises:
        ValueError: there is none.

    >>> same_name("model.encoder.0", {"encoder.0", "encoder"})
    'encoder.0'
    """
    parts = name.split(".")
    for first in range(len(parts)):
        shorter = ".".join(parts[first:])
        if shorter in names:
            return shorter
    raise ValueError(f"the teacher has no layer '{name}' as the student has; name it: LayerTerm(..., teacher='...')")
