"""Claims meet by action and name; other orders are fine, Lightning's ModelPruning is not."""

from __future__ import annotations

import itertools

import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelPruning

from lightning_compress.callbacks.order import Claim, check_claims, check_together
from lightning_compress.errors import IncompatibleCallbacks


class Claims:
    def __init__(self, action, *names, owner="One"):
        self.claimed = [Claim(owner, action, frozenset(names))] if names else []

    def claims(self):
        return self.claimed


def test_two_of_one_action_on_one_name_are_refused_with_both_owners_and_the_name():
    one, two = Claim("One", "prune", frozenset({"a", "b", "c"})), Claim("Two", "prune", frozenset({"c", "b"}))
    with pytest.raises(
        IncompatibleCallbacks, match="One and Two both prune b and 1 more; give each its own include/excl"
    ):
        check_claims([one, two])


@pytest.mark.parametrize(
    "claims",
    [
        [],
        [("prune", "a"), ("prune", "b")],
        [("prune", "a"), ("quantize", "a"), ("distil", "training_step")],
        [("prune",), ("prune",)],
    ],
)
def test_claims_that_can_meet_do_so_in_any_order(claims):
    for order in itertools.permutations(claims):
        check_together([Claims(*claim) for claim in order])


@pytest.mark.parametrize("action", ["prune", "quantize", "distil"])
def test_the_second_of_three_is_found_in_any_order(action):
    clashing = [Claims(action, "a"), Claims(action, "b"), Claims(action, "a", owner="Two")]
    for order in itertools.permutations(clashing):
        with pytest.raises(IncompatibleCallbacks, match=f"both {action} a; "):
            check_together([*order, EarlyStopping("loss")])


@pytest.mark.parametrize("action", ["prune", "quantize"])
def test_lightnings_model_pruning_is_refused_beside_ours(action):
    theirs = ModelPruning("l1_unstructured", amount=0.5)
    with pytest.raises(IncompatibleCallbacks, match="remove it and use GradualPruning"):
        check_together([theirs, Claims(action, "a")])
    check_together([theirs, Claims("distil", "training_step")])
    check_together([theirs, Claims(action)])  # switched off
