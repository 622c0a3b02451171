"""Details(outputs=True): outputs that integer kernels need rounded are rounded while training, and reach the file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Details, QuantizationAwareTraining, export_onnx, fake_quantized, sharding
from lightning_compress.export.onnx import kernel_counts, run_onnx
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.outputs import OUTPUT_STATE, output_key
from lightning_compress.quantization.ranges import RangeRule, min_max, percentile

STEPS, EPOCH = 16, 1


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, value: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(value)))
        return torch.relu(self.bn2(self.conv2(inner)) + value)


class ResNet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.norm(self.stem(images)))).mean((2, 3)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def data() -> TensorDataset:
    images = torch.randn(8 * EPOCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, images.flatten(1)[:, :3].argmax(1))


def fit(folder: Path, *callbacks: L.Callback, **options: Any) -> tuple[ResNet, L.Trainer]:
    torch.manual_seed(0)
    module = ResNet()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, max_epochs=-1, callbacks=list(callbacks), logger=False,
        default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(), batch_size=8), **options)
    return module, trainer


def qat(window: tuple[int, int, int] = (2, 4, 12)) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(window=window, details=Details(outputs=True))


class StopAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_every_convolution_of_a_residual_network_runs_on_integers(tmp_path: Path) -> None:
    callback = qat()
    module, _ = fit(tmp_path, callback)
    ranges = callback.ranges()
    assert {output_key("blocks.0.bn2"), output_key("blocks.1.bn2")} <= set(ranges)
    assert not any(OUTPUT_STATE in part.__dict__ or part._forward_hooks for part in module.modules())
    images = data().tensors[0]
    path = export_onnx(module, tmp_path / "int8.onnx", (images,), ranges=ranges)
    counts = kernel_counts(path)
    assert counts.get("QLinearConv") == 5
    assert counts.get("QLinearAdd") == 2
    assert not {"Conv", "FusedConv"} & set(counts)
    with torch.no_grad(), fake_quantized(module.eval(), ranges):
        expected = module(images)
    assert not torch.equal(expected, module(images))
    assert sqnr_db(expected.numpy(), run_onnx(path, images.numpy())[0]) > 25


@pytest.mark.parametrize("at", [1, 3, 7, 14])
def test_a_resumed_run_is_the_uninterrupted_one(at: int, tmp_path: Path) -> None:
    whole, path = qat(), tmp_path / "at.ckpt"
    expected, _ = fit(tmp_path, whole, StopAt(at, path))
    again = qat()
    resumed, _ = fit(tmp_path, again, ckpt_path=path)
    assert again.ranges() == whole.ranges()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_rule_makes_the_ranges_of_outputs_and_their_readers_before_anything_is_rounded(tmp_path: Path) -> None:
    rule, path = functools.partial(percentile, share=0.9), tmp_path / "at.ckpt"

    def fresh(observer: RangeRule) -> QuantizationAwareTraining:
        return QuantizationAwareTraining(window=(2, 4, 12), details=Details(outputs=True, observer=observer))

    whole, widest, again = fresh(rule), fresh(min_max), fresh(rule)
    expected, _ = fit(tmp_path, whole, StopAt(3, path))
    resumed, _ = fit(tmp_path, again, ckpt_path=path)
    fit(tmp_path, widest)
    assert again.ranges() == whole.ranges()
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in expected.state_dict().items())
    assert whole.outputs.places
    for place in whole.outputs.places:
        trained = whole.ranges()[output_key(place.name)]
        assert trained.high < 0.9 * widest.ranges()[output_key(place.name)].high
        for reader in place.readers:
            assert (whole.ranges()[reader].low, whole.ranges()[reader].high) == (trained.low, trained.high)


@pytest.mark.parametrize(("observer", "observing"), [(None, 1), (percentile, 2)])
def test_inputs_and_outputs_cost_one_collective_a_step_and_none_once_frozen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observer: RangeRule | None, observing: int
) -> None:
    """A rule's counts cost one more, of all inputs and outputs together, while they are observed."""
    calls, by_step = [], []

    class Note(L.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:  # each epoch is one step
            by_step.append(len(calls))
            calls.clear()

    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(sharding.dist, "all_reduce", lambda tensor, op: calls.append(op))
    callback = QuantizationAwareTraining(window=(2, 4, 12), details=Details(outputs=True, observer=observer))
    fit(tmp_path, callback, Note())
    assert by_step == [0] * 2 + [observing] * 2 + [1] * 8 + [0] * 4
    assert output_key("blocks.0.bn2") in callback.ranges()


def test_an_exception_leaves_no_hook(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_before_backward(self, *_: Any) -> None:
            raise RuntimeError("stop")

    torch.manual_seed(0)
    with pytest.raises(RuntimeError, match="stop"):
        fit(tmp_path, Fails(), qat())
    images = torch.randn(2, 1, 8, 8)
    assert ResNet()(images).shape == (2, 3)  # no dispatch mode is left either
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
