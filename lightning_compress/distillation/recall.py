"""What a teacher says from its cache, and from the teacher where the cache has nothing yet."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from lightning_compress.distillation.cache import LogitCache, LogitStore, check_repeats
from lightning_compress.distillation.keys import example_keys
from lightning_compress.distillation.rows import Answers
from lightning_compress.errors import CompressError

__all__ = ["Recall", "recall_from"]


class Recall:
    """Looks a batch up by the content of its examples; what is not known yet is asked of the teacher and kept.

    Args:
        store: opened, with the teacher's fingerprint or, to read only, without.
        read_only: there is no teacher.
    """

    def __init__(self, store: LogitStore, read_only: bool) -> None:
        self.store, self.read_only = store, read_only
        self.all_seen = False  # whether each example of the training data has come once

    def __call__(
        self, arguments: tuple[tuple[Any, ...], dict[str, Any]], device: torch.device, ask: Callable[..., Answers]
    ) -> Answers:
        """Return what the teacher says of these inputs. Runs in each step.

        Raises:
            CompressError: inputs change from epoch to epoch, or are not in a store that is only read.
        """
        keys = example_keys(*arguments)
        found = self.store.recall(keys, device)
        if found is not None:
            return found
        known = self.store.known(keys)
        check_repeats(self.all_seen, known, len(keys))
        if self.read_only:
            raise CompressError(
                f"the cache knows {known} of {len(keys)} examples of this batch, and there is no teacher to ask: it "
                f"was written for other inputs (another data set, another preprocessing, random augmentation); pass "
                f"teacher= as well, or the cache of these data"
            )
        answers = ask(*arguments)
        self.store.keep(keys, answers)
        return answers


def recall_from(
    cache: str | LogitCache | None, teacher: str | None, layers: Collection[str] = (), logits: bool = True
) -> Recall:
    """Open a cache, by its folder or its options. Runs at `setup`.

    Args:
        cache: of `Details`.
        teacher: its fingerprint; None only reads.
        layers: what is read of which layers.
        logits: whether logits are read.
    """
    options = cache if isinstance(cache, LogitCache) else LogitCache(str(cache))
    return Recall(options.open(teacher, layers, logits), read_only=teacher is None)
