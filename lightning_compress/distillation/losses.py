"""Distillation losses of logits: (student logits, teacher logits) to a scalar.

Each is a mean over examples (or kept tokens), so that the losses of equal shards of a batch average to the loss of the
whole. Sums over classes are whole: a class that is -inf in both changes nothing. All are computed in float32 (float64
if given), whatever the dtype and autocast. `mask` is True, or 1, for what counts, over all dimensions but the classes
(`comparing.kept_tokens` makes it); where it keeps nothing the loss is 0, with zero gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.distillation.comparing import (
    check_mask,
    check_temperature,
    divergence,
    kept_mean,
    paired_logits,
    possible,
)

__all__ = [
    "decoupled",
    "hard_labels",
    "jensen_shannon",
    "logit_mse",
    "reverse_kl",
    "soft_targets",
]


def soft_targets(student: Tensor, teacher: Tensor, temperature: float = 2.0, *, mask: Tensor | None = None) -> Tensor:
    """Return T^2 * KL(teacher || student) of the softened distributions, averaged over examples. Runs in each step.

    Hinton, Vinyals & Dean 2015, section 2: T^2 keeps the gradient's size when T changes. Exactly 0 at equality.

    Args:
        student: (..., classes) logits, any floating dtype.
        teacher: the same shape.
        temperature: T > 0.
        mask: (...) what counts; None is everything.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes, or a temperature that is not positive.

    >>> import torch
    >>> round(float(soft_targets(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), 1.0)), 4)
    0.3278
    """
    got, wanted = _softened(student, teacher, temperature, mask)
    return kept_mean(divergence(wanted, got), mask) * temperature**2


def hard_labels(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the cross-entropy with the class that the teacher finds most likely. Runs in each step.

    Touvron et al. 2021, "Training data-efficient image transformers", section 4, equation 3 (its second half).
    Not 0 at equality: it asks for certainty.

    Args:
        student: (..., classes) logits.
        teacher: the same shape.
        mask: (...) what counts.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes.

    >>> round(float(hard_labels(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))), 4)  # log 2
    0.6931
    """
    student, teacher = paired_logits(student, teacher, mask)
    likely = teacher.argmax(dim=-1, keepdim=True)
    return kept_mean(-functional.log_softmax(student, dim=-1).gather(-1, likely).squeeze(-1), mask)


def logit_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the squared distance of the logits, summed over classes, averaged over examples. Runs in each step.

    Ba & Caruana 2014, "Do Deep Nets Really Need to be Deep?", equation 1 (with half of it); Kim et al. 2021,
    "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss", section 2. Unlike the softened losses it sees a
    constant added to all logits.

    Args:
        student: (..., classes) logits.
        teacher: the same shape.
        mask: (...) what counts.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes.

    >>> logit_mse(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]]))
    tensor(5.)
    """
    student, teacher = paired_logits(student, teacher, mask)
    return kept_mean((student - teacher).masked_fill(~possible(student, teacher), 0.0).square().sum(dim=-1), mask)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, *, mask: Tensor | None = None) -> Tensor:
    """Return T^2 * KL(student || teacher) of the softened distributions, averaged over examples. Runs in each step.

    Gu et al. 2023, "MiniLLM", section 2.1, token by token: the student is fined for what the teacher finds unlikely,
    rather than for what it leaves out. Infinite where the teacher rules out a class that the student does not.

    Args:
        student: (..., classes) logits.
        teacher: the same shape.
        temperature: T > 0.
        mask: (...) what counts.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes, or a temperature that is not positive.

    >>> round(float(reverse_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))), 4)
    0.4338
    """
    got, wanted = _softened(student, teacher, temperature, mask)
    return kept_mean(divergence(got, wanted), mask) * temperature**2


def jensen_shannon(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    """Return T^2 * the generalized Jensen-Shannon divergence, averaged over examples. Runs in each step.

    Agarwal et al. 2023, "On-Policy Distillation of Language Models" (GKD), section 2: for the teacher P, the student Q
    and M = beta P + (1 - beta) Q it is beta KL(P || M) + (1 - beta) KL(Q || M). Bounded, also where one of the two
    rules out a class. At a small beta it is beta times `soft_targets`, at a beta near 1 it is 1 - beta times
    `reverse_kl`; at 1/2 it is symmetric and at most T^2 log 2.

    Args:
        student: (..., classes) logits.
        teacher: the same shape.
        temperature: T > 0.
        beta: the teacher's share of the mixture, in (0, 1).
        mask: (...) what counts.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes, a temperature that is not positive, or a beta out of its range.

    >>> round(float(jensen_shannon(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))), 4)
    0.0895
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"expected beta in (0, 1), got {beta}; for its ends use soft_targets (0) and reverse_kl (1)")
    got, wanted = _softened(student, teacher, temperature, mask)
    loss = beta * _to_mixture(wanted, got, beta) + (1 - beta) * _to_mixture(got, wanted, 1 - beta)
    return kept_mean(loss, mask) * temperature**2


def decoupled(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return T^2 * (alpha * TCKD + beta * NCKD), averaged over examples with a label (DKD). Runs in each step.

    Zhao et al. 2022, "Decoupled Knowledge Distillation", equation 7. TCKD is KL(teacher || student) of the label's
    class against all others together, NCKD that among the other classes; `soft_targets` weighs NCKD by how unsure the
    teacher is, so that a sure teacher says nothing of the other classes.

    Args:
        student: (..., classes) logits, of which two at least are not -inf.
        teacher: the same shape.
        temperature: T > 0.
        labels: (...) class numbers; -100 has no label and does not count.
        alpha: weight of TCKD, at least 0.
        beta: weight of NCKD, at least 0; the paper takes 8 on CIFAR-100, 0.5 (with T = 1) on ImageNet.
        mask: (...) what counts besides.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes, or a temperature that is not positive.

    >>> round(float(decoupled(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), 1.0, labels=torch.tensor([0]))), 4)
    0.3278
    """
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"expected labels of shape {tuple(student.shape[:-1])} for logits of shape {tuple(student.shape)}, got "
            f"{tuple(labels.shape)}; give one class number for each example (or token)"
        )
    if mask is not None:
        check_mask(mask, labels.shape)
    kept = labels != -100 if mask is None else (labels != -100) & mask.bool()
    check_temperature(temperature)
    logits = [value / temperature for value in paired_logits(student, teacher, kept)]
    target = labels.masked_fill(~kept, 0).unsqueeze(-1)
    (got, got_others), (wanted, wanted_others) = (_apart(value, target) for value in logits)
    loss = alpha * divergence(wanted, got) + beta * divergence(wanted_others, got_others)
    return kept_mean(loss, kept) * temperature**2


def _softened(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    check_temperature(temperature)
    logits = paired_logits(student, teacher, mask)
    got, wanted = (functional.log_softmax(value / temperature, dim=-1) for value in logits)
    return got, wanted


def _to_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """Return KL(p || share p + (1 - share) q)."""
    gap = (log_q - log_p).masked_fill(log_p == -math.inf, 0.0)
    own, other = (torch.full_like(gap[..., :1], math.log(part)) for part in (share, 1 - share))
    # The last term is log 1 = 0; computed like the first, it takes off its rounding: equal p and q give exactly 0.
    beyond = torch.logaddexp(gap + other, own) - torch.logaddexp(other, own)
    return -(log_p.exp() * beyond).sum(dim=-1)


def _apart(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of (the target, all others together), and of each other class among the others."""
    others = logits.scatter(-1, target, -math.inf)
    parts = [logits.gather(-1, target), others.logsumexp(dim=-1, keepdim=True)]
    return functional.log_softmax(torch.cat(parts, dim=-1), dim=-1), functional.log_softmax(others, dim=-1)
