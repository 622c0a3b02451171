"""A plan's curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_compress.measure.drawing import AFTER, DARK, new_figure, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_compress.planning.table import Plan

__all__ = ["plot_stages"]


def plot_stages(plan: Plan, path: str | Path | None = None) -> Figure:
    """Draw what each callback does over the run, one panel each; runs when a user asks.

    Args:
        plan: whose stages have curves or moments.
        path: a PNG to write as well; its folder is made if needed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    drawn = [stage for stage in plan.stages if stage.curve or stage.moments]
    figure = new_figure(8.0, 1.0 + 1.5 * max(1, len(drawn)))
    panels = figure.subplots(max(1, len(drawn)), 1, sharex=True, squeeze=False)[:, 0]
    last = float(plan.steps or 1)
    for panel, stage in zip(panels, drawn, strict=False):
        if stage.curve:
            places = [last * index / (len(stage.curve) - 1) for index in range(len(stage.curve))]
            panel.plot(places, stage.curve, color=AFTER, linewidth=2.4)
            panel.set_ylim(-0.02, max(1.0, *stage.curve) * 1.05)
        else:
            panel.set_yticks([])
        for name, at in stage.moments:
            panel.axvline(at, color=DARK, linestyle=":", linewidth=1.2)
            panel.annotate(name, (at, 0.5), xycoords=("data", "axes fraction"), fontsize=8, rotation=90, ha="right")
        panel.set_title(stage.callback, fontsize=10, loc="left")
    panels[-1].set_xlim(0.0, last)
    panels[-1].set_xlabel("optimizer step" if plan.steps else "fraction of the run")
    if path is not None:
        save_png(figure, path)
    return figure
