from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CheckpointMismatch, CompressError, GradualPruning, NothingToCompress, Reconstruction
from lightning_compress.pruning.reconstruction import output_error, reconstruct_weight

BATCH, BATCHES = 8, 6  # a batch; batches an epoch


class Net(L.LightningModule):
    """A frozen body in eval mode, as fine-tuned models have it, under a layer that trains and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Dropout()).eval().requires_grad_(False)
        self.middle, self.head = nn.Linear(24, 16), nn.Linear(16, 3)
        self.seen: list[Tensor] = []

    def forward(self, value: Tensor) -> Tensor:
        value = self.body(value)
        if torch.is_grad_enabled():
            self.seen.append(value.detach())
        return self.head(torch.tanh(self.middle(value)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(1000 * batch[0])  # must leave no mark

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    causes = torch.randn(BATCH * BATCHES, 4, generator=generator) @ torch.randn(4, 12, generator=generator)
    return DataLoader(TensorDataset(causes, causes[:, :3].argmax(dim=1)), batch_size=BATCH)


@pytest.fixture
def fit(tmp_path: Path) -> Any:
    def run(module: L.LightningModule, *callbacks: L.Callback, ckpt_path: Path | None = None, **options: Any) -> Any:
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        settings = {"max_epochs": 4, "accelerator": "cpu", "default_root_dir": tmp_path, **quiet, **options}
        trainer = L.Trainer(callbacks=list(callbacks), **settings)
        trainer.fit(module, data(), data(), ckpt_path=ckpt_path)
        return trainer

    return run


pytestmark = pytest.mark.filterwarnings("ignore:Found .* module")  # Lightning, on modules in eval mode


# The window


@pytest.mark.parametrize(("at", "batches", "first"), [(7, 3, 4), (2, 8, 0), (0.5, 4, 8), (24, 1, 23)])
def test_it_reconstructs_what_step_at_left_from_the_inputs_before(at: Any, batches: int, first: int, fit: Any) -> None:
    """The same weight as of a plain run's step `at`, reconstructed by hand from its own inputs."""
    step = round(at * 24) if isinstance(at, float) else at
    plain, module = Net(), Net()
    fit(plain, max_steps=step)
    done: list[Tensor] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == step:
                done.append(pl_module.middle.weight.detach().clone())

    callback = Reconstruction(0.6, at=at, batches=batches)
    fit(module, callback, Note())
    rows = torch.cat(plain.seen[first:step])
    assert len(rows) == (step - first) * BATCH
    expected, mask = reconstruct_weight(plain.middle.weight, rows.T @ rows, 230 / 384)
    assert torch.equal(callback.masks["middle.weight"], mask)
    torch.testing.assert_close(done[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(module.middle.weight != 0, mask)
    error = output_error(plain.middle.weight, expected, rows.T @ rows)
    assert callback.errors["middle.weight"] == pytest.approx(error, rel=1e-3)
    ((when, target, actual),) = callback.history
    assert (when, target) == (step, 0.6)
    assert actual == pytest.approx(round(0.6 * 672) / 672)


def test_all_batches_of_an_accumulated_step_count(fit: Any) -> None:
    accumulated, plain, seen = Net(), Net(), []
    callback = Reconstruction(0.5, at=2, batches=1)

    class Count(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            if callback.hessians["middle.weight"] is not None:
                seen.append(int(callback.hessians["middle.weight"].samples))

    fit(accumulated, callback, Count(), accumulate_grad_batches=3)
    assert seen == [0, BATCH, 2 * BATCH]  # the third one pruned and forgot
    fit(plain, max_steps=2, accumulate_grad_batches=3)
    rows = torch.cat(plain.seen[3:6])
    _, mask = reconstruct_weight(plain.middle.weight, rows.T @ rows, 192 / 384)
    assert torch.equal(callback.masks["middle.weight"], mask)


def test_it_moves_outputs_less_than_magnitude_does(fit: Any) -> None:
    plain, module = Net(), Net()
    callback = Reconstruction(0.5, at=12)
    fit(plain, max_steps=12)
    fit(module, callback, max_steps=12)
    pruned = Net()
    pruned.load_state_dict(plain.state_dict())
    for weight in (pruned.body[0].weight, pruned.middle.weight):
        lowest = weight.detach().abs().flatten().argsort()[: weight.numel() // 2]
        weight.data.view(-1)[lowest] = 0.0
    inputs = data().dataset.tensors[0]
    with torch.no_grad():
        ours, theirs = ((net(inputs) - plain(inputs)).norm() for net in (module, pruned))
    assert ours < 0.7 * theirs


def test_n_of_m(fit: Any) -> None:
    module = Net()
    fit(module, Reconstruction(0.5, at=4, pattern=(2, 4)))
    for weight in (module.middle.weight, module.body[0].weight):
        assert (weight.view(len(weight), -1, 4) != 0).sum(dim=-1).eq(2).all()


def test_it_prunes_beside_gradual_pruning_of_other_layers(fit: Any) -> None:
    module = Net()
    gradual = GradualPruning(0.75, window=(2, 10), include=["body"])
    fit(module, Reconstruction(0.5, at=6, include=["middle"]), gradual)
    assert int((module.middle.weight == 0).sum()) == 192
    assert int((module.body[0].weight == 0).sum()) == 216


# Resuming


def test_the_gathered_inputs_are_saved_and_nothing_of_them_after(fit: Any, tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step in (6, 12):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    whole, callback = Net(), Reconstruction(0.5, at=8, batches=4)
    fit(whole, callback, Save())
    for step, samples in ((6, 2 * BATCH), (12, None)):
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["callbacks"]
        state = next(value for key, value in saved.items() if key.startswith("Reconstruction"))
        if samples is None:
            assert state["gathered"] == {}
        else:
            assert int(state["gathered"]["hessians"]["middle.weight"]["samples"]) == samples
        resumed, again = Net(), Reconstruction(0.5, at=8, batches=4)
        fit(resumed, again, ckpt_path=tmp_path / f"{step}.ckpt")
        assert again.history == callback.history
        assert again.errors == callback.errors
        assert all(torch.equal(again.masks[name], mask) for name, mask in callback.masks.items())
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_run_resumed_later_without_the_state_gathers_as_long_from_there(fit: Any, tmp_path: Path) -> None:
    fit(Net(), max_epochs=2).save_checkpoint(tmp_path / "plain.ckpt")
    module, callback = Net(), Reconstruction(0.5, at=7, batches=3)
    fit(module, callback, ckpt_path=tmp_path / "plain.ckpt")
    assert [step for step, *_ in callback.history] == [15]
    assert int((module.middle.weight == 0).sum()) == 192


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_other_options_are_named(fit: Any, tmp_path: Path) -> None:
    fit(Net(), Reconstruction(0.5, at=3), max_epochs=2).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointMismatch, match=r"damping=0\.01, this run has damping=0\.1"):
        fit(Net(), Reconstruction(0.5, at=3, damping=0.1), ckpt_path=tmp_path / "a.ckpt")


# What is refused, and what is warned about


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\), got 1\.0"),
        ({"batches": 0}, "at least 1, got 0"),
        ({"batches": 0.5}, r"optimizer steps, at least 1, got 0\.5"),
        ({"damping": -1.0}, r"0 or more, got -1\.0"),
        ({"damping": float("nan")}, "got nan"),
        ({"pattern": (4, 4)}, r"1 <= keep < of, got \(4, 4\)"),
        ({"pattern": (1, 4)}, r"1:4 gives sparsity 0\.75, got 0\.5"),
    ],
)
def test_an_option_out_of_its_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Reconstruction(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"at": 0}, r"at=0 is optimizer step 0.*1 or later"),
        ({"at": 0.01}, r"at=0\.01 is optimizer step 0"),
        ({"at": 25}, r"at is step 25, but the run has 24 optimizer steps"),
        ({"pattern": (5, 10)}, r"5:10 needs dimension 1 of 'body\.0\.weight'.*got 12"),
        ({"include": ["nothing"]}, "include pattern 'nothing' matches no module"),
    ],
)
def test_what_does_not_fit_the_run_is_named_at_setup(options: dict[str, Any], words: str, fit: Any) -> None:
    module = Net()
    with pytest.raises(ValueError, match=words):
        fit(module, Reconstruction(**{"sparsity": 0.5, **options}))
    assert not any(layer._forward_pre_hooks for layer in module.modules())


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


def test_layers_that_never_run_lose_their_smallest_weights_unless_they_are_all(fit: Any) -> None:
    module = Unused()
    with torch.no_grad():
        module.spare.weight.copy_(torch.arange(1.0, 17.0).view(4, 4))
    fit(module, Reconstruction(0.5, at=3, include=["middle", "spare"]))
    assert torch.equal(module.spare.weight.flatten(), torch.cat([torch.zeros(8), torch.arange(9.0, 17.0)]))
    with pytest.raises(NothingToCompress, match=r"none of the 1 selected.*in the 3 steps before step 3: spare\.weight"):
        fit(Unused(), Reconstruction(0.5, at=3, include=["spare"]))


def test_infinite_inputs_are_named(fit: Any) -> None:
    class Spoiled(Net):
        def forward(self, value: Tensor) -> Tensor:
            if self.training and self.global_step == 2:
                self.middle(torch.full((1, 24), float("inf")))
            return super().forward(value)

    module = Spoiled()
    with pytest.raises(
        CompressError, match=r"infinite inputs of 'middle\.weight' at optimizer step 4; nothing is pruned"
    ):
        fit(module, Reconstruction(0.5, at=4))
    assert module.body[0].weight.all()


def test_a_fit_that_ends_before_says_so(fit: Any) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 3

    with pytest.warns(UserWarning, match="Reconstruction did not finish"):
        fit(Net(), Reconstruction(0.5, at=20), Stop())
