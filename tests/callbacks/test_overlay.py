"""The recipe that the monitor keeps, read back by LightningCLI, makes callbacks of the same recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_compress import (
    CompressionMonitor,
    Distillation,
    GradualPruning,
    LotteryRewinding,
    QuantizationAwareTraining,
    Reconstruction,
    SparsityRegularization,
    StructuredPruning,
    WeightSharing,
)
from lightning_compress.callbacks.overlay import overlay
from lightning_compress.pruning.channels import Removal
from lightning_compress.pruning.criteria import taylor
from lightning_compress.pruning.patterns import NM, Blocks, Unstructured
from lightning_compress.pruning.scopes import erk
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.weights import Symmetric
from lightning_compress.schedule import Linear
from lightning_compress.weight_sharing.codebook import density

CALLBACKS = {
    "pruning": lambda: GradualPruning(0.8, window=(3, 40), frequency=2, exclude=["head"]),
    "schedule, criterion, scope": lambda: GradualPruning(
        Linear(0.7), criterion=taylor, pattern=Unstructured(scope=erk)
    ),
    "N:M": lambda: GradualPruning(0.5, pattern=NM(2, 4)),
    "blocks": lambda: GradualPruning(0.5, pattern=Blocks(4, 1), enabled=False),
    "rounding": lambda: QuantizationAwareTraining(4, None, window=(0.5, 0.6, 0.8)),
    "grid": lambda: QuantizationAwareTraining(Symmetric(4, group=8), details=Details(momentum=0.2, outputs=True)),
    "channels": lambda: StructuredPruning(0.4, removal=Removal(times=2)),
    "regularization": lambda: SparsityRegularization(weight=1e-3, sparsity=0.6),
    "reconstruction": lambda: Reconstruction(0.5, pattern=(2, 4)),
    "sharing": lambda: WeightSharing({"Conv2d": 64, "Linear": 8}, at=0.5, start=density),
    "lottery": lambda: LotteryRewinding(to=0.1),
    "teacher by path": lambda: Distillation("teacher.ckpt", weight=0.3),
}


def read_back(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let LightningCLI make the callbacks of an overlay."""
    path, user = folder / "recipe.yaml", folder / "user.yaml"
    path.write_text(text, encoding="utf-8")
    user.write_text(yaml.safe_dump({
        "trainer": {"logger": False, "enable_checkpointing": False, "accelerator": "cpu",
                    "enable_progress_bar": False, "enable_model_summary": False},
        "model": {"class_path": "tests.user_project.Net"}, "data": {"class_path": "tests.user_project.Data"},
    }), encoding="utf-8")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", str(user), "-c", str(path)])
    return LightningCLI(save_config_callback=None, run=False, seed_everything_default=False).trainer.callbacks


def test_every_recipe_survives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make() for make in CALLBACKS.values()]
    monitor = CompressionMonitor(folder="kept", every=10, histograms=(0.5, 20))
    text = overlay([*made, monitor])
    assert "which a file cannot hold" not in text
    again = [c for c in read_back(text, tmp_path, monkeypatch) if type(c).__module__.startswith("lightning_compress")]
    assert [type(callback) for callback in again] == [type(callback) for callback in (*made, monitor)]
    differing = [name for name, one, two in zip(CALLBACKS, made, again, strict=False) if one.recipe() != two.recipe()]
    assert differing == []
    assert [one.enabled for one in made] == [two.enabled for two in again[:-1]]
    options = ("folder", "measure_size", "every", "histograms", "metric", "layer_scalars")
    assert [getattr(monitor, name) for name in options] == [getattr(again[-1], name) for name in options]


def test_what_a_file_cannot_hold_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = overlay([
        Distillation(nn.Linear(2, 2)),
        GradualPruning(0.5, criterion=lambda weight: weight.abs()),
        GradualPruning(0.6, exclude=["head"]),
    ])  # fmt: skip
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert ["teacher=a Linear" in comments[0], "criterion=a function" in comments[1], len(comments)] == [True, True, 2]
    pruned = yaml.safe_load(text)["trainer"]["callbacks+"][1]["init_args"]
    assert "criterion" not in pruned


def test_classes_of_layers_are_named_as_selections_know_them() -> None:
    text = overlay([GradualPruning(0.5, exclude=[nn.Conv1d, "head"])])
    assert yaml.safe_load(text)["trainer"]["callbacks+"][0]["init_args"]["exclude"] == ["Conv1d", "head"]
