"""Layers made two of low rank while they are fine-tuned: `python benchmarks/low_rank.py`, then `--table`.

text: MiniLM on film reviews; model, data and split are minilm_quantized.py's, the encoder's 36 Linear layers become
two. images: ResNet-20 on Fashion-MNIST, all its Conv layers but the head. A dense net is trained first; each row trains
it on for as many steps, the same batches for all, and acts after the eighth. Accuracy is of 1000 sentences or 10000
images. Latency, and the time of a training step, are CPU time against the dense net, in turn on one thread in eager
PyTorch.

Results are added to results/low_rank.json, and what is there already is not run again.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as L
import torch
from accuracy import accuracy
from cells import Cells, load, save
from images import DATA_DIR, Data, batches, fashion_mnist
from int8 import cpu_times, processor, spread
from minilm import LATER, reviews, silence
from minilm_quantized import DENSE_STEPS, LEARNING_RATE, fit, predicted, tokens
from minilm_quantized import kept as kept_text
from networks import Tuned, resnet20
from torch import Tensor, nn
from torch.nn import functional
from training import kept, quiet_trainer

from lightning_compress import Distillation, LowRank
from lightning_compress.factorization.ranks import Budget
from lightning_compress.factorization.svd import activation_weighted_svd, fisher_weighted_svd, svd
from lightning_compress.measure.flops import count_macs

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "low_rank.json"
AT, RUNS = 8, 40
TEXT_STEPS, IMAGE_STEPS, IMAGE_DENSE_STEPS = 125, 500, 3000
IMAGE_RATE = 3e-3
KINDS = {"plain": svd, "by inputs": activation_weighted_svd, "by gradients": fisher_weighted_svd}
DENSE = "dense, trained on"


@dataclass(frozen=True)
class Row:
    """How much of the selected weights goes, by which decomposition, and whether the dense net teaches."""

    amount: float = 0.0
    kind: str = "plain"
    taught: bool = False

    def callbacks(self, dense: nn.Module, include: list[str] | None) -> list[L.Callback]:
        acting = LowRank(Budget(self.amount), AT, KINDS[self.kind], AT, include) if self.amount else None
        teaching = Distillation(copy.deepcopy(dense), 0.5, 2.0) if self.taught else None
        return [each for each in (acting, teaching) if each is not None]


def name_of(row: Row) -> str:
    if not row.amount:
        return DENSE + (", taught" if row.taught else "")
    return f"{row.amount:.0%} gone, {row.kind}" + (", taught" if row.taught else "")


COMPARED = [Row(0.5, kind, taught) for kind in ("plain", "by inputs") for taught in (False, True)]
MORE = [Row(0.5, "by gradients"), Row(0.7, "plain"), Row(0.7, "by inputs"), Row(0.7, "by inputs", True)]
ROWS = {name_of(row): row for row in (Row(), *COMPARED, *MORE)}


# Text


def text(row: Row, seed: int, options: argparse.Namespace) -> tuple[nn.Module, nn.Module, float, Any]:
    data = reviews(seed)
    dense = kept_text(options.cache / f"text-{seed}.pt", seed, data, DENSE_STEPS, None)
    model = copy.deepcopy(dense)
    model.hparams.learning_rate = LEARNING_RATE / 2
    fit(model, data, TEXT_STEPS, seed + LATER, row.callbacks(dense, ["encoder.encoder"]))
    test = list(data.test_dataloader())
    right = predicted(model, test) == torch.cat([batch["label"] for batch in test])
    return dense, model, 100 * float(right.float().mean()), tokens(test[0])


def one_text(inputs: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    return {name: value[:size] for name, value in inputs.items()}


# Images


def train_images(
    net: nn.Module, data: Data, steps: int, seed: int, rate: float, callbacks: list[L.Callback]
) -> nn.Module:
    module = Tuned(copy.deepcopy(net), rate)
    L.seed_everything(seed, verbose=False)
    quiet_trainer(callbacks, max_steps=steps).fit(module, batches(data, seed))
    return module.net.eval()


def images(row: Row, seed: int, options: argparse.Namespace) -> tuple[nn.Module, nn.Module, float, Any]:
    data = fashion_mnist(options.data_dir)
    torch.manual_seed(seed)
    path = options.cache / f"images-{seed}.pt"
    first = lambda net: train_images(net, data, IMAGE_DENSE_STEPS, seed, IMAGE_RATE, [])  # noqa: E731
    dense = kept(path, resnet20(), first)
    callbacks = row.callbacks(dense, None)
    model = train_images(dense, data, IMAGE_STEPS, seed + LATER, IMAGE_RATE / 3, callbacks)
    return dense, model, accuracy(model, data), {"input": data.test.tensors[0][:32]}


# Both

TASKS: dict[str, Callable[..., tuple[nn.Module, nn.Module, float, Any]]] = {"text": text, "images": images}


def called(net: nn.Module, inputs: dict[str, Tensor], size: int) -> Callable[[], Any]:
    own = one_text(inputs, size)
    return (lambda: net(own["input"])) if "input" in own else (lambda: net(**own))


def step_of(net: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """A training step on 32 examples, with Adam."""
    own = copy.deepcopy(net).train()
    optimizer = torch.optim.Adam(own.parameters(), 1e-5)
    forward = called(own, inputs, 32)

    def step() -> None:
        optimizer.zero_grad()
        outputs = forward()
        functional.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.long)).backward()
        optimizer.step()

    return step


def speed(dense: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Against the dense net, run by run: the median of the ratios, and quartiles."""
    found = {}
    with torch.no_grad():
        for size in (1, 32):
            times = cpu_times({"dense": called(dense, inputs, size), "two": called(model, inputs, size)}, RUNS, 1)
            found[f"latency_{size}"] = spread(times["two"] / times["dense"])
    times = cpu_times({"dense": step_of(dense, inputs), "two": step_of(model, inputs)}, RUNS // 2, 0)
    return {**found, "step": spread(times["two"] / times["dense"])}


def macs(net: nn.Module, inputs: dict[str, Tensor]) -> int:
    own = one_text(inputs, 1)
    return count_macs(net, (own["input"],), {}) if "input" in own else count_macs(net, (), own)


def measure(task: str, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    began = time.process_time()
    dense, model, right, inputs = TASKS[task](ROWS[name], seed, options)
    seconds = round(time.process_time() - began)
    cell = {"task": task, "row": name, "seed": seed, "accuracy": round(right, 2), "machine": processor()}
    size = {each: sum(p.numel() for p in net.parameters()) for each, net in (("dense", dense), ("two", model))}
    work = {"parameters": size["two"], "parameters_dense": size["dense"]}
    work |= {"macs": macs(model, inputs), "macs_dense": macs(dense, inputs), "cpu_seconds": seconds}
    return cell | work | (speed(dense, model, inputs) if seed == 0 and name != DENSE else {})


def table(cells: Cells, task: str) -> Iterator[str]:
    """Yield one task's table in Markdown; ratios are against the dense net."""
    yield "| | accuracy, mean (each seed) | MACs | parameters | latency of 1 | of 32 | training step |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for name in ROWS:
        own = [cell for cell in cells if (cell["task"], cell["row"]) == (task, name)]
        if not own:
            continue
        shares = [mean(cell[what] / cell[f"{what}_dense"] for cell in own) for what in ("macs", "parameters")]
        timed = next((cell for cell in own if "step" in cell), None)
        speeds = [f"{timed[what]['median']:.2f}" if timed else "" for what in ("latency_1", "latency_32", "step")]
        each = ", ".join(f"{cell['accuracy']:.1f}" for cell in own)
        accuracy = f"{mean(cell['accuracy'] for cell in own):.1f} ({each})"
        yield f"| {name} | {accuracy} | {' | '.join([*(f'{share:.2f}' for share in shares), *speeds])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help="some rows alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data-dir", default=DATA_DIR, help="Fashion-MNIST's IDX files")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "low_rank", help="for the dense nets")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print the tables in Markdown")
    options = parser.parse_args()
    if not options.table:
        silence()
        for seed in options.seeds:
            for task in options.task:
                for name in options.only or ROWS:
                    key = (task, name, seed)
                    if any((cell["task"], cell["row"], cell["seed"]) == key for cell in load(options.out)):
                        continue
                    cell = measure(task, name, seed, options)
                    save(options.out, [*load(options.out), cell])
                    print(f"{task}, {name}, seed {seed}: {cell['accuracy']:.1f} ({cell['cpu_seconds']} s)", flush=True)
    for task in options.task:
        print(f"\n{task}\n", *table(load(options.out), task), sep="\n")


if __name__ == "__main__":
    main()
