"""A space and its trials in Optuna's words. The only file of the search, beside `history`, that knows its types."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_compress.search.space import Range, Recipe, Space
from lightning_compress.search.strategies import Trial

__all__ = ["as_params", "as_recipe", "constraint_options", "distributions", "frozen", "quietly"]

PLAIN = (bool, int, float, str, type(None))


@contextmanager
def quietly() -> Iterator[None]:
    """Keep Optuna, inside the block, from logging each study, and from calling its settled features experimental.

    >>> with quietly():
    ...     study = optuna.create_study()
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


def constraint_options() -> dict[str, Any]:
    """Return what a sampler must be told to heed the trials' constraints: from Optuna 5 on nothing.

    >>> set(constraint_options()) <= {"constraints_func"}
    True
    """
    if int(optuna.__version__.partition(".")[0]) >= 5:
        return {}
    return {"constraints_func": lambda trial: trial.system_attrs["constraints"]}


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return Optuna's distribution of each option.

    >>> distributions({"bits": [8, [4, 4]]})
    {'bits': CategoricalDistribution(choices=(8, '[4, 4]'))}
    """
    return {path: _distribution(own) for path, own in space.items()}


def _distribution(own: Range | Sequence[Any]) -> BaseDistribution:
    if not isinstance(own, Range):
        return CategoricalDistribution([_written(choice) for choice in own])
    high = own.high if own.step is None else own.snapped(own.high)  # Optuna wants a whole number of steps
    if own.whole:
        return IntDistribution(int(own.low), int(high), own.log, int(own.step or 1))
    return FloatDistribution(own.low, high, own.log, own.step)


def _written(choice: Any) -> Any:
    """Return a choice as a storage keeps it: lists and mappings as JSON."""
    return choice if isinstance(choice, PLAIN) else json.dumps(choice)


def as_params(recipe: Mapping[str, Any], space: Space) -> dict[str, Any]:
    """Return a recipe as Optuna's parameters.

    >>> as_params({"bits": [4, 4]}, {"bits": [8, [4, 4]]})
    {'bits': '[4, 4]'}
    """
    return {
        path: recipe[path] if isinstance(own, Range) else _written(recipe[path]) for path, own in space.items()
    }  # fmt: skip


def as_recipe(space: Space, params: Mapping[str, Any]) -> Recipe:
    """Return Optuna's parameters as a recipe.

    >>> as_recipe({"bits": [8, [4, 4]]}, {"bits": "[4, 4]"})
    {'bits': [4, 4]}
    """
    return {
        path: own.snapped(params[path]) if isinstance(own, Range) else _read(own, params[path])
        for path, own in space.items()
    }


def _read(choices: Sequence[Any], param: Any) -> Any:
    return next(c for c in choices if type(_written(c)) is type(param) and _written(c) == param)


def frozen(space: Space, history: Sequence[Trial]) -> list[FrozenTrial]:
    """Return trials as Optuna's sampler learns from them: those without a result as the worst of all.

    >>> [trial.values for trial in frozen({"bits": [8, 4]}, [Trial(0, {"bits": 8}, costs=(5.0,), violation=0.0)])]
    [[5.0]]
    """
    known = [trial for trial in history if trial.state == "complete"]
    if not known:
        return []
    worst = np.max([trial.costs for trial in known], axis=0).tolist()
    broken = max(0.0, max(trial.violation for trial in known)) + 1.0
    return [_frozen(space, trial, worst, broken) for trial in history]


def _frozen(space: Space, trial: Trial, worst: list[float], broken: float) -> FrozenTrial:
    params, given = as_params(trial.recipe, space), distributions(space)
    if trial.state == "running":
        return create_trial(state=TrialState.RUNNING, params=params, distributions=given)
    known = trial.state == "complete"
    return create_trial(
        values=list(trial.costs) if known else worst,
        params=params,
        distributions=given,
        system_attrs={"constraints": [trial.violation if known else broken]},
    )
