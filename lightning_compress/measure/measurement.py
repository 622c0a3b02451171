"""What is known about one model: each figure with its unit, None where nobody measured it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_compress.measure.latency import Latency

__all__ = ["Measurement"]

_COUNTS = (
    "size_bytes",
    "zipped_bytes",
    "nonzero",
    "total",
    "entropy_bytes",
    "macs",
    "effective_macs",
    "peak_memory_bytes",
    "energy_joules",
)


@dataclass(frozen=True)
class Measurement:
    """What is known about one model; None and missing keys mean that it was not measured.

    Args:
        name: What the columns and bars are called: "dense", "pruned int8".
        accuracy: Fraction in [0, 1] by where it was run, for example {"torch": 0.91, "onnx": 0.908}.
        size_bytes: Bytes of the file that ships.
        zipped_bytes: The same file in a zip archive.
        nonzero: Weights that are not zero, of `total`.
        total: Weights counted.
        latency: From `measure_latency`, or better for a ratio, `compare_latency`.
        note: What a reader must know to take the numbers rightly.
        entropy_bytes: The least bytes that a code of single weights needs for them.
        macs: Multiply-accumulates of one forward.
        effective_macs: Those of them that no zero weight takes part in.
        peak_memory_bytes: The most memory that inference held at one time.
        energy_joules: Energy of one inference, from a counter of the machine.

    Raises:
        ValueError: An accuracy outside [0, 1], a negative or undefined figure, or more non-zero weights than weights.
    """

    name: str
    accuracy: Mapping[str, float] = field(default_factory=dict)
    size_bytes: int | None = None
    zipped_bytes: int | None = None
    nonzero: int | None = None
    total: int | None = None
    latency: Latency | None = None
    note: str = ""
    entropy_bytes: float | None = None
    macs: float | None = None
    effective_macs: float | None = None
    peak_memory_bytes: int | None = None
    energy_joules: float | None = None

    def __post_init__(self) -> None:
        for where, value in self.accuracy.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"an accuracy is a fraction in [0, 1], got {value} for '{where}' of '{self.name}'; "
                    "divide per cents by 100"
                )
        for what in _COUNTS:
            value = getattr(self, what) or 0
            if value < 0 or not math.isfinite(value):
                raise ValueError(f"{what} counts from 0, got {getattr(self, what)} for '{self.name}'")
        if self.nonzero is not None and self.total is not None and self.nonzero > self.total:
            raise ValueError(
                f"expected at most total={self.total} non-zero weights, got {self.nonzero} for "
                f"'{self.name}'; count both over the same parameters"
            )

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros among the counted weights, None where they were not counted."""
        return 1.0 - self.nonzero / self.total if self.nonzero is not None and self.total else None
