"""A plan says before the run what the run then does."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    Distillation,
    GradualPruning,
    LotteryRewinding,
    NothingToCompress,
    QuantizationAwareTraining,
    Reconstruction,
    Removal,
    SparsityRegularization,
    StructuredPruning,
    WeightSharing,
    export_onnx,
    plan,
    remove_zero_channels,
)
from lightning_compress.measure.size import count_nonzero, file_bytes
from lightning_compress.pruning.criteria import taylor
from lightning_compress.pruning.patterns import NM
from lightning_compress.pruning.regrowth import RigL
from lightning_compress.pruning.scopes import uniform
from lightning_compress.weight_sharing.codebook import density


class Network(L.LightningModule):
    """Images to classes; a learning rate of 0 leaves the weights where the plan saw them."""

    def __init__(self, learning_rate: float = 0.0) -> None:
        super().__init__()
        self.rate = learning_rate
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(192, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)
        self.example_input_array = torch.zeros(1, 3, 8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate)


def network(learning_rate: float = 0.0) -> Network:
    torch.manual_seed(0)
    return Network(learning_rate)


def fit(module: L.LightningModule, *callbacks: L.Callback) -> None:
    images = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(80) % 10
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=8))


def rows(found: object) -> dict[str, object]:
    return {row.name: row for row in found.layers}


def test_sparsities_are_those_of_a_run_whose_weights_do_not_move() -> None:
    module = network()
    found = plan(module, GradualPruning(0.8))

    pruning = GradualPruning(0.8, window=(1, 2))
    fit(module, pruning)

    masks = {name.removesuffix(".weight"): mask for name, mask in pruning.masks.items()}
    expected = {name: row.sparsity for name, row in rows(found).items() if row.sparsity is not None}
    assert expected == {name: pytest.approx(1 - float(mask.float().mean())) for name, mask in masks.items()}
    zeros = count_nonzero({name: p for name, p in module.named_parameters() if p.dim() > 1})
    vectors = sum(p.numel() for p in module.parameters() if p.dim() == 1)
    assert found.expects("weights that are not zero") == zeros.nonzero + vectors


def test_totals_are_those_of_a_run_whose_weights_do_move(tmp_path: Path) -> None:
    module = network(0.1)
    callbacks = [GradualPruning(0.9, window=(2, 10)), QuantizationAwareTraining(window=(4, 8, 16))]
    found = plan(module, callbacks, steps=20)

    fit(module, *callbacks)

    assert found.expects("weights that are not zero") == pytest.approx(count_nonzero(module).nonzero, abs=2)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    assert found.expects("weights file, bytes") == pytest.approx(file_bytes(tmp_path / "weights.pt"), rel=0.005)
    file = export_onnx(module, tmp_path / "int8.onnx", (torch.randn(8, 3, 8, 8),), ranges=callbacks[1].ranges())
    assert found.expects("int8 ONNX file, bytes") == pytest.approx(file_bytes(file), rel=0.06)  # 30 kB: mostly graph


def test_channels_are_those_that_a_run_takes_out() -> None:
    module = network()
    structured = {"amount": 0.5, "removal": Removal(multiple_of=4)}
    found = plan(module, StructuredPruning(**structured))

    fit(module, StructuredPruning(window=(1, 2), **structured))

    assert found.expects("parameters") == sum(parameter.numel() for parameter in module.parameters())
    sizes = {name: len(layer.weight) for name, layer in module.named_modules() if hasattr(layer, "weight")}
    planned = {name: row.channels[1] for name, row in rows(found).items() if row.channels}
    assert planned
    assert {name: sizes[name] for name in planned} == planned
    dense = rows(found)["body.3"].macs
    assert dense == 48 * 32 * 9 * 64
    assert found.expects("MACs of the example") <= 0.5 * plan(network(), GradualPruning(0.5)).expects(
        "MACs of the example"
    )


def test_zeros_left_in_by_a_removal_of_no_times_can_be_planned_too() -> None:
    module = network()
    found = plan(module, StructuredPruning(0.5, removal=Removal(times=0)))
    fit(module, StructuredPruning(0.5, window=(1, 2), removal=Removal(times=0)))
    remove_zero_channels(module, (torch.zeros(1, 3, 8, 8),))
    assert found.expects("parameters") == sum(parameter.numel() for parameter in module.parameters())


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.up = nn.ConvTranspose1d(32, 32, 2)
        self.tied = nn.Linear(32, 50, bias=False)
        self.tied.weight = self.words.weight
        self.head = nn.Linear(50, 5)


def test_each_layer_that_stays_has_its_reason() -> None:
    found = rows(plan(Everything(), [GradualPruning(0.5, exclude=["up"]), QuantizationAwareTraining()]))

    assert {name: row.dense_because for name, row in found.items()} == {
        "words": "embedding",
        "attention.in_proj": "MultiheadAttention has no such form",
        "attention.out_proj": "",
        "norm": "norm",
        "up": "excluded",
        "head": "output head",
    }
    reasons = {name: row.float_because for name, row in found.items()}
    assert reasons["head"] == "output head"
    assert (reasons["norm"], reasons["words"]) == ("norm", "embedding")
    assert found["attention.in_proj"].bits == found["attention.out_proj"].bits == 8


def test_the_module_is_left_as_it_was() -> None:
    module = network().train()
    before, hooks = copy.deepcopy(module.state_dict()), [len(m._forward_hooks) for m in module.modules()]
    plan(module, [GradualPruning(0.9), QuantizationAwareTraining(), Distillation(network())])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert hooks == [len(m._forward_hooks) for m in module.modules()]
    assert module.training


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (SparsityRegularization(sparsity=0.5), "adds l1 to the loss; at its end zeroes 50.0% of"),
        (Reconstruction(0.5), "zeroes 50.0% of"),
        (GradualPruning(0.5, pattern=NM(2, 4), exclude=["body.0"]), "NM(keep=2, of=4)"),
    ],
)
def test_every_pruning_callback_has_a_line(callback: L.Callback, says: str) -> None:
    found = plan(network(), callback)
    assert says in found.stages[0].does
    assert any(row.sparsity == pytest.approx(0.5, abs=0.3) for row in found.layers)


def test_shared_values_are_counted_as_a_run_finds_them() -> None:
    sharing = WeightSharing({"Conv2d": 16, "Linear": 8}, at=0.8, start=density)
    found = plan(network(), [sharing, GradualPruning(0.5)], steps=10)
    assert found.stages[0].does == "lets the weights of 3 layers share 8 to 16 values a layer, which are then trained"
    assert found.stages[0].moments == (("at", 8),)


def test_what_steps_will_show_is_said_to_be_unknown() -> None:
    by_gradient = plan(network(), [GradualPruning(0.5, criterion=taylor, window=(1, 5)), LotteryRewinding()], steps=10)
    assert any("taylor needs gradient" in warning for warning in by_gradient.warnings)
    grown = plan(network(), GradualPruning(0.5, pattern=RigL(scope=uniform)))
    assert any("RigL grows weights" in warning for warning in grown.warnings)
    assert all(row.sparsity == pytest.approx(0.5, abs=0.01) for row in grown.layers if row.sparsity is not None)


def test_second_looks() -> None:
    narrow = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 400))
    text = " ".join(plan(narrow, [GradualPruning(0.95), QuantizationAwareTraining()]).warnings)
    assert "fewer than 1000 weights" in text
    assert "the output head '4' stays as it is and holds 93% of the weights" in text
    assert "ran slower in int8 than in float32" in text
    flat = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 4))
    with torch.no_grad():
        flat[0].weight.mul_(1e-3)
    assert any("every weight of '0' would be zero" in each for each in plan(flat, GradualPruning(0.6)).warnings)


def test_moments_are_fractions_or_steps() -> None:
    callbacks = [GradualPruning(0.9, window=(0.1, 0.5)), QuantizationAwareTraining()]
    assert "from 0.1 to 0.5 of the run" in " ".join(str(plan(network(), callbacks)).split())
    known = plan(network(), callbacks, steps=400)
    assert "from step 40 to step 200 of 400 steps" in " ".join(str(known).split())
    assert len(known.stages[0].curve) == 21
    assert known.stages[0].curve[-1] == 0.9
    with pytest.raises(ValueError, match="window end is step 500, but the run has 400"):
        plan(network(), GradualPruning(0.9, window=(100, 500)), steps=400)


def test_it_is_kept_as_markdown_json_and_a_picture(tmp_path: Path) -> None:
    found = plan(network(), [GradualPruning(0.9), QuantizationAwareTraining()], steps=100)
    files = found.save(tmp_path)
    assert "| body.0 | Conv2d | 864 |" in files["plan.md"].read_text()
    assert json.loads(files["plan.json"].read_text())["steps"] == 100
    found.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"expected one of 'parameters'.*got 'bytes'"):
        found.expects("bytes")


def test_many_layers_of_one_fate_are_one_row() -> None:
    deep = nn.Sequential(*[nn.Linear(64, 64) for _ in range(60)], nn.Linear(64, 4))
    found = plan(deep, GradualPruning(0.5))
    assert len(found.layers) == 61
    assert "and 59 more" in found.text()
    assert "and 59 more" not in found.text(every_layer=True)
    assert "245,760" in found.text()


def test_wrong_inputs() -> None:
    with pytest.raises(NothingToCompress, match="expected callbacks of this package that are enabled"):
        plan(network(), [GradualPruning(0.9, enabled=False), L.Callback()])
    with pytest.raises(ValueError, match=r"StructuredPruning finds the channels.*give plan an example"):
        plan(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), StructuredPruning(0.5))
    with pytest.raises(ValueError, match="exclude pattern 'bodi' matches no module; near names: body"):
        plan(network(), GradualPruning(0.9, exclude=["bodi"]))
    with pytest.raises(ValueError, match="2:4 needs the inputs"):
        plan(network(), GradualPruning(0.5, pattern=NM(2, 4)))  # three input channels
