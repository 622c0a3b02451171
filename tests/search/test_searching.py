"""Searches that stop, fail, are killed, share a file, or are of another study."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_compress.search import searching, strategies
from lightning_compress.search.early import Median
from lightning_compress.search.history import History
from lightning_compress.search.objective import Pareto, Smallest
from lightning_compress.search.refusals import AnotherStudy, MetricMissing, NothingKept, NoTrialSucceeded
from lightning_compress.search.searching import Worker, search
from lightning_compress.search.space import Range

ROOT = Path(__file__).parents[2]
SPACE = {"sparsity": Range(0.5, 0.98), "bits": [8, 6, 4, 3, 2]}
OBJECTIVE = Smallest(dense=0.9, drop=0.02)


def toy(recipe, report):
    """A closed form: accuracy falls with sparsity and width, bytes with both."""
    lost = 0.1 * recipe["sparsity"] ** 12 + {8: 0.0, 6: 0.001, 4: 0.004, 3: 0.015, 2: 0.3}[recipe["bits"]]
    return {"accuracy": 0.9 - lost, "size_bytes": 1000 * (1 - recipe["sparsity"]) * recipe["bits"] / 8}


KILLED = """
import sys, time
from pathlib import Path
from tests.search.test_searching import OBJECTIVE, SPACE, Worker, search, strategies, toy

def slow(recipe, report, calls=[]):
    calls.append(0)
    if len(calls) == 13:
        Path(sys.argv[3]).write_text("in the middle")
        time.sleep(600)
    return toy(recipe, report)

search(slow, SPACE, OBJECTIVE, getattr(strategies, sys.argv[1]), 20, sys.argv[2], Worker(seed=3))
"""


def killed_in_the_middle(strategy: str, storage: Path, marker: Path) -> None:
    """Start a worker, and kill it, with no chance to clean up, in its 13th trial."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, strategy, str(storage), str(marker)]
    worker = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not marker.exists() and worker.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL, worker.stderr.read()
    worker.stderr.close()


@pytest.mark.parametrize(
    ("strategy", "name"), [("annealing", "s.db"), pytest.param("bayes", "s.journal", marks=pytest.mark.slow)]
)
def test_a_killed_worker_loses_its_running_trial_and_the_search_goes_on_as_it_would_have(tmp_path, strategy, name):
    storage = tmp_path / name
    killed_in_the_middle(strategy, storage, tmp_path / "marker")
    before = History(SPACE, OBJECTIVE, storage).trials()
    assert [trial.state for trial in before] == ["complete"] * 12 + ["running"]
    ran = []

    def counted(recipe, report):
        ran.append(recipe)
        return toy(recipe, report)

    resumed = search(counted, SPACE, OBJECTIVE, getattr(strategies, strategy), 20, storage, Worker(seed=3))
    whole = search(toy, SPACE, OBJECTIVE, getattr(strategies, strategy), 20, None, Worker(seed=3))
    assert len(ran) == 8  # the lost one again, and those that were missing
    assert [t.recipe for t in resumed.trials] == [t.recipe for t in whole.trials]
    assert (resumed.best.recipe, resumed.best.result) == (whole.best.recipe, whole.best.result)
    lost = History(SPACE, OBJECTIVE, storage).trials()[12]
    assert lost.state == "interrupted"
    assert "ended in the middle" in lost.reason


def test_a_finished_search_runs_nothing_and_more_trials_are_added(tmp_path):
    storage = tmp_path / "s.db"
    first = search(toy, SPACE, OBJECTIVE, strategies.evolution, 9, storage)
    assert search(None, SPACE, OBJECTIVE, strategies.evolution, 9, storage) == first
    more = search(toy, SPACE, OBJECTIVE, strategies.evolution, 12, storage)
    assert more.trials[:9] == first.trials
    assert len(more.trials) == 12


def test_workers_share_a_file_and_choose_differently(tmp_path):
    storage = tmp_path / "s.db"

    def work(index):
        def run(recipe, report):
            time.sleep(0.02)
            return {**toy(recipe, report), "worker": index}

        return search(run, SPACE, OBJECTIVE, strategies.random, 12, storage, Worker(index=index))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    found = search(toy, SPACE, OBJECTIVE, strategies.random, 12, storage)
    assert len(found.trials) == 12
    assert {trial.result["worker"] for trial in found.trials} == {0.0, 1.0}
    assert len({json.dumps(trial.recipe) for trial in found.trials}) == 12


@pytest.mark.parametrize(
    ("space", "objective", "about", "said"),
    [
        ({**SPACE, "bits": [8]}, OBJECTIVE, None, "space there is .* here"),
        (SPACE, Smallest(dense=0.9, drop=0.03), None, "objective there is .*drop=0.02.*drop=0.03"),
        (SPACE, OBJECTIVE, {"data": "others"}, "about there is .*others"),
    ],
)
def test_a_storage_of_another_study_is_refused(tmp_path, space, objective, about, said):
    search(toy, SPACE, OBJECTIVE, trials=2, storage=tmp_path / "s.db")
    with pytest.raises(AnotherStudy, match=said):
        search(toy, space, objective, trials=2, storage=tmp_path / "s.db", about=about)


def test_a_study_that_no_search_made_is_refused(tmp_path):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(storage=f"sqlite:///{tmp_path / 's.db'}", study_name="search")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(AnotherStudy, match="unknown"):
        search(toy, SPACE, OBJECTIVE, storage=tmp_path / "s.db")


def test_a_metric_that_never_appears_stops_after_the_first_trial():
    calls = []

    def run(recipe, report):
        calls.append(0)
        return {"acc": 0.9, "size_bytes": 10.0}

    with pytest.raises(MetricMissing, match="expected 'accuracy' in a trial's result, got acc, size_bytes"):
        search(run, SPACE, OBJECTIVE, trials=5)
    assert len(calls) == 1


def test_a_trial_that_fails_is_written_down_and_the_others_count():
    def run(recipe, report):
        if recipe["bits"] == 2:
            raise RuntimeError("diverged")
        return toy(recipe, report) if recipe["bits"] != 3 else {"accuracy": float("nan"), "size_bytes": 1}

    found = search(run, SPACE, OBJECTIVE, trials=20)
    reasons = {trial.recipe["bits"]: trial.reason for trial in found.trials if trial.state == "failed"}
    assert reasons == {2: "RuntimeError: diverged", 3: "ValueError: 'accuracy' of this trial is nan"}
    assert all(trial.recipe["bits"] > 3 for trial in found.complete)
    assert "RuntimeError: diverged |" in found.table()


def test_when_all_fail_the_first_cause_is_told():
    def run(recipe, report):
        raise OSError("no space left on device")

    with pytest.raises(NoTrialSucceeded, match=r"none of 3 trials .* OSError: no space left on device .*sparsity"):
        search(run, SPACE, OBJECTIVE, trials=3)


def test_an_interrupted_trial_counts_as_never_run(tmp_path):
    def run(recipe, report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(run, SPACE, OBJECTIVE, trials=3, storage=tmp_path / "s.db")
    assert len(search(toy, SPACE, OBJECTIVE, trials=3, storage=tmp_path / "s.db").trials) == 3


def test_a_trial_below_the_median_is_stopped_early():
    def run(recipe, report):
        for step in (1, 2):
            report(step, 1.0 if recipe["bits"] == 8 else 0.0)
        return toy(recipe, report)

    start = [{"sparsity": 0.5, "bits": bits} for bits in (8, 8, 8, 4, 8)]
    found = search(run, SPACE, OBJECTIVE, trials=5, worker=Worker(start=start, prune_early=Median(startup=3)))
    assert [trial.state for trial in found.trials] == ["complete"] * 3 + ["pruned", "complete"]
    assert found.trials[3].reports == {1: 0.0}
    assert found.trials[3].reason == "stopped at step 1 with 0"


def test_nothing_that_keeps_the_metric_names_the_nearest():
    found = search(toy, {"sparsity": [0.9, 0.95], "bits": [2]}, OBJECTIVE, trials=6)
    assert found.nearest.recipe["sparsity"] == 0.9
    with pytest.raises(NothingKept, match=r"kept accuracy >= 0.88; the nearest has 0.5718 .*'sparsity': 0.9"):
        _ = found.best


def test_ties_go_to_the_more_accurate_and_then_to_the_first():
    def run(recipe, report):
        return {"size_bytes": 10.0, "accuracy": 0.9 if recipe["bits"] in (6, 4) else 0.89}

    start = [{"sparsity": 0.5, "bits": bits} for bits in (8, 6, 4)]
    found = search(run, SPACE, OBJECTIVE, trials=3, worker=Worker(start=start))
    assert found.best.number == 1
    assert [trial.number for trial in found.front()] == [1]


def test_the_front_is_drawn(tmp_path):
    found = search(toy, SPACE, OBJECTIVE, trials=12)
    assert found.plot(tmp_path / "new" / "front.png").read_bytes().startswith(b"\x89PNG")
    both = search(toy, SPACE, Pareto({"size_bytes": "min", "accuracy": "max"}), trials=12)
    assert both.plot(tmp_path / "both.png").exists()


@pytest.mark.parametrize("trials", [0, True, 1.5])
def test_a_number_of_trials_that_is_none(trials):
    with pytest.raises(ValueError, match="trials is a whole number"):
        search(toy, SPACE, OBJECTIVE, trials=trials)


def test_a_first_recipe_that_is_not_of_the_space():
    with pytest.raises(ValueError, match="'bits' has"):
        search(toy, SPACE, OBJECTIVE, worker=Worker(start=[{"sparsity": 0.5, "bits": 7}]))


class Ring:
    """What a Trainer and its loops are: objects that hold each other, which only the garbage collector frees."""

    def __init__(self):
        self.itself = self


def test_what_a_long_trial_made_is_freed_before_the_next_one(monkeypatch):
    alive = []
    monkeypatch.setattr(searching, "LONG_TRIAL_S", 0.0)

    def run(recipe, report):
        assert [made() for made in alive] == [None] * len(alive)
        alive.append(weakref.ref(Ring()))
        if len(alive) == 2:
            raise ValueError("a trial that fails is cleared away too")
        return toy(recipe, report)

    gc.disable()  # it would run in its own time, which a model of 100 MB does not hurry
    try:
        search(run, SPACE, OBJECTIVE, strategies.random, 4)
    finally:
        gc.enable()
    assert len(alive) == 4
