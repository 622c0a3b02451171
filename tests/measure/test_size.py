"""Bytes and non-zero weights against zlib, the zip tool's format and NumPy."""

from __future__ import annotations

import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from lightning_compress.measure.size import (
    Count,
    count_nonzero,
    count_nonzero_onnx,
    file_bytes,
    per_layer,
    zipped_bytes,
)

onnx = pytest.importorskip("onnx")


def sparse_bytes(seed: int, length: int) -> bytes:
    random = np.random.default_rng(seed)
    values = random.integers(-128, 128, length, dtype=np.int8)
    values[random.random(length) < 0.9] = 0
    return values.tobytes()


def test_file_bytes_of_a_file_and_of_a_folder(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.bin").write_bytes(b"x" * 17)
    (tmp_path / "deep" / "b.bin").write_bytes(b"x" * 5)
    assert file_bytes(tmp_path / "a.bin") == 17
    assert file_bytes(tmp_path) == 22


def test_zipped_bytes_is_the_deflated_payload_and_the_headers_of_the_format(tmp_path):
    data = sparse_bytes(0, 50_000)
    (tmp_path / "weights.bin").write_bytes(data)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    payload = len(deflate.compress(data) + deflate.flush())
    headers = (30 + 11) + (46 + 11) + 22  # local entry, central directory, its end; 11 is the name
    assert zipped_bytes(tmp_path / "weights.bin") == payload + headers


def test_zipped_bytes_of_a_folder_is_that_of_one_archive_with_all_of_it(tmp_path):
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.bin").write_bytes(sparse_bytes(1, 3000))
    (folder / "deep" / "b.bin").write_bytes(sparse_bytes(2, 4000))
    with zipfile.ZipFile(tmp_path / "own.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.write(folder / "a.bin", "a.bin")
        archive.write(folder / "deep" / "b.bin", "deep/b.bin")
    assert zipped_bytes(folder) == (tmp_path / "own.zip").stat().st_size


@pytest.mark.parametrize("measure", [file_bytes, zipped_bytes])
def test_nothing_there_is_named(tmp_path, measure):
    with pytest.raises(FileNotFoundError, match=r"nothing\.onnx"):
        measure(tmp_path / "nothing.onnx")


shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0)
values = st.sampled_from([0.0, -0.0, 1.0, -2.5, float("nan"), float("inf"), 1e-45])


@given(st.lists(hnp.arrays(np.float32, shapes, elements=values), max_size=4))
def test_count_nonzero_is_numpys_count(arrays):
    state = {str(i): torch.from_numpy(array.copy()) for i, array in enumerate(arrays)}
    expected = Count(sum(int(np.count_nonzero(a)) for a in arrays), sum(a.size for a in arrays))
    assert count_nonzero(state) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float64])
def test_count_nonzero_takes_every_dtype(dtype):
    assert count_nonzero({"w": torch.tensor([0, 1, 0, 1, 1]).to(dtype)}) == Count(3, 5)


def tied_model() -> nn.Module:
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 7), nn.BatchNorm1d(7))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[2:] = 0.0
    return model


def test_tied_weights_count_once_and_buffers_do_not():
    model = tied_model()
    parameters = [p.detach().numpy() for p in (model[0].weight, model[1].bias, model[2].weight, model[2].bias)]
    expected = Count(sum(int(np.count_nonzero(p)) for p in parameters), sum(p.size for p in parameters))
    assert count_nonzero(model) == expected
    weights = {name: value for name, value in model.state_dict().items() if "running" not in name}
    weights.pop("2.num_batches_tracked")
    assert count_nonzero(weights) == expected


def test_equal_tensors_that_are_not_tied_count_twice():
    assert count_nonzero({"a": torch.ones(4), "b": torch.ones(4)}) == Count(8, 8)


def test_sparsity_is_the_fraction_of_zeros():
    assert Count(1, 4).sparsity == 0.75
    assert Count(0, 0).sparsity == 0.0


def test_per_layer_has_a_row_for_each_parameter():
    rows = per_layer(tied_model())
    assert [row.name for row in rows] == ["0.weight", "1.bias", "2.weight", "2.bias"]
    embedding = rows[0]
    assert (embedding.shape, embedding.total, embedding.nonzero, embedding.bits) == ((7, 3), 21, 6, 32)
    assert embedding.sparsity == pytest.approx(15 / 21)


def test_per_layer_takes_names_of_tied_parameters_and_widths():
    rows = per_layer(tied_model().to(torch.bfloat16), ["2.bias", "1.weight"], bits={"1.weight": 8})
    assert [(row.name, row.bits) for row in rows] == [("2.bias", 16), ("1.weight", 8)]


@pytest.mark.parametrize("arguments", [{"names": ["0.wieght"]}, {"bits": {"0.wieght": 8}}])
def test_per_layer_names_the_parameter_it_does_not_know(arguments):
    with pytest.raises(ValueError, match=r"got '0\.wieght'; take them from named_parameters"):
        per_layer(tied_model(), **arguments)


def onnx_file(path, weight, zero_point=None, axis=None):
    """A graph that multiplies by `weight`, through a DequantizeLinear where there is a zero point."""
    arrays = {"w": weight, "bias": np.zeros(weight.shape[-1], np.float32)}
    nodes = [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])]
    if zero_point is not None:
        arrays |= {"zero_point": zero_point, "scale": np.ones(zero_point.shape, np.float32)}
        options = {} if axis is None else {"axis": axis}
        dequantize = onnx.helper.make_node("DequantizeLinear", ["w", "scale", "zero_point"], ["w_float"], **options)
        nodes = [dequantize, onnx.helper.make_node("MatMul", ["x", "w_float"], ["y"])]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xy")
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(onnx.helper.make_model(graph), path)
    return path


def test_onnx_weights_are_counted_without_biases_and_scales(tmp_path):
    weight = np.array([[0, 1, 2], [0, 0, -3]], np.float32)
    assert count_nonzero_onnx(onnx_file(tmp_path / "m.onnx", weight)) == Count(3, 6)
    assert count_nonzero_onnx(tmp_path / "m.onnx", min_dims=1) == Count(3, 9)


@pytest.mark.parametrize(
    ("zero_point", "axis", "broadcast"),
    [
        (np.array(0, np.uint8), None, (1, 1)),
        (np.array(7, np.uint8), None, (1, 1)),
        (np.array([7, 0], np.uint8), 0, (2, 1)),
        (np.array([7, 3, 0], np.uint8), None, (1, 3)),  # 1 is the operator's own axis
        (np.array([7, 3, 0], np.uint8), -1, (1, 3)),
    ],
)
def test_a_quantized_weight_is_zero_at_its_zero_point(tmp_path, zero_point, axis, broadcast):
    weight = np.array([[0, 7, 7], [7, 3, 0]], np.uint8)
    real = weight.astype(int) - zero_point.astype(int).reshape(broadcast)
    path = onnx_file(tmp_path / "m.onnx", weight, zero_point, axis)
    assert count_nonzero_onnx(path) == Count(int(np.count_nonzero(real)), 6)


def test_without_onnx_the_cure_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-compress\[onnx\]"'):
        count_nonzero_onnx(tmp_path / "m.onnx")
