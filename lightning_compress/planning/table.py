"""The plan as it is read: one row a layer, one line a callback, expected sizes, and what deserves a second look."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_compress.measure.wording import count, three_digits, times

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Expected", "LayerPlan", "Plan", "Stage"]

_WIDTH = 100
_BLOCKS = " ▁▂▃▄▅▆▇█"
_REST_FROM = 40  # rows; more layers than these are told apart by name only on request


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one weight.

    Args:
        name: of the layer, as the module names it.
        kind: its class.
        weights: how many numbers its weight has.
        sparsity: expected fraction of zeros in it; None where it is not pruned.
        bits: width of its weight's codes; None where it stays in floating point.
        channels: outputs before and after, where channels leave; None elsewhere.
        dense_because: why it is not pruned; "" where it is, or where no callback prunes.
        float_because: why it is not rounded.
        macs: multiply-accumulates of one example as it is now; None without an example.
        macs_left: of these, those with a weight that is not zero at the end.
    """

    name: str
    kind: str
    weights: int
    sparsity: float | None = None
    bits: int | None = None
    channels: tuple[int, int] | None = None
    dense_because: str = ""
    float_because: str = ""
    macs: float | None = None
    macs_left: float | None = None


@dataclass(frozen=True)
class Stage:
    """What one callback does when.

    Args:
        callback: its class.
        does: one sentence.
        moments: named moments of the run: fractions, or optimizer steps where the run's length is known.
        curve: value at 21 evenly spaced moments of the run; empty where nothing moves.
    """

    callback: str
    does: str
    moments: tuple[tuple[str, float], ...] = ()
    curve: tuple[float, ...] = ()


@dataclass(frozen=True)
class Expected:
    """One quantity of the whole module, now and at the end; `how` says what the second number rests on."""

    quantity: str
    before: float
    after: float
    how: str


@dataclass(frozen=True)
class Plan:
    """What `plan` found; print it, `save` it, or look at its parts.

    Args:
        layers: one for each weight, in registration order.
        stages: one for each callback, in the Trainer's order.
        expected: sizes now and at the end.
        warnings: what is allowed and may not be meant.
        steps: optimizer steps of the run; None where the length is unknown.
    """

    layers: tuple[LayerPlan, ...]
    stages: tuple[Stage, ...]
    expected: tuple[Expected, ...]
    warnings: tuple[str, ...] = ()
    steps: int | None = None

    def __str__(self) -> str:
        """The same as `text()`."""
        return self.text()

    def expects(self, quantity: str) -> float:
        """Return the expected value at the end of one quantity, such as "int8 ONNX file, bytes".

        Raises:
            ValueError: no such quantity; the message has those that there are.
        """
        found = {each.quantity: each.after for each in self.expected}
        if quantity not in found:
            raise ValueError(f"expected one of {', '.join(map(repr, found))}, got {quantity!r}")
        return found[quantity]

    def text(self, every_layer: bool = False) -> str:
        """Everything as text for a terminal of 100 columns; layers with the same fate are one row beyond 40 rows."""
        parts = [_table(self._layer_cells(every_layer)), "\n".join(self._stage_lines())]
        if self.expected:
            parts.append(_table(self._expected_cells()))
        parts += [textwrap.fill(f"! {warning}", _WIDTH, subsequent_indent="  ") for warning in self.warnings]
        return "\n\n".join(part for part in parts if part)

    def markdown(self) -> str:
        """The three tables and the warnings as Markdown."""
        stages = [["callback", "what", "when"], *([s.callback, s.does, self._when(s)] for s in self.stages)]
        tables = [_markdown(self._layer_cells(every_layer=True)), _markdown(stages), _markdown(self._expected_cells())]
        return "\n\n".join(["# Plan", *tables, *(f"- {warning}" for warning in self.warnings)]) + "\n"

    def json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def save(self, folder: str | Path) -> dict[str, Path]:
        """Write `plan.md` and `plan.json` into `folder`, made if needed; their paths by file name."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"plan.md": self.markdown(), "plan.json": json.dumps(self.json(), indent=2, allow_nan=False)}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return {name: folder / name for name in texts}

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw each callback's curve over the run. See `measure.chart.plot_stages`."""
        from lightning_compress.planning.drawing import plot_stages

        return plot_stages(self, path)

    def _layer_cells(self, every_layer: bool) -> list[list[str]]:
        columns = _columns(self.layers)
        rows = [[value(layer) for _, value in columns] for layer in self.layers]
        if len(rows) > _REST_FROM and not every_layer:
            rows = _gathered(self.layers, rows)
        return [[title for title, _ in columns], *rows]

    def _stage_lines(self) -> list[str]:
        width = max((len(stage.callback) for stage in self.stages), default=0)
        lines = []
        for stage in self.stages:
            drawn = f"  {sparkline(stage.curve)}" if stage.curve else ""
            when = self._when(stage)
            lines.append(f"{stage.callback.ljust(width)}{drawn}".rstrip())
            said = f"{stage.does}{'; ' if when else ''}{when}"
            lines.append(textwrap.fill(said, _WIDTH, initial_indent="    ", subsequent_indent="    "))
        return lines

    def _when(self, stage: Stage) -> str:
        if not stage.moments:
            return ""
        written = " ".join(f"{name} {_moment(at)}" for name, at in stage.moments)
        return f"{written} of {count(self.steps)} steps" if self.steps else f"{written} of the run"

    def _expected_cells(self) -> list[list[str]]:
        rows = [["", "now", "expected", "change", "how"]]
        for each in self.expected:
            change = times(each.before, each.after, "smaller", "larger")
            rows.append([each.quantity, _number(each.before), _number(each.after), change, each.how])
        return rows


def sparkline(values: Sequence[float]) -> str:
    """Draw values as a line of blocks; the highest value, or 1 where that is higher, is a full one.

    >>> sparkline([0.0, 0.5, 1.0])
    ' ▄█'
    """
    top = max(1.0, *values)
    return "".join(_BLOCKS[round(max(0.0, value) / top * (len(_BLOCKS) - 1))] for value in values)


def _columns(layers: Sequence[LayerPlan]) -> list[tuple[str, Any]]:
    columns: list[tuple[str, Any]] = [
        ("layer", lambda row: row.name),
        ("kind", lambda row: row.kind),
        ("weights", lambda row: count(row.weights)),
    ]
    if any(row.sparsity is not None or row.dense_because for row in layers):
        columns.append(
            ("pruned", lambda row: _or_reason(row.sparsity, lambda s: f"{100 * s:.1f} %", row.dense_because))
        )
    if any(row.channels for row in layers):
        columns.append(("channels", lambda row: f"{row.channels[0]} -> {row.channels[1]}" if row.channels else ""))
    if any(row.bits is not None or row.float_because for row in layers):
        columns.append(("rounded", lambda row: _or_reason(row.bits, lambda b: f"{b} bits", row.float_because)))
    if any(row.macs for row in layers):
        columns.append(("MACs", lambda row: count(round(row.macs or 0))))
    return columns


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.1f} %"


def _or_reason(value: Any, written: Any, reason: str) -> str:
    if value is not None:
        return str(written(value))
    return f"no: {reason}" if reason else ""


def _gathered(layers: Sequence[LayerPlan], rows: list[list[str]]) -> list[list[str]]:
    """One row for layers of one kind with the same fate and nearly the same sparsity, in the order of the first."""
    found: dict[tuple[object, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        band = None if layer.sparsity is None else round(layer.sparsity, 1)
        fate = (layer.kind, band, layer.dense_because, layer.bits, layer.float_because, layer.channels is None)
        found.setdefault(fate, []).append(index)
    gathered = []
    for indices in found.values():
        row = list(rows[indices[0]])
        if len(indices) > 1:
            members = [layers[index] for index in indices]
            row[0] = f"{row[0]} and {len(indices) - 1} more"
            row[2] = count(sum(layer.weights for layer in members))
            pruned = [layer.sparsity for layer in members if layer.sparsity is not None]
            if pruned:
                row[3] = f"{100 * min(pruned):.1f} to {100 * max(pruned):.1f} %"
            if members[0].macs is not None and rows[0] and len(row) > 3 and any(layer.macs for layer in layers):
                row[-1] = count(round(sum(layer.macs or 0 for layer in members)))
        gathered.append(row)
    return gathered


def _number(value: float) -> str:
    return count(int(value)) if float(value).is_integer() or value > 1e4 else three_digits(value)


def _moment(at: float) -> str:
    return f"step {at:,}" if isinstance(at, int) else f"{at:.4g}"


def _table(cells: list[list[str]]) -> str:
    if len(cells) < 2:
        return ""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    numeric = [all(row[c][:1].isdigit() or not row[c] for row in cells[1:]) for c in range(len(widths))]
    lines = [
        "  ".join(
            cell.rjust(w) if n else cell.ljust(w) for cell, w, n in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _markdown(cells: list[list[str]]) -> str:
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
