"""What losses need of a step's batch beside the two models' outputs: its labels, and what of it counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_compress.distillation.comparing import kept_tokens
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.taps import Call

__all__ = ["labels_in", "labels_of", "mask_of"]


def labels_of(details: Details, call: Call, batch: Any) -> Tensor:
    """Return the labels for a loss that has a parameter for them. Runs in each step.

    Raises:
        ValueError: there are none.
    """
    if details.labels is not None:
        return details.labels(batch)
    found = labels_in(call, batch)
    if found is None:
        raise ValueError(
            f"the loss needs labels, but none were found in the student's call or in a batch of type "
            f"{type(batch).__name__}; pass details=Details(labels=a function from the batch to its labels)"
        )
    return found


def mask_of(details: Details, call: Call, batch: Any) -> Tensor | None:
    """Return what counts, for a loss that has a parameter for it; None is all. Runs in each step."""
    if details.mask is not None:
        return details.mask(batch)
    attention, labels = call.kwargs.get("attention_mask"), labels_in(call, batch)
    fits = labels if labels is not None and labels.dim() == 2 else None
    if attention is None or attention.dim() != 2:
        return None if fits is None else kept_tokens(labels=fits)
    same = fits is not None and fits.shape == attention.shape
    return kept_tokens(attention, fits if same else None)


def labels_in(call: Call, batch: Any) -> Tensor | None:
    """Return the labels of the student's call, or of a batch: a mapping's "labels" or "label", or the second item.

    >>> import torch
    >>> labels_in(Call("", (), {}, None), (torch.zeros(1, 4), torch.tensor([3])))
    tensor([3])
    """
    found = call.kwargs.get("labels")
    if found is None and isinstance(batch, Mapping):
        found = next((batch[name] for name in ("labels", "label") if name in batch), None)
    if found is None and isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    return found if isinstance(found, Tensor) else None
