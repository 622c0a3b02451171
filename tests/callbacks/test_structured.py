"""Channels leave a live run: what stays is to the bit what it was, and the run, its checkpoints and exports go on."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightning_compress
from lightning_compress import (
    CheckpointMismatch,
    CompressError,
    Constant,
    Distillation,
    GradualPruning,
    IncompatibleCallbacks,
    NothingToCompress,
    QuantizationAwareTraining,
    Removal,
    StructuredPruning,
    export_onnx,
    load_from_checkpoint,
)
from lightning_compress.callbacks import reshaping
from lightning_compress.measure.flops import count_macs
from lightning_compress.pruning.criteria import fisher, mean_activation, movement, taylor, wanda
from lightning_compress.quantization.learned_steps import LSQ, LSQPlus
from lightning_compress.quantization.lowbit import TrainedTernary

State = dict[str, Tensor]


class Net(L.LightningModule):
    """Hidden layers of `width` and 12 units with norms; two groups of parameters, a rate that falls each epoch."""

    def __init__(self, width: int = 16, optimizer: str = "adam") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU())
        self.middle = nn.Sequential(nn.Linear(width, 12), nn.BatchNorm1d(12), nn.ReLU())
        self.head = nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.middle(self.body(inputs)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        rest = {"params": [*self.middle.parameters(), *self.head.parameters()], "lr": 0.02, "weight_decay": 0.01}
        made = {
            "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
            "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
            "lbfgs": lambda groups: torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2),
        }[self.hparams["optimizer"]]
        optimizer = made([{"params": self.body.parameters()}, rest])
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Deeper(Net):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.more = nn.Linear(3, 3)


def net(**options: Any) -> Net:
    torch.manual_seed(5)
    return Net(**options)


def data() -> DataLoader[Any]:
    inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(dim=1)), batch_size=16, generator=torch.Generator())


X = data().dataset.tensors[0]


def trainer_of(callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    plain = {"accelerator": "cpu", "max_epochs": 4, "enable_model_summary": False}
    return L.Trainer(callbacks=callbacks, **{**quiet, **plain, **options})


def fit(module: L.LightningModule, callbacks: list[L.Callback], ckpt_path: Path | None = None, **options: Any) -> Any:
    trainer = trainer_of(callbacks, **options)
    trainer.fit(module, data(), ckpt_path=ckpt_path)
    return trainer


def structured(amount: Any = 0.5, **options: Any) -> StructuredPruning:
    return StructuredPruning(amount, **{"window": (2, 14), "frequency": 4, "removal": Removal(times=3), **options})


def copy_of(module: nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Look(L.Callback):
    """The module's outputs, weights and optimizer state at each batch's end."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.weights: list[State] = []
        self.moments: list[list[State]] = []
        self.groups: list[list[Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        modes = [(module, module.training) for module in pl_module.modules()]
        with torch.no_grad():
            self.outputs.append(pl_module.eval()(X))
        for module, training in modes:
            module.training = training
        self.weights.append(copy_of(pl_module))
        (optimizer,) = trainer.optimizers
        states = [optimizer.state[parameter] for parameter in pl_module.parameters()]
        self.moments.append([{key: value.clone() for key, value in s.items() if value is not None} for s in states])
        held = [
            [{id(p): n for n, p in pl_module.named_parameters()}[id(p)] for p in g["params"]]
            for g in optimizer.param_groups
        ]
        options = [{key: value for key, value in g.items() if key != "params"} for g in optimizer.param_groups]
        self.groups.append([held, options])


class Steps(L.Callback):
    batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


class Save(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


# Removing


def cut(name: str, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The slice that stays of a parameter, buffer or moment, by hand."""
    if value.dim() == 0:
        return value
    value = value[first] if name.startswith("body") else value[second] if name.startswith("middle") else value
    return {"middle.0.weight": lambda v: v[:, first], "head.weight": lambda v: v[:, second]}.get(name, lambda v: v)(
        value
    )


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_what_stays_is_to_the_bit_what_it_was(optimizer: str) -> None:
    module, before, after, callback = net(optimizer=optimizer), Look(), Look(), structured(0.6)
    fit(module, [before, callback, after])
    removals = [at for at in range(16) if not same(before.weights[at], after.weights[at])]
    assert [at + 1 for at in removals] == [6, 10, 14]
    for at in removals:
        old, new = before.weights[at], after.weights[at]
        first = old["body.0.weight"].any(dim=1).nonzero().flatten()
        second = old["middle.0.weight"].any(dim=1).nonzero().flatten()
        assert len(first) < len(old["body.0.weight"]) or len(second) < len(old["middle.0.weight"])
        for name, value in old.items():
            assert torch.equal(new[name], cut(name, value, first, second)), name
        names = [name for name, _ in module.named_parameters()]
        for name, was, now in zip(names, before.moments[at], after.moments[at], strict=True):
            assert was.keys() == now.keys()
            assert all(torch.equal(now[key], cut(name, was[key], first, second)) for key in was), name
        torch.testing.assert_close(before.outputs[at], after.outputs[at], atol=1e-5, rtol=0)
        assert after.groups[at] == before.groups[at]
    plain = Look()
    fit(net(optimizer=optimizer), [plain])
    assert after.groups == plain.groups  # who is in which group, and its rate, decay and betas as they fall
    layers = [module.body[0], module.middle[0], module.head]
    assert [(layer.out_features, layer.in_features) for layer in layers] == [
        tuple(layer.weight.shape) for layer in layers
    ]
    assert module.body[1].num_features == module.body[0].out_features
    assert callback.complete


@pytest.mark.parametrize("times", [0, 1])
def test_removals_are_evenly_over_the_window_and_none_leaves_zeros(times: int) -> None:
    module, look, callback = net(), Look(), structured(removal=Removal(times=times))
    fit(module, [callback, look])
    full = size(net())
    sizes = [
        sum(v.numel() for n, v in state.items() if "running" not in n and "num_" not in n) for state in look.weights
    ]
    assert sizes[:13] == [full] * 13
    assert (sizes[-1] < full) == bool(times)
    assert callback.complete
    if not times:
        zeros = (module.body[0].weight == 0).all(dim=1)
        assert 0 < int(zeros.sum()) < 16
        assert not bool(module.middle[0].weight[:, zeros].any())
        assert not bool(module.body[1].weight[zeros].any())


@pytest.mark.parametrize("criterion", [taylor, movement, fisher, mean_activation, wanda])
def test_criteria_of_gradients_and_activations_go_on_over_removals(criterion: Any, tmp_path: Path) -> None:
    whole = net()
    fit(whole, [structured(criterion=criterion), Save(tmp_path)])
    assert size(whole) < size(net())
    torch.manual_seed(9)
    again = Net()
    fit(again, [structured(criterion=criterion)], ckpt_path=tmp_path / "8.ckpt")
    assert same(copy_of(again), copy_of(whole))


class TwoSteps(Net):
    """Manual optimization, two steps a batch: one of them is between an update and the removal after it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


@pytest.mark.parametrize("criterion", [taylor, movement, mean_activation])
def test_a_step_between_update_and_removal_is_gathered_too(criterion: Any) -> None:
    module, callback = TwoSteps(), structured(window=(3, 15), criterion=criterion)
    fit(module, [callback])
    assert callback.complete
    assert size(module) < size(net())


def test_a_criterion_decides_which_channels_go() -> None:
    def by_number(weight: Tensor) -> Tensor:
        return torch.arange(len(weight)).view(-1, 1).expand(weight.shape).float()

    start, module = net(), net()
    callback = structured(window=(1, 2), removal=Removal("channels"), include=["body.0"], criterion=by_number)
    fit(module, [callback], max_steps=2)
    gone = 16 - module.body[0].out_features
    assert gone == 8
    # Columns of the next layer score alike, so that the rows' numbers decide: the first ones go.
    torch.testing.assert_close(module.body[0].weight, start.body[0].weight[gone:], atol=0.05, rtol=0)
    assert not torch.allclose(module.body[0].weight, start.body[0].weight[:gone], atol=0.05, rtol=0)


def test_include_and_exclude_say_whose_outputs_may_go() -> None:
    for options in ({"include": ["middle.0"]}, {"exclude": ["body"]}, {"exclude": ["body.0"]}):
        module = net()
        fit(module, [structured(0.3, **options)])
        assert module.body[0].out_features == 16
        assert module.middle[0].out_features < 12


@pytest.mark.parametrize("amount", [0.3, 0.6])
def test_a_budget_of_macs_is_what_torch_counts(amount: float) -> None:
    module, callback = net(), structured(amount)
    fit(module, [callback])
    full, left = count_macs(net().eval(), (X,)), count_macs(module.eval(), (X,))
    assert left <= (1 - amount) * full
    assert left / full == pytest.approx(1 - callback.history[-1][2])
    # One unit more would have been too many: a unit is at most an input row and an output column.
    assert left + len(X) * max(8 + 12, 16 + 3) > (1 - amount) * full


def test_budgets_of_parameters_and_channels_are_exact_to_a_unit() -> None:
    module = net()
    fit(module, [structured(0.5, removal=Removal("parameters"))])
    assert 0.5 * size(net()) - (8 + 3 + 12) <= size(module) <= 0.5 * size(net())
    module = net()
    fit(module, [structured(0.5, removal=Removal("channels"))])
    assert module.body[0].out_features + module.middle[0].out_features == (16 + 12) // 2


def test_a_budget_of_latency_follows_the_measured_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    def half_is_overhead(*_: Any) -> tuple[tuple[float, float], ...]:
        return ((0.0, 0.5), (1.0, 1.0))

    monkeypatch.setattr(reshaping, "_latency_curve", half_is_overhead)
    module, callback = net(), structured(0.25, removal=Removal("latency"))
    fit(module, [callback])
    share = count_macs(module.eval(), (X,)) / count_macs(net().eval(), (X,))
    assert share == pytest.approx(0.5, abs=0.1)
    assert share <= 0.5
    with pytest.raises(ValueError, match=r"0\.6 of the budget cannot go"):
        fit(net(), [structured(0.6, removal=Removal("latency"))])


def test_all_processes_take_the_first_ones_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    of_the_first = ((0.0, 0.4), (1.0, 1.0))
    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", lambda self, obj, src=0: of_the_first)
    callback = structured(0.2, removal=Removal("latency", times=0))
    fit(net(), [callback])
    assert callback.traced.curve == of_the_first


def test_a_latency_curve_is_measured_and_rises() -> None:
    module, callback = net(width=256), structured(Constant(0.0), removal=Removal("latency", times=0))
    fit(module, [callback])
    shares, times = zip(*callback.traced.curve, strict=True)
    assert list(shares) == sorted(shares)
    assert list(times) == sorted(times)
    assert (shares[-1], times[-1]) == (1.0, 1.0)


@pytest.mark.parametrize(
    "removal",
    [Removal(multiple_of=8), Removal(most=0.5), Removal(least=9), Removal("channels", multiple_of=8, times=3)],
)
def test_limits_hold_in_every_layer(removal: Removal) -> None:
    module = net(width=32)
    fit(module, [structured(0.3, removal=removal)])
    for units, layer in ((32, module.body[0]), (12, module.middle[0])):
        left = layer.out_features
        assert left % removal.multiple_of == 0 or left == units
        assert left >= max(removal.least, (1 - removal.most) * units)


def test_bf16_mixed() -> None:
    module = net()
    fit(module, [structured()], precision="bf16-mixed")
    assert size(module) < size(net())
    assert all(parameter.dtype is torch.float32 for parameter in module.parameters())


class Late(Net):
    """Is final only at `on_fit_start`, in the Trainer's precision by then."""

    def configure_model(self) -> None:
        self.example_input_array = X[:2]


@pytest.mark.parametrize("made", [Net, Late])
@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_true_precisions(made: type[Net], precision: str, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    module = made()
    fit(module, [structured()], precision=precision)
    assert size(module) < size(net())
    assert all(parameter.dtype is dtype for parameter in module.parameters())


# Checkpoints


def test_a_run_resumed_anywhere_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, callback = net(), structured()
    fit(whole, [callback, Save(tmp_path)])
    for step in (4, 8, 12):  # before the first removal and after each of the first two
        torch.manual_seed(99)
        for again in (Net(), load_from_checkpoint(str(tmp_path / "16.ckpt"), Net)):
            resumed = structured()
            fit(again, [resumed], ckpt_path=tmp_path / f"{step}.ckpt")
            assert same(copy_of(again), copy_of(whole)), step
            assert resumed.history == callback.history


def test_a_shrunken_module_is_loaded_as_what_it_is(tmp_path: Path) -> None:
    module = net(width=24)
    fit(module, [structured(), Save(tmp_path)])
    path = str(tmp_path / "16.ckpt")
    loaded = load_from_checkpoint(path, Net, map_location="cpu")
    assert type(loaded) is Net
    assert loaded.hparams == module.hparams
    assert same(copy_of(loaded), copy_of(module))
    assert torch.equal(loaded.eval()(X), module.eval()(X))
    with pytest.raises(RuntimeError, match=r"lightning_compress\.load_from_checkpoint\(path, YourModule\)"):
        Net.load_from_checkpoint(path)
    torch.load(path, weights_only=True)
    with pytest.raises(CheckpointMismatch, match="build the module with the arguments it was trained with"):
        load_from_checkpoint(path, Deeper)


def test_a_modules_own_hook_sees_its_keys(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    class Hooked(Net):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(list(checkpoint["state_dict"]))

    fit(net(), [structured(), Save(tmp_path)])
    loaded = load_from_checkpoint(str(tmp_path / "16.ckpt"), Hooked)
    trainer_of([structured()]).test(Hooked(), data(), ckpt_path=tmp_path / "16.ckpt", verbose=False)
    assert seen == [list(loaded.state_dict())] * 2


def test_a_dense_checkpoint_is_plain(tmp_path: Path) -> None:
    fit(net(), [structured(), Save(tmp_path)])
    assert same(
        copy_of(Net.load_from_checkpoint(tmp_path / "4.ckpt")), copy_of(load_from_checkpoint(tmp_path / "4.ckpt", Net))
    )


def test_trainers_load_into_modules_of_any_size(tmp_path: Path) -> None:
    module = net()
    trainer = fit(module, [structured(), Save(tmp_path)])
    (small,) = trainer.test(module, data(), verbose=False)
    for fresh in (net(), module):
        (result,) = trainer_of([structured()]).test(fresh, data(), ckpt_path=tmp_path / "16.ckpt", verbose=False)
        assert result == small
    dense = Net.load_from_checkpoint(tmp_path / "4.ckpt")
    (expected,) = trainer_of([]).test(dense, data(), verbose=False)
    (early,) = trainer.test(module, data(), ckpt_path=tmp_path / "4.ckpt", verbose=False)
    assert early == expected
    assert same(copy_of(module), copy_of(dense))
    assert "on_load_checkpoint" not in vars(module)


def test_the_best_checkpoint_may_be_from_before_a_removal(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor=None, save_top_k=-1, filename="{step}")
    module = net()
    trainer = fit(module, [structured(), best], enable_checkpointing=True)
    trainer.test(module, data(), ckpt_path=str(tmp_path / "step=4.ckpt"), verbose=False)
    assert size(module) == size(net())


def test_weights_alone_are_no_checkpoint_to_load(tmp_path: Path) -> None:
    trainer = fit(net(), [structured()])
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(CheckpointMismatch, match=r"holds no shapes: it was saved with save_weights_only=True"):
        load_from_checkpoint(str(tmp_path / "weights.ckpt"), Net)


# Together with others


@pytest.mark.parametrize("order", [1, -1])
def test_quantized_and_exported(order: int, tmp_path: Path) -> None:
    module, quantization = net(), QuantizationAwareTraining(window=(6, 8, 15))
    fit(module, [structured(), quantization][::order])
    assert size(module) < size(net())
    path = export_onnx(module, tmp_path / "small.onnx", (X,), ranges=quantization.ranges())
    assert path.stat().st_size > 0


@pytest.mark.parametrize("order", [1, -1])
def test_steps_of_each_channel_are_learned_once_the_channels_are_out(order: int, tmp_path: Path) -> None:
    module, quantization = net(), QuantizationAwareTraining(LSQ(4, per_channel=True), LSQPlus(4), window=(9, 11, 15))
    fit(module, [structured(window=(2, 10)), quantization][::order])
    ranges, width = quantization.ranges(), module.body[0].out_features
    assert width < 16
    assert ranges["body.0"].weights_learned["step"].shape == (width,)
    path = export_onnx(module, tmp_path / "small.onnx", (X,), ranges=ranges)
    assert path.stat().st_size > 0


@pytest.mark.parametrize("order", [1, -1])
def test_channels_that_go_while_a_step_of_each_is_learned_are_named_before_the_first_batch(order: int) -> None:
    seen, module = Steps(), net()
    quantization = QuantizationAwareTraining(
        8, 8, window=(6, 8, 15), per_layer={"middle.0": (LSQ(4, per_channel=True), 8)}
    )
    words = (
        r"StructuredPruning takes channels out of 'middle\.0' until step 14.*from step 8 on; end the pruning's window"
    )
    with pytest.raises(IncompatibleCallbacks, match=words):
        fit(module, [seen, *[structured(), quantization][::order]])
    assert seen.batches == 0
    fit(net(), [structured(removal=Removal(times=0)), quantization])  # zeros that stay


@pytest.mark.parametrize("weights", [LSQ(4), TrainedTernary()])
def test_one_step_a_layer_is_learned_while_channels_go(weights: Any) -> None:
    module, quantization = net(), QuantizationAwareTraining(weights, 8, window=(3, 5, 15))
    fit(module, [structured(), quantization])
    assert size(module) < size(net())
    assert all(value.dim() == 0 for r in quantization.ranges().values() for value in r.weights_learned.values())


def test_taught_while_it_shrinks() -> None:
    torch.manual_seed(1)
    module, teacher = net(), nn.Linear(8, 3)
    trainer = fit(module, [Distillation(teacher), structured()])
    assert size(module) < size(net())
    assert trainer.callback_metrics["compress/loss/kd"] > 0


# What cannot be


def bad_criterion(weight: Tensor) -> Tensor:
    return torch.zeros(3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StructuredPruning(1.0), ValueError, "1.0"),
        (lambda: StructuredPruning(-0.1), ValueError, "-0.1"),
        (lambda: StructuredPruning("half"), TypeError, "amount must be a function or a number, got 'half'"),
        (lambda: structured(removal="macs"), TypeError, "removal is a Removal, such as .* got 'macs'"),
        (lambda: structured(0.95), ValueError, r"0.95 of the budget cannot go: with every group at its limit .*most"),
        (lambda: structured(0.5, removal=Removal(multiple_of=16)), ValueError, "loosen multiple_of=16"),
        (lambda: structured(include=["nowhere"]), ValueError, "nowhere"),
        (lambda: structured(include=["head"]), NothingToCompress, "'head': is an output of the forward"),
        (lambda: structured(exclude=["body", "middle"]), NothingToCompress, "'body.0': 'body.0' is not selected"),
        (lambda: structured(window=(14, 2)), ValueError, "begin"),
        (lambda: structured(window=(2, 99)), ValueError, "99"),
        (lambda: structured(criterion=bad_criterion), ValueError, "must return float scores of shape"),
    ],
)
def test_what_cannot_be_is_named_before_it_changes_anything(make: Any, error: Any, message: str) -> None:
    module = net()
    with pytest.raises(error, match=message):
        fit(module, [make()])
    assert size(module) == size(net())
    assert "on_load_checkpoint" not in vars(module)


def test_two_that_prune_the_same_weights() -> None:
    with pytest.raises(IncompatibleCallbacks, match="both prune"):
        fit(net(), [structured(), GradualPruning(0.5, window=(2, 14))])


@pytest.mark.parametrize("change", [torch.nn.utils.weight_norm, partial(prune.l1_unstructured, amount=0.5)])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_weight_that_is_computed_before_each_forward_is_named(change: Any) -> None:
    module = net()
    change(module.middle[0], "weight")
    with pytest.raises(IncompatibleCallbacks, match=r"'middle\.0' computes its weight .*prune\.remove"):
        fit(module, [structured()])


def test_lbfgs_is_named_before_the_first_batch() -> None:
    seen = Steps()
    with pytest.raises(CompressError, match=r"LBFGS keeps its state as one flat vector .*GradualPruning"):
        fit(net(optimizer="lbfgs"), [seen, structured()])
    assert seen.batches == 0
    fit(module := net(optimizer="lbfgs"), [structured(removal=Removal(times=0))])
    assert size(module) == size(net())


def test_a_forward_that_cannot_be_traced_is_named_and_masks_work() -> None:
    class Branches(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs if inputs.sum() > 0 else -inputs)

    with pytest.raises(CompressError, match=r"Branches cannot be traced: .*or use GradualPruning"):
        fit(Branches(), [structured()])
    fit(Branches(), [GradualPruning(0.5, window=(2, 14))])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(x, x[:3].argmax()) for x in X])


def test_data_that_cannot_be_looked_at_need_an_example() -> None:
    module = net()
    with pytest.raises(CompressError, match="set example_input_array in the LightningModule"):
        trainer_of([structured()], max_steps=16).fit(module, DataLoader(Stream(), batch_size=16))
    for example in (X[:2], (X[:2],), {"inputs": X[:2]}):
        module = net()
        module.example_input_array = example
        trainer_of([structured()], max_steps=16).fit(module, DataLoader(Stream(), batch_size=16))
        assert size(module) < size(net())


# The card


def test_the_card_lists_every_option_of_a_removal() -> None:
    card = (Path(lightning_compress.__file__).parents[1] / "docs" / "structured_pruning.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `Removal\.(\w+)` \| `([^`]*)` \|", card, re.MULTILINE))
    assert rows == {name: repr(option.default) for name, option in inspect.signature(Removal).parameters.items()}
