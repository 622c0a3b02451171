"""Low-rank factors of a Linear against numpy, their defining optimum, and the layer they replace."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.factorization.linear import factored, merged
from lightning_compress.factorization.svd import (
    activation_weighted_svd,
    fisher_weighted_svd,
    rank_for_energy,
    rank_that_saves,
    truncated_svd,
)


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_plain_error_is_numpys_dropped_singular_values(rank):
    weight = _draw(7, 5)
    left, right = truncated_svd(weight, rank)
    dropped = np.linalg.svd(weight.numpy(), compute_uv=False)[rank:]
    assert float((weight - left @ right).square().sum()) == pytest.approx((dropped**2).sum(), abs=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_activation_weighted_error_is_the_cholesky_bound_and_below_plain(rank):
    weight, inputs = _draw(7, 5), _draw(200, 5, seed=1) * torch.tensor([9.0, 3, 1, 0.3, 0.1])
    moment = inputs.T @ inputs / 200

    def error(factors):
        return float((inputs @ (weight - factors[0] @ factors[1]).T).square().sum()) / 200

    bound = np.linalg.svd(weight.numpy() @ np.linalg.cholesky(moment.numpy()), compute_uv=False)[rank:]
    weighted = error(activation_weighted_svd(weight, moment, rank))
    assert weighted == pytest.approx((bound**2).sum(), rel=1e-9)
    assert weighted < error(truncated_svd(weight, rank))


def test_a_singular_moment_keeps_outputs_exact_at_its_rank():
    weight, inputs = _draw(7, 5), _draw(50, 2, seed=1) @ _draw(2, 5, seed=2)
    left, right = activation_weighted_svd(weight, inputs.T @ inputs, 2)
    torch.testing.assert_close(inputs @ right.T @ left.T, inputs @ weight.T)


def test_fisher_weighted_error_is_numpys_bound():
    weight, fisher = _draw(7, 5), _draw(7, 5, seed=3).square()
    left, right = fisher_weighted_svd(weight, fisher, 2)
    rows = fisher.sum(1).numpy()
    bound = np.linalg.svd(np.sqrt(rows)[:, None] * weight.numpy(), compute_uv=False)[2:]
    got = (rows[:, None] * (weight - left @ right).numpy() ** 2).sum()
    assert got == pytest.approx((bound**2).sum(), rel=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_the_factored_layer_computes_the_product_and_merges_back(bias):
    torch.manual_seed(0)
    linear = nn.Linear(5, 7, bias=bias).double()
    layer = factored(linear, *truncated_svd(linear.weight, 5))
    inputs = _draw(3, 2, 5)
    torch.testing.assert_close(layer(inputs), linear(inputs))
    back = merged(layer)
    assert list(back.state_dict()) == list(linear.state_dict())
    torch.testing.assert_close(back.weight, linear.weight)
    assert not bias or torch.equal(back.bias, linear.bias)


def test_a_frozen_layer_stays_frozen_and_in_its_mode():
    linear = nn.Linear(5, 7).requires_grad_(False).eval()
    layer = factored(linear, *truncated_svd(linear.weight, 2))
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_above_full_or_below_one_is_refused(rank):
    with pytest.raises(ValueError, match="rank from 1 to 5"):
        truncated_svd(_draw(7, 5), rank)


def test_bad_moments_and_factors_are_refused():
    with pytest.raises(ValueError, match="moment of shape"):
        activation_weighted_svd(_draw(7, 5), _draw(7, 7), 2)
    with pytest.raises(ValueError, match="finite moment"):
        activation_weighted_svd(_draw(7, 5), torch.full((5, 5), torch.nan), 2)
    with pytest.raises(ValueError, match="at least 0"):
        fisher_weighted_svd(_draw(7, 5), -torch.ones(7, 5), 2)
    with pytest.raises(ValueError, match="expected factors"):
        factored(nn.Linear(5, 7), _draw(7, 2), _draw(3, 5))


def test_ranks_from_energy_and_from_savings():
    assert rank_for_energy(torch.diag(torch.tensor([3.0, 1.0])), 1.0) == 2
    for outputs, inputs in [(10, 20), (100, 100), (1, 10)]:
        rank = rank_that_saves(outputs, inputs)
        assert rank * (outputs + inputs) < outputs * inputs <= (rank + 1) * (outputs + inputs)
