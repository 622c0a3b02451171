"""What a trial of benchmarks/search.py is, on images and on sentences: train, prune each group, round, measure."""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as L
import torch
from images import fashion_mnist
from networks import Tuned
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from training import kept, quiet_trainer

from lightning_compress import GradualPruning, QuantizationAwareTraining
from lightning_compress.pruning.patterns import Unstructured
from lightning_compress.pruning.scopes import uniform as same_in_each
from lightning_compress.quantization.outputs import rounded_as_trained
from lightning_compress.search.space import Range, Recipe
from lightning_compress.search.stored import save_weights

Model = L.LightningModule
LATER = 1000  # added to a seed after the dense phase: other batches than the dense model has seen first
PRUNED, OFTEN, ROUNDED = (0.0, 0.6), 0.05, (0.0, 0.05, 0.8)  # fractions of a trial
TEXT_RATE = 1e-4  # of a trial; the dense model is trained with twice that
SPARSITIES, WIDTHS = (0.5, 0.98), [8, 6, 5, 4, 3]


@dataclass(frozen=True)
class Task:
    """A dense model of one seed, its groups of layers, and how it is trained and judged."""

    dense: L.LightningModule
    groups: dict[str, list[str]]
    fit: Callable[[Model, list[L.Callback]], Model]
    accuracies: Callable[[L.LightningModule], tuple[float, float]]  # held out from training, and test
    loss: Callable[[nn.Module], float]  # on some training data, for sensitivities
    also: Sequence[str] = ()  # layers that are int8 in each trial, and never pruned

    def space(self) -> dict[str, Range | list[int]]:
        zeros: dict[str, Range | list[int]] = {f"sparsity.{name}": Range(*SPARSITIES) for name in self.groups}
        return zeros | {f"bits.{name}": list(WIDTHS) for name in self.groups}

    def recipe(self, amounts: dict[str, tuple[float, int]]) -> Recipe:
        zeros = {f"sparsity.{name}": amounts[name][0] for name in self.groups}
        return zeros | {f"bits.{name}": amounts[name][1] for name in self.groups}

    def run(self, recipe: Recipe) -> dict[str, float]:
        """Fine-tune the dense model; `accuracy` is on held-out data, which a search may look at, `test` is not."""
        pruning = [
            GradualPruning(recipe[f"sparsity.{name}"], PRUNED, OFTEN, include=list(layers))
            for name, layers in self.groups.items()
        ]
        widths = {layer: (recipe[f"bits.{name}"], 8) for name, layers in self.groups.items() for layer in layers}
        rounded = [*widths, *self.also]
        return self._measured(pruning, QuantizationAwareTraining(8, 8, ROUNDED, include=rounded, per_layer=widths))

    def by_hand(self, sparsity: float, uniform: bool) -> dict[str, float]:
        """The same for one sparsity and int8: the same in each layer, or under one threshold."""
        layers = [layer for own in self.groups.values() for layer in own]
        scope = Unstructured(scope=same_in_each) if uniform else None
        pruning = GradualPruning(sparsity, PRUNED, OFTEN, include=layers, pattern=scope)
        return self._measured([pruning], QuantizationAwareTraining(8, 8, ROUNDED, include=[*layers, *self.also]))

    def _measured(self, pruning: list[GradualPruning], qat: QuantizationAwareTraining) -> dict[str, float]:
        model = copy.deepcopy(self.dense)
        self.fit(model, [*pruning, qat])
        with tempfile.TemporaryDirectory() as folder:
            size = save_weights(model, Path(folder) / "weights.zip", qat.ranges())
        with rounded_as_trained(model.eval(), qat.ranges()):
            held, test = self.accuracies(model)
        return {"size_bytes": float(size), "accuracy": held, "test": test}


def small_net() -> nn.Module:
    """Five layers, 100 572 weights."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(24 * 49, 80), nn.ReLU(), nn.Linear(80, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip


def images(seed: int, options: argparse.Namespace, steps: int = 200, dense_steps: int = 1250) -> Task:
    """Fashion-MNIST: 10 000 images to train on, 5000 others to choose by, the 10 000 test images to report."""
    data = fashion_mnist(options.data_dir)
    x, y = data.train.tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, held = order[:10_000], order[10_000:15_000]
    own = TensorDataset(x[train], y[train])

    def fit(model: Model, callbacks: list[L.Callback], at: int = LATER, last: int = steps) -> Model:
        sampler = RandomSampler(own, generator=torch.Generator().manual_seed(seed + at))
        torch.manual_seed(seed + at)
        trainer = quiet_trainer(callbacks, max_steps=last)
        trainer.fit(model.train(), DataLoader(own, 64, sampler=sampler, drop_last=True))
        return model

    def accuracies(model: L.LightningModule) -> tuple[float, float]:
        return right(model.net, x[held], y[held]), right(model.net, *data.test.tensors)

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(functional.cross_entropy(model.net(x[train[:2000]]), y[train[:2000]]))

    torch.manual_seed(seed)
    dense = kept(options.cache / f"images-{seed}.pt", Tuned(small_net(), 2e-3), lambda m: fit(m, [], 0, dense_steps))
    names = [name for name, layer in dense.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return Task(dense, {name: [name] for name in names}, fit, accuracies, loss)


@torch.no_grad()
def right(net: nn.Module, x: Tensor, y: Tensor) -> float:
    found = torch.cat([net(batch).argmax(1) for batch in x.split(500)])
    return float((found == y).double().mean())


def text(seed: int, options: argparse.Namespace, steps: int = 60, dense_steps: int = 125) -> Task:
    """MiniLM on Rotten Tomatoes: a group is one of its six blocks; 32 sentences a step, in float32."""
    import minilm

    minilm.silence()
    data, recipe = minilm.reviews(seed, train_size=5000), minilm.RECIPES["dense"]
    train, held = data.train.select(range(4000)), data.train.select(range(4000, 5000))

    def accuracies(model: L.LightningModule) -> tuple[float, float]:
        return score(model, data, held)[0], score(model, data, data.test)[0]

    def fit(model: Model, callbacks: list[L.Callback], at: int = LATER, last: int = steps) -> Model:
        L.seed_everything(seed + at, verbose=False)
        batches = DataLoader(train, recipe.batch_size, shuffle=True, drop_last=True, collate_fn=data.batch_of)
        quiet_trainer(callbacks, max_steps=last).fit(model.train(), batches)
        return model

    L.seed_everything(seed, verbose=False)
    first = minilm.start(recipe, Path())
    dense = kept(options.cache / f"text-{seed}.pt", first, lambda model: fit(model, [], 0, dense_steps))

    blocks: dict[str, list[str]] = {}
    for name, layer in dense.named_modules():
        if name.startswith(minilm.ENCODER) and isinstance(layer, nn.Linear):
            blocks.setdefault(name.removeprefix(f"{minilm.ENCODER}.layer.").partition(".")[0], []).append(name)
    dense.hparams.learning_rate = TEXT_RATE
    some = train.select(range(128))
    words = [name for name, layer in dense.named_modules() if isinstance(layer, nn.Embedding)]
    return Task(dense, blocks, fit, accuracies, lambda model: score(model, data, some)[1], words)


@torch.no_grad()
def score(model: nn.Module, data: object, rows: object) -> tuple[float, float]:
    """Return the share of sentences classified right, and the mean loss."""
    logits, labels = [], []
    for batch in DataLoader(rows, 64, collate_fn=data.batch_of):
        logits.append(model(batch["input_ids"], batch["attention_mask"]))
        labels.append(batch["label"])
    told, wanted = torch.cat(logits), torch.cat(labels)
    return float((told.argmax(1) == wanted).double().mean()), float(functional.cross_entropy(told, wanted))


TASKS: dict[str, Callable[[int, argparse.Namespace], Task]] = {"images": images, "text": text}
