"""Gates: parameters learned beside a weight that say what of it gets through.

A gate is a frozen object of options with the methods of `Gate`, called with a weight and its parameter; its formula is
a plain function beside it. What it learns is a tensor owned by `SparsityRegularization`, never a module's parameter.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Gate",
    "HardConcrete",
    "SoftMovement",
    "SoftThreshold",
    "expected_l0",
    "hard_concrete",
    "soft_threshold",
    "straight_through_mask",
]

EDGE = 1e-6  # keeps the logarithms of noise finite


@runtime_checkable
class Gate(Protocol):
    """What `SparsityRegularization` asks of a gate."""

    @property
    def learning_rate(self) -> float:
        """Of the Adam optimizer that moves the parameter."""
        ...

    def initial(self, weight: Tensor) -> Tensor:
        """Return the parameter that a weight begins with; float32 or wider."""
        ...

    def noise(self, parameter: Tensor, name: str, step: int) -> Tensor | None:
        """Return the noise of an optimizer step, the same on each process; None if there is none."""
        ...

    def __call__(self, weight: Tensor, parameter: Tensor, noise: Tensor | None) -> Tensor:
        """Return what the layer computes with, of the weight's shape; without noise as in evaluation."""
        ...

    def penalty(self, parameter: Tensor) -> Tensor:
        """Return one number that falls as more is shut out."""
        ...

    def scores(self, weight: Tensor, parameter: Tensor) -> Tensor:
        """Return scores of the weight's shape, higher = keep."""
        ...


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def hard_concrete(
    log_alpha: Tensor, uniform: Tensor | None = None, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1
) -> Tensor:
    """Return gates in [0, 1], many of them exactly 0 or 1. Runs in each forward.

    A binary concrete variable `s = sigmoid((log u - log(1 - u) + log_alpha) / beta)`, stretched to (gamma, zeta) and
    cut to [0, 1]. Without `uniform` the gate of evaluation: of `s = sigmoid(log_alpha)`. Louizos et al. 2018,
    "Learning Sparse Neural Networks through L0 Regularization", equations 10, 11 and 13.

    >>> hard_concrete(torch.tensor([-3.0, 0.0, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])
    >>> hard_concrete(torch.tensor([0.0, 0.0]), torch.tensor([0.1, 0.5]))
    tensor([0.0000, 0.5000])
    """
    logits = log_alpha
    if uniform is not None:
        logits = (torch.log(uniform) - torch.log1p(-uniform) + log_alpha) / beta
    return (torch.sigmoid(logits) * (zeta - gamma) + gamma).clamp(0.0, 1.0)


def expected_l0(log_alpha: Tensor, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1) -> Tensor:
    """Return each gate's probability of being open: `sigmoid(log_alpha - beta log(-gamma / zeta))`.

    Runs in each training step. Louizos et al. 2018, equation 12.

    >>> expected_l0(torch.tensor([-1.5986]))
    tensor([0.5000])
    """
    return torch.sigmoid(log_alpha - beta * math.log(-gamma / zeta))


@dataclass(frozen=True)
class HardConcrete:
    """L0 regularization: each weight is multiplied by a random gate whose probability of being open is learned.

    The penalty is the expected number of open gates. Louizos et al. 2018, "Learning Sparse Neural Networks through L0
    Regularization", section 2.2.

    Args:
        learning_rate: of log alpha.
        initial_probability: of `sigmoid(log_alpha)` at the begin; above 11/12 nothing is taken from a trained model.
        beta: temperature.
        gamma: lower end of the stretched interval, below 0.
        zeta: upper end, above 1.
        seed: of the noise, which depends on it, on the weight's name and on the optimizer step alone.

    Raises:
        ValueError: an option out of its range.
    """

    learning_rate: float = 0.1
    initial_probability: float = 0.95
    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        fits = self.learning_rate > 0.0 and 0.0 < self.initial_probability < 1.0
        if not (fits and self.beta > 0.0 and self.gamma < 0.0 and self.zeta > 1.0):
            raise ValueError(
                f"{self} needs learning_rate > 0, initial_probability in (0, 1), beta > 0, gamma < 0 and zeta > 1"
            )

    def initial(self, weight: Tensor) -> Tensor:
        """Return log alpha of the initial probability, one a weight."""
        odds = self.initial_probability / (1.0 - self.initial_probability)
        return torch.full_like(weight, math.log(odds), dtype=_wide(weight), requires_grad=False)

    def noise(self, parameter: Tensor, name: str, step: int) -> Tensor:
        """Return uniform noise of the parameter's shape."""
        seed = zlib.crc32(f"{self.seed} {name} {step}".encode())
        generator = torch.Generator(parameter.device).manual_seed(seed)
        drawn = torch.rand(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
        return drawn.clamp_(EDGE, 1.0 - EDGE)

    def __call__(self, weight: Tensor, parameter: Tensor, noise: Tensor | None) -> Tensor:
        """Return the weight times its gates."""
        gates = hard_concrete(parameter, noise, self.beta, self.gamma, self.zeta)
        return weight * gates.to(weight.dtype)

    def penalty(self, parameter: Tensor) -> Tensor:
        """Return the expected number of open gates."""
        return expected_l0(parameter, self.beta, self.gamma, self.zeta).sum()

    def scores(self, weight: Tensor, parameter: Tensor) -> Tensor:
        """Return |w| times `sigmoid(log_alpha)`: among gates that are wide open the weights decide."""
        return weight.abs().to(_wide(weight)) * torch.sigmoid(parameter)


def soft_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    """Return `sign(w) relu(|w| - threshold)`. Runs in each forward.

    Kusupati et al. 2020, "Soft Threshold Weight Reparameterization for Learnable Sparsity", equation 1.

    >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), torch.tensor(1.0))
    tensor([-2.,  0.,  1.])
    """
    return torch.sign(weight) * torch.relu(weight.abs() - threshold)


@dataclass(frozen=True)
class SoftThreshold:
    """STR: each layer learns one threshold `sigmoid(s)`; what is below is out, what is above loses as much.

    The penalty is weight decay on s, `s^2 / 2`: it pulls the threshold up towards 1/2. Kusupati et al. 2020, "Soft
    Threshold Weight Reparameterization for Learnable Sparsity", equations 1, 3 and 4.

    Args:
        learning_rate: of s.
        initial_share: the first threshold, as a share of the layer's mean |w|; above 0.

    Raises:
        ValueError: an option that is not positive.
    """

    learning_rate: float = 0.05
    initial_share: float = 0.01

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0.0 and self.initial_share > 0.0):
            raise ValueError(f"{self} needs learning_rate > 0 and initial_share > 0")

    def initial(self, weight: Tensor) -> Tensor:
        """Return s of the first threshold, one for the layer."""
        threshold = weight.detach().to(_wide(weight)).abs().mean() * self.initial_share
        return torch.logit(threshold.clamp(1e-12, 0.5))

    def noise(self, parameter: Tensor, name: str, step: int) -> None:
        """Return None."""
        return

    def __call__(self, weight: Tensor, parameter: Tensor, noise: Tensor | None) -> Tensor:
        """Return the weight beyond its threshold."""
        return soft_threshold(weight, torch.sigmoid(parameter).to(weight.dtype))

    def penalty(self, parameter: Tensor) -> Tensor:
        """Return half the square of s."""
        return parameter.square().sum() / 2

    def scores(self, weight: Tensor, parameter: Tensor) -> Tensor:
        """Return |w| less the threshold."""
        return weight.abs().to(_wide(weight)) - torch.sigmoid(parameter)


def straight_through_mask(scores: Tensor, threshold: float = 0.0) -> Tensor:
    """Return 1 where a score is above the threshold and 0 elsewhere, with the gradient 1. Runs in each forward.

    Sanh et al. 2020, "Movement Pruning", section 4; Bengio et al. 2013 for the gradient.

    >>> straight_through_mask(torch.tensor([-0.5, 0.5]))
    tensor([0., 1.])
    """
    mask = (scores > threshold).to(scores.dtype)
    return mask + (scores - scores.detach())


@dataclass(frozen=True)
class SoftMovement:
    """Soft movement pruning: each weight has a score that grows while the weight moves away from 0.

    What scores at most `threshold` is out, but keeps learning its score and may come back. The penalty is the mean of
    `sigmoid(score)` over the layer. Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", section 4.

    Args:
        learning_rate: of the scores.
        threshold: a score above it lets the weight through.
        initial_score: that all begin with.

    Raises:
        ValueError: a learning rate that is not positive, or an initial score that shuts everything.
    """

    learning_rate: float = 0.02
    threshold: float = 0.0
    initial_score: float = 0.5

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0.0 and self.initial_score > self.threshold):
            raise ValueError(f"{self} needs learning_rate > 0 and initial_score > threshold")

    def initial(self, weight: Tensor) -> Tensor:
        """Return the initial score, one a weight."""
        return torch.full_like(weight, self.initial_score, dtype=_wide(weight), requires_grad=False)

    def noise(self, parameter: Tensor, name: str, step: int) -> None:
        """Return None."""
        return

    def __call__(self, weight: Tensor, parameter: Tensor, noise: Tensor | None) -> Tensor:
        """Return the weights whose scores are above the threshold."""
        return weight * straight_through_mask(parameter, self.threshold).to(weight.dtype)

    def penalty(self, parameter: Tensor) -> Tensor:
        """Return the mean of `sigmoid(score)`."""
        return torch.sigmoid(parameter).mean()

    def scores(self, weight: Tensor, parameter: Tensor) -> Tensor:
        """Return the scores."""
        return parameter
