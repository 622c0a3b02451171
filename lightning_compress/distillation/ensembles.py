"""Several teachers as one: the weighted mean of their logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.distillation.comparing import divergence
from lightning_compress.distillation.taps import logits_of
from lightning_compress.distillation.teachers import Builder, built_module, check_call

__all__ = ["Ensemble", "agreement_weights", "weighted_logits"]


class Ensemble(nn.Module):
    """Several teachers as one: called with a student's inputs, it gives the weighted mean of their logits, a tensor.

    Hinton, Vinyals & Dean 2015, section 1: soft targets may be the geometric mean of the teachers' distributions, which
    is the distribution of the mean of their logits, at any temperature. `teachers.0`, `teachers.1` and so on are the
    names of its members, for losses of layers.

    Args:
        teachers: two or more modules, or callables that build one: `PretrainedTeacher`, `TeacherCheckpoint`; these are
            called once, here.
        weights: of each teacher, not negative, scaled to sum 1; None is equal ones.
        by_agreement: weigh the teachers anew in each example by how near they are to what they say together
            (`agreement_weights`).
        outputs: a teacher's output -> logits; None takes a tensor, `.logits`, `["logits"]` or the first of a tuple. If
            `Distillation` has Details(outputs=) too, that is called with this module's tensor.

    Raises:
        ValueError: fewer than two teachers, weights that are no shares, or teachers with different logits.
        TypeError: something that builds no module, or a teacher that does not take the student's inputs.

    >>> double, half = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(double.weight, 2.0), nn.init.constant_(half.weight, 0.5)
    >>> Ensemble([double, half], weights=[1, 2])(torch.ones(1, 1)).item()
    1.0
    """

    def __init__(
        self,
        teachers: Sequence[nn.Module | Builder],
        weights: Sequence[float] | None = None,
        by_agreement: bool = False,
        outputs: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if len(teachers) < 2:
            raise ValueError(f"expected two teachers or more, got {len(teachers)}; pass a single one as it is")
        self.weights = _shares(weights, len(teachers))
        self.teachers = nn.ModuleList(built_module(teacher) for teacher in teachers)
        self.by_agreement = by_agreement
        self.outputs = outputs or logits_of

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean of the logits: (..., classes) in float32, or float64 where a teacher gives that."""
        logits = [self._logits(place, args, kwargs) for place in range(len(self.teachers))]
        self._check_shapes(logits)
        dtype = functools.reduce(torch.promote_types, (each.dtype for each in logits), torch.float32)
        stacked = torch.stack([each.to(dtype) for each in logits])
        weights = stacked.new_tensor(self.weights)
        return weighted_logits(stacked, agreement_weights(stacked, weights) if self.by_agreement else weights)

    def _name(self, place: int) -> str:
        return f"teacher {place} ({type(self.teachers[place]).__name__}) of the Ensemble"

    def _logits(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        teacher = self.teachers[place]
        if not torch.compiler.is_compiling():  # a graph would break here
            check_call(teacher, args, kwargs, self._name(place))
        try:
            return self.outputs(teacher(*args, **kwargs))
        except Exception as error:
            error.add_note(f"in {self._name(place)}")
            raise

    def _check_shapes(self, logits: Sequence[Tensor]) -> None:
        for place, other in enumerate(logits):
            if other.shape != logits[0].shape:
                raise ValueError(
                    f"expected logits of one shape, got {tuple(logits[0].shape)} from {self._name(0)} and "
                    f"{tuple(other.shape)} from {self._name(place)}; use teachers with the same classes, or pass "
                    f"outputs=a function that makes them equal"
                )


def _shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return one share a teacher, of sum 1."""
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    fitting = len(given) == count and all(math.isfinite(weight) and weight >= 0.0 for weight in given)
    if not fitting or sum(given) == 0.0:
        raise ValueError(
            f"expected weights of {count} teachers, none negative and not all zero, got {weights}; None weighs the "
            f"teachers equally"
        )
    return tuple(weight / sum(given) for weight in given)


def weighted_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean over teachers; one of weight 0 has no say, whatever it gives. Runs in each step.

    Args:
        logits: (teachers, ..., classes).
        weights: (teachers,), or (teachers, ...) for weights of each example; of sum 1 over the teachers.

    >>> weighted_logits(torch.tensor([[1.0, 3.0], [5.0, -torch.inf]]), torch.tensor([0.5, 0.5]))
    tensor([3., -inf])
    >>> weighted_logits(torch.tensor([[1.0, 3.0], [5.0, -torch.inf]]), torch.tensor([1.0, 0.0]))
    tensor([1., 3.])
    """
    each = weights.reshape(weights.shape + (1,) * (logits.dim() - weights.dim()))
    return (each * logits).masked_fill(each == 0.0, 0.0).sum(dim=0)


def agreement_weights(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the weights of teachers in each example, by how near each is to what they say together.

    The weight of teacher i is proportional to `w_i exp(-KL(m || p_i))`, where p_i is its distribution and
    `m = sum_i w_i p_i` that of them all. This is ours, from no paper: a teacher that contradicts the others loses its
    say where it does so, and keeps it elsewhere. m is the arithmetic mean, so that a single teacher cannot take it over
    by being very sure of itself. Where no teacher is near (each rules out something that another allows), the weights
    are the given ones. Runs in each step.

    Args:
        logits: (teachers, ..., classes), float32 or float64.
        weights: (teachers,) w, not negative, of sum 1.

    Returns:
        (teachers, ...) of sum 1 over the teachers; of tokens, where logits are of tokens.

    >>> agreement_weights(torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]], [[-2.0, 0.0]]]), torch.full((3,), 1 / 3)).T
    tensor([[0.3843, 0.3843, 0.2313]])
    """
    given = weights.reshape(-1, *[1] * (logits.dim() - 2))
    log_p = logits.log_softmax(dim=-1)
    together = (log_p + given.log().unsqueeze(-1)).logsumexp(dim=0)
    together = together.masked_fill(together.exp() == 0.0, -math.inf)  # or 0 times infinity would be NaN below
    distance = divergence(together, log_p).masked_fill(given == 0.0, math.inf)
    distance = distance.masked_fill(distance.isinf().all(dim=0), 0.0)
    return (given.log() - distance).softmax(dim=0)
