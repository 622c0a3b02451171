"""Int8 files of attention: projections are layers in them, products of activations are refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.export.onnx import export_onnx
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import OutputRange, rounded_as_trained

onnxruntime = pytest.importorskip("onnxruntime")
WIDTH = 8
TRAINED = Range(-3.0, 3.0)
PROJECTIONS = {"layers.0.self_attn.in_proj": TRAINED, "layers.0.self_attn.out_proj": Range(-1.0, 1.0)}


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


def test_a_file_holds_the_projections_as_they_were_trained(tmp_path):
    net, tokens = encoder(), torch.randn(2, 5, WIDTH)
    path = export_onnx(net, tmp_path / "net.onnx", (tokens,), ranges=PROJECTIONS, verify=False)
    options = onnxruntime.SessionOptions()  # what the file says, free of the saturation of x86 CPUs without VNNI
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (written,) = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    with torch.no_grad(), rounded_as_trained(net, PROJECTIONS):
        expected = net(tokens)
    with torch.no_grad():
        unrounded = net(tokens)
    torch.testing.assert_close(torch.from_numpy(written), expected, rtol=0, atol=1e-5)
    assert (expected - unrounded).abs().max() > 1e-2


def test_ranges_of_products_are_refused_with_the_cure(tmp_path):
    ranges = {**PROJECTIONS, "layers.0.self_attn:product0.left": OutputRange(-1.0, 1.0)}
    with pytest.raises(ValueError, match=r"'layers.0.self_attn:product0.left'.*':product' not in key"):
        export_onnx(encoder(), tmp_path / "net.onnx", (torch.randn(2, 5, WIDTH),), ranges=ranges)
