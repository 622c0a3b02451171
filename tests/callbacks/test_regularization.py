from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    CheckpointMismatch,
    CompressError,
    GradualPruning,
    IncompatibleCallbacks,
    Linear,
    NothingToCompress,
    QuantizationAwareTraining,
    SparsityRegularization,
)
from lightning_compress.pruning.gates import HardConcrete, SoftMovement, SoftThreshold
from lightning_compress.pruning.penalties import group_hoyer_square, group_lasso, hoyer_square, l1

PENALTIES = (l1, group_lasso, hoyer_square, group_hoyer_square)
GATES = (HardConcrete(), SoftThreshold(), SoftMovement())
STEPS = 12


class Net(L.LightningModule):
    """Keeps the loss of each backward, and the weights that it was for."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.optimizer = optimizer
        self.losses: list[float] = []
        self.tasks: list[float] = []
        self.before: list[dict[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        task = functional.cross_entropy(self.model(batch[0]), batch[1])
        if self.training:
            self.tasks.append(task.item())
            self.before.append({n: p.detach().clone() for n, p in self.model.named_parameters() if p.dim() > 1})
        return task

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", Net.training_step(self, batch, batch_idx))

    def on_before_backward(self, loss: Tensor) -> None:
        self.losses.append(loss.item())

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.05)


class ByHand(Net):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def data() -> DataLoader:
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(32, 4, generator=source)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch_size=8)


def fit(
    *callbacks: L.Callback, module: Net | None = None, steps: int = STEPS, ckpt: Path | None = None, **options: Any
) -> Net:
    if module is None:
        torch.manual_seed(0)
        module = Net()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {**quiet, "max_steps": steps, "max_epochs": -1, "accelerator": "cpu", "log_every_n_steps": 1, **options}
    L.Trainer(callbacks=list(callbacks), **settings).fit(module, data(), data(), ckpt_path=ckpt)
    return module


def named(term: Any) -> str:
    return getattr(term, "__name__", type(term).__name__)


# What is left


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("term", [*PENALTIES, *GATES], ids=named)
def test_every_term_ends_at_exactly_the_asked_sparsity(term: Any, sparsity: float) -> None:
    regularization = SparsityRegularization(term, 1e-3, sparsity, window=(2, 8))
    module = fit(regularization)
    weights = [module.model[0].weight, module.model[2].weight]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == round(sparsity * 96)
    assert regularization.history == [(8, sparsity, pytest.approx(sparsity, abs=0.5 / 96))]
    assert regularization.complete
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in Net().named_parameters()]
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def test_penalties_zero_the_smallest_weights_of_all_layers_together() -> None:
    module = fit(SparsityRegularization(l1, 1e-3, 0.75, window=(2, 8)))
    cut = torch.cat([weight.flatten() for name, weight in module.before[8].items() if not name.startswith("4")])
    whole = fit(SparsityRegularization(l1, 1e-3, 0.0, window=(2, 8)))
    dense = torch.cat([weight.flatten() for name, weight in whole.before[8].items() if not name.startswith("4")])
    order = dense.abs().sort().indices
    assert torch.equal((cut == 0).nonzero().flatten(), order[: round(0.75 * 96)].sort().values)


def test_a_term_of_its_own_alone_makes_weights_small() -> None:
    plain, module = fit(), fit(SparsityRegularization(l1, 0.1, 0.0, window=(0, STEPS)))
    assert l1(module.model[0].weight) < 0.8 * l1(plain.model[0].weight)
    assert not bool((module.model[0].weight == 0).any())


def test_gates_learn() -> None:
    """With a strong penalty and quick gates nearly all are shut before the cut; without one none is."""
    regularization = SparsityRegularization(HardConcrete(learning_rate=2.0), 10.0, 0.0, window=(1, 11))
    shut = fit(regularization)
    assert float((shut.model[2].weight == 0).float().mean()) > 0.9
    kept = fit(SparsityRegularization(HardConcrete(), 0.0, 0.1, window=(1, 11)))
    assert int((kept.model[0].weight == 0).sum() + (kept.model[2].weight == 0).sum()) == round(9.6)


def test_folding_changes_nothing_that_evaluation_sees() -> None:
    """At the window's end a run without a cut computes as it did with its gates attached."""
    outputs: list[Tensor] = []

    class Compare(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            optimizer.param_groups[0]["lr"] = 0.0  # weights stay, gates learn
            with torch.no_grad():
                outputs.append(module.model.eval()(torch.ones(2, 4)))
                module.model.train()

    gate = HardConcrete(learning_rate=1e-9, initial_probability=0.6)
    fit(SparsityRegularization(gate, 1e-3, 0.0, window=(2, 6)), Compare())
    assert not torch.equal(outputs[1], outputs[2])  # gates of 0.62 are in
    for after in outputs[3:]:
        torch.testing.assert_close(after, outputs[2])


# The loss


@pytest.mark.parametrize("kind", [Net, ByHand], ids=named)
@pytest.mark.parametrize("term", PENALTIES, ids=named)
def test_the_loss_is_the_task_and_the_weighted_sum_over_layers(term: Any, kind: type[Net]) -> None:
    torch.manual_seed(0)
    module = kind()
    fit(SparsityRegularization(term, 0.02, 0.5, window=(3, 9), include=["model.0", "model.4"]), module=module)
    for step, (loss, task, before) in enumerate(zip(module.losses, module.tasks, module.before, strict=True)):
        penalty = sum(float(term(before[name])) for name in ("0.weight", "4.weight"))
        assert loss == pytest.approx(task + 0.02 * penalty * (3 <= step < 9), rel=1e-5)


def test_a_schedule_is_read_by_progress_through_the_window() -> None:
    module = fit(SparsityRegularization(l1, Linear(0.4), 0.0, window=(2, 6), include=["model.0"]))
    for step, (loss, task, before) in enumerate(zip(module.losses, module.tasks, module.before, strict=True)):
        factor = 0.1 * (step - 2) if 2 <= step < 6 else 0.0
        assert loss == pytest.approx(task + factor * float(before["0.weight"].abs().sum()), rel=1e-5)


@pytest.mark.parametrize(("term", "name"), [(l1, "l1"), (SoftThreshold(), "SoftThreshold")])
def test_the_term_is_logged_unweighted_and_validation_is_clean(term: Any, name: str) -> None:
    logged: list[float] = []

    class Read(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Net, *_: Any) -> None:
            if trainer.global_step == 5:
                logged.append(float(trainer.callback_metrics[f"compress/loss/{name}"]))
                logged.append((module.losses[-1] - module.tasks[-1]) / 0.5)

        def on_validation_end(self, trainer: L.Trainer, module: Net) -> None:
            if not trainer.sanity_checking:
                with torch.no_grad():
                    tasks = [functional.cross_entropy(module.model(x), y) for x, y in data()]
                assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(sum(tasks) / 4), rel=1e-5)

    fit(SparsityRegularization(term, 0.5, 0.5, window=(2, 8)), Read())
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_off_and_a_weight_of_zero() -> None:
    plain = fit()
    offs = [SparsityRegularization(enabled=False), SparsityRegularization(weight=0.0, sparsity=0.0)]
    for off in (*offs, SparsityRegularization(HardConcrete(), 0.0, 0.0)):
        assert not off.enabled
        module = fit(off)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    cut = fit(SparsityRegularization(weight=0.0, sparsity=0.5, window=(2, 8)))  # one-shot magnitude pruning
    pruned = fit(GradualPruning(lambda progress: 0.5 * (progress == 1.0), window=(2, 8), frequency=1))
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), cut.parameters(), strict=True))


# Resume


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("term", [l1, *GATES], ids=named)
def test_a_resumed_run_is_the_uninterrupted_one(term: Any, tmp_path: Path) -> None:
    def made() -> SparsityRegularization:
        return SparsityRegularization(term, 1e-3, 0.5, window=(2, 8))

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    def start() -> Net:
        torch.manual_seed(0)
        return Net(torch.optim.Adam)

    whole = fit(made(), Save(), module=start())
    for step in (4, 8):  # epochs' ends: this loader cannot say where in an epoch it is
        torch.manual_seed(step)
        regularization = made()
        resumed = fit(regularization, module=Net(torch.optim.Adam), ckpt=tmp_path / f"{step}.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)), step
        assert regularization.history[0][0] == 8
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == list(start().state_dict())
    other = SparsityRegularization(term, 2e-3, 0.5, window=(2, 8))
    with pytest.raises(CheckpointMismatch, match=r"weight='.*0\.001"):
        fit(other, module=start(), ckpt=tmp_path / "4.ckpt")


def test_a_run_resumed_after_the_window_is_named(tmp_path: Path) -> None:
    class Save(L.Callback):
        def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "plain.ckpt")

    fit(Save(), steps=8)
    with pytest.raises(ValueError, match=r"ends at step 6, but the run goes on at step 8.*later window"):
        fit(SparsityRegularization(window=(2, 6)), ckpt=tmp_path / "plain.ckpt")


def test_a_window_cut_short_is_warned_about_and_goes_on_in_the_next_fit() -> None:
    regularization = SparsityRegularization(HardConcrete(), 1e-3, 0.5, window=(2, 8))
    torch.manual_seed(0)
    module = Net()
    with pytest.warns(UserWarning, match="SparsityRegularization did not finish"):
        fit(regularization, Stop(), module=module)
    assert not module.model[0]._forward_hooks
    assert len(regularization.gates.parameters) == 2
    assert isinstance(copy.deepcopy(regularization), SparsityRegularization)
    assert isinstance(pickle.loads(pickle.dumps(regularization)), SparsityRegularization)


class Stop(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 4


# Together, and what is refused


def test_a_penalty_beside_gradual_pruning() -> None:
    pruning = GradualPruning(0.75, window=(2, 8), frequency=2)
    for callbacks in (
        [pruning, SparsityRegularization(l1, 1e-3, 0.0)],
        [SparsityRegularization(sparsity=0.0), pruning],
    ):
        module = fit(*callbacks)
        assert sum(int((module.model[i].weight == 0).sum()) for i in (0, 2)) == 72


@pytest.mark.parametrize("term", GATES, ids=named)
def test_gates_under_fake_quantization_in_either_order(term: Any) -> None:
    def run(*order: int) -> Net:
        made = [
            SparsityRegularization(term, 1e-3, 0.5, window=(2, 8)),
            QuantizationAwareTraining(window=(1, 4, 10), include=["model.0", "model.2"]),
        ]
        return fit(*(made[index] for index in order))

    one, other = run(0, 1), run(1, 0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_two_that_cannot_meet() -> None:
    with pytest.raises(IncompatibleCallbacks, match=r"both prune model\.0\.weight"):
        fit(SparsityRegularization(), GradualPruning(0.5))
    gates = [SparsityRegularization(gate, 1e-3, 0.0) for gate in GATES[:2]]
    with pytest.raises(IncompatibleCallbacks, match=r"both gate model\.0\.weight"):
        fit(*gates)
    fit(SparsityRegularization(l1, 1e-3, 0.0), SparsityRegularization(HardConcrete(), 1e-3, 0.5))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: SparsityRegularization("l1"), TypeError, "a function.*or a gate, got 'l1'"),
        (lambda: SparsityRegularization(weight=-1.0), ValueError, r"at least 0, got -1\.0"),
        (lambda: SparsityRegularization(weight=float("nan")), ValueError, "at least 0, got nan"),
        (lambda: SparsityRegularization(sparsity=1.0), ValueError, "fraction of zeros"),
        (lambda: fit(SparsityRegularization(window=(8, 2))), ValueError, "begin must come before end"),
        (lambda: fit(SparsityRegularization(window=(2, 80))), ValueError, "step 80, but the run has 12"),
        (lambda: fit(SparsityRegularization(torch.abs)), ValueError, r"without dimensions.*'model\.0\.weight'"),
        (lambda: fit(SparsityRegularization(include=[nn.Conv2d])), ValueError, "matches no module"),
        (lambda: fit(SparsityRegularization(exclude=[nn.Linear])), NothingToCompress, "left out"),
    ],
)
def test_bad_options_are_named(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_gates_and_a_gradient_scaler() -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    with pytest.raises(ValueError, match=r"HardConcrete.*'16-mixed'.*bf16-mixed"):
        fit(SparsityRegularization(HardConcrete()), plugins=[plugin])


def test_infinite_weights_are_named() -> None:
    class Spoil(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Net, *_: Any) -> None:
            if trainer.global_step == 5:
                module.model[2].weight.data[0, 0] = float("inf")

    with pytest.raises(CompressError, match=r"'model\.\d\.weight' at optimizer step 6.*learning rate"):
        fit(SparsityRegularization(SoftThreshold(), 1e-3, 0.5, window=(2, 6)), Spoil())
