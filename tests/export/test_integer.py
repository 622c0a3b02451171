"""Integers of one layer: what a kernel would compute with them is what the layer computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.export.integer import bias_scale, integer_layer
from lightning_compress.quantization.grid import SMALLEST_SCALE, Range, integer_weight

magnitudes = st.sampled_from([0.0, 1e-9, 1e-4, 0.03, 1.0, 300.0])


@given(
    rows=st.lists(st.tuples(magnitudes, magnitudes, st.sampled_from([-1.0, 1.0])), min_size=1, max_size=6),
    input_scale=st.sampled_from([1e-6, 1e-3, 0.05, 4.0]),
    bits=st.integers(2, 8),
)
def test_every_layer_fits_its_integers(rows: list[tuple[float, float, float]], input_scale: float, bits: int) -> None:
    shape = torch.linspace(-1, 1, 5)
    shape[2] = 0
    weight = torch.stack([size * shape for size, _, _ in rows])
    bias = torch.tensor([size * sign for _, size, sign in rows])
    codes, scale, bias_codes = integer_layer(*integer_weight(weight, bits), bias, input_scale)
    assert codes.abs().max() <= 127
    grid = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    grid = torch.where(grid > 0, grid.clamp_min(SMALLEST_SCALE), grid)
    as_trained = torch.where(grid > 0, (weight / grid).round() * grid, torch.zeros(()))
    assert (codes[weight == 0] == 0).all()
    assert (scale > 0).all()
    error = (codes * scale[:, None] - as_trained).abs()  # none but where the bias widened the scale
    assert (error <= torch.where(bias.abs() / input_scale > 2**29 * scale, scale, 1e-5 * grid[:, 0])[:, None]).all()
    assert bias_codes.abs().max() <= 2**30 + 1024  # float32 scales: 2^30 to 20 bits or so
    step = bias_scale(input_scale, scale).double()
    error = (bias_codes.double() * step - bias.double()).abs()
    assert (error <= 0.5001 * step + bias.abs() * 1e-6).all()


def test_plain_layers_have_the_grids_codes() -> None:
    weight, bias = torch.randn(6, 3, 3, 3), torch.randn(6)
    codes, scale, _ = integer_layer(*integer_weight(weight), bias, 0.02)
    expected, expected_scale = integer_weight(weight)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


def test_a_bias_that_would_saturate_widens_its_channel_alone() -> None:
    weight, bias = torch.full((2, 4), 0.5), torch.tensor([0.1, 3.0])
    weight[1] = 1e-9
    input_scale = 1e-3
    plain = 3.0 / (input_scale * 1e-9 / 127)
    assert plain > 2**31
    codes, scale, bias_codes = integer_layer(*integer_weight(weight), bias, input_scale)
    assert scale[0] == pytest.approx(0.5 / 127)
    assert scale[1] == pytest.approx(3.0 / (2**30 * input_scale))
    assert codes[1].abs().max() <= 1
    kept = bias_codes.double() * bias_scale(input_scale, scale)
    torch.testing.assert_close(kept, bias.double(), rtol=1e-5, atol=1e-6)


def test_an_empty_channel_keeps_its_bias() -> None:
    codes, scale, bias_codes = integer_layer(*integer_weight(torch.zeros(3, 4)), torch.tensor([0.34, -7.0, 0.0]), 0.1)
    assert codes.count_nonzero() == 0
    kept = bias_codes.double() * bias_scale(0.1, scale)
    torch.testing.assert_close(kept, torch.tensor([0.34, -7.0, 0.0]).double(), rtol=1e-5, atol=0)


def test_integer_arithmetic_by_hand_is_the_fake_quantized_layer() -> None:
    layer, value = torch.nn.Linear(20, 6), torch.randn(50, 20)
    trained = Range(value.min().item(), value.max().item())
    codes, scale, bias_codes = integer_layer(*integer_weight(layer.weight), layer.bias.detach(), trained.scale)
    codes_in = ((value / trained.scale).round() + trained.zero_point).clamp(0, 255).long() - trained.zero_point
    sums = codes_in @ codes.long().T + bias_codes.long()
    by_hand = sums * bias_scale(trained.scale, scale)
    reference = torch.fake_quantize_per_tensor_affine(value, trained.scale, trained.zero_point, 0, 255)
    rounded = torch.fake_quantize_per_channel_affine(layer.weight, scale, torch.zeros(6).int(), 0, -128, 127)
    torch.testing.assert_close(by_hand, reference @ rounded.T + layer.bias, rtol=0, atol=1e-4)
