"""Noise that helps rounding to be learned: stochastic rounding, and rounding that is dropped at random (QDrop).

The noise depends on a seed, a name and the optimizer step alone, so that it is the same on each process that rounds the
same tensor, in a recomputation, and after a resume.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from lightning_compress.quantization.slopes import column, straight, with_slopes

__all__ = ["drop_rounding", "round_at_random", "uniform_noise"]


def uniform_noise(like: Tensor, name: str, step: int, seed: int = 0) -> Tensor:
    """Return noise in [0, 1) of a tensor's shape, float32 on its device. Runs once per optimizer step and tensor.

    >>> noise = uniform_noise(torch.zeros(2, 3), "body.0.weight", 7)
    >>> torch.equal(noise, uniform_noise(torch.ones(2, 3), "body.0.weight", 7))
    True
    """
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(f"{seed} {name} {step}".encode()))
    return torch.rand(like.shape, generator=generator, device=like.device)


def round_at_random(weight: Tensor, scale: Tensor, noise: Tensor, bits: int = 8) -> Tensor:
    """Round each weight up or down, up with the probability of its distance from below; straight-through gradient.

    So the mean over noise is the weight itself where it is not clipped: scale floor(w / scale + noise). Zeros stay.
    Gupta et al. 2015, "Deep Learning with Limited Numerical Precision" (stochastic rounding). Runs in each forward of
    training; evaluation rounds to nearest.

    Args:
        weight: (out, ...), floating point.
        scale: (out,) or () float32, such as `weight_scale(weight, bits)`.
        noise: of the weight's shape, in [0, 1).
        bits: width of the code, sign included; codes beyond +-(2^(bits-1) - 1) are clipped.

    Returns:
        Same shape and dtype as `weight`.

    >>> round_at_random(torch.tensor([[0.3, 0.3, 0.0]]), torch.tensor([1.0]), torch.tensor([[0.6, 0.8, 0.9]]))
    tensor([[0., 1., 0.]])
    """
    top = 2 ** (bits - 1) - 1

    def rounding(weight: Tensor) -> Tensor:
        size = column(scale, weight)
        codes = (weight.float() / size + noise).floor_().clamp_(-top, top)
        return codes.mul_(size).to(weight.dtype)

    return with_slopes(rounding, straight, weight)


def drop_rounding(value: Tensor, rounded: Tensor, noise: Tensor, probability: float = 0.5) -> Tensor:
    """Let each element stay unrounded with a probability. Runs in each forward of training, after a grid.

    The gradient goes to `value` where rounding was dropped and through `rounded` elsewhere. Wei et al. 2022, "QDrop:
    Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization".

    Args:
        value: any shape, what a grid was given.
        rounded: what it made of it, of the same shape and dtype.
        noise: of the same shape, in [0, 1).
        probability: of staying unrounded, in [0, 1]; 0 changes nothing.

    Raises:
        ValueError: a probability out of range.

    >>> drop_rounding(torch.tensor([0.4, 0.4]), torch.tensor([0.0, 0.0]), torch.tensor([0.1, 0.9]))
    tensor([0.4000, 0.0000])
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"the probability of dropping a rounding is in [0, 1], got {probability!r}")
    return torch.where(noise < probability, value, rounded)
