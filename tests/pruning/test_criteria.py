"""Each criterion against its paper's formula, computed with numpy alone."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

from lightning_compress.pruning import criteria
from lightning_compress.pruning.statistics import ACTIVATIONS, GRADIENTS
from lightning_compress.pruning.targets import OUT, Target, asks_for

SHAPES = [(4, 6), (4, 3, 5), (4, 2, 3, 3), (2, 3, 2, 2, 2)]
KNOWN = frozenset({"weight", "name", "step"}) | GRADIENTS | ACTIVATIONS


def given(shape, seed=0):
    """What a training run may have gathered about a weight, as numpy arrays."""
    random = np.random.default_rng(seed)
    channels = (shape[0], *[1] * (len(shape) - 1))
    inputs = tuple(size if axis == 1 else 1 for axis, size in enumerate(shape))
    return {
        "weight": random.normal(size=shape).astype("float32"),
        "gradient": random.normal(size=shape).astype("float32"),
        "squared_gradient": random.random(size=shape).astype("float32"),
        "movement": random.normal(size=shape).astype("float32"),
        "input_norm": random.random(size=inputs).astype("float32"),
        "activation": random.random(size=channels).astype("float32"),
        "positive_share": random.random(size=channels).astype("float32"),
    }


def by_distances(weight):
    """FPGM by two loops over the output channels."""
    rows = weight.reshape(len(weight), -1).astype("float64")
    sums = np.array([sum(np.sqrt(((row - other) ** 2).sum()) for other in rows) for row in rows])
    return np.broadcast_to(sums.reshape(-1, *[1] * (weight.ndim - 1)), weight.shape)


FORMULAS = {
    "magnitude": lambda g: np.sqrt(g["weight"] ** 2),
    "squared_magnitude": lambda g: g["weight"] * g["weight"],
    "gradient_magnitude": lambda g: np.sqrt(g["gradient"] ** 2),
    "taylor": lambda g: np.sqrt((g["weight"] * g["gradient"]) ** 2),
    "snip": lambda g: np.sqrt((g["weight"] * g["gradient"]) ** 2),
    "movement": lambda g: g["movement"],
    "fisher": lambda g: 0.5 * g["squared_gradient"] * g["weight"] ** 2,
    "wanda": lambda g: np.sqrt(g["weight"] ** 2 * g["input_norm"] ** 2),
    "mean_activation": lambda g: g["activation"] + 0 * g["weight"],
    "active_share": lambda g: g["positive_share"] + 0 * g["weight"],
    "geometric_median": lambda g: by_distances(g["weight"]),
}


def test_every_criterion_has_a_formula_here():
    assert FORMULAS.keys() | {"random"} == set(criteria.__all__)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_scores_are_the_formulas(name, shape):
    arrays = given(shape)
    criterion = getattr(criteria, name)
    asked = asks_for(criterion, KNOWN)
    scores = criterion(**{key: torch.from_numpy(arrays[key]) for key in asked})
    assert scores.shape == shape
    np.testing.assert_allclose(scores.numpy(), FORMULAS[name](arrays), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_scores_need_no_gradient_and_change_nothing(name):
    arrays = {key: torch.from_numpy(array) for key, array in given((4, 6)).items()}
    arrays["weight"].requires_grad_()
    before = {key: array.detach().clone() for key, array in arrays.items()}
    scores = getattr(criteria, name)(**{key: arrays[key] for key in asks_for(getattr(criteria, name), KNOWN)})
    assert not scores.requires_grad
    assert all(torch.equal(arrays[key].detach(), before[key]) for key in arrays)


def test_random_is_of_the_name_and_the_position_alone():
    """Not of Python's own hash, which is salted anew in each process."""
    weight = torch.zeros(5, 7)
    scores = criteria.random(weight, "body.0.weight")
    torch.manual_seed(1)  # neither the global generator nor the weight's value matters
    assert torch.equal(criteria.random(weight + 3.0, "body.0.weight"), scores)
    assert not torch.equal(criteria.random(weight, "body.1.weight"), scores)
    generator = torch.Generator().manual_seed(zlib.crc32(b"body.0.weight"))
    assert torch.equal(torch.rand(35, generator=generator), scores.flatten())
    assert 0.0 <= float(scores.min()) <= float(scores.max()) < 1.0


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    criteria.random(torch.zeros(9), "a")
    assert torch.equal(torch.rand(3), expected)


# What a criterion may ask for


def target(criterion, weight=None, **options):
    weight = torch.arange(6.0).view(2, 3) + 1 if weight is None else weight
    values = {"gradient": lambda: torch.full_like(weight, 2.0), "step": lambda: 7}
    return Target("a.weight", weight, torch.nn.Linear(3, 2), criterion=criterion, values=values, **options)


def asks_three(weight, gradient, step):
    return weight * gradient + step


def with_default(weight, power=2.0):
    return weight**power


def keyword_only(*, weight, name):
    return weight + len(name)


class Scaled:
    def __call__(self, weight):
        return 3 * weight


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (asks_three, lambda w: w * 2 + 7),
        (with_default, lambda w: w**2),
        (keyword_only, lambda w: w + len("a.weight")),
        (Scaled(), lambda w: 3 * w),
        (lambda w: w + 1, lambda w: w + 1),
        (torch.abs, abs),
        (torch.Tensor.square, lambda w: w**2),
    ],
    ids=["three", "default", "keyword only", "object", "own name", "built in", "method"],
)
def test_a_users_function_is_given_what_it_names(criterion, expected):
    made = target(criterion)
    assert torch.equal(made.scores(), expected(made.weight))


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda weight, gradients: weight, "asks for gradients; a criterion's parameters are named .* gradient, "),
        (lambda a, b: a, "asks for a, b;"),
        (lambda: torch.ones(2), "asks for nothing;"),
        (lambda gradients: gradients, "asks for gradients;"),
        (lambda squared_grad: squared_grad, "asks for squared_grad;"),
    ],
)
def test_an_unknown_parameter_is_named_with_those_that_are_known(criterion, message):
    with pytest.raises(TypeError, match=message):
        asks_for(criterion, KNOWN)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (lambda weight: weight[0], r"float scores of shape \(2, 3\) for 'a.weight', got torch.float32 \(3,\)"),
        (lambda weight: weight > 0, r"got torch.bool \(2, 3\)"),
        (lambda weight: weight.long(), r"got torch.int64 \(2, 3\)"),
        (lambda weight: weight.tolist(), "got list"),
        (lambda weight: None, "got NoneType"),
    ],
    ids=["shape", "bool", "int", "list", "None"],
)
def test_scores_of_another_kind_are_refused(criterion, message):
    with pytest.raises(ValueError, match=message):
        target(criterion).scores()


def test_what_is_out_scores_below_everything_unless_it_may_come_back():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    signed = -torch.arange(6.0).view(2, 3)
    kept = target(lambda weight: weight, signed, mask=mask).scores()
    assert torch.equal(kept[mask], signed[mask])
    assert bool((kept[~mask] == OUT).all())
    back = target(lambda weight: weight, signed, mask=mask, comes_back=True).scores()
    assert torch.equal(back, signed)
