"""The trials of a search, in an Optuna study: SQLite or a journal file that several workers share, or memory."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from lightning_compress.search.objective import Objective
from lightning_compress.search.refusals import AnotherStudy
from lightning_compress.search.space import Space, described_space
from lightning_compress.search.strategies import Trial
from lightning_compress.search.translation import as_params, as_recipe, distributions, quietly
from lightning_compress.search.workers import is_gone, this_process

__all__ = ["History"]

Ended = Literal["complete", "pruned", "failed"]
STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
NAMES: dict[TrialState, Any] = {state: name for name, state in STATES.items()} | {TrialState.RUNNING: "running"}
OPENINGS = 8
LOCK_SECONDS = 60  # how long a worker waits for another one that writes


class History:
    """The trials of one study, as they are in its storage now. Nothing is kept beside it.

    Args:
        space: what may be chosen.
        objective: what is made small.
        storage: a file, SQLite where it ends in .db or .sqlite, else a journal that is appended to; the URL of a
            database; or None, memory.
        name: of the study in the storage.
        about: what else makes trials comparable, such as the command that runs them; part of the fingerprint.

    Raises:
        AnotherStudy: the storage has a study of this name with another space, objective or `about`.
    """

    def __init__(
        self,
        space: Space,
        objective: Objective,
        storage: str | Path | None = None,
        name: str = "search",
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.space, self.objective = space, objective
        parts = {"space": described_space(space), "objective": repr(objective), "about": dict(about or {})}
        with quietly():
            self.storage = _opened(storage)
            try:
                self.study = self.storage.create_new_study([StudyDirection.MINIMIZE] * self._width(), name)
            except DuplicatedStudyError:
                self.study = self.storage.get_study_id_from_name(name)
        self._claim(parts, f"'{storage}'" if storage else "memory", name)

    def _width(self) -> int:
        return len(self.objective.costs(dict.fromkeys([axis.metric for axis in self.objective.axes], 1.0)))

    def _claim(self, parts: dict[str, Any], where: str, name: str) -> None:
        written = {part: json.dumps(value, sort_keys=True) for part, value in parts.items()}
        fingerprint = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
        saved = self.storage.get_study_user_attrs(self.study)
        if not saved and not self.storage.get_n_trials(self.study):
            # The fingerprint first: a worker that comes in between compares no more than that.
            for part, value in {"fingerprint": fingerprint, **written}.items():
                self.storage.set_study_user_attr(self.study, part, value)
        elif saved.get("fingerprint") != fingerprint:
            unlike = [part for part in written if saved.get(part) != written[part]]
            told = "; ".join(f"{part} there is {saved.get(part, 'unknown')}, here {written[part]}" for part in unlike)
            raise AnotherStudy(
                f"the study '{name}' in {where} is another one: {told}; go on with what it was started with, or give "
                f"another storage or name"
            )

    def trials(self) -> list[Trial]:
        """Return all trials with their energies, the interrupted ones too."""
        found = [self._read(trial) for trial in self.storage.get_all_trials(self.study, deepcopy=False)]
        complete = [trial for trial in found if trial.result is not None]
        energies = self.objective.energies([trial.result for trial in complete if trial.result is not None])
        by_number = {trial.number: energy for trial, energy in zip(complete, energies, strict=True)}
        return [replace(trial, energy=by_number.get(trial.number, trial.energy)) for trial in found]

    def _read(self, trial: FrozenTrial) -> Trial:
        notes = trial.user_attrs
        state: Any = "interrupted" if notes.get("interrupted") else NAMES[trial.state]
        result = notes.get("result") if state == "complete" else None
        return Trial(
            trial.number,
            as_recipe(self.space, trial.params),
            state,
            result,
            costs=tuple(self.objective.costs(result)) if result else (),
            violation=self.objective.violation(result) if result else math.inf,
            reports={int(step): value for step, value in notes.get("reports", {}).items()},
            reason=notes.get("reason", ""),
        )

    def begin(self, recipe: Mapping[str, Any]) -> tuple[int, int]:
        """Write a trial down as running here, in one transaction; return its identity in the storage and its number."""
        started = create_trial(
            state=TrialState.RUNNING,
            params=as_params(recipe, self.space),
            distributions=distributions(self.space),
            user_attrs={"owner": this_process()},
        )
        identity = self.storage.create_new_trial(self.study, started)
        return identity, self.storage.get_trial_number_from_id(identity)

    def report(self, identity: int, reports: Mapping[int, float]) -> None:
        """Write down what a trial has reported so far."""
        self.storage.set_trial_user_attr(identity, "reports", {str(step): value for step, value in reports.items()})

    def end(self, identity: int, state: Ended, result: Mapping[str, float] | None = None, reason: str = "") -> None:
        """Write down how a trial ended."""
        if reason:
            self.storage.set_trial_user_attr(identity, "reason", reason)
        values: Sequence[float] | None = None
        if result is not None:
            self.storage.set_trial_user_attr(identity, "result", dict(result))
            violation = self.objective.violation(result)
            self.storage.set_trial_system_attr(identity, "constraints", [violation])  # where Optuna looks for it
            values = self.objective.costs(result)
        self.storage.set_trial_state_values(identity, STATES[state], values)

    def interrupt(self, identity: int, reason: str) -> None:
        """Write down that a trial was lost, so that it counts as never run."""
        self.storage.set_trial_user_attr(identity, "interrupted", True)
        self.end(identity, "failed", reason=reason)

    def release(self) -> int:
        """Write down as lost each running trial whose process has ended; return how many."""
        running = self.storage.get_all_trials(self.study, deepcopy=False, states=(TrialState.RUNNING,))
        lost = [trial for trial in running if is_gone(trial.user_attrs["owner"])]
        for trial in lost:
            identity = self.storage.get_trial_id_from_study_id_trial_number(self.study, trial.number)
            with suppress(UpdateFinishedTrialError):  # another worker has written it down
                self.interrupt(identity, f"its process {trial.user_attrs['owner']['pid']} ended in the middle of it")
        return len(lost)


def _opened(storage: str | Path | None) -> BaseStorage:
    if storage is None:
        return InMemoryStorage()
    if "://" in str(storage):
        return RDBStorage(str(storage))
    path = Path(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".db", ".sqlite", ".sqlite3"):
        return _sqlite(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _sqlite(path: Path) -> RDBStorage:
    """Open a file, again where another worker was making the same tables."""
    for attempt in range(1, OPENINGS):
        try:
            return _sqlite_once(path)
        except (SQLAlchemyError, StorageInternalError):
            time.sleep(0.1 * attempt)
    return _sqlite_once(path)


def _sqlite_once(path: Path) -> RDBStorage:
    return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}})
