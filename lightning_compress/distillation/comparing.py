"""What all distillation losses share: one dtype and shape, means over what is kept, and which tokens are kept."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Loss = TypeVar("Loss", bound=Callable[..., Tensor])

__all__ = [
    "any_width",
    "check_mask",
    "check_temperature",
    "divergence",
    "kept_mean",
    "kept_tokens",
    "keywords_of",
    "paired",
    "paired_logits",
    "possible",
    "products",
    "takes_any_width",
    "takes_temperature",
    "unit",
    "widened",
]


def kept_tokens(
    attention_mask: Tensor | None = None, labels: Tensor | None = None, *, next_token: bool = False
) -> Tensor:
    """Return the mask of the tokens that count: not padding, and with a label. Runs in each step, before the losses.

    Args:
        attention_mask: (batch, tokens), 1 for a token, 0 for padding.
        labels: (batch, tokens), -100 where there is nothing to predict.
        next_token: the labels are those of a causal language model, not yet shifted: position t predicts label t + 1,
            and the last position nothing.

    Returns:
        (batch, tokens) bool, True where a token counts.

    Raises:
        ValueError: neither is given, or their shapes differ.

    >>> kept_tokens(torch.tensor([[1, 1, 0]]), torch.tensor([[-100, 7, -100]]))
    tensor([[False,  True, False]])
    >>> kept_tokens(labels=torch.tensor([[-100, 7, -100]]), next_token=True)
    tensor([[ True, False, False]])
    """
    if labels is None and attention_mask is None:
        raise ValueError("expected an attention_mask, labels or both, got neither; without padding pass mask=None")
    kept = [] if attention_mask is None else [attention_mask.bool()]
    if labels is not None:
        labelled = labels != -100
        if next_token:
            labelled = torch.cat([labelled[..., 1:], torch.zeros_like(labelled[..., :1])], dim=-1)
        kept.append(labelled)
    if kept[0].shape != kept[-1].shape:
        raise ValueError(
            f"expected attention_mask and labels of one shape, got {tuple(kept[0].shape)} and {tuple(kept[-1].shape)}; "
            f"use kept_tokens with one of them and combine the masks as the model does"
        )
    return kept[0] & kept[-1]


def widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the dtype that losses are computed in: float32, or float64 where one of them is.

    >>> [value.dtype for value in widened(torch.ones(1).bfloat16(), torch.ones(1))]
    [torch.float32, torch.float32]
    """
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.to(dtype)


def paired(student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, cure: str) -> tuple[Tensor, Tensor]:
    """Return both as `widened` does, with zeros where the mask is False: what was there, even NaN, has no gradient.

    Args:
        student: any shape.
        teacher: the same shape.
        mask: bool or 0 and 1, over the leading dimensions.
        cure: what the caller can do about different shapes.

    Raises:
        ValueError: the shapes differ, or the mask does not fit.

    >>> paired(torch.ones(2, 1), torch.ones(2, 1), torch.tensor([1, 0]), cure="")[0]
    tensor([[1.], [0.]])
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"expected student and teacher of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}; {cure}"
        )
    student, teacher = widened(student, teacher)
    if mask is None:
        return student, teacher
    check_mask(mask, student.shape[: mask.dim()])
    dropped = ~mask.bool().reshape(mask.shape + (1,) * (student.dim() - mask.dim()))
    return student.masked_fill(dropped, 0.0), teacher.masked_fill(dropped, 0.0)


def paired_logits(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits of one shape and dtype, zero where the mask, over all dimensions but the classes, is False.

    Raises:
        ValueError: other shapes.

    >>> paired_logits(torch.ones(2, 3), torch.ones(2, 3), None)[0].shape
    torch.Size([2, 3])
    """
    if mask is not None:
        check_mask(mask, student.shape[:-1])
    return paired(student, teacher, mask, cure="use a teacher with the same classes, or keep those that both have")


def possible(student: Tensor, teacher: Tensor) -> Tensor:
    """Return where not both are -inf: what a model's mask rules out in both is no difference between them.

    >>> possible(torch.tensor([-torch.inf, 0.0]), torch.tensor([-torch.inf, -torch.inf]))
    tensor([False,  True])
    """
    return (student != -math.inf) | (teacher != -math.inf)


def kept_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean over the kept values; 0, with zero gradient, where none is kept.

    >>> kept_mean(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([1, 1, 0]))
    tensor(2.)
    >>> kept_mean(torch.ones(0))
    tensor(0.)
    """
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    kept = mask.bool()
    return values.masked_fill(~kept, 0.0).sum() / kept.sum().clamp_min(1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) over the last dimension, of log-probabilities; exactly 0 where they are equal.

    An outcome of probability 0 under p adds nothing: 0 log 0 = 0. One of probability 0 under q only makes it infinite.

    >>> divergence(torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log())  # log 2
    tensor(0.6931)
    """
    gap = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)
    return (log_p.exp() * gap).sum(dim=-1)


def unit(vectors: Tensor, dim: int = -1, smallest: Tensor | float = 0.0) -> Tensor:
    """Return vectors of length 1; one not longer than `smallest` has no direction: zeros, without gradient.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    length: Tensor = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    none = length <= smallest
    return (vectors / length.masked_fill(none, 1.0)).masked_fill(none, 0.0)


def products(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product in the operands' dtype: autocast would round it to bfloat16.

    >>> products(torch.ones(2, 3), torch.ones(3, 1))
    tensor([[3.], [3.]])
    """
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is no positive number.

    Raises:
        ValueError: it is none.

    >>> check_temperature(2.0)
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"expected a positive, finite temperature, got {temperature}; 1 leaves the logits as they are")


def takes_temperature(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss of logits takes a temperature after student and teacher. Runs when `Distillation` is made.

    Raises:
        ValueError: it cannot be called with student, teacher and a temperature, nor with the first two alone.

    >>> takes_temperature(lambda student, teacher: student), takes_temperature(lambda student, teacher, t: student)
    (False, True)
    """
    try:
        signature = inspect.signature(loss)
    except ValueError:  # some builtins have none
        return True
    given = dict.fromkeys(keywords_of(loss))
    for count in (3, 2):
        try:
            signature.bind(*[None] * count, **given)
        except TypeError as error:
            reason = error
        else:
            return count == 3
    raise ValueError(
        f"loss is called with student and teacher logits and, if it takes one, a temperature, but {loss} says: "
        f"{reason}; give its other options by functools.partial, or call it in your training_step"
    )


def takes_any_width(loss: Loss) -> Loss:
    """Mark a loss that compares student and teacher of different widths: no projection is learned for it.

    >>> any_width(takes_any_width(lambda student, teacher: student)), any_width(lambda student, teacher: student)
    (True, False)
    """
    loss.any_width = True  # type: ignore[attr-defined]
    return loss


def any_width(loss: Callable[..., Tensor]) -> bool:
    """Whether a loss, or the function inside a `functools.partial`, is marked by `takes_any_width`."""
    return bool(getattr(getattr(loss, "func", loss), "any_width", False))


def keywords_of(loss: Callable[..., Tensor]) -> frozenset[str]:
    """Return which of `labels` and `mask` a loss has a parameter for, and was not given yet. Runs at `setup`.

    >>> from functools import partial
    >>> def loss(student, teacher, *, labels, mask=None): return student
    >>> sorted(keywords_of(loss)), sorted(keywords_of(partial(loss, mask=None)))
    (['labels', 'mask'], ['labels'])
    """
    try:
        names = set(inspect.signature(loss).parameters)
    except ValueError:  # some builtins have none
        return frozenset()
    return frozenset({"labels", "mask"} & names - set(getattr(loss, "keywords", ())))


def check_mask(mask: Tensor, wanted: tuple[int, ...]) -> None:
    """Refuse a mask of another shape than what it is over.

    Raises:
        ValueError: it has one.

    >>> check_mask(torch.ones(2, 3), (2, 3))
    """
    if mask.shape != wanted:
        raise ValueError(
            f"expected a mask of shape {tuple(wanted)}, got {tuple(mask.shape)}; make it with kept_tokens from this "
            f"batch's attention_mask or labels"
        )
