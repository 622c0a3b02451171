"""MiniLM on film reviews, pruned while it is fine-tuned: `python benchmarks/minilm.py`, then `--table`.

Model, data and learning rate are those of examples/finetune_text.py --fast: 4000 sentences of at most 32 tokens, 125
steps of 32. Two questions, each over seeds 0 to 2 (of the split, the order and the head):

recipes: a dense model is fine-tuned first; each recipe trains it for 125 steps more. Accuracy after the last step.
law: movement against magnitude at 90 %, pruning while the pretrained encoder learns the task (Sanh et al. 2020).

Each result is added to results/minilm.json, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import lightning.pytorch as L
import torch
import transformers
from cells import load, save
from torch import Tensor
from torch.utils.data import DataLoader
from training import quiet_trainer
from transformers import AutoTokenizer

from lightning_compress import Distillation, GradualPruning, Linear, SparsityRegularization
from lightning_compress.pruning.criteria import magnitude, movement, random
from lightning_compress.pruning.gates import SoftMovement
from lightning_compress.pruning.patterns import NM

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "examples"))
from finetune_text import RottenTomatoes, TextClassifier, encoder_weights  # noqa: E402

RESULTS = HERE / "results" / "minilm.json"
ENCODER = "encoder.encoder"  # its 36 Linear layers; embeddings, norms, biases and the head stay dense
LATER = 1000  # added to a seed after the dense phase: other batches than the dense model has seen first
SOFT_WEIGHT = 20.0  # of 0.3, 3 and 20 the best on seed 3, which is not in the table
Cell = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How one row of a table is trained; an epoch is 4000 sentences."""

    sparsity: float = 0.0
    pattern: Callable[..., Any] | None = None
    criterion: Callable[..., Tensor] = magnitude
    distilled: bool = False
    pretrained: bool = False  # start from the pretrained encoder instead of the dense fine-tuned model
    epochs: int = 1
    batch_size: int = 32
    learning_rate: float = 2e-4
    window: tuple[float, float] = (0.1, 0.7)
    frequency: float = 0.01
    frozen_embeddings: bool = False
    soft_movement: float | None = (
        None  # the penalty's weight at the window's end; learned scores instead of a criterion
    )


def law(criterion: Callable[..., Tensor] = magnitude, soft_movement: float | None = None) -> Recipe:
    return Recipe(
        0.9,
        criterion=criterion,
        pretrained=True,
        epochs=3,
        window=(0.05, 0.7),
        frequency=0.02,
        frozen_embeddings=True,
        soft_movement=soft_movement,
    )


RECIPES = {
    "dense": Recipe(pretrained=True),
    "dense, trained on": Recipe(),
    "80 %": Recipe(0.8),
    "80 %, distilled": Recipe(0.8, distilled=True),
    "90 %": Recipe(0.9),
    "90 %, distilled": Recipe(0.9, distilled=True),
    "2:4 (50 %)": Recipe(0.5, NM(2, 4)),
    "2:4 (50 %), distilled": Recipe(0.5, NM(2, 4), distilled=True),
}
LAW = {
    "magnitude": law(),
    "soft movement": law(soft_movement=SOFT_WEIGHT),
    "movement, summed": law(movement),
    "random": law(random),
}
QUESTIONS = {"recipes": RECIPES, "law": LAW}


def fit(model: TextClassifier, data: RottenTomatoes, recipe: Recipe, callbacks: list[L.Callback]) -> float:
    """Train in bfloat16 autocast, and return the percentage of test sentences that are classified right."""
    trainer = quiet_trainer(callbacks, max_epochs=recipe.epochs, precision="bf16-mixed")
    options = {"batch_size": recipe.batch_size, "shuffle": True, "drop_last": True, "collate_fn": data.batch_of}
    trainer.fit(model, DataLoader(data.train, **options))
    return 100.0 * trainer.test(model, data, verbose=False)[0]["test_accuracy"]


def start(recipe: Recipe, dense: Path) -> TextClassifier:
    model = TextClassifier(encoder_weights(), learning_rate=recipe.learning_rate)
    if not recipe.pretrained:
        model.load_state_dict(torch.load(dense, weights_only=True))
    model.encoder.embeddings.requires_grad_(not recipe.frozen_embeddings)
    return model


def callbacks_of(recipe: Recipe, dense: TextClassifier) -> list[L.Callback]:
    if recipe.soft_movement is not None:
        weight = Linear(recipe.soft_movement)
        return [SparsityRegularization(SoftMovement(), weight, recipe.sparsity, recipe.window, include=[ENCODER])]
    pruning = GradualPruning(
        recipe.sparsity,
        recipe.window,
        recipe.frequency,
        include=[ENCODER],
        criterion=recipe.criterion,
        pattern=recipe.pattern,
    )
    return [pruning, Distillation(teacher=copy.deepcopy(dense), enabled=recipe.distilled)]


def measure(name: str, recipe: Recipe, seed: int, data: RottenTomatoes, cache: Path) -> Cell:
    """Train one cell of a table and measure it; the dense model is kept for the others."""
    dense = cache / f"dense-{seed}.pt"
    later = seed if recipe.pretrained else seed + LATER
    L.seed_everything(later, verbose=False)
    model = start(recipe, dense)
    started = time.perf_counter()
    L.seed_everything(later, verbose=False)
    accuracy = fit(model, data, recipe, callbacks_of(recipe, model))
    if name == "dense":
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), dense)
    weights = [layer.weight for layer in model.get_submodule(ENCODER).modules() if isinstance(layer, torch.nn.Linear)]
    kept = sum(int(torch.count_nonzero(weight)) for weight in weights) / sum(weight.numel() for weight in weights)
    seconds = round(time.perf_counter() - started)
    return {"recipe": name, "seed": seed, "accuracy": round(accuracy, 2), "kept": round(kept, 6), "seconds": seconds}


def table(cells: list[Cell], recipes: dict[str, Recipe]) -> Iterator[str]:
    """Yield the rows of one question in Markdown: mean, range and each seed."""
    seeds = sorted({cell["seed"] for cell in cells if cell["recipe"] in recipes})
    yield f"| | mean (lowest to highest, if several seeds) | {' | '.join(f'seed {seed}' for seed in seeds)} |"
    yield f"| --- | ---: | {' | '.join('---:' for _ in seeds)} |"
    for name in recipes:
        of = {cell["seed"]: cell["accuracy"] for cell in cells if cell["recipe"] == name}
        if of:
            each = " | ".join(f"{of[seed]:.1f}" if seed in of else "-" for seed in seeds)
            spread = f" ({min(of.values()):.1f} to {max(of.values()):.1f})" if len(of) > 1 else ""
            yield f"| {name} | {mean(of.values()):.1f}{spread} | {each} |"


def silence() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # lightning's advice on workers and loggers
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def reviews(seed: int, train_size: int = 4000) -> RottenTomatoes:
    """Return 4000 training and 1000 test sentences, split by the seed."""
    options = argparse.Namespace(seed=seed, max_length=32, train_size=train_size, test_size=1000)
    return RottenTomatoes(AutoTokenizer.from_pretrained(encoder_weights()), options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument("--only", nargs="+", choices=[*RECIPES, *LAW], metavar="RECIPE", help="some rows alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "minilm", help="for the dense models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables in Markdown")
    options = parser.parse_args()
    if options.table:
        for question in options.question:
            print(f"\n{question}\n", *table(load(options.out), QUESTIONS[question]), sep="\n")
        return
    silence()
    for seed in options.seeds:
        wanted = {name: recipe for question in options.question for name, recipe in QUESTIONS[question].items()}
        data = reviews(seed)
        for name, recipe in wanted.items():
            there = any((cell["recipe"], cell["seed"]) == (name, seed) for cell in load(options.out))
            if there or name not in (options.only or wanted):
                continue
            cell = measure(name, recipe, seed, data, options.cache)
            save(options.out, [*load(options.out), cell])
            print(f"{name}, seed {seed}: {cell['accuracy']:.1f} ({cell['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
