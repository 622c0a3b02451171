"""WeightSharing: what is special to it. Promises of all callbacks are in tests/conformance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

from lightning_compress import (
    CompressError,
    GradualPruning,
    IncompatibleCallbacks,
    NothingToCompress,
    QuantizationAwareTraining,
    Reconstruction,
    SparsityRegularization,
    WeightSharing,
    fake_quantized,
)
from lightning_compress.weight_sharing.codebook import density
from tests.conformance.modules import Small
from tests.conformance.running import Do, build, train

RATE, MOMENTUM, DECAY = 0.05, 0.9, 0.1


class Quadratic(L.LightningModule):
    """|weight - target|^2 / 2, whose gradient is weight - target, under an optimizer of choice."""

    def __init__(self, optimizer: Callable[..., Any], zeros: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.optimizer = optimizer
        self.layer = nn.Linear(8, 6, bias=False)
        self.target = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        start = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        start[:2] *= not zeros
        self.layer.weight = nn.Parameter(start)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.layer.weight - self.target).square().sum() / 2

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(16, 1))

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def history(module: L.LightningModule, sharing: WeightSharing, folder: Path, **options: Any) -> list[np.ndarray]:
    weights: list[np.ndarray] = []
    note = Do(lambda trainer, module, _: weights.append(module.layer.weight.detach().numpy().copy()))
    train(module, [sharing], folder, extra=[note], max_epochs=1, **options)
    return weights


def members(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Mean of the values of each entry, by hand."""
    return np.array([values[codes == entry].mean() for entry in range(codes.max() + 1)])


@pytest.mark.parametrize("clipped", [False, True])
def test_values_follow_the_codebooks_gradient_as_sgd_by_hand_moves_them(clipped: bool, tmp_path: Path) -> None:
    """Momentum, weight decay and all, from the moments that were there when sharing began."""
    module = Quadratic(lambda p: torch.optim.SGD(p, RATE, momentum=MOMENTUM, weight_decay=DECAY))
    start, target = module.layer.weight.detach().numpy().copy(), module.target.numpy()
    sharing = WeightSharing(4, at=3, include=["layer"])
    weights = history(module, sharing, tmp_path, gradient_clip_val=1e9 if clipped else None)

    own, momentum = start, 0.0
    for _ in range(3):
        momentum = MOMENTUM * momentum + (own - target + DECAY * own)
        own = own - RATE * momentum
    codes = sharing.codes["layer.weight"].entry.numpy() - 1
    assert (codes.min(), len(weights)) == (0, 16)  # no weight was zero then
    book, momentum, aims = (members(codes, value) for value in (own, momentum, target))
    moved = []
    for _ in range(16 - 3 + 1):
        moved.append(book[codes])
        momentum = MOMENTUM * momentum + (book - aims + DECAY * book)
        book = book - RATE * momentum
    for step, (found, expected) in enumerate(zip(weights[2:], moved, strict=True)):
        np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=f"step {step + 3}")


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_adaptive_optimizers_move_values_as_if_the_codebook_were_their_parameter(
    optimizer: Any, tmp_path: Path
) -> None:
    module = Quadratic(lambda p: optimizer(p, lr=RATE))
    start, target = module.layer.weight.detach().clone(), module.target.flatten()
    sharing = WeightSharing(5, at=0, include=["layer"])
    weights = history(module, sharing, tmp_path)

    codes = sharing.codes["layer.weight"].entry.flatten().numpy()
    assert np.array_equal(codes == 0, start.flatten().numpy() == 0)
    free = codes > 0
    book = nn.Parameter(torch.from_numpy(members(codes, start.flatten().numpy())[1:]))
    aims = torch.from_numpy(members(codes, target.numpy())[1:])
    reference = optimizer([book], lr=RATE)
    for found in weights:
        book.grad = (book - aims).detach()
        reference.step()
        assert not found.flatten()[~free].any()
        np.testing.assert_allclose(found.flatten()[free], book.detach().numpy()[codes[free] - 1], rtol=1e-7)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
        lambda p: torch.optim.Muon(p, lr=RATE),
        lambda p: torch.optim.Adafactor(p, lr=RATE),
    ],
    ids=["LBFGS", "Muon", "Adafactor"],
)
def test_optimizers_that_mix_entries_leave_them_shared(optimizer: Any, tmp_path: Path) -> None:
    module = Quadratic(optimizer)
    zeros = module.layer.weight.detach().numpy() == 0
    weights = history(module, WeightSharing(4, at=0, include=["layer"]), tmp_path)
    assert all(len(np.unique(weight)) <= 4 and not weight[zeros].any() for weight in weights)
    distance = [np.square(weight - module.target.numpy()).sum() for weight in weights]
    assert distance[-1] < distance[0]


def test_trained_values_are_better_than_those_of_k_means(tmp_path: Path) -> None:
    module = Quadratic(lambda p: torch.optim.SGD(p, 0.5))
    weights = history(module, WeightSharing(4, at=0, include=["layer"]), tmp_path)
    best = (members(codes := codes_of(weights[-1]), module.target.numpy()))[codes]
    best[weights[-1] == 0] = 0.0
    np.testing.assert_allclose(weights[-1], best, atol=1e-3)  # each entry ends at the mean of what its members want


def codes_of(weight: np.ndarray) -> np.ndarray:
    return np.unique(weight, return_inverse=True)[1].reshape(weight.shape)


# With other callbacks


def test_zeros_of_pruning_stay_and_bits_are_those_asked_for(tmp_path: Path) -> None:
    module = build(Small)
    pruning = GradualPruning(0.8, window=(2, 8), frequency=2)
    sharing = WeightSharing({"Conv2d": 16, "Linear": 4}, at=9, start=density)
    train(module, [sharing, pruning], tmp_path)
    weights = dict(module.named_parameters())
    assert {name: len(weights[name].unique()) for name in pruning.masks} == {
        "model.0.weight": pytest.approx(12, abs=4),
        "model.4.weight": 4,
        "model.7.weight": 4,
    }
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in pruning.masks.items())
    assert all(module.model[9].weight.unique(return_counts=True)[1] == 1)  # the head is left


@pytest.mark.parametrize(
    ("pruning", "last"),
    [
        (lambda: GradualPruning(0.5, window=(2, 9)), 9),
        (lambda: GradualPruning(0.5, window=(0.1, 0.75)), 12),
        (lambda: SparsityRegularization(window=(2, 12)), 12),
        (lambda: Reconstruction(at=10), 10),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_pruning_that_ends_later_is_refused(pruning: Any, last: int, first: bool, tmp_path: Path) -> None:
    both = [pruning(), WeightSharing(at=9)]
    with pytest.raises(IncompatibleCallbacks, match=rf"prunes model\.0\.weight until step {last}.*from step 9 on"):
        train(build(Small), both if first else both[::-1], tmp_path)


def test_two_that_share_one_weight_are_refused_and_of_other_weights_meet(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleCallbacks, match=r"both share model\.4\.weight; give each its own include"):
        train(build(Small), [WeightSharing(), WeightSharing(4, include=["model.4"])], tmp_path)
    module = build(Small)
    both = [WeightSharing(4, at=9, include=["model.4"]), WeightSharing(6, at=3, include=["model.7"])]
    train(module, both, tmp_path)
    assert [len(module.model[index].weight.unique()) for index in (4, 7)] == [4, 6]


def test_rounded_weights_have_no_more_values_than_shared_ones(tmp_path: Path) -> None:
    module = build(Small)
    quantization = QuantizationAwareTraining(window=(2, 4, 10))
    train(module, [quantization, WeightSharing(8, at=9)], tmp_path)
    with fake_quantized(module, quantization.ranges()):
        rows = [row.unique().numel() for row in module.model[4].weight.detach()]
    assert max(rows) <= 8


@pytest.mark.parametrize("first", [False, True])
def test_an_average_of_shared_weights_is_shared(first: bool, tmp_path: Path) -> None:
    module = build(Small, norm=False)
    sharing, average = WeightSharing(8, at=9), EMAWeightAveraging(decay=0.9)
    run = train(module, [average, sharing] if first else [sharing, average], tmp_path)
    assert len(module.model[4].weight.unique()) == len(sharing.codes["model.4.weight"].counts) - 1
    run.trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    saved = torch.load(tmp_path / "averaged.ckpt", weights_only=True)["state_dict"]
    assert len(saved["model.4.weight"].unique()) <= 8


# Checkpoints and bad input


def test_a_checkpoint_holds_four_bits_a_weight(tmp_path: Path) -> None:
    module = build(Small)
    sharing = WeightSharing(8, at=9)
    run = train(module, [sharing], tmp_path)
    run.trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = [state for key, state in saved["callbacks"].items() if key.startswith("WeightSharing")]
    packed = sum(codes.numel() for codes in state["codes"].values())
    shared = sum(codes.entry.numel() for codes in sharing.codes.values())
    assert packed <= shared * 4 / 8 + 8
    loaded = Small.load_from_checkpoint(tmp_path / "last.ckpt", strict=True)
    assert torch.equal(loaded.model[4].weight, module.model[4].weight)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    def spoil(trainer: L.Trainer, module: L.LightningModule, batches: int) -> None:
        if batches == 5:
            with torch.no_grad():
                module.model[7].weight[0, 0] = float("nan")

    with pytest.raises(
        CompressError, match=r"'model\.\d\.weight' at optimizer step 9; nothing is shared.*learning rate"
    ):
        train(build(Small), [WeightSharing(8, at=9)], tmp_path, extra=[Do(spoil)])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: WeightSharing(1), ValueError, "2 to 256, got 1"),
        (lambda: WeightSharing({"Linear": 300}), ValueError, "2 to 256, got 300"),
        (lambda: WeightSharing(True), ValueError, "got True"),
        (lambda: WeightSharing(start="linear"), TypeError, "start must be a function.*got 'linear'"),
        (lambda: WeightSharing(64), ValueError, r"larger than 'model\.0\.weight', which has 36 weights"),
        (lambda: WeightSharing({"Linear": 8}), ValueError, r"'model\.0\.weight' is of a Conv2d"),
        (lambda: WeightSharing(at=17), ValueError, "at is step 17, but the run has 16"),
        (lambda: WeightSharing(at=1.5), ValueError, r"at as a float.*got 1\.5"),
        (lambda: WeightSharing(exclude=["model"]), NothingToCompress, "empty"),
        (lambda: WeightSharing(include=["modle.4"]), ValueError, r"modle\.4.*model\.4"),
    ],
)
def test_bad_options_are_named_before_the_first_batch(make: Any, error: Any, words: str, tmp_path: Path) -> None:
    module = build(Small)
    before = module.model[4].weight.detach().clone()
    with pytest.raises(error, match=words):
        train(module, [make()], tmp_path)
    assert torch.equal(module.model[4].weight, before)


def test_books_are_the_values_of_the_run(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    sharing = WeightSharing(8, at=9)
    module = build(Small)
    train(module, [sharing], tmp_path, extra=[Do(lambda *_: seen.append(sharing.books))])
    assert seen[7] == {}
    assert torch.equal(seen[-1]["model.4.weight"][1:], module.model[4].weight.detach().unique())
    assert not torch.equal(seen[-1]["model.4.weight"], seen[9]["model.4.weight"])  # they are trained
