"""Five ways to find a recipe, at equal numbers of trials, against one amount for all: `python benchmarks/search.py`.

    OMP_NUM_THREADS=1 python benchmarks/search.py                 # 20 trials, 3 seeds: about 35 minutes of one core
    python benchmarks/search.py --table
    python benchmarks/search.py --task text --trials 6 --seeds 0

A trial fine-tunes a dense model under a sparsity and a width for each group of layers, and writes its weights as a
zipped file, whose bytes count. Looked for is the smallest file that loses at most 2 points of accuracy on held-out
data; reported is its accuracy on test data. By hand: int8 and one sparsity for all, in each layer the same, or under
one threshold. Allocation measures each layer's loss first, solves for amounts under a budget of bytes, and bisects the
budget; trials that are left change its best recipe. Each trial is added to results/search.json, and what is there is
not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from cells import Cells, load, save
from int8 import processor
from search_tasks import TASKS, WIDTHS, Task

from lightning_compress.search.allocate import allocate, joint_amounts
from lightning_compress.search.found import Found
from lightning_compress.search.objective import Smallest
from lightning_compress.search.searching import Worker, search
from lightning_compress.search.sensitivity import measure_sensitivity
from lightning_compress.search.space import Recipe, Space, neighbour
from lightning_compress.search.strategies import Trial, annealing, bayes, evolution, random

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "search.json"
DROP = 0.02
TRIED = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98)  # sparsities of the sensitivities
BY_HAND = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
CLOSE = 1.02  # budgets nearer than this are not told apart
STRATEGIES = ("random", "annealing", "evolution", "bayes", "allocation")


def by_budget(tables: tuple[Any, Any], task: Task, space: Space, history: Sequence[Trial], generator: Any) -> Recipe:
    """Bisect the budget of the exact allocation; when it is known, change the best recipe."""
    harms, costs = tables
    low, high = (float(sum(ends(cost.values()) for cost in costs.values())) for ends in (min, max))
    for trial in history:
        predicted = float(sum(costs[n][(trial.recipe[f"sparsity.{n}"], trial.recipe[f"bits.{n}"])] for n in costs
                              if (trial.recipe[f"sparsity.{n}"], trial.recipe[f"bits.{n}"]) in costs[n]))  # fmt: skip
        if high / low < CLOSE:
            break
        low, high = (low, predicted) if trial.violation <= 0 else (max(low, middle(low, high)), high)
    if high / low >= CLOSE:
        return task.recipe(allocate(harms, costs, middle(low, high)).amounts)
    keeping = [trial for trial in history if trial.violation <= 0] or list(history)
    best = min(keeping, key=lambda trial: (trial.energy, trial.number))
    return neighbour(space, best.recipe, generator, changes=1.0)


def middle(low: float, high: float) -> float:
    return math.sqrt(low * high)


def tables_of(task: Task, seed: int, options: argparse.Namespace) -> tuple[Any, Any]:
    """Return harms and bytes of each pair of amounts, summed over the layers of each group."""
    layers = [layer for own in task.groups.values() for layer in own]
    path = options.cache / f"{options.task}-{seed}-sensitivity.jsonl"
    found = measure_sensitivity(
        task.dense, task.loss, TRIED, WIDTHS, path, layers=(layers, None), higher_is_better=False
    )
    if options.pictures:
        found.plot(options.cache / f"{options.task}-{seed}-sensitivity.png")
    harms, costs = joint_amounts(found.harms(), found.shapes)
    pairs = list(next(iter(harms.values())))
    groups = task.groups.items()
    return (
        {name: {pair: sum(harms[layer][pair] for layer in own) for pair in pairs} for name, own in groups},
        {name: {pair: sum(costs[layer][pair] for layer in own) for pair in pairs} for name, own in groups},
    )


def strategy(name: str, task: Task, seed: int, options: argparse.Namespace) -> Callable[..., Recipe]:
    if name == "allocation":
        return partial(by_budget, tables_of(task, seed, options), task)
    return {"random": random, "annealing": annealing, "evolution": evolution, "bayes": bayes}[name]


class Memory:
    """Trials that were run before, by seed and recipe, and those that are added to the file."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self.options, self.seed = options, seed

    def of(self, strategy: str, key: Mapping[str, Any], run: Callable[[], dict[str, float]]) -> dict[str, float]:
        cells = load(self.options.out)
        own = {"task": self.options.task, "seed": self.seed, "strategy": strategy, "recipe": dict(key)}
        for cell in cells:
            if all(cell[name] == value for name, value in own.items()):
                return dict(cell["result"])
        for cell in cells:  # the same recipe under another strategy gives the same, to the bit
            same = cell["task"] == own["task"] and cell["seed"] == self.seed and cell["recipe"] == own["recipe"]
            if same and cell["strategy"] in STRATEGIES and strategy in STRATEGIES:
                save(self.options.out, [*cells, {**own, "result": cell["result"], "as": cell["strategy"]}])
                return dict(cell["result"])
        started = time.process_time()
        result = run()
        seconds = round(time.process_time() - started, 1)
        save(self.options.out, [*cells, {**own, "result": result, "cpu_seconds": seconds, "machine": processor()}])
        print(f"{self.options.task} {self.seed} {strategy}: {result} ({seconds} s) {json.dumps(key)}", flush=True)
        return result


def searched(name: str, task: Task, seed: int, dense: float, options: argparse.Namespace) -> Found:
    memory = Memory(options, seed)
    return search(
        lambda recipe, report: memory.of(name, recipe, lambda: task.run(recipe)),
        task.space(),
        Smallest(keep="accuracy", drop=DROP, dense=dense),
        strategy(name, task, seed, options),
        options.trials,
        worker=Worker(seed=seed, catch=()),
    )


def by_hand(task: Task, seed: int, options: argparse.Namespace) -> None:
    memory = Memory(options, seed)
    for uniform in (True, False) if options.task == "images" else (True,):
        for sparsity in options.by_hand:
            how = "each layer" if uniform else "one threshold"
            memory.of(f"by hand, {how}", {"sparsity": sparsity, "bits": 8}, partial(task.by_hand, sparsity, uniform))


def dense_of(task: Task, seed: int, options: argparse.Namespace) -> float:
    def measured() -> dict[str, float]:
        held, test = task.accuracies(task.dense)
        return {"accuracy": held, "test": test}

    return Memory(options, seed).of("dense", {}, measured)["accuracy"]


def run_all(options: argparse.Namespace) -> None:
    for seed in options.seeds:
        task = TASKS[options.task](seed, options)
        dense = dense_of(task, seed, options)
        by_hand(task, seed, options)
        for name in options.only or STRATEGIES:
            found = searched(name, task, seed, dense, options)
            if options.pictures:
                found.plot(options.cache / f"{options.task}-{seed}-{name}.png")


# The table: what each strategy found within the first trials, from the file alone.


def interpolated(curve: Sequence[Mapping[str, float]], size: float) -> float:
    """Return the test accuracy of a curve of sparsities at a number of bytes, straight over log(bytes)."""
    points = sorted((math.log(result["size_bytes"]), result["test"]) for result in curve)
    return float(np.interp(math.log(size), *zip(*points, strict=True)))


def smallest(results: Sequence[Mapping[str, float]], dense: float) -> Mapping[str, float] | None:
    keeping = [result for result in results if result["accuracy"] >= dense - DROP - 1e-9]
    return min(keeping, key=lambda result: result["size_bytes"]) if keeping else None


def rows(cells: Cells, seeds: Sequence[int]) -> Iterator[str]:
    """Yield one row a strategy, means over the seeds and each seed's bytes."""
    yield (
        "| | smallest file within 2 points, bytes (each seed) | its test accuracy | each layer alike at these bytes | "
        "seeds with one |"
    )
    yield "| --- | ---: | ---: | ---: | ---: |"
    names = list(dict.fromkeys(cell["strategy"] for cell in cells if cell["strategy"] != "dense"))
    for name in names:
        found, alike = [], []
        for seed in seeds:
            of = {n: [c["result"] for c in cells if (c["strategy"], c["seed"]) == (n, seed)] for n in ("dense", name)}
            best = smallest(of[name], of["dense"][0]["accuracy"]) if of["dense"] and of[name] else None
            if best is not None:
                curve = [c["result"] for c in cells if (c["strategy"], c["seed"]) == ("by hand, each layer", seed)]
                found.append(best)
                alike.append(interpolated(curve, best["size_bytes"]))
        if not found:
            yield f"| {name} | none | | | 0 |"
            continue
        each = ", ".join(f"{result['size_bytes']:,.0f}" for result in found)
        size, test = mean(r["size_bytes"] for r in found), 100 * mean(r["test"] for r in found)
        yield f"| {name} | {size:,.0f} ({each}) | {test:.2f} % | {100 * mean(alike):.2f} % | {len(found)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="images")
    parser.add_argument("--only", nargs="+", choices=STRATEGIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--by-hand", nargs="*", type=float, default=BY_HAND, metavar="SPARSITY")
    parser.add_argument("--data-dir", default="/usr/share/datasets/fashion-mnist", help="Fashion-MNIST's IDX files")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "outputs" / "search", help="dense models, pictures")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pictures", action="store_true", help="draw sensitivities and fronts into the cache")
    parser.add_argument("--table", action="store_true", help="only print the table in Markdown")
    options = parser.parse_args()
    if not options.table:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")  # lightning's advice on workers, loggers and epochs
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        run_all(options)
    cells = [cell for cell in load(options.out) if cell["task"] == options.task]
    print(*rows(cells, options.seeds), sep="\n")


if __name__ == "__main__":
    main()
