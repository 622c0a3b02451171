"""Widths under a budget: costs counted by hand, and on real images better than one width for all at its size."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.demo_data import load_fashion_mnist
from lightning_compress.quantization.allocation import allocate
from lightning_compress.quantization.grid import integer_weight
from lightning_compress.quantization.mixed import (
    bit_operations,
    bits_table,
    choose_bits,
    stored_bytes,
    weight_bytes,
)
from lightning_compress.quantization.sensitivity import hessian_sensitivity, hessian_traces, loss_sensitivity
from tests.quantization.test_sensitivity import ALL, Twice, loss


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Linear(5, 3))


def data(count=2):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator))
        for _ in range(count)
    ]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_stored_bytes_are_those_of_packed_codes_and_their_scales(bits):
    codes, scale = integer_weight(torch.randn(3, 7, 3), bits)
    unsigned = codes.numpy().astype(np.uint8)
    packed = np.packbits(np.unpackbits(unsigned.reshape(-1, 1), axis=1)[:, 8 - bits :])
    assert stored_bytes(torch.zeros(3, 7, 3), bits) == packed.nbytes + scale.numpy().nbytes


def test_bit_operations_are_counted_by_hand():
    costs = bit_operations(network(), data(), loss, (2, 8), inputs=4, include=ALL)
    macs = {"0": 8 * 36 * 4 * 9, "3": 8 * 144 * 5, "4": 8 * 5 * 3}
    assert costs == {name: {2: count * 2 * 4, 8: count * 8 * 4} for name, count in macs.items()}
    square = bit_operations(network(), data(), loss, (2, 8), inputs="same", include=ALL)
    assert square == {name: {2: count * 4, 8: count * 64} for name, count in macs.items()}


def test_a_shared_weight_is_stored_once_used_twice_and_has_one_width():
    net, batches = Twice(), [(torch.randn(3, 4), torch.tensor([0, 1, 2]))]
    assert weight_bytes(net, (4,)) == {"first": {4: 8 + 16}}
    assert bit_operations(net, batches, loss, (4,)) == {"first": {4: 2 * 3 * 16 * 4 * 8}}
    chosen = choose_bits(net, batches, loss, 24, widths=(4, 8), by="loss")
    assert chosen == {"first": 4, "second": 4}
    assert bits_table(net, chosen).splitlines()[-1].split() == ["in", "all", "16", "4", "24"]


@pytest.mark.parametrize("of", ["bytes", "bit_operations"])
@pytest.mark.parametrize("by", ["hessian", "loss"])
def test_one_call_is_measuring_and_allocating(of, by):
    net, batches = network(), data()
    costs = weight_bytes(net, include=ALL) if of == "bytes" else bit_operations(net, batches, loss, include=ALL)
    budget = sum(cost[4] for cost in costs.values())
    chosen = choose_bits(net, batches, loss, budget, of=of, by=by, include=ALL)
    if by == "hessian":
        harms = hessian_sensitivity(net, hessian_traces(net, batches, loss, include=ALL))
    else:
        harms = loss_sensitivity(net, batches, loss, include=ALL)
    assert chosen == allocate(harms, costs, budget)
    assert sum(costs[name][bits] for name, bits in chosen.items()) <= budget
    assert chosen == choose_bits(net, batches, loss, budget, of=of, by=harms, include=ALL)


def test_inputs_of_the_weights_width_are_measured_with_them():
    net, batches = network(), data()
    costs = bit_operations(net, batches, loss, inputs="same", include=ALL)
    budget = sum(cost[4] for cost in costs.values())
    chosen = choose_bits(net, batches, loss, budget, of="bit_operations", by="loss", inputs="same", include=ALL)
    assert chosen == allocate(loss_sensitivity(net, batches, loss, inputs=True, include=ALL), costs, budget)


def test_batches_may_come_once_and_the_head_stays_out():
    assert list(choose_bits(network(), iter(data()), loss, 1000)) == ["0", "3"]


BAD = {
    "budget": ({"budget": 0}, "positive number"),
    "of": ({"of": "bits"}, "'bytes' or 'bit_operations', got 'bits'"),
    "by": ({"by": "guess"}, "got 'guess'"),
    "inputs": ({"inputs": 9}, "from 2 to 8"),
    "same": ({"inputs": "same"}, "says nothing of inputs"),
    "widths": ({"widths": (4, 16)}, "from 2 to 8"),
    "batches": ({"batches": []}, "got none"),
    "infeasible": ({"budget": 100}, r"smallest feasible budget of these 2 layers is 225;"),
    "table": ({"by": {"0": {4: 0.0}}}, "the same layers"),
    "table's widths": ({"by": {"0": {4: 0.0}, "3": {4: 0.0}}}, "in '0'"),
    "pattern": ({"include": ["conv"]}, "matches no module"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_options_are_refused(changed, message):
    options = {"batches": data(), "budget": 1000, **changed}
    with pytest.raises(ValueError, match=message):
        choose_bits(network(), loss=loss, **options)


@pytest.mark.parametrize(("of", "feasible"), [("bytes", 225), ("bit_operations", (8 * 36 * 36 + 8 * 720) * 16)])
def test_the_smallest_feasible_budget_is_feasible(of, feasible):
    with pytest.raises(ValueError, match=f"is {feasible:,};"):
        choose_bits(network(), data(), loss, feasible - 1, of=of, by="loss")
    assert set(choose_bits(network(), data(), loss, feasible, of=of, by="loss").values()) == {2}


def test_a_table_of_foreign_layers_is_refused():
    with pytest.raises(ValueError, match="got 'conv', which it lacks"):
        bits_table(network(), {"conv": 4})
    with pytest.raises(ValueError, match="from 2 to 8"):
        bits_table(network(), {"0": 16})


# On real images


def trained(seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    for channels, wider, stride in ((16, 32, 2), (32, 32, 1), (32, 48, 2), (48, 48, 1)):
        layers += [nn.Conv2d(channels, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))
    images, labels = load_fashion_mnist()[0].tensors
    epochs = 8
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 40)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            loss(net, (images[rows], labels[rows])).backward()
            optimizer.step()
            schedule.step()
    return net.eval(), list(zip(images.split(250), labels.split(250), strict=True))


@torch.no_grad()
def rounded_loss(net, batches, chosen):
    """Mean loss with each weight rounded by hand; the net is put back."""
    kept = {name: net.get_submodule(name).weight.clone() for name in chosen}
    for name, bits in chosen.items():
        weight = net.get_submodule(name).weight
        step = weight.abs().flatten(1).amax(dim=1).view(-1, *[1] * (weight.dim() - 1)) / (2 ** (bits - 1) - 1)
        weight.copy_((weight / step).round() * step)
    found = float(torch.stack([loss(net, batch) for batch in batches]).mean())
    for name, weight in kept.items():
        net.get_submodule(name).weight.copy_(weight)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("LIGHTNING_COMPRESS_SEEDS", "1"))))
def test_mixed_widths_beat_uniform_four_bits_at_their_size(seed):
    net, batches = trained(seed)
    costs = weight_bytes(net, include=ALL)
    budget = sum(cost[4] for cost in costs.values())
    calibration = batches[:4]
    harms = {
        "hessian": hessian_sensitivity(net, hessian_traces(net, calibration, loss, samples=8, include=ALL)),
        "loss": loss_sensitivity(net, calibration, loss, include=ALL),
    }
    # The first layer, whose input is the image, is in the more sensitive half by both, and the two least are among the
    # last three. Which comes first differs between processors.
    ranked = {by: sorted(table, key=lambda name, table=table: table[name][4]) for by, table in harms.items()}
    assert all("0" in order[3:] and set(order[:2]) <= {"9", "12", "17"} for order in ranked.values()), ranked

    plain, uniform = (rounded_loss(net, batches, chosen) for chosen in ({}, dict.fromkeys(costs, 4)))
    for table in harms.values():
        chosen = choose_bits(net, calibration, loss, budget, by=table, include=ALL)
        assert sum(costs[name][bits] for name, bits in chosen.items()) <= budget
        assert rounded_loss(net, batches, chosen) - plain < 0.8 * (uniform - plain)
