"""Input grids against ATen's fake-quantize operators and numpy by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.quantization.fake import fake_quantize_input
from lightning_compress.quantization.inputs import Affine, PerToken
from lightning_compress.quantization.scales import input_grid

LOW, HIGH = torch.tensor(-1.0), torch.tensor(2.0)


@pytest.mark.parametrize("bits", [2, 8])
def test_affine_is_the_formula_with_its_gradient(bits: int) -> None:
    value = (torch.randn(200) * 3).requires_grad_()
    grid = Affine(bits)
    scale, zero_point = grid.affine(LOW, HIGH, {})
    assert (scale, zero_point) == input_grid(LOW, HIGH, bits)
    got, want = grid.rounded(value, LOW, HIGH, {}), fake_quantize_input(value, scale, zero_point, bits)
    assert torch.equal(got, want)
    ours, theirs = torch.autograd.grad(got.sum(), value), torch.autograd.grad(want.sum(), value)
    assert torch.equal(ours[0], theirs[0])
    assert grid.learned(LOW, HIGH) == {}


def away_from_ties(position: torch.Tensor) -> torch.Tensor:
    return ((position - position.floor()) - 0.5).abs() > 1e-4


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_token_is_atens_per_channel_of_its_rows(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    value = torch.randn(3, 7, 32) * torch.logspace(-3, 3, 7).view(1, 7, 1)
    rows = value.view(21, 32)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale, zero, least = rows.abs().amax(1) / top, torch.zeros(21, dtype=torch.int32), -top
    else:
        low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
        top, least = 2**bits - 1, 0
        scale = (high - low) / top
        zero = (-low / scale).round().to(torch.int32)
    want = torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, least, top)
    got = PerToken(bits, symmetric).rounded(value, LOW, HIGH, {}).view(21, 32)
    certain = away_from_ties(rows.double() / scale.double().unsqueeze(1))
    assert certain.float().mean() > 0.98
    torch.testing.assert_close(got[certain], want[certain], rtol=1e-6, atol=0)


@given(st.integers(2, 8), st.integers(0, 2**31), st.floats(1e-5, 1e5))
def test_per_token_by_hand_clips_nothing(bits: int, seed: int, size: float) -> None:
    value = np.random.default_rng(seed).standard_normal((4, 9)).astype(np.float32) * np.float32(size)
    value[1] = 0.0
    got = PerToken(bits).rounded(torch.from_numpy(value), LOW, HIGH, {}).numpy()
    for row, ours in zip(value, got, strict=True):
        step = np.abs(row).max() / np.float32(2 ** (bits - 1) - 1)
        assert np.all(np.abs(ours - row) <= step * np.float32(0.5001))
        assert np.all(ours[row == 0] == 0)


def test_per_token_keeps_dtype_and_shape_and_passes_the_gradient() -> None:
    value = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    got = PerToken(4).rounded(value, LOW, HIGH, {})
    assert (got.dtype, got.shape) == (torch.bfloat16, value.shape)
    upstream = torch.randn_like(value)
    got.backward(upstream)
    assert torch.equal(value.grad, upstream)
    assert PerToken().rounded(torch.empty(0, 3), LOW, HIGH, {}).shape == (0, 3)
    assert PerToken().affine(LOW, HIGH, {}) is None
    assert PerToken().learned(LOW, HIGH) == {}


@pytest.mark.parametrize("grid", [Affine, PerToken])
@pytest.mark.parametrize("bits", [0, 1, 9, 2.0, True])
def test_bits_out_of_range_are_named(grid: type, bits: object) -> None:
    with pytest.raises(ValueError, match="2 to 8, got"):
        grid(bits)


def test_equal_by_value_and_printed_as_a_recipe() -> None:
    assert PerToken(4) == PerToken(bits=4, symmetric=True) != PerToken(4, False)
    assert repr(Affine(4)) == "Affine(bits=4)"
