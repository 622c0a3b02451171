"""The lines of the before-and-after table: each quantity of two measurements as text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_compress.measure.latency import Latency
from lightning_compress.measure.measurement import Measurement
from lightning_compress.measure.wording import (
    NOT_MEASURED,
    count,
    fraction,
    joules,
    percent,
    points,
    step,
    three_digits,
    times,
)

__all__ = ["Row", "changes_between", "markdown_table", "places", "rows_between", "text_table"]

_CELL = 24  # widest cell of the terminal's table; four of them fit into 100 columns


@dataclass(frozen=True)
class Row:
    """One line of the table, ready to print."""

    quantity: str
    before: str
    after: str
    change: str

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The four texts, from left to right."""
        return self.quantity, self.before, self.after, self.change


def places(before: Measurement, after: Measurement) -> list[str]:
    """Where accuracy was measured on either side, in the order it was given."""
    return list(dict.fromkeys([*before.accuracy, *after.accuracy]))


def changes_between(before: Measurement, after: Measurement) -> dict[str, Any]:
    """The numbers of the change column, None where a side is missing; `Report.changes` explains them."""
    return {
        "accuracy_points": {
            where: _points(before.accuracy.get(where), after.accuracy.get(where)) for where in places(before, after)
        },
        "size_ratio": _ratio(before.size_bytes, after.size_bytes),
        "zipped_ratio": _ratio(before.zipped_bytes, after.zipped_bytes),
        "nonzero_ratio": _ratio(before.nonzero, after.nonzero),
        "speedup": _speedup(before.latency, after.latency),
        "entropy_ratio": _ratio(before.entropy_bytes, after.entropy_bytes),
        "macs_ratio": _ratio(before.macs, after.macs),
        "effective_macs_ratio": _ratio(before.effective_macs, after.effective_macs),
        "peak_memory_ratio": _ratio(before.peak_memory_bytes, after.peak_memory_bytes),
        "energy_ratio": _ratio(before.energy_joules, after.energy_joules),
    }


def rows_between(before: Measurement, after: Measurement) -> list[Row]:
    """Every quantity as text; a value that was not measured says so.

    The rows of entropy, MACs, memory and energy are there only where a side has them: few runs measure all.
    """
    changes = changes_between(before, after)
    accuracy = [
        Row(f"accuracy ({where})", percent(before.accuracy.get(where)), percent(after.accuracy.get(where)), points(by))
        for where, by in changes["accuracy_points"].items()
    ]
    return [
        *(accuracy or [Row("accuracy", NOT_MEASURED, NOT_MEASURED, NOT_MEASURED)]),
        _count_row("file, bytes", before.size_bytes, after.size_bytes, "smaller", "larger"),
        _count_row("file zipped, bytes", before.zipped_bytes, after.zipped_bytes, "smaller", "larger"),
        *_if_measured("entropy bound, bytes", before.entropy_bytes, after.entropy_bytes, "smaller", "larger"),
        _count_row("non-zero weights", before.nonzero, after.nonzero, "fewer", "more"),
        _count_row("weights counted", before.total, after.total, "fewer", "more"),
        Row("sparsity", fraction(before.sparsity), fraction(after.sparsity), step(before.sparsity, after.sparsity)),
        *_if_measured("MACs", before.macs, after.macs, "fewer", "more"),
        *_if_measured("MACs without zeros", before.effective_macs, after.effective_macs, "fewer", "more"),
        *_latency_rows(before.latency, after.latency, changes["speedup"]),
        *_if_measured("peak memory, bytes", before.peak_memory_bytes, after.peak_memory_bytes, "smaller", "larger"),
        *_energy_rows(before.energy_joules, after.energy_joules),
    ]


def _points(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else 100.0 * (after - before)


def _ratio(before: float | None, after: float | None) -> float | None:
    return before / after if before and after else None


def _speedup(before: Latency | None, after: Latency | None) -> float | None:
    if before is None or after is None:
        return None
    if before.speedup is not None and after.speedup is not None:
        return after.speedup / before.speedup
    return before.median_ms / after.median_ms


def _count_row(what: str, before: float | None, after: float | None, less: str, more: str) -> Row:
    return Row(what, _whole(before), _whole(after), times(before, after, less, more))


def _whole(value: float | None) -> str:
    return count(None if value is None else round(value))


def _if_measured(what: str, before: float | None, after: float | None, less: str, more: str) -> list[Row]:
    return [] if before is None and after is None else [_count_row(what, before, after, less, more)]


def _energy_rows(before: float | None, after: float | None) -> list[Row]:
    if before is None and after is None:
        return []
    return [Row("energy", joules(before), joules(after), times(before, after, "less", "more"))]


def _latency_rows(before: Latency | None, after: Latency | None, speedup: float | None) -> list[Row]:
    change = NOT_MEASURED if speedup is None else times(speedup, 1.0, "faster", "slower")
    fair = "" if before is None or after is None or before.threads == after.threads else "not equal"
    return [
        Row("latency, median", _median(before), _median(after), change),
        Row("latency, p10 to p90", _spread(before), _spread(after), ""),
        Row("latency, threads", _threads(before), _threads(after), fair),
    ]


def _median(latency: Latency | None) -> str:
    return NOT_MEASURED if latency is None else f"{three_digits(latency.median_ms)} ms"


def _spread(latency: Latency | None) -> str:
    if latency is None:
        return NOT_MEASURED
    return f"{three_digits(latency.p10_ms)} to {three_digits(latency.p90_ms)} ms"


def _threads(latency: Latency | None) -> str:
    if latency is None:
        return NOT_MEASURED
    return "not stated" if latency.threads is None else str(latency.threads)


def markdown_table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table, the first row as its header; bars in cells are escaped."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |" for row in rows]
    return [lines[0], "| --- | ---: | ---: | ---: |", *lines[1:]]


def text_table(rows: Sequence[Row], details: Mapping[str, str] | Sequence[tuple[str, str]] = ()) -> str:
    """The rows, the first as header, and the details under them, aligned for a terminal of 80 to 100 columns."""
    cells = [[_wrapped(cell) for cell in row.cells] for row in rows]
    widths = [max(len(line) for row in cells for line in row[column]) for column in range(4)]
    table = [line for row in cells for line in _aligned(row, widths)]
    table.insert(max(len(cell) for cell in cells[0]), "-" * (sum(widths) + 6))
    pairs = details.items() if isinstance(details, Mapping) else details
    notes = [textwrap.fill(f"{name}: {text}", 80, subsequent_indent="  ") for name, text in pairs]
    return "\n".join([*table, *([""] if notes else []), *notes])


def _wrapped(cell: str) -> list[str]:
    return textwrap.wrap(cell, _CELL) or [""]


def _aligned(cells: list[list[str]], widths: list[int]) -> list[str]:
    """Lines of one row of the table: the first column to the left, numbers to the right."""
    lines = []
    for index in range(max(len(cell) for cell in cells)):
        parts = [cell[index] if index < len(cell) else "" for cell in cells]
        padded = [part.rjust(width) for part, width in zip(parts, widths, strict=True)]
        lines.append("  ".join([parts[0].ljust(widths[0]), *padded[1:]]).rstrip())
    return lines
