"""Before and after, side by side: what was measured, how it changed, and nothing that was not measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_compress.measure.latency import Latency
from lightning_compress.measure.wording import (
    NOT_MEASURED,
    count,
    fraction,
    percent,
    points,
    step,
    three_digits,
    times,
)

__all__ = ["Measurement", "Report", "Row", "compare"]

_SCHEMA = 1
_CELL = 24  # widest cell of the terminal's table; four of them fit into 100 columns


@dataclass(frozen=True)
class Measurement:
    """What is known about one model; None and missing keys mean that it was not measured.

    Args:
        name: What the columns and bars are called: "dense", "pruned int8".
        accuracy: Fraction in [0, 1] by where it was run, for example {"torch": 0.91, "onnx": 0.908}.
        size_bytes: Bytes of the file that ships.
        zipped_bytes: The same file in a zip archive.
        nonzero: Weights that are not zero, of `total`.
        total: Weights counted.
        latency: From `measure_latency`, or better for a ratio, `compare_latency`.
        note: What a reader must know to take the numbers rightly.

    Raises:
        ValueError: An accuracy outside [0, 1], a negative count, or more non-zero weights than weights.
    """

    name: str
    accuracy: Mapping[str, float] = field(default_factory=dict)
    size_bytes: int | None = None
    zipped_bytes: int | None = None
    nonzero: int | None = None
    total: int | None = None
    latency: Latency | None = None
    note: str = ""

    def __post_init__(self) -> None:
        for where, value in self.accuracy.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"an accuracy is a fraction in [0, 1], got {value} for '{where}' of '{self.name}'; "
                    "divide per cents by 100"
                )
        for what in ("size_bytes", "zipped_bytes", "nonzero", "total"):
            if (getattr(self, what) or 0) < 0:
                raise ValueError(f"{what} counts from 0, got {getattr(self, what)} for '{self.name}'")
        if self.nonzero is not None and self.total is not None and self.nonzero > self.total:
            raise ValueError(
                f"expected at most total={self.total} non-zero weights, got {self.nonzero} for "
                f"'{self.name}'; count both over the same parameters"
            )

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros among the counted weights, None where they were not counted."""
        return 1.0 - self.nonzero / self.total if self.nonzero is not None and self.total else None


@dataclass(frozen=True)
class Row:
    """One line of the table, ready to print."""

    quantity: str
    before: str
    after: str
    change: str


@dataclass(frozen=True)
class Report:
    """Two measurements and where they were taken; made by `compare`, printed by `text`, kept by `save`."""

    before: Measurement
    after: Measurement
    about: Mapping[str, str]

    def changes(self) -> dict[str, Any]:
        """The numbers of the change column, None where a side is missing.

        `accuracy_points` by where it was run: after - before in percentage points. `*_ratio`: before / after,
        so 10 means ten times smaller. `speedup`: from the paired rounds where both latencies come from
        `compare_latency` (then let it be one comparison), else the ratio of the medians.
        """
        before, after = self.before, self.after
        return {
            "accuracy_points": {where: self._points(where) for where in self.places()},
            "size_ratio": _ratio(before.size_bytes, after.size_bytes),
            "zipped_ratio": _ratio(before.zipped_bytes, after.zipped_bytes),
            "nonzero_ratio": _ratio(before.nonzero, after.nonzero),
            "speedup": _speedup(before.latency, after.latency),
        }

    def places(self) -> list[str]:
        """Where accuracy was measured on either side, in the order it was given."""
        return list(dict.fromkeys([*self.before.accuracy, *self.after.accuracy]))

    def _points(self, where: str) -> float | None:
        sides = (self.before.accuracy.get(where), self.after.accuracy.get(where))
        return None if sides[0] is None or sides[1] is None else 100.0 * (sides[1] - sides[0])

    def rows(self) -> list[Row]:
        """Every quantity as text; a value that was not measured says so."""
        before, after, changes = self.before, self.after, self.changes()
        right = [
            Row(
                f"accuracy ({where})",
                percent(before.accuracy.get(where)),
                percent(after.accuracy.get(where)),
                points(change),
            )
            for where, change in changes["accuracy_points"].items()
        ]
        return [
            *(right or [Row("accuracy", NOT_MEASURED, NOT_MEASURED, NOT_MEASURED)]),
            _count_row("file, bytes", before.size_bytes, after.size_bytes, "smaller", "larger"),
            _count_row("file zipped, bytes", before.zipped_bytes, after.zipped_bytes, "smaller", "larger"),
            _count_row("non-zero weights", before.nonzero, after.nonzero, "fewer", "more"),
            _count_row("weights counted", before.total, after.total, "fewer", "more"),
            _sparsity_row(before.sparsity, after.sparsity),
            *_latency_rows(before.latency, after.latency, changes["speedup"]),
        ]

    def json(self) -> dict[str, Any]:
        """Everything as plain values, None where nothing was measured; `schema` is 1."""
        return {
            "schema": _SCHEMA,
            "about": dict(self.about),
            "before": asdict(self.before) | {"sparsity": self.before.sparsity},
            "after": asdict(self.after) | {"sparsity": self.after.sparsity},
            "changes": self.changes(),
        }

    def markdown(self) -> str:
        """The table, the notes and where it was measured, as Markdown."""
        header = Row("", self.before.name, self.after.name, "change")
        lines = ["# Before and after compression", "", _markdown_row(header), "| --- | ---: | ---: | ---: |"]
        lines += [_markdown_row(row) for row in self.rows()]
        details = [f"- {name}: {text}" for name, text in self._details()]
        return "\n".join([*lines, "", *details]).rstrip() + "\n"

    def text(self) -> str:
        """The table, the notes and where it was measured, aligned for a terminal of 80 to 100 columns."""
        rows = [Row("", self.before.name, self.after.name, "change"), *self.rows()]
        cells = [[_wrapped(cell) for cell in _cells(row)] for row in rows]
        widths = [max(len(line) for row in cells for line in row[column]) for column in range(4)]
        table = [line for row in cells for line in _aligned(row, widths)]
        table.insert(max(len(cell) for cell in cells[0]), "-" * (sum(widths) + 6))
        details = [textwrap.fill(f"{name}: {text}", 80, subsequent_indent="  ") for name, text in self._details()]
        return "\n".join([*table, *([""] if details else []), *details])

    def _details(self) -> list[tuple[str, str]]:
        notes = [(side.name, side.note) for side in (self.before, self.after) if side.note]
        return [*notes, *self.about.items()]

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write `report.md` and `report.json` into `folder`, made if needed; their paths by file name."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = json.dumps(self.json(), indent=2, allow_nan=False)
        texts = {"report.md": self.markdown(), "report.json": numbers}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return {name: folder / name for name in texts}


def compare(before: Measurement, after: Measurement, *, about: Mapping[str, str] | None = None) -> Report:
    """Put two measurements side by side; `about` says where they come from: machine, threads, data, versions.

    >>> report = compare(Measurement("dense", size_bytes=1200), Measurement("int8", size_bytes=100))
    >>> report.changes()["size_ratio"]
    12.0
    """
    return Report(before, after, dict(about or {}))


def _ratio(before: int | None, after: int | None) -> float | None:
    return before / after if before and after else None


def _speedup(before: Latency | None, after: Latency | None) -> float | None:
    if before is None or after is None:
        return None
    if before.speedup is not None and after.speedup is not None:
        return after.speedup / before.speedup
    return before.median_ms / after.median_ms


def _count_row(what: str, before: int | None, after: int | None, less: str, more: str) -> Row:
    return Row(what, count(before), count(after), times(before, after, less, more))


def _sparsity_row(before: float | None, after: float | None) -> Row:
    return Row("sparsity", fraction(before), fraction(after), step(before, after))


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


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.quantity, row.before, row.after, row.change


def _markdown_row(row: Row) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |"


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
