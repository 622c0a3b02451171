"""What a search has found: the best trial, the front, a table and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_compress.search.objective import Objective, Smallest, dominates
from lightning_compress.search.refusals import NothingKept
from lightning_compress.search.strategies import Trial

__all__ = ["Found"]


@dataclass(frozen=True)
class Found:
    """All trials of a search, in their order, and what they were searched for."""

    trials: tuple[Trial, ...]
    objective: Objective

    @property
    def complete(self) -> list[Trial]:
        """The trials that came to a result."""
        return [trial for trial in self.trials if trial.result is not None]

    @property
    def best(self) -> Trial:
        """The trial of least cost that keeps what must be kept; of equal ones that with less violation, then the first.

        Of several metrics: the trial of the front that is nearest to the best of each, their spreads taken as 1.

        Raises:
            NothingKept: none keeps it; the nearest one is named.
        """
        keeping = [trial for trial in self.complete if trial.violation <= 0.0]
        if not keeping:
            raise NothingKept(self._nearest())
        if len(keeping[0].costs) > 1:
            return _knee(self.front())
        return min(keeping, key=lambda trial: (trial.costs, trial.violation, trial.number))

    @property
    def nearest(self) -> Trial:
        """The trial that breaks what must be kept the least; of equal ones the cheapest, then the first."""
        return min(self.complete, key=lambda trial: (max(0.0, trial.violation), trial.costs, trial.number))

    def _nearest(self) -> str:
        near, objective = self.nearest, self.objective
        kept = ""
        if isinstance(objective, Smallest) and near.result is not None:
            kept = (
                f"{objective.keep} >= {objective.dense - objective.drop:.4g}; the nearest has "
                f"{near.result[objective.keep]:.4g} at {objective.metric} {near.result[objective.metric]:,.0f}, "
            )
        return (
            f"none of {len(self.complete)} trials kept {kept}recipe {near.recipe}; allow a larger drop, milder amounts "
            f"or more training steps in a trial"
        )

    def front(self) -> list[Trial]:
        """Return the trials that none beats in all of the objective's metrics, ordered by the first one."""
        costs = {
            trial.number: [axis.cost(trial.result or {}) for axis in self.objective.axes] for trial in self.complete
        }
        best = [t for t in self.complete if not any(dominates(other, costs[t.number]) for other in costs.values())]
        once = {tuple(costs[trial.number]): trial for trial in reversed(best)}
        return [once[key] for key in sorted(once)]

    def table(self) -> str:
        """Return one line a trial, the front marked, in Markdown."""
        metrics = [axis.metric for axis in self.objective.axes]
        front = {trial.number for trial in self.front()}
        lines = [f"| trial | {' | '.join(metrics)} | recipe |", f"| ---: |{' ---: |' * len(metrics)} --- |"]
        for trial in self.trials:
            given = [f"{trial.result[m]:,.6g}" if trial.result else trial.state for m in metrics]
            recipe = ", ".join(f"{path}={value}" for path, value in trial.recipe.items())
            marked = f"{trial.number} *" if trial.number in front else str(trial.number)
            lines.append(f"| {marked} | {' | '.join(given)} | {recipe}{': ' * bool(trial.reason)}{trial.reason} |")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw all trials over the first two metrics, with their front, as a PNG.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from lightning_compress.search.figures import plot_front

        return plot_front(self, path)


def _knee(front: Sequence[Trial]) -> Trial:
    columns = list(zip(*(trial.costs for trial in front), strict=True))
    lows, spans = [min(column) for column in columns], [(max(column) - min(column)) or 1.0 for column in columns]

    def away(trial: Trial) -> float:
        return math.hypot(*((cost - low) / span for cost, low, span in zip(trial.costs, lows, spans, strict=True)))

    return min(front, key=lambda trial: (away(trial), trial.number))
