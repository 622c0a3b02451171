"""Strategies as functions: inside the space, the same for the same history, and better than chance on a known bowl."""

from __future__ import annotations

import math
from functools import partial
from statistics import mean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.search.objective import Pareto, Smallest, dominates
from lightning_compress.search.searching import Worker, search
from lightning_compress.search.space import Range, check_recipe, checked_space, neighbour, sample
from lightning_compress.search.strategies import Trial, annealing, bayes, evolution, random

ALL = [random, annealing, evolution, bayes]
SPACE = {
    "a": Range(0.0, 1.0),
    "b": Range(0.0, 1.0),
    "c": Range(2, 8),
    "d": Range(1e-4, 1e-1, log=True),
    "e": ["x", None, [0.1, 0.7]],
}


def bowl(recipe, report):
    """Least at a = 0.3, b = 0.8, c = 5, d = 0.01, e = [0.1, 0.7], under the constraint a <= 0.5."""
    away = (recipe["a"] - 0.3) ** 2 + (recipe["b"] - 0.8) ** 2 + ((recipe["c"] - 5) / 6) ** 2
    away += (math.log10(recipe["d"] / 0.01) / 3) ** 2 + (0.0 if recipe["e"] == [0.1, 0.7] else 0.3)
    return {"size_bytes": 1.0 + 100.0 * away, "accuracy": 0.9 if recipe["a"] <= 0.5 else 0.5}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_samples_and_neighbours_stay_inside_and_move(seed, stepped):
    generator = np.random.default_rng(seed)
    space = checked_space({**SPACE, "s": Range(0.5, 0.97, step=0.05 if stepped else None)})
    recipe = sample(space, generator)
    check_recipe(space, recipe)
    for _ in range(5):
        moved = neighbour(space, recipe, generator)
        check_recipe(space, moved)
        assert moved != recipe
        recipe = moved


@pytest.mark.parametrize("strategy", ALL, ids=lambda strategy: strategy.__name__)
def test_the_same_seed_gives_the_same_search_and_another_one_another(strategy):
    objective = Smallest(dense=0.9)
    first, again, other = (
        [t.recipe for t in search(bowl, SPACE, objective, strategy, 14, worker=Worker(seed=seed)).trials]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert len({str(recipe) for recipe in first}) == 14


@pytest.mark.parametrize("strategy", [annealing, evolution, bayes], ids=lambda strategy: strategy.__name__)
def test_what_was_learned_beats_chance(strategy):
    def found(way):
        runs = (search(bowl, SPACE, Smallest(dense=0.9), way, 45, worker=Worker(seed=seed)) for seed in range(3))
        return mean(run.best.result["size_bytes"] for run in runs)

    assert found(strategy) < 0.8 * found(random)


def test_a_cold_walk_stands_at_the_lowest_and_a_hot_one_at_the_last():
    space = {"a": Range(0, 1000)}
    for seed in range(20):
        generator = np.random.default_rng(seed)
        done = [Trial(i, {"a": place}, energy=e) for i, (place, e) in enumerate([(0, 3.0), (500, 1.0), (1000, 2.0)])]
        step = annealing(space, done, np.random.default_rng(seed), hot=1e-6, cold=1e-6)
        assert step == neighbour(space, {"a": 500}, generator)
        generator = np.random.default_rng(seed)
        step = annealing(space, done, np.random.default_rng(seed), hot=1e9, cooling=1.0)
        assert step == neighbour(space, {"a": 1000}, generator)


def test_a_worse_trial_is_accepted_as_often_as_the_formula_says():
    space, rise, hot = {"a": Range(0, 10**6)}, 0.5, 1.0
    stayed = neighbour(space, {"a": 0}, np.random.default_rng(0))
    taken = 0
    for place in range(1000, 5000):
        done = [Trial(0, {"a": 0}, energy=0.0), Trial(1, {"a": place}, energy=rise)]
        taken += annealing(space, done, np.random.default_rng(0), hot=hot, cooling=1.0) != stayed
    assert taken / 4000 == pytest.approx(math.exp(-rise / hot), abs=4 * math.sqrt(0.24 / 4000))


def test_the_oldest_of_a_population_dies_although_it_was_the_best():
    space = {"a": Range(0, 1000)}
    done = [Trial(i, {"a": a}, energy=e) for i, (a, e) in enumerate([(0, -9.0), (500, 2.0), (1000, 1.0)])]
    for seed in range(10):
        generator = np.random.default_rng(seed)
        generator.choice(2, size=2, replace=False)
        child = evolution(space, done, np.random.default_rng(seed), population=2, tournament=2)
        assert child == neighbour(space, {"a": 1000}, generator, changes=1.0)


def test_trials_without_a_result_move_nothing_and_break_nothing():
    failed = [Trial(i, {"a": 0.5}, "failed") for i in range(12)]
    for strategy in ALL:
        check_recipe({"a": Range(0.0, 1.0)}, strategy({"a": Range(0.0, 1.0)}, failed, np.random.default_rng(0)))


def test_bayes_heeds_the_constraint():
    found = search(bowl, SPACE, Smallest(dense=0.9), partial(bayes, startup=10), 40)
    late = found.trials[20:]
    assert sum(trial.violation <= 0 for trial in late) > 0.7 * len(late)


@pytest.mark.parametrize("strategy", ALL, ids=lambda strategy: strategy.__name__)
def test_a_front_is_what_none_dominates(strategy):
    def run(recipe, report):
        return {"ms": recipe["a"] + 0.1 * recipe["b"], "accuracy": math.sqrt(recipe["a"]) - 0.2 * recipe["b"]}

    space = {"a": Range(0.0, 1.0), "b": Range(0.0, 1.0)}
    found = search(run, space, Pareto({"ms": "min", "accuracy": "max"}), strategy, 25)
    costs = {trial.number: (trial.result["ms"], -trial.result["accuracy"]) for trial in found.trials}
    expected = {n for n, own in costs.items() if not any(dominates(other, own) for other in costs.values())}
    assert {trial.number for trial in found.front()} == expected
    assert found.best.number in expected


@pytest.mark.parametrize(
    ("space", "error", "said"),
    [
        ({}, ValueError, "at least one option"),
        ({"a": []}, ValueError, "at least one"),
        ({"a": [1, 1]}, ValueError, "different choices"),
        ({"a": 5}, TypeError, "a Range or a list"),
        ({"a": "xyz"}, TypeError, "a Range or a list"),
    ],
)
def test_a_space_that_is_none_is_named(space, error, said):
    with pytest.raises(error, match=said):
        search(bowl, space, Smallest(dense=0.9))


@pytest.mark.parametrize("options", [(1, 0), (0.0, float("inf")), (0, 1, 0.1, True), (0.0, 1.0, None, True)], ids=str)
def test_a_range_that_is_none_is_named(options):
    with pytest.raises(ValueError, match=r"range|step"):
        Range(*options)
