"""Distillation losses of the relations between the examples of a batch.

Each compares every example with the others of the batch at hand, so the value necessarily depends on it: the losses of
shards do not average to that of the whole batch, and two processes teach other pairs than one. Nothing
is gathered from other processes. Computed in float32 (float64 if given). The widths of
student and teacher may differ except where said. A batch too small to have relations costs 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.distillation.comparing import (
    check_temperature,
    kept_mean,
    paired,
    products,
    takes_any_width,
    unit,
    widened,
)

__all__ = ["contrastive", "relational_angle", "relational_distance", "similarity_preserving"]


@takes_any_width
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of the similarities between examples. Runs in each step.

    Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation", equations 1 to 4: G = Q Q^T with rows of length 1;
    the squares are summed and divided by batch^2, so the value falls with the batch as 1 / batch.

    Args:
        student: (batch, ...) activations, flattened per example.
        teacher: (batch, ...), any width.

    Returns:
        () float32.

    Raises:
        ValueError: another batch.

    >>> similarity_preserving(torch.eye(2), torch.ones(2, 3))  # rows (1, 0) against (1, 1) / sqrt(2)
    tensor(0.2929)
    """
    got, wanted = (unit(products(value, value.T)) for value in _examples(student, teacher))
    return kept_mean((got - wanted).square())


@takes_any_width
def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss of the distances between examples, as multiples of their mean. Runs in each step.

    Park et al. 2019, "Relational Knowledge Distillation", section 3.2.1 (RKD-D), averaged over the pairs. The paper
    weighs it by 25, beside 50 times `relational_angle`.

    Args:
        student: (batch, ...) embeddings, flattened per example.
        teacher: (batch, ...), any width.

    Returns:
        () float32.

    Raises:
        ValueError: another batch.

    >>> points = torch.tensor([[0.0], [1.0], [3.0]])
    >>> float(relational_distance(points, 7 * points))
    0.0
    """
    got, wanted = (_relative(functional.pdist(value)) for value in _examples(student, teacher))
    return kept_mean(functional.smooth_l1_loss(got, wanted, reduction="none"))


@takes_any_width
def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Huber loss of the cosines of the angles between three examples. Runs in each step.

    Park et al. 2019, "Relational Knowledge Distillation", section 3.2.2 (RKD-A), averaged over triplets of three
    different examples. Takes batch^3 + batch^2 * width numbers: pool feature maps first.

    Args:
        student: (batch, ...) embeddings, flattened per example.
        teacher: (batch, ...), any width.

    Returns:
        () float32.

    Raises:
        ValueError: another batch.

    >>> right_angle = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> round(float(relational_angle(right_angle, 2 * right_angle + 1)), 6)
    0.0
    """
    got, wanted = (_cosines(value) for value in _examples(student, teacher))
    batch = len(student)
    losses = functional.smooth_l1_loss(got, wanted, reduction="none")
    return losses.sum() / max(batch * (batch - 1) * (batch - 2), 1)  # the other entries are 0


def contrastive(student: Tensor, teacher: Tensor, temperature: float = 0.07) -> Tensor:
    """Return InfoNCE: tell the teacher's features of the same example from those of the others. Runs in each step.

    After Tian et al. 2020, "Contrastive Representation Distillation" (CRD), section 3, with these differences: the
    negatives are the other examples of the batch (CRD draws 16384 from a memory bank of the whole data set and keeps
    that up to date), the critic is a softmax over them (CRD: a binary one per pair, equation 8), and negatives of the
    example's own class are not left out. Both directions, as in CRD: averaged. Not 0 at equality; at most about
    log(batch) when nothing is learned, so compare values at one batch size only, and use large batches.

    Args:
        student: (batch, ...) embeddings, projected to one width; scaled to length 1 here.
        teacher: the same shape.
        temperature: above 0; the paper's range is 0.02 to 0.3.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes, or a temperature that is not positive.

    >>> round(float(contrastive(torch.eye(2), torch.eye(2), 1.0)), 4)  # log(1 + 1 / e)
    0.3133
    """
    check_temperature(temperature)
    student, teacher = paired(
        student, teacher, cure="project both to one width, as CRD does with a linear layer of each"
    )
    got, wanted = (unit(value.reshape(len(value), -1)) for value in (student, teacher))
    scores = products(got, wanted.T) / temperature
    own = scores.diagonal()
    return kept_mean(scores.logsumexp(dim=1) + scores.logsumexp(dim=0) - 2 * own) / 2


def _examples(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if len(student) != len(teacher):
        raise ValueError(
            f"expected the same examples from student and teacher, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}; tap layers whose first dimension is the batch"
        )
    student, teacher = widened(student, teacher)
    return student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)


def _relative(distances: Tensor) -> Tensor:
    mean = kept_mean(distances)
    return distances / mean.masked_fill(mean == 0, 1.0)


def _cosines(examples: Tensor) -> Tensor:
    """Return the cosine of the angle at j between i and k as [j, i, k]; 0 where two of them are one example."""
    directions = unit(examples.unsqueeze(0) - examples.unsqueeze(1))
    same = torch.eye(len(examples), dtype=torch.bool, device=examples.device)
    return products(directions, directions.transpose(1, 2)).masked_fill(same, 0.0)
