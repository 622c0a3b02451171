"""The rows of the accuracy tables: each method turns a trained dense net into a sparse one, in as many more steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from networks import prunable, weight_count
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress import Constant, Cubic, GradualPruning
from lightning_compress.callbacks.regularization import SparsityRegularization
from lightning_compress.pruning.criteria import magnitude, movement, random, taylor, wanda
from lightning_compress.pruning.gates import HardConcrete
from lightning_compress.pruning.patterns import Unstructured
from lightning_compress.pruning.reconstruction import reconstruct
from lightning_compress.pruning.regrowth import RigL
from lightning_compress.pruning.scopes import by_output, erk, lamp, uniform

BEGIN, END, EVERY = 10, 0.7, 10  # mask updates: from step 10, to this share of the steps, every ten steps
EPOCH = 20  # steps, for ModelPruning, which acts at epochs
LAYERS = ["net"]  # all Linear and Conv layers of the Classifier's net, the head too


@dataclass(frozen=True)
class Run:
    """One cell of the table: what a method may use.

    Args:
        dense: the trained net, to be copied before it is changed.
        make: width -> a fresh net of this kind.
        fit: (net, steps, callbacks, steps an epoch or None) -> the net, trained by a Lightning Trainer.
        batches: the same batches, for a loop written by hand.
    """

    dense: nn.Module
    make: Callable[[float], nn.Module]
    sparsity: float
    steps: int
    dense_steps: int
    learning_rate: float
    fit: Callable[[nn.Module, int, list[L.Callback], int | None], nn.Module]
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]

    def window(self) -> tuple[int, int]:
        return BEGIN, round(END * self.steps)

    def fine_tuned(self, *callbacks: L.Callback) -> nn.Module:
        return self.fit(copy.deepcopy(self.dense), self.steps, list(callbacks), None)


Method = Callable[[Run], nn.Module]


def dense(run: Run) -> nn.Module:
    return run.fine_tuned()


def gradual(run: Run, criterion: Callable[..., Tensor] = magnitude, pattern: object = None) -> nn.Module:
    return run.fine_tuned(GradualPruning(run.sparsity, run.window(), EVERY, LAYERS, None, criterion, pattern))


def at_once(run: Run, criterion: Callable[..., Tensor] = magnitude, pattern: object = None) -> nn.Module:
    once = (BEGIN, BEGIN + 1)
    return run.fine_tuned(GradualPruning(Constant(run.sparsity), once, 1, LAYERS, None, criterion, pattern))


def sparsegpt(run: Run) -> nn.Module:
    """Reconstructed once from 1024 images, each layer to the same sparsity; then its zeros are kept."""
    net = copy.deepcopy(run.dense)
    images = [batch[0] for batch in islice(run.batches(), 16)]
    reconstruct(net, images, run.sparsity, include=["*"])
    keep = GradualPruning(Constant(run.sparsity), (0, 2), 1, LAYERS)
    return run.fit(net, run.steps, [keep], None)


def l0(run: Run) -> nn.Module:
    """Louizos et al. 2018; its weight is the best of 1e-6, 1e-5 and 1e-4 on LeNet-300-100, seed 3, 98 %."""
    return run.fine_tuned(SparsityRegularization(HardConcrete(), 1e-4, run.sparsity, run.window(), LAYERS))


def small_and_dense(run: Run) -> nn.Module:
    """The widest net of this kind with no more weights than the sparse one keeps, trained as long in all."""
    kept = (1.0 - run.sparsity) * weight_count(run.dense)
    widths = [width / 1000 for width in range(1, 1001)]
    width = max((w for w in widths if weight_count(run.make(w)) <= kept), default=widths[0])
    return run.fit(run.make(width), run.dense_steps + run.steps, [], None)


def rigl_from_scratch(run: Run) -> nn.Module:
    """As in its paper: sparse from the first step on, all steps; the first masks are of the random weights' sizes."""
    steps = run.dense_steps + run.steps
    callback = GradualPruning(run.sparsity, (0, round(END * steps)), EVERY, LAYERS, None, magnitude, RigL())
    return run.fit(run.make(1.0), steps, [callback], None)


def by_hand(run: Run) -> nn.Module:
    """Gradual magnitude pruning without this package: a loop, one kthvalue over all weights, masks multiplied in."""
    net = copy.deepcopy(run.dense).train()
    weights = [layer.weight for layer in prunable(net)]
    optimizer = torch.optim.Adam(net.parameters(), run.learning_rate)
    begin, end = run.window()
    masks: list[Tensor] = []
    for step, (images, labels) in zip(range(1, run.steps + 1), forever(run.batches()), strict=False):
        optimizer.zero_grad()
        functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        with torch.no_grad():
            if begin <= step <= end and (step - begin) % EVERY == 0:
                sparsity = run.sparsity * (1 - (1 - (step - begin) / (end - begin)) ** 3)
                scores = torch.cat([weight.abs().flatten() for weight in weights])
                count = round(sparsity * len(scores))
                threshold = scores.kthvalue(count).values if count else -1.0
                masks = [weight.abs() > threshold for weight in weights]
            for weight, mask in zip(weights, masks, strict=False):
                weight.mul_(mask)
    return net


def forever(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


def lightnings_model_pruning(run: Run) -> nn.Module:
    """Lightning's own callback at its best: the same cubic, turned into its amounts, each 20 steps; no rewinding."""
    net = copy.deepcopy(run.dense).to(memory_format=torch.contiguous_format)  # torch's pruning fails on channels_last
    epochs = round(run.steps * END / EPOCH)
    sparsity = [Cubic(run.sparsity)(min(1.0, (epoch + 1) / epochs)) for epoch in range(run.steps // EPOCH)]
    amounts = [1 - (1 - now) / (1 - before) for before, now in zip([0.0, *sparsity], sparsity, strict=False)]
    callback = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(layer, "weight") for layer in prunable(net)],
        use_global_unstructured=True,
        amount=lambda epoch: amounts[epoch],
        apply_pruning=lambda epoch: amounts[epoch] > 0,
        make_pruning_permanent=True,
        use_lottery_ticket_hypothesis=False,
    )
    return run.fit(net, run.steps, [callback], EPOCH)


METHODS: dict[str, Method] = {
    "dense, trained on": dense,
    "magnitude, by hand": by_hand,
    "magnitude, global": gradual,
    "magnitude, uniform": partial(gradual, pattern=Unstructured(uniform)),
    "magnitude, ERK": partial(gradual, pattern=Unstructured(erk)),
    "magnitude, LAMP": partial(gradual, pattern=Unstructured(lamp)),
    "Taylor": partial(gradual, criterion=taylor),
    "movement": partial(gradual, criterion=movement),
    "L0, hard concrete": l0,
    "RigL": partial(gradual, pattern=RigL()),
    "RigL, from scratch": rigl_from_scratch,
    "random": partial(gradual, criterion=random),
    "one shot, magnitude": at_once,
    "one shot, Wanda": partial(at_once, criterion=wanda, pattern=Unstructured(by_output)),
    "one shot, magnitude, uniform": partial(at_once, pattern=Unstructured(uniform)),
    "one shot, SparseGPT": sparsegpt,
    "small and dense": small_and_dense,
    "Lightning's ModelPruning": lightnings_model_pruning,
}
WITHOUT_SPARSITY = {"dense, trained on"}
