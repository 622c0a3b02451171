"""Charts of the HTML page: SVG text through matplotlib, in colours that hold on light and dark paper.

Each is drawn as wide as a telephone shows it; a page on a desk puts two beside each other.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lightning_compress.measure.drawing import AFTER, BEFORE
from lightning_compress.measure.layers import LayerChange
from lightning_compress.measure.size import LayerRow
from lightning_compress.measure.wording import NOT_MEASURED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["deltas_chart", "layers_chart", "schedule_chart", "tradeoff_chart"]

WIDTH = 4.4  # inches
_INK = "#010203"  # becomes the page's own ink
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and scaled
    "svg.hashsalt": "lightning-compress",
    "font.size": 8.0,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
_NAME_LETTERS = 54  # what fits over a bar
_CLASS_LETTERS = 19


def tradeoff_chart(points: Sequence[tuple[float, float, str]]) -> str:
    """Draw accuracy against bytes; each point carries its number, counted from 1, and no name that could overlap.

    Args:
        points: (bytes, accuracy as a fraction, "before" or "after").

    Raises:
        ImportError: matplotlib is not installed.
    """
    sizes, accuracies = [size / 1e6 for size, _, _ in points], [100 * accuracy for _, accuracy, _ in points]
    wide = min(sizes) > 0 and max(sizes) > 20 * min(sizes)  # many recipes of one model: a log scale keeps them apart

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes = figure.add_axes((0.15, 0.15, 0.8, 0.78))
        for size, accuracy, (_, _, side) in zip(sizes, accuracies, points, strict=True):
            axes.plot([size], [accuracy], "o", color=BEFORE if side == "before" else AFTER, markersize=9)
        for (size, accuracy), numbers in _close(sizes, accuracies, wide):
            text = ", ".join(str(number) for number in numbers)
            above: dict[str, Any] = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
            axes.annotate(text, (size, accuracy), fontsize=9, **above)
        if wide:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(0, (max(sizes) or 1.0) * 1.12)
        axes.margins(y=0.25)
        axes.set(xlabel="file, MB", ylabel="accuracy, %")
        _plain_axes(axes)

    return _svg(draw, 3.0)


def _close(
    sizes: Sequence[float], accuracies: Sequence[float], wide: bool
) -> list[tuple[tuple[float, float], list[int]]]:
    """Gather points whose numbers would lie on each other: where, and the numbers that are written there."""
    across = [math.log(size) if wide else size for size in sizes]
    width = (max(across) - min(across) if wide else max(across)) or 1.0
    height = (max(accuracies) - min(accuracies)) or 1.0
    found: list[tuple[int, list[int]]] = []
    for index in range(len(sizes)):
        for first, numbers in found:
            near = abs(across[index] - across[first]) < 0.06 * width
            if near and abs(accuracies[index] - accuracies[first]) < 0.09 * height:
                numbers.append(index + 1)
                break
        else:
            found.append((index, [index + 1]))
    return [((sizes[first], accuracies[first]), numbers) for first, numbers in found]


def schedule_chart(history: Sequence[tuple[int, float, float]]) -> str:
    """Draw the sparsity that was asked for and the one that was there, by optimizer step.

    Raises:
        ImportError: matplotlib is not installed.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.13, 0.15, 0.82, 0.78))
        steps, targets, actuals = zip(*history, strict=True)
        axes.plot(steps, targets, color=_INK, linestyle="--", linewidth=1.2, label="target", zorder=3)
        axes.plot(steps, actuals, color=AFTER, linewidth=2.2, drawstyle="steps-post", label="actual")
        axes.set_ylim(-0.02, max(1.0, *targets, *actuals) * 1.02)
        axes.set(xlabel="optimizer step", ylabel="fraction of zeros")
        axes.legend(loc="lower right", frameon=False)
        _plain_axes(axes)

    return _svg(draw, 2.8)


def layers_chart(layers: Sequence[LayerChange]) -> str:
    """Draw sparsity and bits of each weight as two bars, before and after, under its name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    height = 0.42 * len(layers) + 0.35

    def draw(figure: Figure) -> None:
        bottom, rows = 0.05 / height, (height - 0.3) / height
        widest = max((row.bits for layer in layers for row in (layer.before, layer.after) if row), default=0) or 1
        zeros = figure.add_axes((0.02, bottom, 0.56, rows))
        bits = figure.add_axes((0.63, bottom, 0.35, rows), sharey=zeros)
        for axes, title, full in ((zeros, "sparsity", 1.0), (bits, "bits", float(widest))):
            axes.set_xlim(0, full * 1.32)  # room for the value at the end of the longest bar
            axes.set_title(title, loc="left", fontsize=8)
            axes.spines[:].set_visible(False)
            axes.set(xticks=[], yticks=[])
        zeros.set_ylim(len(layers), 0)
        for place, layer in enumerate(layers):
            _write(zeros, _short(layer.name, _NAME_LETTERS), (0, place + 0.17), 8)
            for row, offset, color in ((layer.before, 0.47, BEFORE), (layer.after, 0.75, AFTER)):
                _layer_bars(zeros, bits, row, place + offset, color)

    return _svg(draw, height)


def _layer_bars(zeros: Axes, bits: Axes, row: LayerRow | None, place: float, color: str) -> None:
    if row is None:
        _write(zeros, NOT_MEASURED, (0, place), 7)
        return
    for axes, value, label in ((zeros, row.sparsity, f"{row.sparsity:.4f}"), (bits, row.bits, str(row.bits))):
        axes.barh(place, value, height=0.25, color=color)
        _write(axes, label, (value, place), 7)


def _write(axes: Axes, text: str, at: tuple[float, float], size: float, side: int = 1) -> None:
    """Put text beside a point, a little away from it: to the right, or with `side` -1 to the left."""
    away: dict[str, Any] = {
        "xytext": (3 * side, 0),
        "textcoords": "offset points",
        "ha": "left" if side > 0 else "right",
    }
    axes.annotate(text, at, fontsize=size, va="center_baseline", **away)


def deltas_chart(deltas: Sequence[tuple[str, float]]) -> str:
    """Draw the change of accuracy of each class or slice, in percentage points, from a line at 0.

    Args:
        deltas: (name, change as a fraction).

    Raises:
        ImportError: matplotlib is not installed.
    """
    height = 0.22 * len(deltas) + 0.2

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.33, 0.1 / height, 0.65, (height - 0.2) / height))
        values = [100 * delta for _, delta in deltas]
        reach = max((abs(value) for value in values), default=0.0) or 1.0
        # Room for the value at the end of the longest bar, on the sides that have bars.
        axes.set_xlim(*(side * reach * (1.5 if any(side * v > 0 for v in values) else 0.4) for side in (-1, 1)))
        axes.set_ylim(len(deltas), 0)
        axes.barh([place + 0.5 for place in range(len(values))], values, height=0.62, color=AFTER)
        axes.axvline(0, color=_INK, linewidth=0.8)
        left = axes.get_xlim()[0]
        for place, ((name, _), value) in enumerate(zip(deltas, values, strict=True)):
            _write(axes, f"{value:+.2f}" if value else "0", (value, place + 0.5), 8, 1 if value >= 0 else -1)
            _write(axes, _short(name, _CLASS_LETTERS), (left, place + 0.5), 8, -1)
        axes.spines[:].set_visible(False)
        axes.set(xticks=[], yticks=[])

    return _svg(draw, height)


def _plain_axes(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2, color=_INK)


def _short(name: str, letters: int) -> str:
    """A name that fits, cut in its middle, where layers' names differ least."""
    name = " ".join(name.split())
    half = (letters - 3) // 2
    name = name if len(name) <= letters else f"{name[:half]}...{name[-half:]}"
    return name.replace("$", r"\$")  # matplotlib would read a formula between dollar signs


def _svg(draw: Callable[[Figure], None], height: float) -> str:
    """Draw a figure of `WIDTH` by `height` inches; returns an <svg> element that can stand inside a page."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('charts need matplotlib: pip install "lightning-compress[report]"') from error
    sink = io.StringIO()
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, height))
        draw(figure)
        nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(sink, format="svg", transparent=True, metadata=nothing)
    return _inlined(sink.getvalue())


def _inlined(svg: str) -> str:
    """Leave out what only a file of its own needs, and what would clash with other charts of the page.

    Elements have their ids for matplotlib's sake; those that are referred to are hashes of what they draw, so that two
    charts share one only where it is the same. Only tags are touched: text of the user's may look like anything.
    """
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))

    def mended(tag: re.Match[str]) -> str:
        text = re.sub(r' id="([^"]*)"', lambda found: found.group() if found.group(1) in used else "", tag.group())
        return text.replace(_INK, "currentColor")

    svg = re.sub(r"<[^>]*>", mended, svg)
    return re.sub(
        r'^<svg([^>]*?) width="[^"]*"([^>]*?)', r"<svg\1\2", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    )
