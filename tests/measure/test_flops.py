"""Multiply-accumulates against formulas by hand, against torch's count of cells, and against fvcore."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_compress.measure import count_macs, effective_macs, macs_by_module
from lightning_compress.measure.flops import macs_per_weight


def resnet18():
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    config = ResNetConfig(**sizes, layer_type="basic", num_labels=1000)
    return ResNetForImageClassification(config).eval(), {"pixel_values": torch.zeros(2, 3, 64, 64)}


def resnet18_by_hand(batch, side):
    """7x7 stem, four stages of two blocks of two 3x3, a 1x1 where the width grows, and the head."""
    side //= 2
    total = side**2 * 64 * 3 * 49
    side, width = side // 2, 64
    for stage, wide in enumerate((64, 128, 256, 512)):
        side = side if stage == 0 else side // 2
        total += side**2 * (wide * width * 9 + 3 * wide * wide * 9)
        total += 0 if stage == 0 else side**2 * wide * width
        width = wide
    return batch * (total + 512 * 1000)


def mobilenet_v2():
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    net = MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000)).eval()
    return net, {"pixel_values": torch.zeros(2, 3, 64, 64)}


def mobilenet_v2_by_hand(batch, side):
    """Table 2 of the paper: expansion, channels, blocks, stride."""
    side //= 2
    total, width = side**2 * 32 * 3 * 9, 32
    table = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, channels, blocks, stride in table:
        for block in range(blocks):
            inner = width * expansion
            total += side**2 * width * inner if expansion > 1 else 0
            side = side // stride if block == 0 else side
            total += side**2 * (9 * inner + inner * channels)
            width = channels
    return batch * (total + side**2 * width * 1280 + 1280 * 1000)


def bert(attention="eager"):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    config = BertConfig(**sizes, vocab_size=100, num_labels=3, attn_implementation=attention)
    return BertForSequenceClassification(config).eval(), {"input_ids": torch.zeros(2, 24, dtype=torch.long)}


def bert_by_hand(batch, tokens, width=64, layers=3, wide=256, labels=3):
    """Four projections, the scores and their sums of values, two layers of the network; the pooler and the head."""
    one = 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * wide
    return batch * (layers * one + width**2 + width * labels)


ARCHITECTURES = {
    "ResNet-18": (resnet18, resnet18_by_hand(2, 64)),
    "MobileNetV2": (mobilenet_v2, mobilenet_v2_by_hand(2, 64)),
    "BERT": (bert, bert_by_hand(2, 24)),
    "BERT, fused attention": (lambda: bert("sdpa"), bert_by_hand(2, 24)),
}


def test_the_formulas_by_hand_give_the_published_numbers():
    assert resnet18_by_hand(1, 224) == 1_814_073_344  # "1.8 G" of He et al. 2015, table 1
    assert mobilenet_v2_by_hand(1, 224) == 300_774_272  # "300M" of Sandler et al. 2018, table 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_networks_have_the_macs_of_the_formulas(name):
    make, expected = ARCHITECTURES[name]
    net, kwargs = make()
    assert count_macs(net, kwargs=kwargs) == expected
    by_module = macs_by_module(net, kwargs=kwargs)
    assert sum(by_module.values()) == expected
    assert by_module.keys() <= dict(net.named_modules()).keys()
    assert not any(hooks for layer in net.modules() for hooks in (layer._forward_hooks, layer._forward_pre_hooks))


@pytest.mark.optional
@pytest.mark.parametrize("name", ["ResNet-18", "MobileNetV2", "BERT"])
def test_fvcore_counts_the_same(name):
    fvcore = pytest.importorskip("fvcore.nn", reason="pip install fvcore")
    net, kwargs = ARCHITECTURES[name][0]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit.trace, which fvcore counts by
        counted = fvcore.FlopCountAnalysis(net, tuple(kwargs.values())).unsupported_ops_warnings(False)
        by_operator = counted.by_operator()
    products = {"conv", "linear", "addmm", "matmul", "bmm"}  # it counts norms and poolings too
    assert count_macs(net, kwargs=kwargs) == sum(n for operator, n in by_operator.items() if operator in products)


def recurrent_by_hand(layer, steps):
    """Of each gate: inputs x hidden and hidden x hidden at each step; a projection is one more product."""
    gates = {"LSTM": 4, "GRU": 3}.get(type(layer).__name__, 1)
    directions = 2 if layer.bidirectional else 1
    hidden, proj = layer.hidden_size, getattr(layer, "proj_size", 0)
    state, total, width = proj or hidden, 0, layer.input_size
    for _ in range(layer.num_layers):
        total += directions * (gates * hidden * (width + state) + hidden * proj)
        width = state * directions
    return steps * total


RECURRENT = {
    "GRU": lambda: nn.GRU(5, 7),
    "GRU, two layers both ways": lambda: nn.GRU(5, 7, 2, bidirectional=True, batch_first=True),
    "LSTM": lambda: nn.LSTM(5, 7),
    "LSTM without biases": lambda: nn.LSTM(5, 7, 2, bias=False),
    "LSTM, two layers both ways": lambda: nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True),
    "LSTM projected": lambda: nn.LSTM(5, 7, proj_size=3),
    "RNN": lambda: nn.RNN(5, 7, 3, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers_have_the_macs_of_their_gates(name, training):
    layer = RECURRENT[name]().train(training)
    x = torch.zeros(3, 4, 5)
    assert count_macs(layer, (x,)) == recurrent_by_hand(layer, 12) > 0
    assert macs_by_module(layer, (x,)) == {"": recurrent_by_hand(layer, 12)}


def test_a_packed_sequence_counts_its_own_steps():
    layer = nn.LSTM(5, 7)
    packed = nn.utils.rnn.pack_padded_sequence(torch.zeros(4, 3, 5), torch.tensor([4, 2, 1]))
    assert count_macs(layer, (packed,)) == recurrent_by_hand(layer, 7)


def test_an_lstm_has_the_macs_of_its_cell_at_each_step():
    layer, cell = nn.LSTM(5, 7), nn.LSTMCell(5, 7)
    assert count_macs(layer, (torch.zeros(6, 2, 5),)) == 6 * count_macs(cell, (torch.zeros(2, 5),))


class Twice(nn.Module):
    """A layer that is called twice, a product of its own, and a layer that calls another."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.extra = nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        return self.block(self.shared(self.shared(x))) @ self.extra


def test_each_module_has_its_own_macs_alone():
    expected = {"": 5 * 6, "shared": 2 * 5 * 16, "block.0": 5 * 32, "block.2": 5 * 16}
    assert macs_by_module(Twice(), (torch.zeros(5, 4),)) == expected


def test_a_compiled_module_counts_as_it_would_uncompiled():
    net, x = Twice(), torch.zeros(5, 4)
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    assert count_macs(compiled, (x,)) == count_macs(net, (x,))
    assert macs_by_module(compiled, (x,)) == macs_by_module(net, (x,))
    assert effective_macs(compiled, (x,)) == count_macs(net, (x,))


def test_a_forward_that_fails_leaves_no_hook():
    net = Twice()
    with pytest.raises(RuntimeError):
        macs_by_module(net, (torch.zeros(5, 3),))
    assert not any(hooks for layer in net.modules() for hooks in (layer._forward_hooks, layer._forward_pre_hooks))


def test_macs_need_no_values():
    with torch.device("meta"):
        net, x = Twice(), torch.zeros(5, 4)
    assert count_macs(net, (x,)) == 5 * (2 * 16 + 32 + 16 + 6)
    with pytest.raises(ValueError, match="'extra' on the meta device"):
        effective_macs(net, (x,))


def pruned(module, seed=0, keep=0.3):
    """Zero most of each weight, biases too, which are no products."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1.0).mul_(torch.rand(parameter.shape, generator=generator) < keep)
    return module


@pytest.mark.parametrize("name", ["ResNet-18", "MobileNetV2"])
def test_effective_macs_are_positions_times_nonzero_weights(name):
    net, kwargs = ARCHITECTURES[name][0]()
    pruned(net)
    weights = dict(net.named_parameters())
    expected = sum(n * int((weights[w] != 0).sum()) for w, n in macs_per_weight(net, kwargs=kwargs).items())
    assert effective_macs(net, kwargs=kwargs) == expected
    assert 0.28 < expected / count_macs(net, kwargs=kwargs) < 0.32


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_keeps_its_products_of_activations(attention):
    net, kwargs = bert(attention)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert effective_macs(net, kwargs=kwargs) == 2 * 3 * 2 * 24**2 * 64


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_effective_macs_of_recurrent_layers(name):
    layer = pruned(RECURRENT[name]())
    kept = sum(int((weight != 0).sum()) for weight in layer.parameters() if weight.dim() == 2)
    assert effective_macs(layer, (torch.zeros(3, 4, 5),)) == 12 * kept


def test_effective_macs_of_a_layer_of_attention():
    layer = pruned(nn.MultiheadAttention(8, 2, batch_first=True)).eval()
    x = torch.zeros(3, 5, 8)
    kept = int((layer.in_proj_weight != 0).sum()) + int((layer.out_proj.weight != 0).sum())
    assert effective_macs(layer, (x, x, x)) == 3 * 5 * kept + 2 * 3 * 5 * 5 * 8


class Products(nn.Module):
    """Weights on the left, on both sides, in batches, grouped and transposed convolutions, and one that is computed."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(6, 3))
        self.many = nn.Parameter(torch.ones(2, 3, 4))
        self.up = nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2)
        self.computed = nn.Parameter(torch.ones(5, 4))

    def forward(self, x):  # x: (2, 4, 3)
        both = self.left @ self.right  # (4, 3)
        batched = torch.bmm(x, self.many)  # (2, 4, 4)
        return both.sum() + batched.sum() + self.up(x).sum() + (x[0].T @ (self.computed * 2).T).sum()


def test_effective_macs_whichever_side_the_weight_is_on():
    net, x = pruned(Products()), torch.ones(2, 4, 3)
    a, b = (net.left != 0).double(), (net.right != 0).double()
    expected = int((a @ b).sum()) + 4 * int((net.many != 0).sum()) + 2 * 3 * int((net.up.weight != 0).sum()) + 3 * 4 * 5
    assert effective_macs(net, (x,)) == expected
    assert count_macs(net, (x,)) == 4 * 6 * 3 + 2 * 4 * 3 * 4 + 2 * 3 * 4 * 3 * 3 + 3 * 4 * 5


def test_a_weight_of_sparse_layout_counts_as_dense():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4).to_sparse_coo())

        def forward(self, x):
            return torch.sparse.mm(self.weight, x)

    assert effective_macs(Sparse(), (torch.ones(4, 3),)) == count_macs(Sparse(), (torch.ones(4, 3),))


class Experts(nn.Module):
    """Ten rows go to three experts, and a product of integers besides."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.ones(3, 8, 16, dtype=torch.bfloat16))

    def forward(self, x):
        ends = torch.tensor([2, 2, 10], dtype=torch.int32)
        rows = nn.functional.grouped_mm(x, self.experts, offs=ends)
        batches = nn.functional.grouped_mm(x.expand(3, 10, 8), self.experts)
        codes = torch.ones(17, 8, dtype=torch.int8)
        return rows, batches, torch._int_mm(codes, codes.T[:, :16].contiguous())


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="torch has it since 2.10")
def test_products_of_experts_and_of_integers_count():
    x = torch.ones(10, 8, dtype=torch.bfloat16)
    assert count_macs(Experts(), (x,)) == 10 * 8 * 16 + 3 * 10 * 8 * 16 + 17 * 8 * 16
