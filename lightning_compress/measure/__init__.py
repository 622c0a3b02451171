"""How well: one number a file and how it is measured, and the report and chart that put them side by side."""

from __future__ import annotations

from lightning_compress.measure.agreement import Agreement, Flips, MeanDivergence
from lightning_compress.measure.attributions import Attributions
from lightning_compress.measure.calibration import CalibrationGap, calibration_error
from lightning_compress.measure.chart import plot_pruning_curve, plot_report
from lightning_compress.measure.differences import Differences, Flip, SliceRow, compare_predictions, mcnemar_p
from lightning_compress.measure.energy import Energy, measure_energy
from lightning_compress.measure.entropy import entropy_bound_bytes, entropy_bound_bytes_onnx
from lightning_compress.measure.examples import Examples
from lightning_compress.measure.explain import compare_attributions
from lightning_compress.measure.flops import count_macs, effective_macs, macs_by_module
from lightning_compress.measure.latency import Latency, compare_latency, faster, latency_of, measure_latency
from lightning_compress.measure.layers import LayerChange, layer_changes
from lightning_compress.measure.memory import PeakMemory, peak_memory
from lightning_compress.measure.onnx_files import compare_onnx, predict_onnx
from lightning_compress.measure.report import Measurement, Report, Row, compare
from lightning_compress.measure.size import (
    Count,
    LayerRow,
    count_nonzero,
    count_nonzero_onnx,
    file_bytes,
    per_layer,
    per_layer_onnx,
    zipped_bytes,
)

__all__ = [
    "Agreement",
    "Attributions",
    "CalibrationGap",
    "Count",
    "Differences",
    "Energy",
    "Examples",
    "Flip",
    "Flips",
    "Latency",
    "LayerChange",
    "LayerRow",
    "MeanDivergence",
    "Measurement",
    "PeakMemory",
    "Report",
    "Row",
    "SliceRow",
    "calibration_error",
    "compare",
    "compare_attributions",
    "compare_latency",
    "compare_onnx",
    "compare_predictions",
    "count_macs",
    "count_nonzero",
    "count_nonzero_onnx",
    "effective_macs",
    "entropy_bound_bytes",
    "entropy_bound_bytes_onnx",
    "faster",
    "file_bytes",
    "latency_of",
    "layer_changes",
    "macs_by_module",
    "mcnemar_p",
    "measure_energy",
    "measure_latency",
    "peak_memory",
    "per_layer",
    "per_layer_onnx",
    "plot_pruning_curve",
    "plot_report",
    "predict_onnx",
    "zipped_bytes",
]
