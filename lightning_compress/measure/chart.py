"""A report as a picture: PNG files through matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lightning_compress.measure.drawing import AFTER, BEFORE, DARK, new_figure, save_png
from lightning_compress.measure.report import Report
from lightning_compress.measure.wording import NOT_MEASURED, percent, points, three_digits, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_compress.measure.latency import Latency
    from lightning_compress.schedule import Schedule

__all__ = ["plot_pruning_curve", "plot_report", "plot_schedule"]

_RUN = ("fraction of the run", "optimizer step")


@dataclass(frozen=True)
class _Bar:
    """One bar with the text above it; `low` and `high` end a line that shows its spread."""

    height: float
    label: str
    low: float = 0.0
    high: float = 0.0


_Pair = tuple[_Bar | None, _Bar | None]  # before, after; None was not measured


def plot_pruning_curve(history: Sequence[tuple[int, float, float]], path: str | Path) -> Path:
    """Draw the sparsity that was asked for and the one that was there, by optimizer step.

    Args:
        history: (optimizer step, target sparsity, actual sparsity), sparsity as fractions.
        path: The PNG to write; its folder is made if needed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: `history` is empty.
    """
    if not history:
        raise ValueError("a pruning curve needs at least one (step, target, actual), got none")
    figure = new_figure(7.0, 4.0)
    _draw_curve(figure.add_subplot(), history)
    return save_png(figure, path)


def plot_report(report: Report, path: str | Path, history: Sequence[tuple[int, float, float]] = ()) -> Path:
    """Draw accuracy, bytes and latency before and after, and the pruning curve where there is a `history`.

    Args:
        report: What `compare` made.
        path: The PNG to write; its folder is made if needed.
        history: As for `plot_pruning_curve`; empty leaves that panel out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rows, columns = (2, 2) if history else (1, 3)
    figure = new_figure(*((10.5, 7.5) if history else (13.0, 4.2)))
    axes = figure.subplots(rows, columns).flat
    _draw_accuracy(axes[0], report)
    _draw_bytes(axes[1], report)
    _draw_latency(axes[2], report)
    if history:
        _draw_curve(axes[3], history)
    _legend(figure, report)
    return save_png(figure, path)


def plot_schedule(
    schedule: Schedule, window: tuple[int | float, int | float] | None = None, path: str | Path | None = None
) -> Figure:
    """Draw a schedule, over its window or over the part of the run that a window gives it.

    Args:
        schedule: progress in [0, 1] -> value.
        window: (begin, end) as a callback takes it, both fractions of the run or both optimizer steps.
        path: A PNG to write as well; its folder is made if needed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a window that does not rise, or of a fraction and a step.
    """
    begin, end = window or (0.0, 1.0)
    if type(begin) is not type(end) or not begin < end:
        raise ValueError(f"a window to draw is two fractions or two steps, the earlier first, got {window!r}")
    figure = new_figure(7.0, 4.0)
    axes = figure.add_subplot()
    points = [index / 1000 for index in range(1001)]
    values = [schedule(point) for point in points]
    axes.plot([begin + (end - begin) * point for point in points], values, color=AFTER, linewidth=2.4)
    if window is not None:
        last = 1.0 if isinstance(end, float) else end + 0.2 * (end - begin)
        axes.plot([end, last], [values[-1]] * 2, color=AFTER, linewidth=2.4, linestyle=":")
        axes.axvspan(begin, end, color=BEFORE, alpha=0.12, linewidth=0)
        axes.set_xlim(0, last)
    where = "progress through the window" if window is None else _RUN[isinstance(end, int)]
    axes.set_ylim(min(0.0, *values) - 0.02, max(1.0, *values) * 1.02)
    axes.set(title=fill(_plain(repr(schedule)), 80), xlabel=where, ylabel="value")
    axes.grid(alpha=0.25)
    if path is not None:
        save_png(figure, path)
    return figure


def _draw_curve(axes: Axes, history: Sequence[tuple[int, float, float]]) -> None:
    steps, targets, actuals = zip(*history, strict=True)
    axes.plot(steps, targets, color=DARK, linestyle="--", linewidth=1.6, label="target", zorder=3)
    actual = f"actual, {actuals[-1]:.4f} at the end"
    axes.plot(steps, actuals, color=AFTER, linewidth=2.4, drawstyle="steps-post", label=actual)
    axes.set_ylim(-0.02, max(1.0, *targets, *actuals) * 1.02)
    axes.set(title="Sparsity by optimizer step", xlabel="optimizer step", ylabel="fraction of zeros")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", frameon=False)


def _draw_accuracy(axes: Axes, report: Report) -> None:
    before, after = report.before.accuracy, report.after.accuracy
    pairs = {
        f"{_plain(where)}\n{points(change)}": (
            _accuracy_bar(before.get(where)),
            _accuracy_bar(after.get(where)),
        )
        for where, change in report.changes()["accuracy_points"].items()
    }
    _draw_bars(axes, pairs)
    axes.set(title="Accuracy", ylabel="fraction right")


def _accuracy_bar(value: float | None) -> _Bar | None:
    return None if value is None else _Bar(value, percent(value))


def _draw_bytes(axes: Axes, report: Report) -> None:
    before, after = report.before, report.after
    sizes = {
        "file": (before.size_bytes, after.size_bytes),
        "zipped": (before.zipped_bytes, after.zipped_bytes),
    }
    unit, factor = _unit(max((value for pair in sizes.values() for value in pair if value), default=0))
    pairs = {
        f"{what}\n{times(*pair, 'smaller', 'larger')}": (
            _bytes_bar(pair[0], factor),
            _bytes_bar(pair[1], factor),
        )
        for what, pair in sizes.items()
    }
    _draw_bars(axes, pairs)
    axes.set(title="Size on disk", ylabel=unit)


def _bytes_bar(value: int | None, factor: int) -> _Bar | None:
    if value is None:
        return None
    unit, own_factor = _unit(value)
    return _Bar(value / factor, f"{three_digits(value / own_factor)} {unit}" if value else "0 bytes")


def _unit(value: int) -> tuple[str, int]:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= factor:
            return unit, factor
    return "bytes", 1


def _draw_latency(axes: Axes, report: Report) -> None:
    before, after = report.before.latency, report.after.latency
    stated = {side.threads for side in (before, after) if side is not None and side.threads is not None}
    threads = " and ".join(map(str, sorted(stated))) or "not stated"
    speedup = report.changes()["speedup"]
    change = times(speedup, speedup and 1.0, "faster", "slower")
    _draw_bars(axes, {f"threads: {threads}\n{change}": (_latency_bar(before), _latency_bar(after))})
    axes.set(title="Latency, median (line: p10 to p90)", ylabel="milliseconds")


def _latency_bar(latency: Latency | None) -> _Bar | None:
    if latency is None:
        return None
    return _Bar(latency.median_ms, f"{three_digits(latency.median_ms)} ms", latency.p10_ms, latency.p90_ms)


def _draw_bars(axes: Axes, pairs: Mapping[str, _Pair]) -> None:
    """Pairs of bars from 0 with their values above them; a missing bar says that it was not measured."""
    tops = [max(bar.height, bar.high) for pair in pairs.values() for bar in pair if bar]
    axes.spines[["top", "right"]].set_visible(False)
    if not tops:
        axes.text(0.5, 0.5, NOT_MEASURED, ha="center", va="center", color="grey", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    axes.set_ylim(0.0, (max(tops) or 1.0) * 1.15)  # room for the label of the tallest
    size = 9 if len(pairs) <= 2 else 7
    for place, pair in enumerate(pairs.values()):
        for offset, bar, color in zip((-0.2, 0.2), pair, (BEFORE, AFTER), strict=True):
            _draw_bar(axes, place + offset, bar, color, size)
    axes.set_xticks(range(len(pairs)), list(pairs))
    margin = 0.9 if len(pairs) == 1 else 0.6
    axes.set_xlim(-margin, len(pairs) - 1 + margin)


def _draw_bar(axes: Axes, place: float, bar: _Bar | None, color: str, size: int) -> None:
    above: dict[str, Any] = {
        "xytext": (0, 3),
        "textcoords": "offset points",
        "ha": "center",
        "fontsize": size,
    }
    if bar is None:
        axes.annotate(NOT_MEASURED.replace(" ", "\n"), (place, 0.0), color="grey", **above)
        return
    axes.bar(place, bar.height, width=0.38, color=color)
    if bar.high:
        axes.plot([place, place], [bar.low, bar.high], color=DARK, linewidth=1.6)
    axes.annotate(bar.label, (place, max(bar.height, bar.high)), **above)


def _legend(figure: Figure, report: Report) -> None:
    from matplotlib.patches import Patch

    names = ((report.before.name, BEFORE), (report.after.name, AFTER))
    patches = [Patch(color=color, label=_plain(name)) for name, color in names]
    figure.legend(handles=patches, loc="outside upper center", ncols=2, frameon=False)


def _plain(text: str) -> str:
    """A user's name as it is: matplotlib would read a formula between dollar signs."""
    return text.replace("$", r"\$")
