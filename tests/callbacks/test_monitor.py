"""The monitor, with real loggers: what each of them is given, read back from disk, and what a resumed run keeps."""

from __future__ import annotations

import copy
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    CompressionMonitor,
    Distillation,
    GradualPruning,
    NothingToCompress,
    QuantizationAwareTraining,
)
from lightning_compress.measure.heatmap import LONGEST_NAME, short_names
from tests.wandb_offline import OfflineRun, read_run

SELECTED = ("net.0.weight", "net.2.weight")  # the head stays
STEPS = 32


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=8)


def fit(
    tmp_path: Path, logger: object, callbacks: list[L.Callback], ckpt_path: Path | None = None, **options: object
) -> L.Trainer:
    L.seed_everything(1, verbose=False)
    settings = {"max_epochs": 4, "accelerator": "cpu", "logger": logger, "callbacks": callbacks, "log_every_n_steps": 4}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    trainer = L.Trainer(**{**settings, **quiet, **options})
    trainer.fit(Classifier(), loader(), loader(), ckpt_path=ckpt_path)
    return trainer


def all_callbacks(**options: Any) -> list[L.Callback]:
    torch.manual_seed(0)
    teacher = copy.deepcopy(Classifier().net)
    return [
        CompressionMonitor(every=3, **options),  # first in the list: its place must not matter
        GradualPruning(0.8, frequency=2),
        QuantizationAwareTraining(),
        Distillation(teacher),
    ]


class OwnSteps(L.Callback):
    """A user who logs with steps of his own, far ahead of the Trainer's, and draws all over an axis of his own."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.logger.experiment.define_metric("*", step_metric="mine")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.logger.experiment.log({"mine": trainer.global_step}, step=1000 * trainer.global_step)


class Killed(L.Callback):
    """Ends a fit at a step, as a lost machine would."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 18:
            raise KeyError("killed")


@pytest.fixture(scope="module")
def quiet_wandb(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(folder / name.lower()))
        patch.setenv("WANDB_SILENT", "true")
        yield folder


def run_folder(logger: WandbLogger) -> Path:
    folder = Path(logger.experiment.dir).parent
    logger.experiment.finish()
    return folder


@pytest.fixture(scope="module")
def monitored(quiet_wandb: Path) -> tuple[OfflineRun, CompressionMonitor, L.LightningModule]:
    logger = WandbLogger(project="test", save_dir=quiet_wandb, offline=True)
    callbacks = all_callbacks(metric="val_accuracy", layer_scalars=True)
    trainer = fit(quiet_wandb, logger, [*callbacks, OwnSteps()])
    return read_run(run_folder(logger)), callbacks[0], trainer.lightning_module


@pytest.fixture
def offline_run(monitored: Any) -> OfflineRun:
    return monitored[0]


def test_wandb_history_has_every_number_we_act_on(offline_run: OfflineRun) -> None:
    sparsity = [value for value in offline_run.column("compress/sparsity") if value is not None]
    assert sparsity[-1] == 1024 / 1280  # 512 + 768 selected weights at 80 %
    for name in ("compress/loss/task", "compress/loss/kd", "compress/sparsity_target", "compress/threshold"):
        assert offline_run.column(name), name
    assert offline_run.column("compress/ready") == [0.0, 1.0]
    assert offline_run.column("compress/bits")[-1] == 8.0
    assert offline_run.summary["compress/size_bytes"] > 0


def test_the_axis_holds_when_somebody_logs_with_other_steps(offline_run: OfflineRun) -> None:
    assert offline_run.metrics.count(("compress/*", "trainer/global_step")) == 1
    assert ("*", "mine") in offline_run.metrics
    rows = [row for row in offline_run.history if any(key.startswith("compress/") for key in row)]
    assert all("trainer/global_step" in row for row in rows)
    steps = [row["trainer/global_step"] for row in rows if "compress/sparsity_overall" in row]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, STEPS)


def test_layers_at_each_look_and_over_time(monitored: Any) -> None:
    run, monitor, module = monitored
    tables = run.tables("compress/layers")
    assert len(tables) == len({row.step for row in monitor.rows}) >= 10
    assert [row["name"] for row in tables[0]] == [*SELECTED, "net.4.weight"]
    assert [row["name"] for row in tables[-1]] == [name for name, _ in module.named_parameters()]
    pruned = next(row for row in tables[-1] if row["name"] == "net.0.weight")
    weight = module.net[0].weight.detach().numpy()
    assert (pruned["total"], pruned["nonzero"], pruned["bits"]) == (512, np.count_nonzero(weight), 8)
    assert pruned["sqnr_db"] == pytest.approx(sqnr_by_hand(weight), rel=1e-5)
    (history,) = run.tables("compress/layers_over_time")
    assert [tuple(row.values()) for row in history] == [
        (row.step, row.layer, row.sparsity, row.bits, row.sqnr_db) for row in monitor.rows
    ]
    assert {row["bits"] for row in history if row["layer"] == "net.4.weight"} == {32}
    assert run.column("compress/sparsity/net.0.weight")[-1] == pruned["sparsity"]
    assert run.column("compress/sqnr_db_lowest")[-1] == min(row.sqnr_db for row in monitor.rows[-3:-1])


def sqnr_by_hand(weight: np.ndarray) -> float:
    """Jacob et al. 2018, symmetric, one scale an output channel."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    noise = weight - np.round(weight / scale) * scale
    return 10 * math.log10((weight.astype(np.float64) ** 2).sum() / (noise.astype(np.float64) ** 2).sum())


def test_histograms_are_of_the_weights_that_are_left(monitored: Any) -> None:
    run, _, module = monitored
    rows = [row for row in run.history if "compress/weights/net.0.weight" in row]
    assert [row["trainer/global_step"] for row in rows] == [0, STEPS // 2, STEPS]
    logged = rows[-1]["compress/weights/net.0.weight"]
    weight = module.net[0].weight.detach().numpy()
    counts, edges = np.histogram(weight[weight != 0], bins=64)
    assert logged["_type"] == "histogram"
    assert sum(logged["values"]) == counts.sum() == np.count_nonzero(weight)
    np.testing.assert_allclose(logged["bins"], edges, rtol=1e-5)
    assert np.abs(np.array(logged["values"]) - counts).sum() <= 4  # a value on an edge may fall on its other side


def test_the_trade_off_and_where_the_run_ended(monitored: Any) -> None:
    run, monitor, module = monitored
    points = run.tables("compress/trade_off_table")[-1]
    assert [row["step"] for row in points] == [8, 16, 24, 32]
    assert points[-1]["val_accuracy"] == run.column("val_accuracy")[-1]
    kept = sum(int(np.count_nonzero(p.detach().numpy())) for p in module.parameters())
    total = sum(p.numel() for p in module.parameters())
    assert points[-1]["sparsity"] == pytest.approx(1 - kept / total)
    # By hand: two weights of 8 bits and a bitmap, the head and biases as they are.
    left = sum(int(np.count_nonzero(module.get_parameter(name).detach().numpy())) for name in SELECTED)
    assert points[-1]["stored_bytes"] == 1280 // 8 + left + 4 * (96 + 32 + 24 + 4)
    panels = run.config["_wandb"]["visualize"]
    assert panels["compress/trade_off"]["panel_config"]["panelDefId"] == "wandb/scatter/v0"
    (outcome,) = run.tables("compress/outcome")[-1]
    assert outcome["val_accuracy"] == run.summary["val_accuracy"] == points[-1]["val_accuracy"]
    assert outcome["compress/size_bytes"] == run.summary["compress/size_bytes"] == monitor.report.after.zipped_bytes
    assert outcome["compress/sparsity_overall"] == run.summary["compress/sparsity_overall"]
    assert run.summary["compress/sparsity"] == 0.8


def test_wandb_gets_pictures_and_artifacts(offline_run: OfflineRun) -> None:
    for key in ("compress/chart", "compress/heat_map"):
        (picture,) = offline_run.column(key)
        assert offline_run.media(picture).read_bytes().startswith(b"\x89PNG")
    kinds = {kind: files for kind, files in offline_run.artifacts.values() if kind in ("report", "recipe")}
    assert kinds["report"] == {"report.md", "report.json", "report.html", "report.png", "layers.csv", "layers.png"}
    assert kinds["recipe"] == {"recipe.yaml"}
    assert "compress/GradualPruning" in offline_run.config


def test_a_resumed_run_keeps_the_rows_of_its_first_part(quiet_wandb: Path, tmp_path: Path, monitored: Any) -> None:
    """Killed in an epoch, resumed in the same W&B run by new objects: as if it had never stopped."""
    parts = []
    for resumed in (False, True):
        logger = WandbLogger(project="test", save_dir=tmp_path, offline=True, id="same", resume="allow")
        callbacks = all_callbacks(metric="val_accuracy", layer_scalars=True)
        kept = ModelCheckpoint(tmp_path / f"kept{resumed:d}", filename="{step}", save_top_k=-1, every_n_epochs=1)
        if resumed:
            fit(tmp_path, logger, [*callbacks, kept], ckpt_path=tmp_path / "kept0" / "step=16.ckpt")
        else:
            with pytest.raises(KeyError, match="killed"):
                fit(tmp_path, logger, [*callbacks, kept, Killed()])
        parts.append(read_run(run_folder(logger)))
    monitor = callbacks[0]
    assert monitor.rows == monitored[1].rows
    assert monitor.notes.trade_off == monitored[1].notes.trade_off
    first, second = parts
    (history,) = second.tables("compress/layers_over_time")
    assert len(history) == len(monitor.rows)
    steps = [row["trainer/global_step"] for row in second.history if "compress/sparsity_overall" in row]
    assert min(steps) >= 16
    assert max(row["trainer/global_step"] for row in first.history) <= 18
    for part in parts:
        assert part.metrics.count(("compress/*", "trainer/global_step")) == 1
    pictured = [[r["trainer/global_step"] for r in p.history if "compress/weights/net.0.weight" in r] for p in parts]
    assert pictured == [[0, 16], [16, 32]]  # the first part's 16 was after the checkpoint


def test_report_is_measured_and_kept_without_wandb(tmp_path: Path) -> None:
    callbacks = all_callbacks()
    fit(tmp_path, CSVLogger(tmp_path, flush_logs_every_n_steps=1), callbacks)
    monitor = callbacks[0]
    assert isinstance(monitor, CompressionMonitor)
    report = json.loads(monitor.files["report.json"].read_text(encoding="utf-8"))
    total = sum(parameter.numel() for parameter in Classifier().parameters())
    assert report["after"]["total"] == total
    assert report["before"]["nonzero"] - report["after"]["nonzero"] >= 1024
    assert report["changes"]["zipped_ratio"] > 1.5
    assert monitor.files["report.png"].is_file()


def test_no_logger_and_fast_dev_run_write_no_surprise(tmp_path: Path) -> None:
    monitor = CompressionMonitor()
    fit(tmp_path, False, [GradualPruning(0.5, window=(0, 2)), monitor], fast_dev_run=2)
    assert monitor.report is None
    assert not list(tmp_path.rglob("report*"))


def test_a_plain_logger_gets_scalars_and_the_folder_the_rows(tmp_path: Path) -> None:
    """Without pruning `compress/sparsity` is that of all weights; SQNR begins where rounding does."""
    monitor = CompressionMonitor(folder=str(tmp_path / "report"), every=8)
    fit(tmp_path, CSVLogger(tmp_path, name="", version=""), [monitor, QuantizationAwareTraining()])
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["compress/sparsity_overall"]]
    assert [int(row["step"]) for row in rows] == [0, 8, 16, 24, 29, 32]  # ranges freeze at 29
    assert all(row["compress/sparsity"] == row["compress/sparsity_overall"] == "0.0" for row in rows)
    assert [row["compress/sqnr_db_lowest"] != "" for row in rows] == [False, False, False, True, True, True]
    with (tmp_path / "report" / "layers.csv").open(encoding="utf-8") as file:
        layers = list(csv.DictReader(file))
    assert len(layers) == 6 * 3
    assert layers[-1] == {"step": "32", "layer": "net.4.weight", "sparsity": "0.0", "bits": "32", "sqnr_db": ""}
    assert layers[-3]["bits"] == "8"
    assert float(layers[-3]["sqnr_db"]) == pytest.approx(monitor.rows[-3].sqnr_db)


def test_without_wandb_everything_else_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import of it raises
    monitor = CompressionMonitor(every=16)
    fit(tmp_path, CSVLogger(tmp_path), [monitor, GradualPruning(0.5)])
    assert {"report.md", "layers.csv", "layers.png", "recipe.yaml"} <= set(monitor.files)


def test_a_run_of_unknown_length_is_looked_at_ever_more_rarely(tmp_path: Path) -> None:
    monitor = CompressionMonitor(every=0.5, measure_size=False)
    fit(tmp_path, False, [monitor, GradualPruning(0.5, (70, 71), 1)], max_epochs=12, max_time="00:01:00:00")
    steps = sorted({row.step for row in monitor.rows})
    assert steps == [0, 40, 70, 71, 96]  # half as much again, at least 40; the pruning's end; the end


def test_two_fits_are_two_runs_and_more_epochs_are_the_same_one(tmp_path: Path) -> None:
    monitor = CompressionMonitor(every=16, measure_size=False)
    trainer = fit(tmp_path, False, [monitor, GradualPruning(0.5, (2, 4))], enable_checkpointing=False)
    assert {row.step for row in monitor.rows} == {0, 4, 20, 32}
    trainer.fit_loop.max_epochs = 6
    trainer.fit(trainer.lightning_module, loader(), loader())
    assert {row.step for row in monitor.rows} == {0, 4, 20, 32, 48}
    fit(tmp_path, False, [monitor, GradualPruning(0.5, (2, 4))], max_epochs=1, enable_checkpointing=False)
    assert {row.step for row in monitor.rows} == {0, 4, 8}


def test_a_metric_that_nobody_logs_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="metric='val_acc'.*nobody logged it.*val_accuracy"):
        fit(tmp_path, False, [CompressionMonitor(metric="val_acc"), GradualPruning(0.5)])


def test_a_short_run_is_looked_at_no_more_than_every_fortieth_step(tmp_path: Path) -> None:
    monitor = CompressionMonitor(measure_size=False)
    pruning = GradualPruning(0.5, window=(5, 25), frequency=1)  # in half of the distance, where masks change
    fit(tmp_path, False, [monitor, pruning], enable_checkpointing=False)
    assert sorted({row.step for row in monitor.rows}) == [0, 20, 25, 32]


def test_long_names_in_the_heat_map_are_short_and_stay_apart() -> None:
    """Two hundred and more rows of a deep encoder: nothing longer than the column, nothing twice."""
    inner = ("attention.self_attention.query", "attention.output.dense", "feed_forward.intermediate_projection.dense")
    names = [f"model.transformer_network.encoder.layer.{i}.{name}.weight" for i in range(72) for name in inner]
    short = short_names(names)
    assert len(set(short)) == len(names)
    assert max(map(len, short)) <= LONGEST_NAME
    assert all(f".{i}." in short[3 * i] for i in range(72))


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"histograms": (1.5,)}, {"histograms": (-1,)}])
def test_moments_that_are_none_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"optimizer step|fraction of the run"):
        CompressionMonitor(**options)


def test_a_monitor_with_nothing_to_watch_fails(tmp_path: Path) -> None:
    with pytest.raises(NothingToCompress, match="add GradualPruning"):
        fit(tmp_path, False, [CompressionMonitor()])
