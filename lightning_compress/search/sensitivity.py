"""How much a model loses with one layer compressed alone: by technique and amount, measured, kept in a file."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.pruning.threshold import keep_masks
from lightning_compress.quantization.fake import round_weight
from lightning_compress.quantization.sensitivity import check_widths
from lightning_compress.quantization.trials import Group, Patterns, measuring, weight_groups, weight_of
from lightning_compress.search.refusals import AnotherStudy

__all__ = ["Amount", "Sensitivity", "measure_sensitivity"]

Amount = tuple[str, float]  # ("sparsity", fraction of zeros) or ("bits", width)
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Sensitivity:
    """What a model scored with one layer compressed alone.

    Args:
        plain: its score with none compressed.
        scores: layer -> amount -> score.
        shapes: layer -> its weights and its output channels.
        higher_is_better: whether a score is one such as accuracy, and not a loss.
    """

    plain: float
    scores: dict[str, dict[Amount, float]]
    shapes: dict[str, tuple[int, int]]
    higher_is_better: bool = True

    def harms(self) -> dict[str, dict[Amount, float]]:
        """Return layer -> amount -> how much worse the score gets, below 0 where it gets better; for `allocate`.

        >>> Sensitivity(0.9, {"a": {("bits", 2): 0.5}}, {"a": (4, 2)}).harms()
        {'a': {('bits', 2): 0.4}}
        """
        sign = 1.0 if self.higher_is_better else -1.0
        return {
            name: {amount: sign * (self.plain - score) for amount, score in own.items()}
            for name, own in self.scores.items()
        }

    def table(self) -> str:
        """Return one row a layer, one column an amount, in Markdown.

        >>> print(Sensitivity(0.9, {"a": {("bits", 2): 0.5}}, {"a": (4, 2)}).table())
        | layer | weights | 2 bits |
        | --- | ---: | ---: |
        | none | | 0.9000 |
        | a | 4 | 0.5000 |
        """
        amounts = list(next(iter(self.scores.values())))
        head = f"| layer | weights | {' | '.join(map(_said, amounts))} |"
        plain = f"| none | | {' | '.join([f'{self.plain:.4f}'] * len(amounts))} |"
        rows = [
            f"| {name} | {self.shapes[name][0]:,} | {' | '.join(f'{own[amount]:.4f}' for amount in amounts)} |"
            for name, own in self.scores.items()
        ]
        return "\n".join([head, f"| --- | ---: |{' ---: |' * len(amounts)}", plain, *rows])

    def plot(self, path: str | Path) -> Path:
        """Draw the score against the amount, a line a layer, a panel a technique, as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from lightning_compress.search.figures import plot_sensitivity

        return plot_sensitivity(self, path)


def measure_sensitivity(
    module: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] = SPARSITIES,
    widths: Sequence[int] = WIDTHS,
    path: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    layers: tuple[Patterns, Patterns] = (None, None),
    higher_is_better: bool = True,
) -> Sensitivity:
    """Score a model with one layer compressed alone, by the smallest magnitudes and by rounding. Runs before training.

    In eval mode, without gradients. Each score is added to the file at once: a run that was killed loses the one it
    was measuring, and a second run measures nothing.

    Args:
        module: trained; its weights are the same afterwards, bit for bit, also after an error.
        evaluate: module -> score, on the same batches each time.
        sparsities: fractions of zeros in (0, 1), each tried in each layer.
        widths: bits, 2 to 8, per output channel; none of both may be tried by giving ().
        path: a file of one JSON object a line; None keeps nothing.
        about: what else the scores depend on: data, number of batches; part of the file's fingerprint.
        layers: (include, exclude): names, globs, class names or types; None is every Linear and Conv but the head.
        higher_is_better: False where `evaluate` returns a loss.

    Raises:
        ValueError: nothing to try, an amount out of its range, or a score that is not a finite number.
        AnotherStudy: the file is of other weights, options or `about`.
        NothingToCompress: nothing is selected.
    """
    amounts = _amounts(sparsities, widths)
    groups = weight_groups(module, *layers)
    shapes = {name: (weight_of(group).numel(), weight_of(group).shape[0]) for name, group in groups.items()}
    known = _Scores(path, _fingerprint(module, list(groups), about, higher_is_better))
    scores: dict[str, dict[Amount, float]] = {name: {} for name in groups}
    with measuring(module):
        plain = known.of("", ("none", 0.0), lambda: evaluate(module))
        for name, group in groups.items():
            for amount in amounts:
                scores[name][amount] = known.of(name, amount, lambda: _score(module, evaluate, group, amount))  # noqa: B023 - called at once
    return Sensitivity(plain, scores, shapes, higher_is_better)


def _amounts(sparsities: Iterable[float], widths: Iterable[int]) -> list[Amount]:
    zeros, bits = list(sparsities), list(widths)
    if not zeros and not bits:
        raise ValueError("expected sparsities or widths to try, got none of both")
    for sparsity in zeros:
        if not 0.0 < sparsity < 1.0:
            raise ValueError(f"sparsity is a fraction of zeros in (0, 1), got {sparsity!r}")
    checked = check_widths(bits) if bits else ()
    return [("sparsity", float(s)) for s in sorted(set(zeros))] + [("bits", b) for b in checked]


def _said(amount: Amount) -> str:
    return f"{100 * amount[1]:g} % zeros" if amount[0] == "sparsity" else f"{amount[1]:g} bits"


def _score(module: nn.Module, evaluate: Callable[[nn.Module], float], group: Group, amount: Amount) -> float:
    weight = weight_of(group).detach()
    with _changed(weight, compressed(weight, amount)):
        return evaluate(module)


@contextmanager
def _changed(weight: Tensor, value: Tensor) -> Iterator[None]:
    # In place: an evaluation may copy the module, or read its state_dict.
    before = weight.clone()
    try:
        weight.copy_(value)
        yield
    finally:
        weight.copy_(before)


def compressed(weight: Tensor, amount: Amount) -> Tensor:
    """Return a weight with its smallest magnitudes zero, or rounded per output channel.

    >>> compressed(torch.tensor([[1.0, -3.0], [2.0, 4.0]]), ("sparsity", 0.5))
    tensor([[ 0., -3.],
            [ 0.,  4.]])
    """
    technique, value = amount
    if technique == "bits":
        return round_weight(weight, int(value))
    masks, _ = keep_masks([lambda: weight.abs()], round(value * weight.numel()))
    return torch.where(next(masks), weight, 0.0)


def _fingerprint(module: nn.Module, names: list[str], about: Mapping[str, Any] | None, higher: bool) -> str:
    found = hashlib.sha256(json.dumps([names, dict(about or {}), higher], sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, Tensor):
            found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class _Scores:
    """Scores that are in a file already, and those that are added to it."""

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path, self.known = None if path is None else Path(path), dict[tuple[str, str, float], float]()
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed run may have left half a line
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self.path.write_text("", encoding="utf-8")
            self._add({"fingerprint": fingerprint})
        elif lines[0].get("fingerprint") != fingerprint:
            raise AnotherStudy(
                f"the sensitivities in '{path}' are of other weights, layers, data or options (its fingerprint is "
                f"{lines[0].get('fingerprint')}, this one's {fingerprint}); give another file, or delete it"
            )
        elif whole != text:
            self.path.write_text(whole, encoding="utf-8")
        self.known = {(line["layer"], line["technique"], line["amount"]): line["score"] for line in lines[1:]}

    def _add(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def of(self, layer: str, amount: Amount, measure: Callable[[], float]) -> float:
        key = (layer, *amount)
        if key not in self.known:
            score = float(measure())
            if not math.isfinite(score):
                raise ValueError(f"evaluate(module) returned {score} with {_said(amount)} in '{layer or 'no layer'}'")
            self.known[key] = score
            self._add({"layer": layer, "technique": amount[0], "amount": amount[1], "score": score})
        return self.known[key]
