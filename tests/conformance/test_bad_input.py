"""Bad input gets one named error before the first batch, with what was expected, what came, where, and the cure."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_compress import (
    CheckpointMismatch,
    CompressError,
    CompressionMonitor,
    Distillation,
    GradualPruning,
    IncompatibleCallbacks,
    NothingToCompress,
    QuantizationAwareTraining,
    ReadyGate,
    UnsupportedStrategy,
)
from lightning_compress.quantization.details import Details
from tests.conformance.cases import ROWS, Row, promise
from tests.conformance.modules import Adversaries, Bert, LateConfigure, Small
from tests.conformance.running import build, differing, traces, train, trainer_for

NAN = float("nan")
QUIET = (CompressionMonitor, ReadyGate)  # they change nothing
CHANGING = tuple(row for row in ROWS if row.callback not in QUIET)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def refused(
    make: Callable[[L.LightningModule], list[L.Callback]],
    error: type[Exception],
    *words: str,
    folder: Path,
    kind: type[L.LightningModule] = Small,
    **options: Any,
) -> None:
    """Assert that a fit with these callbacks stops with the words, untrained, untouched, and without a file."""
    before_files = files(folder)
    module = build(kind)
    steps: list[int] = []

    class Steps(L.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            steps.append(1)

    weights = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error) as raised:
        train(module, make(module), folder, extra=[Steps()], **{"enable_checkpointing": True, **options})
    message = str(raised.value)
    missing = [word for word in words if not re.search(word, message)]
    assert not missing, f"{missing} not in: {message}"
    assert steps == []
    if kind is not LateConfigure:
        assert differing(weights, module.state_dict()) == []
    assert files(folder) == before_files
    assert traces(module)["globals"] == traces(nn.Linear(1, 1))["globals"]
    assert [key for key in module.__dict__ if key in ("training_step", "manual_backward")] == []
    assert all(not layer._forward_pre_hooks for layer in module.modules())


# One argument, at once


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, NAN, float("inf"), 90])
def test_a_sparsity_outside_its_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf"fraction of zeros in \[0, 1\), got {re.escape(str(sparsity))}.*write 0\.9"):
        GradualPruning(sparsity)


def test_a_schedule_that_ends_outside_the_range() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1\.0"):
        GradualPruning(lambda progress: progress)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GradualPruning(frequency=0), "frequency.*got 0"),
        (lambda: GradualPruning(frequency=NAN), "frequency.*got nan"),
        (lambda: QuantizationAwareTraining(weights=1), "2 to 8, got 1"),
        (lambda: QuantizationAwareTraining(inputs=16), "2 to 8, got 16"),
        (lambda: Details(momentum=0.0), r"\(0, 1\], got 0\.0"),
        (lambda: Details(momentum=NAN), r"\(0, 1\], got nan"),
        (lambda: Distillation(nn.Linear(1, 1), weight=1.5), r"\[0, 1\], got 1\.5"),
        (lambda: Distillation(nn.Linear(1, 1), weight=NAN), r"\[0, 1\], got nan"),
        (lambda: Distillation(nn.Linear(1, 1), temperature=0.0), r"positive.*got 0\.0"),
        (lambda: Distillation(nn.Linear(1, 1), temperature=NAN), r"positive.*got nan"),
    ],
)
def test_an_option_out_of_its_range(make: Callable[[], L.Callback], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# Windows and selections


def prune(**options: Any) -> Callable[[L.LightningModule], list[L.Callback]]:
    return lambda module: [GradualPruning(0.5, **{"window": (2, 8), **options})]


def quantize(**options: Any) -> Callable[[L.LightningModule], list[L.Callback]]:
    return lambda module: [QuantizationAwareTraining(**{"window": (2, 4, 10), **options})]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (prune(window=(8, 2)), ["begin must come before end", r"\(8, 2\)", "16 optimizer steps", "widen"]),
        (prune(window=(4, 4)), ["begin must come before end", r"\(4, 4\)"]),
        (prune(window=(0.7, 0.1)), [r"\(0\.7, 0\.1\)"]),
        (prune(window=(0.5, 0.51)), ["step 8 and step 8", "train longer"]),
        (prune(window=(2, 17)), ["end is step 17", "16 optimizer steps", "train longer", "0.7"]),
        (prune(window=(2,)), ["begin, end", "1 entries"]),
        (prune(window=(0.1, 1.5)), [r"fraction of the run in \[0, 1\], got 1\.5"]),
        (prune(window=(NAN, 0.5)), ["fraction", "nan"]),
        (quantize(window=(4, 2, 10)), ["observe must come before round", r"\(4, 2, 10\)"]),
        (quantize(window=(2, 4, 20)), ["freeze is step 20", "16 optimizer steps"]),
        (quantize(window=(2, 4)), ["observe, round, freeze", "2 entries"]),
    ],
)
def test_a_window_that_does_not_fit(make: Any, words: list[str], tmp_path: Path) -> None:
    refused(make, ValueError, *words, folder=tmp_path)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.zeros(1, 6, 6), torch.tensor(1)


class Endless(Small):
    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Stream(), batch_size=2)


@pytest.mark.parametrize(
    "make", [prune(window=(0.1, 0.7)), quantize(window=(0.6, 0.7, 0.9))], ids=["prune", "quantize"]
)
@pytest.mark.parametrize("options", [{"kind": Endless}, {"max_time": "00:01:00:00"}, {"max_epochs": -1}])
def test_fractions_of_a_run_of_unknown_length(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    refused(make, ValueError, "length is unknown", "steps", "max_steps", folder=tmp_path, **options)


@pytest.mark.parametrize("kind", [Small, LateConfigure], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("make", [prune, quantize], ids=["prune", "quantize"])
@pytest.mark.parametrize(
    ("patterns", "error", "words"),
    [
        ({"exclude": ["model"]}, NothingToCompress, ["empty", "model.4", "excluded", "include="]),
        ({"include": ["model.9"], "exclude": [nn.Linear]}, NothingToCompress, ["empty", "model.9", "include="]),
        ({"include": ["modle.4"]}, ValueError, ["include", "modle.4", "matches no module", r"model\.4"]),
        ({"exclude": ["Linaer"]}, ValueError, ["exclude", "Linaer", "matches no module", "Linear"]),
        ({"include": ["model.[0"]}, ValueError, ["matches no module"]),
    ],
)
def test_a_selection_of_nothing(make: Any, patterns: Any, error: Any, words: Any, kind: Any, tmp_path: Path) -> None:
    refused(make(**patterns), error, *words, folder=tmp_path, kind=kind)


class NoLayers(Small):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Flatten(), nn.LayerNorm(36), nn.AdaptiveAvgPool1d(3))


@pytest.mark.parametrize("make", [prune(), quantize()], ids=["prune", "quantize"])
def test_a_module_without_such_layers(make: Any, tmp_path: Path) -> None:
    refused(make, NothingToCompress, "Linear", "NoLayers", "found none", folder=tmp_path, kind=NoLayers)


class Integers(Small):
    def __init__(self) -> None:
        super().__init__()
        self.model[7].weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_quantization_of_integer_weights(tmp_path: Path) -> None:
    words = ["floating-point", "int8", r"model\.7", "exclude="]
    refused(quantize(), ValueError, *words, folder=tmp_path, kind=Integers)


class Reparametrized(Small):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.model[7])


def test_quantization_of_a_reparametrized_weight(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleCallbacks, match=r"model\.7\.weight.*parametrize.*exclude="):
        train(build(Reparametrized), quantize()(None), tmp_path)


def test_a_monitor_with_nothing_to_watch(tmp_path: Path) -> None:
    refused(lambda module: [CompressionMonitor()], NothingToCompress, "nothing to watch", "remove", folder=tmp_path)


# Teachers


def small_teacher(classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, classes))


@pytest.mark.parametrize("kind", [Small, LateConfigure], ids=lambda kind: kind.__name__)
def test_a_teacher_with_other_classes(kind: type[Small], tmp_path: Path) -> None:
    words = [r"\(2, 5\)|\(16, 5\)", r"\(2, 3\)|\(16, 3\)", "Sequential", "outputs="]
    refused(lambda module: [Distillation(small_teacher(5))], ValueError, *words, folder=tmp_path, kind=kind)


def test_a_teacher_with_other_classes_is_named_before_the_first_batch(tmp_path: Path) -> None:
    batches: list[int] = []

    class Batches(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            batches.append(1)

    with pytest.raises(ValueError, match="logits of one shape"):
        train(build(Small), [Distillation(small_teacher(5)), Batches()], tmp_path)
    assert batches == []


class NeedsMore(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        raise NotImplementedError


def test_a_teacher_that_needs_inputs_the_step_lacks(tmp_path: Path) -> None:
    words = ["NeedsMore", "lengths", r"\(2, 1, 6, 6\)", "inputs="]
    refused(lambda module: [Distillation(NeedsMore())], TypeError, *words, folder=tmp_path)
    words = ["NeedsMore", "input_ids=", "inputs="]
    refused(lambda module: [Distillation(NeedsMore())], TypeError, *words, folder=tmp_path, kind=Bert)


@pytest.mark.parametrize(
    ("teacher", "error", "words"),
    [
        (lambda module: module, ValueError, ["shares parameters", "deepcopy"]),
        (lambda module: lambda: 3, TypeError, ["torch.nn.Module", "int"]),
        (lambda module: "nowhere.ckpt", FileNotFoundError, ["nowhere.ckpt", "does not exist"]),
    ],
)
def test_no_teacher(teacher: Any, error: Any, words: list[str], tmp_path: Path) -> None:
    refused(lambda module: [Distillation(teacher(module))], error, *words, folder=tmp_path)


def test_a_step_with_several_models_and_no_student_named(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match=r"several models.*critic.*model.*student="):
        train(build(Adversaries), [Distillation(small_teacher(3))], tmp_path)


def test_a_student_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, ValueError, CompressError), match="nobody"):
        train(build(Small), [Distillation(small_teacher(3), student="nobody")], tmp_path)


# Callbacks that cannot meet


@pytest.mark.parametrize("first", [{}, {"include": ["model.4"]}], ids=["all", "one"])
def test_two_prunings_of_one_weight(first: dict[str, Any], tmp_path: Path) -> None:
    def make(module: L.LightningModule) -> list[L.Callback]:
        return [GradualPruning(0.3, window=(2, 8), **first), GradualPruning(0.5, window=(2, 8))]

    words = ["GradualPruning and GradualPruning both prune model", "include/exclude"]
    refused(make, IncompatibleCallbacks, *words, folder=tmp_path)


def test_two_quantizations_of_one_layer(tmp_path: Path) -> None:
    def make(module: L.LightningModule) -> list[L.Callback]:
        return [*quantize()(module), *quantize(weights=4)(module)]

    refused(make, IncompatibleCallbacks, "both quantize model", "include/exclude", folder=tmp_path)


def test_two_distillations(tmp_path: Path) -> None:
    def make(module: L.LightningModule) -> list[L.Callback]:
        return [Distillation(small_teacher(3)), Distillation(small_teacher(3), weight=0.1)]

    refused(make, IncompatibleCallbacks, "both distil", folder=tmp_path)


def test_prunings_and_quantizations_of_different_layers_meet(tmp_path: Path) -> None:
    def make() -> list[L.Callback]:
        return [
            GradualPruning(0.5, window=(2, 8), include=["model.4"]),
            GradualPruning(0.9, window=(2, 8), include=["model.7"]),
            QuantizationAwareTraining(window=(2, 4, 10), include=["model.4"]),
            QuantizationAwareTraining(weights=4, window=(2, 4, 10), include=["model.7"]),
        ]

    module, fresh = build(Small), build(Small)
    run = train(module, make(), tmp_path)
    assert [int((module.model[index].weight == 0).sum()) for index in (4, 7)] == [512, round(0.9 * 256)]
    run.trainer.save_checkpoint(tmp_path / "both.ckpt")
    again = make()
    train(fresh, again, tmp_path, ckpt_path=tmp_path / "both.ckpt", max_epochs=5)
    assert [list(callback.masks) for callback in again[:2]] == [["model.4.weight"], ["model.7.weight"]]
    assert [list(callback.ranges()) for callback in again[2:]] == [["model.4"], ["model.7"]]


@pytest.mark.parametrize("make", [prune(), quantize()], ids=["prune", "quantize"])
def test_lightning_model_pruning_beside_ours(make: Any, tmp_path: Path) -> None:
    def both(module: L.LightningModule) -> list[L.Callback]:
        return [ModelPruning("l1_unstructured", [(module.model[4], "weight")]), *make(module)]

    with pytest.raises(IncompatibleCallbacks, match=r"ModelPruning.*GradualPruning"):
        train(*(lambda module: (module, both(module)))(build(Small)), tmp_path)


class Sharded(DeepSpeedStrategy):
    """Claims to shard, without the accelerator that Lightning wants for it."""

    def __init__(self) -> None:
        pass


@pytest.mark.parametrize("row", CHANGING, ids=lambda row: row.name)
def test_a_strategy_that_shards_in_an_unknown_way(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build(Small)
    trainer = trainer_for(tmp_path, row.make(module))
    monkeypatch.setattr(type(trainer), "strategy", Sharded())
    with pytest.raises(UnsupportedStrategy, match=rf"{row.callback.__name__}.*Sharded.*strategy='ddp'"):
        trainer.callbacks[0].setup(trainer, module, "fit")


# Checkpoints of others


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[list[L.Callback]], Path]:
    def save(callbacks: list[L.Callback]) -> Path:
        run = train(build(Small), callbacks, tmp_path, max_epochs=3)
        run.trainer.save_checkpoint(tmp_path / "other.ckpt")
        return tmp_path / "other.ckpt"

    return save


OTHER_KEY = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@OTHER_KEY
@pytest.mark.parametrize(
    ("saved", "now", "words"),
    [
        (prune(), prune(window=(2, 9)), [r"window=\[2, 8\]", r"window=\[2, 9\]"]),
        (prune(), prune(include=["model.4"]), ["include=None", r"include=\['model.4'\]"]),
        (quantize(), quantize(weights=4), [r"weights=.Symmetric\(bits=8", r"weights=.Symmetric\(bits=4"]),
        (quantize(), quantize(exclude=["model.4"]), ["exclude=None", r"exclude=\['model.4'\]"]),
    ],
)
def test_a_checkpoint_of_another_recipe(
    saved: Any, now: Any, words: list[str], checkpoint: Any, tmp_path: Path
) -> None:
    path = checkpoint(saved(None))
    words = [*words, "same recipe", "load_from_checkpoint"]
    module = build(Small)
    with pytest.raises(CheckpointMismatch) as raised:
        train(module, now(module), tmp_path, ckpt_path=path)
    assert all(re.search(word, str(raised.value)) for word in words), str(raised.value)


@OTHER_KEY
def test_a_distillation_checkpoint_of_another_recipe(checkpoint: Any, tmp_path: Path) -> None:
    path = checkpoint([Distillation(small_teacher(3))])
    with pytest.raises(CheckpointMismatch, match=r"temperature=2\.0.*temperature=4\.0.*same recipe"):
        train(build(Small), [Distillation(small_teacher(3), temperature=4.0)], tmp_path, ckpt_path=path)


@pytest.mark.parametrize("row", CHANGING, ids=lambda row: row.name)
def test_a_checkpoint_of_a_newer_format(row: Row, checkpoint: Any, tmp_path: Path) -> None:
    module = build(Small)
    path = checkpoint(row.make(module))
    saved = torch.load(path, weights_only=True)
    for key, state in saved["callbacks"].items():
        if key.startswith(row.callback.__name__):
            state["format"] = 99
    torch.save(saved, path)
    fresh = build(Small)
    with pytest.raises(CheckpointMismatch, match=r"format 99.*reads 1.*update lightning-compress"):
        train(fresh, row.make(fresh), tmp_path, ckpt_path=path)


class Wider(Small):
    """Has one layer more than the checkpoint's module."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}
        checkpoint["optimizer_states"] = []


def test_a_checkpoint_of_another_module(checkpoint: Any, tmp_path: Path) -> None:
    path = checkpoint(prune()(None))
    with pytest.raises(CheckpointMismatch, match=r"other weights.*model\.9\.weight.*include/exclude"):
        train(build(Wider), prune()(None), tmp_path, ckpt_path=path)


@promise("a second fit")
def test_a_fit_after_a_refused_one_is_as_if_it_never_was(row: Row, tmp_path: Path) -> None:
    """A mistake in one callback costs the others nothing: the same objects then train as fresh ones."""
    one, other = build(Small), build(Small)
    callbacks = row.make(other)
    with pytest.raises(ValueError, match="matches no module"):
        train(copy.deepcopy(one), [*callbacks, LateMistake()], tmp_path)
    again = train(one, callbacks, tmp_path)
    alone = train(other, row.make(other), tmp_path)
    assert differing({**again.weights, **row.memory(again)}, {**alone.weights, **row.memory(alone)}) == []


class LateMistake(L.Callback):
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        raise ValueError("this pattern matches no module")
