"""CompressionMonitor: what the run's compression did, through any logger; tables, chart and report on W&B."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_compress import tracking
from lightning_compress.callbacks.contract import SHARDING
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.errors import NothingToCompress
from lightning_compress.measure.chart import plot_report
from lightning_compress.measure.report import Measurement, Report, compare
from lightning_compress.measure.size import (
    Count,
    LayerRow,
    count_nonzero,
    count_nonzero_in_parts,
    file_bytes,
    per_layer,
    zipped_bytes,
)
from lightning_compress.quantization.outputs import outputs_of
from lightning_compress.quantization.projections import weight_names

__all__ = ["CompressionMonitor"]


@runtime_checkable
class Compression(Protocol):
    """A callback of this package that compresses: it has a recipe, and says when it is done."""

    enabled: bool
    complete: bool

    def recipe(self) -> dict[str, Any]:
        """Return the options as primitives."""
        ...


class CompressionMonitor(L.Callback):
    """Log when compression is complete (`compress/ready`), and at the end what it did to the weights and their file.

    Runs at the end of each training batch and of the fit. Every logger gets `compress/ready` and
    `compress/size_bytes` (the weights as saved and zipped, measured); a folder gets `report.md`, `report.json`
    and, with matplotlib, `report.png`; a W&B run also gets the table of layers, the schedule's curve, the chart, the
    recipe as config and the report as an artifact. The order in the Trainer's list does not matter.

    Args:
        folder: where the report goes; None is `compression` in the run's log folder.
        measure_size: save and zip the weights at both ends of the fit; False for models too large for that.

    Raises:
        NothingToCompress: no callback of this package is in the Trainer's list.
    """

    def __init__(self, folder: str | None = None, measure_size: bool = True) -> None:
        super().__init__()
        self.folder, self.measure_size = folder, measure_size
        self.report: Report | None = None
        self.files: dict[str, Path] = {}
        self._before: Measurement | None = None
        self._ready: bool | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not any(_compressions(trainer)):
            raise NothingToCompress(
                "CompressionMonitor found nothing to watch; add GradualPruning, QuantizationAwareTraining, "
                "Distillation or another of this package's callbacks to the Trainer's, or remove the monitor"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ready = None
        before = self._measured("before this fit", trainer, pl_module)
        if not _writes(trainer):
            return
        self._before = before
        run = tracking.wandb_run(trainer.loggers)
        if run is not None:
            tracking.log_config(run, {f"compress/{type(c).__name__}": c.recipe() for c in _compressions(trainer)})

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._log_ready(trainer)

    def _log_ready(self, trainer: L.Trainer) -> None:
        ready = all(compression.complete for compression in _compressions(trainer))
        if ready != self._ready:
            self._ready = ready
            _log(trainer, {"compress/ready": float(ready)})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_ready(trainer)  # callbacks after this one in the list may have completed in the last batch
        # Both may be collectives: every process asks, not only the one that writes.
        folder, about = self._report_folder(trainer), self._about(trainer)
        after = self._measured("after this fit", trainer, pl_module)
        if self._before is None or not _writes(trainer):
            return
        self.report = compare(self._before, after, about=about)
        histories: list[list[tuple[int, float, float]]] = [getattr(c, "history", []) for c in _compressions(trainer)]
        history = next(filter(None, histories), [])
        self.files = self._saved(folder, self.report, history)
        if after.zipped_bytes is not None:
            _log(trainer, {"compress/size_bytes": float(after.zipped_bytes)})
        self._show(trainer, pl_module, history)

    def _measured(self, name: str, trainer: L.Trainer, pl_module: L.LightningModule) -> Measurement:
        if isinstance(trainer.strategy, SHARDING):  # to count is a collective
            count: Count = count_nonzero_in_parts(trainer.strategy.model or pl_module, pl_module)
            return Measurement(name, {}, None, None, count.nonzero, count.total, note="counted over all processes")
        if not _writes(trainer):
            return Measurement(name)
        count = count_nonzero(pl_module)
        size = zipped = None
        if self.measure_size:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "weights.pt"
                torch.save(pl_module.state_dict(), path)
                size, zipped = file_bytes(path), zipped_bytes(path)
        return Measurement(name, {}, size, zipped, count.nonzero, count.total, note="weights as saved by torch.save")

    def _about(self, trainer: L.Trainer) -> dict[str, str]:
        recipes = {type(c).__name__: str(c.recipe()) for c in _compressions(trainer)}
        metrics = {name: f"{float(value):.4g}" for name, value in trainer.callback_metrics.items()}
        return {"optimizer steps": str(trainer.global_step), **recipes, **metrics}

    def _report_folder(self, trainer: L.Trainer) -> Path:
        return Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "compression")

    def _saved(self, folder: Path, report: Report, history: list[tuple[int, float, float]]) -> dict[str, Path]:
        files = report.save(folder)
        if importlib.util.find_spec("matplotlib") is not None:
            files["report.png"] = plot_report(report, folder / "report.png", history)
        rank_zero_info("The compression report is in %s", folder)
        return files

    def _show(self, trainer: L.Trainer, pl_module: L.LightningModule, history: list[tuple[int, float, float]]) -> None:
        run = tracking.wandb_run(trainer.loggers)
        if run is None:
            return
        if not isinstance(trainer.strategy, SHARDING):
            tracking.log_layer_table(run, _layer_rows(trainer, pl_module), trainer.global_step)
        if history:
            tracking.log_schedule_curve(run, history)
        if "report.png" in self.files:
            tracking.log_image(run, "compress/chart", self.files["report.png"], trainer.global_step)
        tracking.log_artifact(run, f"compression-report-{run.id}", "report", self.files.values())
        if self.report is not None:
            figures = {"zipped_ratio": self.report.changes()["zipped_ratio"], "ready": float(bool(self._ready))}
            tracking.log_summary(run, {f"compress/{name}": value for name, value in figures.items()})


def _compressions(trainer: L.Trainer) -> Iterator[Compression]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Compression):
            yield callback


def _writes(trainer: L.Trainer) -> bool:
    return trainer.is_global_zero and not trainer.fast_dev_run and not trainer.barebones  # type: ignore[attr-defined]


def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def _layer_rows(trainer: L.Trainer, pl_module: L.LightningModule) -> list[LayerRow]:
    bits: dict[str, int] = {}
    for compression in _compressions(trainer):
        if isinstance(compression, QuantizationAwareTraining) and compression.complete and compression.enabled:
            layers, _ = outputs_of(compression.ranges())
            names = weight_names(pl_module, layers)
            bits |= {names[layer]: trained.weight_bits for layer, trained in layers.items()}
    return per_layer(pl_module, bits=bits)
