"""The entropy bound against NumPy by hand, and against what real coders make of the same bytes."""

from __future__ import annotations

import lzma
import math
import zlib

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from lightning_compress.measure import entropy_bound_bytes, entropy_bound_bytes_onnx


def by_hand(values):
    _, counts = np.unique(np.asarray(values), return_counts=True)
    return float(sum(n * math.log2(counts.sum() / n) for n in counts)) / 8


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.lists(st.integers(-3, 3), max_size=30), min_size=1, max_size=3))
def test_it_is_the_sum_over_tensors_of_n_times_the_entropy(parts):
    tensors = {str(i): torch.tensor(part, dtype=torch.float32) for i, part in enumerate(parts)}
    assert entropy_bound_bytes(tensors) == pytest.approx(sum(by_hand(part) for part in parts), abs=1e-9)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64]
)
def test_any_dtype_and_layout_has_the_bound_of_its_values(dtype):
    values = torch.randint(-4, 4, (6, 50), generator=torch.Generator().manual_seed(0))
    expected = by_hand(values)
    for laid_out in (values, values.t(), values[:, None]):
        assert entropy_bound_bytes({"w": laid_out.to(dtype)}) == pytest.approx(expected)


def test_special_values_are_told_apart_by_their_bits():
    nan = float("nan")
    assert entropy_bound_bytes({"w": torch.tensor([nan, nan, nan, nan])}) == 0.0
    assert entropy_bound_bytes({"w": torch.tensor([nan, nan, 1.0, 1.0])}) == 4 / 8
    assert entropy_bound_bytes({"w": torch.tensor([0.0, -0.0, 0.0, -0.0])}) == 4 / 8
    patterns = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert patterns.isnan().all()
    assert entropy_bound_bytes({"w": patterns}) == 2 / 8


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([True, False]), 2 / 8),
        (torch.tensor([1 + 2j, 1 + 2j, 1 - 2j, 2 + 1j]), 6 / 8),
        (torch.tensor([1 + 2j, 1 + 2j, 1 - 2j, 2 + 1j], dtype=torch.complex128), 6 / 8),
        (torch.zeros(0, 3), 0.0),
        (torch.tensor(7.0), 0.0),
        (torch.nn.Parameter(torch.arange(4.0)), 1.0),
        (torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn), 2 / 8),
    ],
)
def test_other_kinds_of_tensors(values, expected):
    assert entropy_bound_bytes({"w": values}) == expected


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9])
def test_no_coder_beats_it_on_independent_bytes(zeros):
    """The bound is of the shares that were drawn, and these coders have to write them down, or learn them, besides."""
    rng = np.random.default_rng(0)
    codes = np.where(rng.random(200_000) < zeros, 0, np.round(rng.normal(0, 12, 200_000))).astype(np.int8)
    bound = entropy_bound_bytes({"codes": torch.from_numpy(codes)})
    real = {"zlib": len(zlib.compress(codes.tobytes(), 9)), "lzma": len(lzma.compress(codes.tobytes(), preset=9))}
    assert min(real.values()) >= bound
    assert min(real.values()) < 1.25 * bound  # and the bound is near enough to mean something


def test_a_pattern_is_below_it_as_the_docstring_says():
    codes = torch.arange(256).repeat(500).to(torch.uint8)
    assert len(zlib.compress(codes.numpy().tobytes(), 9)) < entropy_bound_bytes({"codes": codes}) / 10


def onnx_file(path):
    """An initializer of int8, one of 4 bits, one of floats with NaN, and one in a branch."""
    rng = np.random.default_rng(1)
    int8 = rng.integers(-5, 5, (20, 30)).astype(np.int8)
    floats = np.array([np.nan, np.nan, 1.0, 0.0], dtype=np.float32)
    nibbles = rng.integers(-8, 8, 64)
    branch = rng.integers(0, 3, 40).astype(np.float32)
    inner = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["b"])],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, [40])],
        [numpy_helper.from_array(branch, "inner")],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)],
        "graph",
        [helper.make_tensor_value_info("condition", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [40])],
        [
            numpy_helper.from_array(int8, "int8"),
            numpy_helper.from_array(floats, "floats"),
            helper.make_tensor("nibbles", TensorProto.INT4, [64], nibbles),
        ],
    )
    onnx.save(helper.make_model(graph), path)
    return by_hand(int8) + 6 / 8 + by_hand(nibbles) + 2 * by_hand(branch)


def test_an_onnx_file_has_the_bound_of_its_initializers(tmp_path):
    path = tmp_path / "model.onnx"
    expected = onnx_file(path)
    assert entropy_bound_bytes_onnx(path) == pytest.approx(expected)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        entropy_bound_bytes_onnx(tmp_path / "none.onnx")
