"""MiniLM on film reviews, quantized after or while it is fine-tuned: `python benchmarks/minilm_quantized.py`.

Model, data and split are minilm.py's: 4000 sentences of at most 32 tokens, 125 steps of 32, in float32. Each row trains
that model for 63 steps more at a quarter of the rate, the same batches for all; post-training rows round the model of
`float` and train nothing. All Linear layers of the encoder are quantized, embeddings and the head stay float. Accuracy
is of 1000 test sentences in PyTorch, with every rounding; the int8 file, where there is one, is run on the same
sentences. Results are added to results/minilm_quantized.json, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as L
import torch
from cells import load, save
from int8 import processor
from int8_files import COLUMNS, columns, compared
from minilm import LATER, RottenTomatoes, TextClassifier, encoder_weights, reviews, silence
from torch import Tensor
from torch.utils.data import DataLoader
from training import quiet_trainer

from lightning_compress import QuantizationAwareTraining
from lightning_compress.export.biases import round_biases
from lightning_compress.quantization.dynamic import dynamically_quantized
from lightning_compress.quantization.outputs import Ranges, rounded_as_trained
from lightning_compress.quantization.posttraining import quantize_post_training
from lightning_compress.quantization.weight_only import quantize_weights

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "minilm_quantized.json"
ENCODER = ["encoder.encoder"]
BATCH, STEPS, DENSE_STEPS = 32, 63, 125
LEARNING_RATE = 2e-4
WINDOW = (0.05, 0.1, 0.9)
GROUP = 64
Cell = dict[str, Any]
Row = tuple[TextClassifier, AbstractContextManager[Any], Ranges | None]


def fit(model: TextClassifier, data: RottenTomatoes, steps: int, seed: int, callbacks: list[L.Callback]) -> None:
    trainer = quiet_trainer(callbacks, max_steps=steps)
    L.seed_everything(seed, verbose=False)
    trainer.fit(model, DataLoader(data.train, BATCH, shuffle=True, drop_last=True, collate_fn=data.batch_of))
    model.eval()


def kept(path: Path, seed: int, data: RottenTomatoes, steps: int, start: TextClassifier | None) -> TextClassifier:
    """Return a float model from a file, or trained and then kept there; without a start from the pretrained encoder."""
    model = copy.deepcopy(start) if start else fresh(seed)
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    fit(model, data, steps, seed + (LATER if start else 0), [])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def fresh(seed: int) -> TextClassifier:
    L.seed_everything(seed, verbose=False)
    return TextClassifier(encoder_weights(), learning_rate=LEARNING_RATE)


def trained(weights: int, dense: TextClassifier, tuned: TextClassifier, data: RottenTomatoes, seed: int) -> Row:
    model, qat = copy.deepcopy(dense), QuantizationAwareTraining(weights, 8, WINDOW, ENCODER)
    fit(model, data, STEPS, seed + LATER, [qat])
    ranges = qat.ranges()
    round_biases(model, ranges, calibration(data)[0])
    return model, rounded_as_trained(model, ranges), ranges


def calibration(data: RottenTomatoes) -> list[dict[str, Tensor]]:
    return [tokens(data.batch_of([data.train[i] for i in range(at, at + BATCH)])) for at in range(0, 8 * BATCH, BATCH)]


def tokens(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "label"}


def static(dense: TextClassifier, tuned: TextClassifier, data: RottenTomatoes, seed: int) -> Row:
    ranges = quantize_post_training(tuned, calibration(data), 8, 8, include=ENCODER)
    round_biases(tuned, ranges, calibration(data)[0])
    return tuned, rounded_as_trained(tuned, ranges), ranges


def dynamic(dense: TextClassifier, tuned: TextClassifier, data: RottenTomatoes, seed: int) -> Row:
    return tuned, dynamically_quantized(tuned, include=ENCODER), None


def weights_only(error_feedback: bool, dense: TextClassifier, tuned: TextClassifier, data: Any, seed: int) -> Row:
    batches = calibration(data) if error_feedback else None
    quantize_weights(tuned, batches, bits=4, group=GROUP, include=ENCODER)
    return tuned, nullcontext(), None


METHODS: dict[str, Callable[..., Row]] = {
    "float": lambda dense, tuned, data, seed: (tuned, nullcontext(), None),
    "W8A8, post-training, dynamic": dynamic,
    "W8A8, post-training, static": static,
    f"int4 weights by {GROUP}, post-training, nearest": partial(weights_only, False),
    f"int4 weights by {GROUP}, post-training, error feedback": partial(weights_only, True),
    "W8A8": partial(trained, 8),
    "W4A8": partial(trained, 4),
}


@torch.no_grad()
def predicted(model: TextClassifier, batches: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([model(**tokens(batch)).argmax(1) for batch in batches])


def measure(name: str, seed: int, data: RottenTomatoes, cache: Path) -> Cell:
    dense = kept(cache / f"dense-{seed}.pt", seed, data, DENSE_STEPS, None)
    dense.hparams.learning_rate = LEARNING_RATE / 4
    tuned = kept(cache / f"float-{seed}.pt", seed, data, STEPS, dense)
    began = time.perf_counter()
    model, rounding, ranges = METHODS[name](dense, tuned, data, seed)
    test = list(data.test_dataloader())
    with rounding:
        found = predicted(model, test)
    right = (found == torch.cat([batch["label"] for batch in test])).float().mean()
    cell = {
        "recipe": name,
        "seed": seed,
        "accuracy": round(100 * float(right), 2),
        "seconds": round(time.perf_counter() - began),
        "machine": processor(),
    }
    if ranges is None:
        return cell
    inputs = [tokens(batch) for batch in test]
    return cell | {"file": compared(model, ranges, inputs, found, 40, dynamic_sequence=True)}


def table(cells: list[Cell]) -> Iterator[str]:
    """Yield the table in Markdown: accuracy and, of rows with an int8 file, what that computes."""
    yield f"| | accuracy | {COLUMNS} |"
    yield "| --- | ---: | ---: | --- | ---: | ---: |"
    for name in METHODS:
        own = [cell for cell in cells if cell["recipe"] == name]
        if own:
            values = [cell["accuracy"] for cell in own]
            spread = f"{mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"
            yield f"| {' | '.join([name, spread, *columns(own)])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, metavar="ROW", help="some rows alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "minilm_quantized")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table in Markdown")
    options = parser.parse_args()
    if options.table:
        print(*table(load(options.out)), sep="\n")
        return
    silence()
    for seed in options.seeds:
        data = reviews(seed)
        for name in options.only or METHODS:
            if any((cell["recipe"], cell["seed"]) == (name, seed) for cell in load(options.out)):
                continue
            cell = measure(name, seed, data, options.cache)
            save(options.out, [*load(options.out), cell])
            print(
                f"{name}, seed {seed}: {cell['accuracy']:.1f} ({cell['seconds']} s) {cell.get('file', '')}", flush=True
            )


if __name__ == "__main__":
    main()
