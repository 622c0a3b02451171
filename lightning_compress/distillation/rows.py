"""Rows of a cache: what a teacher says of one example as bytes, logits whole or as their top classes, and layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Answers", "RowFormat", "RowType", "Shape"]

RowType = Literal["float16", "float32"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Answers:
    """What a teacher says of a batch.

    Args:
        logits: (batch, ...); None where they are not asked for.
        layers: values (batch, ...) of its layers by what is read of which, in the order of the layer's calls.
    """

    logits: Tensor | None = None
    layers: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)

    def shapes(self) -> tuple[Shape | None, dict[str, list[Shape]]]:
        """Return the shapes of one example's logits and layers.

        >>> Answers(torch.zeros(2, 3), {"output of 0": [torch.zeros(2, 5)]}).shapes()
        ((3,), {'output of 0': [(5,)]})
        """
        layers = {name: [tuple(value.shape[1:]) for value in values] for name, values in self.layers.items()}
        return None if self.logits is None else tuple(self.logits.shape[1:]), layers

    def of(self, examples: Sequence[int]) -> Answers:
        """Return those of some of the examples."""
        layers = {name: [value[list(examples)] for value in values] for name, values in self.layers.items()}
        return Answers(None if self.logits is None else self.logits[list(examples)], layers)


@dataclass(frozen=True)
class RowFormat:
    """The bytes of what a teacher says of one example.

    Args:
        shape: (classes,) or (tokens, classes) of one example's logits; None stores no logits.
        dtype: of the stored numbers.
        top_k: how many classes are stored, with the logarithm of what the others add to the softmax's sum; None, or
            all there are, stores the logits as they are.
        layers: shapes of one example's values by what is read of which layer, one for each call of it.

    Raises:
        ValueError: another number of dimensions.
    """

    shape: Shape | None
    dtype: RowType = "float16"
    top_k: int | None = None
    layers: Mapping[str, Sequence[Shape]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shape is not None and len(self.shape) not in (1, 2):
            raise ValueError(
                f"a cache holds logits of shape (batch, classes) or (batch, tokens, classes), got examples of shape "
                f"{self.shape}; pass outputs=a function that makes them so, or leave the cache out"
            )

    @property
    def classes(self) -> int:
        """The number of classes; 0 without logits."""
        return 0 if self.shape is None else self.shape[-1]

    @property
    def kept(self) -> int:
        """The number of classes that are stored."""
        return min(self.top_k or self.classes, self.classes)

    @property
    def lumped(self) -> int:
        """The number of classes that are not."""
        return self.classes - self.kept

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """The dtype of a row, little-endian."""
        number = {"float16": "<f2", "float32": "<f4"}[self.dtype]
        fields: list[Any] = []
        if self.shape is not None:
            top = (*self.shape[:-1], self.kept)
            fields.append(("logits", number, top))
            if self.lumped:
                index = "<u2" if self.classes <= 2**16 else "<i4"
                fields += [("indices", index, top), ("rest", "<f4", self.shape[:-1])]
        fields += [(name, number, shape) for name, shape in self._layer_fields()]
        return np.dtype(fields)

    def _layer_fields(self) -> list[tuple[str, Shape]]:
        return [(f"{name}, {call}", shape) for name, own in self.layers.items() for call, shape in enumerate(own)]

    def packed(self, answers: Answers) -> NDArray[np.void]:
        """Return what a teacher said as rows. Runs when a cache takes it in.

        Args:
            answers: of this format's shapes, any floating dtype and device.

        Raises:
            ValueError: NaN or +inf, or numbers that do not fit the dtype.

        >>> RowFormat((3,), top_k=1).packed(Answers(torch.tensor([[0.0, 0.0, 5.0]])))["indices"]
        array([[2]], dtype=uint16)
        """
        values = [value for own in answers.layers.values() for value in own]
        count = len(values[0] if answers.logits is None else answers.logits)
        rows = np.empty(count, dtype=self.record)
        if answers.logits is not None:
            self._pack_logits(answers.logits.detach().float(), rows)
        for (field_name, _), value in zip(self._layer_fields(), values, strict=True):
            rows[field_name] = self._narrow(value.detach().float(), field_name.rpartition(",")[0])
        return rows

    def _pack_logits(self, logits: Tensor, rows: NDArray[np.void]) -> None:
        stored = logits
        if self.lumped:
            stored, indices = logits.topk(self.kept, dim=-1)
        narrow = self._narrow(stored, "logits")
        if self.lumped:
            rows["indices"] = indices.cpu().numpy()
            rows["rest"] = logits.scatter(-1, indices, -math.inf).logsumexp(dim=-1).cpu().numpy()
        rows["logits"] = narrow

    def _narrow(self, values: Tensor, what: str) -> NDArray[Any]:
        _refuse(
            values.isnan() | (values == math.inf), what, "are NaN or +inf", "look at what the teacher does with them"
        )
        narrow = values.to(getattr(torch, self.dtype))
        too_large = narrow.isinf() & ~values.isinf()
        _refuse(too_large, what, f"do not fit {self.dtype}", "pass LogitCache(dtype='float32')")
        stored: NDArray[Any] = narrow.cpu().numpy()
        return stored

    def unpacked(self, rows: NDArray[np.void], device: torch.device | str = "cpu") -> Answers:
        """Return rows as what the teacher said, in float32. Runs when a cache gives them out.

        Of top classes: log(rest / others), evenly, for each of the others, so that at temperature 1 the softmax of the
        stored classes, and the sum of the others', is the whole's.

        >>> form = RowFormat((3,), top_k=1)
        >>> form.unpacked(form.packed(Answers(torch.tensor([[0.0, 0.0, 5.0]])))).logits
        tensor([[0., 0., 5.]])
        """

        def loaded(name: str) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(rows[name])).to(device)

        fields = iter(self._layer_fields())
        layers = {name: [loaded(next(fields)[0]).float() for _ in own] for name, own in self.layers.items()}
        if self.shape is None:
            return Answers(None, layers)
        if not self.lumped:
            return Answers(loaded("logits").float(), layers)
        even = (loaded("rest") - math.log(self.lumped)).unsqueeze(-1)
        logits = even.expand(-1, *self.shape).scatter(-1, loaded("indices").long(), loaded("logits").float())
        return Answers(logits, layers)


def _refuse(broken: Tensor, what: str, trouble: str, cure: str) -> None:
    if bool(broken.any()):
        examples = broken.flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"a cache holds a teacher's {what} once and for all, and those of {len(examples)} of {len(broken)} new "
            f"examples (the first is number {examples[0]} of them) {trouble}; {cure}, or leave the cache out"
        )
