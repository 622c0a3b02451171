"""The tables of quantized.py in Markdown, from the cells that were run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from statistics import mean
from typing import Any

Cells = list[dict[str, Any]]


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    few = "" if len(values) == 3 else f", {len(values)} seed{'s' * (len(values) > 1)}"
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f}{few})"


def _file(cells: Cells) -> Iterator[str]:
    files = [cell["file"] for cell in cells if "file" in cell]
    if not files:
        yield from ("-", "-", "-", "-")
        return
    integers = files[0]["kernels"]
    floats = len(files[0]["float_kernels"])
    yield f"{100 * min(each['agreement'] for each in files):.2f}"
    yield f"{', '.join(f'{count} {name}' for name, count in integers.items())}; {floats} float"
    yield f"{mean(each['file_bytes']['int8'] / each['file_bytes']['float32'] for each in files):.3f}"
    yield f"{mean(each['speedup']['median'] for each in files):.2f}"


def _table(title: str, cells: Cells, methods: Iterable[str]) -> Iterator[str]:
    yield f"\n### {title}\n"
    yield "| | accuracy | file agrees, % (worst seed) | integer kernels | file bytes | faster |"
    yield "| --- | ---: | ---: | --- | ---: | ---: |"
    for method in methods:
        own = [cell for cell in cells if cell["method"] == method]
        if own:
            yield f"| {' | '.join([method, _spread([cell['accuracy'] for cell in own]), *_file(own)])} |"


def tables(cells: Cells, titles: Mapping[str, str], methods: Iterable[str]) -> str:
    """Return one table a task, in the order of `titles`, with the methods in theirs."""
    methods = list(methods)
    of = {task: [cell for cell in cells if cell["task"] == task] for task in titles}
    return "\n".join(line for task, own in of.items() if own for line in _table(titles[task], own, methods))
