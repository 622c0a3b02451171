"""Grids hold zero exactly, reach both ends of the range, and give an exporter the codes that training used."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.quantization.fake import fake_quantize_input_eager, round_weight
from lightning_compress.quantization.grid import Range, check_bits, input_grid, integer_weight, weight_scale

quick = settings(max_examples=60, deadline=None)
bits = st.integers(2, 8)
numbers = st.floats(-1e6, 1e6, width=32)


@quick
@given(st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=5), bits)
def test_weight_scale_is_the_largest_magnitude_over_the_largest_code(rows, bits):
    weight = torch.tensor(rows)
    largest = np.abs(np.array(rows, dtype=np.float32)).max(axis=1)
    expected = np.where(largest > 0, np.maximum(largest / np.float32(2 ** (bits - 1) - 1), np.float32(1e-10)), 1)
    np.testing.assert_array_equal(weight_scale(weight, bits).numpy(), expected.astype(np.float32))


def test_weight_scale_reads_any_rank_and_dtype_and_answers_in_float32():
    weight = torch.randn(4, 3, 2, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        scale = weight_scale(weight.to(dtype))
        assert scale.shape == (4,)
        assert scale.dtype == torch.float32
        assert torch.equal(scale, weight.to(dtype).float().abs().amax((1, 2, 3)) / 127)


@quick
@given(numbers, numbers, bits)
def test_zero_is_on_the_input_grid_and_the_ends_are_within_half_a_step(low, high, bits):
    low, high = min(low, high), max(low, high)
    scale, zero_point = input_grid(torch.tensor(low), torch.tensor(high), bits)
    assert zero_point == zero_point.round()
    assert 0 <= zero_point <= 2**bits - 1
    assert scale > 0
    assert fake_quantize_input_eager(torch.zeros(1), scale, zero_point, bits).item() == 0.0
    if max(high, -low) < 1e-3:  # a denormal range is widened to the smallest step
        return
    lowest, highest = float(-zero_point * scale), float((2**bits - 1 - zero_point) * scale)
    assert lowest <= min(low, 0.0) + 0.501 * float(scale)
    assert highest >= max(high, 0.0) - 0.501 * float(scale)


def test_a_range_that_saw_nothing_but_zero_is_harmless():
    scale, zero_point = input_grid(torch.tensor(0.0), torch.tensor(0.0))
    assert zero_point == 0
    rounded = fake_quantize_input_eager(torch.tensor([-1.0, 0.0, 1.0]), scale, zero_point)
    assert rounded.isfinite().all()
    assert rounded.abs().max() < 1e-6


def test_grids_of_many_layers_at_once_are_those_of_each():
    low, high = -torch.rand(7), torch.rand(7)
    scale, zero_point = input_grid(low, high)
    for index in range(7):
        one = input_grid(low[index], high[index])
        assert (scale[index], zero_point[index]) == one


@quick
@given(st.integers(0, 10**6), bits)
def test_integer_weight_holds_the_codes_of_the_rounded_weight(seed, bits):
    weight = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(seed)) * 0.1
    weight[2] = 0.0
    codes, scale = integer_weight(weight, bits)
    assert codes.dtype == torch.int8
    assert codes.abs().max() == 2 ** (bits - 1) - 1
    assert torch.equal(codes.float() * scale.view(-1, 1, 1), round_weight(weight, bits))


def test_range_computes_its_grid_as_training_does():
    trained = Range(low=-1.0, high=1.55)
    assert (trained.scale, trained.zero_point) == (float(torch.tensor(2.55) / 255), 100)
    assert Range(0.3, 3.0, bits=4).scale == float(torch.tensor(3.0) / 15)
    assert Range(0.3, 3.0).zero_point == 0
    assert Range(-3.0, -0.3).zero_point == 255
    with pytest.raises(dataclasses.FrozenInstanceError):
        trained.low = 0.0  # type: ignore[misc]


@pytest.mark.parametrize("value", [2, 3, 8])
def test_widths_from_two_to_eight(value):
    assert check_bits(value) == value


@pytest.mark.parametrize("value", [0, 1, 9, 16, 8.0, True, None, "8"])
def test_another_width_is_named(value):
    with pytest.raises(ValueError, match="whole number from 2 to 8, got"):
        check_bits(value)
