"""Transposed convolutions, embeddings, weight-only layers and several calls: what attaching knows beyond Linear."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress.quantization.attach import Phase, attach, check_weight, fake_quantized
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.inputs import Affine, PerToken
from lightning_compress.quantization.scales import input_grid
from lightning_compress.quantization.weights import Symmetric

LOW, HIGH = torch.tensor(-2.0), torch.tensor(3.0)


def channel_by_channel(weight: torch.Tensor, groups: int, bits: int) -> torch.Tensor:
    """Round each output channel of a transposed convolution (in, out/groups, ...) in a loop."""
    rounded = weight.detach().clone()
    size = len(weight) // groups
    for group in range(groups):
        for channel in range(weight.shape[1]):
            rows = rounded[group * size : (group + 1) * size, channel]
            step = rows.abs().max() / (2 ** (bits - 1) - 1)
            rows.copy_((rows / step).round() * step)
    return rounded


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (nn.ConvTranspose1d, functional.conv_transpose1d),
        (nn.ConvTranspose2d, functional.conv_transpose2d),
        (nn.ConvTranspose3d, functional.conv_transpose3d),
    ],
)
def test_a_transposed_convolution_is_rounded_by_output_channel(kind, call, groups):
    torch.manual_seed(0)
    layer = kind(4, 6, 3, groups=groups)
    value = torch.randn(2, 4, *[5] * (layer.weight.dim() - 2))
    rounded = channel_by_channel(layer.weight, groups, 4)
    want = call(Affine().rounded(value, LOW, HIGH, {}), rounded, layer.bias, groups=groups)
    state = attach(layer, Symmetric(4))
    state.extremes, state.phase = torch.tensor([2.0, 3.0]), Phase.ROUND
    got = layer(value)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    got.sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape
    state.keep_weight = True
    assert torch.equal(layer(value), got)


def test_an_embedding_is_rounded_by_row_and_its_input_left_alone():
    layer = nn.Embedding(10, 6, padding_idx=0)
    codes = torch.randint(0, 10, (3, 4))
    want = functional.embedding(codes, Symmetric(4).values(layer.weight), 0)
    state = attach(layer, Symmetric(4), None)
    state.phase = Phase.OBSERVE
    layer(codes)
    assert state.pending.tolist() == [0.0, 0.0]
    state.phase = Phase.ROUND
    assert torch.equal(layer(codes), want)
    layer(codes).sum().backward()
    counts = torch.bincount(codes.flatten(), minlength=10).float()
    counts[0] = 0.0
    assert torch.equal(layer.weight.grad, counts.unsqueeze(1).expand(10, 6))
    with pytest.raises(ValueError, match=r"'emb' rescales its weight.*max_norm=1.0"):
        check_weight("emb", nn.Embedding(3, 2, max_norm=1.0))


def test_a_weight_only_layer_computes_with_its_float_input():
    layer, value = nn.Linear(6, 4), torch.randn(5, 6)
    trained = Range(0.0, 0.0, bits=32, weight_bits=3)
    assert trained.input_grid is None
    with fake_quantized(nn.Sequential(layer), {"0": trained}):
        got = layer(value)
    assert torch.equal(got, functional.linear(value, Symmetric(3).values(layer.weight), layer.bias))
    with pytest.raises(ValueError, match="affine grid, got None"):
        trained.grid  # noqa: B018


def test_the_weight_may_be_rounded_before_the_input():
    layer, value = nn.Linear(6, 4), torch.randn(5, 6)
    state = attach(layer)
    state.phase, state.inputs_wait = Phase.ROUND, True
    assert torch.equal(layer(value), functional.linear(value, Symmetric().values(layer.weight), layer.bias))
    assert state.pending.tolist() == [-value.min(), value.max()]


@pytest.mark.parametrize("inputs", [Affine(4), PerToken(4)])
@pytest.mark.parametrize("weights", [Symmetric(4, "tensor"), Symmetric(4, 3)])
def test_a_range_carries_any_grids(weights, inputs):
    layer, value = nn.Linear(6, 4), torch.randn(5, 6)
    state = attach(layer, weights, inputs)
    state.extremes, state.phase = torch.tensor([2.0, 3.0]), Phase.FROZEN
    want, trained = layer(value), state.range
    assert (trained.weight_grid, trained.input_grid) == (weights, inputs)
    rounded = inputs.rounded(value, LOW, HIGH, {})
    assert torch.equal(want, functional.linear(rounded, weights.values(layer.weight), layer.bias))
    twin = nn.Sequential(nn.Linear(6, 4))
    twin[0].load_state_dict(layer.state_dict())
    with fake_quantized(twin, {"0": trained}):
        assert torch.equal(twin(value), want)


def test_the_default_grids_leave_a_range_as_short_as_it_was():
    state = attach(nn.Linear(2, 2), Symmetric(4), Affine(3))
    state.extremes = torch.tensor([2.0, 3.0])
    assert state.range == Range(-2.0, 3.0, 3, 4)
    assert state.range.grid == input_grid(LOW, HIGH, 3)


def test_the_narrowest_call_of_a_step_is_noted_beside_the_widest():
    layer = nn.Linear(2, 2)
    state = attach(layer)
    state.phase = Phase.OBSERVE
    for size in (3.0, 0.5, 40.0):
        layer(torch.tensor([[-size, size / 2]]))
    assert state.narrowest.tolist() == [0.5, 0.25]
    assert state.pending.tolist() == [40.0, 20.0]
