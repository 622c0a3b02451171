"""Equalized networks compute what they did; norms are folded exactly; ReLU6 is left, or replaced and said so."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from lightning_compress import CompressError
from lightning_compress.quantization.chains import Chain, find_chains, layers_with_norm
from lightning_compress.quantization.equalization import equalize, equalizing_scale, relu6_between, replace_relu6
from lightning_compress.quantization.folding import fold_batch_norm, folded
from tests.pruning.architectures import MobileNetV2, UNet, Vgg


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


NARROW = ((1, 8, 1, 1), (6, 12, 2, 2), (6, 16, 2, 2))
IMAGES = (2, 3, 32, 32)


def lived_in(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics, gains and weights of very different sizes in each channel, as in a trained network."""
    generator = torch.Generator().manual_seed(seed)

    def spread(size: int) -> Tensor:
        return torch.exp(1.5 * torch.randn(size, generator=generator))

    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(generator=generator)
                layer.running_var.copy_(spread(layer.num_features))
                layer.weight.copy_(spread(layer.num_features) * torch.randn(layer.num_features).sign())
                layer.bias.normal_(generator=generator)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.mul_(spread(len(layer.weight)).view(-1, *[1] * (layer.weight.dim() - 1)))
    return module.eval()


def norm_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels), nn.ReLU()]


def depthwise() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), *norm_relu(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), *norm_relu(8),
        nn.Conv2d(8, 6, 1), nn.LeakyReLU(0.2), nn.AvgPool2d(2), nn.Dropout(),
        nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * 6 * 6, 5), nn.ReLU(), nn.Linear(5, 3),
    )  # fmt: skip


def shipped(net: nn.Module, layer: str, norm: str | None) -> Tensor:
    """A layer's weight with its norm folded in by torch's own function."""
    found = net.get_submodule(layer)
    if norm is None:
        return found.weight.detach()
    n = net.get_submodule(norm)
    args = (n.running_mean, n.running_var, n.eps, n.weight, n.bias)
    return fuse_conv_bn_weights(found.weight, found.bias, *args)[0].detach()


def input_range(net: nn.Module, chain: Chain, channels: int) -> Tensor:
    """By a loop: the largest weight that reads each channel of the first layer."""
    weight, largest = shipped(net, chain.second, chain.norm_after), []
    groups = getattr(net.get_submodule(chain.second), "groups", 1)
    outputs = len(weight) // groups
    for channel in range(channels):
        group, at = divmod(channel, channels // groups)
        rows = weight[group * outputs : (group + 1) * outputs]
        largest.append(rows[:, at * chain.repeats : (at + 1) * chain.repeats].abs().max())
    return torch.stack(largest)


def test_the_function_stays_and_the_ranges_become_equal() -> None:
    net = lived_in(depthwise())
    images = torch.randn(IMAGES)
    before = net(images).detach()
    chains = equalize(net, images)
    assert [chain.norm_after for chain in chains] == ["4", None, None, None, None]
    pairs = [(chain.first, chain.second, chain.norm, chain.repeats) for chain in chains]
    assert pairs[:2] == [("0", "3", "1", 1), ("3", "6", "4", 1)]
    assert pairs[2:] == [("6", "10", None, 1), ("10", "14", None, 36), ("14", "16", None, 1)]
    assert (net(images) - before).abs().max() <= 1e-5 * before.abs().max()
    for chain in chains:
        one = shipped(net, chain.first, chain.norm).flatten(1).abs().amax(1)
        np.testing.assert_allclose(one, input_range(net, chain, len(one)), rtol=1e-3)


def test_the_scale_is_that_of_the_paper() -> None:
    one, two = torch.rand(5) + 0.1, torch.rand(5) + 0.1
    scale = equalizing_scale(one, two)
    torch.testing.assert_close(scale, torch.sqrt(one * two) / two)
    torch.testing.assert_close(one / scale, two * scale)
    assert equalizing_scale(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])).tolist() == [1.0, 1.0]


def test_keys_classes_and_zeros_stay() -> None:
    net = lived_in(depthwise())
    with torch.no_grad():
        net[3].weight[2] = 0.0
        net[6].weight[:, 5] = 0.0
        net[6].weight[1, 1] = 0.0
    zeros = {name: value == 0 for name, value in net.named_parameters()}
    keys, classes = list(net.state_dict()), [type(layer) for layer in net]
    images = torch.randn(IMAGES)
    before = net(images).detach()
    equalize(net, (images,))
    assert list(net.state_dict()) == keys
    assert [type(layer) for layer in net] == classes
    assert all(bool((value[zeros[name]] == 0).all()) for name, value in net.named_parameters())
    assert (net(images) - before).abs().max() <= 1e-5 * before.abs().max()


def test_relu6_keeps_a_pair_as_it_is_until_it_is_replaced() -> None:
    net = lived_in(MobileNetV2(NARROW, 8, 32, 5))
    images = torch.randn(IMAGES)
    before, weights = net(images).detach(), copy.deepcopy(net.state_dict())
    assert equalize(net, images) == []
    assert all(torch.equal(weights[name], value) for name, value in net.state_dict().items())
    blocking = relu6_between(net, images)
    assert len(blocking) == 10
    assert replace_relu6(net, images) == blocking
    assert all(isinstance(net.get_submodule(name), nn.ReLU) for name in blocking)
    unbounded = net(images).detach()
    assert not torch.allclose(unbounded, before), "some values pass 6 here"
    assert len(equalize(net, images)) == 10
    assert (net(images) - unbounded).abs().max() <= 1e-5 * unbounded.abs().max()


class Branches(nn.Module):
    """Outputs used twice, mixed, or unknown in their effect on a scale: nothing to equalize."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.tied = nn.Conv2d(3, 3, 3, padding=1)
        self.tied.weight = self.a.weight
        self.gelu, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.rows, self.head = nn.Linear(16, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = self.b(x) + x
        x = self.tied(self.c(x))
        x = self.last(F.gelu(self.gelu(x)))
        x = F.pad(x, (1, 1), value=2.0)[..., 1:-1]
        return self.head(self.rows(x.flatten(2)).sigmoid())


def test_what_does_not_commute_is_left_alone() -> None:
    assert find_chains(Branches(), torch.randn(2, 3, 4, 4)) == []


def test_pooling_over_all_positions_and_padding_keep_channels_apart() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.two(F.pad(self.one(x).relu(), (1, 1, 1, 1)))
            return self.head(F.relu(x).mean([2, 3]))

    net, images = lived_in(Net()), torch.randn(IMAGES)
    before = net(images).detach()
    assert [(chain.first, chain.second) for chain in equalize(net, {"x": images})] == [("one", "two"), ("two", "head")]
    assert (net(images) - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("make", [Vgg, UNet, lambda: MobileNetV2(NARROW, 8, 32, 5), Branches])
def test_no_architecture_changes_its_function(make) -> None:
    net = lived_in(make())
    images = torch.randn(2, 3, 16, 16) if not isinstance(net, Branches) else torch.randn(2, 3, 4, 4)
    before = net(images).detach()
    equalize(net, images)
    assert (net(images) - before).abs().max() <= 1e-5 * before.abs().max()
    fold_batch_norm(net, images)
    assert (net(images) - before).abs().max() <= 1e-5 * before.abs().max()


def test_a_forward_that_cannot_be_traced_says_so() -> None:
    class Data(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) if x.sum() > 0 else x

    with pytest.raises(CompressError, match="cannot be traced"):
        equalize(Data(), torch.ones(1, 2))


# Folding


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_folding_is_that_of_torch(bias: bool, affine: bool) -> None:
    conv, norm = nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5, affine=affine)
    net = lived_in(nn.Sequential(conv, nn.BatchNorm2d(5)))
    norm.running_mean.copy_(net[1].running_mean)
    norm.running_var.copy_(net[1].running_var)
    weight, shift = folded(conv.weight, conv.bias, norm)
    expected = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    torch.testing.assert_close(weight, expected[0].detach())
    torch.testing.assert_close(shift, expected[1].detach(), rtol=1e-5, atol=1e-5)


def test_every_norm_of_a_mobile_net_is_folded() -> None:
    net = lived_in(MobileNetV2(NARROW, 8, 32, 5)).double()
    images = torch.randn(IMAGES, dtype=torch.float64)
    before = net(images).detach()
    norms = [name for name, layer in net.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert sorted(layers_with_norm(net, images).values()) == sorted(norms)
    assert len(fold_batch_norm(net, images)) == len(norms)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules())
    assert (net(images) - before).abs().max() <= 1e-9 * before.abs().max()


def test_a_norm_of_batch_statistics_and_one_of_rows_are_left() -> None:
    batchwise = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert fold_batch_norm(batchwise, torch.randn(IMAGES)) == {}
    rows = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)).eval()
    assert layers_with_norm(rows, torch.randn(2, 4, 4)) == {}, "the norm is over the rows, not the outputs"
    assert find_chains(rows, torch.randn(2, 4, 4)) == []
    assert layers_with_norm(rows, torch.randn(2, 4)) == {"0": "1"}
