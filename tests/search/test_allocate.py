"""Amounts under a budget, against all choices one by one."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_compress.search.allocate import allocate, joint_amounts, stored_bytes
from lightning_compress.search.refusals import ImpossibleBudget
from tests.quantization.test_allocation import summed


@st.composite
def instances(draw):
    """Up to five layers of up to four amounts, and a budget that some choice keeps."""
    harms, costs = {}, {}
    for index in range(draw(st.integers(1, 5))):
        amounts = [(round(0.1 * place, 1), 8) for place in range(draw(st.integers(1, 4)))]
        harms[f"layer{index}"] = {amount: draw(st.floats(-2.0, 20.0)) for amount in amounts}
        costs[f"layer{index}"] = {amount: draw(st.integers(0, 30)) for amount in amounts}
    least = sum(min(cost.values()) for cost in costs.values())
    return harms, costs, max(1, least + draw(st.integers(0, 60)))


def least_harm(harms, costs, budget):
    choices = [dict(zip(harms, choice, strict=True)) for choice in product(*harms.values())]
    return min(summed(harms, choice) for choice in choices if summed(costs, choice) <= budget)


@settings(max_examples=100, deadline=None)
@given(instances())
def test_the_exact_choice_is_the_best_of_all(instance):
    harms, costs, budget = instance
    found = allocate(harms, costs, budget)
    assert found.cost == summed(costs, found.amounts) <= budget
    assert found.harm == summed(harms, found.amounts) == least_harm(harms, costs, budget)
    assert found.gap == 0.0


@settings(max_examples=100, deadline=None)
@given(instances())
def test_the_greedy_choice_is_within_its_gap(instance):
    harms, costs, budget = instance
    found = allocate(harms, costs, budget, limit=0)
    best = least_harm(harms, costs, budget)
    assert summed(costs, found.amounts) == found.cost <= budget
    assert found.bound <= best + 1e-9
    assert best - 1e-9 <= found.harm <= best + found.gap + 1e-9


def test_greedy_leaves_a_gap_where_the_exact_choice_is_another():
    harms = {"a": {0: 10.0, 1: 0.0}, "b": {0: 9.0, 1: 0.0}}
    costs = {"a": {0: 0, 1: 6}, "b": {0: 0, 1: 5}}
    assert allocate(harms, costs, 5.9).amounts == {"a": 0, "b": 1}
    three = {"a": {0: 6.0, 1: 0.0}, "b": {0: 10.0, 1: 0.0}}
    cost = {"a": {0: 0, 1: 2}, "b": {0: 0, 1: 4}}
    exact, greedy = allocate(three, cost, 5), allocate(three, cost, 5, limit=0)
    assert (exact.harm, greedy.harm) == (6.0, 10.0)
    assert greedy.gap == pytest.approx(10.0 - (10.0 - 10.0 * 3 / 4))  # the relaxation takes three quarters of b


def test_an_impossible_budget_names_the_nearest_one():
    harms = {"a": {0.9: 1.0, 0.5: 0.0}, "b": {0.9: 1.0}}
    costs = {"a": {0.9: 40, 0.5: 200}, "b": {0.9: 2000}}
    with pytest.raises(ImpossibleBudget, match=r"budget 1,000 .* nearest that is possible is 2,040") as refused:
        allocate(harms, costs, 1000)
    assert refused.value.nearest == 2040
    assert allocate(harms, costs, refused.value.nearest).amounts == {"a": 0.9, "b": 0.9}


@pytest.mark.parametrize(
    ("harms", "costs", "budget", "said"),
    [
        ({}, {}, 1, "same layers in both tables"),
        ({"a": {1: 0.0}}, {"b": {1: 1}}, 1, "same layers in both tables"),
        ({"a": {1: 0.0}}, {"a": {2: 1}}, 1, "same amounts in both tables"),
        ({"a": {1: float("nan")}}, {"a": {1: 1}}, 1, "finite harm"),
        ({"a": {1: 0.0}}, {"a": {1: -1}}, 1, "cost from 0 on"),
        ({"a": {1: 0.0}}, {"a": {1: 1}}, 0, "positive number"),
    ],
)
def test_tables_that_do_not_fit_are_named(harms, costs, budget, said):
    with pytest.raises(ValueError, match=said):
        allocate(harms, costs, budget)


def test_bytes_of_both_techniques_are_those_of_the_smaller_form():
    assert stored_bytes(800, 4, 0.5, 4) == (400 * 4 + 800) // 8 + 16
    assert stored_bytes(800, 4, 0.1, 4) == 400 + 16  # a bit a weight would cost more than it saves
    harms, costs = joint_amounts({"a": {("sparsity", 0.5): -1.0, ("bits", 4): 2.0, ("bits", 8): 0.5}}, {"a": (800, 4)})
    assert harms == {"a": {(0.5, 4): 2.0, (0.5, 8): 0.5}}
    assert costs["a"][0.5, 4] == stored_bytes(800, 4, 0.5, 4)
