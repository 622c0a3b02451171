"""Rows of cached logits: how one example's logits lie in a file, whole or as its top classes and the rest in one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["RowFormat", "RowType"]

RowType = Literal["float16", "float32"]


@dataclass(frozen=True)
class RowFormat:
    """The bytes of one example's logits.

    Args:
        shape: (classes,) or (tokens, classes) of one example.
        dtype: of the stored logits.
        top_k: how many classes are stored, with the logarithm of what the others add to the softmax's sum; None, or
            all there are, stores the logits as they are.

    Raises:
        ValueError: another number of dimensions.
    """

    shape: tuple[int, ...]
    dtype: RowType = "float16"
    top_k: int | None = None

    def __post_init__(self) -> None:
        if len(self.shape) not in (1, 2):
            raise ValueError(
                f"a cache holds logits of shape (batch, classes) or (batch, tokens, classes), got examples of shape "
                f"{self.shape}; pass outputs=a function that makes them so, or leave the cache out"
            )

    @property
    def kept(self) -> int:
        """The number of classes that are stored."""
        return min(self.top_k or self.shape[-1], self.shape[-1])

    @property
    def lumped(self) -> int:
        """The number of classes that are not."""
        return self.shape[-1] - self.kept

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """The dtype of a row, little-endian."""
        top = (*self.shape[:-1], self.kept)
        fields: list[Any] = [("logits", {"float16": "<f2", "float32": "<f4"}[self.dtype], top)]
        if self.lumped:
            index = "<u2" if self.shape[-1] <= 2**16 else "<i4"
            fields += [("indices", index, top), ("rest", "<f4", self.shape[:-1])]
        return np.dtype(fields)

    def packed(self, logits: Tensor) -> NDArray[np.void]:
        """Return logits as rows. Runs when a cache takes them in.

        Args:
            logits: (batch, *shape), any floating dtype and device.

        Raises:
            ValueError: NaN or +inf, or numbers that do not fit the dtype.

        >>> RowFormat((3,), top_k=1).packed(torch.tensor([[0.0, 0.0, 5.0]]))["indices"]
        array([[2]], dtype=uint16)
        """
        logits = logits.detach().float()
        _refuse(logits.isnan() | (logits == math.inf), "are NaN or +inf", "look at what the teacher does with them")
        rows = np.empty(len(logits), dtype=self.record)
        stored = logits
        if self.lumped:
            stored, indices = logits.topk(self.kept, dim=-1)
            rows["indices"] = indices.cpu().numpy()
            rows["rest"] = logits.scatter(-1, indices, -math.inf).logsumexp(dim=-1).cpu().numpy()
        narrow = stored.to(getattr(torch, self.dtype))
        _refuse(narrow.isinf() & ~stored.isinf(), f"do not fit {self.dtype}", "pass LogitCache(dtype='float32')")
        rows["logits"] = narrow.cpu().numpy()
        return rows

    def unpacked(self, rows: NDArray[np.void], device: torch.device | str = "cpu") -> Tensor:
        """Return rows as logits, (batch, *shape) float32. Runs when a cache gives them out.

        Of top classes: log(rest / others), evenly, for each of the others, so that at temperature 1 the softmax of the
        stored classes, and the sum of the others', is the whole's.

        >>> form = RowFormat((3,), top_k=1)
        >>> form.unpacked(form.packed(torch.tensor([[0.0, 0.0, 5.0]])))
        tensor([[0., 0., 5.]])
        """

        def loaded(field: str) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(rows[field])).to(device)

        if not self.lumped:
            return loaded("logits").float()
        even = (loaded("rest") - math.log(self.lumped)).unsqueeze(-1)
        return even.expand(-1, *self.shape).scatter(-1, loaded("indices").long(), loaded("logits").float())


def _refuse(broken: Tensor, what: str, cure: str) -> None:
    if bool(broken.any()):
        examples = broken.flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            f"a cache holds a teacher's logits once and for all, and those of {len(examples)} of {len(broken)} new "
            f"examples (the first is number {examples[0]} of them) {what}; {cure}, or leave the cache out"
        )
