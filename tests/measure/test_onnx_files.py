from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress import compare_onnx, export_onnx
from lightning_compress.measure import predict_onnx


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module, nn.Module]:
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3)) for _ in range(2)]
    with torch.no_grad():
        nets[1][0].weight[:, :5] = 0.0
    example = torch.randn(4, 6)
    paths = [export_onnx(net, folder / f"{index}.onnx", (example,)) for index, net in enumerate(nets)]
    return paths[0], paths[1], nets[0], nets[1]


def test_report_holds_what_the_files_do(files: tuple[Path, Path, nn.Module, nn.Module]) -> None:
    before, after, dense, sparse = files
    inputs, labels = torch.randn(203, 6), torch.randint(0, 3, (203,))
    report = compare_onnx(before, after, (inputs,), labels, batch_size=50, runs=3)
    for measured, net, path in ((report.before, dense, before), (report.after, sparse, after)):
        wanted = (net(inputs).argmax(1) == labels).float().mean().item()
        assert measured.accuracy["ONNX file"] == pytest.approx(wanted, abs=1.5 / 203)
        assert measured.size_bytes == path.stat().st_size
    assert report.after.total == 6 * 64 + 64 * 3
    assert report.after.nonzero == 64 + 64 * 3
    assert report.after.latency is not None
    assert report.after.latency.threads == 1
    assert report.changes()["speedup"] > 0
    flips = (dense(inputs).argmax(1) != sparse(inputs).argmax(1)).nonzero()[:, 0].tolist()
    assert report.differences is not None
    assert sorted(flip.index for flip in report.differences.flips) == flips
    rows = {row.name: row.after.sparsity for row in report.layers if row.after is not None}
    assert rows == {"0.weight": pytest.approx(5 / 6), "2.weight": 0.0}
    assert report.before.entropy_bytes is not None
    # All weights but 5 / 6 of the first layer's differ: log2 of how many there are, for each.
    assert report.before.entropy_bytes > report.after.entropy_bytes > 64 * 3 * math.log2(64 * 3) / 8


def test_predictions_are_those_of_the_module_whatever_the_batch(
    files: tuple[Path, Path, nn.Module, nn.Module],
) -> None:
    path, _, net, _ = files
    inputs = torch.randn(7, 6)
    for batch_size in (1, 3, 100):
        got = predict_onnx(path, inputs, batch_size=batch_size)
        np.testing.assert_allclose(got, net(inputs).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_wrong_number_of_inputs_is_named(files: tuple[Path, Path, nn.Module, nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"expected 1 arrays for the inputs .* got 2"):
        predict_onnx(files[0], np.zeros((1, 6)), np.zeros((1, 6)))


def test_wrong_labels_and_missing_files_are_named(files: tuple[Path, Path, nn.Module, nn.Module]) -> None:
    before, after, _, _ = files
    with pytest.raises(ValueError, match="each of the 5 examples, got 3"):
        compare_onnx(before, after, (torch.randn(5, 6),), torch.zeros(3), runs=1)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx"):
        compare_onnx(before, "nowhere.onnx", (torch.randn(5, 6),), torch.zeros(5), runs=1)


def test_inputs_may_be_the_dict_that_was_exported(files: tuple[Path, Path, nn.Module, nn.Module]) -> None:
    before, after, _, _ = files
    inputs, labels = torch.randn(5, 6), torch.zeros(5)
    by_name = compare_onnx(before, after, {"input": inputs}, labels, runs=1)
    by_place = compare_onnx(before, after, (inputs,), labels, runs=1)
    assert by_name.after.accuracy == by_place.after.accuracy
