"""Learned widths: mixtures and their gradients against formulas, and a search that finds what must be wide."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress.quantization.fake import round_weight
from lightning_compress.quantization.mixed import weight_bytes
from lightning_compress.quantization.mixture import expected_cost, likeliest_bits, mixed_weight

WIDTHS = (2, 4, 8)


def case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 5, generator=generator)
    weight[:, 1] = 0.0
    return weight.requires_grad_(), torch.randn(3, generator=generator).requires_grad_()


def test_the_mixture_and_its_gradients_are_the_formula():
    weight, logits = case()
    upstream = torch.randn(3, 5)
    mixed = mixed_weight(weight, logits, WIDTHS)
    mixed.backward(upstream)
    shares = logits.detach().exp() / logits.detach().exp().sum()
    roundings = torch.stack([round_weight(weight.detach(), bits) for bits in WIDTHS])
    assert torch.allclose(mixed, torch.einsum("k,kij->ij", shares, roundings))
    assert (mixed[:, 1] == 0).all()
    assert torch.allclose(weight.grad, upstream)  # the shares sum up to 1
    slopes = (roundings * upstream).sum(dim=(1, 2))
    assert torch.allclose(logits.grad, shares * (slopes - (shares * slopes).sum()), atol=1e-6)


def test_a_mixed_weight_is_a_mixture_of_layers():
    weight, logits = case()
    value = torch.randn(4, 5)
    shares = torch.softmax(logits, dim=0)
    mixture = sum(s * F.linear(value, round_weight(weight, bits)) for s, bits in zip(shares, WIDTHS, strict=True))
    assert torch.allclose(F.linear(value, mixed_weight(weight, logits, WIDTHS)), mixture, atol=1e-6)


def test_a_certain_choice_is_a_plain_rounding():
    weight, _ = case()
    assert torch.equal(mixed_weight(weight, torch.tensor([-200.0, 0.0, -200.0]), WIDTHS), round_weight(weight, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_dtype_of_the_weight_stays(dtype):
    assert mixed_weight(torch.randn(2, 3, dtype=dtype), torch.zeros(3), WIDTHS).dtype == dtype


def test_the_cost_is_the_mean_over_shares_with_its_gradient():
    costs = {"a": {2: 10, 8: 40}, "b": {2: 100, 8: 400}}
    logits = {name: torch.tensor(start, requires_grad=True) for name, start in (("a", [0.5, -1.0]), ("b", [0.0, 2.0]))}
    value = expected_cost(logits, costs)
    shares = {name: torch.softmax(values.detach().double(), 0).tolist() for name, values in logits.items()}
    by_hand = (shares["a"][0] * 10 + shares["a"][1] * 40 + shares["b"][0] * 100 + shares["b"][1] * 400) / 440
    assert value.item() == pytest.approx(by_hand)
    value.backward()
    narrow, wide = shares["b"]
    assert logits["b"].grad.tolist() == pytest.approx([-300 * narrow * wide / 440, 300 * narrow * wide / 440])


def test_a_search_spends_its_bits_where_the_loss_needs_them():
    """One layer's target lies on the 2-bit grid, the other's between its points."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"coarse": nn.Linear(8, 4, bias=False), "fine": nn.Linear(8, 4, bias=False)})
    targets = {"coarse": torch.randint(-1, 2, (4, 8)).float(), "fine": torch.linspace(-1, 1, 32).view(4, 8)}
    with torch.no_grad():
        for name, target in targets.items():
            net[name].weight.copy_(target)
    costs = weight_bytes(net, WIDTHS, include=["*"])
    logits = {name: torch.zeros(3, requires_grad=True) for name in costs}
    optimizer = torch.optim.Adam(logits.values(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        errors = [(mixed_weight(net[n].weight.detach(), logits[n], WIDTHS) - targets[n]).square().mean() for n in costs]
        (torch.stack(errors).sum() + 0.01 * expected_cost(logits, costs)).backward()
        optimizer.step()
    bits = likeliest_bits(logits, WIDTHS)
    assert bits["coarse"] == 2
    assert bits["fine"] > 2


@pytest.mark.parametrize("widths", [(2, 4), (8, 4, 2), (2, 4, 16)])
def test_widths_that_do_not_fit_are_refused(widths):
    with pytest.raises(ValueError, match="widths"):
        mixed_weight(torch.zeros(2, 2), torch.zeros(3), widths)
    with pytest.raises(ValueError, match="widths"):
        likeliest_bits({"a": torch.zeros(3)}, widths)


def test_costs_of_other_layers_are_refused():
    with pytest.raises(ValueError, match=r"layers \['a'\], at least one, got those of \['b'\]"):
        expected_cost({"a": torch.zeros(1)}, {"b": {2: 1}})
