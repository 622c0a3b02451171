"""CompressionMonitor: what the run's compression does, through any logger; tables, charts and artifacts on W&B."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lightning_compress import tracking
from lightning_compress.callbacks.contract import SHARDING, Compression, check_state, compressions, saved_state
from lightning_compress.callbacks.lifecycle import log
from lightning_compress.callbacks.looking import Look, Pace, look, moments, pace
from lightning_compress.callbacks.notes import Notes
from lightning_compress.callbacks.outcome import Outcome, measured, save_files, show
from lightning_compress.callbacks.structured import StructuredPruning
from lightning_compress.errors import NothingToCompress
from lightning_compress.measure.layer_states import LayerState, value_counts
from lightning_compress.measure.report import Measurement, Report, compare
from lightning_compress.parts import Part
from lightning_compress.schedule import Moment, check_frequency
from lightning_compress.sharding import clean_name, parts_of
from lightning_compress.window import resolve_moment

__all__ = ["CompressionMonitor"]

_FOREVER = 2**62


class CompressionMonitor(L.Callback):
    """Log what the other callbacks do to each layer while they do it, and at the end what became of the weights' file.

    Runs at the start of the batches that are due, after validations and at the end of the fit. Every logger gets
    scalars under `compress/`; a folder gets the report, a table of layers by steps, its heat map and the recipe as an
    overlay; a W&B run gets tables, histograms, charts and artifacts besides. The order in the Trainer's list does not
    matter, and a resumed run goes on with the rows of the earlier part.

    Args:
        folder: where the report goes; None is `compression` in the run's log folder.
        measure_size: save and zip the weights at both ends of the fit; False for models too large for that.
        every: distance between looks at all layers; a float is a fraction of the run but at least 40 steps, an int
            steps. After a change of masks a look may come in half of it. In a run of unknown length, a float is a
            fraction of the steps so far.
        histograms: when W&B gets a histogram of each layer's non-zero weights; floats are fractions of the run, ints
            steps. Empty is never.
        metric: what the size is weighed against, a name that the module logs; None is what a ModelCheckpoint monitors.
        layer_scalars: log sparsity, bits and SQNR of each layer as scalars too: three series a layer.

    Raises:
        ValueError: a distance or a moment that is none.
        NothingToCompress: no callback of this package is in the Trainer's list.
    """

    def __init__(
        self,
        folder: str | None = None,
        measure_size: bool = True,
        every: Moment = 0.05,
        histograms: tuple[Moment, ...] = (0.0, 0.5, 1.0),
        metric: str | None = None,
        layer_scalars: bool = False,
    ) -> None:
        super().__init__()
        self.folder, self.measure_size = folder, measure_size
        self.every, self.histograms = check_frequency(every), tuple(histograms)
        for moment in self.histograms:
            resolve_moment(moment, _FOREVER, "histograms")
        self.metric, self.layer_scalars = metric, layer_scalars
        self.notes = Notes()
        self.report: Report | None = None
        self.files: dict[str, Path] = {}
        self._before: Measurement | None = None
        self._ready: bool | None = None
        self._watched: list[Any] = []
        self._pace, self._moments = Pace(), list[int]()
        self._parts: dict[str, Part] | None = None

    @property
    def rows(self) -> list[LayerState]:
        """One row a weight and look, of the whole run."""
        return self.notes.rows

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not compressions(trainer):
            raise NothingToCompress(
                "CompressionMonitor found nothing to watch; add GradualPruning, QuantizationAwareTraining, "
                "Distillation or another of this package's callbacks to the Trainer's, or remove the monitor"
            )
        if trainer.global_step == 0:  # a fresh run with the same callback object
            self.notes = Notes()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ready, self._watched, self._parts = None, compressions(trainer), None
        self._pace, self._moments = pace(trainer, self.every), moments(trainer, self.histograms)
        if isinstance(trainer.strategy, SHARDING) and _records(trainer):
            parameters = {clean_name(name): parameter for name, parameter in pl_module.named_parameters()}
            self._parts = parts_of(trainer.strategy.model or pl_module, parameters)
        before = measured("before this fit", trainer, pl_module, _writes(trainer), self.measure_size)
        if not _writes(trainer):
            return
        self._before = before
        run = tracking.wandb_run(trainer.loggers)
        if run is not None:
            tracking.define_axis(run)
            tracking.log_config(run, {f"compress/{type(c).__name__}": c.recipe() for c in self._watched})
        if before.zipped_bytes is not None:
            log(trainer, {"compress/size_bytes": float(before.zipped_bytes)})

    # Looks: at the start of a batch, when every callback has done its work of the last one

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if not _records(trainer):
            return
        step, state = trainer.global_step, self._state_now()
        last, seen = self.notes.last, self.notes.seen
        finished = state[1] and not seen[1] and step != last
        if last is None or finished or self._pace.due(step, last, changed=state[0] != seen[0]):
            self.notes.seen = state
            self._note(trainer, self._look(trainer, pl_module))
        if self._moments and step >= self._moments[0]:
            self._picture(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._log_ready(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not _records(trainer):
            return
        value = trainer.callback_metrics.get(self._metric(trainer) or "")
        if value is not None:
            seen = self._look(trainer, pl_module)
            self.notes.trade_off.append((seen.step, float(value), seen.sparsity, seen.stored_bytes))

    def _state_now(self) -> tuple[int, bool]:
        updates = sum(len(getattr(compression, "history", ())) for compression in self._watched)
        return updates, all(compression.complete for compression in self._watched)

    def _log_ready(self, trainer: L.Trainer) -> None:
        ready = all(compression.complete for compression in self._watched)
        if ready != self._ready:
            self._ready = ready
            log(trainer, {"compress/ready": float(ready)})

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Look:
        return look(trainer.global_step, pl_module, self._watched, self._parts)

    def _note(self, trainer: L.Trainer, seen: Look, biases: bool = False) -> None:
        """Keep a look's rows and log it."""
        states = self.notes.add(seen)
        if not _writes(trainer):
            return
        scalars = {"compress/sparsity_overall": seen.sparsity}
        if not any(map(_logs_sparsity, self._watched)):
            scalars["compress/sparsity"] = seen.sparsity
        noisy = [row.sqnr_db for row in states if row.sqnr_db is not None]
        if noisy:
            scalars["compress/sqnr_db_lowest"] = min(noisy)
        if self.layer_scalars:
            scalars |= _scalars(states)
        log(trainer, scalars)
        run = tracking.wandb_run(trainer.loggers)
        if run is not None:
            tracking.log_layer_table(run, seen.rows(biases), seen.step, seen.sqnr_db)

    def _picture(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log a histogram of each weight, once for the moments that have passed since the last one."""
        step = trainer.global_step
        due = any(self.notes.pictured < moment <= step for moment in self._moments)
        self._moments = [moment for moment in self._moments if moment > step]
        run = tracking.wandb_run(trainer.loggers) if due and _writes(trainer) and self._parts is None else None
        if run is None:
            return
        self.notes.pictured = step
        weights = {clean_name(name): weight for name, weight in pl_module.named_parameters() if weight.dim() > 1}
        counts = {name: value_counts(weight) for name, weight in weights.items()}
        tracking.log_histograms(run, {name: pair for name, pair in counts.items() if pair is not None}, step)

    # The end

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_ready(trainer)  # callbacks after this one in the list may have completed in the last batch
        if _records(trainer):
            self.notes.seen = self._state_now()
            self._note(trainer, self._look(trainer, pl_module), biases=True)
            if any(isinstance(moment, float) and moment == 1.0 for moment in self.histograms):
                self._moments = [trainer.global_step]  # the run may end earlier, or nobody knew when
            self._picture(trainer, pl_module)
        # Both may be collectives: every process asks, not only the one that writes.
        folder, about = self._report_folder(trainer), self._about(trainer)
        after = measured("after this fit", trainer, pl_module, _writes(trainer), self.measure_size)
        if self._before is None or not _writes(trainer):
            return
        self.report = compare(self._before, after, about=about)
        histories: list[list[tuple[int, float, float]]] = [getattr(c, "history", []) for c in self._watched]
        history, metric = next(filter(None, histories), []), self._last_metric(trainer)
        outcome = Outcome(trainer.global_step, self.report, self.notes, history, metric, bool(self._ready))
        self.files = save_files(folder, outcome, [*self._watched, self])
        if after.zipped_bytes is not None:
            log(trainer, {"compress/size_bytes": float(after.zipped_bytes)})
        run = tracking.wandb_run(trainer.loggers)
        if run is not None:
            show(run, outcome, self.files)

    def _about(self, trainer: L.Trainer) -> dict[str, str]:
        recipes = {type(c).__name__: str(c.recipe()) for c in self._watched}
        metrics = {name: f"{float(value):.4g}" for name, value in trainer.callback_metrics.items()}
        return {"optimizer steps": str(trainer.global_step), **recipes, **metrics}

    def _report_folder(self, trainer: L.Trainer) -> Path:
        return Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "compression")

    def _last_metric(self, trainer: L.Trainer) -> dict[str, float]:
        name = self._metric(trainer)
        value = trainer.callback_metrics.get(name or "")
        if self.metric is not None and value is None:
            known = ", ".join(map(str, trainer.callback_metrics)) or "none"
            rank_zero_warn(
                f"CompressionMonitor(metric={self.metric!r}): nobody logged it, so no size is weighed against it; "
                f"logged were {known}"
            )
        return {} if name is None or value is None else {name: float(value)}

    def _metric(self, trainer: L.Trainer) -> str | None:
        checkpoints = (c.monitor for c in trainer.callbacks if isinstance(c, ModelCheckpoint))  # type: ignore[attr-defined]
        return self.metric or next(filter(None, checkpoints), None)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        return saved_state({}, **self.notes.state_dict()) if self.notes.rows or self.notes.trade_off else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, {}, self)
        self.notes.load_state_dict(state_dict)


def _records(trainer: L.Trainer) -> bool:
    return not (trainer.fast_dev_run or trainer.barebones)  # type: ignore[attr-defined]


def _writes(trainer: L.Trainer) -> bool:
    return trainer.is_global_zero and _records(trainer)


def _logs_sparsity(compression: Compression) -> bool:
    """Say whether a callback logs the sparsity of its selection, so that the name is taken."""
    return compression.enabled and hasattr(compression, "history") and not isinstance(compression, StructuredPruning)


def _scalars(states: Sequence[LayerState]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in states:
        found[f"compress/sparsity/{row.layer}"] = row.sparsity
        found[f"compress/bits/{row.layer}"] = float(row.bits)
        if row.sqnr_db is not None:
            found[f"compress/sqnr_db/{row.layer}"] = row.sqnr_db
    return found
