"""Fake-quantization: values on the grid, gradients straight through, and one result for all its forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.quantization.fake import (
    compiled_functions,
    compiler_available,
    fake_quantize_input,
    fake_quantize_input_eager,
    fake_quantize_weight,
    round_weight,
    straight_through,
)
from lightning_compress.quantization.grid import input_grid, weight_scale

quick = settings(max_examples=60, deadline=None)
INPUT_FORMS = {"formula": fake_quantize_input, "eager": fake_quantize_input_eager}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CPU = torch.device("cpu")


@st.composite
def inputs(draw):
    """A range, a width, and values inside, outside and exactly between the grid's points."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    bits = draw(st.integers(2, 8))
    low, high = sorted((draw(st.floats(-50, 50, width=32)), draw(st.floats(0.125, 50, width=32))))
    scale, zero_point = input_grid(torch.tensor(low), torch.tensor(high), bits)
    spread = torch.randn(400, generator=generator) * max(high, -low)
    ties = (torch.arange(-(2**bits), 2**bits + 1) + 0.5) * scale
    return torch.cat([spread, ties, torch.tensor([0.0, -0.0])]), scale, zero_point, bits


@quick
@given(inputs())
def test_eager_input_equals_the_formula_to_the_bit(case):
    assert torch.equal(fake_quantize_input_eager(*case), fake_quantize_input(*case))


@quick
@given(inputs(), st.sampled_from(sorted(INPUT_FORMS)))
def test_rounded_inputs_lie_on_the_grid_and_stay_there(case, form):
    value, scale, zero_point, bits = case
    rounded = INPUT_FORMS[form](value, scale, zero_point, bits)
    codes = (rounded / scale).round() + zero_point
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert torch.equal((codes - zero_point) * scale, rounded)
    assert torch.equal(INPUT_FORMS[form](rounded, scale, zero_point, bits), rounded)


def gradient(form, value, *grid):
    leaf = value.clone().requires_grad_()
    form(leaf, *grid).sum().backward()
    return leaf.grad


@quick
@given(inputs())
def test_the_gradient_is_one_on_the_grid_and_zero_outside(case):
    value, scale, zero_point, bits = case
    position = value.double() / scale.double() + zero_point.double()
    inside = (position > -0.4998) & (position < 2**bits - 1 + 0.4998)
    outside = (position < -0.5) | (position > 2**bits - 1 + 0.5)
    for form in INPUT_FORMS.values():
        slope = gradient(form, value, scale, zero_point, bits)
        assert (slope[inside] == 1.0).all()
        assert (slope[outside] == 0.0).all()


@pytest.mark.parametrize("form", INPUT_FORMS.values(), ids=INPUT_FORMS)
def test_infinities_clip_and_nan_stays_visible(form):
    value = torch.tensor([float("nan"), float("inf"), -float("inf")])
    rounded = form(value, torch.tensor(0.5), torch.tensor(3.0))
    assert rounded[0].isnan()
    assert rounded[1:].tolist() == [126.0, -1.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_and_weight_keep_dtype_and_shape(dtype):
    value = torch.randn(2, 3, 4).to(dtype)
    grid = input_grid(torch.tensor(-2.0), torch.tensor(2.0))
    for form in INPUT_FORMS.values():
        rounded = form(value, *grid)
        assert (rounded.dtype, rounded.shape) == (dtype, value.shape)
        assert torch.equal(rounded, form(value.float(), *grid).to(dtype))
    rounded = round_weight(value)
    assert (rounded.dtype, rounded.shape) == (dtype, value.shape)


@quick
@given(st.integers(0, 10**6), st.integers(2, 8), st.sampled_from(DTYPES))
def test_weights_are_off_their_grid_by_half_a_step_at_most_and_zeros_stay_zero(seed, bits, dtype):
    weight = (torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(seed)) * 0.3).to(dtype)
    weight[weight.abs() < 0.1] = 0.0
    weight[3] = 0.0  # a channel that pruning emptied
    rounded = round_weight(weight, bits)
    scale = weight_scale(weight, bits).view(-1, 1, 1)
    assert (rounded[weight == 0] == 0).all()
    assert ((rounded - weight).abs() <= scale * 0.5001 + torch.finfo(dtype).eps * weight.abs()).all()
    assert ((rounded / scale).round().abs() <= 2 ** (bits - 1) - 1).all()


def test_every_channel_keeps_its_largest_weight_and_its_own_scale():
    weight = torch.tensor([[1.27, 0.001], [0.0127, 0.00001]])
    assert torch.allclose(round_weight(weight)[:, 0], weight[:, 0], rtol=1e-6)
    assert torch.equal(round_weight(weight)[1], round_weight(weight[1:])[0])


def test_weight_gradient_passes_straight_through():
    weight = torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    fake_quantize_weight(weight).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_straight_through_gives_no_gradient_to_the_rounded_value():
    value, rounded = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    result = straight_through(value, rounded)
    assert torch.equal(result, rounded)
    result.sum().backward()
    assert value.grad.tolist() == [1.0] * 3
    assert rounded.grad is None


def test_nan_in_a_weight_stays_visible():
    weight = torch.tensor([[float("nan"), 1.0], [0.5, 1.0]])
    rounded = round_weight(weight)
    assert rounded[0].isnan().any()
    assert rounded[1].isfinite().all()


def test_a_compiler_is_looked_for(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not compiler_available(CPU)


@pytest.mark.slow
@pytest.mark.skipif(not compiler_available(CPU), reason="needs a C++ compiler (g++ or clang++)")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo's own look
def test_compiled_functions_equal_the_eager_ones_to_the_bit():
    weights, clip = compiled_functions()
    torch.manual_seed(0)
    for shape in ((4, 7), (8, 3, 3, 3)):
        weight = torch.randn(shape)
        weight[1] = 0.0
        assert torch.equal(weights(weight), round_weight(weight))
    grid = input_grid(torch.tensor(-1.3), torch.tensor(2.9))
    for value in (torch.randn(5, 7), torch.randn(2, 3, 4, 4), torch.randn(6, 5).t()):
        assert torch.equal(clip(value, *grid, 8), fake_quantize_input_eager(value, *grid, 8))
        slopes = [gradient(form, value, *grid, 8) for form in (clip, fake_quantize_input_eager)]
        assert torch.equal(*slopes)
