"""The exact choice of widths, against all choices one by one."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_compress.quantization.allocation import allocate

WIDTHS = (2, 3, 4, 6, 8)


@st.composite
def instances(draw, harm):
    """Up to six layers with their own widths, costs and sensitivities, and a budget that some choice keeps."""
    sensitivities, costs = {}, {}
    for index in range(draw(st.integers(1, 6))):
        widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=5, unique=True))
        sensitivities[f"layer{index}"] = {bits: draw(harm) for bits in widths}
        costs[f"layer{index}"] = {bits: draw(st.integers(0, 30)) for bits in widths}
    least = sum(min(cost.values()) for cost in costs.values())
    return sensitivities, costs, max(1, least + draw(st.integers(0, 60)))


def summed(table, chosen):
    total = 0
    for name, bits in chosen.items():
        total += table[name][bits]
    return total


def by_brute_force(sensitivities, costs, budget):
    choices = [dict(zip(sensitivities, c, strict=True)) for c in product(*map(sorted, sensitivities.values()))]
    fitting = [choice for choice in choices if summed(costs, choice) <= budget]
    return min(fitting, key=lambda c: (summed(sensitivities, c), summed(costs, c), tuple(c.values())))


@settings(max_examples=300, deadline=None)
@given(instances(st.integers(-5, 20).map(float)))
@example(({"a": {2: 0.0}}, {"a": {2: 0}}, 1))
def test_the_choice_is_the_best_of_all_and_ties_are_broken_as_said(instance):
    assert allocate(*instance) == by_brute_force(*instance)


@settings(max_examples=300, deadline=None)
@given(instances(st.floats(-1e3, 1e6)))
def test_no_choice_sums_to_less_in_floats(instance):
    sensitivities, costs, budget = instance
    chosen, best = allocate(*instance), by_brute_force(*instance)
    assert summed(costs, chosen) <= budget
    assert summed(sensitivities, chosen) == summed(sensitivities, best)
    assert summed(costs, chosen) == summed(costs, best)


def by_table(sensitivities, costs, budget):
    """The textbook's dynamic program over every budget up to this one."""
    table = np.zeros(budget + 1)
    for name, harms in sensitivities.items():
        rows = [np.full(budget + 1, np.inf) for _ in harms]
        for row, (bits, harm) in zip(rows, harms.items(), strict=True):
            cost = costs[name][bits]
            row[cost:] = table[: budget + 1 - cost] + harm
        table = np.min(rows, axis=0)
    return table[budget]


@pytest.mark.parametrize("seed", range(3))
def test_a_network_of_a_hundred_layers_takes_no_time(seed):
    random = np.random.default_rng(seed)
    weights = np.exp(random.normal(3, 1.5, 100)).astype(int) + 1
    curvature = np.exp(random.normal(0, 2, 100))
    costs = {f"{i}": {b: int(n * b) for b in WIDTHS} for i, n in enumerate(weights)}
    sensitivities = {f"{i}": {b: float(c * 4.0**-b) for b in WIDTHS} for i, c in enumerate(curvature)}
    budget = sum(cost[4] for cost in costs.values())
    started = time.process_time()
    chosen = allocate(sensitivities, costs, budget)
    assert time.process_time() - started < 5
    assert summed(costs, chosen) <= budget
    assert summed(sensitivities, chosen) == pytest.approx(by_table(sensitivities, costs, budget), rel=1e-12)


HARM, COST = {"a": {2: 1.0, 8: 0.0}, "b": {2: 3.0, 8: 0.5}}, {"a": {2: 10, 8: 40}, "b": {2: 5, 8: 20}}


@pytest.mark.parametrize("budget", [0, -1, float("nan"), True, "100"])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ValueError, match="positive number"):
        allocate(HARM, COST, budget)


def test_the_smallest_feasible_budget_is_named_and_is_feasible():
    with pytest.raises(ValueError, match=r"smallest feasible budget of these 2 layers is 15;"):
        allocate(HARM, COST, 14)
    assert allocate(HARM, COST, 15) == {"a": 2, "b": 2}


def test_a_budget_beyond_all_takes_what_harms_least():
    assert allocate(HARM, COST, float("inf")) == {"a": 8, "b": 8}
    assert allocate({"a": {4: -1.0, 8: 0.0}}, {"a": {4: 1, 8: 2}}, 100) == {"a": 4}


@pytest.mark.parametrize(
    ("harm", "cost", "message"),
    [
        ({}, {}, "the same layers"),
        ({"a": {2: 0.0}}, {"b": {2: 1}}, "the same layers"),
        ({"a": {2: 0.0}}, {"a": {3: 1}}, "in 'a'"),
        ({"a": {}}, {"a": {}}, "in 'a'"),
        ({"a": {2: float("nan")}}, {"a": {2: 1}}, "got nan and 1 in 'a' at 2 bits"),
        ({"a": {2: 0.0}}, {"a": {2: -1}}, "in 'a' at 2 bits"),
        ({"a": {9: 0.0}}, {"a": {9: 1}}, "from 2 to 8"),
    ],
)
def test_tables_that_do_not_fit_are_refused(harm, cost, message):
    with pytest.raises(ValueError, match=message):
        allocate(harm, cost, 100)
