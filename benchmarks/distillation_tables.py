"""The tables of distillation.py in Markdown, from the cells that were run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean, stdev
from typing import Any

Cells = list[dict[str, Any]]


def _rows(cells: Cells, task: str) -> dict[str, Cells]:
    found: dict[str, Cells] = {}
    for cell in cells:
        if cell["task"] == task:
            found.setdefault(cell["row"], []).append(cell)
    return found


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else f"{values[0]:.2f}"


def _gains(own: Cells, plain: Cells) -> tuple[float, float]:
    """Return the mean gain over the plain row of the same seed, and its standard error."""
    before = {cell["seed"]: cell["accuracy"] for cell in plain}
    gains = [cell["accuracy"] - before[cell["seed"]] for cell in own if cell["seed"] in before]
    return mean(gains), stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")


def _taught(title: str, rows: Mapping[str, Cells]) -> Iterator[str]:
    plain = rows["student alone"]
    teacher = {cell["seed"]: cell["teacher"] for cell in plain}
    gap = mean(teacher.values()) - mean(cell["accuracy"] for cell in plain)
    yield f"\n### {title}\n"
    yield "| | accuracy | gain (standard error) | of the gap | CPU s |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    yield f"| the teacher | {_spread(list(teacher.values()))} | | 100 % | |"
    for name, own in rows.items():
        gain, error = _gains(own, plain)
        seconds = mean(cell["cpu_seconds"] for cell in own)
        shown = f" ({error:.2f})" if len(own) > 1 else ""
        yield (
            f"| {name} | {_spread([cell['accuracy'] for cell in own])} | {gain:+.2f}{shown} | "
            f"{100 * gain / gap:.0f} % | {seconds:.0f} |"
        )


def _missing(rows: Mapping[str, Cells]) -> Iterator[str]:
    yield "\n### Without a digit\n"
    yield "| trained by | errors on 3s | after one bias is corrected | errors on all | after |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, own in rows.items():
        figures = [mean(cell[key][when] for cell in own) for key in ("errors_on_missing", "errors") for when in (0, 1)]
        yield f"| {name} | {' | '.join(f'{figure:.0f}' for figure in figures)} |"
    first = next(iter(rows.values()))[0]
    yield f"\nOf {first['missing']} test 3s and {first['tested']} test digits, mean of the seeds."


def _recovery(rows: Mapping[str, Cells]) -> Iterator[str]:
    yield "\n### After compression\n"
    yield "| | dense | task alone | taught by the dense net too | points recovered |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name in [name for name in rows if "," not in name]:
        both = [sorted(rows.get(row, []), key=lambda cell: cell["seed"]) for row in
                (name, f"{name}, taught by the dense net")]  # fmt: skip
        if not both[1]:
            continue
        dense = mean(cell["teacher"] for cell in both[0])
        alone, taught = ([cell["accuracy"] for cell in own] for own in both)
        lost = dense - mean(alone)
        yield (
            f"| {name} | {dense:.2f} | {_spread(alone)} | {_spread(taught)} | "
            f"{mean(taught) - mean(alone):+.2f} of {lost:.2f} |"
        )


def tables(cells: Cells, titles: Mapping[str, str]) -> str:
    """Return a table for each task that has cells."""
    lines: list[str] = []
    for task, title in titles.items():
        if rows := _rows(cells, task):
            lines += _taught(title, rows)
    for task, made in (("missing-digit", _missing), ("recovery", _recovery)):
        if rows := _rows(cells, task):
            lines += made(rows)
    return "\n".join(lines)
