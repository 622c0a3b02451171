"""Integers of one layer as a kernel reads them: weight codes, their scales, and a bias on the products' grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_compress.quantization.grid import FLOAT_BITS, SMALLEST_SCALE, Range, integer_weight

__all__ = ["bias_scale", "check_grids", "check_rows", "folded_codes", "integer_layer", "layer_codes", "scaled_codes"]

# A kernel adds bias and products in one int32: half of it is left to the products, some 33 000 of them at worst.
LARGEST_BIAS_CODE = 2**30
# A channel without weights may have any scale; this one keeps 20 bits of its bias, where scale 1 may keep none.
EMPTY_CHANNEL_BIAS_CODE = 2**20
FOLDING_TOLERANCE = 1e-4  # of a channel's largest weight; exporters fold in float32


def check_grids(name: str, layer: nn.Module, trained: Range) -> None:
    """Raise unless an integer file can hold what a layer was trained with. Runs once a layer, before anything is made.

    Raises:
        ValueError: the input has no affine grid of 2 to 8 bits, or the weight no code of 8 bits with one scale for each
            output channel.
    """
    bits = trained.bits
    if not 2 <= bits <= 8:
        got = "an input that stays in floating point" if bits == FLOAT_BITS else f"{bits} ({trained.inputs})"
        raise ValueError(
            f"an int8 file holds inputs of 2 to 8 bits, got {got} for '{name}'; train it with inputs=8, or leave "
            f"'{name}' out of ranges"
        )
    grid = trained.input_grid
    if grid and not grid.affine(torch.tensor(trained.low), torch.tensor(trained.high), trained.inputs_learned):
        raise ValueError(
            f"an int8 file rounds inputs on one affine grid a tensor, got {grid} for '{name}'; train it with inputs=8 "
            f"or another grid that has a scale and a zero point, or leave '{name}' out of ranges"
        )
    weights = trained.weights
    if weights is None and not 2 <= trained.weight_bits <= 8:
        raise ValueError(f"an int8 file holds weights of 2 to 8 bits, got {trained.weight_bits} for '{name}'")
    if weights is not None and trained.codes(layer.get_parameter("weight").detach().cpu()) is None:
        raise ValueError(
            f"an int8 file holds weights as whole numbers with one scale for each output channel, got {weights} for "
            f"'{name}', which has no such form; train it with weights=8, or leave '{name}' out of ranges"
        )


def check_rows(name: str, layer: nn.Module, trained: Range) -> None:
    """Raise unless an embedding's weight has codes of 8 bits with one scale for each row. Runs once an embedding.

    Raises:
        ValueError: its grid has none.
    """
    if trained.codes(layer.get_parameter("weight").detach().cpu()) is None:
        raise ValueError(
            f"an int8 file holds the rows of an embedding as whole numbers with a scale each, got "
            f"{trained.weight_grid} for '{name}', which has no such form; train it with weights=8, or leave '{name}' "
            f"out of ranges"
        )


def scaled_codes(codes: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales of factor * weight: codes change sign at most. Runs where a batch norm is folded in.

    The one code that has no opposite in int8, -128, becomes 127: an error of one step. Symmetric grids have none.

    Args:
        codes: (out, ...) int8.
        scale: (out,) float32.
        factor: (out,) floating point, of either sign; 0 gives codes 0 and scale 1.

    >>> scaled_codes(torch.tensor([[3], [3]], dtype=torch.int8), torch.tensor([0.5, 0.5]), torch.tensor([-2.0, 0.0]))
    (tensor([[-3],
            [ 0]], dtype=torch.int8), tensor([1., 1.]))
    """
    signs = factor.sign().to(torch.int16).view(-1, *[1] * (codes.dim() - 1))
    signed = (codes.to(torch.int16) * signs).clamp(-128, 127).to(torch.int8)
    return signed, torch.where(factor == 0, 1.0, scale * factor.abs())


def layer_codes(weight: Tensor, trained: Range) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a layer's own weight, on the weight's device. Runs once a layer, at export.

    Raises:
        ValueError: the grid has none.
    """
    found = trained.codes(weight.detach().cpu())
    if found is None:
        raise ValueError(f"{trained.weights} has no codes of 8 bits with one scale for each output channel")
    return found[0].to(weight.device), found[1].to(weight.device)


def folded_codes(name: str, folded: Tensor, weight: Tensor, trained: Range) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a layer's weight as a graph holds it: a batch norm's factor on each output channel.

    The default grid's codes follow from the folded weight itself. Any other grid rounds the weight that was trained,
    and the factors are found from the two weights.

    Args:
        name: the layer's, for errors.
        folded: (out, ...) float32; it may have further input channels, all zero.
        weight: (out, ...), the layer's.
        trained: the layer's.

    Raises:
        ValueError: the grid has no codes, or the graph's weight is another one, not the layer's with such factors.
    """
    if trained.weights is None:
        return integer_weight(folded, trained.weight_bits)
    weight = weight.detach().cpu()
    codes, scale = layer_codes(weight, trained)
    if folded.shape != weight.shape:
        missing = folded.shape[1] - weight.shape[1]
        codes, weight = (torch.nn.functional.pad(each, [0, 0] * (weight.dim() - 2) + [0, missing])
                         for each in (codes, weight))  # fmt: skip
    new, old = folded.double().flatten(1), weight.double().flatten(1)
    power = old.square().sum(1)
    factor = torch.where(power > 0, (new * old).sum(1) / power, 1.0)
    error = (new - factor[:, None] * old).abs().amax(1)
    if bool((error > FOLDING_TOLERANCE * new.abs().amax(1)).any()):
        raise ValueError(
            f"{trained.weights} rounds the weight of '{name}', but the graph has another one, which is not that weight "
            f"times a factor for each output channel; train '{name}' with weights=8, or leave it out of ranges"
        )
    return scaled_codes(codes, scale, factor.float())


def integer_layer(
    codes: Tensor, scale: Tensor, bias: Tensor | None, input_scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return weight codes, their scales and bias codes of one layer. Runs once a layer, at export.

    The bias has scale s_x * s_w (Jacob et al. 2018, equation 11), so a channel's weight scale also decides how well its
    bias is kept, and what is lost of it is nearly all that the file differs from training. Hence: codes that need fewer
    than 8 bits are multiplied up to 8 by a power of two, with the scale divided, which makes the bias' grid as much
    finer; a channel without weights takes a scale that suits its bias; and where the bias would saturate int32, the
    scale is widened, because such weights matter less than the bias' own rounding. Code zero stays zero in every case.

    Args:
        codes: (out, ...) int8, zero point 0, batch norm folded in.
        scale: (out,) float32, positive.
        bias: (out,) or None.
        input_scale: step of the input's grid.

    Returns:
        Codes (out, ...) int8 with zero point 0, scales (out,) float32, bias codes (out,) int32 or None.

    >>> integer_layer(torch.tensor([[127, -50]], dtype=torch.int8), torch.tensor([0.01]), torch.tensor([0.5]), 0.1)
    (tensor([[127, -50]], dtype=torch.int8), tensor([0.0100]), tensor([500], dtype=torch.int32))
    """
    factor = _room(codes)
    codes, scale = codes * factor, scale / factor
    if bias is None:
        return codes, scale, None
    size = bias.double().abs() / input_scale
    empty = (codes.flatten(1).count_nonzero(1) == 0) & (size > 0)
    scale = torch.where(empty, (size / EMPTY_CHANNEL_BIAS_CODE).float().clamp_min(SMALLEST_SCALE), scale)
    least = (size / LARGEST_BIAS_CODE).float()
    for channel in (least > scale).nonzero().flatten().tolist():
        codes[channel] = (codes[channel] * (scale[channel] / least[channel])).round().to(torch.int8)
        scale[channel] = least[channel]
    bias_codes = (bias.double() / bias_scale(input_scale, scale).double()).round().to(torch.int32)
    return codes, scale, bias_codes


def _room(codes: Tensor) -> int:
    """Return the largest power of two by which codes may be multiplied and still are int8; 1 for zeros."""
    low, high = (int(end) for end in torch.aminmax(codes)) if codes.numel() else (0, 0)
    factor = 1
    while (low or high) and low * factor * 2 >= -128 and high * factor * 2 <= 127:
        factor *= 2
    return factor


def bias_scale(input_scale: float, weight_scale: Tensor) -> Tensor:
    """Return s_x * s_w, (out,) float32, multiplied as the runtime does."""
    return torch.tensor(input_scale, dtype=torch.float32) * weight_scale
