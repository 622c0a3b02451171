"""Layers of a whole module become low rank where that saves weights, and come back as plain ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_compress import CompressError, NothingToCompress
from lightning_compress.factorization.factors import Factored
from lightning_compress.factorization.lowrank import factorize, merge, wants
from lightning_compress.factorization.ranks import Budget, Energy


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 4))


def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(300, 40, generator=generator) * torch.logspace(0, -2, 40)


@torch.no_grad()
def outputs_error(one, other, x):
    return float((one(x) - other(x)).square().mean())


def test_layers_that_get_smaller_are_replaced_and_the_head_stays():
    module, plain, x = net(), net(), inputs()
    assert factorize(module, rank=12) == {"0": 12, "2": 12}
    assert [type(layer) is Factored for layer in module] == [True, False, True, False, False]
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in plain.parameters())
    for name in (0, 2):
        left, values, right = torch.linalg.svd(plain[name].weight.double())
        best = (left[:, :12] * values[:12]) @ right[:12]
        product = module[name].up.weight.double() @ module[name].down.weight.double()
        torch.testing.assert_close(product, best, rtol=0, atol=1e-6)
    assert merge(module) == ["0", "2"]
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert outputs_error(module, plain, x) > 0


def test_batches_make_the_error_of_the_outputs_least():
    x, plain = inputs(), net()
    errors = {}
    for kind, batches in (("plain", None), ("weighted", [x[:200], x[200:]])):
        module = net()
        factorize(module, batches, rank=10, include=["0"])
        errors[kind] = outputs_error(module[0], plain[0], x)
    assert errors["weighted"] < 0.5 * errors["plain"]


def test_energy_chooses_a_rank_for_each_layer_and_full_ones_are_left():
    module, x = net(), inputs()
    module[2].weight.data = torch.randn(40, 3) @ torch.randn(3, 60)
    assert factorize(module, rank=Energy(0.9999)) == {"2": 3}  # the other needs nearly all of its rank
    weighted, plain = net(), net()
    assert factorize(weighted, [x], rank=Energy(0.8))["0"] < factorize(plain, rank=Energy(0.7))["0"]
    module = net()
    size = sum(module[each].weight.numel() for each in (0, 2))
    factorize(module, [x], rank=Budget(0.7))
    left = sum(part.weight.numel() for each in (0, 2) for part in (module[each].down, module[each].up))
    assert 0.25 * size < left <= 0.3 * size


def test_a_second_time_there_is_nothing_left_to_do():
    module = net()
    factorize(module, rank=5)
    with pytest.raises(NothingToCompress, match="factored already"):
        factorize(module, rank=5)
    alone = nn.Linear(64, 64)
    assert factorize(alone, rank=5, include=["Linear"]) == {"": 5}
    with pytest.raises(NothingToCompress, match="factored already"):
        factorize(alone, rank=5, include=["Linear"])


class Aliased(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(30, 30)), nn.Linear(30, 2)
        self.encoder = self.body

    def forward(self, x):
        return self.head(self.encoder(x))


def test_a_layer_with_two_names_is_one_and_others_are_passed_over():
    module = Aliased()
    assert factorize(module, rank=3) == {"body.0": 3}
    assert type(module.encoder[0]) is Factored
    odd = net()
    prune.l1_unstructured(odd[0], "weight", 0.3)
    refused(CompressError, "'0' computes its weight in each forward", odd, rank=3, include=["0"])
    assert factorize(odd, rank=3) == {"2": 3}


def test_convolutions_too():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 4, 3)
    )
    plain, x = copy.deepcopy(module), torch.randn(4, 3, 8, 8)
    assert factorize(module, [x], rank=9) == {"0": 9}  # groups are left, and the head
    assert 0 < outputs_error(module, plain, x) < 0.2 * float(plain(x).detach().square().mean())


def test_it_trains_on_and_keeps_modes_and_frozen_weights():
    module = net().eval()
    module[0].weight.requires_grad_(False)
    factorize(module, rank=5)
    assert not module[0].training
    assert not module[0].down.weight.requires_grad
    module(inputs()).square().mean().backward()
    assert module[2].up.weight.grad is not None
    assert module[0].up.bias.grad is not None


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x)))


def refused(error, words, module, *args, **options):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=words):
        factorize(module, *args, **options)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_bad_input_is_named_and_replaces_nothing():
    refused(ValueError, r"rank from 1 to 40, the full one of '0', got 41", net(), rank=lambda *_: {"0": 41, "2": 3})
    refused(NothingToCompress, "would get smaller at rank=40.*0 40", net(), rank=40)
    refused(CompressError, "'first' shares its weight", Tied(), rank=2, include=["first", "head"])
    refused(CompressError, "NaN or infinity in '0'; look at the batches", net(), [inputs() * torch.nan], rank=2)
    grouped = nn.Sequential(nn.Conv1d(8, 8, 3, groups=4))
    refused(CompressError, "'0' has 4 groups", grouped, rank=2, include=["0"])

    class Doubled(nn.Linear):
        pass

    own = net()
    own[0] = Doubled(40, 60)
    refused(CompressError, "'0' is a Doubled, whose own forward", own, rank=2, include=["0"])
    assert factorize(own, rank=2) == {"2": 2}
    broken = net()
    broken[0].weight.data[0, 0] = float("inf")
    refused(CompressError, "infinite weights of '0.weight'", broken, rank=2)
    with pytest.raises(TypeError, match="moment or fisher, by these names"):
        wants(lambda weight, hessian: None)

    class Skips(nn.Sequential):
        def forward(self, x):
            return self[4](self[3](self[2](torch.zeros(len(x), 60))))

    refused(CompressError, "'0' never ran", Skips(*net()), [inputs()], rank=2)
    with pytest.raises(NothingToCompress, match="nothing is merged"):
        merge(net())
