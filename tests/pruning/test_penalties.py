from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from lightning_compress.pruning.penalties import group_hoyer_square, group_lasso, hoyer_square, l1, penalties_of

TERMS = (l1, group_lasso, hoyer_square, group_hoyer_square)
SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)
VALUES = st.floats(-100, 100, width=32).filter(lambda value: value == 0 or abs(value) > 1e-3)
WEIGHTS = SHAPES.flatmap(lambda shape: arrays(np.float64, shape, elements=VALUES))


def by_hand(term: object, weight: np.ndarray) -> float:
    """Each formula in loops, from the papers."""
    if term is l1:
        return sum(abs(value) for value in weight.ravel())
    rows = [row.ravel() for row in weight]
    lengths = [sum(value**2 for value in row) ** 0.5 for row in rows]
    if term is group_lasso:
        return sum(len(row) ** 0.5 * length for row, length in zip(rows, lengths, strict=True))
    parts = lengths if term is group_hoyer_square else [abs(value) for value in weight.ravel()]
    return sum(parts) ** 2 / sum(part**2 for part in parts) if any(parts) else 0.0


@pytest.mark.parametrize("term", TERMS)
@given(weight=WEIGHTS)
@settings(max_examples=40, deadline=None)
def test_values_are_those_of_the_formulas(term: object, weight: np.ndarray) -> None:
    assert float(term(torch.from_numpy(weight))) == pytest.approx(by_hand(term, weight), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("term", TERMS)
def test_gradients_are_those_of_the_formulas(term: object) -> None:
    weight = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(term, weight)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_weight_or_row_of_zeros_has_a_finite_gradient(term: object, dtype: torch.dtype) -> None:
    for zeros in (slice(None), slice(0, 1)):
        weight = torch.ones(2, 3, dtype=dtype)
        weight[zeros] = 0.0
        weight.requires_grad_()
        penalties_of(term, {"weight": weight})[0].backward()
        assert bool(torch.isfinite(weight.grad).all())
        assert not weight.grad[zeros].any()


@pytest.mark.parametrize("term", [hoyer_square, group_hoyer_square])
@given(weight=WEIGHTS.filter(lambda weight: bool(weight.any())), factor=st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_hoyer_does_not_see_the_scale_and_counts_what_is_left(term: object, weight: np.ndarray, factor: float) -> None:
    value = float(term(torch.from_numpy(weight)))
    assert float(term(torch.from_numpy(weight * factor))) == pytest.approx(value, rel=1e-9)
    parts = [abs(weight).sum()] if term is hoyer_square else [abs(row).sum() for row in weight]
    most = np.count_nonzero(weight) if term is hoyer_square else np.count_nonzero(parts)
    assert 1 - 1e-9 <= value <= most + 1e-9


def test_groups_are_pulled_to_zero_as_a_whole() -> None:
    """Gradient descent on each term alone: the group form empties the small row before the large one is halved."""
    weight = torch.tensor([[1.0, 0.1], [0.2, 0.19]], requires_grad=True)
    for _ in range(100):
        (gradient,) = torch.autograd.grad(group_lasso(weight), weight)
        weight.data -= 2e-3 * gradient
    rows = weight.detach().norm(dim=1)
    assert rows[1] < 2e-2
    assert rows[0] > 0.5


def test_low_precision_is_computed_in_float32_and_float64_stays() -> None:
    weight = torch.full((300, 1), 1.0, dtype=torch.bfloat16)  # 300 is no bfloat16
    assert penalties_of(l1, {"weight": weight})[0].item() == 300.0
    assert penalties_of(l1, {"weight": weight.double()})[0].dtype == torch.float64


@pytest.mark.parametrize(("term", "got"), [(torch.abs, r"\(2, 3\)"), (lambda weight: 1.0, r"1\.0")])
def test_a_term_that_is_no_scalar_is_named(term: object, got: str) -> None:
    with pytest.raises(ValueError, match=rf"without dimensions for each weight, got {got} for 'a\.weight'.*\.sum\(\)"):
        penalties_of(term, {"a.weight": torch.ones(2, 3)})


def test_any_function_of_the_weight_is_a_term() -> None:
    def entropy(weight: Tensor) -> Tensor:
        return torch.special.entr(torch.softmax(weight.flatten(), 0)).sum()

    assert penalties_of(entropy, {"weight": torch.zeros(2, 2)})[0].item() == pytest.approx(np.log(4))
