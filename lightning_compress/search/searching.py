"""A search over recipes: ask a strategy, run the trial, write down what came of it, until there are enough."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_compress.search.early import Median, Stopped
from lightning_compress.search.found import Found
from lightning_compress.search.objective import Objective, checked_result
from lightning_compress.search.refusals import MetricMissing, NoTrialSucceeded
from lightning_compress.search.space import Recipe, Space, check_recipe, checked_space
from lightning_compress.search.strategies import Strategy, Trial, random

if TYPE_CHECKING:
    from lightning_compress.search.history import History

__all__ = ["Report", "Run", "Worker", "search"]

Report = Callable[[int, float], None]
Run = Callable[[Recipe, Report], Mapping[str, float]]

_log = logging.getLogger(__name__)
LONG_TRIAL_S = 1.0


@dataclass(frozen=True)
class Worker:
    """How one process or thread searches; others may search the same storage at the same time.

    Args:
        seed: of its choices; the same seed and history give the same next recipe.
        index: of this worker, so that no two choose the same.
        start: recipes that are tried first, in this order, before the strategy is asked.
        prune_early: rule that stops a trial from what it reported; None stops none.
        catch: errors of the run that fail its trial only; others end the search.
    """

    seed: int = 0
    index: int = 0
    start: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    prune_early: Median | None = None
    catch: tuple[type[Exception], ...] = (Exception,)


def search(
    run: Run,
    space: Space,
    objective: Objective,
    strategy: Strategy = random,
    trials: int = 20,
    storage: str | Path | None = None,
    worker: Worker | None = None,
    about: Mapping[str, Any] | None = None,
) -> Found:
    """Try recipes until the storage holds `trials` of them, and return what was found. Runs before the training proper.

    A storage with trials is gone on with: a search that was killed loses the running trial at most, and its next
    choices are those it would have made. Several processes may call it with one storage file at the same time.

    Args:
        run: (recipe, report) -> metrics, such as {"accuracy": 0.9, "size_bytes": 1000}; it may call
            report(step, value) with a value of which more is better, and must let pass what that raises.
        space: option path -> range or choices.
        objective: what makes a trial better.
        strategy: (space, history, generator) -> recipe.
        trials: how many there shall be in the storage, of all workers; failed and early stopped ones count.
        storage: a file (.db, .sqlite: SQLite; others: a journal), the URL of a database, or None: memory.
        worker: seed, first recipes and early stopping.
        about: what else makes trials comparable; a storage with something else is refused.

    Raises:
        ValueError: no trials, an empty space, a first recipe that is not of the space.
        AnotherStudy: the storage holds the trials of another space, objective or `about`.
        MetricMissing: a trial's result lacks a metric of the objective.
        NoTrialSucceeded: no trial came to a result; the first one's message is told.
        ImportError: optuna is not installed.

    >>> from lightning_compress.search.objective import Smallest
    >>> def run(recipe, report):
    ...     return {"size_bytes": recipe["bits"] * 100, "accuracy": 0.9 if recipe["bits"] > 2 else 0.5}
    >>> search(run, {"bits": [8, 4, 2]}, Smallest(dense=0.9), trials=10).best.recipe
    {'bits': 4}
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"trials is a whole number from 1 on, got {trials!r}")
    space, worker = checked_space(space), worker or Worker()
    for recipe in worker.start:
        check_recipe(space, recipe)
    history = _history(space, objective, storage, about)
    while _one_more(history, run, strategy, trials, worker):
        pass
    found = history.trials()
    if not any(trial.state in ("complete", "running") for trial in found):
        first = next((trial for trial in found if trial.reason), found[0])
        raise NoTrialSucceeded(
            f"none of {len(found)} trials came to a result; the first failed with: {first.reason} (its recipe: "
            f"{json.dumps(first.recipe)})"
        )
    return Found(tuple(trial for trial in found if trial.state != "interrupted"), objective)


def _history(
    space: Space, objective: Objective, storage: str | Path | None, about: Mapping[str, Any] | None
) -> History:
    try:
        from lightning_compress.search.history import History
    except ImportError as error:
        raise ImportError("a search needs optuna: pip install 'lightning-compress[search]'") from error
    return History(space, objective, storage, about=about)


def _one_more(history: History, run: Run, strategy: Strategy, trials: int, worker: Worker) -> bool:
    """Run one trial; say whether there was room for it."""
    history.release()
    past = _counted(history.trials())
    if len(past) >= trials:
        return False
    if len(past) < len(worker.start):
        recipe = dict(worker.start[len(past)])
    else:
        generator = np.random.default_rng([worker.seed, worker.index, len(past)])
        recipe = strategy(history.space, past, generator)
        check_recipe(history.space, recipe)
    identity, number = history.begin(recipe)
    if sum(trial.number < number for trial in _counted(history.trials())) >= trials:
        history.interrupt(identity, "another worker had begun the last trial")
        return False
    _settle(history, run, recipe, identity, worker)
    return True


def _counted(found: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in found if trial.state != "interrupted"]


def _settle(history: History, run: Run, recipe: Recipe, identity: int, worker: Worker) -> None:
    reports: dict[int, float] = {}
    began = time.monotonic()

    def report(step: int, value: float) -> None:
        reports[int(step)] = float(value)
        history.report(identity, reports)
        if worker.prune_early is not None and worker.prune_early(reports, history.trials()):
            raise Stopped(f"stopped at step {step} with {value:.6g}")

    try:
        result = checked_result(history.objective, run(dict(recipe), report))
    except Stopped as stopped:
        history.end(identity, "pruned", reason=str(stopped))
    except MetricMissing as error:
        history.end(identity, "failed", reason=str(error))
        raise
    except worker.catch as error:
        reason = f"{type(error).__name__}: {error}"
        _log.warning("A trial failed, %s: %s", json.dumps(recipe), reason)
        history.end(identity, "failed", reason=reason)
    except BaseException as error:
        history.interrupt(identity, f"{type(error).__name__} ended the search")
        raise
    else:
        history.end(identity, "complete", result)
    finally:
        # A Trainer and its loops hold each other, and the collector doesn't know how large their model is: twenty
        # fine-tunes of a MiniLM would hold 8 GB. Going through all of a process takes up to a second, though.
        if time.monotonic() - began > LONG_TRIAL_S:
            gc.collect()
