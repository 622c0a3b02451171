"""Before and after, side by side: what was measured, how it changed, and nothing that was not measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_compress.measure.examples import Examples
from lightning_compress.measure.layers import LayerChange
from lightning_compress.measure.measurement import Measurement
from lightning_compress.measure.rows import Row, changes_between, markdown_table, places, rows_between, text_table
from lightning_compress.measure.sections import details_of, markdown_sections

if TYPE_CHECKING:
    from lightning_compress.measure.attributions import Attributions
    from lightning_compress.measure.differences import Differences

__all__ = ["Measurement", "Report", "Row", "compare"]

_SCHEMA = 2  # 1 had no entropy, MACs, memory, energy, layers, differences, history and explanations


@dataclass(frozen=True)
class Report:
    """Two measurements and where they were taken; made by `compare`, printed by `text`, kept by `save`.

    What `compare` was not given is empty or None, and no output speaks of it.
    """

    before: Measurement
    after: Measurement
    about: Mapping[str, str]
    layers: Sequence[LayerChange] = ()
    differences: Differences | None = None
    history: Sequence[tuple[int, float, float]] = ()
    explanations: Sequence[Attributions] = ()
    examples: Examples = field(default_factory=Examples)

    def changes(self) -> dict[str, Any]:
        """The numbers of the change column, None where a side is missing.

        `accuracy_points` by where it was run: after - before in percentage points. `*_ratio`: before / after,
        so 10 means ten times smaller. `speedup`: from the paired rounds where both latencies come from
        `compare_latency` (then let it be one comparison), else the ratio of the medians.
        """
        return changes_between(self.before, self.after)

    def places(self) -> list[str]:
        """Where accuracy was measured on either side, in the order it was given."""
        return places(self.before, self.after)

    def rows(self) -> list[Row]:
        """Every quantity as text; a value that was not measured says so."""
        return rows_between(self.before, self.after)

    def json(self) -> dict[str, Any]:
        """Everything but pictures as plain values, None where nothing was measured; `schema` is 2.

        Schema 2 has all keys of schema 1 with the same meaning. New are `entropy_bytes`, `macs`, `effective_macs`,
        `peak_memory_bytes` and `energy_joules` of both sides with their ratios among the changes, and `layers`,
        `differences`, `history` and `explanations`.
        """
        return {
            "schema": _SCHEMA,
            "about": dict(self.about),
            "before": asdict(self.before) | {"sparsity": self.before.sparsity},
            "after": asdict(self.after) | {"sparsity": self.after.sparsity},
            "changes": self.changes(),
            "layers": [layer.json() for layer in self.layers],
            "differences": None if self.differences is None else self.differences.json(),
            "history": [list(point) for point in self.history],
            "explanations": [each.json() for each in self.explanations],
        }

    def markdown(self) -> str:
        """The table, the notes, where it was measured, layers, classes and flipped examples, as Markdown."""
        lines = ["# Before and after compression", "", *markdown_table([self._header(), *self.rows()])]
        details = [f"- {name}: {text}" for name, text in details_of(self)]
        return "\n".join([*lines, "", *details, *markdown_sections(self)]).rstrip() + "\n"

    def text(self) -> str:
        """The table, the notes and where it was measured, aligned for a terminal of 80 to 100 columns."""
        return text_table([self._header(), *self.rows()], details_of(self))

    def html(self, others: Sequence[Report] = ()) -> str:
        """One page that needs no network and no script, with charts where matplotlib is installed.

        Args:
            others: more reports, whose models are points in the chart of accuracy against bytes.
        """
        from lightning_compress.measure.html_page import page  # templates and charts, for those who want the page

        return page(self, others)

    def save(self, folder: str | Path, others: Sequence[Report] = ()) -> dict[str, Path]:
        """Write `report.md`, `report.json` and `report.html` into `folder`; their paths by file name.

        Args:
            folder: made if needed.
            others: as in `html`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = json.dumps(self.json(), indent=2, allow_nan=False)
        texts = {"report.md": self.markdown(), "report.json": numbers, "report.html": self.html(others)}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        return {name: folder / name for name in texts}

    def _header(self) -> Row:
        return Row("", self.before.name, self.after.name, "change")


def compare(
    before: Measurement,
    after: Measurement,
    *,
    about: Mapping[str, str] | None = None,
    layers: Sequence[LayerChange] = (),
    differences: Differences | None = None,
    history: Sequence[tuple[int, float, float]] = (),
    explanations: Sequence[Attributions] = (),
    examples: Examples | None = None,
) -> Report:
    """Put two measurements side by side. Runs after training, on what was measured elsewhere.

    Args:
        before: The dense model.
        after: The compressed one.
        about: Where the figures come from: machine, threads, data, versions.
        layers: From `layer_changes`: zeros and bits of each weight.
        differences: From `compare_predictions`: which answers changed.
        history: (optimizer step, target sparsity, actual sparsity), as `GradualPruning.history`.
        explanations: From `compare_attributions`: what each model looked at.
        examples: Pictures or texts of the examples, for the HTML page.

    >>> report = compare(Measurement("dense", size_bytes=1200), Measurement("int8", size_bytes=100))
    >>> report.changes()["size_ratio"]
    12.0
    """
    shown = examples or Examples()
    return Report(
        before, after, dict(about or {}), tuple(layers), differences, tuple(history), tuple(explanations), shown
    )
