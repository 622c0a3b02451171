"""Products of two activations: torch's attention written out, operands rounded, and where such products are found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_compress.quantization.attention import attach_products, attention, count_products, detach_products
from lightning_compress.quantization.dataflow import watched
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import OutputRange, rounded_as_trained

WIDTH = 8
OPERANDS = {
    "product0.left": OutputRange(-2.0, 2.5),
    "product0.right": OutputRange(-1.5, 2.0),
    "product1.left": OutputRange(0.0, 0.8),
    "product1.right": OutputRange(-2.0, 1.0),
}


def heads(kind=torch.float32, groups=4):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 6), (2, groups, 7, 6), (2, groups, 7, 3)
    return [torch.randn(*shape, generator=generator).to(kind) for shape in shapes]


def unrounded(left, right):
    return left, right


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "some masked": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(1)},
    "rows all masked": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(-2)},
    "added": {"attn_mask": torch.linspace(-3, 3, 70).view(2, 1, 5, 7)},
    "dropout": {"dropout_p": 0.3},
    "groups": {"enable_gqa": True},
}


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_attention_written_out_is_torchs_own_to_the_bit(options, kind):
    options = {name: value.to(kind) if name == "attn_mask" and value.is_floating_point() else value
               for name, value in options.items()}  # fmt: skip
    found, expected = heads(kind, 2 if "enable_gqa" in options else 4), heads(kind, 2 if "enable_gqa" in options else 4)
    for value in (*found, *expected):
        value.requires_grad_()
    torch.manual_seed(1)
    ours = attention(unrounded, *found, **options)
    torch.manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = functional.scaled_dot_product_attention(*expected, **options)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)
    ours.float().square().sum().backward()
    theirs.float().square().sum().backward()
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_a_mask_beside_causal_is_refused_as_torch_does():
    for function in (functional.scaled_dot_product_attention, lambda *args, **kw: attention(unrounded, *args, **kw)):
        with pytest.raises(RuntimeError):
            function(*heads(), attn_mask=torch.zeros(5, 7), is_causal=True)


def grid(value, trained):
    """Round by the formula of the paper: codes 0 to 255, the range widened to hold zero."""
    step = (torch.tensor(trained.high) - torch.tensor(trained.low)) / 255
    zero = (-trained.low / step).round()
    return (((value / step).round() + zero).clamp(0, 255) - zero) * step


def by_hand(query, key, value, scale):
    query, key = grid(query, OPERANDS["product0.left"]), grid(key, OPERANDS["product0.right"])
    shares = grid((query @ key.mT * scale).softmax(-1), OPERANDS["product1.left"])
    return shares @ grid(value, OPERANDS["product1.right"])


class Written(nn.Module):
    """Attention over heads, by one of the ways that models write it."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def forward(self, query, key, value):
        scale = 1 / math.sqrt(query.shape[-1])
        if self.way == "fused":
            return functional.scaled_dot_product_attention(query, key, value)
        if self.way == "@":
            return (query @ key.mT * scale).softmax(-1) @ value
        if self.way == "matmul":
            return torch.matmul(torch.matmul(query, other=key.mT).mul(scale).softmax(-1), value)
        if self.way == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale
            return torch.einsum("bhij,bhjd->bhid", [scores.softmax(-1), value])
        query, key, value = (each.flatten(0, 1) for each in (query, key, value))
        if self.way == "baddbmm":
            empty = torch.zeros(len(query), query.shape[1], key.shape[1])
            scores = torch.baddbmm(empty, query, key.mT, beta=0, alpha=scale)
        else:
            scores = query.bmm(key.mT) * scale
        return torch.bmm(scores.softmax(-1), value).view(2, 4, 5, 3)


@pytest.mark.parametrize("way", ["fused", "@", "matmul", "einsum", "baddbmm", "bmm"])
def test_operands_are_rounded_as_by_hand_however_attention_is_written(way):
    net = nn.Sequential(nn.Linear(1, 1), Written(way))
    query, key, value = heads()
    ranges = {"0": Range(0.0, 1.0), **{f"1:{name}": trained for name, trained in OPERANDS.items()}}
    with torch.no_grad(), rounded_as_trained(net, ranges):
        found = net[1](query, key, value)
    expected = by_hand(query, key, value, 1 / math.sqrt(6))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = net[1](query, key, value)
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_multihead_attention_on_one_set_of_ranges_with_and_without_weights(training):
    torch.manual_seed(0)
    net = nn.Sequential(nn.MultiheadAttention(WIDTH, 2, batch_first=True), nn.Linear(1, 1)).train(training)
    tokens = torch.randn(2, 5, WIDTH)
    ranges = {"1": Range(0.0, 1.0), **{f"0:{name}": trained for name, trained in OPERANDS.items()}}
    with torch.no_grad(), rounded_as_trained(net, ranges):
        with_weights, weights = net[0](tokens, tokens, tokens)
        without, nothing = net[0](tokens, tokens, tokens, need_weights=False)
    assert nothing is None
    assert weights.shape == (2, 5, 5)
    assert torch.equal(with_weights, without)
    projected = functional.linear(tokens, net[0].in_proj_weight, net[0].in_proj_bias).chunk(3, -1)
    query, key, value = (each.view(2, 5, 2, 4).transpose(1, 2) for each in projected)
    mixed = by_hand(query / 2, key, value, 1.0)  # torch scales the query before this product
    expected = net[0].out_proj(mixed.transpose(1, 2).reshape(2, 5, WIDTH))
    torch.testing.assert_close(without, expected, rtol=1e-5, atol=1e-5)
    assert (net[0](tokens, tokens, tokens)[0] - expected).abs().max() > 1e-4


def test_a_compiled_attention_computes_the_same():
    torch.manual_seed(0)
    net = nn.ModuleList([nn.MultiheadAttention(WIDTH, 2, batch_first=True)])
    ranges = {"0.in_proj": Range(-3.0, 3.0), **{f"0:{name}": trained for name, trained in OPERANDS.items()}}
    tokens = torch.randn(2, 5, WIDTH)
    with torch.no_grad(), rounded_as_trained(net, ranges):
        expected, _ = net[0](tokens, tokens, tokens)
        found, _ = torch.compile(net[0], backend="eager")(tokens, tokens, tokens)
    torch.compiler.reset()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (net[0](tokens, tokens, tokens)[0] - expected).abs().max() > 1e-3


class Counted:
    def __init__(self):
        self.calls = 0

    def passed(self, value):
        self.calls += 1
        return value


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.scale = Written("@"), nn.Parameter(torch.ones(2, 4, 3, 3))

    def forward(self, query, key, value):
        mixed = self.inner(query, key, value)
        return mixed @ self.scale @ mixed.mT


def test_a_product_is_rounded_once_by_the_module_that_computes_it():
    net = Around()
    outer, inner = [{name: Counted() for name in OPERANDS} for _ in range(2)]
    attach_products(net, outer)
    attach_products(net.inner, inner)
    net(*heads())
    net(*heads())
    assert [each.calls for each in inner.values()] == [2, 2, 2, 2]
    assert [each.calls for each in outer.values()] == [2, 2, 0, 0]  # the one with a parameter is no such product
    detach_products(net)
    detach_products(net.inner)
    net(*heads())
    assert [each.calls for each in outer.values()] == [2, 2, 0, 0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.written = Written("fused")
        self.register_buffer("frequencies", torch.ones(1, 4, 1))

    def forward(self, tokens):
        angles = self.frequencies @ torch.arange(5.0).view(1, 1, 5)
        projected = [each(tokens).view(2, 5, 2, 4).transpose(1, 2) for each in (self.query, self.key, self.value)]
        return self.written(*projected) + angles.mT


def counted(layers):
    net = Model()
    with watched(net) as flow:
        net(torch.randn(2, 5, WIDTH))
        net(torch.randn(2, 5, WIDTH))
    return count_products(flow, {"query": True, "key": True, "value": True, **layers})


def test_products_are_found_where_their_operands_come_from_rounded_layers():
    assert counted({}) == {"written": 2}  # and not the product of positions
    assert counted({"key": False}) == {}
