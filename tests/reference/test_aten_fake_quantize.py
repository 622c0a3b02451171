"""Our grids against ATen's fake-quantize operators, which multiply by the reciprocal of the scale.

Values exactly between two grid points may therefore fall to either side there; everything else is equal.
"""

from __future__ import annotations

import pytest
import torch

from lightning_compress.quantization.fake import fake_quantize_input, fake_quantize_input_eager, fake_quantize_weight
from lightning_compress.quantization.grid import input_grid, weight_scale

FORMS = [fake_quantize_input, fake_quantize_input_eager]


def away_from_ties(position: torch.Tensor) -> torch.Tensor:
    """Tell where a value, in grid steps and double precision, is not within 1e-4 of the middle of two points."""
    return ((position - position.floor()) - 0.5).abs() > 1e-4


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(16, 50), (8, 3, 5, 5)], ids=str)
def test_weights_and_their_gradient(bits, shape):
    torch.manual_seed(bits)
    weight = torch.randn(shape)
    largest_code = 2 ** (bits - 1) - 1
    scale = weight_scale(weight, bits)
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    got = fake_quantize_weight(ours, bits)
    zero_points = torch.zeros(shape[0], dtype=torch.int32)
    want = torch.fake_quantize_per_channel_affine(theirs, scale, zero_points, 0, -largest_code, largest_code)
    sure = away_from_ties(weight.double() / scale.double().view(-1, *[1] * (weight.dim() - 1)))
    assert sure.float().mean() > 0.99
    assert torch.equal(got[sure], want[sure])
    upstream = torch.randn(shape)
    got.backward(upstream)
    want.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 6.0), (-0.17, 2.9), (-5.0, 0.0), (-3.0, -1.0)])
def test_inputs_and_their_gradient(form, bits, low, high):
    torch.manual_seed(0)
    value = torch.randn(5000) * 3
    scale, zero_point = input_grid(torch.tensor(low), torch.tensor(high), bits)
    ours, theirs = value.clone().requires_grad_(), value.clone().requires_grad_()
    got = form(ours, scale, zero_point, bits)
    want = torch.fake_quantize_per_tensor_affine(theirs, float(scale), int(zero_point), 0, 2**bits - 1)
    position = value.double() / scale.double()
    sure = away_from_ties(position)
    assert sure.float().mean() > 0.99
    assert torch.equal(got[sure], want[sure])
    got.sum().backward()
    want.sum().backward()
    # Our gradient ends 0.4999 of a step outside the grid, ATen's at the rounding's 0.5.
    assert torch.equal(ours.grad[sure], theirs.grad[sure])


def test_pruned_zeros_and_empty_channels_agree():
    weight = torch.randn(4, 9)
    weight[:, ::2] = 0.0
    weight[1] = 0.0
    want = torch.fake_quantize_per_channel_affine(
        weight, weight_scale(weight), torch.zeros(4, dtype=torch.int32), 0, -127, 127
    )
    assert torch.equal(fake_quantize_weight(weight), want)
    assert int((want == 0).sum()) >= int((weight == 0).sum())
