"""Layers by steps as a picture: where and when a run's zeros and narrow widths came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_compress.measure.drawing import new_figure, save_png
from lightning_compress.measure.layer_states import LayerState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = ["plot_layers", "short_names"]

LONGEST_NAME, MOST_LABELS = 44, 120
_INCHES_A_ROW, _FONT = 0.17, 7.5


def plot_layers(rows: Sequence[LayerState], path: str | Path) -> Path:
    """Draw each layer's sparsity by step and, where widths or rounding were noted, its final bits and SQNR beside it.

    Args:
        rows: of all moments, in order.
        path: the PNG to write; its folder is made if needed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("a heat map needs at least one row, got none")
    layers = list(dict.fromkeys(row.layer for row in rows))
    steps = sorted({row.step for row in rows})
    cells = {(row.layer, row.step): row for row in rows}
    figure = new_figure(9.5, max(3.0, 1.3 + _INCHES_A_ROW * min(len(layers), 3 * MOST_LABELS)))
    axes = figure.add_subplot()
    image = _draw(axes, layers, steps, cells)
    figure.colorbar(image, ax=axes, label="fraction of zeros", fraction=0.03, pad=0.015, aspect=30)
    return save_png(figure, path)


def short_names(names: Sequence[str], longest: int = LONGEST_NAME) -> list[str]:
    """Return parameters' names for a picture: without "weight" and what all begin with, words cut to three letters.

    Only names that are too long are cut, and only as far as they stay apart from each other.

    >>> short_names(["net.encoder.3.attention.output.dense.weight", "net.encoder.3.value.weight"], 18)
    ['att.output.dense', 'value']
    >>> short_names(["net.body.0.weight", "net.head.weight"]), short_names(["my.net.0.weight", "my.net.2.weight"])
    (['body.0', 'head'], ['net.0', 'net.2'])
    """
    words = [name.removesuffix(".weight").split(".") for name in names]
    shared = 0
    while all(len(each) > shared + 1 for each in words) and len({each[shared] for each in words}) == 1 < len(words):
        shared += 1
    if shared and any(each[shared].isdigit() for each in words):  # "layer.0" says more than "0"
        shared -= 1
    whole = [".".join(each[shared:]) for each in words]
    cut = [_cut(each[shared:], longest) for each in words]
    return cut if len(set(cut)) == len(set(whole)) else whole


def _cut(words: Sequence[str], longest: int) -> str:
    words = list(words)
    for index in range(len(words) - 1):
        if len(".".join(words)) > longest and not words[index].isdigit():
            words[index] = words[index][:3]
    return ".".join(words)


def _draw(
    axes: Axes, layers: Sequence[str], steps: Sequence[int], cells: Mapping[tuple[str, int], LayerState]
) -> AxesImage:
    nothing = float("nan")
    grid = [[cells[name, step].sparsity if (name, step) in cells else nothing for step in steps] for name in layers]
    image = axes.pcolormesh(_edges(steps), range(len(layers) + 1), grid, cmap="viridis", vmin=0.0, vmax=1.0)
    axes.invert_yaxis()
    every = math.ceil(len(layers) / MOST_LABELS)
    shown = range(0, len(layers), every)
    names = short_names(layers)
    axes.set_yticks([index + 0.5 for index in shown], [names[i] for i in shown], fontsize=_FONT)
    axes.tick_params(axis="y", length=0)
    last = {name: cells[name, step] for step in steps for name in layers if (name, step) in cells}
    _write_last(axes, [_last_words(last[layers[i]]) if layers[i] in last else "" for i in shown], list(shown))
    axes.set(title="Zeros by layer and step", xlabel="step")
    return image  # type: ignore[return-value]


def _edges(steps: Sequence[int]) -> list[float]:
    """Each look holds until the next one; the last, at the end of the run, is a narrow strip."""
    return [*map(float, steps), steps[-1] + ((steps[-1] - steps[0]) / 40 or 1.0)]


def _last_words(state: LayerState) -> str:
    rounding = "" if state.sqnr_db is None else f", {state.sqnr_db:.0f} dB"
    return f"{state.sparsity:.3f}, {state.bits} bits{rounding}"


def _write_last(axes: Axes, words: Sequence[str], at: Sequence[int]) -> None:
    """Write the last look's numbers at the right end of each row."""
    own = axes.secondary_yaxis("right")
    own.set_yticks([index + 0.5 for index in at], list(words), fontsize=_FONT)
    own.tick_params(axis="y", length=0)
