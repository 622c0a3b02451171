"""Single examples on the HTML page: cards of flipped answers, and attributions as pictures or strips of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_compress.measure.examples import Examples, as_picture
from lightning_compress.measure.html_parts import escaped, image
from lightning_compress.measure.wording import percent

if TYPE_CHECKING:
    from lightning_compress.measure.attributions import Attributions
    from lightning_compress.measure.differences import Flip
    from lightning_compress.measure.report import Report

__all__ = ["attribution_example", "flip_card", "heat_colors"]

MOST_WORDS = 128


def flip_card(flip: Flip, examples: Examples) -> str:
    """A flipped example with its picture or text; empty where the report has neither."""
    picture, text, name = examples.picture(flip.index), examples.text(flip.index), examples.class_name
    if picture is None and not text:
        return ""
    said = [
        f"example {flip.index}" + ("" if flip.label is None else f", label {name(flip.label)}"),
        f"before: {name(flip.before)} ({percent(flip.confidence_before)})",
        f"after: {name(flip.after)} ({percent(flip.confidence_after)} left for {name(flip.before)})",
    ]
    shown = image(picture, f"example {flip.index}") if picture is not None else f"<p>{escaped(text)}</p>"
    return f"<li>{shown}" + "".join(f"<div>{escaped(line).replace(' %', '&nbsp;%')}</div>" for line in said) + "</li>"


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Return (..., 3) uint8 colours of signed values: white for 0, red above and blue below, full at the largest size.

    >>> heat_colors(np.array([0.0, 2.0, -2.0])).tolist()
    [[255, 255, 255], [214, 45, 32], [33, 102, 204]]
    """
    values = np.nan_to_num(np.asarray(values, np.float64))
    scale = np.abs(values).max(initial=0.0) or 1.0
    strength = (np.abs(values) / scale)[..., None]
    full = np.where(values[..., None] >= 0, (214.0, 45.0, 32.0), (33.0, 102.0, 204.0))
    colors: np.ndarray = (255.0 + strength * (full - 255.0)).round().astype(np.uint8)
    return colors


def attribution_example(each: Attributions, index: int, report: Report) -> str:
    """One example's attributions in both models side by side, with their agreement as numbers."""
    ranks, overlap = each.rank_agreement()[index], each.top_overlap()[index]
    agreement = "without a value, for one side is constant" if math.isnan(ranks) else f"{ranks:.3f}"
    target = report.examples.class_name(int(each.targets[index]))
    title = f"Example {index + 1}: class {target}; rank agreement {agreement}, overlap {overlap:.2f}"
    names = (report.before.name, report.after.name)
    sides = [np.asarray(side[index].float().cpu()) for side in (each.dense, each.compressed)]
    shown = _pictures(each.inputs[index], sides, names) if sides[0].ndim >= 2 else _strips(each, index, sides, names)
    return f'<div class="example"><h3>{escaped(title)}</h3>{shown}</div>'


def _pictures(inputs: Any, sides: Sequence[np.ndarray], names: Sequence[str]) -> str:
    images = {"input": as_picture(inputs.float().cpu())}
    for name, side in zip(names, sides, strict=True):
        images |= {
            name if name not in images else f"{name} (2)": heat_colors(side.sum(axis=0) if side.ndim == 3 else side)
        }
    shown = [
        f"<figure>{image(pixels, name)}<figcaption>{escaped(name)}</figcaption></figure>"
        for name, pixels in images.items()
    ]
    return f'<div class="beside">{"".join(shown)}</div>'


def _strips(each: Attributions, index: int, sides: Sequence[np.ndarray], names: Sequence[str]) -> str:
    kept = np.ones(len(sides[0]), bool) if each.kept is None else np.asarray(each.kept[index].cpu())
    given = each.words[index] if index < len(each.words) else [_spelled(value) for value in each.inputs[index].tolist()]
    places = [place for place in np.flatnonzero(kept).tolist() if place < len(given)]
    lines = []
    for name, side in zip(names, sides, strict=True):
        colors = heat_colors(np.where(kept, side, 0.0))
        spans = [_word(given[place], colors[place], float(side[place])) for place in places[:MOST_WORDS]]
        lines.append(f'<div class="faint">{escaped(name)}</div><div class="strip">{"".join(spans)}</div>')
    return "".join(lines) + (f"<div class='faint'>The first {MOST_WORDS}.</div>" if len(places) > MOST_WORDS else "")


def _word(text: object, color: np.ndarray, value: float) -> str:
    # Paler than in pictures, where no letters stand on the colour.
    red, green, blue = (255 - round(0.6 * (255 - each)) for each in color.tolist())
    return f'<span style="background: rgb({red}, {green}, {blue})" title="{value:.4g}">{escaped(text)}</span>'


def _spelled(value: float) -> str:
    return f"{value:.4g}"
