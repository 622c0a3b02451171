"""What most runs of QuantizationAwareTraining leave as it is."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_compress.quantization.noise import NO_NOISE, Noise
from lightning_compress.quantization.ranges import RangeRule, check_rule
from lightning_compress.window import Moment, resolve_moment

__all__ = ["Details"]


@dataclass(frozen=True)
class Details:
    """What most runs leave as it is; all of it is read at `setup`.

    Args:
        momentum: weight of the newest step in the moving average of ranges, in (0, 1].
        learning_rate: of what grids learn, such as a step: the fraction of its first size that a step of Adam moves it.
        inputs_from: when inputs begin to be rounded, if later than the weights; within the window's last two moments.
        batch_norm_from: from when batch norms train with their running statistics, which then stay; None is never.
        outputs: round outputs that residual additions, concatenations and poolings read, too, as integer kernels of
            convolutions need it; they are found in the first training batch.
        attention: round what products of two activations read, such as query and key, probabilities and value; they
            are found in the first training batch.
        compiled: compile the rounding functions with `torch.compile` (about 10-20 s once); needs a compiler.
        observer: rule that makes the ranges of all that was seen, when inputs begin to be rounded, and they stay:
            `min_max`, `percentile`, `mean_square_error` of `quantization.ranges`, or your own; options through
            `functools.partial`. None is the moving average, which moves until ranges are frozen.
        noise: rounding at random, or roundings dropped at random, in training.

    Raises:
        ValueError: a number out of its range, or a rule that cannot observe; it is tried on three values.
        CompressError: a rule that gives no range.
    """

    momentum: float = 0.1
    learning_rate: float = 0.01
    inputs_from: Moment | None = None
    batch_norm_from: Moment | None = None
    outputs: bool = False
    attention: bool = False
    compiled: bool = False
    observer: RangeRule | None = None
    noise: Noise = NO_NOISE

    def __post_init__(self) -> None:
        if not 0.0 < self.momentum <= 1.0:
            raise ValueError(f"momentum is the newest step's weight in (0, 1], got {self.momentum}")
        if not 0.0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate of learned grids is positive, got {self.learning_rate}")
        for name in ("momentum", "learning_rate"):  # 1 and 1.0 are one recipe
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.observer is not None:
            check_rule(self.observer)

    @property
    def average(self) -> float | None:
        """The momentum with which ranges move; None where they widen until a rule makes them."""
        return self.momentum if self.observer is None else None

    def resolved(self, total: int, rounding: int, freeze: int) -> tuple[int, float]:
        """Return the steps at which inputs begin to be rounded and batch norms are frozen.

        Raises:
            ValueError: inputs would begin before the weights, or after ranges are frozen.
        """
        norms = float("inf") if self.batch_norm_from is None else float(self._step("batch_norm_from", total))
        if self.inputs_from is None:
            return rounding, norms
        inputs = self._step("inputs_from", total)
        if not rounding <= inputs < freeze:
            raise ValueError(
                f"inputs_from={self.inputs_from!r} is step {inputs}, expected it between the window's round (step "
                f"{rounding}) and freeze (step {freeze}): inputs are rounded with the weights or later, and learn then"
            )
        return inputs, norms

    def _step(self, name: str, total: int) -> int:
        return resolve_moment(getattr(self, name), total, name)
