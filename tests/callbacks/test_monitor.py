from __future__ import annotations

import copy
import json
from pathlib import Path

import lightning as L
import pytest
import torch
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
from tests.wandb_offline import OfflineRun, read_run


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def loader() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 16, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=8)


def fit(tmp_path: Path, logger: object, callbacks: list[L.Callback], **options: object) -> L.Trainer:
    L.seed_everything(1, verbose=False)
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=logger,
        callbacks=callbacks,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=4,
        **options,
    )
    trainer.fit(Classifier(), loader())
    return trainer


def all_callbacks() -> list[L.Callback]:
    teacher = copy.deepcopy(Classifier().net)
    return [
        CompressionMonitor(),  # first in the list: its place must not matter
        GradualPruning(0.8, frequency=2),
        QuantizationAwareTraining(),
        Distillation(teacher),
    ]


@pytest.fixture(scope="module")
def offline_run(tmp_path_factory: pytest.TempPathFactory) -> OfflineRun:
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(folder / name.lower()))
        patch.setenv("WANDB_SILENT", "true")
        logger = WandbLogger(project="test", save_dir=folder, offline=True)
        fit(folder, logger, all_callbacks())
        run_folder = Path(logger.experiment.dir).parent
        logger.experiment.finish()
        return read_run(run_folder)


def test_wandb_history_has_every_number_we_act_on(offline_run: OfflineRun) -> None:
    sparsity = [value for value in offline_run.column("compress/sparsity") if value is not None]
    assert sparsity[-1] == 1024 / 1280  # 512 + 768 selected weights at 80 %
    for name in ("compress/loss/task", "compress/loss/kd", "compress/sparsity_target", "compress/threshold"):
        assert offline_run.column(name), name
    assert offline_run.column("compress/ready") == [0.0, 1.0]
    assert offline_run.column("compress/bits")[-1] == 8.0
    assert offline_run.summary["compress/size_bytes"] > 0


def test_wandb_files_have_table_chart_and_artifact(offline_run: OfflineRun) -> None:
    tables = [row["compress/layers"] for row in offline_run.history if "compress/layers" in row]
    table = json.loads(offline_run.media(tables[-1]).read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    pruned = next(row for row in rows if row["name"] == "net.0.weight")
    assert pruned["total"] == 512
    assert pruned["nonzero"] < 512
    assert pruned["bits"] == 8
    charts = [row["compress/chart"] for row in offline_run.history if "compress/chart" in row]
    assert offline_run.media(charts[-1]).read_bytes().startswith(b"\x89PNG")
    kinds = [(kind, files) for kind, files in offline_run.artifacts.values() if kind == "report"]
    assert kinds == [("report", {"report.md", "report.json", "report.html", "report.png"})]
    assert "compress/GradualPruning" in offline_run.config


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


def test_a_monitor_with_nothing_to_watch_fails(tmp_path: Path) -> None:
    with pytest.raises(NothingToCompress, match="add GradualPruning"):
        fit(tmp_path, False, [CompressionMonitor()])
