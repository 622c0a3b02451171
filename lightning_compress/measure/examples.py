"""What a reader is shown of an example: its picture or text, and the names of classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Examples", "as_picture"]

_CHANNELS = (1, 3)  # grey and RGB; a fourth, alpha, is dropped


@dataclass(frozen=True)
class Examples:
    """Pictures or texts of the examples that a report speaks of, found by the example's index.

    Args:
        pictures: (examples, h, w), (examples, 1 or 3, h, w) or (examples, h, w, 1 or 3); arrays or CPU tensors of any
            scale: what is not uint8 is stretched from the picture's least value to its greatest.
        texts: a text for each example.
        class_names: what class 0, 1, ... are called; a class beyond them is shown by its number.
    """

    pictures: Any = None
    texts: Sequence[str] = ()
    class_names: Sequence[str] = ()

    def class_name(self, label: int | None) -> str:
        """Name of a class as a reader knows it; a dash where there is no label.

        >>> Examples(class_names=["cat"]).class_name(0), Examples().class_name(7), Examples().class_name(None)
        ('cat', '7', '-')
        """
        if label is None:
            return "-"
        return str(self.class_names[label]) if 0 <= label < len(self.class_names) else str(label)

    def picture(self, index: int) -> np.ndarray | None:
        """Picture of an example as (h, w, 3) uint8; None where there is none.

        Raises:
            ValueError: it has no shape of a picture.
        """
        if self.pictures is None or not 0 <= index < len(self.pictures):
            return None
        return as_picture(self.pictures[index])

    def text(self, index: int) -> str:
        """Text of an example, empty where there is none."""
        return str(self.texts[index]) if 0 <= index < len(self.texts) else ""


def as_picture(values: Any) -> np.ndarray:
    """Return an image of any layout and scale as (h, w, 3) uint8, grey where it has one channel.

    >>> as_picture(np.array([[0.0, 1.0]]))[0].tolist()
    [[0, 0, 0], [255, 255, 255]]

    Raises:
        ValueError: another shape than (h, w), (1 or 3, h, w) or (h, w, 1, 3 or 4).
    """
    pixels = np.asarray(values)
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim == 3 and pixels.shape[0] not in _CHANNELS and pixels.shape[2] in (*_CHANNELS, 4):
        pixels = pixels.transpose(2, 0, 1)[:3]
    if pixels.ndim != 3 or pixels.shape[0] not in _CHANNELS or 0 in pixels.shape:
        raise ValueError(
            f"expected a picture of shape (h, w), (1 or 3, h, w) or (h, w, 1 or 3), got {np.shape(values)}; "
            "leave pictures out for other data"
        )
    if pixels.dtype != np.uint8:
        pixels = np.nan_to_num(pixels.astype(np.float64))
        low, high = pixels.min(), pixels.max()
        pixels = ((pixels - low) / ((high - low) or 1.0) * 255.0).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))
