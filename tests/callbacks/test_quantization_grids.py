"""QuantizationAwareTraining with other grids: per layer, learned, later inputs, frozen norms, and what it warns of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import QuantizationAwareTraining, fake_quantized
from lightning_compress.quantization.attach import STATE
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.inputs import Affine, PerToken
from lightning_compress.quantization.weights import Symmetric
from tests.callbacks.quiet import quiet_fit
from tests.learned_grids import Bounds, Step

STEPS = 12
WINDOW = (2, 4, 9)


class Net(L.LightningModule):
    """Tokens -> embedding -> transposed convolution -> Linear -> norm -> head."""

    def __init__(self, change: Callable[[Tensor, int], Tensor] = lambda hidden, step: hidden) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.up = nn.ConvTranspose1d(4, 6, 2)
        self.first, self.norm, self.second = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)
        self.change, self.notes = change, []

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.up(self.embedding(tokens).mT)).mean(-1)
        hidden = torch.relu(self.norm(self.first(hidden)))
        return self.head(self.second(self.change(hidden, self.global_step)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self(batch[0]), batch[1])
        self.note()
        return loss

    def note(self) -> None:
        state = self.first.__dict__.get(STATE)
        learned = {} if state is None else state.learned["weight"] | state.learned["input"]
        self.notes.append(
            {
                "waits": state is not None and state.inputs_wait,
                "norm": self.norm.training,
                "mean": self.norm.running_mean.clone(),
                "learned": {key: value.clone() for key, value in learned.items()},
            }
        )

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def data() -> TensorDataset:
    tokens = torch.randint(0, 11, (8 * STEPS, 5), generator=torch.Generator().manual_seed(0))
    return TensorDataset(tokens, tokens.sum(1) % 3)


def fit(callback: L.Callback, module: Net | None = None, **options: Any) -> tuple[Net, L.Trainer]:
    torch.manual_seed(0)
    module = module or Net()
    return module, quiet_fit(module, callback, data(), **options)


def reproduces_validation(module: Net, trainer: L.Trainer, callback: QuantizationAwareTraining) -> None:
    tokens, labels = data().tensors
    with torch.no_grad():
        plain = functional.cross_entropy(module.eval()(tokens), labels)
        with fake_quantized(module, callback.ranges()):
            rounded = functional.cross_entropy(module(tokens), labels)
    assert trainer.callback_metrics["val_loss"] == rounded
    assert plain != rounded


EVERY = ["first", "second", "up", "embedding"]


def test_each_layer_has_its_grids_and_the_last_pattern_counts() -> None:
    callback = QuantizationAwareTraining(
        4,
        Affine(6),
        WINDOW,
        include=EVERY,
        per_layer={"Linear": (Symmetric(3, 6), None), "second": (8, PerToken()), "up": (Step(), Bounds())},
    )
    module, trainer = fit(callback)
    ranges = callback.ranges()
    grids = {name: (ranges[name].weight_grid, ranges[name].input_grid) for name in EVERY}
    assert grids == {
        "first": (Symmetric(3, 6), None),
        "second": (Symmetric(8), PerToken()),
        "up": (Step(), Bounds()),
        "embedding": (Symmetric(4), None),
    }
    reproduces_validation(module, trainer, callback)
    again = QuantizationAwareTraining(4, 6, WINDOW, include=EVERY, per_layer={
        "Linear": (Symmetric(3, 6), None), "second": (8, PerToken()), "up": (Step(), Bounds())
    })  # fmt: skip
    again.load_state_dict(callback.state_dict())
    assert again.ranges() == ranges
    assert again.ranges()["up"].weights_learned == ranges["up"].weights_learned


def test_embeddings_and_transposed_convolutions_only_on_request() -> None:
    callback = QuantizationAwareTraining(window=WINDOW)
    fit(callback)
    assert set(callback.ranges()) == {"first", "second"}


def test_only_weights() -> None:
    callback = QuantizationAwareTraining(4, None, WINDOW)
    module, trainer = fit(callback)
    assert {r.bits for r in callback.ranges().values()} == {32}
    reproduces_validation(module, trainer, callback)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"per_layer": {"nowhere": (4, 4)}}, ValueError, "per_layer pattern 'nowhere' matches no module"),
        ({"per_layer": {"head": (4, 4)}}, ValueError, "'head' matches none of the selected layers.*first, second"),
        ({"weights": Symmetric(4, 5)}, ValueError, r"'first' cannot be rounded: group=5 does not divide.*per_layer"),
        (
            {"details": Details(inputs_from=3)},
            ValueError,
            r"inputs_from=3 is step 3.*round \(step 4\).*\(step 9",
        ),
        ({"details": Details(inputs_from=9)}, ValueError, "inputs_from=9"),
        ({"details": Details(batch_norm_from=99)}, ValueError, "batch_norm_from is step 99.*12 optimizer steps"),
    ],
)
def test_options_that_do_not_fit_the_model_or_run(options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        fit(QuantizationAwareTraining(**{"window": WINDOW, **options}))


@pytest.mark.parametrize("option", [{"weights": "8"}, {"weights": Symmetric}, {"inputs": 8.0}, {"weights": None}])
def test_what_is_no_grid_is_named(option: Any) -> None:
    with pytest.raises(TypeError, match="is a width in bits"):
        QuantizationAwareTraining(**option)


# Learned values


def test_learned_values_begin_at_rounding_move_and_stay_once_frozen() -> None:
    callback = QuantizationAwareTraining(Step(), Bounds(), WINDOW)
    module, trainer = fit(callback)
    learned = [note["learned"] for note in module.notes]
    assert [len(each) for each in learned] == [0] * 4 + [3] * 8
    for key in ("step", "low", "high"):
        values = [float(each[key]) for each in learned[4:]]
        if key != "low":  # a ReLU's output: nothing is below
            assert len(set(values[:6])) == 6
        assert len(set(values[5:])) == 1
    names = [name for name, _ in module.named_parameters()]
    assert len(trainer.optimizers[0].param_groups[0]["params"]) == len(names)
    reproduces_validation(module, trainer, callback)


class Saving(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.mark.parametrize("details", [Details(), Details(inputs_from=6)], ids=["together", "weights first"])
def test_resuming_in_each_phase_is_exact(details: Details, tmp_path: Path) -> None:
    def fresh() -> QuantizationAwareTraining:
        return QuantizationAwareTraining(Step(3), Bounds(4), WINDOW, details=details)

    whole = fresh()
    torch.manual_seed(0)
    module = Net()
    validation = DataLoader(data(), batch_size=96)
    loader = DataLoader(data(), batch_size=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    one = {"limit_train_batches": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    plain = {"max_epochs": STEPS, **one, **quiet}
    L.Trainer(callbacks=[whole, Saving(tmp_path)], **plain).fit(module, loader, validation)
    for step in (1, 3, 4, 5, 7, 10):
        again, other = fresh(), Net()
        L.Trainer(callbacks=[again], **plain).fit(other, loader, validation, ckpt_path=tmp_path / f"{step}.ckpt")
        for name, value in module.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), (step, name)
        assert again.ranges() == whole.ranges()
        for name, trained in whole.ranges().items():
            assert again.ranges()[name].weights_learned == trained.weights_learned
            assert again.ranges()[name].inputs_learned == trained.inputs_learned


def test_fp16s_gradient_scaler_is_refused_by_name() -> None:
    from types import SimpleNamespace

    callback = QuantizationAwareTraining(8, Bounds(), WINDOW)
    torch.manual_seed(0)
    module, trainer = fit(QuantizationAwareTraining(enabled=False))
    trainer.precision_plugin.scaler = SimpleNamespace()  # a GradScaler needs a GPU
    with pytest.raises(ValueError, match=r"Bounds\(bits=8\).*precision='16-mixed'.*bf16-mixed"):
        callback._prepare(trainer, module, "fit")
    QuantizationAwareTraining(window=WINDOW)._prepare(trainer, module, "fit")


# Phases


def test_inputs_may_begin_after_the_weights() -> None:
    callback = QuantizationAwareTraining(Step(), Bounds(), WINDOW, details=Details(inputs_from=6))
    module, trainer = fit(callback)
    assert [note["waits"] for note in module.notes] == [False] * 4 + [True] * 2 + [False] * 6
    assert [len(note["learned"]) for note in module.notes] == [0] * 4 + [1] * 2 + [3] * 6
    reproduces_validation(module, trainer, callback)


def test_batch_norm_statistics_stay_from_their_moment_on() -> None:
    callback = QuantizationAwareTraining(window=WINDOW, details=Details(batch_norm_from=0.5))
    module, _ = fit(callback)
    assert [note["norm"] for note in module.notes] == [True] * 6 + [False] * 6
    assert all(torch.equal(note["mean"], module.norm.running_mean) for note in module.notes[6:])
    assert not torch.equal(module.notes[4]["mean"], module.notes[5]["mean"])
    assert module.norm.training or not module.training


def test_batch_norms_train_again_after_an_exception() -> None:
    def fail(hidden: Tensor, step: int) -> Tensor:
        if step == 7:
            raise RuntimeError("broken")
        return hidden

    module = Net(fail)
    with pytest.raises(RuntimeError, match="broken"):
        fit(QuantizationAwareTraining(window=WINDOW, details=Details(batch_norm_from=0)), module)
    assert module.norm.training


# What looks wrong


def test_nan_in_one_step_is_named_once_and_left_out_of_the_range() -> None:
    def spoil(hidden: Tensor, step: int) -> Tensor:
        return hidden * torch.where(torch.rand(()) < 2, torch.tensor(float("nan") if step in (2, 3) else 1.0), 0.0)

    class Skipping(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return torch.nan_to_num(loss) if self.global_step in (2, 3) else loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                parameter.grad = torch.zeros_like(parameter) if self.global_step in (2, 3) else parameter.grad

    callback = QuantizationAwareTraining(window=(1, 5, 9))
    with pytest.warns(UserWarning, match=r"input of 'second' held NaN or infinity in optimizer step 3") as warned:
        fit(callback, Skipping(spoil))
    assert len([w for w in warned if "held NaN" in str(w.message)]) == 1
    assert torch.isfinite(torch.tensor(callback.ranges()["second"].high))


def test_an_input_that_is_never_finite_cannot_be_rounded() -> None:
    module, words = Net(lambda hidden, step: hidden * float("inf")), r"'second' was never finite.*step 3"
    with pytest.warns(UserWarning, match="held NaN"), pytest.raises(ValueError, match=words):
        fit(QuantizationAwareTraining(window=WINDOW, include=["second"]), module)


def test_an_input_that_is_always_zero_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"input of 'second' was 0 as long as it was observed.*exclude=\['second'\]"):
        fit(QuantizationAwareTraining(window=WINDOW), Net(lambda hidden, step: 0 * hidden))


def test_a_range_that_explodes_is_warned_of() -> None:
    module = Net(lambda hidden, step: hidden * (1.0 if step < 5 else 1e5))
    with pytest.warns(UserWarning, match=r"input of 'second' was in \[0, .*training diverges"):
        fit(QuantizationAwareTraining(window=WINDOW, include=["second"]), module)


def test_a_module_called_with_very_different_inputs_is_warned_of_with_both() -> None:
    class Shared(Net):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = torch.relu(self.norm(self.first(self.embedding(tokens).sum(1).repeat(1, 2)[:, :6])))
            return self.head(self.second(hidden) + self.second(hidden * 1000) / 1000)

    with pytest.warns(UserWarning, match=r"'second' is called with inputs in \[0, \d.* and in \[0, \d.*lose 10 bits"):
        fit(QuantizationAwareTraining(window=WINDOW), Shared())


def test_per_layer_takes_widths_as_choose_bits_gives_them() -> None:
    callback = QuantizationAwareTraining(8, Affine(6), WINDOW, per_layer={"first": 3})
    fit(callback)
    assert (callback.ranges()["first"].weight_bits, callback.ranges()["first"].bits) == (3, 6)
    assert callback.ranges()["second"].weight_bits == 8


def test_per_layer_names_what_it_takes() -> None:
    with pytest.raises(TypeError, match=r"per_layer gives each pattern \(weights, inputs\) or .*, got \(4,\)"):
        QuantizationAwareTraining(per_layer={"first": (4,)})  # type: ignore[dict-item]
