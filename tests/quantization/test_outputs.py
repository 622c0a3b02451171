"""Outputs rounded by a hook: values and gradients against ATen, phases, and what is left behind."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_compress.errors import NothingToCompress
from lightning_compress.quantization.attach import Phase, attach
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.observers import move_ranges
from lightning_compress.quantization.outputs import (
    OUTPUT_STATE,
    OutputRange,
    attach_output,
    detach_output,
    output_key,
    outputs_of,
    rounded_as_trained,
    share_grids,
)
from lightning_compress.quantization.placement import PlacedOutput


def frozen(module: nn.Module, low: float, high: float, bits: int = 8) -> nn.Module:
    state = attach_output(module, bits)
    state.extremes, state.phase = torch.tensor([-low, high]), Phase.FROZEN
    return module


@given(low=st.floats(-5, 0), high=st.floats(0.1, 5), bits=st.sampled_from([2, 4, 8]))
def test_values_and_gradients_are_atens(low: float, high: float, bits: int) -> None:
    value = torch.linspace(-7, 7, 101, requires_grad=True)
    module = frozen(nn.Identity(), low, high, bits)
    trained = OutputRange(low, high, bits)
    expected = torch.fake_quantize_per_tensor_affine(
        value.detach(), trained.scale, trained.zero_point, 0, 2**bits - 1
    )  # ATen multiplies by 1 / scale: a tie may fall the other way
    output = module(value)
    off = (output.detach() - expected).abs()
    assert off.max() <= trained.scale * 1.001
    assert (off > 1e-5).float().mean() < 0.05
    output.sum().backward()
    bounds = [(code - trained.zero_point) * trained.scale for code in (-0.51, 2**bits - 1 + 0.51)]
    outside = (value < bounds[0]) | (value > bounds[1])
    assert not value.grad[outside].any()
    inside = (value > bounds[0] + trained.scale * 0.02) & (value < bounds[1] - trained.scale * 0.02)
    assert (value.grad[inside] == 1).all()


def test_phases() -> None:
    module, value = nn.Identity(), torch.tensor([-1.0, 0.26, 3.0])
    state = attach_output(module, low=0.0)
    assert attach_output(module) is state
    assert module(value) is value
    assert state.pending is None
    state.phase = Phase.OBSERVE
    assert module(value) is value
    module(torch.tensor([9.0]))
    assert state.pending.tolist() == [0.0, 9.0]  # the ReLU behind never hands on what is below 0
    with torch.no_grad():
        module(torch.tensor([99.0]))
    assert state.pending.tolist() == [0.0, 9.0]
    assert not state.observed
    state.extremes.copy_(move_ranges(state.extremes[None], state.pending[None], 0.1)[0])
    assert state.range == OutputRange(0.0, 9.0)
    state.phase = Phase.ROUND
    np.testing.assert_allclose(module(value), np.round(value.clamp(0, 9).numpy() / (9 / 255)) * (9 / 255), rtol=1e-6)
    detach_output(module)
    detach_output(module)
    assert module(value) is value
    assert OUTPUT_STATE not in vars(module)
    assert not module._forward_hooks


def test_copies_and_pickles_keep_rounding() -> None:
    module = nn.Sequential(frozen(nn.Linear(3, 3), -1.0, 1.0, 2))
    value = torch.randn(5, 3)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(value), module(value))
        assert other[0].__dict__[OUTPUT_STATE] is not module[0].__dict__[OUTPUT_STATE]
    assert list(module.state_dict()) == ["0.weight", "0.bias"]


def test_outputs_that_are_no_tensor() -> None:
    module = frozen(nn.LSTM(2, 2), -1.0, 1.0)
    with pytest.raises(TypeError, match="one tensor, got tuple"):
        module(torch.randn(3, 2))


def test_readers_take_their_outputs_range() -> None:
    outer, inner = nn.Identity(), nn.Linear(2, 2)
    outputs, inputs = {"outer": attach_output(outer)}, {"inner": attach(inner)}
    outputs["outer"].extremes = torch.tensor([0.5, 2.0])
    places = [PlacedOutput("outer", readers=("inner", "not quantized")), PlacedOutput("gone", readers=("inner",))]
    share_grids(places, outputs, inputs)
    assert inputs["inner"].extremes.tolist() == [0.5, 2.0]
    assert inputs["inner"].extremes is not outputs["outer"].extremes


def test_ranges_of_both_kinds() -> None:
    ranges = {"a": Range(0.0, 1.0), output_key("a"): OutputRange(-1.0, 2.0)}
    assert outputs_of(ranges) == ({"a": Range(0.0, 1.0)}, {"a": OutputRange(-1.0, 2.0)})
    module = nn.Sequential()
    module.add_module("a", nn.Linear(2, 2))
    plain = module(torch.ones(1, 2))
    with rounded_as_trained(module, ranges):
        rounded = module(torch.ones(1, 2))
        codes = rounded / ranges["a:output"].scale
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert torch.equal(module(torch.ones(1, 2)), plain)
    with pytest.raises(NothingToCompress), rounded_as_trained(module, {}):
        pass


def test_limits_of_a_clipping_reader() -> None:
    state = attach_output(nn.Identity(), low=0.0, high=6.0)
    assert state.seen(torch.tensor([-4.0, 8.0])).tolist() == [0.0, 6.0]
    assert attach_output(nn.Identity()).seen(torch.tensor([-4.0, 8.0])).tolist() == [4.0, 8.0]
    assert state.high < math.inf
