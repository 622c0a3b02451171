"""torch's attention modules have fast paths for evaluation that must not pass our hooks by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.quantization.attach import fake_quantized
from lightning_compress.quantization.grid import Range

WIDTH, TRAINED = 8, Range(-3.0, 3.0)


def encoder(norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def ranges(net):
    return {f"layers.{index}.{name}": TRAINED for index in (0, 1) for name in ("linear1", "linear2")}


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
