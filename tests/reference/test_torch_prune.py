"""Our masks are those of torch.nn.utils.prune's global L1 pruning, bit for bit, when no two scores are equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.masks import apply_mask
from lightning_compress.pruning.threshold import keep_masks


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(40, 30), nn.Conv1d(4, 5, 2), nn.Linear(30, 10)).double()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_masks_equal_global_unstructured_l1(sparsity, seed):
    net, reference = network(seed), network(seed)
    weights = [layer.weight for layer in net]
    total = sum(weight.numel() for weight in weights)
    masks, _ = keep_masks([magnitude(weight) for weight in weights], round(sparsity * total))
    prune.global_unstructured([(layer, "weight") for layer in reference], prune.L1Unstructured, amount=sparsity)
    for weight, mask, layer in zip(weights, masks, reference, strict=True):
        assert torch.equal(mask.double(), layer.weight_mask)
        apply_mask(weight, mask)
        assert torch.equal(weight, layer.weight)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(sparsity * total)
