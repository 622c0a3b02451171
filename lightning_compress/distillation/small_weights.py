"""A teacher's weights as int8 codes: a quarter of float32's memory, in floating point again while they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_compress.errors import CompressError, NothingToCompress
from lightning_compress.quantization.weight_only import group_codes

__all__ = ["Restored", "shrink_weights", "weight_bytes"]

SMALL = 8  # bits
MATRIX = 2


class Restored(nn.Module):
    """Gives codes back as a weight: codes times the scale of their row. Runs whenever the weight is read.

    Args:
        scale: (rows,) floating point; its dtype is the weight's.
    """

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, codes: Tensor) -> Tensor:
        """Return (rows, ...) of the scale's dtype."""
        return codes.to(self.scale.dtype) * self.scale.view(-1, *[1] * (codes.dim() - 1))


def shrink_weights(module: nn.Module) -> nn.Module:
    """Replace each weight of two dimensions or more by int8 codes with a scale for each row, in place; return it.

    Runs once, when a teacher is put to work. Each weight is rounded to nearest on a symmetric grid up to its row's
    largest magnitude, so it moves by half a step at most: max |row| / 254. Biases and norms stay. A weight that several
    modules share becomes several.

    Raises:
        NothingToCompress: it has no such weight.
        CompressError: NaN or infinite weights.

    >>> layer = shrink_weights(nn.Linear(100, 100, bias=False))
    >>> weight_bytes(layer)
    10400
    """
    found = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.dim() >= MATRIX and parameter.is_floating_point()
    ]
    if not found:
        raise NothingToCompress(
            f"expected a teacher with weights of two dimensions for precision='int8', got {type(module).__name__} "
            f"without any; leave precision out"
        )
    for part, name, parameter in found:
        if not bool(torch.isfinite(parameter).all()):
            raise CompressError(f"expected finite weights, got NaN or infinity in '{name}' of {type(part).__name__}")
        codes, scale = group_codes(parameter.detach().flatten(1), SMALL, None)
        small = nn.Parameter(codes.view(parameter.shape), requires_grad=False)
        restored = Restored(scale.flatten().to(parameter.dtype))
        part.register_parameter(name, small)
        parametrize.register_parametrization(part, name, restored, unsafe=True)  # another dtype
    return module


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers on this process, each once.

    >>> weight_bytes(nn.Linear(4, 2))
    40
    """
    tensors = {id(value): value for value in (*module.parameters(), *module.buffers())}
    return sum(value.numel() * value.element_size() for value in tensors.values())
