"""Our masks are those of torch.nn.utils.prune, bit for bit, when no two scores are equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_compress.pruning.criteria import magnitude, squared_magnitude
from lightning_compress.pruning.masks import apply_mask
from lightning_compress.pruning.patterns import Columns, Rows, Unstructured
from lightning_compress.pruning.scopes import uniform
from lightning_compress.pruning.targets import Target
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


def masks_of(pattern, net, sparsity, criterion=magnitude):
    targets = [Target(str(index), layer.weight.detach(), layer, criterion=criterion) for index, layer in enumerate(net)]
    return list(pattern(targets, sparsity, 1.0)[0])


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_global_masks_are_the_patterns_too(sparsity):
    net, reference = network(2), network(2)
    prune.global_unstructured([(layer, "weight") for layer in reference], prune.L1Unstructured, amount=sparsity)
    for mask, layer in zip(masks_of(Unstructured(), net, sparsity), reference, strict=True):
        assert torch.equal(mask.double(), layer.weight_mask)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9])
def test_uniform_masks_equal_l1_unstructured_by_layer(sparsity):
    """Each layer as many as torch does; ours round along all layers, which these sizes make the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 10, 2), nn.Linear(40, 30), nn.Conv1d(4, 5, 2)).double()
    for mask, layer in zip(masks_of(Unstructured(uniform), net, sparsity), net, strict=True):
        prune.l1_unstructured(layer, "weight", amount=sparsity)
        assert torch.equal(mask.double(), layer.weight_mask)


@pytest.mark.parametrize(("criterion", "order"), [(magnitude, 1), (squared_magnitude, 2)])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("make", [lambda: nn.Linear(7, 8), lambda: nn.Conv2d(3, 8, 3)], ids=["Linear", "Conv2d"])
def test_rows_equal_ln_structured(make, sparsity, criterion, order):
    torch.manual_seed(0)
    layer = make().double()
    (mask,) = masks_of(Rows(), [layer], sparsity, criterion)
    prune.ln_structured(layer, "weight", amount=sparsity, n=order, dim=0)
    assert torch.equal(mask.double(), layer.weight_mask)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 7), lambda: nn.Conv2d(8, 3, 3)], ids=["Linear", "Conv2d"])
def test_columns_equal_ln_structured_along_the_inputs(make):
    torch.manual_seed(0)
    layer = make().double()
    (mask,) = masks_of(Columns(), [layer], 0.5)
    prune.ln_structured(layer, "weight", amount=0.5, n=1, dim=1)
    assert torch.equal(mask.double(), layer.weight_mask)
