"""Which outputs need a grid: by hand for each shape of graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.quantization.dataflow import watched
from lightning_compress.quantization.placement import PlacedOutput, find_outputs, place

IMAGE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block with one ReLU module for both its places, as torchvision writes it."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=inplace)

    def forward(self, value: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(value)))
        out = self.bn2(self.conv2(out))
        out += value
        return self.relu(out)


def network(*parts: nn.Module) -> nn.Module:
    stem = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*stem, *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def convolutions(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Conv2d)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_residual_blocks(inplace: bool, training: bool) -> None:
    module = network(Block(inplace), Block(inplace)).train(training)
    expected = (
        PlacedOutput("1", low=0.0, readers=("4.conv1",)),  # through the pooling, and the first addition
        PlacedOutput("4.bn2"),
        PlacedOutput("4", readers=("5.conv1",)),  # not "4.relu", which is called twice
        PlacedOutput("5.bn2"),
        PlacedOutput("5"),
    )
    with watched(module) as flow:  # under autograd too
        module(IMAGE)
    assert place(module, flow, convolutions(module)).outputs == expected
    found = find_outputs(module, convolutions(module), [IMAGE])
    assert found.outputs == expected
    assert found.unplaced == ()
    assert module.training == training
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_plain_chain_needs_only_what_its_pooling_reads() -> None:
    module = network(nn.Conv2d(4, 4, 1), nn.ReLU6())
    assert find_outputs(module, convolutions(module), [IMAGE]).outputs == (PlacedOutput("4", 0.0, 6.0),)


@pytest.mark.parametrize("activation", [nn.Hardswish(), nn.GELU(), nn.SiLU(), nn.Sigmoid()])
def test_the_input_of_an_activation_that_is_no_clipping(activation: nn.Module) -> None:
    module = network(nn.Conv2d(4, 4, 1), activation, nn.Conv2d(4, 4, 1), nn.ReLU())
    found = find_outputs(module, convolutions(module), [IMAGE])
    assert found.outputs == (PlacedOutput("4"), PlacedOutput("6", low=0.0))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.behind = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 4, 1)

    def forward(self, value: Tensor) -> Tensor:
        return functional.relu(self.behind(torch.cat([self.left(value), functional.relu(self.right(value))], 1)))


def test_concatenation() -> None:
    module = network(Branches())
    found = find_outputs(module, convolutions(module), [IMAGE])
    assert found.outputs == (
        PlacedOutput("4.left"),
        PlacedOutput("4.right", low=0.0),
        PlacedOutput("4.behind", low=0.0),
    )


class Inline(nn.Module):
    """Adds what no module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, value: Tensor) -> Tensor:
        return self.last(self.conv(value) + torch.tanh(value))


def test_an_addition_that_cannot_be_placed_says_why() -> None:
    module = network(Inline())
    found = find_outputs(module, convolutions(module), [IMAGE])
    assert len(found.unplaced) == 1
    assert "the addition in '4' stays float" in found.unplaced[0]
    assert "(tanh)" in found.unplaced[0]
    assert "nn.Identity" in found.unplaced[0]


def test_a_returned_value_stays_float() -> None:
    found = find_outputs(nn.Sequential(nn.Conv2d(4, 4, 1)), ["0"], [IMAGE])
    assert found.outputs == ()
    assert "the forward returns its value" in found.unplaced[0]


def test_convolutions_that_are_not_quantized_and_transformers_need_nothing() -> None:
    module = network(Block())
    assert find_outputs(module, [], [IMAGE]).outputs == ()
    encoder = nn.TransformerEncoderLayer(8, 2, 16).eval()
    found = find_outputs(encoder, ["linear1", "linear2"], [torch.randn(3, 2, 8)])
    assert found.outputs == ()
    assert found.unplaced == ()


def test_unknown_names() -> None:
    with pytest.raises(KeyError, match=r"Linear or Conv layers of Sequential, got \['9'\]"):
        find_outputs(network(), ["9"], [IMAGE])


def test_limits_default_to_all_numbers() -> None:
    assert PlacedOutput("a") == PlacedOutput("a", -math.inf, math.inf, ())
