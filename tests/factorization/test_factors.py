"""A layer as two, in place, and back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_compress.factorization.factors import (
    Factored,
    as_plain,
    factor,
    factored_layers,
    restore_factors,
    unfactor,
)
from lightning_compress.factorization.svd import svd
from lightning_compress.pruning.hessians import as_matrices

LAYERS = {
    "Linear": (lambda: nn.Linear(6, 9), (4, 3, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 9, bias=False), (4, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 9, 3, padding=2, dilation=2), (2, 4, 12)),
    "Conv2d": (lambda: nn.Conv2d(4, 9, (3, 2), stride=2, padding=1, padding_mode="reflect"), (2, 4, 9, 8)),
    "pointwise": (lambda: nn.Conv2d(6, 9, 1, bias=False), (2, 6, 5, 5)),
    "same": (lambda: nn.Conv2d(3, 9, 3, padding="same"), (2, 3, 5, 5)),
}


def factored(make, rank=None):
    torch.manual_seed(0)
    layer = make().double()
    terms = svd(as_matrices(layer, layer.weight)[0])
    two = copy.deepcopy(layer)
    factor(two, *terms.truncated(rank or len(terms.values)))
    return layer, two


@pytest.mark.parametrize("kind", LAYERS)
def test_at_full_rank_it_computes_the_same_and_comes_back(kind):
    make, shape = LAYERS[kind]
    plain, layer = factored(make)
    x = torch.randn(shape, dtype=torch.float64)
    assert type(layer) is Factored
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.weight, plain.weight)
    assert (layer.bias is None) == (plain.bias is None)
    names = {"down.weight", "up.weight"} | ({"up.bias"} if plain.bias is not None else set())
    assert set(dict(layer.named_parameters())) == names
    unfactor(layer)
    assert type(layer) is type(plain)
    assert list(layer.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(dict(layer.named_parameters()), dict(plain.named_parameters()))
    torch.testing.assert_close(layer(x), plain(x))
    assert repr(layer) == repr(plain)
    assert vars(layer).keys() == vars(plain).keys()


@pytest.mark.parametrize("kind", LAYERS)
def test_at_a_lower_rank_its_weight_is_the_product_and_it_holds_less(kind):
    make, shape = LAYERS[kind]
    plain, layer = factored(make, rank=2)
    plain.weight.data = layer.weight.detach()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))
    assert layer.rank == 2
    assert sum(p.numel() for p in layer.parameters()) < sum(p.numel() for p in plain.parameters())


def test_the_object_its_hooks_its_bias_and_its_modes_stay():
    layer, calls = nn.Linear(6, 9), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    layer.eval().weight.requires_grad_(False)
    bias = layer.bias
    factor(layer, *svd(layer.weight).truncated(2))
    layer(input=torch.zeros(1, 6))
    assert calls == [1]
    assert layer.bias is bias
    assert layer.up.bias is bias
    assert bias.requires_grad
    assert not layer.down.weight.requires_grad
    assert not any(each.training for each in layer.modules())
    assert "Linear of 9x6, rank 2" in repr(layer)
    for part in (layer.down, layer.up):
        assert part.weight.is_contiguous()
        assert part.weight.untyped_storage().nbytes() == 4 * part.weight.numel()


def test_it_copies_and_pickles():
    _, layer = factored(LAYERS["Conv2d"][0], rank=2)
    x = torch.randn(LAYERS["Conv2d"][1], dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), layer(x))
        unfactor(other)
        torch.testing.assert_close(other(x), layer(x))


def test_a_transformer_layer_in_evaluation_still_finds_its_weights():
    """Its fast path takes weights from the layers instead of calling them."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for layer in (block.linear1, block.linear2):
        factor(layer, *svd(layer.weight).truncated(3))
    x = torch.randn(2, 4, 8)
    with torch.no_grad():
        fast = block(x)
    torch.testing.assert_close(fast, block(x.requires_grad_()).detach(), atol=1e-5, rtol=1e-5)


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"expected factors .* of a weight \(9, 6\), got \(9, 2\) and \(3, 6\)"):
        factor(nn.Linear(6, 9), torch.zeros(9, 2), torch.zeros(3, 6))


# Checkpoints


def net():
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(72, 8))


def test_a_state_dict_says_which_layers_are_two_whatever_the_module_was():
    torch.manual_seed(0)
    saved = net()
    factor(saved[0], *svd(as_matrices(saved[0], saved[0].weight)[0]).truncated(3))
    other = net()
    factor(other[0], *svd(as_matrices(other[0], other[0].weight)[0]).truncated(5))
    factor(other[2], *svd(other[2].weight).truncated(2))
    for fresh in (net(), other, copy.deepcopy(saved)):
        restore_factors(fresh, saved.state_dict())
        fresh.load_state_dict(saved.state_dict())
        x = torch.randn(2, 2, 5, 5)
        torch.testing.assert_close(fresh(x), saved(x))
        assert list(factored_layers(fresh)) == ["0"]


class Adapter(nn.Module):
    """A user's own module whose parts have the names of ours."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(6, 2), nn.Linear(2, 6)


def test_a_module_of_the_users_with_such_names_is_left_alone():
    module = nn.Sequential(Adapter(), nn.Linear(6, 6))
    restore_factors(module, module.state_dict())
    assert type(module[0]) is Adapter
    assert factored_layers(module) == {}


def test_it_looks_plain_in_a_block_and_gets_its_own_factors_back():
    layer = nn.Linear(6, 9)
    factor(layer, *svd(layer.weight).truncated(2))
    kept = dict(layer.named_parameters())
    with as_plain({"a": layer}) as weights:
        assert type(layer) is nn.Linear
        assert list(dict(layer.named_parameters())) == ["weight", "bias"]
        assert weights["a"] is layer.weight
    assert {name: id(value) for name, value in layer.named_parameters()} == {n: id(v) for n, v in kept.items()}
    assert layer(torch.zeros(1, 6)).shape == (1, 9)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch
def test_torchscript():
    layer = nn.Sequential(nn.Linear(6, 9))
    factor(layer[0], *svd(layer[0].weight).truncated(2))
    x = torch.randn(3, 6)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
