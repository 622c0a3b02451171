"""The tables of quantized.py in Markdown, from the cells that were run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from statistics import mean
from typing import Any

from int8_files import COLUMNS, columns

Cells = list[dict[str, Any]]


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    few = "" if len(values) == 3 else f", {len(values)} seed{'s' * (len(values) > 1)}"
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f}{few})"


def _table(title: str, cells: Cells, methods: Iterable[str]) -> Iterator[str]:
    yield f"\n### {title}\n"
    yield f"| | accuracy | {COLUMNS} |"
    yield "| --- | ---: | ---: | --- | ---: | ---: |"
    for method in methods:
        own = [cell for cell in cells if cell["method"] == method]
        if own:
            yield f"| {' | '.join([method, _spread([cell['accuracy'] for cell in own]), *columns(own)])} |"


def tables(cells: Cells, titles: Mapping[str, str], methods: Iterable[str]) -> str:
    """Return one table a task, in the order of `titles`, with the methods in theirs."""
    methods = list(methods)
    of = {task: [cell for cell in cells if cell["task"] == task] for task in titles}
    return "\n".join(line for task, own in of.items() if own for line in _table(titles[task], own, methods))
