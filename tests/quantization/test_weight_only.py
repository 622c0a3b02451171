"""Weights by group, and inputs by token: against numpy, in place where said, and no more memory than said."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import CompressError, NothingToCompress
from lightning_compress.quantization.dynamic import dynamically_quantized
from lightning_compress.quantization.inputs import PerToken
from lightning_compress.quantization.weight_only import group_codes, quantize_weights, round_groups


def tokens(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, 32, generator=generator)
    return [torch.randn(4, 10, 32, generator=generator) @ mix for _ in range(4)]


def block() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 5))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [8, 32, None])
@pytest.mark.parametrize("calibrated", [False, True])
def test_codes_times_scales_are_the_weights_in_the_module(bits: int, group: int | None, calibrated: bool) -> None:
    net = block()
    head = net[4].weight.detach().clone()
    scales = quantize_weights(net, tokens() if calibrated else None, bits, group)
    assert list(scales) == ["0", "2"]
    for name, scale in scales.items():
        weight = net.get_submodule(name).weight.detach()
        codes, again = group_codes(weight, bits, group)
        assert torch.equal(scale, again)
        assert codes.dtype == torch.int8
        assert int(codes.abs().max()) == 2 ** (bits - 1) - 1
        wide = scale.repeat_interleave(group or weight.shape[1], dim=1)
        assert torch.equal(codes.float() * wide, weight)
    assert torch.equal(net[4].weight, head), "the output head stays"


def test_error_feedback_is_below_nearest_and_smaller_groups_below_larger() -> None:
    inputs, net = tokens(), block()
    with torch.no_grad():
        wanted = net(torch.cat(inputs))

        def error(batches, group) -> float:
            rounded = copy.deepcopy(net)
            quantize_weights(rounded, batches, 3, group)
            return float((rounded(torch.cat(inputs)) - wanted).square().mean())

        assert error(inputs, 16) < 0.75 * error(None, 16)
        assert error(None, 8) < error(None, 32)


def test_nearest_is_the_best_of_the_searched_scales_in_each_group() -> None:
    weight = torch.randn(6, 12)
    new = round_groups(weight, 3, 4).numpy().reshape(-1, 4)
    for row, got in zip(weight.numpy().reshape(-1, 4), new, strict=True):
        scales = np.abs(row).max() / 3 * np.linspace(1, 0.2, 41)
        errors = [np.square(np.clip(np.round(row / s), -3, 3) * s - row).sum() for s in scales]
        assert np.square(got - row).sum() == pytest.approx(min(errors), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_their_codes(dtype: torch.dtype) -> None:
    net, wide = block().to(dtype), block()
    wide.load_state_dict({name: value.float() for name, value in net.state_dict().items()})
    quantize_weights(net, None, 8, 16)
    quantize_weights(wide, None, 8, 16)
    assert net[0].weight.dtype == dtype
    assert torch.equal(group_codes(net[0].weight, 8, 16)[0], group_codes(wide[0].weight, 8, 16)[0])


def test_bad_input_is_named_before_anything_changes() -> None:
    net = block()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="group=48 does not divide the 32 inputs of '0'"):
        quantize_weights(net, None, group=48)
    with pytest.raises(ValueError, match="group=64 does not divide the 32 inputs of '0'"):
        quantize_weights(net, tokens(), group=64)
    with pytest.raises(ValueError, match="2 to 8, got 16"):
        quantize_weights(net, None, bits=16, group=8)
    with pytest.raises(ValueError, match="at least one batch"):
        quantize_weights(net, [], group=8)
    with pytest.raises(NothingToCompress):
        quantize_weights(nn.Sequential(nn.Conv2d(1, 2, 3)), None)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with pytest.raises(CompressError, match="NaN or infinity in '2'"):
        quantize_weights(net, None, group=8)
    idle = nn.Sequential(nn.Identity(), nn.Linear(4, 4))
    idle[0].unused = nn.Linear(4, 4)
    with pytest.raises(CompressError, match=r"\['0.unused'\] never run"):
        quantize_weights(idle, [torch.ones(2, 4)], group=4, include="Linear", exclude="1")


# Dynamic


def test_dynamic_quantization_is_near_float_whatever_the_sizes_of_tokens_and_leaves_nothing_behind() -> None:
    net, value = block(), tokens()[0] * torch.logspace(-2, 2, 10).view(10, 1)
    with torch.no_grad():
        wanted = net(value)
        with dynamically_quantized(net):
            got = net(value)
            by_name = net[0](input=value)
        assert torch.equal(net(value), wanted)
        scale = net[0].weight.abs().amax(1, keepdim=True) / 127
        by_token = PerToken(8, symmetric=False).rounded(value, value.min(), value.max(), {})
        rounded = by_token @ ((net[0].weight / scale).round() * scale).T + net[0].bias
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.02
    torch.testing.assert_close(by_name, rounded)
    assert not any(layer._forward_pre_hooks or "weight" in layer.__dict__ for layer in net)
    with pytest.raises(ValueError, match="2 to 8, got 9"), dynamically_quantized(net, input_bits=9):
        pass
