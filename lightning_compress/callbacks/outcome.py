"""The end of a monitored fit: what the weights weigh, the files that stay, and what W&B is given."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress import tracking
from lightning_compress.callbacks.contract import SHARDING
from lightning_compress.callbacks.notes import Notes
from lightning_compress.callbacks.overlay import overlay
from lightning_compress.measure.chart import plot_report
from lightning_compress.measure.heatmap import plot_layers
from lightning_compress.measure.layer_states import write_rows
from lightning_compress.measure.report import Measurement, Report
from lightning_compress.measure.size import Count, count_nonzero, count_nonzero_in_parts, file_bytes, zipped_bytes

__all__ = ["Outcome", "measured", "save_files", "show"]

History = Sequence[tuple[int, float, float]]


def measured(
    name: str, trainer: L.Trainer, pl_module: L.LightningModule, counting: bool, with_file: bool
) -> Measurement:
    """Count the weights, and save and zip them. Where the strategy shards, every process calls it, and only counts.

    Args:
        name: of the measurement.
        trainer: of this run.
        pl_module: whose weights.
        counting: whether this process writes a report; others learn nothing, unless all have to count.
        with_file: whether the weights are saved and zipped.
    """
    if isinstance(trainer.strategy, SHARDING):
        count: Count = count_nonzero_in_parts(trainer.strategy.model or pl_module, pl_module)
        return Measurement(name, {}, None, None, count.nonzero, count.total, note="counted over all processes")
    if not counting:
        return Measurement(name)
    count = count_nonzero(pl_module)
    size = zipped = None
    if with_file:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "weights.pt"
            torch.save(pl_module.state_dict(), path)
            size, zipped = file_bytes(path), zipped_bytes(path)
    return Measurement(name, {}, size, zipped, count.nonzero, count.total, note="weights as saved by torch.save")


@dataclass(frozen=True)
class Outcome:
    """What a fit ended with.

    Args:
        step: the loggers' step.
        report: before and after.
        notes: what was seen on the way.
        history: (step, target, actual) of the pruning, if any.
        metric: name and last value of what the size is weighed against.
        ready: whether compression was complete.
    """

    step: int
    report: Report
    notes: Notes
    history: History = ()
    metric: Mapping[str, float] = field(default_factory=dict)
    ready: bool = False

    @property
    def figures(self) -> dict[str, float | None]:
        """Where the run lies among others: size, sparsity and the metric."""
        after = self.report.after
        size = None if after.zipped_bytes is None else float(after.zipped_bytes)
        sparsity = Count(after.nonzero or 0, after.total or 0).sparsity
        return {"compress/size_bytes": size, "compress/sparsity_overall": sparsity, **self.metric}


def save_files(folder: Path, outcome: Outcome, callbacks: Iterable[object]) -> dict[str, Path]:
    """Write report, rows, recipe and, with matplotlib, pictures; return the files by name."""
    files = outcome.report.save(folder)
    rows = outcome.notes.rows
    files["layers.csv"] = write_rows(rows, folder / "layers.csv")
    files["recipe.yaml"] = folder / "recipe.yaml"
    files["recipe.yaml"].write_text(overlay(callbacks), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is not None:
        files["report.png"] = plot_report(outcome.report, folder / "report.png", outcome.history)
        if rows:  # a module may have vectors alone
            files["layers.png"] = plot_layers(rows, folder / "layers.png")
    rank_zero_info("The compression report is in %s", folder)
    return files


def show(run: Any, outcome: Outcome, files: Mapping[str, Path]) -> None:
    """Give a W&B run the history of layers, charts, the trade-off, recipe and report as artifacts, and the summary."""
    step = outcome.step
    tracking.log_layer_history(run, outcome.notes.rows, step)
    if outcome.history:
        tracking.log_schedule_curve(run, outcome.history)
    for key, file in (("compress/chart", "report.png"), ("compress/heat_map", "layers.png")):
        if file in files:
            tracking.log_image(run, key, files[file], step)
    for name in outcome.metric:
        if outcome.notes.trade_off:
            tracking.log_trade_off(run, name, outcome.notes.trade_off, step)
    tracking.log_outcome(run, outcome.figures, step)
    recipe = files["recipe.yaml"]
    tracking.log_artifact(run, f"compression-recipe-{run.id}", "recipe", [recipe])
    report = [file for file in files.values() if file != recipe]
    tracking.log_artifact(run, f"compression-report-{run.id}", "report", report)
    ratio = outcome.report.changes()["zipped_ratio"]
    ended = {"compress/zipped_ratio": ratio, "compress/ready": float(outcome.ready)}
    tracking.log_summary(run, {**outcome.figures, **ended})
