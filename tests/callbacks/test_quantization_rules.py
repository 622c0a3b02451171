"""Details(observer=..., noise=...): ranges that a rule makes of what was observed, and rounding with noise."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import QuantizationAwareTraining, fake_quantized
from lightning_compress.quantization.attach import STATE, FakeQuant, Phase
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.learned_steps import LSQ
from lightning_compress.quantization.noise import Noise
from lightning_compress.quantization.ranges import RangeRule, Seen, mean_square_error, min_max, percentile
from lightning_compress.quantization.weights import Symmetric
from tests.callbacks.quiet import quiet_fit

STEPS, WINDOW = 12, (2, 5, 9)
SHARE = functools.partial(percentile, share=0.95)


class Net(L.LightningModule):
    """It notes what its second layer was called with, the weight and the input that the layer used, and its phase."""

    def __init__(self, checkpointed: bool | None = None) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.checkpointed, self.notes = checkpointed, []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(inputs)))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = torch.relu(self.first(batch[0]))
        state: FakeQuant = self.second.__dict__[STATE]
        used: list[Tensor] = []
        handle = self.second.register_forward_pre_hook(lambda layer, args: used.extend([layer.weight, args[0]]))
        if self.checkpointed is None:
            out = self.second(hidden)
        else:
            out = checkpoint(self.second, hidden, use_reentrant=self.checkpointed)
        handle.remove()
        weight = self.second.weight.detach().clone()
        self.notes.append((state.phase, hidden.detach(), state.extremes.tolist(), weight, *used[:2]))
        return functional.cross_entropy(self.head(torch.relu(out)), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    def observed(self) -> Tensor:
        """All inputs of the second layer while ranges were observed."""
        return torch.cat([hidden.flatten() for phase, hidden, *_ in self.notes if phase == Phase.OBSERVE])


def data() -> TensorDataset:
    inputs = torch.randn(8 * STEPS, 6, generator=torch.Generator().manual_seed(0)) ** 3
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


def fit(callback: L.Callback, module: Net | None = None, **options: Any) -> tuple[Net, L.Trainer]:
    if module is None:
        torch.manual_seed(0)
        module = Net()
    return module, quiet_fit(module, callback, data(), **options)


def qat(observer: RangeRule | None = None, noise: Noise | None = None, **options: Any) -> QuantizationAwareTraining:
    details = Details(observer=observer, noise=noise or Noise())
    return QuantizationAwareTraining(**{"window": WINDOW, "details": details, **options})


# Rules


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_percentile_is_numpys_of_all_that_was_observed_and_stays(accumulate: int) -> None:
    window = WINDOW if accumulate == 1 else (1, 2, 3)
    callback = qat(SHARE, window=window)
    module, _ = fit(callback, accumulate_grad_batches=accumulate)
    trained = callback.ranges()["second"]
    wanted = np.percentile(module.observed().numpy(), 95)
    assert trained.high == pytest.approx(wanted, rel=0.03)
    assert trained.high < 0.9 * float(module.observed().max())
    assert trained.low == 0.0
    after = {tuple(ends) for phase, _, ends, *_ in module.notes if phase >= Phase.ROUND}
    assert after == {(-trained.low, trained.high)}


@pytest.mark.parametrize("rule", [min_max, mean_square_error])
def test_a_rule_is_given_all_that_was_observed_and_the_inputs_width(rule: RangeRule) -> None:
    callback = qat(rule, inputs=3)
    module, _ = fit(callback)
    seen = Seen()
    seen.add(module.observed())
    trained = callback.ranges()["second"]
    assert (trained.low, trained.high) == pytest.approx(rule(seen, 3), rel=1e-6)
    assert (trained.high < float(module.observed().max())) == (rule is mean_square_error)


def test_inputs_that_begin_later_are_observed_until_then() -> None:
    callback = QuantizationAwareTraining(window=WINDOW, details=Details(observer=min_max, inputs_from=7))
    module, _ = fit(callback)
    inputs = [hidden for phase, hidden, *_ in module.notes if phase >= Phase.OBSERVE][:5]
    assert callback.ranges()["second"].high == float(torch.cat(inputs).max())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_range(reentrant: bool) -> None:
    def ranges(checkpointed: bool | None) -> Any:
        torch.manual_seed(0)
        callback = qat(SHARE)
        module, _ = fit(callback, Net(checkpointed))
        return callback.ranges(), module.state_dict()

    plain, again = ranges(None), ranges(reentrant)
    assert again[0] == plain[0]
    assert all(torch.equal(value, plain[1][name]) for name, value in again[1].items())


def test_a_layer_called_twice_and_one_that_is_called_with_nothing() -> None:
    class Twice(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.second(torch.empty(0, 8))
            again = self.second(torch.full((8, 8), 90.0))
            return super().training_step(batch, batch_idx) + 0 * again.sum()

    torch.manual_seed(0)
    callback = qat(functools.partial(percentile, share=0.75))
    fit(callback, Twice())
    assert callback.ranges()["second"].high == pytest.approx(90.0, rel=0.01)  # half of all values


def test_a_step_with_nan_is_named_and_left_out() -> None:
    class Broken(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 3:
                self.second(torch.tensor([[float("nan"), *[1e6] * 7]]))
            return loss

    torch.manual_seed(0)
    callback = qat(functools.partial(percentile, share=1 - 1e-9))
    with pytest.warns(UserWarning, match="input of 'second' held NaN or infinity in optimizer step 4"):
        module, _ = fit(callback, Broken())
    kept = [hidden for phase, hidden, *_ in module.notes if phase == Phase.OBSERVE]
    assert callback.ranges()["second"].high == pytest.approx(float(torch.cat([kept[0], kept[2]]).max()), rel=1 / 128)


def test_what_a_rule_may_not_be_is_named_when_it_is_given() -> None:
    with pytest.raises(ValueError, match=r"share is .* got 2"):
        Details(observer=functools.partial(percentile, share=2))
    with pytest.raises(TypeError):
        Details(observer=lambda: (0.0, 1.0))  # type: ignore[arg-type, misc]


class Saving(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize(
    "options",
    [{"observer": SHARE}, {"observer": min_max}, {"noise": Noise(weights=True, inputs=0.5)}],
    ids=["percentile", "min_max", "noise"],
)
def test_resuming_in_each_phase_is_exact(options: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, whole = Net(), qat(**options)
    loaders = DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=96)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    one = {"limit_train_batches": 1, "limit_val_batches": 0, "enable_checkpointing": False, "max_epochs": STEPS}
    L.Trainer(callbacks=[whole, Saving(tmp_path)], **one, **quiet).fit(module, *loaders)
    for step in (1, 3, 4, 5, 7, 10):
        again, other = qat(**options), Net()
        L.Trainer(callbacks=[again], **one, **quiet).fit(other, *loaders, ckpt_path=tmp_path / f"{step}.ckpt")
        assert again.ranges() == whole.ranges(), step
        assert all(torch.equal(other.state_dict()[name], value) for name, value in module.state_dict().items()), step


# Noise


def on_grid(weight: Tensor, used: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Whole codes that a rounded weight stands for, and what the weight was in steps."""
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    codes = used / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    return codes.round(), weight / step


def test_weights_are_rounded_up_or_down_until_ranges_are_frozen_and_to_nearest_in_validation() -> None:
    callback = qat(noise=Noise(weights=True), weights=3)
    module, trainer = fit(callback)
    for phase, _, _, weight, used, _ in module.notes:
        if phase >= Phase.ROUND:
            codes, steps = on_grid(weight, used, 3)
            assert ((codes - steps).abs() < 1).all()
            nearest = bool(((codes - steps).abs() <= 0.5001).all())
            assert nearest == (phase == Phase.FROZEN)
    inputs, labels = data().tensors
    with torch.no_grad(), fake_quantized(module, callback.ranges()):
        assert trainer.callback_metrics["val_loss"] == functional.cross_entropy(module(inputs), labels)


def test_validation_between_noisy_steps_rounds_to_nearest() -> None:
    class Validated(Net):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            state: FakeQuant = self.second.__dict__[STATE]
            used = (self.second(torch.eye(8)) - self.second.bias).T
            codes, steps = on_grid(self.second.weight, used, 3)
            self.validated.append((state.phase, bool(((codes - steps).abs() <= 0.5001).all())))

    torch.manual_seed(0)
    module = Validated()
    module.validated = []
    fit(qat(noise=Noise(weights=True), weights=3, inputs=None, window=(0, 1, 11)), module, val_check_interval=1)
    assert module.validated == [(Phase.ROUND, True)] * 10 + [(Phase.FROZEN, True)] * 2


def test_a_share_of_inputs_stays_unrounded_in_training() -> None:
    callback = qat(noise=Noise(inputs=0.25), inputs=2)
    module, trainer = fit(callback)
    shares = {}
    for phase, hidden, (_, high), _, _, used in module.notes:
        if phase >= Phase.ROUND:
            step = high / 3
            rounded = (hidden / step).round().clamp(0, 3) * step
            assert torch.isclose(used, hidden).logical_or(torch.isclose(used, rounded, atol=1e-6)).all()
            differ = ~torch.isclose(hidden, rounded)
            shares.setdefault(phase, []).append(torch.isclose(used, hidden)[differ].float().mean())
    assert torch.stack(shares[Phase.ROUND]).mean() == pytest.approx(0.25, abs=0.1)
    assert torch.stack(shares[Phase.FROZEN]).max() == 0.0
    inputs, labels = data().tensors
    with torch.no_grad(), fake_quantized(module, callback.ranges()):
        assert trainer.callback_metrics["val_loss"] == functional.cross_entropy(module(inputs), labels)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputation_draws_the_same_noise(reentrant: bool) -> None:
    found = []
    for checkpointed in (None, reentrant):
        torch.manual_seed(0)
        found.append(fit(qat(noise=Noise(weights=True, inputs=0.5)), Net(checkpointed))[0].state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_accumulation_keeps_a_steps_rounded_weight() -> None:
    callback = qat(noise=Noise(weights=True), window=(0, 1, 4))
    module, _ = fit(callback, accumulate_grad_batches=3)
    used = [note[4] for note in module.notes[3:]]
    assert torch.equal(used[0], used[2])
    assert not torch.equal(used[2], used[3])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": LSQ(4), "noise": Noise(True)}, r"'first' cannot be rounded at random.*Symmetric.*LSQ\(bits=4"),
        (
            {"per_layer": {"second": (LSQ(4), 8)}, "noise": Noise(weights=True)},
            r"'second' cannot be rounded at random.*per_layer",
        ),
        ({"inputs": None, "noise": Noise(inputs=0.5)}, r"Noise\(inputs=0.5\) drops .* no input is rounded"),
    ],
)  # fmt: skip
def test_noise_that_has_no_place_is_named_at_setup(options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit(qat(**options))


@pytest.mark.parametrize("group", ["channel", "tensor", 4])
def test_noise_of_each_symmetric_group_is_unbiased(group: Any) -> None:
    grid, weight = Symmetric(4, group), torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(800, 4, 8, generator=torch.Generator().manual_seed(1))
    draws = torch.stack([grid.values_at_random(weight, each) for each in noise])
    step = (grid.values(weight) - weight).abs().max() * 2.5
    assert (draws.mean(0) - weight).abs().max() < 5 * 0.5 * step / 800**0.5
