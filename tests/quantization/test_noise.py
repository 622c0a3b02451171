"""Noise is the same wherever it should be, and rounding with it is unbiased."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_compress.quantization.grid import weight_scale
from lightning_compress.quantization.noise import drop_rounding, round_at_random, uniform_noise


def test_noise_depends_on_seed_name_step_and_shape_alone():
    like = torch.zeros(50, 40)
    torch.manual_seed(0)
    first = uniform_noise(like, "a", 3)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, uniform_noise(torch.ones(50, 40, dtype=torch.bfloat16), "a", 3))
    for other in (("b", 3, 0), ("a", 4, 0), ("a", 3, 1)):
        assert not torch.equal(first, uniform_noise(like, *other))
    torch.set_rng_state(state)
    uniform_noise(like, "a", 3)
    assert torch.equal(torch.get_rng_state(), state)  # the user's own numbers stay as they were
    assert 0.0 <= first.min() < 0.01
    assert 0.99 < first.max() < 1.0
    assert first.dtype == torch.float32


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(bits):
    torch.manual_seed(0)
    weight, scale = torch.randn(3, 20), weight_scale(torch.randn(3, 20), bits) * 3
    draws = torch.stack([round_at_random(weight, scale, uniform_noise(weight, "w", i), bits) for i in range(4000)])
    column, top = scale[:, None], 2 ** (bits - 1) - 1
    inside = (weight / column).abs() <= top
    assert ((draws - weight).abs() < column * 1.0001)[:, inside].all()
    error = (draws.mean(dim=0) - weight).abs() / column
    assert (error[inside] < 5 * 0.5 / math.sqrt(4000)).all()  # five standard deviations
    codes = draws / column
    assert (codes - codes.round()).abs().max() < 1e-4
    assert codes.abs().max() <= top + 1e-4


def test_stochastic_rounding_keeps_zeros_and_grid_points_and_has_the_identitys_gradient():
    weight = torch.tensor([[0.0, 2.0, -3.0, 0.0]], requires_grad=True)
    noise = torch.tensor([[0.999, 0.999, 0.5, 0.0]])
    rounded = round_at_random(weight, torch.tensor([1.0]), noise, 4)
    assert torch.equal(rounded, weight)
    upstream = torch.randn(1, 4)
    rounded.backward(upstream)
    assert torch.equal(weight.grad, upstream)
    half = round_at_random(weight.to(torch.bfloat16), torch.tensor(1.0), noise, 4)
    assert half.dtype == torch.bfloat16


def test_dropped_rounding_passes_value_and_gradient():
    value, rounded = torch.randn(1000, requires_grad=True), torch.randn(1000, requires_grad=True)
    noise = uniform_noise(value, "a", 0)
    result = drop_rounding(value, rounded, noise, 0.3)
    dropped = noise < 0.3
    assert 0.2 < dropped.float().mean() < 0.4
    assert torch.equal(result, torch.where(dropped, value, rounded))
    result.sum().backward()
    assert torch.equal(value.grad, dropped.float())
    assert torch.equal(rounded.grad, (~dropped).float())
    assert torch.equal(drop_rounding(value, rounded, noise, 0.0), rounded)
    assert torch.equal(drop_rounding(value, rounded, noise, 1.0), value)
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 2.0"):
        drop_rounding(value, rounded, noise, 2.0)
