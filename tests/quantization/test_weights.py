"""Weight grids against ATen's fake-quantize operators and loops by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lightning_compress.quantization.weights import Symmetric, output_first


def sure(position: torch.Tensor) -> torch.Tensor:
    """ATen multiplies by the reciprocal, so values in the middle of two points may fall to either side."""
    return ((position - position.floor()) - 0.5).abs() > 1e-4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_grid_for_the_tensor_and_its_gradient_are_atens(bits: int) -> None:
    torch.manual_seed(bits)
    weight, top = torch.randn(6, 3, 5, 5), 2 ** (bits - 1) - 1
    ours, theirs = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    got = Symmetric(bits, "tensor").rounded(ours, {})
    scale = float(weight.abs().max() / top)
    want = torch.fake_quantize_per_tensor_affine(theirs, scale, 0, -top, top)
    certain = sure(weight.double() / scale)
    assert certain.float().mean() > 0.99
    torch.testing.assert_close(got[certain], want[certain], rtol=1e-6, atol=0)
    upstream = torch.randn_like(weight)
    got.backward(upstream)
    want.backward(upstream)
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_of_a_linear_are_atens_channels_of_its_rows(bits: int) -> None:
    torch.manual_seed(bits)
    weight, top = torch.randn(5, 24), 2 ** (bits - 1) - 1
    rows = weight.reshape(15, 8)
    scale = rows.abs().amax(1) / top
    want = torch.fake_quantize_per_channel_affine(rows, scale, torch.zeros(15, dtype=torch.int32), 0, -top, top)
    certain = sure(rows.double() / scale.double().unsqueeze(1))
    got = Symmetric(bits, 8).rounded(weight, {}).view(15, 8)
    torch.testing.assert_close(got[certain], want[certain], rtol=1e-6, atol=0)


@given(
    st.integers(2, 8), st.sampled_from(["channel", "tensor", 1, 2, 3, 6]), st.integers(0, 2**31), st.floats(1e-6, 1e6)
)
def test_every_group_by_hand(bits: int, group: str | int, seed: int, size: float) -> None:
    weight = np.random.default_rng(seed).standard_normal((4, 2, 3)).astype(np.float32) * np.float32(size)
    weight[1] = 0.0  # pruned
    weight[:, 0, 1] = 0.0
    got = Symmetric(bits, group).rounded(torch.from_numpy(weight), {}).numpy()
    shapes = {"channel": (4, 6), "tensor": (1, 24)}
    rows = weight.reshape(shapes[group] if isinstance(group, str) else (-1, group))
    for row, ours in zip(rows, got.reshape(rows.shape), strict=True):
        largest = np.abs(row).max()
        step = largest / np.float32(2 ** (bits - 1) - 1) if largest else np.float32(1)
        assert np.all(ours[row == 0] == 0)
        assert np.all(np.abs(ours - row) <= step * np.float32(0.5001))
        whole = ours / step
        np.testing.assert_allclose(whole, whole.round(), atol=1e-3)
        np.testing.assert_allclose(np.abs(ours).max(), largest, rtol=1e-6)


@pytest.mark.parametrize("group", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_codes_times_scale_are_the_rounded_weight(group: str, bits: int) -> None:
    weight = torch.randn(4, 2, 3, 3)
    weight[2] = 0.0
    grid = Symmetric(bits, group)
    codes, scale = grid.codes(weight, {})
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert scale.shape == (4,)
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
    assert torch.equal(codes * scale.view(-1, 1, 1, 1), grid.rounded(weight, {}))
    assert Symmetric(bits, 6).codes(weight, {}) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("group", ["channel", "tensor", 4])
def test_a_weight_keeps_its_dtype(group: str | int, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 8, dtype=dtype)
    assert Symmetric(4, group).rounded(weight, {}).dtype == dtype


def test_a_group_that_does_not_divide_the_inputs_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"group=5 does not divide the 18 entries.*\(4, 2, 3, 3\).*divisor of 18"):
        Symmetric(4, 5).learned(torch.randn(4, 2, 3, 3))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"bits": 1}, "2 to 8, got 1"),
        ({"group": 0}, "got 0"),
        ({"group": "row"}, "got 'row'"),
        ({"group": True}, "got True"),
    ],
)
def test_options_out_of_range_are_named(option: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Symmetric(**option)


def test_equal_by_value_and_printed_as_a_recipe() -> None:
    assert Symmetric(4, 32) == Symmetric(bits=4, group=32) != Symmetric(4)
    assert repr(Symmetric(4)) == "Symmetric(bits=4, group='channel')"


@pytest.mark.parametrize("groups", [1, 2])
def test_output_first_lays_the_weight_of_a_transposed_convolution_out_like_a_convolutions(groups: int) -> None:
    """A transposed convolution's gradient to its input is the convolution with the same weight."""
    weight, value = torch.randn(4, 6 // groups, 3), torch.randn(2, 4, 9)
    want = functional.conv_transpose1d(value, weight, groups=groups)
    rows = output_first(weight, groups)
    assert rows.shape == (6, 4 // groups, 3)
    assert torch.equal(output_first(rows, groups), weight)
    got = functional.conv1d(functional.pad(value, (2, 2)), rows.flip(-1), groups=groups)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
