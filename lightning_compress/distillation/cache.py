"""What a teacher says, in files: written once, read afterwards instead of calling the teacher.

Logits and values of layers are found by the content of their examples, so that another data set, order or augmentation
can only miss them, never be given those of another example. `header.json` says whose they are and how they lie in the
folder's parts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_compress.distillation.header import check_folder, read_header, write_header
from lightning_compress.distillation.parts import Parts
from lightning_compress.distillation.rows import Answers, RowFormat, RowType
from lightning_compress.errors import CompressError

__all__ = ["LogitCache", "LogitStore", "check_repeats"]


@dataclass(frozen=True)
class LogitCache:
    """Where and how a teacher's logits, and the values of its layers that terms read, are kept.

    Args:
        folder: of this cache alone. All processes of a run, and runs side by side, may share it.
        top_k: how many classes of each example (or token) are kept, all others lumped into one number; None keeps all.
        dtype: "float16", which keeps three digits of a number up to 65504, or "float32".

    Raises:
        ValueError: an option out of its range.
    """

    folder: str | Path
    top_k: int | None = None
    dtype: RowType = "float16"

    def __post_init__(self) -> None:
        if self.top_k is not None and (isinstance(self.top_k, bool) or self.top_k < 1):
            raise ValueError(f"top_k is a number of classes to keep, or None for all, got {self.top_k!r}")
        if self.dtype not in get_args(RowType):
            raise ValueError(f"dtype of a cache is 'float16' or 'float32', got {self.dtype!r}")

    def open(self, teacher: str | None, layers: Collection[str] = (), logits: bool = True) -> LogitStore:
        """Open the cache, a new one where the folder is empty. Runs at the start of a fit.

        Args:
            teacher: its `fingerprint`; None reads what is there, whoever's it is, and takes nothing in.
            layers: what is read of which layers, such as "output of body.1".
            logits: whether logits are read.

        Raises:
            CompressError: the folder holds other files, or what another teacher said, or in another format; or nothing,
                or nothing of these layers, and no teacher is given.
        """
        return LogitStore(self, teacher, layers, logits)


class LogitStore:
    """An open cache: what a teacher says, by the keys of the examples, as `example_keys` makes them.

    A pickle or copy reads the files anew, and writes files of its own.

    Args:
        cache: its options.
        teacher: fingerprint; None only reads.
        layers: what is read of which layers.
        logits: whether logits are read.
    """

    def __init__(
        self, cache: LogitCache, teacher: str | None, layers: Collection[str] = (), logits: bool = True
    ) -> None:
        self.cache, self.teacher, self.folder = cache, teacher, Path(cache.folder)
        self._reads = tuple(layers), logits
        self._opened: tuple[RowFormat, Parts] | None = None
        check_folder(self.folder)
        self.refresh()
        if teacher is None and self._opened is None:
            raise CompressError(f"the cache '{self.folder}' holds no logits yet; open it with a teacher to fill it")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy as what it was opened by."""
        return LogitStore, (self.cache, self.teacher, *self._reads)

    @property
    def layers(self) -> list[str]:
        """What is held of which layers."""
        return [] if self._opened is None else list(self._opened[0].layers)

    def __len__(self) -> int:
        """Return the number of examples whose logits are known."""
        return 0 if self._opened is None else len(self._opened[1])

    def refresh(self) -> None:
        """Take up what other processes wrote meanwhile. Runs at opening; call it at the start of each epoch.

        Raises:
            CompressError: logits of another teacher or format.
        """
        if self._opened is None:
            form = read_header(self.folder, self.teacher, self.cache.dtype, self.cache.top_k, *self._reads)
            self._opened = None if form is None else (form, Parts(self.folder, form.record.itemsize))
        if self._opened is not None:
            self._opened[1].refresh()

    def known(self, keys: list[bytes]) -> int:
        """Return how many of these examples are known."""
        return 0 if self._opened is None else sum(key in self._opened[1] for key in keys)

    def find(self, keys: list[bytes], device: torch.device | str = "cpu") -> Tensor | None:
        """Return the logits of these examples, as `recall` does."""
        found = self.recall(keys, device)
        return None if found is None else found.logits

    def recall(self, keys: list[bytes], device: torch.device | str = "cpu") -> Answers | None:
        """Return what the teacher said of these examples; None unless all are known. Runs in each step.

        With `top_k` logits have full width: the softmax of the stored classes is exact at temperature 1, and the
        probability that is left is spread evenly over the others. At a higher temperature the others get more than
        the teacher gave them, as an even rest softens to more than an uneven one.

        Args:
            keys: of each example.
            device: where it goes; logits get their full width there.

        Returns:
            float32: logits (batch, classes) or (batch, tokens, classes), and values of layers (batch, ...).
        """
        if self._opened is None:
            return None
        form, parts = self._opened
        rows = parts.find(keys)
        return None if rows is None else form.unpacked(rows.view(form.record).reshape(len(keys)), device)

    def add(self, keys: list[bytes], logits: Tensor) -> None:
        """Write the logits of those examples that are not known yet, as `keep` does."""
        self.keep(keys, Answers(logits))

    def keep(self, keys: list[bytes], answers: Answers) -> None:
        """Write what was said of those examples that are not known yet. Runs in steps that `recall` has nothing for.

        Args:
            keys: of each example.
            answers: of any floating dtype and device; for each example of the shapes of the first batch.

        Raises:
            ValueError: other shapes, NaN or +inf, or numbers too large for the dtype.
            CompressError: no teacher was given at opening.
        """
        form, parts = self._fitting(keys, answers)
        new = {key: example for example, key in enumerate(keys) if key not in parts}
        if new:
            parts.add(list(new), form.packed(answers.of(list(new.values()))).tobytes())

    def close(self) -> None:
        """Let go of the files; `find` and `add` take them up again."""
        if self._opened is not None:
            self._opened[1].close()

    def _fitting(self, keys: list[bytes], answers: Answers) -> tuple[RowFormat, Parts]:
        if self.teacher is None:
            raise CompressError(f"the cache '{self.folder}' was opened without a teacher, only to read; give it one")
        if self._opened is None:
            self._check(len(keys), answers, None)
            logits, layers = answers.shapes()
            write_header(self.folder, self.teacher, RowFormat(logits, self.cache.dtype, self.cache.top_k, layers))
            self.refresh()  # the header may be another process's
        if self._opened is None:
            raise CompressError(f"the header of the cache '{self.folder}' was taken away meanwhile; keep the folder")
        self._check(len(keys), answers, self._opened[0])
        return self._opened

    def _check(self, examples: int, answers: Answers, form: RowFormat | None) -> None:
        """Raise unless all is of these examples, and of the shapes that are held."""
        values: list[tuple[str, Tensor, Sequence[int] | None]] = []
        if answers.logits is not None:
            values.append(("logits", answers.logits, None if form is None else form.shape))
        for name, own in answers.layers.items():
            held = [None] * len(own) if form is None else form.layers[name]
            values += [(name, value, shape) for value, shape in zip(own, held, strict=True)]
        for name, value, shape in values:
            if len(value) != examples or (shape is not None and tuple(value.shape[1:]) != tuple(shape)):
                wanted = ", ".join(map(str, (examples, *(shape or ("...",)))))
                raise ValueError(
                    f"expected {name} of shape ({wanted}), an example each as the cache '{self.folder}' holds them, "
                    f"got {tuple(value.shape)}; pad all batches to one fixed length (with a new folder, if it is "
                    f"another), or leave the cache out"
                )


def check_repeats(first_epoch_done: bool, known: int, asked: int) -> None:
    """Refuse inputs that change from epoch to epoch: a cache would only grow. Runs in each step with a cache.

    Args:
        first_epoch_done: a whole epoch, over all of the training data, went through the cache.
        known: examples of this batch whose logits were known.
        asked: examples of this batch.

    Raises:
        CompressError: after such an epoch, none of a batch was known.

    >>> check_repeats(first_epoch_done=True, known=1, asked=8)
    """
    if first_epoch_done and asked and not known:
        raise CompressError(
            f"the cache holds a whole epoch of logits and yet none of this batch's {asked} examples: inputs change "
            f"from epoch to epoch, by random augmentation, dropout in a preprocessing layer, or padding to the left; "
            f"fix the augmentation's seed per example, pad to one fixed length, or leave the cache out"
        )
