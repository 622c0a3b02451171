"""Graphs as XNNPACK fuses them: the same outputs, and which product is left in which pattern. Needs torch alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_compress.export.program import reference_module, traced_program
from lightning_compress.export.verify import ALL_FIXED, sqnr_db
from lightning_compress.export.xnnpack import as_xnnpack_fuses
from lightning_compress.quantization.grid import Range, integer_weight
from lightning_compress.quantization.outputs import OutputRange, Ranges, rounded_as_trained
from tests.export.models import as_trained, seen_ranges

ATEN, OPS = torch.ops.aten, torch.ops.quantized_decomposed
BEHIND = (ATEN.relu.default, ATEN.hardtanh.default)


def rewritten(module: nn.Module, ranges: Ranges, *args: Tensor) -> fx.GraphModule:
    reference = reference_module(module, ranges, args, signed=True)
    graph = traced_program(reference, args, ALL_FIXED).module(check_guards=False)
    as_xnnpack_fuses(graph)
    return graph


def rounded(module: nn.Module, ranges: Ranges, *args: Tensor) -> Tensor:
    with torch.no_grad(), rounded_as_trained(module, ranges):
        output: Tensor = module(*args)
    return output


def patterns(graph: fx.GraphModule) -> list[str]:
    """Of each product: the operators of its weight, of its input, and the one that reads it behind a ReLU."""
    found = []
    for node in graph.graph.nodes:
        if node.target in (ATEN.linear.default, ATEN.convolution.default):
            reader = next(iter(node.users))
            reader = next(iter(reader.users)) if reader.target in BEHIND else reader
            names = [each.target for each in (node.args[1], node.args[0], reader)]
            found.append(" ".join(getattr(name, "__name__", str(name)).partition(".")[0] for name in names))
    return found


class Branching(nn.Module):
    """Two convolutions with a pooling between, an addition on grids, a head that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.relu, self.sum = nn.ReLU6(), nn.Identity()
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        pooled = self.pool(self.relu(self.first(image)))
        return self.head(self.sum(pooled + self.second(pooled)).mean((2, 3)))


def test_a_rounding_behind_a_pooling_moves_before_it() -> None:
    torch.manual_seed(0)
    module, images = as_trained(Branching()), torch.rand(9, 2, 8, 8)
    ranges: dict[str, Range | OutputRange] = dict(seen_ranges(module, images))
    grid = ranges["second"]
    ranges |= {"second:output": OutputRange(-9.0, 9.0), "pool:output": OutputRange(grid.low, grid.high)}
    ranges["sum:output"] = OutputRange(-9.0, 15.0)
    graph = rewritten(module, ranges, images)
    assert patterns(graph)[:2] == 2 * ["dequantize_per_channel dequantize_per_tensor quantize_per_tensor"]
    assert patterns(graph)[2].startswith("head")
    expected = rounded(module, ranges, images)
    assert sqnr_db(expected.numpy(), graph(images).detach().numpy()) > 35
    counts = Counter(node.target for node in graph.graph.nodes)
    pool = next(node for node in graph.graph.nodes if node.target is ATEN.max_pool2d.default)
    assert pool.args[0].target is OPS.dequantize_per_tensor.default
    # of the image, before and behind the pooling, of the second convolution and of the sum; none twice on one grid
    assert counts[OPS.quantize_per_tensor.default] == 5


def test_a_linear_that_stays_float_is_rounded_by_row() -> None:
    torch.manual_seed(0)
    module, value = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(20, 16)
    ranges = seen_ranges(module, value, skip=())
    graph = rewritten(module, ranges, value)
    assert patterns(graph) == [
        "dequantize_per_channel dequantize_per_token tanh", "dequantize_per_channel dequantize_per_token output",
    ]  # fmt: skip
    hidden = value
    for layer, behind in ((module[0], torch.tanh), (module[2], lambda x: x)):  # by hand, 255 steps from 0 or less
        low, high = hidden.amin(1, keepdim=True).clamp(max=0), hidden.amax(1, keepdim=True).clamp(min=0)
        step = (high - low) / 255
        zero = (-low / step).round()
        codes = (hidden / step + zero).round().clamp(0, 255)
        weight, scale = integer_weight(layer.weight.detach(), 8)
        hidden = behind((codes - zero) * step @ (weight * scale[:, None]).T + layer.bias)
    torch.testing.assert_close(graph(value), hidden, atol=2e-3, rtol=0)
    assert sqnr_db(rounded(module, ranges, value).numpy(), graph(value).detach().numpy()) > 30


def test_a_convolution_that_stays_float_has_a_float_weight() -> None:
    torch.manual_seed(0)
    module, images = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sigmoid()), torch.rand(4, 2, 6, 6)
    ranges = seen_ranges(module, images, skip=())
    graph = rewritten(module, ranges, images)
    (pattern,) = patterns(graph)
    assert pattern.endswith("_floats dequantize_per_tensor sigmoid")
    torch.testing.assert_close(graph(images), rounded(module, ranges, images), atol=1e-5, rtol=0)


def test_a_value_that_is_read_as_floats_too_is_not_rounded_early() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, value: Tensor) -> Tensor:
            turned = self.first(value).transpose(0, 1)
            return self.second(turned) + turned.sum()

    torch.manual_seed(0)
    module, value = Read(), torch.randn(6, 6)
    ranges = seen_ranges(module, value, skip=())
    graph = rewritten(module, ranges, value)
    assert sqnr_db(rounded(module, ranges, value).numpy(), graph(value).detach().numpy()) > 30
    assert patterns(graph)[0].startswith("dequantize_per_channel dequantize_per_token transpose")


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_signed_codes_compute_the_same(low: float) -> None:
    torch.manual_seed(0)
    module, value = nn.Sequential(nn.Linear(8, 5)), torch.randn(30, 8)
    ranges = {"0": Range(low, 2.0)}
    signed = reference_module(module, ranges, (value,), signed=True)
    assert signed[0].grid[1:] == (ranges["0"].zero_point - 128, -128, 127)
    assert torch.equal(signed(value), reference_module(module, ranges, (value,))(value))
