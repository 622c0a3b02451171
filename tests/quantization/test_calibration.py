"""Ranges from batches, against numpy on all values at once; bad input is named with its layer."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_compress import CompressError, NothingToCompress
from lightning_compress.quantization.calibration import (
    Seen,
    calibrate,
    mean_square_error,
    min_max,
    moving_average,
    percentile,
)
from lightning_compress.quantization.grid import Range

quick = settings(max_examples=25, deadline=None)


def seen_of(*batches: torch.Tensor) -> Seen:
    seen = Seen()
    for batch in batches:
        seen.add(batch)
    return seen


def heavy_tailed(seed: int, size: int = 4000) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, size).astype(np.float32))


@quick
@given(st.integers(0, 10_000), st.floats(0.0001, 0.2))
def test_percentile_leaves_out_its_share_at_either_end(seed: int, out: float) -> None:
    values = heavy_tailed(seed)
    low, high = percentile(seen_of(*values.split(1000)), share=1 - out)
    ordered = np.sort(values.numpy())
    most = int(out * len(ordered) + 1e-6)
    # A bin of the bfloat16 pattern is 0.4 % of a value to either side.
    np.testing.assert_allclose([low, high], [ordered[most], ordered[-1 - most]], rtol=0.00393)


def test_a_percentile_of_all_is_min_max() -> None:
    seen = seen_of(heavy_tailed(0), heavy_tailed(1))
    assert percentile(seen, share=1.0) == min_max(seen)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("relu", [False, True])
def test_mean_square_error_is_near_the_best_of_many_ranges(bits: int, relu: bool) -> None:
    values = heavy_tailed(3).relu() if relu else heavy_tailed(3)
    x = values.numpy().astype(np.float64)

    def error(low: float, high: float) -> float:
        scale = (high - low) / (2**bits - 1)
        zero = np.round(-low / scale)
        return float(np.square((np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale - x).mean())

    low, high = mean_square_error(seen_of(values), bits)
    grid = np.linspace(0.02, 1.0, 60)
    best = min(error(min(a * x.min(), 0.0), b * x.max()) for a in grid for b in grid)
    assert error(low, high) <= 1.05 * best
    assert error(low, high) <= error(min(x.min(), 0.0), x.max())


def test_moving_average_is_that_of_training() -> None:
    batches = [heavy_tailed(seed, 100) for seed in range(5)]
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low, high = low + 0.1 * (float(batch.min()) - low), high + 0.1 * (float(batch.max()) - high)
    assert moving_average(seen_of(*batches)) == pytest.approx((low, high), rel=1e-5)


def test_counting_reads_all_dtypes_shapes_and_layouts() -> None:
    values = heavy_tailed(4, 240).view(2, 3, 40)
    for value in (values, values.transpose(0, 2), values.double(), values.bfloat16(), values.half()):
        seen = seen_of(value)
        assert int(seen.counts.sum()) == 240
        found, counts = seen.histogram()
        expected = torch.unique(value.flatten().bfloat16().float(), return_counts=True)
        assert torch.equal(found[1:-1], expected[0][1:-1])
        assert (found[0], found[-1]) == (value.float().min(), value.float().max())
        assert torch.equal(counts, expected[1].double())
    nested = torch.nested.nested_tensor([values[0], values[1, :2]], layout=torch.jagged)
    assert int(seen_of(nested).counts.sum()) == 200
    assert seen_of(torch.zeros(0, 3)).extremes == []


class TwoPaths(nn.Module):
    """One layer called twice, by position and by name, and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.idle, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.head(self.shared(x) + self.shared(input=y))


def test_a_layer_called_twice_has_the_range_of_both_and_the_module_is_left_as_it_was() -> None:
    net = TwoPaths().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pair = (torch.tensor([[1.0, 2.0]]), torch.tensor([[-5.0, 0.0]]))
    for batch in (pair, list(pair), {"x": pair[0], "y": pair[1]}):
        assert calibrate(net, [batch], 4, 3, exclude="idle") == {"shared": Range(-5.0, 2.0, 4, 3)}
    assert net.training
    assert not net.shared._forward_pre_hooks
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def net() -> nn.Sequential:
    torch.manual_seed(0)  # one whose ReLUs do not all close
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))


def test_no_batch_is_named() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(net(), [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_with_the_first_layer_that_got_them(bad: float) -> None:
    good = torch.ones(3, 2)
    with pytest.raises(CompressError, match="NaN or infinity into '0' in its call 1"):
        calibrate(net(), [good, torch.tensor([[1.0, bad]])])
    inside = net()
    with torch.no_grad():
        inside[0].bias.fill_(bad)
    with pytest.raises(CompressError, match="into '2' in its call 0"):
        calibrate(inside, [good])


def test_a_layer_that_never_runs_and_an_input_that_is_always_zero_are_named() -> None:
    with pytest.raises(CompressError, match=r"no input of \['idle'\].*exclude=\['idle'\]"):
        calibrate(TwoPaths(), [(torch.ones(1, 2), torch.ones(1, 2))])
    with pytest.raises(CompressError, match=r"\['0'\] is zero in every batch"):
        calibrate(net(), [torch.zeros(3, 2)])


def test_other_bad_input_is_named() -> None:
    batches = [torch.ones(3, 2)]
    with pytest.raises(ValueError, match="2 to 8, got 9"):
        calibrate(net(), batches, input_bits=9)
    with pytest.raises(ValueError, match="2 to 8, got 1"):
        calibrate(net(), batches, weight_bits=1)
    with pytest.raises(ValueError, match="matches no module"):
        calibrate(net(), batches, exclude="none")
    with pytest.raises(NothingToCompress):
        calibrate(nn.Sequential(nn.ReLU()), batches)
    with pytest.raises(ValueError, match=r"share is in \(0.5, 1\], got 2"):
        calibrate(net(), batches, rule=functools.partial(percentile, share=2))
    with pytest.raises(CompressError, match=r"gave '0' the range \(1.0, 0.0\)"):
        calibrate(net(), batches, rule=lambda seen, bits: (1.0, 0.0))


def test_the_projection_that_attention_uses_without_calling_it_is_left_out() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.Sequential(layer, nn.Linear(8, 2))
    assert set(calibrate(encoder, [torch.randn(2, 5, 8)])) == {"0.linear1", "0.linear2"}
    with pytest.raises(CompressError, match="out_proj"):
        calibrate(encoder, [torch.randn(2, 5, 8)], include="*out_proj")
