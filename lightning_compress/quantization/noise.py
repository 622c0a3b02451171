"""Noise that helps rounding to be learned: stochastic rounding, and rounding that is dropped at random (QDrop).

The noise depends on a seed, a name and the optimizer step alone, so that it is the same on each process that rounds the
same tensor, in a recomputation, and after a resume; on each device too, and within `torch.compile`.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_compress.quantization.slopes import column, straight, with_slopes

__all__ = ["Noise", "drop_rounding", "noise_keys", "round_at_random", "uniform_noise"]

GOLDEN = -1640531527  # 2^32 divided by the golden ratio, as an int32, as are the two of the hash
FIRST, SECOND = 2146121005, -2073254261


class HasGrids(Protocol):
    """The grids of one layer, of which noise asks what they are."""

    @property
    def weights(self) -> object:
        """The weight's grid."""
        ...

    @property
    def inputs(self) -> object | None:
        """The input's grid, if it has one."""
        ...


@dataclass(frozen=True)
class Noise:
    """Noise in training, from where rounding begins until ranges are frozen; evaluation and export round to nearest.

    Args:
        weights: round weights at random (`round_at_random`); they must be on grids of `Symmetric`.
        inputs: probability that an element of an input stays unrounded (`drop_rounding`), in [0, 1].
        seed: of the noise, which depends on it, the layer's name and the optimizer step alone.

    Raises:
        ValueError: a probability out of range.
    """

    weights: bool = False
    inputs: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.inputs <= 1.0:
            raise ValueError(f"inputs is the probability of dropping a rounding, in [0, 1], got {self.inputs!r}")
        object.__setattr__(self, "inputs", float(self.inputs))

    @property
    def some(self) -> bool:
        """Whether there is any."""
        return self.weights or self.inputs > 0.0

    def check(self, grids: Mapping[str, HasGrids]) -> None:
        """Raise if layers' grids have no place for this noise. Runs at `setup`.

        Raises:
            ValueError: a weight on another grid than `Symmetric`, with its name; no input that is rounded.
        """
        for name, each in grids.items():
            if self.weights and not hasattr(each.weights, "values_at_random"):
                raise ValueError(
                    f"'{name}' cannot be rounded at random: Noise(weights=True) needs a Symmetric grid, got "
                    f"{each.weights}; leave the noise out, or give the layer another grid in per_layer"
                )
        if self.inputs and all(each.inputs is None for each in grids.values()):
            raise ValueError(f"Noise(inputs={self.inputs}) drops roundings of inputs, but no input is rounded")


NO_NOISE = Noise()


def noise_keys(name: str, step: int, seed: int = 0) -> Tensor:
    """Return keys of the noise for a layer's weight and input in an optimizer step: (2,) int32. Runs once a step.

    >>> noise_keys("body.0", 7)
    tensor([  770771542, -1693033905], dtype=torch.int32)
    """
    codes = [zlib.crc32(f"{seed} {name}.{kind} {step}".encode()) for kind in ("weight", "input")]
    return torch.tensor(codes, dtype=torch.int64).sub_(1 << 31).int()


def uniform_noise(like: Tensor, key: Tensor) -> Tensor:
    """Return noise in [0, 1) of a tensor's shape, float32 on its device. Runs in each forward that needs it.

    A hash of each element's place and the key: the low-bias 32-bit integer hash of C. Wellons (2018, "Prospecting for
    Hash Functions"), the key entering before and within it.

    Args:
        like: any shape; its values are not read.
        key: () int32 on the tensor's device, of `noise_keys`.

    >>> key = noise_keys("body.0", 7)[0]
    >>> torch.equal(uniform_noise(torch.zeros(2, 3), key), uniform_noise(torch.ones(2, 3), key))
    True
    """
    bits = torch.arange(like.numel(), dtype=torch.int32, device=like.device).add_(key)
    bits = _mix(bits, 16).mul_(FIRST).add_(key * GOLDEN)
    bits = _mix(bits, 15).mul_(SECOND)
    # The upper 24 bits: as many as float32 tells apart in [0, 1).
    return (_mix(bits, 16) >> 8).bitwise_and_(0xFFFFFF).float().mul_(2.0**-24).view(like.shape)


def _mix(bits: Tensor, by: int) -> Tensor:
    # The shift brings the sign with it, which is masked out.
    return bits.bitwise_xor_((bits >> by).bitwise_and_((1 << (32 - by)) - 1))


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
