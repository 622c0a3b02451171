"""Floating-point formats against ml_dtypes, numpy and the bit layouts; levels against a search by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.quantization.formats import FORMATS, FloatInputs, FloatWeights, float_values
from lightning_compress.quantization.levels import (
    LevelInputs,
    Levels,
    largest_size,
    nearest_level,
    normal_levels,
    power_of_two_levels,
)

quick = settings(max_examples=60, deadline=None)
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NUMPY = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
LARGEST = {"bf16": 3.3895313892515355e38, "fp16": 65504.0, "e4m3": 448.0, "e5m2": 57344.0}
LAYOUT = {"bf16": (8, 7), "fp16": (5, 10), "e4m3": (4, 3), "e5m2": (5, 2)}  # bits of exponent and mantissa
dynamo_warns = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # at itself
LOW, HIGH = torch.tensor(-2.0), torch.tensor(3.0)
WEIGHTS = [
    *(FloatWeights(name) for name in FORMATS),
    Levels(),
    Levels(bits=3, per_channel=False),
    Levels(normal_levels),
    Levels([-3, -1, 0, 0.5, 2], bits=3),
]
INPUTS = [
    *(FloatInputs(name) for name in FORMATS),
    LevelInputs(),
    LevelInputs(normal_levels),
    LevelInputs([0, 1, 2, 4]),
]


def values_of(name):
    """All finite values that are not negative, of the bit layout: subnormals, then (1 + m) 2^(e - bias)."""
    exponent, mantissa = LAYOUT[name]
    bias, steps = 2 ** (exponent - 1) - 1, 2**mantissa
    found = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    found += [(1 + m / steps) * 2.0 ** (e - bias) for e in range(1, 2**exponent) for m in range(steps)]
    return np.array([value for value in found if value <= LARGEST[name]])


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_of_a_format_stays_and_midpoints_go_to_the_even_one(name):
    points = values_of(name)[-40_000:]
    assert points[-1] == LARGEST[name]
    got = float_values(torch.tensor(points), name).numpy()
    assert np.array_equal(got, points)
    middles = (points[:-1] + points[1:]) / 2
    sure = np.abs(middles) > 1e-37  # float32's own subnormals have no midpoints
    even = np.where(np.arange(len(points) - 1) % 2 == 0, points[:-1], points[1:])
    offset = (len(values_of(name)) - len(points)) % 2
    even = even if offset == 0 else np.where(even == points[:-1], points[1:], points[:-1])
    got = float_values(torch.tensor(middles), name).numpy()
    assert np.array_equal(got[sure], even[sure])


@quick
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 10**6), st.integers(-30, 30))
def test_floats_equal_other_libraries_conversions(name, seed, power):
    generator = torch.Generator().manual_seed(seed)
    value = torch.cat([torch.randn(300, generator=generator) * 2.0**power, torch.tensor([0.0, -0.0, 1e-40, -1e-40])])
    clipped = np.clip(value.numpy(), -LARGEST[name], LARGEST[name])
    want = clipped.astype(NUMPY[name]).astype(np.float32)
    got = float_values(value, name).numpy()
    assert np.array_equal(got, want)
    assert np.array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("name", FORMATS)
def test_infinities_become_the_largest_value_and_nan_stays_visible(name):
    got = float_values(torch.tensor([INF, -INF, NAN]), name)
    assert got[:2].tolist() == [LARGEST[name], -LARGEST[name]]
    assert torch.isnan(got[2])


@quick
@given(st.sampled_from(["e4m3", "e5m2"]), st.integers(0, 10**6))
def test_eight_bit_weights_are_scaled_by_channel_and_inputs_by_range(name, seed):
    torch.manual_seed(seed)
    weight = torch.randn(4, 9) * torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None]
    array = weight.numpy()
    largest = np.abs(array).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(LARGEST[name]), np.float32(1.0))
    want = np.clip(array / scale, -LARGEST[name], LARGEST[name]).astype(NUMPY[name]).astype(np.float32) * scale
    assert np.array_equal(FloatWeights(name).rounded(weight, {}).numpy(), want)
    value = torch.randn(50) * 2
    scale = np.float32(3.0) / np.float32(LARGEST[name])
    want = np.clip(value.numpy() / scale, -LARGEST[name], LARGEST[name]).astype(NUMPY[name]).astype(np.float32) * scale
    assert np.array_equal(FloatInputs(name).rounded(value, LOW, HIGH, {}).numpy(), want)


def nearest_by_hand(value, levels, scale):
    return np.array([scale * min(levels, key=lambda level: (abs(v / scale - level), level)) for v in value])


@quick
@given(
    st.integers(0, 10**6),
    st.lists(st.integers(-60, 60), min_size=1, max_size=15, unique=True),
    st.sampled_from([0.25, 1.0, 8.0]),
)
def test_the_nearest_level_is_that_of_a_search_and_ties_go_down(seed, levels, scale):
    levels = sorted({0, *levels})
    if len(levels) < 2:
        return
    generator = torch.Generator().manual_seed(seed)
    ties = (torch.tensor(levels[:-1]) + torch.tensor(levels[1:])) / 2 * scale
    value = torch.cat([torch.randn(100, generator=generator) * 30 * scale, ties, torch.tensor([0.0])])
    got = nearest_level(value, levels, torch.tensor(scale))
    assert np.array_equal(got.double().numpy(), nearest_by_hand(value.double().numpy(), levels, scale))
    assert nearest_level(torch.tensor([INF, -INF]), levels, torch.tensor(scale)).tolist() == [
        levels[-1] * scale, levels[0] * scale,
    ]  # fmt: skip
    assert torch.isnan(nearest_level(torch.tensor([NAN]), levels, torch.tensor(scale))).all()


def test_four_normal_bits_are_nf4_as_published():
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    np.testing.assert_allclose(normal_levels(4), published, atol=1e-6)


def test_powers_of_two():
    assert power_of_two_levels(2) == [-1.0, 0.0, 1.0]
    assert power_of_two_levels(4)[-4:] == [8.0, 16.0, 32.0, 64.0]
    weight = torch.tensor([[64.0, 50.0, 47.0, 0.4, -0.6, 0.0]])
    assert Levels().rounded(weight, {}).tolist() == [[64.0, 64.0, 32.0, 0.0, -1.0, 0.0]]


def test_levels_may_be_a_function_or_in_any_order_and_are_equal_by_value():
    assert Levels(power_of_two_levels, 3) == Levels([4, 2, 1, 0, -1, -2, -4], 3)
    assert hash(Levels(power_of_two_levels, 3)) == hash(Levels([4, 2, 1, 0, -1, -2, -4], 3))
    assert eval(repr(LevelInputs([1, 0], 2))) == LevelInputs((0.0, 1.0), 2)


@pytest.mark.parametrize("grid", [Levels, LevelInputs])
@pytest.mark.parametrize(
    ("levels", "bits", "message"),
    [
        ([1, 2], 2, "0 among them"),
        ([0], 2, "distinct finite"),
        ([0, 1, 1], 2, "distinct finite"),
        ([0, INF], 2, "distinct finite"),
        ([-2, -1, 0, 1, 2], 2, "2 bits tell 4 levels apart, got 5"),
    ],
)
def test_levels_that_are_no_grid_are_named(grid, levels, bits, message):
    with pytest.raises(ValueError, match=message):
        grid(levels, bits)


@pytest.mark.parametrize("grid", [FloatWeights, FloatInputs])
def test_an_unknown_format_is_named(grid):
    with pytest.raises(ValueError, match="one of bf16, fp16, e4m3, e5m2, got 'fp4'"):
        grid("fp4")


@pytest.mark.parametrize("grid", WEIGHTS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_keep_zeros_shape_and_dtype_and_the_gradient_is_the_identitys(grid, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(4, 6, 3) * torch.tensor([0.0, 0.01, 1.0, 20.0]).view(-1, 1, 1)).to(dtype)
    weight[:, ::2] = 0.0
    upstream = torch.randn(weight.shape).to(dtype)
    leaf = weight.clone().requires_grad_()
    assert grid.learned(leaf) == {}
    rounded = grid.rounded(leaf, {})
    rounded.backward(upstream)
    assert (rounded.shape, rounded.dtype) == (weight.shape, dtype)
    assert (rounded[weight == 0] == 0).all()
    assert torch.equal(leaf.grad, upstream)
    found = grid.codes(leaf, {})
    assert (found is not None) == (grid in (Levels(), Levels(bits=3, per_channel=False)))
    if found is not None:
        codes, scale = found
        assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (4,))
        assert torch.equal((codes * scale.view(-1, 1, 1)).to(dtype), rounded)


@pytest.mark.parametrize("grid", WEIGHTS, ids=repr)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 3), (2, 2, 1, 1)], ids=str)
def test_empty_and_all_zero_weights(grid, shape):
    weight = torch.zeros(shape)
    assert torch.equal(grid.rounded(weight, {}), weight)
    assert largest_size(weight, per_channel=False) == 0.0


@pytest.mark.parametrize("grid", INPUTS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_inputs_ends_with_the_range(grid, dtype):
    torch.manual_seed(0)
    value = torch.cat([torch.randn(200) * 3, torch.tensor([0.0, INF, -INF])]).to(dtype).requires_grad_()
    rounded = grid.rounded(value, LOW, HIGH, grid.learned(LOW, HIGH))
    rounded.sum().backward()
    assert (rounded.shape, rounded.dtype) == (value.shape, dtype)
    if isinstance(grid, LevelInputs):
        points = np.array(grid.points)
        scale = max(2.0 / -points[0] if points[0] < 0 else 0.0, 3.0 / points[-1])
        ends = scale * points[0], scale * points[-1]
    else:
        largest = 3.0 if grid.bits == 8 else LARGEST[grid.format]
        ends = -largest, largest
    wide = value.detach().double()
    clear = ((wide - ends[0]).abs() > 1e-5) & ((wide - ends[1]).abs() > 1e-5)
    inside = (wide > ends[0]) & (wide < ends[1])
    assert torch.equal(value.grad[clear] != 0, inside[clear])
    assert (value.grad[inside & clear] == 1.0).all()
    if grid != FloatInputs("bf16") or dtype != torch.float16:  # whose own largest value is far below bf16's
        assert torch.isfinite(rounded).all()
    assert rounded[value == 0].item() == 0.0
    assert grid.rounded(torch.empty(0, 3, dtype=dtype), LOW, HIGH, {}).shape == (0, 3)
    assert grid.affine(LOW, HIGH, {}) is None


def test_widths():
    assert [grid.bits for grid in WEIGHTS] == [16, 16, 8, 8, 4, 3, 4, 3]


@dynamo_warns
@pytest.mark.parametrize("grid", [*WEIGHTS, *INPUTS], ids=repr)
def test_compiled_and_exported_values_are_equal_and_so_are_gradients(grid):
    torch.manual_seed(0)
    weight, upstream = torch.randn(5, 7), torch.randn(5, 7)
    weight[0] = 0.0

    def form(value):
        inputs = isinstance(grid, FloatInputs | LevelInputs)
        return grid.rounded(value, LOW, HIGH, {}) if inputs else grid.rounded(value, {})

    def run(function):
        leaf = weight.clone().requires_grad_()
        result = function(leaf)
        result.backward(upstream)
        return result.detach(), leaf.grad

    torch.compiler.reset()  # each grid is another function with the same code, and Dynamo counts those
    eager, gradient = run(form)
    compiled, compiled_gradient = run(torch.compile(form, backend="aot_eager", fullgraph=True))
    assert torch.equal(eager, compiled)
    assert torch.equal(gradient, compiled_gradient)

    class Rounding(torch.nn.Module):
        def forward(self, value):
            return form(value)

    program = torch.export.export(Rounding(), (weight,))
    assert torch.equal(program.module()(weight), eager)
