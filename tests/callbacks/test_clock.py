"""The clock counts optimizer steps that really happened: accumulation, manual loops, LBFGS, overflow, resume."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_compress.callbacks.clock import Clock, run_length

ROWS = 12


class Plain(L.LightningModule):
    optimizer = torch.optim.SGD

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


class Manual(Plain):
    """A GAN's rhythm: the second optimizer steps twice a batch, the first every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer, layer, times in ((first, self.layer, batch_idx % 2), (second, self.other, 2)):
            for _ in range(times):
                optimizer.zero_grad()
                self.manual_backward(layer(batch[0]).square().mean())
                optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.parameters(), lr=0.01), torch.optim.Adam(self.other.parameters())


class Ticking(L.Callback):
    """Keeps a clock, and at each tick what it was told."""

    def __init__(self) -> None:
        self.clock, self.told = Clock(), []

    def on_fit_start(self, trainer, pl_module):
        self.clock.attach(trainer.optimizers, lambda optimizer, moved: self.told.append((optimizer, moved)))

    def on_fit_end(self, trainer, pl_module):
        self.clock.detach()

    def state_dict(self):
        return self.clock.state_dict()

    def load_state_dict(self, state_dict):
        self.clock.load_state_dict(state_dict)


def loader(batch_size=2):
    return DataLoader(TensorDataset(torch.randn(ROWS, 2)), batch_size=batch_size)


def trainer_of(*callbacks, **options):
    options = {"max_epochs": 2, **options}
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **options})


def fit(module, ckpt_path=None, **options):
    ticking = Ticking()
    trainer = trainer_of(ticking, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return ticking, trainer


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 12), (4, 4), (6, 2), (100, 2)])
def test_accumulated_batches_are_one_step(accumulate, steps):
    ticking, trainer = fit(Plain(), accumulate_grad_batches=accumulate)
    assert ticking.clock.steps == trainer.global_step == steps
    assert ticking.told == [(trainer.optimizers[0], True)] * steps


def test_several_optimizers_have_a_count_each_and_time_is_the_largest():
    ticking, trainer = fit(Manual())
    assert ticking.clock.counts == [6, 24]
    assert ticking.clock.steps == 24
    assert trainer.global_step == 30  # Lightning's own count adds them up
    first, second = trainer.optimizers
    assert sum(moved for _, moved in ticking.told) == 24
    assert not any(moved for optimizer, moved in ticking.told if optimizer is first)
    assert all(moved for optimizer, moved in ticking.told if optimizer is second)


def test_lbfgs_evaluates_often_and_steps_once():
    class Newton(Plain):
        optimizer = torch.optim.LBFGS
        evaluations = 0

        def training_step(self, batch, batch_idx):
            self.evaluations += 1
            return super().training_step(batch, batch_idx)

    module = Newton()
    ticking, _ = fit(module)
    assert ticking.clock.steps == 12
    assert module.evaluations > 12


@pytest.mark.parametrize("fused", [False, True], ids=["called only on success", "called on overflow too"])
def test_a_step_that_the_gradient_scaler_skips_is_no_step(fused):
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=fused)
    clock = Clock()
    clock.attach([optimizer], lambda *_: None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, steps in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        before = weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert clock.steps == steps
        assert torch.equal(weight, before) == (factor == float("inf"))


def test_a_resumed_run_goes_on_counting(tmp_path):
    module = Plain()
    _, trainer = fit(module, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = fit(Plain(), ckpt_path=tmp_path / "half.ckpt")
    assert len(resumed.told) == 6
    assert resumed.clock.steps == trainer.global_step == 12


def test_counts_survive_and_a_new_optimizer_starts_at_the_same_time():
    clock = Clock()
    clock.load_state_dict({"counts": [5, 9]})
    assert clock.state_dict() == {"counts": [5, 9]}
    assert clock.steps == 9
    optimizers = [torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1) for _ in range(3)]
    clock.attach(optimizers, lambda *_: None)
    assert clock.counts == [5, 9, 9]
    clock.load_state_dict({"counts": [2]})
    assert clock.counts == [2, 2, 2]
    clock.start_at(7)
    assert clock.counts == [7, 7, 7]
    clock.reset()
    assert clock.steps == 0
    fresh = Clock()
    fresh.start_at(4)
    assert fresh.steps == 4


def test_the_saved_state_is_a_copy():
    clock = Clock()
    clock.start_at(3)
    state = clock.state_dict()
    state["counts"][0] = 99
    assert clock.steps == 3


def test_attaching_again_ticks_once_and_a_detached_clock_not_at_all():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    clock, told = Clock(), []
    for _ in range(2):
        clock.attach([optimizer], lambda *_: told.append(1))
    optimizer.step()
    assert (clock.steps, told) == (1, [1])
    clock.detach()
    optimizer.step()
    assert (clock.steps, told) == (1, [1])
    assert not optimizer._optimizer_step_post_hooks


def lengths(moments, data=None, **options):
    trainer = trainer_of(**options)
    found = []

    class Asking(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            found.append(run_length(trainer, moments))
            trainer.should_stop = True

    trainer.callbacks.append(Asking())
    trainer.fit(Plain(), loader() if data is None else data)
    return found[0]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield (torch.zeros(2),)


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({}, 12),
        ({"accumulate_grad_batches": 4}, 4),
        ({"max_steps": 5}, 5),
        ({"max_epochs": -1, "max_steps": 7}, 7),
        ({"limit_train_batches": 2}, 4),
    ],
    ids=repr,
)
def test_the_runs_length_is_in_optimizer_steps(options, length):
    assert lengths((0.1, 0.5), **options) == length


UNKNOWN = [{"max_time": "00:01:00:00"}, {"max_epochs": -1, "max_steps": -1}]


@pytest.mark.parametrize("options", UNKNOWN, ids=repr)
def test_fractions_of_a_run_of_unknown_length_are_refused_with_the_cure(options):
    with pytest.raises(ValueError, match=r"\(0.1, 5\) cannot be fractions of it; give the window in optimizer steps"):
        lengths((0.1, 5), **options)
    with pytest.raises(ValueError, match="the run's length is unknown"):
        lengths((0.1,), DataLoader(Endless(), batch_size=2))


@pytest.mark.parametrize("options", UNKNOWN, ids=repr)
def test_steps_fit_a_run_of_unknown_length(options):
    assert lengths((3, 5), **options) > 10**9
