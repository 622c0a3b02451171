"""The report as one HTML page: no script, no network, every text escaped, charts inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from lightning_compress.measure.html_charts import deltas_chart, layers_chart, schedule_chart, tradeoff_chart
from lightning_compress.measure.html_examples import attribution_example, flip_card
from lightning_compress.measure.html_parts import escaped, figure, paragraph, section, table, table_of_rows
from lightning_compress.measure.html_style import STYLE
from lightning_compress.measure.layers import grouped_layers
from lightning_compress.measure.measurement import Measurement
from lightning_compress.measure.rows import Row
from lightning_compress.measure.sections import (
    FLIP_HEADER,
    FLIPS_SHOWN,
    LAYER_HEADER,
    SLICE_HEADER,
    class_title,
    details_of,
    flip_cells,
    layer_cells,
    slice_cells,
)
from lightning_compress.measure.wording import NOT_MEASURED, count, percent

if TYPE_CHECKING:
    from lightning_compress.measure.differences import SliceRow
    from lightning_compress.measure.report import Report

__all__ = ["page"]

MOST_LAYERS = 60  # in a chart; more are grouped
LAYERS_A_CHART = 20
MOST_CLASSES = 40
# The browser itself then refuses to load or run anything, whatever a name or text may hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_Part = tuple[str, str, str]  # anchor, title, HTML


def page(report: Report, others: Sequence[Report] = ()) -> str:
    """Write the page of a report. Runs in `Report.save` and `Report.html`.

    Args:
        report: what `compare` made.
        others: more reports, whose models are points in the chart of accuracy against bytes.
    """
    title = f"{report.before.name} and {report.after.name}"
    parts = list(_parts(report, others))
    contents = "".join(f'<li><a href="#{anchor}">{escaped(name)}</a></li>' for anchor, name, _ in parts)
    sections = "\n".join(section(anchor, name, body) for anchor, name, body in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Compression report: {escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>Before and after compression: {escaped(title)}</h1>\n{_tiles(report.rows())}\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n{sections}\n</main>\n</body>\n</html>\n'
    )


def _parts(report: Report, others: Sequence[Report]) -> Iterator[_Part]:
    header = Row("", report.before.name, report.after.name, "change")
    yield "numbers", "Numbers", table_of_rows([header, *report.rows()], "Numbers")
    yield from _tradeoff(report, others)
    yield from _layers(report)
    yield from _schedule(report)
    yield from _answers(report)
    yield from _explanations(report)
    notes = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(text)}</dd>" for name, text in details_of(report))
    if notes:
        yield "about", "How it was measured", f"<dl>{notes}</dl>"


def _tiles(rows: Sequence[Row]) -> str:
    """The changes that were measured, in large letters."""
    shown = [row for row in rows if row.change not in ("", NOT_MEASURED, "same") and row.quantity != "weights counted"]
    tiles = [f"<li><b>{escaped(row.change)}</b><span>{escaped(row.quantity)}</span></li>" for row in shown]
    return f'<ul class="tiles">{"".join(tiles)}</ul>' if tiles else paragraph("No change was measured.", "faint")


def _drawn(draw: Callable[[], str], caption: str) -> str:
    """A chart in a figure, or where matplotlib is missing a line that says so."""
    try:
        return figure(draw(), caption)
    except ImportError as error:
        return paragraph(f"No chart of this here ({caption}) {error}", "faint")


def _key(report: Report) -> str:
    names = [f"<span>{escaped(side.name)}</span>" for side in (report.before, report.after)]
    return f'<div class="key">{"".join(names)}</div>'


def _tradeoff(report: Report, others: Sequence[Report]) -> Iterator[_Part]:
    """Accuracy against bytes of all models of which both were measured, a chart for each place it was run at."""
    sides: list[tuple[Measurement, str]] = []
    for each in (report, *others):
        # Reports of several recipes from one dense model hold it each: one point is enough.
        sides += [pair for pair in ((each.before, "before"), (each.after, "after")) if pair not in sides]
    for number, where in enumerate(dict.fromkeys(where for side, _ in sides for where in side.accuracy), 1):
        known = [(side, kind) for side, kind in sides if side.size_bytes is not None and where in side.accuracy]
        if known:
            yield f"tradeoff-{number}", f"Accuracy against bytes ({where})", _points(known, where)


def _points(known: Sequence[tuple[Measurement, str]], where: str) -> str:
    points = [(float(side.size_bytes or 0), side.accuracy[where], kind) for side, kind in known]
    rows = [
        (place, side.name, count(side.size_bytes), percent(side.accuracy[where]))
        for place, (side, _) in enumerate(known, 1)
    ]
    chart = _drawn(partial(tradeoff_chart, points), f"Accuracy ({where}) against bytes of the file.")
    names = table(("point", "model", "file, bytes", f"accuracy ({where})"), rows, "Points of the chart")
    return f'<div class="charts">{chart}<div>{names}</div></div>'


def _layers(report: Report) -> Iterator[_Part]:
    if not report.layers:
        return
    shown = grouped_layers(report.layers, MOST_LAYERS)
    pieces = [shown[start : start + LAYERS_A_CHART] for start in range(0, len(shown), LAYERS_A_CHART)]
    charts = [
        _drawn(partial(layers_chart, piece), f"Sparsity and bits, {_range(place, len(piece), len(shown))}.")
        for place, piece in enumerate(pieces)
    ]
    grouped = (
        ""
        if len(shown) == len(report.layers)
        else f"{len(report.layers)} weights, grouped by their names; bits are means."
    )
    yield (
        "layers",
        "Layers",
        "\n".join(
            [
                _key(report),
                paragraph(grouped, "faint") if grouped else "",
                f'<div class="charts">{"".join(charts)}</div>',
                table(LAYER_HEADER, [layer_cells(layer) for layer in report.layers], "Layers"),
            ]
        ),
    )


def _range(place: int, size: int, total: int) -> str:
    return f"{place * LAYERS_A_CHART + 1} to {place * LAYERS_A_CHART + size} of {total}"


def _schedule(report: Report) -> Iterator[_Part]:
    if report.history:
        caption = f"Sparsity asked for and reached, {len(report.history)} updates."
        yield "schedule", "Schedule against actual", _drawn(partial(schedule_chart, report.history), caption)


def _answers(report: Report) -> Iterator[_Part]:
    found = report.differences
    if found is None:
        return
    rows = [*found.classes, *found.slices]
    if rows:
        deltas, caption = _deltas(rows, report)
        chart = _drawn(partial(deltas_chart, deltas), caption)
        cells = table(SLICE_HEADER, [slice_cells(row, report) for row in rows], "Accuracy by class and slice")
        yield "classes", "Accuracy by class", chart + cells
    cards = "".join(flip_card(flip, report.examples) for flip in found.flips[:FLIPS_SHOWN])
    body = [paragraph(text) for name, text in details_of(report) if name == "answers"][:1]
    if found.flips:
        shown = f"{min(len(found.flips), FLIPS_SHOWN)} of {len(found.flips)}, the surest answers that were lost first."
        body += [paragraph(shown, "faint"), f'<ul class="cards">{cards}</ul>' if cards else ""]
        body += [table(FLIP_HEADER, flip_cells(report), "Flipped examples")]
    yield "flipped", "Flipped examples", "\n".join(filter(None, body))


def _deltas(rows: Sequence[SliceRow], report: Report) -> tuple[list[tuple[str, float]], str]:
    """Name and change of the classes that are drawn: all of them, or where there are many the two ends."""
    known = [(class_title(row.name, report), row.delta) for row in rows if row.delta is not None]
    caption = "Change of accuracy in percentage points."
    if len(known) <= MOST_CLASSES:
        return known, caption
    ordered = sorted(known, key=lambda pair: pair[1])
    half = MOST_CLASSES // 2
    return [*ordered[:half], *ordered[-half:]], f"{caption} The {half} worst and {half} best of {len(known)}."


def _explanations(report: Report) -> Iterator[_Part]:
    for number, each in enumerate(report.explanations, 1):
        examples = "".join(attribution_example(each, index, report) for index in range(len(each.dense)))
        note = (
            "Red spoke for the class, blue against it; each model on a scale of its own. Agreement is Spearman's rank "
            "correlation; overlap is of the tenth with the largest attributions."
        )
        said = [paragraph(text) for name, text in details_of(report) if name == "attributions"]
        body = "\n".join([said[number - 1], paragraph(note, "faint"), examples])
        yield f"attributions-{number}", f"Attributions {number}: {each.method.replace('_', ' ')}", body
