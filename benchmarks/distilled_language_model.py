"""A language model of characters, distilled into half its layers: `python benchmarks/distilled_language_model.py`.

Teacher: a Llama of 8 layers x 128, trained from scratch on Jane Austen's novels. Student: 4 of its layers, copied. Each
row trains that student on the same batches: alone, towards the teacher by the reverse KL divergence, or by the forward
one. Loss is in nats per character of text that neither saw, the last 5 % of each novel. There is one teacher; a seed is
of the students' batches.

Results are added to results/distilled_language_model.json, and what is there already is not run again; `--table` prints
them, `--picture FILE` draws the curves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as L
import torch
from cells import Cells, load, save
from int8 import processor
from minilm import silence
from novels import DATA_DIR, Novels, Windows, novels
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from training import quiet_trainer
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_compress import Distillation
from lightning_compress.distillation.losses import reverse_kl, soft_targets
from lightning_compress.distillation.students import keep_layers

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "distilled_language_model.json"
WIDTH, LAYERS, KEPT = 128, 8, "every second"
CONTEXT, BATCH = 128, 16
TEACHER_STEPS, STEPS, POINTS = 1000, 200, 10
TEACHER_RATE, RATE = 3e-3, 1e-3
WARM_UP = 0.05  # of the steps; from there the rate falls to 0 in a half cosine
WINDOWS = 256  # held out, of 128 characters each
TEACHER, TEACHER_SEED = "teacher", 1000
STYLES = [("#8a9bb0", "--"), ("#d9622b", "-"), ("#3b7dd8", "-.")]  # told apart in grey print as well


class LanguageModel(L.LightningModule):
    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate
        self.curve: list[tuple[int, float]] = []

    def loss(self, text: Tensor) -> Tensor:
        logits = self.model(input_ids=text[:, :-1]).logits
        return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor) -> None:
        self.log("loss", self.loss(batch), batch_size=len(batch))

    def on_validation_epoch_end(self) -> None:
        self.curve.append((self.global_step, float(self.trainer.callback_metrics["loss"])))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, (0.9, 0.95), fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, steps, pct_start=WARM_UP, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(frozen=True)
class Row:
    """How the student is taught: a loss, None is not at all, and its share."""

    loss: Callable[..., Tensor] | None = None
    weight: float = 0.0


ROWS = {
    "alone": Row(),
    "reverse KL": Row(reverse_kl, 0.5),
    "forward KL": Row(soft_targets, 0.5),
}


def fit(model: LanguageModel, text: Novels, steps: int, seed: int, callbacks: list[L.Callback]) -> None:
    """Train, and keep the loss on held-out text at the start and after each tenth in the model's `curve`."""
    trainer = quiet_trainer(callbacks, max_epochs=1, val_check_interval=steps // POINTS, num_sanity_val_steps=0)
    held_out = text.held_out[: len(text.held_out) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    apart = held_out[:: len(held_out) // WINDOWS][:WINDOWS]  # from all novels
    validation = DataLoader(list(apart.split(32)), batch_size=None)
    trainer.validate(model, validation, verbose=False)
    model.train()
    trainer.fit(model, DataLoader(Windows(text.train, steps, BATCH, CONTEXT + 1, seed), batch_size=None), validation)


def teacher_of(text: Novels, path: Path) -> LanguageModel:
    """Return the trained teacher from a file, or trained and then kept there."""
    L.seed_everything(TEACHER_SEED, verbose=False)
    model = LanguageModel(LlamaForCausalLM(configured(len(text.characters))), TEACHER_RATE)
    if path.is_file():
        model.curve, state = torch.load(path, weights_only=True)
        model.load_state_dict(state)
        return model
    fit(model, text, TEACHER_STEPS, TEACHER_SEED, [])
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save((model.curve, model.state_dict()), path)
    return model


def configured(characters: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=characters,
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def measure(name: str, seed: int, text: Novels, teacher: LanguageModel) -> dict[str, Any]:
    """Train one row's student and keep its curve."""
    row = ROWS[name]
    began = time.process_time()
    student = LanguageModel(keep_layers(teacher.model, KEPT), RATE)
    callbacks = [] if row.loss is None else [Distillation(teacher.model, row.weight, 1.0, row.loss)]
    fit(student, text, STEPS, seed, callbacks)
    return {"row": name, "seed": seed} | about(student, time.process_time() - began)


def about(model: LanguageModel, seconds: float) -> dict[str, Any]:
    return {
        "curve": [(step, round(loss, 4)) for step, loss in model.curve],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cpu_seconds": round(seconds),
        "machine": processor(),
    }


def table(cells: Cells) -> Iterator[str]:
    """Yield the table in Markdown: the loss after some of the steps, mean over seeds (lowest to highest)."""
    students = [cell for cell in cells if cell["row"] != TEACHER]
    points = [0, 2, 5, 10]
    steps = [students[0]["curve"][point][0] for point in points] if students else []
    yield f"| | {' | '.join(f'step {step}' for step in steps)} |"
    yield f"| --- |{' ---: |' * len(steps)}"
    for name in ROWS:
        curves = [cell["curve"] for cell in students if cell["row"] == name]
        if curves:
            yield f"| {name} | {' | '.join(spread([curve[point][1] for curve in curves]) for point in points)} |"
    ends = [cell["curve"][-1][1] for cell in cells if cell["row"] == TEACHER]
    if ends:
        yield f"\nThe teacher: {spread(ends)}."


def spread(values: list[float]) -> str:
    beyond = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(values):.3f}{beyond}"


def draw(cells: Cells, path: Path) -> None:
    """Draw the mean curve of each row, and the range over seeds behind it."""
    from matplotlib.figure import Figure  # needed here alone

    figure = Figure(figsize=(7.0, 4.0), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for (name, _), (color, style) in zip(ROWS.items(), STYLES, strict=True):
        curves = [cell["curve"] for cell in cells if cell["row"] == name]
        steps = [step for step, _ in curves[0]]
        losses = [[curve[point][1] for curve in curves] for point in range(len(steps))]
        axes.plot(steps, [mean(each) for each in losses], color=color, linestyle=style, linewidth=2, label=name)
        axes.fill_between(steps, [min(x) for x in losses], [max(x) for x in losses], color=color, alpha=0.15)
    teacher = mean(cell["curve"][-1][1] for cell in cells if cell["row"] == TEACHER)
    axes.axhline(teacher, color="#2f3b4a", linewidth=1.2, linestyle=":", label="the teacher")
    axes.set(title="Half of a language model's layers", xlabel="optimizer step", ylabel="held-out nats per character")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="some rows alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-dir", default=DATA_DIR, help="folder of the R package janeaustenr")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "distilled_language_model")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the table in Markdown")
    parser.add_argument("--picture", type=Path, help="only draw the curves into this PNG")
    options = parser.parse_args()
    if options.table or options.picture:
        if options.picture:
            draw(load(options.out), options.picture)
        print(*table(load(options.out)), sep="\n")
        return
    silence()
    text = novels(options.data_dir)
    began = time.process_time()
    teacher = teacher_of(text, options.cache / "teacher.pt")
    if not any(cell["row"] == TEACHER for cell in load(options.out)):
        cell = {"row": TEACHER, "seed": TEACHER_SEED} | about(teacher, time.process_time() - began)
        save(options.out, [*load(options.out), cell])
    for seed, name in product(options.seeds, options.only or ROWS):
        if any((cell["row"], cell["seed"]) == (name, seed) for cell in load(options.out)):
            continue
        cell = measure(name, seed, text, teacher)
        save(options.out, [*load(options.out), cell])
        print(f"{name}, seed {seed}: {cell['curve'][-1][1]:.3f} ({cell['cpu_seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
