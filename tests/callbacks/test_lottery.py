"""Each round begins with the weights of step `to` under the new masks, to the bit, and with optimizers that are new."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    Alternating,
    CheckpointMismatch,
    CompressError,
    Constant,
    Distillation,
    GradualPruning,
    IncompatibleCallbacks,
    LotteryRewinding,
    NothingToCompress,
    QuantizationAwareTraining,
    Steps,
)

State = dict[str, Tensor]
ROUNDS = Steps(((0.0, 0.3), (0.4, 0.6), (0.8, 0.8)))  # of a window from step 4 to step 14: at steps 4, 8 and 12
RISES = [4, 8, 12]


class Net(L.LightningModule):
    """Two parts; by hand each part has its own optimizer, and `early` takes both backwards before both steps."""

    def __init__(self, by_hand: str = "", make_optimizer: Any = torch.optim.Adam) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.by_hand, self.make_optimizer = by_hand, make_optimizer
        self.automatic_optimization = not by_hand

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if not self.by_hand:
            return loss
        first, second = self.optimizers()
        if self.by_hand == "early":
            first.zero_grad()
            second.zero_grad()
            self.manual_backward(loss)
            first.step()
        else:
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
            second.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        second.step()
        return None

    def configure_optimizers(self) -> Any:
        if self.by_hand:
            return [self.make_optimizer(part.parameters(), lr=0.05) for part in (self.body, self.head)], []
        optimizer = self.make_optimizer(self.parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Record(L.Callback):
    """Copies of all weights and buffers and of the optimizers' state, before the first batch and after each."""

    def __init__(self) -> None:
        self.states: list[State] = []
        self.optimizers: list[list[Any]] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.states = [copy_of(pl_module)]
        self.optimizers, self.rates = [[]], [0.0]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.states.append(copy_of(pl_module))
        self.optimizers.append([dict(optimizer.state) for optimizer in trainer.optimizers])
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def copy_of(module: nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def net(**options: Any) -> Net:
    torch.manual_seed(5)
    return Net(**options)


def pruning(schedule: Any = ROUNDS, **options: Any) -> GradualPruning:
    return GradualPruning(schedule, **{"window": (4, 14), "frequency": 2, **options})


def data() -> DataLoader[Any]:
    source = torch.Generator().manual_seed(2)
    inputs = torch.randn(64, 8, generator=source)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(dim=1)), batch_size=16)


def trainer_of(callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plain = {"accelerator": "cpu", "max_epochs": 4, "enable_model_summary": False}
    return L.Trainer(callbacks=callbacks, **{**quiet, **plain, **options})


def fit(module: Net, callbacks: list[L.Callback], ckpt_path: Path | None = None, **options: Any) -> L.Trainer:
    trainer = trainer_of(callbacks, **options)
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


def under(masks: State, state: State) -> State:
    """The weights of a state times masks, as the papers write it."""
    return {name: value * masks[name] if name in masks else value for name, value in state.items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def masks_of_rounds() -> tuple[list[State], Any]:
    """Each round's masks, noted by a listener of ours, and how to listen."""
    noted: list[State] = []

    def listen(callback: GradualPruning) -> GradualPruning:
        callback.after_update.append(
            lambda trainer, step, before, after: (
                noted.append({name: mask.clone() for name, mask in callback.masks.items()}) if after > before else None
            )
        )
        return callback

    return noted, listen


@pytest.mark.parametrize("by_hand", ["", "late", "early"])
@pytest.mark.parametrize("to", [0, 1, 3, 0.125])
def test_each_round_begins_with_early_weights_to_the_bit(to: Any, by_hand: str, masks_of_rounds: Any) -> None:
    noted, listen = masks_of_rounds
    module, record, rewinding = net(by_hand=by_hand), Record(), LotteryRewinding(to)
    pruned = listen(pruning())
    options = {"max_steps": -1} if by_hand else {}
    fit(module, [rewinding, pruned, record], **options)
    early = record.states[2 if to == 0.125 and not by_hand else 4 if to == 0.125 else to]
    assert [step for step, _ in rewinding.rounds] == RISES[: len(rewinding.rounds)]
    assert len(noted) == len(RISES)
    for step, masks in zip(RISES, noted, strict=True):
        assert same(record.states[step], under(masks, early)), f"round at step {step}"
        assert not same(record.states[step - 1], record.states[step])
        assert all(state == {} for state in record.optimizers[step])
        assert not same(record.states[step + 1], record.states[step])
    total = sum(mask.numel() for mask in noted[-1].values())
    assert [sum(int((~mask).sum()) for mask in masks.values()) for masks in noted] == [
        round(share * total) for share in (0.3, 0.6, 0.8)
    ]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "Adagrad", "RMSprop", "SGD", "NAdam"])
def test_a_round_trains_like_a_new_run_of_the_ticket(name: str, masks_of_rounds: Any) -> None:
    """The weights after the second round's steps are those of a plain loop, written here, from the masked start."""
    noted, listen = masks_of_rounds
    options = {"momentum": 0.9} if name == "SGD" else {}

    def make(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return getattr(torch.optim, name)(parameters, lr=lr, **options)

    record = Record()
    fit(net(make_optimizer=make), [listen(pruning(frequency=4)), LotteryRewinding(), record])
    ticket, masks, batches = net(), noted[1], list(data())
    ticket.load_state_dict(under(masks, record.states[0]))
    optimizer = make(ticket.parameters(), record.rates[8])
    for step in range(8, 12):  # one epoch: the schedule of the learning rate goes on at its end
        assert same(record.states[step], copy_of(ticket)), step
        optimizer.zero_grad()
        F.cross_entropy(ticket(batches[step % 4][0]), batches[step % 4][1]).backward()
        optimizer.step()
        with torch.no_grad():
            for weight, mask in masks.items():
                ticket.get_parameter(weight).mul_(mask)


def test_the_learning_rate_goes_on() -> None:
    with_rounds, without = Record(), Record()
    fit(net(), [pruning(), LotteryRewinding(), with_rounds])
    fit(net(), [pruning(), without])
    assert with_rounds.rates == without.rates
    assert with_rounds.rates[-1] == pytest.approx(0.05 / 2**4)


def test_an_update_that_raises_nothing_is_no_round() -> None:
    record, rewinding = Record(), LotteryRewinding()
    fit(net(), [pruning(Constant(0.5)), rewinding, record])
    assert rewinding.rounds == [(4, pytest.approx(0.5, abs=0.01))]
    assert not same(record.states[6], under({}, record.states[4]))


def test_alternating_rewinds_at_each_compressed_phase() -> None:
    rewinding = LotteryRewinding()
    fit(net(), [pruning(Alternating(0.5, cycles=2), window=(4, 12)), rewinding])
    assert [step for step, _ in rewinding.rounds] == [4, 8, 12]


def test_two_prunings_share_the_rounds(masks_of_rounds: Any) -> None:
    noted, listen = masks_of_rounds
    record, rewinding = Record(), LotteryRewinding()
    first = listen(pruning(Steps(((0.0, 0.3), (1.0, 0.6))), window=(4, 12), frequency=8, include=["body.0"]))
    second = listen(pruning(Constant(0.5), window=(6, 14), frequency=8, include=["body.3"]))
    fit(net(), [first, rewinding, second, record])
    assert [step for step, _ in rewinding.rounds] == [4, 6, 12]
    assert same(record.states[6], under({**noted[0], **noted[1]}, record.states[0]))
    assert same(record.states[12], under({**noted[1], **noted[2]}, record.states[0]))


@pytest.mark.parametrize("buffers", [True, False])
def test_batch_norm_goes_back_if_asked(buffers: bool) -> None:
    record = Record()
    fit(net(), [pruning(), LotteryRewinding(2, buffers=buffers), record])
    counted = [int(state["body.1.num_batches_tracked"]) for state in record.states]
    assert counted[4] == (2 if buffers else 4)
    assert counted[12] == (2 if buffers else 12)
    back = torch.equal(record.states[8]["body.1.running_mean"], record.states[2]["body.1.running_mean"])
    assert back == buffers


def test_the_order_in_the_list_does_not_matter() -> None:
    results = []
    for order in permutations(range(4)):
        torch.manual_seed(9)
        teacher = nn.Linear(8, 3)
        callbacks = [
            pruning(),
            LotteryRewinding(2),
            QuantizationAwareTraining(window=(6, 7, 14)),
            Distillation(teacher),
        ]
        module = net()
        fit(module, [callbacks[place] for place in order])
        results.append(copy_of(module))
    assert all(same(result, results[0]) for result in results[1:])


def test_an_average_forgets_what_was_before_the_round(masks_of_rounds: Any) -> None:
    noted, listen = masks_of_rounds
    average, start = EMAWeightAveraging(decay=0.9), copy_of(net())
    seen: dict[int, State] = {}

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            seen[trainer.global_step] = copy_of(average._average_model.module)

    for place in (0, 2):
        callbacks: list[L.Callback] = [listen(pruning()), LotteryRewinding(), Look()]
        callbacks.insert(place, average)
        fit(net(), callbacks)
        for step, masks in zip(RISES, noted[-3:], strict=True):
            expected = under(masks, start)
            for name in ("body.0.weight", "body.3.weight", "head.weight"):
                torch.testing.assert_close(seen[step][name], expected[name])


def test_a_monitor_hears_when_the_last_round_has_begun() -> None:
    ready: list[bool] = []

    class Ask(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            ready.append(rewinding.complete)

    rewinding = LotteryRewinding()
    fit(net(), [pruning(), rewinding, Ask()])
    assert ready == [False] * 13 + [True] * 3


def test_off_is_pruning_alone() -> None:
    alone, off = net(), net()
    fit(alone, [pruning()])
    fit(off, [pruning(), LotteryRewinding(enabled=False)])
    assert same(copy_of(alone), copy_of(off))


# Checkpoints


class Save(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("to", [0, 3])
def test_a_run_resumed_anywhere_is_the_uninterrupted_one(to: int, tmp_path: Path) -> None:
    whole, rewinding = net(), LotteryRewinding(to)
    fit(whole, [pruning(), rewinding, Save(tmp_path)])
    for step in (4, 8, 12):  # between epochs; the conformance suite resumes within them
        torch.manual_seed(99)
        again, rewinding_again = Net(), LotteryRewinding(to)
        fit(again, [rewinding_again, pruning()], ckpt_path=tmp_path / f"{step}.ckpt")
        assert same(copy_of(again), copy_of(whole)), step
        assert rewinding_again.rounds == rewinding.rounds
        assert rewinding_again.snapshot == {}


def test_a_run_resumed_before_the_step_takes_its_values_there(tmp_path: Path) -> None:
    late = pruning(Constant(0.5), window=(10, 14), frequency=4)
    whole, again, record = net(), net(), Record()
    fit(whole, [late, LotteryRewinding(6), record, Save(tmp_path)])
    later = pruning(Constant(0.5), window=(10, 14), frequency=4)
    fit(again, [later, LotteryRewinding(6)], ckpt_path=tmp_path / "4.ckpt")
    assert same(copy_of(again), copy_of(whole))
    assert torch.equal(record.states[10]["head.weight"], record.states[6]["head.weight"])


def test_checkpoints_are_plain_and_small_again_after_the_last_round(tmp_path: Path) -> None:
    fit(net(), [pruning(), LotteryRewinding(), Save(tmp_path)])
    sizes = {}
    for step in (1, 4, 13, 14, 16):
        saved = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)
        assert list(saved["state_dict"]) == list(net().state_dict())
        (state,) = (state for key, state in saved["callbacks"].items() if key.startswith("LotteryRewinding"))
        sizes[step] = len(state["snapshot"])
    assert sizes == {1: len(net().state_dict()), 4: sizes[1], 13: sizes[1], 14: 0, 16: 0}
    Net.load_from_checkpoint(tmp_path / "4.ckpt", strict=True)


def test_a_moment_computed_with_numpy_is_saved_as_a_plain_number() -> None:
    assert type(LotteryRewinding(to=np.float64(0.1)).recipe()["to"]) is float


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_plain_pruning_is_refused_unless_it_is_early(tmp_path: Path) -> None:
    fit(net(), [pruning(window=(10, 14)), Save(tmp_path)])
    with pytest.raises(CheckpointMismatch, match=r"is of step 4 and has no values of step 2 .*load_from_checkpoint"):
        fit(net(), [pruning(window=(10, 14)), LotteryRewinding(2)], ckpt_path=tmp_path / "4.ckpt")
    rewinding, record = LotteryRewinding(6), Record()
    fit(net(), [pruning(window=(10, 14)), rewinding, record], ckpt_path=tmp_path / "4.ckpt")
    assert rewinding.rounds[0][0] == 10
    assert torch.equal(record.states[10 - 4]["head.weight"], record.states[6 - 4]["head.weight"])


def test_a_checkpoint_of_another_module_is_refused(tmp_path: Path) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}
            checkpoint["optimizer_states"] = []

    def inside() -> GradualPruning:
        return pruning(include=["body"])

    fit(net(), [inside(), LotteryRewinding(), Save(tmp_path)])
    with pytest.raises(CheckpointMismatch, match=r"of another module; first difference: 'extra\.bias'"):
        fit(Wider(), [inside(), LotteryRewinding()], ckpt_path=tmp_path / "8.ckpt")


# What cannot be


@pytest.mark.parametrize(
    ("callbacks", "error", "message"),
    [
        (lambda: [LotteryRewinding()], NothingToCompress, "no pruning whose rounds .* add GradualPruning"),
        (lambda: [LotteryRewinding(5), pruning()], ValueError, "to is step 5, but .* first update at step 4.* below 4"),
        (lambda: [pruning(), LotteryRewinding(4)], ValueError, "to is step 4, but .* first update at step 4"),
        (lambda: [pruning(), LotteryRewinding(0.5)], ValueError, "to is step 8, but .* first update at step 4"),
        (lambda: [pruning(), LotteryRewinding(-1)], ValueError, "to is step -1"),
        (lambda: [pruning(), LotteryRewinding(True)], TypeError, "to must be a fraction .* got True"),
        (
            lambda: [pruning(), LotteryRewinding(), LotteryRewinding(1)],
            IncompatibleCallbacks,
            "LotteryRewinding and LotteryRewinding both rewind",
        ),
    ],
)
def test_what_cannot_be_is_named_before_the_first_batch(callbacks: Any, error: Any, message: str) -> None:
    record, module = Record(), net()
    with pytest.raises(error, match=message):
        fit(module, [*callbacks(), record])
    assert record.states == []
    assert same(copy_of(module), copy_of(net()))


def test_step_zero_may_be_the_first_update() -> None:
    record, start = Record(), copy_of(net())
    for order in (0, 1):
        callbacks: list[L.Callback] = [pruning(Steps(((0.0, 0.3), (1.0, 0.6))), window=(0, 8), frequency=8), record]
        rewinding = LotteryRewinding()
        callbacks.insert(order, rewinding)
        fit(net(), callbacks)
        assert [step for step, _ in rewinding.rounds] == [0, 8]
        assert torch.equal(record.states[8]["head.weight"], start["head.weight"])


def test_a_round_after_the_last_one_is_named() -> None:
    """The same Trainer goes on for so long that the window's end, a fraction, moves behind it."""
    rising = pruning(window=(0.25, 0.875))
    trainer = fit(module := net(), [rising, LotteryRewinding()])
    trainer.fit_loop.max_epochs = 12
    with pytest.raises(CompressError, match=r"after what was its last round .* window in optimizer steps"):
        trainer.fit(module, data())
