"""Masks zero exactly what they drop, in any memory order and dtype, and pack to one bit a weight."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.pruning import masks
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.masks import apply_mask, pack_mask, unpack_mask

LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda tensor: tensor.contiguous(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weight_and_mask(shape=(4, 6, 3, 5), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype), torch.rand(shape, generator=generator) > 0.5


@pytest.mark.parametrize(("value_layout", "mask_layout"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_value_and_mask_may_lie_in_any_memory_order(value_layout, mask_layout):
    weight, mask = weight_and_mask()
    value, kept = LAYOUTS[value_layout](weight.clone()), LAYOUTS[mask_layout](mask)
    strides = value.stride()
    apply_mask(value, kept)
    assert torch.equal(value, torch.where(mask, weight, 0.0))
    assert value.stride() == strides


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_values_keep_their_bits_and_dropped_ones_become_plus_zero(dtype):
    special = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1.5, -1.5, torch.finfo(dtype).tiny]
    value = torch.tensor(special * 2, dtype=dtype)
    before = value.clone()
    mask = torch.arange(16) < 8
    apply_mask(value, mask)
    integer = masks.SAME_WIDTH[value.element_size()]
    assert torch.equal(value[:8].view(integer), before[:8].view(integer))
    assert not value[8:].view(integer).any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=4).map(tuple), st.sampled_from(DTYPES), st.integers(0, 10**6))
def test_any_shape(shape, dtype, seed):
    weight, mask = weight_and_mask(shape, dtype, seed)
    value = weight.clone()
    apply_mask(value, mask)
    assert torch.equal(value, torch.where(mask, weight, torch.zeros_like(weight)))


def test_pieces_join_without_a_gap(monkeypatch):
    monkeypatch.setattr(masks, "PIECE", 7)
    weight, mask = weight_and_mask((11, 5))
    value = weight.clone()
    apply_mask(value, mask)
    assert torch.equal(value, weight * mask)


def test_a_parameter_is_changed_in_place_without_a_graph_and_its_version_moves():
    weight, mask = weight_and_mask()
    parameter = torch.nn.Parameter(weight.clone())
    address, version = parameter.data_ptr(), parameter._version
    apply_mask(parameter, mask)
    assert parameter.data_ptr() == address
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert parameter._version > version  # autograd and kept fake-quantized weights see the change
    assert torch.equal(parameter.detach(), weight * mask)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.integers(0, 10**6))
def test_packed_bits_are_those_of_numpy_and_come_back(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack_mask(mask)
    np.testing.assert_array_equal(packed.numpy(), np.packbits(mask.numpy().ravel()))
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_packing_follows_the_logical_order_of_a_strided_mask():
    _, mask = weight_and_mask()
    assert torch.equal(pack_mask(LAYOUTS["channels_last"](mask)), pack_mask(mask))


def test_a_mask_costs_one_bit_of_a_weight_of_32():
    weight, mask = weight_and_mask((64, 3, 7, 7))
    packed = pack_mask(mask)
    assert packed.numel() * packed.element_size() * 32 <= weight.numel() * weight.element_size()


def test_a_mask_of_another_size_is_named():
    with pytest.raises(ValueError, match=r"a mask of 2 bytes does not fit \(3, 2\) \(6 weights\)"):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), torch.Size([3, 2]))


def test_magnitude_scores_without_a_graph():
    weight = torch.nn.Parameter(torch.tensor([[-2.0, 0.5], [-0.0, 1.0]]))
    scores = magnitude(weight)
    assert scores.tolist() == [[2.0, 0.5], [0.0, 1.0]]
    assert not scores.requires_grad
    assert weight.tolist() == [[-2.0, 0.5], [-0.0, 1.0]]
