"""What a report says besides its table, in words and Markdown: layers, answers that changed, schedule, attributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_compress.measure.layers import LayerChange
from lightning_compress.measure.size import LayerRow
from lightning_compress.measure.wording import NOT_MEASURED, fraction, percent, points

if TYPE_CHECKING:
    from lightning_compress.measure.attributions import Attributions
    from lightning_compress.measure.differences import Differences, SliceRow
    from lightning_compress.measure.report import Report

__all__ = [
    "FLIPS_SHOWN",
    "FLIP_HEADER",
    "LAYER_HEADER",
    "SLICE_HEADER",
    "class_title",
    "details_of",
    "flip_cells",
    "layer_cells",
    "markdown_sections",
    "slice_cells",
]

FLIPS_SHOWN = 24

LAYER_HEADER = ("weight", "shape", "sparsity before", "sparsity after", "bits before", "bits after")
SLICE_HEADER = ("of", "examples", "accuracy before", "accuracy after", "change", "p value")
FLIP_HEADER = ("example", "label", "before", "after", "sure of it before", "sure of it after")


def details_of(report: Report) -> list[tuple[str, str]]:
    """Name and text of each line under the table: what the extra parts amount to, notes, and where it was measured."""
    lines = [(side.name, side.note) for side in (report.before, report.after) if side.note]
    if report.differences is not None:
        lines += _answers(report.differences, report)
    if report.history:
        step, target, actual = report.history[-1]
        lines.append(("schedule", f"sparsity {actual:.4f} of {target:.4f} asked, at optimizer step {step}"))
    lines += [("attributions", _attributions(each)) for each in report.explanations]
    return [*lines, *report.about.items()]


def _answers(found: Differences, report: Report) -> list[tuple[str, str]]:
    said = f"{percent(found.agreement)} of {found.count} examples keep their class, KL {found.kl_nats:.4g} nats"
    if found.right_to_wrong is not None and found.wrong_to_right is not None:
        said += f"; {found.right_to_wrong} right to wrong, {found.wrong_to_right} wrong to right"
    lines = [("answers", said)]
    worst = next((row for row in found.worst_slices(1) if row.delta is not None and row.delta < 0), None)
    if worst is not None and worst.delta is not None:
        name = class_title(worst.name, report)
        chance = f"p {worst.p_value:.2g} for one class looked at alone"
        lines.append(("worst hit", f"{name}, {points(100 * worst.delta)} of {worst.count} examples ({chance})"))
    return lines


def _attributions(each: Attributions) -> str:
    ranks, overlap = each.mean_rank_agreement(), each.mean_top_overlap()
    shown = [NOT_MEASURED if value is None else f"{value:.3f}" for value in (ranks, overlap)]
    return (
        f"{each.method}, rank agreement (Spearman) {shown[0]} and overlap of the top tenth {shown[1]}, "
        f"means of {len(each.dense)} examples"
    )


def class_title(name: str, report: Report) -> str:
    """Name of a class or slice; "class 3" has its own name where the report knows it."""
    word, _, number = name.partition(" ")
    names = report.examples.class_names
    return names[int(number)] if word == "class" and number.isdigit() and int(number) < len(names) else name


def layer_cells(layer: LayerChange) -> tuple[str, ...]:
    """One layer as texts, in the order of `LAYER_HEADER`."""
    sides = (layer.before, layer.after)
    shapes = list(dict.fromkeys(_shape(row) for row in sides if row is not None))
    sparsities = [fraction(None if row is None else row.sparsity) for row in sides]
    bits = [NOT_MEASURED if row is None else str(row.bits) for row in sides]
    return (layer.name, " to ".join(shapes), *sparsities, *bits)


def _shape(row: LayerRow) -> str:
    return " x ".join(map(str, row.shape)) or "scalar"


def slice_cells(row: SliceRow, report: Report) -> tuple[str, ...]:
    """One class or slice as texts, in the order of `SLICE_HEADER`."""
    change = NOT_MEASURED if row.delta is None else points(100 * row.delta)
    sides = (percent(row.accuracy_before), percent(row.accuracy_after))
    return (class_title(row.name, report), str(row.count), *sides, change, f"{row.p_value:.2g}")


def flip_cells(report: Report) -> list[tuple[str, ...]]:
    """The flips that are shown, as texts in the order of `FLIP_HEADER`; the surest answers that fell come first."""
    name, found = report.examples.class_name, report.differences
    return [
        (
            str(flip.index),
            name(flip.label),
            name(flip.before),
            name(flip.after),
            percent(flip.confidence_before),
            percent(flip.confidence_after),
        )
        for flip in (found.flips[:FLIPS_SHOWN] if found is not None else ())
    ]


def markdown_sections(report: Report) -> list[str]:
    """Lines of the tables of layers, classes, slices and flipped examples, where they were given."""
    found, lines = report.differences, list[str]()
    if report.layers:
        lines += _section("Layers", LAYER_HEADER, [layer_cells(layer) for layer in report.layers])
    if found is not None and (found.classes or found.slices):
        rows = [slice_cells(row, report) for row in (*found.classes, *found.slices)]
        lines += _section("Accuracy by class and slice", SLICE_HEADER, rows)
    if found is not None and found.flips:
        title = f"Flipped examples ({min(len(found.flips), FLIPS_SHOWN)} of {len(found.flips)})"
        lines += _section(title, FLIP_HEADER, flip_cells(report))
    return lines


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    table = [_line(header), "| --- |" + " ---: |" * (len(header) - 1), *map(_line, rows)]
    return ["", f"## {title}", "", *table]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
