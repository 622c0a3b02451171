"""Integers of one layer as a kernel reads them: weight codes, their scales, and a bias on the products' grid."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.quantization.grid import SMALLEST_SCALE, integer_weight

__all__ = ["bias_scale", "integer_layer"]

# A kernel adds bias and products in one int32: half of it is left to the products, some 33 000 of them at worst.
LARGEST_BIAS_CODE = 2**30
# A channel without weights may have any scale; this one keeps 20 bits of its bias, where scale 1 may keep none.
EMPTY_CHANNEL_BIAS_CODE = 2**20


def integer_layer(
    weight: Tensor, bias: Tensor | None, input_scale: float, bits: int = 8
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return weight codes, their scales and bias codes of one layer. Runs once a layer, at export.

    The bias has scale s_x * s_w (Jacob et al. 2018, equation 11), so a channel's weight scale also decides how well its
    bias is kept, and what is lost of it is nearly all that the file differs from training. Hence: codes of fewer than
    8 bits are multiplied up to 8, with the scale divided, which makes the bias' grid as much finer; a channel without
    weights takes a scale that suits its bias; and where the bias would saturate int32, the scale is widened, because
    such weights matter less than the bias' own rounding. Zero weights have code zero in every case.

    Args:
        weight: (out, ...), floating point, batch norm folded in.
        bias: (out,) or None.
        input_scale: step of the input's grid.
        bits: width of the weight's code, sign included; at most 8.

    Returns:
        Codes (out, ...) int8 with zero point 0, scales (out,) float32, bias codes (out,) int32 or None.

    >>> integer_layer(torch.tensor([[1.27, -0.5]]), torch.tensor([0.5]), 0.1)
    (tensor([[127, -50]], dtype=torch.int8), tensor([0.0100]), tensor([500], dtype=torch.int32))
    """
    codes, scale = integer_weight(weight, bits)
    codes, scale = codes * 2 ** (8 - bits), scale / 2 ** (8 - bits)
    if bias is None:
        return codes, scale, None
    size = bias.double().abs() / input_scale
    empty = (weight.flatten(1).count_nonzero(1) == 0) & (size > 0)
    scale = torch.where(empty, (size / EMPTY_CHANNEL_BIAS_CODE).float().clamp_min(SMALLEST_SCALE), scale)
    least = (size / LARGEST_BIAS_CODE).float()
    for channel in (least > scale).nonzero().flatten().tolist():
        codes[channel] = (codes[channel] * (scale[channel] / least[channel])).round().to(torch.int8)
        scale[channel] = least[channel]
    bias_codes = (bias.double() / bias_scale(input_scale, scale).double()).round().to(torch.int32)
    return codes, scale, bias_codes


def bias_scale(input_scale: float, weight_scale: Tensor) -> Tensor:
    """Return s_x * s_w, (out,) float32, multiplied as the runtime does."""
    return torch.tensor(input_scale, dtype=torch.float32) * weight_scale
