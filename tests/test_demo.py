"""The demo is run as `make demo` runs it, in half its epochs; its report must keep the promises of the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_compress.demo import main
from lightning_compress.demo_data import load_fashion_mnist
from lightning_compress.export.onnx import kernel_counts


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(folder / name.lower()))
        assert main(["--out", str(folder), "--epochs", "8"]) == 0
    return folder


@pytest.fixture
def report(demo: Path) -> dict[str, Any]:
    return json.loads((demo / "report.json").read_text(encoding="utf-8"))


def test_int8_file_is_as_accurate_as_dense_within_what_1000_images_tell(report: dict[str, Any]) -> None:
    assert report["before"]["accuracy"]["ONNX file"] > 0.8
    # +1.2 on one processor, -1.5 on another; two standard errors of the difference are at most 3.4 points.
    assert report["changes"]["accuracy_points"]["ONNX file"] >= -3.4


def test_zipped_int8_file_is_ten_times_smaller(report: dict[str, Any]) -> None:
    assert report["before"]["size_bytes"] / report["after"]["zipped_bytes"] >= 10
    assert report["before"]["zipped_bytes"] / report["after"]["zipped_bytes"] >= 10


def test_sparsity_is_exact_to_one_weight(report: dict[str, Any]) -> None:
    zeros, _, total = report["about"]["pruned"].split()[:3]
    assert int(zeros) == round(0.9 * int(total))


def test_file_agrees_with_the_trained_model(report: dict[str, Any]) -> None:
    assert float(report["about"]["agreement"].split("for ")[1].split("%")[0]) >= 99.5


def test_every_layer_of_the_body_runs_in_an_int8_kernel(demo: Path) -> None:
    counts = kernel_counts(demo / "compressed_int8.onnx")
    assert counts["QLinearConv"] == 3
    assert counts["QGemm"] == 1
    assert "Conv" not in counts
    assert counts.get("Gemm", 0) + counts.get("MatMul", 0) <= 1  # the head


def test_everything_it_names_is_there(demo: Path) -> None:
    names = {"report.md", "report.json", "report.png", "dense_fp32.onnx", "compressed_int8.onnx"}
    assert names <= {path.name for path in demo.iterdir()}
    assert list(demo.glob("wandb/offline-run-*/*.wandb"))


def test_wrong_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--epochs", "1"])
    assert "at least 3" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte"):
        load_fashion_mnist(str(tmp_path))
