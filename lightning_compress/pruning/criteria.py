"""Criteria: functions to scores of a weight's shape, higher = keep; their parameters' names say what they need.

A parameter is filled in by its name: `weight`, its `name`, the optimizer `step` of the update, or something gathered
in training (`pruning.statistics`): `gradient`, `squared_gradient`, `movement`, `input_norm`, `activation`,
`positive_share`. A user's function with such parameters is a criterion like these. Patterns of groups (rows, blocks)
take the mean of their members' scores.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

__all__ = [
    "active_share",
    "fisher",
    "geometric_median",
    "gradient_magnitude",
    "magnitude",
    "mean_activation",
    "movement",
    "random",
    "snip",
    "squared_magnitude",
    "taylor",
    "wanda",
]


def magnitude(weight: Tensor) -> Tensor:
    """Score each weight by |w|; the mean over a group is its L1 norm, by size. Runs at each mask update.

    Han et al. 2015, "Learning both Weights and Connections", section 3; Zhu & Gupta 2017, section 3.

    >>> magnitude(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return weight.detach().abs()


def squared_magnitude(weight: Tensor) -> Tensor:
    """Score each weight by w^2; the mean over a group is its squared L2 norm, by size. Runs at each mask update.

    For single weights the order is that of `magnitude`. Wen et al. 2016, "Learning Structured Sparsity", section 3.

    >>> squared_magnitude(torch.tensor([-2.0, 0.5]))
    tensor([4.0000, 0.2500])
    """
    return weight.detach().square()


def random(weight: Tensor, name: str) -> Tensor:
    """Score each weight by a number in [0, 1) fixed by its layer's name and its position: the baseline to beat.

    The same numbers come back at each update, on each process and after a resume. Gale et al. 2019, section 3.

    >>> torch.equal(random(torch.zeros(3), "a"), random(torch.ones(3), "a"))
    True
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    scores = torch.rand(weight.shape, generator=generator)
    return scores.to(weight.device)


def gradient_magnitude(gradient: Tensor) -> Tensor:
    """Score each weight by |g| of its mean gradient since the last update.

    What RigL grows by: Evci et al. 2020, "Rigging the Lottery", section 3 (4).

    >>> gradient_magnitude(torch.tensor([-2.0, 0.5]))
    tensor([2.0000, 0.5000])
    """
    return gradient.abs()


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """Score each weight by |w g|, the first-order change of the loss without it; g is the mean since the last update.

    Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference", equation 5.

    >>> taylor(torch.tensor([-2.0, 0.5]), torch.tensor([0.1, 1.0]))
    tensor([0.2000, 0.5000])
    """
    return (weight.detach() * gradient).abs()


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """Score each connection by |w g|, once, before training: `GradualPruning(Constant(0.9), (1, 2), criterion=snip)`.

    Lee et al. 2019, "SNIP", equation 4, without its normalization over all weights, which changes no order.

    >>> snip(torch.tensor([-2.0, 0.5]), torch.tensor([0.1, 1.0]))
    tensor([0.2000, 0.5000])
    """
    return (weight.detach() * gradient).abs()


def movement(movement: Tensor) -> Tensor:
    """Score each weight by the sum of -w g over all steps: kept are weights that training moves away from zero.

    Weights that are out keep their last value and go on being scored with it, so that they may come back.
    Sanh, Wolf & Rush 2020, "Movement Pruning", equation 3 (the learning rate of the scores changes no order).

    >>> movement(torch.tensor([-2.0, 0.5]))
    tensor([-2.0000,  0.5000])
    """
    return movement


def fisher(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """Score each weight by w^2 F / 2, with F the mean squared gradient of the batches since the last update.

    Optimal Brain Damage (LeCun et al. 1990, equation 5) with the empirical Fisher's diagonal for the Hessian's
    (Theis et al. 2018, equation 9). F is of batch gradients, not of single examples.

    >>> fisher(torch.tensor([-2.0, 1.0]), torch.tensor([1.0, 4.0]))
    tensor([2., 2.])
    """
    return weight.detach().square() * squared_gradient / 2


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Score each weight by |w| times the norm of the input that it multiplies, over the batches since the last update.

    Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", equation 1; the norm is by
    the number of inputs, which makes layers comparable. The paper's comparison group is an output: scope `by_output`.

    >>> wanda(torch.tensor([[-2.0, 1.0]]), torch.tensor([[1.0, 3.0]]))
    tensor([[2., 3.]])
    """
    return weight.detach().abs() * input_norm


def mean_activation(weight: Tensor, activation: Tensor) -> Tensor:
    """Score an output channel, and so each of its weights, by its mean |output|. For the pattern `Rows`.

    Molchanov et al. 2017, section 2.2, "Activation".

    >>> mean_activation(torch.zeros(2, 2), torch.tensor([[1.0], [3.0]]))
    tensor([[1., 1.],
            [3., 3.]])
    """
    return activation.expand(weight.shape)


def active_share(weight: Tensor, positive_share: Tensor) -> Tensor:
    """Score an output channel by how often a ReLU right after the layer would let it through: 1 - APoZ. For `Rows`.

    Hu et al. 2016, "Network Trimming", equation 1 (the average percentage of zeros). With a norm between layer and
    ReLU it is the sign before the norm that counts.

    >>> active_share(torch.zeros(2, 2), torch.tensor([[0.5], [1.0]]))
    tensor([[0.5000, 0.5000],
            [1.0000, 1.0000]])
    """
    return positive_share.expand(weight.shape)


def geometric_median(weight: Tensor) -> Tensor:
    """Score an output channel by its summed distance to the others: the most replaceable one goes. For `Rows`.

    He et al. 2019, "Filter Pruning via Geometric Median" (FPGM), equation 6. Channels are rows of dimension 0.

    >>> geometric_median(torch.tensor([[0.0], [1.0], [5.0]]))[:, 0]
    tensor([6., 5., 9.])
    """
    rows = weight.detach().flatten(1).float()
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
    return distances.view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape)
