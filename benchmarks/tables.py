"""The accuracy tables in Markdown, from the cells that were run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

Cells = list[dict[str, Any]]
HEAD = """# Accuracy at sparsity

Written by `python benchmarks/accuracy.py --table` from `results/accuracy.json`; how it was measured is in
[README.md](README.md#accuracy-at-sparsity). Percent of the test images, mean over seeds (lowest to highest); `-` was
not run, and a number of seeds is given where it is not 3.
"""


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.2f} (1 seed)"
    few = "" if len(values) == 3 else f", {len(values)} seeds"
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f}{few})"


def _row(cells: Cells, method: str, sparsities: list[float]) -> str:
    own = [cell for cell in cells if cell["method"] == method]
    columns = [_spread([cell["accuracy"] for cell in own if cell["sparsity"] == sparsity]) for sparsity in sparsities]
    return f"| {' | '.join([method, *columns])} |"


def _table(title: str, cells: Cells, methods: Iterable[str]) -> str:
    dense = [cell for cell in cells if cell["sparsity"] == 0.0]
    sparse = [cell for cell in cells if cell["sparsity"] > 0.0]
    sparsities = sorted({cell["sparsity"] for cell in sparse})
    run = [method for method in methods if any(cell["method"] == method for cell in sparse)]
    return "\n".join(
        [
            f"\n## {title}\n",
            f"Dense: {_spread([cell['dense_accuracy'] for cell in dense])} where all start, "
            f"{_spread([cell['accuracy'] for cell in dense])} trained on for as many steps as the others.\n",
            f"| {' | '.join(['method', *(f'{100 * sparsity:g} %' for sparsity in sparsities)])} |",
            f"| {' | '.join(['---', *('---:' for _ in sparsities)])} |",
            *(_row(sparse, method, sparsities) for method in run),
            "",
        ]
    )


def tables(cells: Cells, titles: Mapping[str, str], methods: Iterable[str]) -> str:
    """Return one table a task, in the order of `titles`, with the methods in theirs."""
    methods = list(methods)
    of = {task: [cell for cell in cells if cell["task"] == task] for task in titles}
    return HEAD + "".join(_table(titles[task], own, methods) for task, own in of.items() if own)
