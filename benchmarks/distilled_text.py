"""MiniLM, fine-tuned on film reviews, distilled into three of its six layers: `python benchmarks/distilled_text.py`.

Teacher, data, split and training are minilm_quantized.py's: 4000 sentences of at most 32 tokens, 125 steps of 32, in
float32. Each row trains a student of 3 layers for as many steps on the same batches. Accuracy is of 1000 test
sentences; latency is of the encoder in PyTorch, teacher and student in turn on one thread.

Results are added to results/distilled_text.json, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as L
import torch
from cells import Cells, load, save
from int8 import cpu_times, processor, spread
from minilm import LATER, RottenTomatoes, TextClassifier, encoder_weights, reviews, silence
from minilm_quantized import DENSE_STEPS, fit, fresh, kept, predicted

from lightning_compress import Distillation
from lightning_compress.distillation.attention import attention_mse
from lightning_compress.distillation.details import Details
from lightning_compress.distillation.features import feature_mse
from lightning_compress.distillation.students import keep_layers
from lightning_compress.distillation.terms import LayerTerm

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "distilled_text.json"
WEIGHT, TEMPERATURE = 0.5, 2.0
HIDDEN, ATTENTION = 1.0, 10.0  # weights of the terms of layers
RATE, STEPS = 2e-4, 125
TEACHER = "teacher, 6 layers"
SENTENCES, TOKENS, RUNS = (1, 32), 32, 40


@dataclass(frozen=True)
class Row:
    """Where a student of 3 layers comes from and what it is taught besides the labels."""

    tuned: bool = False  # layers, embeddings and head of the fine-tuned teacher, not of the pretrained encoder
    logits: bool = False
    layers: bool = False  # hidden states and attention maps


ROWS = {
    "alone": Row(),
    "logits": Row(logits=True),
    "logits, hidden states, attention": Row(logits=True, layers=True),
    "from the teacher's layers, alone": Row(tuned=True),
    "from the teacher's layers, logits": Row(tuned=True, logits=True),
    "from the teacher's layers, logits, hidden states, attention": Row(tuned=True, logits=True, layers=True),
}


def student_of(row: Row, teacher: TextClassifier, seed: int) -> TextClassifier:
    start = copy.deepcopy(teacher) if row.tuned else fresh(seed)
    start.encoder = keep_layers(start.encoder, "every second")  # 1, 3 and 5 of 0 to 5
    start.encoder.set_attn_implementation(attention(row))
    return start.train()


def attention(row: Row) -> str:
    """Return which code computes attention: the fused one keeps its maps to itself."""
    return "eager" if row.layers else "sdpa"


def accuracy(model: TextClassifier, data: RottenTomatoes) -> float:
    batches = list(data.test_dataloader())
    right = predicted(model, batches) == torch.cat([batch["label"] for batch in batches])
    return round(100 * float(right.float().mean()), 2)


def callbacks_of(row: Row, teacher: TextClassifier) -> list[L.Callback]:
    if not row.logits:
        return []
    hidden = LayerTerm(feature_mse, "BertLayer", weight=HIDDEN)
    maps = LayerTerm(attention_mse, "BertSelfAttention", weight=ATTENTION, read="attention")
    details = Details(mask=lambda batch: batch["attention_mask"])
    layers = [hidden, maps] if row.layers else []
    return [Distillation(teacher, WEIGHT, TEMPERATURE, layers=layers, details=details)]


def measure(name: str, seed: int, data: RottenTomatoes, cache: Path) -> dict[str, Any]:
    """Train one row's student and measure it; the teacher is trained once a seed and kept in a file."""
    teacher = kept(cache / f"dense-{seed}.pt", seed, data, DENSE_STEPS, None)
    cell = {"row": name, "seed": seed, "machine": processor()}
    if name == TEACHER:
        return cell | {"accuracy": accuracy(teacher, data)}
    row = ROWS[name]
    student = student_of(row, teacher, seed)
    student.hparams.learning_rate = RATE
    teacher.encoder.set_attn_implementation(attention(row))
    began = time.process_time()
    fit(student, data, STEPS, seed + LATER, callbacks_of(row, teacher))
    return cell | {"cpu_seconds": round(time.process_time() - began), "accuracy": accuracy(student, data)}


def latency(sentences: int, teacher: TextClassifier) -> dict[str, Any]:
    """CPU milliseconds of both encoders, in turn, and their ratio run by run."""
    student = student_of(Row(tuned=True), teacher, 0).eval()
    ids = torch.randint(1000, 30000, (sentences, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calls = {
        name: lambda model=model: model.encoder(**inputs)
        for name, model in (("teacher", teacher), ("student", student))
    }
    with torch.no_grad():
        times = cpu_times(calls, RUNS, warm=1)
    ratio = spread(times["student"] / times["teacher"])
    return {"row": f"latency, {sentences}", "seed": None, "machine": processor(), "runs": RUNS, "ratio": ratio} | {
        f"{name}_ms": spread(each) for name, each in times.items()
    }


def table(cells: Cells) -> Iterator[str]:
    """Yield the tables in Markdown: accuracy, and how much of the teacher's that is; then latency."""
    teacher = {cell["seed"]: cell["accuracy"] for cell in cells if cell["row"] == TEACHER}
    yield "| | accuracy, mean (each seed) | of the teacher's (worst seed) |"
    yield "| --- | --- | ---: |"
    for name in (TEACHER, *ROWS):
        of = {cell["seed"]: cell["accuracy"] for cell in cells if cell["row"] == name}
        if of:
            shares = [100 * value / teacher[seed] for seed, value in of.items()]
            each = ", ".join(f"{value:.1f}" for value in of.values())
            yield f"| {name} | {mean(of.values()):.1f} ({each}) | {mean(shares):.1f} % ({min(shares):.1f} %) |"
    yield f"\n| sentences of {TOKENS} tokens | teacher's encoder | student's encoder | student / teacher (quartiles) |"
    yield "| ---: | ---: | ---: | --- |"
    for cell in cells:
        if "ratio" in cell:
            median, low, high = (f"{cell['ratio'][key]:.3f}" for key in ("median", "quartile_1", "quartile_3"))
            times = " | ".join(f"{cell[f'{side}_ms']['median']:.1f} ms" for side in ("teacher", "student"))
            yield f"| {cell['row'].removeprefix('latency, ')} | {times} | {median} ({low} to {high}) |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[TEACHER, *ROWS], metavar="ROW", help="some rows alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--cache", type=Path, default=HERE.parent / "outputs" / "distilled_text", help="for the teachers"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables in Markdown")
    options = parser.parse_args()
    if options.table:
        print(*table(load(options.out)), sep="\n")
        return
    silence()
    for seed in options.seeds:
        data = reviews(seed)
        for name in options.only or [TEACHER, *ROWS]:
            if any((cell["row"], cell["seed"]) == (name, seed) for cell in load(options.out)):
                continue
            cell = measure(name, seed, data, options.cache)
            save(options.out, [*load(options.out), cell])
            print(f"{name}, seed {seed}: {cell['accuracy']:.1f}", flush=True)
    for sentences in SENTENCES:
        if not any(cell["row"] == f"latency, {sentences}" for cell in load(options.out)):
            cell = latency(sentences, TextClassifier(encoder_weights()).eval())
            save(options.out, [*load(options.out), cell])
            print(cell["row"], cell["ratio"], flush=True)


if __name__ == "__main__":
    main()
