"""The report's table in a terminal, with rich where it is installed."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, TextIO

from lightning_compress.measure.rows import Row, text_table
from lightning_compress.measure.sections import details_of

if TYPE_CHECKING:
    from lightning_compress.measure.report import Report

__all__ = ["show"]


def show(report: Report, stream: TextIO) -> None:
    """Write the table and its notes: through rich to a terminal, as plain text to a file or without rich.

    Args:
        report: what `compare` made.
        stream: where to, for example `sys.stdout`.
    """
    header = Row("", report.before.name, report.after.name, "change")
    if not stream.isatty() or importlib.util.find_spec("rich") is None:
        stream.write(text_table([header, *report.rows()], details_of(report)) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    for place, cell in enumerate(header.cells):
        table.add_column(Text(cell), justify="right" if place else "left")
    for row in report.rows():
        table.add_row(*(Text(cell) for cell in row.cells))  # Text: brackets in a name are no markup
    console = Console(file=stream)
    console.print(table)
    for name, text in details_of(report):
        console.print(Text.assemble((name, "bold"), ": ", text))
