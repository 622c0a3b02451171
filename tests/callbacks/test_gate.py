"""The best checkpoint of a run is of the compressed model, though the dense one was better."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Constant, GradualPruning, QuantizationAwareTraining, ReadyGate


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.head = nn.Linear(24, 4)
        self.by_epoch: list[float] = []

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = functional.cross_entropy(self.head(self.body(batch[0])), batch[1])
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        right = (self.head(self.body(batch[0])).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", right)
        self.by_epoch.append(float(right))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def data(batch_size: int = 32) -> DataLoader:
    inputs = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=batch_size)


def pruning() -> GradualPruning:
    """Dense for six epochs of eight batches; from then on so sparse that the accuracy falls for good."""
    return GradualPruning(Constant(0.97), window=(50, 52), frequency=1)


def best(folder: Path, **options: object) -> ModelCheckpoint:
    return ModelCheckpoint(folder, monitor="accuracy", mode="max", **options)


def fit(
    folder: Path,
    *callbacks: L.Callback,
    validated: bool = True,
    kind: type[Classifier] = Classifier,
    ckpt_path: Path | None = None,
    **options: object,
) -> tuple[L.Trainer, Classifier]:
    L.seed_everything(0, verbose=False)
    model = kind()
    settings = {"max_epochs": 10, "num_sanity_val_steps": 0, "limit_val_batches": 1.0 if validated else 0, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, data(), data(256), ckpt_path=ckpt_path)
    return trainer, model


def zeros(path: str | Path) -> float:
    weights = torch.load(path, weights_only=True)["state_dict"]
    selected = [weights["body.0.weight"], weights["body.2.weight"]]
    return sum(int((weight == 0).sum()) for weight in selected) / sum(weight.numel() for weight in selected)


@pytest.mark.parametrize("first", [True, False])
def test_the_saved_best_is_the_compressed_model_though_the_dense_one_was_better(tmp_path: Path, first: bool) -> None:
    checkpoint = best(tmp_path)
    callbacks = [checkpoint, pruning()] if first else [pruning(), checkpoint]

    trainer, model = fit(tmp_path, *callbacks)

    assert max(model.by_epoch[:6]) > max(model.by_epoch[6:]) + 0.1  # otherwise this shows nothing
    assert zeros(checkpoint.best_model_path) == pytest.approx(0.97, abs=1e-3)
    assert float(checkpoint.best_model_score) == pytest.approx(max(model.by_epoch[6:]))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [Path(checkpoint.best_model_path).name]
    assert not any(isinstance(callback, ReadyGate) for callback in trainer.callbacks)


def test_without_the_gate_it_is_the_dense_model(tmp_path: Path) -> None:
    checkpoint = best(tmp_path)
    fit(tmp_path, pruning(), checkpoint, ReadyGate(enabled=False))
    assert zeros(checkpoint.best_model_path) == 0.0


def test_checkpoints_from_before_are_kept_until_compressed_ones_take_their_places(tmp_path: Path) -> None:
    checkpoint = best(tmp_path, save_top_k=3)

    fit(tmp_path, pruning(), checkpoint, max_epochs=8)  # epochs 6 and 7 are compressed

    found = sorted(zeros(path) for path in tmp_path.glob("*.ckpt"))
    assert found == pytest.approx([0.0, 0.97, 0.97], abs=1e-3)
    assert zeros(checkpoint.best_model_path) > 0.9


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize("crash_in", [4, 7])
def test_a_resumed_run_ends_with_the_checkpoints_of_the_uninterrupted_one(tmp_path: Path, crash_in: int) -> None:
    whole = best(tmp_path / "whole", save_top_k=2)
    fit(tmp_path, pruning(), whole)
    files = tmp_path / "parts"
    with pytest.raises(RuntimeError, match="by the test"):
        fit(tmp_path, pruning(), best(files, save_top_k=2, save_last=True), Crash(crash_in))

    resumed = best(files, save_top_k=2, save_last=True)
    fit(tmp_path, pruning(), resumed, ckpt_path=files / "last.ckpt")

    def scores(checkpoint: ModelCheckpoint) -> list[tuple[str, float]]:
        return sorted((Path(path).name, float(score)) for path, score in checkpoint.best_k_models.items())

    assert scores(resumed) == scores(whole)
    assert Path(resumed.best_model_path).name == Path(whole.best_model_path).name


class Crash(L.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("by the test")


def test_early_stopping_begins_to_count_when_compression_is_complete(tmp_path: Path) -> None:
    impatient = {"monitor": "accuracy", "mode": "max", "patience": 1, "min_delta": 1.0}  # nothing is an improvement

    _, dense = fit(tmp_path, EarlyStopping(**impatient), enable_checkpointing=False)
    stopping = EarlyStopping(**impatient)
    _, model = fit(tmp_path, pruning(), stopping, enable_checkpointing=False)

    assert len(dense.by_epoch) == 2
    assert len(model.by_epoch) == 8  # the first complete validation is the best, the second exhausts the patience
    assert stopping.stopped_epoch == 7


def test_a_threshold_that_the_dense_model_reaches_does_not_stop_the_run(tmp_path: Path) -> None:
    stopping = EarlyStopping(monitor="accuracy", mode="max", patience=99, stopping_threshold=0.5)
    _, model = fit(tmp_path, pruning(), stopping)
    assert max(model.by_epoch[:6]) > 0.5
    assert len(model.by_epoch) >= 7
    assert stopping.stopping_threshold == 0.5


def test_a_metric_that_is_not_finite_stops_the_run_as_ever(tmp_path: Path) -> None:
    class Broken(Classifier):
        def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
            self.log("accuracy", torch.tensor(float("nan")))

    stopping = EarlyStopping(monitor="accuracy", mode="max")
    briefly = {"kind": Broken, "max_epochs": 3, "enable_checkpointing": False}
    trainer, _ = fit(tmp_path, GradualPruning(0.5, window=(1, 2)), stopping, **briefly)
    assert stopping.stopped_epoch == 0
    assert trainer.current_epoch == 1


def test_without_validation_the_metric_of_training_is_judged_from_the_first_complete_batch_on(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="loss", mode="min", save_top_k=1)
    fit(tmp_path, pruning(), checkpoint, validated=False)  # limit_val_batches=0
    assert zeros(checkpoint.best_model_path) > 0.9


def test_a_run_whose_last_validation_came_too_early_says_so(tmp_path: Path) -> None:
    checkpoint = best(tmp_path)
    with pytest.warns(UserWarning, match="the best checkpoint, .* compression was not complete: no validation began"):
        fit(tmp_path, pruning(), checkpoint, max_epochs=7, check_val_every_n_epoch=2)
    assert zeros(checkpoint.best_model_path) == 0.0


def test_all_callbacks_must_be_complete(tmp_path: Path) -> None:
    checkpoint = best(tmp_path)
    qat = QuantizationAwareTraining(window=(0.3, 0.5, 0.85))
    fit(tmp_path, GradualPruning(0.5, window=(2, 10), frequency=1), qat, checkpoint)
    assert Path(checkpoint.best_model_path).name.startswith(("epoch=8", "epoch=9"))  # frozen in step 68 of 80


def test_a_run_without_a_monitored_metric_has_no_gate(tmp_path: Path) -> None:
    class Seen(L.Callback):
        gates = 0

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.gates = sum(isinstance(callback, ReadyGate) for callback in trainer.callbacks)

    plain, judged = Seen(), Seen()
    fit(tmp_path, pruning(), plain, ModelCheckpoint(tmp_path / "plain"))
    fit(tmp_path, pruning(), judged, best(tmp_path / "judged"))
    assert (plain.gates, judged.gates) == (0, 1)


def test_the_gate_is_gone_after_an_exception(tmp_path: Path) -> None:
    callbacks = [pruning(), best(tmp_path), Crash(0)]
    trainer = L.Trainer(max_epochs=9, accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False)
    with pytest.raises(RuntimeError, match="by the test"):
        trainer.fit(Classifier(), data(), data(256))
    assert not any(isinstance(callback, ReadyGate) for callback in trainer.callbacks)
