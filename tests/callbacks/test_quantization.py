from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import NothingToCompress, QuantizationAwareTraining, fake_quantized
from lightning_compress.quantization.attach import STATE, FakeQuant, Phase
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.fake import compiler_available

STEPS = 16


class Net(L.LightningModule):
    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 12)
        if unused:
            self.body_unused = nn.Linear(4, 4)
        self.head = nn.Linear(12, 3)
        self.phases: list[Phase] = []
        self.seen: list[torch.Tensor] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(inputs)))))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        state: FakeQuant | None = self.first.__dict__.get(STATE)
        if state is not None:
            self.phases.append(state.phase)
        self.seen.append(batch[0])
        return functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8 * STEPS, 6, generator=generator)
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def fit(module: Net, callback: QuantizationAwareTraining, **options: Any) -> L.Trainer:
    run = trainer(callback, **options)
    run.fit(module, DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=64))
    return run


@pytest.fixture
def module() -> Net:
    torch.manual_seed(0)
    return Net()


def test_phases_begin_at_their_steps(module: Net) -> None:
    fit(module, QuantizationAwareTraining(window=(2, 5, 9)))
    wanted = [Phase.OFF] * 2 + [Phase.OBSERVE] * 3 + [Phase.ROUND] * 4 + [Phase.FROZEN] * (STEPS - 9)
    assert module.phases == wanted


def test_ranges_are_the_moving_average_of_step_extremes(module: Net) -> None:
    callback = QuantizationAwareTraining(window=(2, 5, 9), details=Details(momentum=0.25))
    fit(module, callback)
    low = high = None
    for inputs in module.seen[2:9]:  # by hand: the first observed step as it is, then a moving average, then frozen
        least, most = float(inputs.min()), float(inputs.max())
        low = least if low is None else low + 0.25 * (least - low)
        high = most if high is None else high + 0.25 * (most - high)
    trained = callback.ranges()["first"]
    assert (trained.low, trained.high) == pytest.approx((low, high), rel=1e-6)


def test_accumulation_moves_ranges_once_a_step_over_all_micro_batches(module: Net) -> None:
    callback = QuantizationAwareTraining(window=(0, 1, 4), details=Details(momentum=0.5))
    fit(module, callback, accumulate_grad_batches=4)
    low = None
    for step in range(4):
        least = float(torch.cat(module.seen[4 * step : 4 * step + 4]).min())
        low = least if low is None else low + 0.5 * (least - low)
    assert callback.ranges()["first"].low == pytest.approx(low, rel=1e-6)


def test_an_uncalled_layer_stays_float_and_the_rest_is_quantized() -> None:
    callback = QuantizationAwareTraining(window=(1, 2, 3))
    fit(Net(unused=True), callback)
    assert set(callback.ranges()) == {"first", "second"}


def test_a_selection_that_is_never_called_fails() -> None:
    with pytest.raises(NothingToCompress, match="body_unused"):
        fit(Net(unused=True), QuantizationAwareTraining(window=(1, 2, 3), include=["body_unused"]))


def test_validation_during_and_after_the_fit_sees_the_rounded_model(module: Net) -> None:
    callback = QuantizationAwareTraining(window=(1, 2, 3))
    run = trainer(callback)
    loader = DataLoader(data(), batch_size=32)
    run.fit(module, DataLoader(data(), batch_size=8), loader)
    inputs, labels = data().tensors
    with torch.no_grad():
        plain = functional.cross_entropy(module(inputs), labels)
        with fake_quantized(module, callback.ranges()):
            rounded = functional.cross_entropy(module(inputs), labels)
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(float(rounded), abs=1e-6)
    again = run.validate(module, loader, verbose=False)[0]["val_loss"]
    assert again == pytest.approx(float(rounded), abs=1e-6)
    assert float(plain) != float(rounded)


def test_validation_before_the_fit_is_plain(module: Net) -> None:
    inputs, labels = data().tensors
    wanted = functional.cross_entropy(module(inputs), labels).item()
    run = trainer(QuantizationAwareTraining())
    assert run.validate(module, DataLoader(data(), batch_size=128), verbose=False)[0]["val_loss"] == pytest.approx(
        wanted
    )


def test_ranges_before_any_fit_name_the_cure() -> None:
    with pytest.raises(NothingToCompress, match="after fit"):
        QuantizationAwareTraining().ranges()


@pytest.mark.parametrize("option", [{"weights": 1}, {"inputs": 9}])
def test_options_out_of_range_are_named(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"bits is .*got"):
        QuantizationAwareTraining(**option)


@pytest.mark.skipif(not compiler_available(torch.device("cpu")), reason="needs a C++ compiler")
def test_compiled_rounding_trains_the_same_weights(module: Net) -> None:
    torch.manual_seed(0)
    twin = Net()
    fit(module, QuantizationAwareTraining(window=(1, 2, 12)))
    fit(twin, QuantizationAwareTraining(window=(1, 2, 12), details=Details(compiled=True)))
    for one, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_loaded_state_has_its_ranges_before_any_run(module: Net) -> None:
    callback = QuantizationAwareTraining(window=(2, 5, 9), details=Details(momentum=1))
    fit(module, callback)
    again = QuantizationAwareTraining(window=(2, 5, 9), details=Details(momentum=1.0))
    assert again.state_key == callback.state_key
    again.load_state_dict(callback.state_dict())
    assert again.ranges() == callback.ranges()


def test_resuming_a_plain_run_after_the_window_says_so(module: Net, tmp_path: Any) -> None:
    loaders = DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=64)
    plain = trainer(max_steps=8)
    plain.fit(module, *loaders)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    late = trainer(QuantizationAwareTraining(window=(2, 5, 9)))
    late.fit_loop.max_epochs = 2
    with pytest.raises(NothingToCompress, match="resumed without ranges round only after step 8"):
        late.fit(Net(), *loaders, ckpt_path=tmp_path / "plain.ckpt")
