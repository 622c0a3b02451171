"""Pieces of an HTML page: every text escaped, pictures inside the page as data."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from lightning_compress.measure.rows import Row

__all__ = ["escaped", "figure", "image", "paragraph", "png", "section", "table", "table_of_rows"]

TALL = 30  # rows that a page holds without a scroll bar of their own
SHORT, LONG = 9, 24  # letters of a cell that stays in one line everywhere, and on a wide screen


def escaped(text: object) -> str:
    """Text that is shown as it is, whatever stands in it.

    >>> escaped('<script>"')
    '&lt;script&gt;&quot;'
    """
    return html.escape(str(text), quote=True)


def paragraph(text: object, kind: str = "") -> str:
    """A paragraph of escaped text, of a class of the style sheet."""
    return f'<p class="{kind}">{escaped(text)}</p>' if kind else f"<p>{escaped(text)}</p>"


def section(anchor: str, title: str, *parts: str) -> str:
    """A part of the page that the table of contents can lead to; `parts` are HTML."""
    return f'<section id="{anchor}">\n<h2>{escaped(title)}</h2>\n' + "\n".join(filter(None, parts)) + "\n</section>"


def figure(drawing: str, caption: str) -> str:
    """A chart, which is HTML, with its caption under it."""
    return f"<figure>{drawing}<figcaption>{escaped(caption)}</figcaption></figure>"


def table(header: Sequence[object], rows: Sequence[Sequence[object]], label: str) -> str:
    """A table that scrolls by itself where the screen is narrow; the first column names the row."""
    heads = "".join(_cell(cell, "th", ' scope="col"') for cell in header)
    lines = [
        "<tr>" + _cell(first, "th", ' scope="row"') + "".join(_cell(cell, "td") for cell in rest) + "</tr>"
        for first, *rest in rows
    ]
    kind = "scroll tall" if len(rows) > TALL else "scroll"
    return (
        f'<div class="{kind}" role="region" aria-label="{escaped(label)}" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def _cell(text: object, tag: str, more: str = "") -> str:
    """A cell; a long one is broken into lines, after dots if it can be, and a short one never is."""
    size = len(str(text))
    if size <= SHORT:
        return f'<{tag}{more} class="short">{escaped(text)}</{tag}>'
    if size <= LONG:
        return f"<{tag}{more}>{escaped(text)}</{tag}>"
    return f'<{tag}{more} class="long">{escaped(text).replace(".", ".<wbr>")}</{tag}>'


def table_of_rows(rows: Sequence[Row], label: str) -> str:
    """The before-and-after table; its first row is the header."""
    return table(rows[0].cells, [row.cells for row in rows[1:]], label)


def image(pixels: np.ndarray, alt: str) -> str:
    """A picture as an <img> that holds its own bytes.

    Args:
        pixels: (h, w, 3) uint8.
        alt: what it shows, for who cannot see it.
    """
    data = base64.b64encode(png(pixels)).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escaped(alt)}">'


def png(pixels: np.ndarray) -> bytes:
    r"""Encode (h, w, 3) uint8 as a PNG file (W3C, "Portable Network Graphics", 2003), without filters.

    >>> png(np.zeros((1, 1, 3), np.uint8))[:4]
    b'\x89PNG'
    """
    height, width, _ = pixels.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each line begins with its filter, 0 for none
    lines[:, 1:] = pixels.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    body = _chunk(b"IHDR", head) + _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
