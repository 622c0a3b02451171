"""Targets: a weight, its layer and what was gathered about it, so that any criterion can be asked for scores."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.parts import Part
from lightning_compress.pruning import criteria
from lightning_compress.pruning.criteria import magnitude, squared_magnitude
from lightning_compress.pruning.threshold import Piecewise
from lightning_compress.sharding import cut, raise_together, whole

__all__ = [
    "PRUNABLE",
    "TRANSPOSED",
    "Criterion",
    "Target",
    "asks_for",
    "checked_scores",
    "described_function",
]

Criterion = Callable[..., Tensor]

# A zero weight has the lowest score there is: what is out stays out by itself, without a pass over the mask.
ZERO_IS_LOWEST: frozenset[Criterion] = frozenset((magnitude, squared_magnitude))
# Each score is of one weight alone, so that a process can score its piece of them.
OF_SINGLE_WEIGHTS: frozenset[Criterion] = ZERO_IS_LOWEST | frozenset(
    (
        criteria.gradient_magnitude,
        criteria.taylor,
        criteria.snip,
        criteria.movement,
        criteria.fisher,
        criteria.wanda,
        criteria.mean_activation,
        criteria.active_share,
    )
)
BROADCAST = frozenset(("input_norm", "activation", "positive_share"))  # a number a channel, of the whole weight
SHAPED_LIKE_THE_WEIGHT = frozenset(("weight", "gradient", "squared_gradient", "movement"))
OUT = -1e30  # below every score, and sums of it over a group stay finite
TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRUNABLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def described_function(function: Any) -> str:
    """Return a function's import path, or its repr."""
    return f"{function.__module__}.{function.__qualname__}" if hasattr(function, "__qualname__") else repr(function)


def asks_for(criterion: Criterion, known: frozenset[str]) -> frozenset[str]:
    """Return the names of what a criterion needs: its parameters without a default. Runs at construction.

    >>> from lightning_compress.pruning.criteria import taylor
    >>> sorted(asks_for(taylor, frozenset({"weight", "gradient"})))
    ['gradient', 'weight']

    Raises:
        TypeError: it asks for something unknown.
    """
    asked = _asked(criterion)
    if len(asked) == 1 and asked[0] not in known and _is_a_weight(asked[0], known):
        return frozenset({"weight"})
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise TypeError(
            f"criterion {described_function(criterion)} asks for {', '.join(unknown) or 'nothing'}; a criterion's "
            f"parameters are named after what it needs: {', '.join(sorted(known))}"
        )
    return frozenset(asked)


def _asked(criterion: Criterion) -> list[str]:
    try:
        parameters = inspect.signature(criterion).parameters.values()
    except ValueError:  # torch's built-in functions have no signature
        return ["weight, by position"]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named if p.default is p.empty]


def _is_a_weight(name: str, known: frozenset[str]) -> bool:
    # A function of the weight alone may call it what it likes, unless the name looks like a slip for something else.
    return difflib.get_close_matches(name, known, n=1) in ([], ["weight"])


@dataclass(frozen=True)
class Target:
    """One weight at a mask update.

    Args:
        name: its clean name.
        weight: of any shape; this process's piece of it, if it has a part.
        layer: the layer that computes with it.
        mask: what is kept now, of the piece; None before the first update.
        criterion: what scores it.
        values: what criteria may ask for, by name; called when asked.
        comes_back: whether what is out competes with its own score; otherwise it stays out.
        widen: give scores in float32, since not all targets have one dtype.
        part: which piece of the whole this process has; None where it has the whole. Every process scores then.
    """

    name: str
    weight: Tensor
    layer: nn.Module
    mask: Tensor | None = None
    criterion: Criterion = magnitude
    values: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    comes_back: bool = False
    widen: bool = False
    part: Part | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the whole weight."""
        return self.weight.shape if self.part is None else self.part.shape

    def whole(self, piece: Tensor) -> Tensor:
        """Return the whole of which each process has such a piece."""
        return whole(piece, self.part)

    def cut(self, tensor: Tensor) -> Tensor:
        """Return this process's piece of a whole."""
        return cut(tensor, self.part)

    @property
    def input_axis(self) -> int:
        """Dimension of the weight along which it sums over inputs."""
        return 0 if isinstance(self.layer, TRANSPOSED) else 1

    @property
    def inputs(self) -> int:
        """Number of inputs that each output sums over, at each position of a kernel."""
        groups = self.layer.groups if isinstance(self.layer, TRANSPOSED) else 1
        return self.shape[self.input_axis] // int(groups)  # type: ignore[arg-type]

    @property
    def output_axis(self) -> int:
        """Dimension of the weight that counts output channels."""
        return 1 - self.input_axis

    def evaluate(self, criterion: Criterion) -> Tensor:
        """Return a criterion's scores for this weight.

        Raises:
            ValueError: not floats of the weight's shape.
        """
        together = self.part is not None and criterion not in OF_SINGLE_WEIGHTS
        asked = _asked(criterion)
        alone = len(asked) == 1 and asked[0] not in {"weight", "name", *self.values}
        arguments = {name: self._value("weight" if alone else name, together) for name in asked}
        scores: Any = criterion(*arguments.values()) if alone else criterion(**arguments)
        shape = self.shape if together else self.weight.shape
        if isinstance(scores, Tensor) and scores.shape == shape and scores.is_floating_point():
            return self.cut(scores.detach()) if together else scores.detach()
        got = f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"criterion {described_function(criterion)} must return float scores of shape {tuple(shape)} for "
            f"'{self.name}', got {got}"
        )

    def _value(self, name: str, together: bool) -> Any:
        own: dict[str, Callable[[], Any]] = {"weight": lambda: self.weight, "name": lambda: self.name}
        value = {**self.values, **own}[name]()
        if self.part is not None and name in BROADCAST and not together:
            return self.cut(value.expand(self.shape))
        return self.whole(value) if together and name in SHAPED_LIKE_THE_WEIGHT else value

    def scores(self) -> Tensor:
        """Return the scores that patterns compare; computed anew at each call, so that none is held."""
        scores = self.evaluate(self.criterion)
        scores = scores.float() if self.widen else scores
        if self.comes_back or self.mask is None or self.criterion in ZERO_IS_LOWEST:
            return scores
        scores = scores if scores.dtype == torch.float64 else scores.float()
        return torch.where(self.mask, scores, OUT)

    @property
    def piecewise(self) -> Piecewise | None:
        """The same scores, where they can be computed a piece of the weight at a time."""
        simple = self.criterion in ZERO_IS_LOWEST and not self.widen
        return Piecewise(self.weight, self.criterion) if simple else None

    def check(self, step: int) -> torch.dtype:
        """Raise unless all scores are finite, before any mask is made; returns their dtype.

        Raises:
            CompressError: NaN or infinite scores.
        """
        scores = self.scores()
        low, high = torch.aminmax(scores) if scores.numel() else (scores.sum(), scores.sum())
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise CompressError(
                f"criterion {described_function(self.criterion)} gave NaN or infinite scores for '{self.name}' at "
                f"optimizer step {step}; the masks are left as they were. Lower the learning rate or clip gradients, "
                f"and resume from the last checkpoint"
            )
        return scores.dtype


def checked_scores(targets: Sequence[Target], step: int) -> set[torch.dtype]:
    """Return the dtypes of all scores, or raise on every process what one has found. Runs before each mask update.

    Raises:
        CompressError: NaN or infinite scores; or what a criterion raised on another process.
        ValueError: scores of another shape or of integers.
    """
    dtypes, error = set(), None
    for target in targets:
        try:
            dtypes.add(target.check(step))
        except (CompressError, ValueError) as found:
            if target.part is None:
                raise
            error = error or found  # the others would wait for this process: they are told first
    if targets and targets[0].part is not None:
        raise_together(error, targets[0].weight.device)
    return dtypes
