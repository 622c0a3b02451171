"""Pictures of a search: PNG files through matplotlib, which is imported only when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_compress.measure.drawing import AFTER, BEFORE, DARK, new_figure, save_png

if TYPE_CHECKING:
    from lightning_compress.search.found import Found
    from lightning_compress.search.sensitivity import Sensitivity

__all__ = ["plot_front", "plot_sensitivity"]


def plot_front(found: Found, path: str | Path) -> Path:
    """Draw all trials over the objective's first two metrics, and the line of those that none beats in both.

    Args:
        found: what `search` returned.
        path: the PNG to write; its folder is made if needed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    across, up = found.objective.axes[:2]
    figure = new_figure(7.0, 4.6)
    axes = figure.add_subplot()
    points = [(trial.result[across.metric], trial.result[up.metric]) for trial in found.complete if trial.result]
    axes.scatter([x for x, _ in points], [y for _, y in points], color=BEFORE, s=26, label=f"{len(points)} trials")
    front = sorted((t.result[across.metric], t.result[up.metric]) for t in found.front() if t.result)
    axes.plot(*zip(*front, strict=True), color=AFTER, marker="o", linewidth=1.8, drawstyle="steps-post", label="front")
    kept = [trial for trial in found.complete if trial.violation <= 0.0]
    if kept:
        best = found.best.result or {}
        axes.scatter([best[across.metric]], [best[up.metric]], s=160, facecolors="none", edgecolors=DARK, label="best")
    if all(x > 0 for x, _ in points) and max(points)[0] > 10 * min(points)[0]:
        axes.set_xscale("log")
    limit = getattr(found.objective, "dense", None)
    if limit is not None:
        axes.axhline(limit - found.objective.drop, color=DARK, linestyle="--", linewidth=1.0, label="must be kept")  # type: ignore[attr-defined]
    title = f"{up.metric} against {across.metric}"
    axes.set(title=title, xlabel=across.metric, ylabel=up.metric)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return save_png(figure, path)


def plot_sensitivity(sensitivity: Sensitivity, path: str | Path) -> Path:
    """Draw the score against the amount: a line a layer, a panel a technique.

    Args:
        sensitivity: what `measure_sensitivity` returned.
        path: the PNG to write; its folder is made if needed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    techniques = list(dict.fromkeys(technique for own in sensitivity.scores.values() for technique, _ in own))
    figure = new_figure(5.5 * len(techniques), 4.4)
    panels = figure.subplots(1, len(techniques), squeeze=False)[0]
    for technique, axes in zip(techniques, panels, strict=True):
        for name, own in sensitivity.scores.items():
            line = sorted((value, score) for (kind, value), score in own.items() if kind == technique)
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=name.replace("$", r"\$"))
        axes.axhline(sensitivity.plain, color=DARK, linestyle="--", linewidth=1.0, label="none compressed")
        across = "fraction of zeros in one layer" if technique == "sparsity" else "bits of one layer's weights"
        axes.set(xlabel=across, ylabel="score")
        axes.grid(alpha=0.25)
    if len(sensitivity.scores) <= 12:
        panels[0].legend(frameon=False, fontsize=8)
    return save_png(figure, path)
