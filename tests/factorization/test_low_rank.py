"""Decompositions against numpy and their defining optimum; ranks by energy, by savings and by a budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress import NothingToCompress
from lightning_compress.factorization.ranks import Budget, Energy, check_rank, chosen_ranks, rank_that_saves
from lightning_compress.factorization.svd import activation_weighted_svd, fisher_weighted_svd, svd


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_plain_error_is_numpys_dropped_singular_values(rank):
    weight = drawn(7, 5)
    left, right = svd(weight).truncated(rank)
    dropped = np.linalg.svd(weight.numpy(), compute_uv=False)[rank:]
    assert float((weight - left @ right).square().sum()) == pytest.approx((dropped**2).sum(), abs=1e-12)


def test_signs_do_not_hang_on_rounding():
    weight = drawn(7, 5)
    one, other = svd(weight), svd(weight + 1e-9 * drawn(7, 5, seed=9))
    torch.testing.assert_close(one.left, other.left, atol=1e-6, rtol=0)
    torch.testing.assert_close(one.right, other.right, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_activation_weighted_error_is_the_cholesky_bound_and_below_plain(rank):
    weight, inputs = drawn(7, 5), drawn(200, 5, seed=1) * torch.tensor([9.0, 3, 1, 0.3, 0.1])
    moment = inputs.T @ inputs / 200

    def error(factors):
        return float((inputs @ (weight - factors[0] @ factors[1]).T).square().sum()) / 200

    found = activation_weighted_svd(weight, moment, damping=0.0)
    bound = np.linalg.svd(weight.numpy() @ np.linalg.cholesky(moment.numpy()), compute_uv=False)
    assert found.values.numpy() == pytest.approx(bound)
    assert error(found.truncated(rank)) == pytest.approx((bound[rank:] ** 2).sum(), rel=1e-9)
    assert error(found.truncated(rank)) < error(svd(weight).truncated(rank))
    torch.testing.assert_close(torch.matmul(*found.truncated(5)), weight)


def test_a_singular_moment_keeps_outputs_exact_at_its_rank():
    weight, inputs = drawn(7, 5), drawn(50, 2, seed=1) @ drawn(2, 5, seed=2)
    left, right = activation_weighted_svd(weight, inputs.T @ inputs, damping=0.0).truncated(2)
    torch.testing.assert_close(inputs @ right.T @ left.T, inputs @ weight.T)


def test_damping_is_a_share_of_the_mean_diagonal():
    weight, moment = drawn(7, 5), torch.diag(torch.tensor([8.0, 0, 0, 0, 2]).double())
    found = activation_weighted_svd(weight, moment, damping=0.5)
    same = activation_weighted_svd(weight, moment + torch.eye(5), damping=0.0)
    torch.testing.assert_close(found.values, same.values)


def test_fisher_weighted_error_is_numpys_bound():
    weight, fisher = drawn(7, 5), drawn(7, 5, seed=3).square()
    left, right = fisher_weighted_svd(weight, fisher).truncated(2)
    rows = fisher.sum(1).numpy()
    bound = np.linalg.svd(np.sqrt(rows)[:, None] * weight.numpy(), compute_uv=False)[2:]
    got = (rows[:, None] * (weight - left @ right).numpy() ** 2).sum()
    assert got == pytest.approx((bound**2).sum(), rel=1e-9)


def test_bad_moments_and_information_are_refused():
    with pytest.raises(ValueError, match="moment of shape"):
        activation_weighted_svd(drawn(7, 5), drawn(7, 7))
    with pytest.raises(ValueError, match="finite moment"):
        activation_weighted_svd(drawn(7, 5), torch.full((5, 5), torch.nan))
    with pytest.raises(ValueError, match="Fisher information of shape"):
        fisher_weighted_svd(drawn(7, 5), torch.ones(5, 7))
    with pytest.raises(ValueError, match="at least 0"):
        fisher_weighted_svd(drawn(7, 5), -torch.ones(7, 5))


# Ranks


def test_ranks_from_energy_and_from_savings():
    values = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 1.0])}
    shapes = {"a": (9, 2), "b": (9, 2)}
    assert Energy(0.9)(values, shapes) == {"a": 1, "b": 2}
    assert Energy(1.0)(values, shapes) == {"a": 2, "b": 2}
    for outputs, inputs in [(10, 20), (100, 100), (1, 10)]:
        rank = rank_that_saves(outputs, inputs)
        assert rank * (outputs + inputs) < outputs * inputs <= (rank + 1) * (outputs + inputs)


VALUES = st.lists(st.floats(0.01, 10.0), min_size=4, max_size=4).map(lambda each: torch.tensor(sorted(each)[::-1]))


@given(VALUES, VALUES, st.floats(0.1, 0.7), st.booleans())
def test_a_budget_is_kept_and_nothing_better_fits_it(first, second, amount, absolute):
    """Against every pair of ranks: none at most as large loses less, but for the term that would go over the budget."""
    values, shapes = {"a": first, "b": second}, {"a": (8, 10), "b": (8, 10)}  # one cost: the greedy order is exact
    ranks = Budget(amount, absolute)(values, shapes)

    def lost(chosen):
        shares = {
            n: v.double().square() / (1.0 if absolute else float(v.double().square().sum())) for n, v in values.items()
        }
        return sum(float(shares[name][rank:].sum()) for name, rank in chosen.items())

    def size(chosen):
        return 18 * sum(chosen.values())

    assert size(ranks) <= (1 - amount) * 160
    pairs = [{"a": a, "b": b} for a, b in itertools.product(range(1, 5), repeat=2)]
    assert lost(ranks) <= min(lost(pair) for pair in pairs if size(pair) <= (1 - amount) * 160) + 1e-9


def test_a_budget_that_cannot_be_is_refused():
    values = {"a": torch.ones(8)}
    with pytest.raises(ValueError, match="fewer weights than rank 1"):
        Budget(0.9)(values, {"a": (8, 8)})
    for bad in (0.0, 1.0, float("nan"), True):
        with pytest.raises(ValueError, match=r"in \(0, 1\)"):
            Budget(bad)
    for bad in (0.0, 1.1, True):
        with pytest.raises(ValueError, match="energy share"):
            Energy(bad)


def test_layers_that_would_not_get_smaller_are_left():
    values, shapes = {"a": torch.ones(8), "b": torch.ones(2)}, {"a": (8, 8), "b": (2, 2)}
    assert chosen_ranks(2, values, shapes) == {"a": 2}
    assert chosen_ranks(3, values, shapes) == {"a": 3}  # of 'b' there are only two
    with pytest.raises(ValueError, match="rank from 1 to 2, the full one of 'b', got 3"):
        chosen_ranks(lambda *_: {"a": 3, "b": 3}, values, shapes)
    with pytest.raises(NothingToCompress, match="at rank=4; the largest ranks that save: a 3, b 0"):
        check_rank(4, shapes)
    with pytest.raises(ValueError, match="fewer weights than rank 1"):
        check_rank(Budget(0.9), {"a": (8, 8)})
