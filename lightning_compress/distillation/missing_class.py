"""Repair a student that was taught without examples of some classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["corrective_bias"]


def corrective_bias(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> float:
    """Return what, added to the logits of these classes, makes the fewest errors. Runs after training, once.

    Hinton, Vinyals & Dean 2015, section 3: a student that saw no 3 in its transfer set has learned what a 3 looks like
    from the teacher's other answers, and only the class's bias is far too low. Exact: all biases between two
    neighbouring margins make the same errors, and each such interval is tried; of equally good ones the nearest to 0.
    Choose it on validation data.

    Args:
        logits: (examples, classes).
        labels: (examples,) class numbers.
        classes: those that share the bias, such as [3].

    Raises:
        ValueError: no examples, other shapes, no classes, or all of them.

    >>> logits = torch.tensor([[2.0, 0.0], [2.0, -5.0], [2.0, 0.5]])
    >>> corrective_bias(logits, torch.tensor([1, 0, 1]), [1])  # above 2, below 7
    4.5
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"expected logits (examples, classes) and as many labels, got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}; gather them over validation batches with torch.cat"
        )
    inside = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    inside[list(classes)] = True
    if inside.all() or not inside.any():
        raise ValueError(
            f"expected some but not all of {logits.shape[1]} classes, got {list(classes)}; name those missed"
        )
    scores = logits.detach().double()
    best_in, likely_in = scores.masked_fill(~inside, -torch.inf).max(dim=1)
    best_out, likely_out = scores.masked_fill(inside, -torch.inf).max(dim=1)
    margins = best_out - best_in  # an example goes to these classes where the bias is above its margin
    won = (likely_in == labels).long() - (likely_out == labels).long()
    order = margins.argsort()
    edges = torch.cat([margins[order][:1] - 1, margins[order], margins[order][-1:] + 1])
    low, high = edges[:-1], edges[1:]
    between = ((low + high) / 2).masked_fill((low < 0) & (high > 0), 0.0)
    gained = torch.cat([won.new_zeros(1), won[order].cumsum(0)])
    tried = low < high  # between two equal margins there is no bias
    best = between[tried & (gained == gained[tried].max())]
    return float(best[best.abs().argmin()])
