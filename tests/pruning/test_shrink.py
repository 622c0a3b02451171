"""Channels taken out: parameters, gradients, optimizer state and attributes against slices made by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress.errors import CheckpointMismatch, CompressError
from lightning_compress.measure.flops import count_macs, macs_per_weight
from lightning_compress.pruning.dependency import find_groups
from lightning_compress.pruning.shrink import describe_shapes, restore_shapes, shrink

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
KEEP = torch.tensor([True, False, True, True, False, True])
STAYS = [0, 2, 3, 5]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 2))


def step(net, optimizer):
    optimizer.zero_grad()
    net(X).square().mean().backward()
    optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_gradients_and_state_are_the_slices_that_stay(name):
    net = small()
    optimizer = OPTIMIZERS[name](net.parameters())
    step(net, optimizer)
    old, state, gradients = copy.deepcopy(net), [copy.deepcopy(optimizer.state[p]) for p in net.parameters()], []
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    net[1].weight.requires_grad_(False)
    shrink(net, {"0": KEEP}, find_groups(net, (X,)), [optimizer])

    columns = [16 * unit + at for unit in STAYS for at in range(16)]

    def by_hand(place, tensor):
        return tensor[:, columns] if place == 4 else tensor[STAYS] if place < 4 else tensor

    for place, (new, was) in enumerate(zip(net.parameters(), old.parameters(), strict=True)):
        assert torch.equal(new, by_hand(place, was))
        assert torch.equal(new.grad, by_hand(place, gradients[place]))
        assert optimizer.param_groups[0]["params"][place] is new
        for key, value in state[place].items():
            now = optimizer.state[new][key]
            if isinstance(value, torch.Tensor) and value.shape == was.shape and value.dim():
                assert torch.equal(now, by_hand(place, value))
    assert len(optimizer.state) == 6
    assert torch.equal(net[1].running_var, old[1].running_var[STAYS])
    assert (net[0].out_channels, net[1].num_features, net[4].in_features) == (4, 4, 64)
    assert [p.requires_grad for p in net.parameters()] == [True, True, False, True, True, True]
    step(net, optimizer)


def test_training_goes_on_as_that_of_the_small_network_alone():
    """Adam on the shrunken network moves as Adam on a network built small, with the sliced state loaded by torch."""
    net = small()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    step(net, optimizer)
    shrink(net, {"0": KEEP}, find_groups(net, (X,)), [optimizer])
    twin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    twin.load_state_dict(net.state_dict())
    other = torch.optim.Adam(twin.parameters(), 0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(net, optimizer)
        step(twin, other)
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), twin.parameters(), strict=True))


def test_state_that_cannot_follow_is_named_before_anything_changes():
    class Flat(torch.optim.SGD):
        pass

    net = small()
    lbfgs, flat = torch.optim.LBFGS(net.parameters()), Flat(net.parameters(), 0.1)
    groups = find_groups(net, (X,))
    with pytest.raises(CompressError, match="LBFGS keeps its state as one flat vector"):
        shrink(net, {"0": KEEP}, groups, [lbfgs])
    flat.state[net[0].weight]["history"] = torch.zeros(7)
    with pytest.raises(CompressError, match="state 'history' of Flat does not have its parameter's shape"):
        shrink(net, {"0": KEEP}, groups, [flat])
    assert net[0].weight.shape == (6, 3, 3, 3)


def test_masks_that_mean_nothing_are_named():
    net = small()
    groups = find_groups(net, (X,))
    with pytest.raises(ValueError, match="'0' needs a bool mask of 6 units"):
        shrink(net, {"0": torch.zeros(6, dtype=torch.bool)}, groups)
    with pytest.raises(ValueError, match="'0' needs a bool mask of 6 units"):
        shrink(net, {"0": KEEP[:3]}, groups)
    with pytest.raises(ValueError, match="channels of '4' cannot go: is an output"):
        shrink(net, {"4": torch.tensor([True, False])}, groups)


def test_tied_parameters_stay_tied():
    net = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 2))
    net[2].weight = net[1].weight
    x = torch.zeros(1, 3)
    groups = [group for group in find_groups(net, (x,)) if not group.reason]
    assert {(slot.tensor, slot.dim) for group in groups for slot in group.slots} >= {("1.weight", 0), ("1.weight", 1)}
    shrink(net, {groups[0].name: KEEP}, groups)
    assert net[2].weight is net[1].weight
    assert net(x).shape == (1, 2)
    assert (net[2].in_features, net[2].out_features) == (4, 4)


def test_shapes_of_another_module_are_named():
    with pytest.raises(CheckpointMismatch, match=r"only the checkpoint has '4\.bias'"):
        restore_shapes(small()[:4], describe_shapes(small()))


def test_positions_of_a_weight_stay_and_give_the_count_of_torch():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 2, 2), nn.Flatten(2), nn.Linear(64, 5)).eval()
    positions = macs_per_weight(net, (X,))

    def ours(module):
        weights = dict(module.named_parameters())
        return sum(count * weights[name].numel() for name, count in positions.items())

    assert positions == {"0.weight": 4 * 16, "1.weight": 4 * 16, "3.weight": 4 * 4}
    assert ours(net) == count_macs(net, (X,)) == 4 * (16 * 6 * 27 + 16 * 6 * 4 * 4 + 4 * 64 * 5)
    shrink(net, {"0": KEEP}, find_groups(net, (X,)))
    assert macs_per_weight(net, (X,)) == positions
    assert ours(net) == count_macs(net, (X,))
