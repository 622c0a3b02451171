"""Noise is the same wherever it should be, and rounding with it is unbiased."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_compress.quantization.grid import weight_scale
from lightning_compress.quantization.noise import Noise, drop_rounding, noise_keys, round_at_random, uniform_noise


def key(name="a", step=3, seed=0):
    return noise_keys(name, step, seed)[0]


def test_noise_depends_on_seed_name_step_and_shape_alone():
    like = torch.zeros(50, 40)
    torch.manual_seed(0)
    first = uniform_noise(like, key())
    state = torch.get_rng_state()
    assert torch.equal(first, uniform_noise(torch.ones(50, 40, dtype=torch.bfloat16), key()))
    assert torch.equal(torch.get_rng_state(), state)  # the user's own numbers stay as they were
    others = (key("b"), key(step=4), key(seed=1), noise_keys("a", 3)[1])
    for other in others:
        correlation = torch.corrcoef(torch.stack([first.flatten(), uniform_noise(like, other).flatten()]))[0, 1]
        assert correlation.abs() < 5 / math.sqrt(like.numel())
    assert first.dtype == torch.float32


def test_noise_is_uniform_without_steps_between_elements_or_optimizer_steps():
    noise = torch.stack([uniform_noise(torch.zeros(500), key(step=step)) for step in range(400)])
    assert 0.0 <= noise.min() < 1e-4
    assert 1 - 1e-4 < noise.max() < 1.0
    cells = torch.histc(noise, 20, 0, 1) / noise.numel()
    assert (cells - 0.05).abs().max() < 5 * math.sqrt(0.05 * 0.95 / noise.numel())
    # Every element's mean over steps and every step's mean over elements spread as independent numbers' do.
    for dim, count in ((0, 400), (1, 500)):
        assert noise.mean(dim=dim).std() * math.sqrt(12 * count) == pytest.approx(1.0, abs=0.15)
    for by, other in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
        assert ((by - 0.5) * (other - 0.5)).mean().abs() < 5 / 12 / math.sqrt(noise.numel())


def test_noise_of_a_known_place_is_the_published_hash():
    def hashed(x: int, added: int) -> int:  # lowbias32, in Python's whole numbers
        x = (x ^ (x >> 16)) * 0x7FEB352D + added & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    seed = int(key())
    want = [(hashed(i + seed & 0xFFFFFFFF, seed * 0x9E3779B9) >> 8) / 2**24 for i in range(100)]
    assert uniform_noise(torch.zeros(100), key()).tolist() == want


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_unbiased_and_goes_to_a_neighbour(bits):
    torch.manual_seed(0)
    weight, scale = torch.randn(3, 20), weight_scale(torch.randn(3, 20), bits) * 3
    draws = torch.stack([round_at_random(weight, scale, uniform_noise(weight, key("w", i)), bits) for i in range(4000)])
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
    noise = uniform_noise(value, key("a", 0))
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


def test_a_probability_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"inputs is the probability .* in \[0, 1\], got 1.5"):
        Noise(inputs=1.5)
    assert repr(Noise(inputs=1)) == repr(Noise(inputs=1.0))
    assert not Noise().some
