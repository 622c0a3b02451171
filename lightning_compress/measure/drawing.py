"""What all pictures share: figures without pyplot, PNG files, and the colours of before and after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["AFTER", "BEFORE", "DARK", "new_figure", "save_png"]

BEFORE, AFTER, DARK = "#8a9bb0", "#d9622b", "#2f3b4a"  # told apart in grey print as well


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of its own; pyplot, with its global state and its choice of window system, stays out.

    Args:
        width: inches.
        height: inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError('charts need matplotlib: pip install "lightning-compress[demo]"') from error
    return Figure(figsize=(width, height), dpi=110, layout=ConstrainedLayoutEngine(hspace=0.08, wspace=0.06))


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG; its folder is made if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
