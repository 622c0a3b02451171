"""Weights that are tied in a module: kept once while they are equal, and never exchanged where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_compress import CompressError, fake_quantized
from lightning_compress.packing.reading import load_packed, packed_tensors, unpack
from lightning_compress.packing.writing import pack
from lightning_compress.quantization.grid import FLOAT_BITS, Range
from lightning_compress.quantization.weights import Symmetric

WORDS = torch.arange(30)
RANGE = Range(0.0, 0.0, FLOAT_BITS, 4, Symmetric(4))


class Tied(nn.Module):
    """Words and the layer that names them share a weight; either may be registered first."""

    def __init__(self, head_first=False, tied=True):
        super().__init__()
        torch.manual_seed(0)
        if head_first:
            self.head = nn.Linear(8, 30, bias=False)
        self.words = nn.Embedding(30, 8)
        if not head_first:
            self.head = nn.Linear(8, 30, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words):
        return self.head(self.words(words))


@pytest.mark.parametrize("head_first", [False, True])
def test_a_head_that_is_rounded_alone_is_kept_apart_from_its_words(head_first, tmp_path):
    module = Tied(head_first)
    with torch.no_grad(), fake_quantized(module, {"head": RANGE}):
        expected = module(WORDS)
    path = pack(module, tmp_path / "a", ranges={"head": RANGE})
    state = unpack(path)
    assert torch.equal(state["words.weight"], module.words.weight)
    assert torch.equal(functional.linear(state["words.weight"], state["head.weight"]), expected)
    untied = load_packed(Tied(head_first, tied=False), path)
    with torch.no_grad():
        assert torch.equal(untied(WORDS), expected)
    with pytest.raises(CompressError, match=r"'\w+\.weight' and '\w+\.weight' are one tensor in this Tied.*untie"):
        load_packed(module, path)
    assert torch.equal(module.words.weight, Tied(head_first).words.weight)


def test_a_file_of_weights_that_differ_is_not_loaded_into_tied_ones(tmp_path):
    path = pack(Tied(tied=False), tmp_path / "a")
    with pytest.raises(CompressError, match=r"'head\.weight' and 'words\.weight' are one tensor.*differ"):
        load_packed(Tied(), path)


def test_a_layer_in_two_places_is_rounded_in_both_and_kept_once(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    module = nn.Sequential(layer, nn.ReLU(), layer)
    with torch.no_grad(), fake_quantized(module, {"0": RANGE}):
        expected = module(torch.eye(8))
    path = pack(module, tmp_path / "a", ranges={"0": RANGE})
    assert [told.name for told in packed_tensors(path)] == ["0.weight"]
    with torch.no_grad():
        assert torch.equal(load_packed(module, path)(torch.eye(8)), expected)
