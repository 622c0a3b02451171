"""Distillation losses of features: hidden states, embeddings and feature maps to a scalar.

Each is a mean over examples (or kept tokens), so that equal shards of a batch average to the whole, and is computed in
float32 (float64 if given). A student of another width comes projected: the projection is learned with the student.
"""

from __future__ import annotations

from torch import Tensor

from lightning_compress.distillation.comparing import kept_mean, paired, takes_any_width, unit, widened

__all__ = ["attention_transfer", "cosine_distance", "feature_mse"]

PROJECT = "project the student's features to the teacher's width first, or tap layers of one size"


def feature_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of hints, hidden states or embeddings. Runs in each step.

    Romero et al. 2015, "FitNets", equation 3 (there half the sum); hidden states and embeddings: Jiao et al. 2020,
    "TinyBERT", equations 8 and 9.

    Args:
        student: any shape, such as (batch, channels, height, width) or (batch, tokens, width).
        teacher: the same shape.
        mask: what counts, over the leading dimensions: (batch, tokens), or (batch,).

    Returns:
        () float32.

    Raises:
        ValueError: other shapes.

    >>> import torch
    >>> feature_mse(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
    tensor(5.)
    """
    student, teacher = paired(student, teacher, mask, cure=PROJECT)
    squares = (student - teacher).square()
    if mask is not None:
        squares = squares.unsqueeze(-1).flatten(mask.dim()).mean(dim=-1)
    return kept_mean(squares, mask)


def cosine_distance(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return 1 - cosine of the angle between hidden states, averaged over tokens. Runs in each step.

    Sanh et al. 2019, "DistilBERT", section 3; computed as half the squared distance of the unit vectors, which is
    exactly 0 at equality. A state of zeros has no direction: 1/2, without gradient for the student.

    Args:
        student: (..., width).
        teacher: the same shape.
        mask: (...) what counts.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes.

    >>> import torch
    >>> cosine_distance(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
    tensor(1.)
    """
    student, teacher = paired(student, teacher, mask, cure=PROJECT)
    return kept_mean((unit(student) - unit(teacher)).square().sum(dim=-1) / 2, mask)


@takes_any_width
def attention_transfer(student: Tensor, teacher: Tensor, *, power: float = 2.0) -> Tensor:
    """Return the squared distance of the unit attention maps, averaged over examples. Runs in each step.

    Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", equation 2: an attention map is the sum over
    channels of |activation|^power, of length 1 over positions. Squared, as in the authors' code, and summed over
    positions. Needs no projection: the channels may differ.

    Args:
        student: (batch, channels, ...) feature maps.
        teacher: (batch, its channels, ...), of the same spatial size.
        power: at least 1; 2 is the paper's choice.

    Returns:
        () float32.

    Raises:
        ValueError: another batch or spatial size, or a power below 1.

    >>> import torch
    >>> attention_transfer(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0], [0.0, 1.0]]]))
    tensor(2.)
    """
    if power < 1:
        raise ValueError(f"expected a power of at least 1, got {power}; 2 is the paper's choice")
    if student.dim() < 3 or (student.shape[:1], student.shape[2:]) != (teacher.shape[:1], teacher.shape[2:]):
        raise ValueError(
            f"expected feature maps (batch, channels, ...) of one batch and spatial size, got {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}; tap layers of one resolution, or pool the larger map"
        )
    got, wanted = (unit(value.abs().pow(power).sum(dim=1).flatten(1)) for value in widened(student, teacher))
    return kept_mean((got - wanted).square().sum(dim=-1))
