"""How well: size, latency, and the report and chart that put them side by side."""

from __future__ import annotations

from lightning_compress.measure.agreement import Agreement, MeanDivergence
from lightning_compress.measure.chart import plot_pruning_curve, plot_report
from lightning_compress.measure.latency import Latency, compare_latency, measure_latency
from lightning_compress.measure.onnx_files import compare_onnx, predict_onnx
from lightning_compress.measure.report import Measurement, Report, Row, compare
from lightning_compress.measure.size import (
    Count,
    LayerRow,
    count_nonzero,
    count_nonzero_onnx,
    file_bytes,
    per_layer,
    zipped_bytes,
)

__all__ = [
    "Agreement",
    "Count",
    "Latency",
    "LayerRow",
    "MeanDivergence",
    "Measurement",
    "Report",
    "Row",
    "compare",
    "compare_latency",
    "compare_onnx",
    "count_nonzero",
    "count_nonzero_onnx",
    "file_bytes",
    "measure_latency",
    "per_layer",
    "plot_pruning_curve",
    "plot_report",
    "predict_onnx",
    "zipped_bytes",
]
