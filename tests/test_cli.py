"""Overlays on a user's LightningCLI run, and the commands for people without a script."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from transformers import BertModel

from lightning_compress import (
    Distillation,
    GradualPruning,
    Linear,
    LowRank,
    QuantizationAwareTraining,
    TeacherCheckpoint,
    load_from_checkpoint,
    magnitude,
    soft_targets,
)
from lightning_compress.cli import COMMANDS, main
from lightning_compress.distillation.details import Details as Teaching
from lightning_compress.distillation.features import cosine_distance
from lightning_compress.distillation.gradient_terms import GradientTerm
from lightning_compress.distillation.own_teachers import MeanTeacher
from lightning_compress.distillation.teachers import PretrainedTeacher
from lightning_compress.distillation.terms import LayerTerm
from lightning_compress.factorization.factors import factored_layers
from lightning_compress.factorization.ranks import Budget, Energy
from lightning_compress.quantization.choosing import grids_of
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.inputs import PerToken
from lightning_compress.quantization.noise import Noise
from lightning_compress.quantization.ranges import percentile
from lightning_compress.quantization.weights import Symmetric
from tests import user_project

ROOT = Path(__file__).parents[1]
PRUNE, QAT, DISTILL = (str(ROOT / "configs" / f"{name}.yaml") for name in ("prune", "qat_int8", "distill"))
OURS = [GradualPruning, QuantizationAwareTraining, Distillation]
USERS = [ModelCheckpoint, LearningRateMonitor]
PROJECT = "tests.user_project"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, with the user's config in it."""
    monkeypatch.chdir(tmp_path)
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 5,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "logs"}},
            "log_every_n_steps": 4,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}},
                {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
            ],
        },
        "model": {"class_path": f"{PROJECT}.Net"},
        "data": {"class_path": f"{PROJECT}.Data"},
    }
    (tmp_path / "user.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return tmp_path


def overlay(folder: Path, name: str, **options: Any) -> str:
    """Write an overlay that appends one of our callbacks; returns its path."""
    path = folder / f"{name}.yaml"
    added = {"class_path": f"lightning_compress.{name}", "init_args": options}
    path.write_text(yaml.safe_dump({"trainer": {"callbacks+": [added]}}), encoding="utf-8")
    return str(path)


def users_cli(monkeypatch: pytest.MonkeyPatch, *overlays: str, options: tuple[str, ...] = ()) -> list[L.Callback]:
    """Start the user's own script without running it; returns the Trainer's callbacks that configs asked for."""
    configs = [part for path in ("user.yaml", *overlays) for part in ("-c", path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *configs, *options])
    cli = LightningCLI(save_config_callback=None, run=False)
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, (*OURS, *USERS))]


def kinds(callbacks: list[L.Callback]) -> list[type]:
    # Lightning itself moves checkpoints to the end.
    return [type(callback) for callback in callbacks if not isinstance(callback, ModelCheckpoint)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_overlays_append_to_the_users_callbacks(folder: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    callbacks = users_cli(monkeypatch, *[PRUNE, QAT, DISTILL][:count])
    assert kinds(callbacks) == [LearningRateMonitor, *OURS[:count]]
    assert any(isinstance(callback, ModelCheckpoint) for callback in callbacks)


def test_callbacks_without_plus_replace_the_users(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(PRUNE).read_text(encoding="utf-8").replace("callbacks+:", "callbacks:")
    (folder / "replacing.yaml").write_text(text, encoding="utf-8")
    assert kinds(users_cli(monkeypatch, "replacing.yaml")) == [GradualPruning]


def test_the_shipped_overlays_are_the_defaults_and_say_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruning, quantization, distillation = users_cli(monkeypatch, PRUNE, QAT, DISTILL)[1:4]
    assert pruning.recipe() == GradualPruning().recipe()
    assert quantization.recipe() == QuantizationAwareTraining().recipe()
    assert distillation.recipe() == Distillation("teacher.ckpt").recipe()
    for path in (PRUNE, QAT, DISTILL):
        text = Path(path).read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert f"-c configs/{Path(path).name}" in text


@pytest.mark.parametrize("name", ["low_rank", "monitor", "share"])
def test_other_shipped_overlays_start(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", "user.yaml", "-c", str(ROOT / "configs" / f"{name}.yaml")])
    cli = LightningCLI(save_config_callback=None, run=False)
    added = [each for each in cli.trainer.callbacks if type(each).__module__.startswith("lightning_compress")]
    assert [type(each).__name__ for each in added] == [{"low_rank": "LowRank", "monitor": "CompressionMonitor",
                                                        "share": "WeightSharing"}[name]]  # fmt: skip


RANKS = "lightning_compress.factorization.ranks"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, Energy(0.9)),
        ({"rank": 3, "at": 0.2}, 3),
        ({"rank": {"class_path": f"{RANKS}.Budget", "init_args": {"amount": 0.4}}}, Budget(0.4)),
        ({"decompose": "lightning_compress.factorization.svd.svd", "at": 0.0}, Energy(0.9)),
    ],
)
def test_ranks_can_be_given_in_yaml(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], meant: Any
) -> None:
    argv = ["train.py", "-c", "user.yaml", "-c", overlay(folder, "LowRank", **given)]
    monkeypatch.setattr(sys, "argv", argv)
    cli = LightningCLI(save_config_callback=None, run=False)
    (callback,) = (each for each in cli.trainer.callbacks if isinstance(each, LowRank))
    assert callback.rank == meant


def test_a_checkpoint_of_the_command_line_can_be_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the module's class, which Lightning wants to be the one that loads it, not a subclass of ours."""
    argv = ["train.py", "fit", "-c", "user.yaml", "-c", overlay(folder, "LowRank", rank=2, at=4, batches=2)]
    monkeypatch.setattr(sys, "argv", argv)
    cli = LightningCLI(save_config_callback=None)
    cli.trainer.save_checkpoint("last.ckpt")
    loaded = load_from_checkpoint("last.ckpt", user_project.Net)
    assert factored_layers(loaded).keys() == factored_layers(cli.model).keys() != set()
    assert all(torch.equal(value, cli.model.state_dict()[name]) for name, value in loaded.state_dict().items())


NET = {"class_path": f"{PROJECT}.Net", "init_args": {"width": 24}}
CHECKPOINT = {
    "class_path": "lightning_compress.TeacherCheckpoint",
    "init_args": {"path": "other.ckpt", "module_class": f"{PROJECT}.Net"},
}
GRIDS = "lightning_compress.quantization"
TAUGHT = "lightning_compress.distillation"
OPTIONS = [
    ("GradualPruning", {"sparsity": 0.5}, "schedule", GradualPruning(0.5).schedule),
    (
        "GradualPruning",
        {"sparsity": {"class_path": "lightning_compress.Linear", "init_args": {"final": 0.5}}},
        "schedule",
        Linear(0.5),
    ),
    ("GradualPruning", {"sparsity": f"{PROJECT}.half_way"}, "schedule", user_project.half_way),
    ("GradualPruning", {"window": [0.1, 0.7]}, "window", (0.1, 0.7)),
    ("GradualPruning", {"window": [100, 700]}, "window", (100, 700)),
    ("GradualPruning", {"window": [0, 1.0]}, "window", (0, 1.0)),
    ("GradualPruning", {"frequency": 5}, "frequency", 5),
    ("GradualPruning", {"frequency": 1.0}, "frequency", 1.0),
    ("GradualPruning", {"include": ["net.0", "Linear"]}, "include", ("net.0", "Linear")),
    ("GradualPruning", {"exclude": ["net.*"]}, "exclude", ("net.*",)),
    ("GradualPruning", {"criterion": "lightning_compress.pruning.criteria.magnitude"}, "criterion", magnitude),
    ("GradualPruning", {"criterion": f"{PROJECT}.squared"}, "criterion", user_project.squared),
    ("QuantizationAwareTraining", {"window": [10, 20, 30]}, "window", (10, 20, 30)),
    ("QuantizationAwareTraining", {"window": [0.5, 0.6, 1.0]}, "window", (0.5, 0.6, 1.0)),
    ("QuantizationAwareTraining", {"weights": 4}, "weights", Symmetric(4)),
    ("QuantizationAwareTraining", {"inputs": None}, "inputs", None),
    (
        "QuantizationAwareTraining",
        {"weights": {"class_path": f"{GRIDS}.weights.Symmetric", "init_args": {"bits": 4, "group": 32}}},
        "weights",
        Symmetric(4, 32),
    ),
    ("QuantizationAwareTraining", {"inputs": {"class_path": f"{GRIDS}.inputs.PerToken"}}, "inputs", PerToken()),
    (
        "QuantizationAwareTraining",
        {"per_layer": {"net.0": [4, None]}},
        "per_layer",
        {"net.0": grids_of(4, None)},
    ),
    (
        "QuantizationAwareTraining",
        {"details": {"momentum": 0.5, "inputs_from": 20, "batch_norm_from": 0.8}},
        "details",
        Details(0.5, inputs_from=20, batch_norm_from=0.8),
    ),
    (
        "QuantizationAwareTraining",
        {"details": {"observer": f"{GRIDS}.ranges.percentile", "noise": {"weights": True, "inputs": 0.5}}},
        "details",
        Details(observer=percentile, noise=Noise(True, 0.5)),
    ),
    ("Distillation", {"teacher": "folder/some.ckpt"}, "source", "folder/some.ckpt"),
    ("Distillation", {"teacher": CHECKPOINT}, "source", TeacherCheckpoint("other.ckpt", user_project.Net)),
    ("Distillation", {"teacher": "x.ckpt", "loss": "lightning_compress.soft_targets"}, "loss", soft_targets),
    (
        "Distillation",
        {"teacher": {"class_path": f"{TAUGHT}.own_teachers.MeanTeacher", "init_args": {"decay": 0.9}}},
        "source",
        MeanTeacher(0.9),
    ),
    (
        "Distillation",
        {
            "teacher": {
                "class_path": f"{TAUGHT}.teachers.PretrainedTeacher",
                "init_args": {"path": "folder", "model_class": "transformers.BertModel"},
            }
        },
        "source",
        PretrainedTeacher("folder", BertModel),
    ),
    (
        "Distillation",
        {"teacher": "t.ckpt", "layers": [{"loss": f"{TAUGHT}.features.cosine_distance", "student": "net.0"}]},
        "layers",
        (LayerTerm(cosine_distance, "net.0"),),
    ),
    (
        "Distillation",
        {"teacher": "t.ckpt", "layers": {"class_path": f"{TAUGHT}.gradient_terms.GradientTerm"}},
        "layers",
        (GradientTerm(),),
    ),
    (
        "Distillation",
        {
            "teacher": "t.ckpt",
            "layers": [
                {"loss": f"{TAUGHT}.features.cosine_distance", "student": "net.0"},
                {"class_path": f"{TAUGHT}.gradient_terms.GradientTerm", "init_args": {"weight": 2.0, "student": "a"}},
            ],
        },
        "layers",
        (LayerTerm(cosine_distance, "net.0"), GradientTerm(2.0, "a")),
    ),
    ("Distillation", {"teacher": "t.ckpt", "details": {"balanced": True}}, "details", Teaching(balanced=True)),
    (
        "Distillation",
        {"teacher": "t.ckpt", "weight": {"class_path": "lightning_compress.Linear", "init_args": {"final": 0.5}}},
        "weight",
        Linear(0.5),
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "attribute", "expected"), OPTIONS, ids=[f"{name}-{options}" for name, options, *_ in OPTIONS]
)
def test_an_option_arrives_as_it_was_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], attribute: str, expected: object
) -> None:
    callback = users_cli(monkeypatch, overlay(folder, name, **options))[1]
    got = getattr(callback, attribute)
    assert got == expected
    # 100 == 100.0, but one is a step and the other no fraction of the run.
    assert repr(got) == repr(expected)


@pytest.mark.parametrize("teacher", [NET, f"{PROJECT}.build_teacher"], ids=["module", "function"])
def test_a_teacher_may_be_a_module(folder: Path, monkeypatch: pytest.MonkeyPatch, teacher: Any) -> None:
    distillation = users_cli(monkeypatch, overlay(folder, "Distillation", teacher=teacher))[1]
    assert isinstance(distillation.source, user_project.Net)
    assert distillation.source.head.in_features == 24


def test_an_existing_checkpoint_is_not_read_as_a_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"trainer": 1}, folder / "teacher.ckpt")
    assert users_cli(monkeypatch, DISTILL)[1].source == "teacher.ckpt"


def test_the_command_line_overrides_the_last_callback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--trainer.callbacks.teacher", "mine.ckpt", "--trainer.callbacks.weight=0.25")
    pruning, distillation = users_cli(monkeypatch, PRUNE, DISTILL, options=options)[1:3]
    assert (distillation.source, distillation.weight) == ("mine.ckpt", 0.25)
    assert pruning.recipe() == GradualPruning().recipe()


WRONG = [
    ({"class_path": "lightning_compress.GradualPruning", "init_args": {"sparcity": 0.5}}, "Option 'sparcity'"),
    ({"class_path": "lightning_compress.GradualPrunning"}, "no attribute 'GradualPrunning'"),
    ({"class_path": "lightning_compresss.GradualPruning"}, "No module named 'lightning_compresss'"),
    ({"class_path": "lightning_compress.GradualPruning", "init_args": {"window": [0.5]}}, 'Parser key "window"'),
    ({"class_path": "lightning_compress.GradualPruning", "init_args": {"criterion": "a.b"}}, 'Parser key "criterion"'),
    (
        {"class_path": "lightning_compress.GradualPruning", "init_args": {"criterion": f"{PROJECT}.unannotated"}},
        "to be a function that returns <class 'Tensor'>",
    ),
    ({"class_path": "lightning_compress.Distillation"}, "arguments are required: teacher"),
]


@pytest.mark.parametrize(("callback", "named"), WRONG, ids=[named for _, named in WRONG])
def test_a_mistake_in_an_overlay_is_named(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    callback: dict[str, Any],
    named: str,
) -> None:
    (folder / "wrong.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [callback]}}), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        users_cli(monkeypatch, "wrong.yaml")
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lightning_compress", *arguments])
    return main()


def test_a_value_out_of_range_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "fit", "-c", "user.yaml", "-c", overlay(folder, "GradualPruning", sparsity=90)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        said == "python -m lightning_compress: sparsity is a fraction of zeros in [0, 1), got 90.0; write 0.9 for 90 %"
    )


def test_an_error_of_the_users_own_code_keeps_its_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="negative dimension"):
        run(monkeypatch, "fit", "-c", "user.yaml", "--data.rows=-1")


def test_print_config_shows_the_users_and_our_callbacks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "fit", "-c", "user.yaml", "-c", PRUNE, "-c", DISTILL, "--print_config")
    assert stopped.value.code == 0
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    names = [callback["class_path"].rpartition(".")[2] for callback in callbacks]
    assert names == ["ModelCheckpoint", "LearningRateMonitor", "GradualPruning", "Distillation"]
    assert callbacks[2]["init_args"]["criterion"] == "lightning_compress.magnitude"


def dense_teacher(folder: Path) -> str:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(user_project.Net(), datamodule=user_project.Data())
    trainer.save_checkpoint(folder / "teacher.ckpt")
    return str(folder / "teacher.ckpt")


def test_three_overlays_end_to_end_without_a_script(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense_teacher(folder)
    overlays = ["-c", PRUNE, "-c", QAT, "-c", DISTILL]
    command = [sys.executable, "-m", "lightning_compress", "fit", "-c", "user.yaml", *overlays]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr

    (path,) = (folder / "kept").glob("*.ckpt")
    compressed = user_project.Net.load_from_checkpoint(path)
    body = [compressed.net[0].weight, compressed.net[2].weight]
    total = sum(weight.numel() for weight in body)
    assert sum(int((weight == 0).sum()) for weight in body) == round(0.9 * total)
    assert bool((compressed.head.weight != 0).all())
    saved = torch.load(path, weights_only=True)["callbacks"]
    (quantization,) = (state for key, state in saved.items() if key.startswith("QuantizationAwareTraining"))
    assert set(quantization["extremes"]) == {"net.0", "net.2"}
    logged = (folder / "logs" / "lightning_logs" / "version_0" / "metrics.csv").read_text(encoding="utf-8")
    assert {"compress/loss/kd", "compress/loss/task", "compress/sparsity", "val_loss"} <= set(
        logged.splitlines()[0].split(",")
    )
    # What the run saved reproduces it, and the checkpoint goes on to the other commands.
    saved_config = "logs/lightning_logs/version_0/config.yaml"
    assert run(monkeypatch, "validate", "-c", "user.yaml", *overlays, "--ckpt_path", str(path)) == 0
    assert kinds(users_cli_from(monkeypatch, saved_config)) == [LearningRateMonitor, *OURS]


def users_cli_from(monkeypatch: pytest.MonkeyPatch, config: str) -> list[L.Callback]:
    saved = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    for of_the_command in ("ckpt_path", "weights_only"):
        saved.pop(of_the_command, None)
    Path("again.yaml").write_text(yaml.safe_dump(saved), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train.py", "-c", "again.yaml"])
    cli = LightningCLI(save_config_callback=None, run=False)
    return [callback for callback in cli.trainer.callbacks if isinstance(callback, (*OURS, *USERS))]


def test_the_example_of_the_readme_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = ["--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    assert run(monkeypatch, "fit", "-c", str(ROOT / "examples" / "images.yaml"), "-c", PRUNE, "-c", QAT, *quick) == 0
    (path,) = (tmp_path / "checkpoints").glob("*.ckpt")
    pruned = torch.load(path, weights_only=True)["state_dict"]["body.5.weight"]
    assert bool((pruned == 0).any())


def test_demo_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[list[str]] = []

    def demo(arguments: list[str]) -> int:
        got.append(arguments)
        return 7

    monkeypatch.setitem(sys.modules, "lightning_compress.demo", types.SimpleNamespace(main=demo))
    assert run(monkeypatch, "demo", "--seed", "3") == 7
    assert got == [["--seed", "3"]]


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    assert run(monkeypatch, option) == 0
    said = capsys.readouterr().out
    packing = {"pack", "unpack", "inspect"}
    assert set(COMMANDS) == packing | {"demo", "report", "plan", "search", "fit", "validate", "test", "predict"}
    assert all(f"  {command} " in said for command in COMMANDS)


@pytest.mark.parametrize("arguments", [["prune"], ["--seed"], []], ids=str)
def test_an_unknown_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert ", ".join(COMMANDS) in said
    assert (repr(arguments[0]) if arguments else "none") in said


def test_without_jsonargparse_the_cure_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch, "fit") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "jsonargparse" in said
    assert "pip install 'lightning-compress[cli]'" in said
