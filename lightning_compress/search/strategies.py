"""How the next recipe is chosen. Each strategy is a function of the space, the trials so far and a generator.

It keeps nothing between calls, so that a search that was stopped goes on as if it had not been. Settings other than
the defaults: `functools.partial(annealing, hot=1.0)`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from lightning_compress.search.space import Recipe, Space, neighbour, sample

__all__ = ["Strategy", "Trial", "annealing", "bayes", "evolution", "random"]


@dataclass(frozen=True)
class Trial:
    """One trial as strategies see it: what was tried and what came of it.

    Args:
        number: counts all trials of a study.
        recipe: option path -> value.
        state: "pruned" was stopped early, "interrupted" lost with its process; that one no strategy sees.
        result: metrics, where it is complete.
        costs: what is made small, one number for each direction of the objective.
        violation: by how much it breaks what must be kept; 0 or less keeps it.
        energy: one number for strategies that walk, less is better; infinite where there is no result.
        reports: step -> value, more is better, as the run reported them.
        reason: why it failed.
    """

    number: int
    recipe: Recipe
    state: Literal["complete", "pruned", "failed", "running", "interrupted"] = "complete"
    result: dict[str, float] | None = None
    costs: tuple[float, ...] = ()
    violation: float = math.inf
    energy: float = math.inf
    reports: dict[int, float] = field(default_factory=dict)
    reason: str = ""


Strategy = Callable[[Space, Sequence[Trial], np.random.Generator], Recipe]


def random(space: Space, history: Sequence[Trial], generator: np.random.Generator) -> Recipe:
    """Draw each option evenly on its own. Runs before each trial.

    >>> random({"bits": [8]}, [], np.random.default_rng(0))
    {'bits': 8}
    """
    return sample(space, generator)


def annealing(
    space: Space,
    history: Sequence[Trial],
    generator: np.random.Generator,
    hot: float = 0.3,
    cooling: float = 0.9,
    cold: float = 0.01,
) -> Recipe:
    """Step from the recipe where the walk stands, by simulated annealing. Runs before each trial.

    The walk went to trial i if its energy E was lower, or with probability exp(-(E_i - E) / T_i), where
    T_i = max(cold, hot x cooling^i). Energies are logarithms of the size (`Smallest`): T = 0.3 takes a file larger by
    35 % with probability 1/e. The chance is drawn from the trial itself, so that a resumed search walks the same way.
    Kirkpatrick et al. 1983.

    Args:
        space: what may be chosen.
        history: the trials so far.
        generator: draws the step.
        hot: temperature of the first trial.
        cooling: factor of the temperature from one trial to the next.
        cold: lowest temperature, above 0.

    >>> done = [Trial(0, {"bits": 8}, energy=2.0), Trial(1, {"bits": 6}, energy=1.0)]
    >>> annealing({"bits": [8, 6, 4, 2]}, done, np.random.default_rng(0))
    {'bits': 8}
    """
    stands: Trial | None = None
    settled = [trial for trial in history if trial.state != "running"]
    for index, trial in enumerate(settled):
        temperature = max(cold, hot * cooling**index)
        rise = math.inf if not math.isfinite(trial.energy) else trial.energy - (stands.energy if stands else math.inf)
        if rise <= 0 or _chance(index, trial.recipe) < math.exp(-rise / temperature):
            stands = trial
    return neighbour(space, stands.recipe, generator) if stands else sample(space, generator)


def _chance(index: int, recipe: Recipe) -> float:
    """Return a number in [0, 1) that looks random and is the same for the same trial."""
    text = json.dumps([index, recipe], sort_keys=True).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big") / 2.0**56


def evolution(
    space: Space,
    history: Sequence[Trial],
    generator: np.random.Generator,
    population: int = 8,
    tournament: int = 3,
) -> Recipe:
    """Change the best of a few recent recipes, by regularized (aging) evolution. Runs before each trial.

    The population is the last `population` trials with a result: the oldest dies, not the worst. Real et al. 2019,
    "Regularized Evolution for Image Classifier Architecture Search", algorithm 1.

    Args:
        space: what may be chosen.
        history: the trials so far.
        generator: draws the tournament and the change.
        population: how many live; so many are drawn at random first.
        tournament: how many of them are compared.

    >>> done = [Trial(i, {"bits": bits}, energy=-bits) for i, bits in enumerate([8, 4])]
    >>> evolution({"bits": [8, 6, 4]}, done, np.random.default_rng(0), population=2, tournament=2)
    {'bits': 6}
    """
    alive = [trial for trial in history if math.isfinite(trial.energy)][-population:]
    if len(history) < population or not alive:
        return sample(space, generator)
    drawn = generator.choice(len(alive), size=min(tournament, len(alive)), replace=False)
    parent = min((alive[int(index)] for index in drawn), key=lambda trial: (trial.energy, trial.number))
    return neighbour(space, parent.recipe, generator, changes=1.0)


def bayes(
    space: Space,
    history: Sequence[Trial],
    generator: np.random.Generator,
    startup: int = 8,
    candidates: int = 64,
) -> Recipe:
    """Draw from densities of good and bad recipes, by Optuna's multivariate TPE. Runs before each trial.

    Trials that break what must be kept rank after all that keep it, by how much; those that failed or were stopped
    early rank last; those that still run count as bad where they are (constant liar). Bergstra et al. 2011.

    Args:
        space: what may be chosen.
        history: the trials so far.
        generator: seeds the sampler.
        startup: trials that are drawn at random first.
        candidates: recipes drawn from the density of the good ones, of which the most promising is tried.

    Raises:
        ImportError: optuna is not installed.

    >>> bayes({"bits": [8]}, [], np.random.default_rng(0))
    {'bits': 8}
    """
    if len(history) < startup:
        return sample(space, generator)
    import optuna

    from lightning_compress.search.translation import (
        as_recipe,
        constraint_options,
        distributions,
        frozen,
        quietly,
    )

    with quietly():
        sampler = optuna.samplers.TPESampler(
            seed=int(generator.integers(2**31)),
            multivariate=True,
            n_startup_trials=0,
            n_ei_candidates=candidates,
            constant_liar=True,
            **constraint_options(),
        )
        seen = frozen(space, history)
        width = max((len(trial.values) for trial in seen if trial.values), default=1)
        study = optuna.create_study(directions=["minimize"] * width, sampler=sampler)
        study.add_trials(seen)
        return as_recipe(space, study.ask(distributions(space)).params)
