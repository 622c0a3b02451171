"""Weights that become the few values which a differentiable k-means finds among them, anew in each forward (DKM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.weight_sharing.codebook import kmeans, nearest_entry

__all__ = ["DKM", "soft_clusters"]

MOST_ENTRIES = 256
START_STEPS = 10


def soft_clusters(values: Tensor, book: Tensor, width: Tensor, counted: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return how much of each value is in each cluster, and the clusters' centers. Runs in each training forward.

    Each step is a = softmax(-|w - c| / width) over the centers, then c = sum(a w) / sum(a); the attention that comes
    last is of the last centers. Cho et al. 2022, "DKM", section 3.2. All of it has gradients.

    Args:
        values: (n,) floating point.
        book: (entries,), centers to start from.
        width: (), how soft the assignment is, in the values' unit.
        counted: (n,), True for values that move centers.
        steps: how often centers move.

    Returns:
        (n, entries), each row sums to 1, and (entries,).

    >>> values, book = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 5.0])
    >>> attention, book = soft_clusters(values, book, torch.tensor(0.01), torch.ones(3, dtype=torch.bool), steps=2)
    >>> attention.round(), book
    (tensor([[1., 0.],
            [1., 0.],
            [0., 1.]]), tensor([0.5000, 4.0000]))
    """
    for _ in range(steps):
        attention = _attention(values, book, width) * counted[:, None]
        mass = attention.sum(0)
        # A center that nothing is near stays.
        book = torch.where(mass > 0, (attention * values[:, None]).sum(0) / mass.clamp_min(1e-12), book)
    return _attention(values, book, width), book


def _attention(values: Tensor, book: Tensor, width: Tensor) -> Tensor:
    return torch.softmax(-(values[:, None] - book).abs() / width, dim=1)


@dataclass(frozen=True)
class DKM:
    """Weights of a layer become few values: centers of clusters, which gradients reach through the clustering itself.

    In training each weight is a mixture of centers, nearly one of them where `temperature` is low, and centers are
    soft means of the weights, so gradients of the loss move weights from one center to another; without gradients (in
    validation, `ranges()` and packed files) each weight is its nearest center. Zeros of pruning stay zeros, and are one
    of the entries. Takes entries times the weights of a layer in numbers, `steps` times over: for layers of up to a
    million weights. `WeightSharing` is the same in one moment of the run, and cheap. Cho et al. 2022, "DKM:
    Differentiable K-Means Clustering Layer for Neural Network Compression".

    Args:
        entries: values a layer, that of zeros counted; 3 to 256.
        temperature: width of the soft assignment, as a share of the mean size of the weights.
        steps: differentiable steps of k-means in a forward, after ten others.

    >>> with torch.no_grad():
    ...     DKM(3).rounded(torch.tensor([[0.0, 1.0, 1.2, -3.0]]), {})
    tensor([[ 0.0000,  1.1000,  1.1000, -3.0000]])
    """

    entries: int = 16
    temperature: float = 0.02
    steps: int = 2

    def __post_init__(self) -> None:
        if isinstance(self.entries, bool) or not 3 <= self.entries <= MOST_ENTRIES:
            raise ValueError(f"entries is a number of values a layer, 3 to {MOST_ENTRIES}, got {self.entries!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature is a positive share of the weights' mean size, got {self.temperature!r}")
        if isinstance(self.steps, bool) or self.steps < 1:
            raise ValueError(f"steps is a number of at least 1, got {self.steps!r}")

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (self.entries - 1).bit_length()

    def learned(self, weight: Tensor) -> dict[str, Tensor]:
        """Return {}: centers follow from the weights.

        Raises:
            ValueError: more entries than weights.
        """
        if weight.numel() < self.entries:
            raise ValueError(f"DKM asks for {self.entries} values of a layer that has {weight.numel()} weights")
        return {}

    def rounded(self, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        """Return mixtures of centers where gradients are wanted, else the nearest centers."""
        wide = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
        values = wide.flatten()
        counted = values.detach() != 0
        if not bool(values.detach().isfinite().all()) or not bool(counted.any()):
            return weight * 1.0  # NaN shall be seen, and zeros are zeros
        book = kmeans(values.detach()[counted], self.entries - 1, steps=START_STEPS)
        width = self.temperature * values.detach()[counted].abs().mean()
        if torch.is_grad_enabled() and weight.requires_grad:
            attention, book = soft_clusters(values, book, width, counted, self.steps)
            found = attention @ book
        else:
            _, book = soft_clusters(values, book, width, counted, self.steps)
            book = book.sort().values
            found = book[nearest_entry(values, book)]
        return torch.where(counted, found, 0.0).view_as(weight).to(weight.dtype)

    def codes(self, weight: Tensor, learned: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Return None: the values are not even. A packed file keeps them as a codebook."""
        return None
