"""Ranges from batches; bad input is named with its layer."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from lightning_compress import CompressError, NothingToCompress
from lightning_compress.quantization.calibration import calibrate
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.ranges import percentile


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
    with pytest.raises(ValueError, match=r"share is .* in \(0.5, 1\], got 2"):
        calibrate(net(), batches, rule=functools.partial(percentile, share=2))
    with pytest.raises(CompressError, match=r"gave '0' the range \(1.0, 0.0\)"):
        calibrate(net(), batches, rule=lambda seen, bits: (1.0, 0.0))


def test_the_projection_that_attention_uses_without_calling_it_is_left_out() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.Sequential(layer, nn.Linear(8, 2))
    assert set(calibrate(encoder, [torch.randn(2, 5, 8)])) == {"0.linear1", "0.linear2"}
    with pytest.raises(CompressError, match="out_proj"):
        calibrate(encoder, [torch.randn(2, 5, 8)], include="*out_proj")
