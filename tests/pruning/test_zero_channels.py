"""Channels that pruning has left at zero go, and nothing of what the module computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_compress import Removal, StructuredPruning, remove_zero_channels
from lightning_compress.errors import NothingToCompress
from tests.conformance.modules import Small
from tests.conformance.running import build, train


def test_a_run_that_leaves_zeros_in_ends_smaller_with_the_same_outputs(tmp_path):
    pruned = train(build(Small), [StructuredPruning(0.5, (2, 9), 1, removal=Removal(times=0))], tmp_path)
    model, images = pruned.module.model.eval(), torch.randn(5, 1, 6, 6)
    small = copy.deepcopy(model)
    gone = remove_zero_channels(small, (images[:1],))
    assert sum(gone.values()) > 0
    sizes = [sum(parameter.numel() for parameter in net.parameters()) for net in (model, small)]
    assert sizes[1] < 0.8 * sizes[0]
    torch.testing.assert_close(small(images), model(images), rtol=1e-5, atol=1e-6)


def test_a_module_without_zeros_is_left_as_it_is():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with pytest.raises(NothingToCompress, match=r"none of the 4 channels of Sequential .*Removal\(times=0\)"):
        remove_zero_channels(net, (torch.zeros(1, 2),))
    assert net[0].out_features == 4


def test_a_channel_that_another_layer_still_reads_stays():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        net[0].weight[1:3] = 0
        net[0].bias[2] = 0
        net[2].weight[:, 2] = 0
    assert remove_zero_channels(net, (torch.zeros(1, 2),)) == {"0": 1}


def test_of_a_layer_that_is_all_zero_one_channel_stays():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert remove_zero_channels(net, (torch.zeros(1, 2),)) == {"0": 3}
