"""Our input and weight grids equal ONNX Runtime's QuantizeLinear and DequantizeLinear to the bit, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_compress.quantization.fake import fake_quantize_input, fake_quantize_input_eager, round_weight
from lightning_compress.quantization.grid import Range, integer_weight

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def run(nodes, inputs, initializers, outputs):
    helper = onnx.helper
    graph = helper.make_graph(
        nodes,
        "grid",
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape) for name, value in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()],
        [onnx.numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(outputs), inputs)


@pytest.mark.parametrize("form", [fake_quantize_input, fake_quantize_input_eager])
@pytest.mark.parametrize(
    "trained", [Range(-1.0, 1.55), Range(0.0, 6.0), Range(-0.017, 2.9), Range(-4.0, 4.0)], ids=repr
)
def test_inputs(form, trained):
    scale, zero_point = trained.grid
    ties = (torch.arange(-300, 300) + 0.5) * scale
    value = torch.cat([torch.randn(5000) * 2, ties, torch.nextafter(ties, ties + 1), torch.tensor([0.0, 1e9, -1e9])])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"]),
        onnx.helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["y"]),
    ]
    grid = {"s": np.float32(trained.scale), "z": np.uint8(trained.zero_point)}
    grid = {name: np.asarray(number) for name, number in grid.items()}
    kinds = {"codes": onnx.TensorProto.UINT8, "y": onnx.TensorProto.FLOAT}
    codes, dequantized = run(nodes, {"x": value.numpy()}, grid, kinds)
    got = form(value, scale, zero_point)
    np.testing.assert_array_equal(got.numpy(), dequantized)
    np.testing.assert_array_equal((got / scale).round().numpy() + trained.zero_point, codes)


def test_weights_by_channel():
    torch.manual_seed(0)
    weight = torch.randn(6, 40)
    weight[:, ::3] = 0.0
    weight[4] = 0.0
    weight[0, 1:30] = (torch.arange(29) + 0.5) * weight[0].abs().max() / 127  # as good as ties
    codes, scale = integer_weight(weight)
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["w", "s", "z"], ["codes"], axis=0),
        onnx.helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["y"], axis=0),
    ]
    grid = {"s": scale.numpy(), "z": np.zeros(6, dtype=np.int8)}
    kinds = {"codes": onnx.TensorProto.INT8, "y": onnx.TensorProto.FLOAT}
    their_codes, dequantized = run(nodes, {"w": weight.numpy()}, grid, kinds)
    np.testing.assert_array_equal(codes.numpy(), their_codes)
    np.testing.assert_array_equal(round_weight(weight).numpy(), dequantized)
