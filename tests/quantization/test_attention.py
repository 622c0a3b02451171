"""Projections of nn.MultiheadAttention, and torch's fast paths for evaluation, which must not pass our hooks by."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_compress.errors import IncompatibleCallbacks
from lightning_compress.quantization.attach import fake_quantized
from lightning_compress.quantization.choosing import select_quantizable
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.projections import projections_in

WIDTH, TRAINED = 8, Range(-3.0, 3.0)


def encoder(norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def ranges(net):
    inside = ("linear1", "linear2", "self_attn.in_proj", "self_attn.out_proj")
    return {f"layers.{index}.{name}": TRAINED for index in (0, 1) for name in inside}


@pytest.mark.parametrize("norm_first", [False, True])
def test_evaluation_equals_training_mode_with_fake_quantization(norm_first):
    net, value = encoder(norm_first), torch.randn(2, 5, WIDTH)
    with fake_quantized(net, ranges(net)):
        trained = net.train()(value)
        with torch.no_grad():
            torch.testing.assert_close(net.eval()(value), trained, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (net(value) - trained).abs().max() > 1e-4  # the roundings can be seen at all


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_padded_batch_that_evaluation_packs_into_a_nested_tensor():
    net, value = encoder(), torch.randn(3, 5, WIDTH)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    with fake_quantized(net, ranges(net)):
        trained = net.train()(value, src_key_padding_mask=padding)
        with torch.no_grad():
            evaluated = net.eval()(value, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[~padding], trained[~padding], rtol=1e-5, atol=1e-5)


def test_multihead_attention_with_its_projection_left_alone():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    net, value = nn.ModuleList([attention, nn.Linear(WIDTH, WIDTH)]), torch.randn(2, 5, WIDTH)
    with torch.no_grad(), fake_quantized(net, {"1": TRAINED}):
        outputs = [net[1](net.train(mode)[0](value, value, value, need_weights=False)[0]) for mode in (True, False)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def rounded_weight(weight):
    step = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    return np.round(weight / step) * step


def rounded_input(value, low, high):
    step = np.float32((high - low) / 255)
    zero = np.round(-low / step)
    return (np.clip(np.round(value / step) + zero, 0, 255) - zero) * step


def by_hand(attention, query, key, value, ranges, mask=None):
    """Attention over (batch, tokens, width) in numpy, each projection on the grid of its range."""
    bias, heads, width = attention.in_proj_bias.detach().numpy(), attention.num_heads, attention.embed_dim
    if attention.in_proj_weight is None:
        weights = [getattr(attention, f"{each}_proj_weight") for each in "qkv"]
        inputs = [ranges[f"{each}_proj"] for each in "qkv"]
    else:
        weights, inputs = attention.in_proj_weight.chunk(3), [ranges["in_proj"]] * 3
    projected = [
        rounded_input(each.numpy(), trained.low, trained.high) @ rounded_weight(weight.detach().numpy()).T + part
        for each, weight, trained, part in zip((query, key, value), weights, inputs, np.split(bias, 3), strict=True)
    ]
    q, k, v = (each.reshape(*each.shape[:2], heads, -1).transpose(0, 2, 1, 3) for each in projected)
    scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width / heads)
    if mask is not None:
        scores = np.where(mask.numpy(), -np.inf, scores)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = (shares @ v).transpose(0, 2, 1, 3).reshape(query.shape[0], query.shape[1], width)
    last = rounded_input(mixed, ranges["out_proj"].low, ranges["out_proj"].high)
    out = attention.out_proj
    return last @ rounded_weight(out.weight.detach().numpy()).T + out.bias.detach().numpy()


def cases():
    generator = torch.Generator().manual_seed(1)
    query, memory, value = (torch.randn(2, tokens, WIDTH, generator=generator) for tokens in (4, 5, 5))
    narrow = torch.randn(2, 5, 6, generator=generator)
    return {
        "self": (nn.MultiheadAttention(WIDTH, 2, batch_first=True), query, query, query),
        "cross": (nn.MultiheadAttention(WIDTH, 2, batch_first=True), query, memory, memory),
        "three": (nn.MultiheadAttention(WIDTH, 2, batch_first=True), query, memory, value),
        "widths": (nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=6), query, narrow, value),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("case", ["self", "cross", "three", "widths"])
def test_projections_are_rounded_as_by_hand(case, need_weights, training):
    torch.manual_seed(0)
    attention, *inputs = cases()[case]
    nn.init.normal_(attention.in_proj_bias)
    names = projections_in(attention)
    ranges = {name: Range(-0.5, 0.7) if name == "out_proj" else Range(-2.0, 1.5 + len(name) / 8) for name in names}
    assert set(names) == ({"q_proj", "k_proj", "v_proj"} if case == "widths" else {"in_proj"}) | {"out_proj"}
    mask = torch.ones(inputs[0].shape[1], inputs[1].shape[1], dtype=torch.bool).triu(1)
    expected = by_hand(attention, *inputs, ranges, mask)
    with torch.no_grad(), fake_quantized(attention.train(training), ranges):
        found, _ = attention(*inputs, attn_mask=mask, need_weights=need_weights)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)
    with torch.no_grad():
        plain, _ = attention(*inputs, attn_mask=mask)
    assert np.abs(plain.numpy() - expected).max() > 0.05


def test_gradients_pass_the_rounding_to_the_attentions_own_parameters():
    net, tokens = encoder(), torch.randn(2, 5, WIDTH)
    keys, parameters = list(net.state_dict()), list(map(id, net.parameters()))
    with fake_quantized(net, ranges(net)):
        assert list(net.state_dict()) == keys
        assert list(map(id, net.parameters())) == parameters
        net(tokens).square().sum().backward()
    for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"):
        assert net.layers[0].self_attn.get_parameter(name).grad.abs().max() > 0
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in net.modules())
    assert not [name for part in net.modules() for name in part.__dict__ if "fake_quant" in name]


def test_copies_and_pickles_round_too_and_with_weights_of_their_own():
    net, tokens = encoder(), torch.randn(2, 5, WIDTH)
    with torch.no_grad(), fake_quantized(net, ranges(net)):
        expected = net(tokens)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(tokens), expected)
            twin.layers[0].self_attn.in_proj_weight.zero_()
            assert not torch.equal(twin(tokens), expected)
        assert torch.equal(net(tokens), expected)


def test_an_error_inside_the_attention_leaves_no_mode():
    net = encoder()
    with fake_quantized(net, ranges(net)):
        with pytest.raises(AssertionError, match="embedding dimension"):
            net(torch.randn(2, 5, WIDTH + 1))
        assert not torch.overrides._get_current_function_mode_stack()


def test_what_is_selected_of_an_attention():
    net = nn.Sequential(encoder().layers[0], nn.Linear(WIDTH, 2))
    inside = ["0.self_attn.in_proj", "0.self_attn.out_proj"]
    assert list(select_quantizable(net, None, None)) == [*inside, "0.linear1", "0.linear2"]
    assert list(select_quantizable(net, None, ["MultiheadAttention"])) == ["0.linear1", "0.linear2"]
    assert list(select_quantizable(net, ["*out_proj"], None)) == inside[1:]
    assert list(select_quantizable(net, ["0.self_attn"], ["*.out_proj"])) == inside[:1]


def test_a_reparametrized_attention_is_refused_by_name():
    net = nn.Sequential(nn.MultiheadAttention(WIDTH, 2), nn.Linear(WIDTH, 2))
    parametrizations.weight_norm(net[0], "in_proj_weight")
    with pytest.raises(IncompatibleCallbacks, match=r"exclude=\['0'\]"):
        select_quantizable(net, None, None)
