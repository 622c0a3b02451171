"""Ensembles: the weighted mean of the members' logits, weighed by agreement if asked, and errors that name a member."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import Distillation
from lightning_compress.distillation.ensembles import Ensemble, agreement_weights, weighted_logits
from lightning_compress.distillation.losses import soft_targets
from lightning_compress.distillation.teachers import build_teacher, call_teacher

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Constant(nn.Module):
    """Gives the same logits for each example."""

    def __init__(self, *logits) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def linears(count=3, classes=2):
    torch.manual_seed(1)
    return [nn.Linear(3, classes) for _ in range(count)]


@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0.0, 0.5, 0.5], (3,) * 3])
def test_logits_are_the_weighted_mean_of_the_members(weights):
    teachers = linears()
    shares = np.ones(3) if weights is None else np.array(weights, dtype=float)
    expected = np.average([t(X).detach().numpy() for t in teachers], axis=0, weights=shares)
    np.testing.assert_allclose(Ensemble(teachers, weights)(X).detach().numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mean_of_logits_is_the_geometric_mean_of_distributions_at_any_temperature(temperature):
    teachers = linears(classes=4)
    each = torch.stack([(t(X) / temperature).softmax(-1) for t in teachers]).detach().double().numpy()
    mean = np.exp(np.log(each).mean(axis=0))
    got = (Ensemble(teachers)(X) / temperature).softmax(-1).detach().numpy()
    np.testing.assert_allclose(got, mean / mean.sum(-1, keepdims=True), rtol=1e-5)


def by_hand(logits, weights):
    """The docstring's formula, example by example, in NumPy."""
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    found = np.empty(logits.shape[:-1])
    for example in np.ndindex(*logits.shape[1:-1]):
        own = p[(slice(None), *example)]
        m = sum(w * row for w, row in zip(weights, own, strict=True))
        scores = [w * np.exp(-np.sum(m * np.log(m / row))) for w, row in zip(weights, own, strict=True)]
        found[(slice(None), *example)] = np.array(scores) / sum(scores)
    return found


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), shape=st.sampled_from([(2, 3), (3, 4, 5), (2, 3, 2, 4)]), spread=st.floats(0.1, 20.0))
def test_weights_by_agreement_are_the_formula_in_each_example(seed, shape, spread):
    random = np.random.default_rng(seed)
    logits, weights = spread * random.standard_normal(shape), random.random(shape[0]) + 0.1
    weights /= weights.sum()
    got = agreement_weights(torch.from_numpy(logits), torch.from_numpy(weights))
    np.testing.assert_allclose(got.numpy(), by_hand(logits, weights), rtol=1e-6, atol=1e-12)


def test_one_that_contradicts_two_loses_its_say_only_where_it_does():
    logits = torch.tensor([[[4.0, 0.0], [4.0, 0.0]], [[4.0, 0.0], [4.0, 0.0]], [[-40.0, 0.0], [4.0, 0.0]]])
    weights = agreement_weights(logits, torch.full((3,), 1 / 3))
    assert weights[2, 0] < 1e-8
    torch.testing.assert_close(weights[:, 1], torch.full((3,), 1 / 3))
    members = [Constant(4.0, 0.0), Constant(4.0, 0.0), Constant(-40.0, 0.0)]
    assert Ensemble(members)(X)[0].argmax() == 1  # the plain mean follows the loudest
    torch.testing.assert_close(Ensemble(members, by_agreement=True)(X)[0], torch.tensor([4.0, 0.0]))


def test_members_that_agree_keep_their_given_weights():
    same = torch.randn(1, 5, 4).expand(3, 5, 4)
    given_weights = torch.tensor([0.5, 0.3, 0.2])
    torch.testing.assert_close(agreement_weights(same, given_weights), given_weights[:, None].expand(3, 5))


@pytest.mark.parametrize(
    ("logits", "given_weights", "expected"),
    [
        ([[0.0, -torch.inf], [0.0, -torch.inf]], [0.5, 0.5], [0.5, 0.5]),  # both rule it out
        ([[0.0, -torch.inf], [0.0, 0.0]], [0.5, 0.5], [0.0, 1.0]),  # one cannot follow the other
        ([[0.0, -torch.inf], [-torch.inf, 0.0]], [0.7, 0.3], [0.7, 0.3]),  # neither can
        ([[0.0, -torch.inf], [-torch.inf, 0.0]], [1.0, 0.0], [1.0, 0.0]),  # a member of no weight
        ([[0.0, -torch.inf], [-torch.inf, 0.0], [0.0, 0.0]], [0.7, 0.3, 0.0], [0.7, 0.3, 0.0]),
        ([[0.0, -200.0], [0.0, -torch.inf]], [0.5, 0.5], [0.5, 0.5]),  # too unlikely for float32
        ([[1e4, 0.0], [0.0, 1e4]], [0.5, 0.5], [0.5, 0.5]),
    ],
)
def test_classes_that_a_member_rules_out_make_no_nan(logits, given_weights, expected):
    stacked, weights = torch.tensor(logits)[:, None], torch.tensor(given_weights)
    got = agreement_weights(stacked, weights)
    assert got[:, 0].tolist() == pytest.approx(expected)
    assert not weighted_logits(stacked, got).isnan().any()


@pytest.mark.parametrize("by_agreement", [False, True])
@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", "float32"), ("float64", "float64")])
def test_the_mean_is_in_float32_or_wider(by_agreement, dtype, expected):
    members = [m.to(getattr(torch, dtype)) for m in linears(2)]
    got = Ensemble(members, by_agreement=by_agreement)(X.to(getattr(torch, dtype)))
    assert got.dtype is getattr(torch, expected)
    shares = Ensemble(linears(3)).bfloat16().weights  # precision plugins convert modules
    assert sum(shares) == pytest.approx(1.0, abs=1e-15)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, scale=1.0):
        return {"hidden": x, "logits": scale * self.layer(x)}


def test_it_teaches_as_any_teacher_does():
    calls = []
    members = [Hidden(), lambda: calls.append(1) or Hidden()]
    ensemble = build_teacher(Ensemble(members), nn.Linear(3, 2))
    assert calls == [1]
    logits = call_teacher(ensemble, (X,), {"labels": 1, "scale": 2.0})
    assert not logits.requires_grad
    torch.testing.assert_close(logits, sum(member.layer(X) for member in ensemble.teachers))
    assert "teachers.1.layer.weight" in dict(ensemble.named_parameters())
    assert not any(module.training for module in ensemble.eval().modules())
    torch.testing.assert_close(copy.deepcopy(ensemble)(X, scale=2.0), logits)


def test_outputs_says_where_the_logits_are():
    double = Ensemble([Hidden(), Hidden()], outputs=lambda output: output["hidden"] * 2)
    torch.testing.assert_close(double(X), X * 2)


def test_it_shares_no_parameters_with_the_student():
    student = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"copy.deepcopy\(model\)"):
        build_teacher(Ensemble([student, nn.Linear(3, 2)]), student)


@pytest.mark.parametrize("by_agreement", [False, True])
def test_it_compiles_in_one_graph(by_agreement):
    ensemble = Ensemble(linears(), by_agreement=by_agreement)
    compiled = torch.compile(ensemble, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), ensemble(X))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_teachers_are_refused(count):
    with pytest.raises(ValueError, match=rf"expected two teachers or more, got {count}; pass a single one as it is"):
        Ensemble(linears(count))


@pytest.mark.parametrize("weights", [[1.0], [1, 2, 3], [0, 0], [-1, 2], [float("nan"), 1], [float("inf"), 1], []])
def test_weights_that_are_no_shares_are_refused(weights):
    with pytest.raises(ValueError, match=r"expected weights of 2 teachers, none negative and not all zero, got \["):
        Ensemble(linears(2), weights)


@pytest.mark.parametrize("member", [nn.Linear, "teacher.ckpt", None, lambda: "no module"])
def test_what_builds_no_module_is_refused(member):
    with pytest.raises(TypeError, match=r"expected (a teacher with weights|the teacher callable to return)"):
        Ensemble([nn.Linear(1, 1), member])


def test_members_with_other_classes_are_named():
    ensemble = Ensemble([nn.Linear(3, 2), nn.Linear(3, 2), Constant(1.0, 2.0, 3.0)])
    with pytest.raises(ValueError, match=r"\(4, 2\) from teacher 0 \(Linear\) .* \(4, 3\) from teacher 2 \(Constant\)"):
        ensemble(X)


def test_a_member_that_cannot_be_called_so_is_named():
    with pytest.raises(
        TypeError, match=r"teacher 1 \(Linear\) of the Ensemble cannot be called .*\(4, 3\).*Details\(inputs="
    ):
        call_teacher(Ensemble([Hidden(), nn.Linear(3, 2)]), (X,), {"scale": 1.0})


def test_an_error_inside_a_member_is_its_own_and_says_whose():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        Ensemble([nn.Linear(3, 2), nn.Linear(5, 2)])(X)
    assert raised.value.__notes__ == ["in teacher 1 (Linear) of the Ensemble"]


class Student(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.5)


def test_it_teaches_in_a_fit(tmp_path):
    ensemble, student = Ensemble(linears(), by_agreement=True), Student()
    by_hand_student = copy.deepcopy(student)
    soft_targets(by_hand_student.net(X), ensemble(X).detach(), 3.0).backward()
    expected = student.net.weight.detach() - 0.5 * by_hand_student.net.weight.grad
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[Distillation(ensemble, weight=1.0, temperature=3.0)],
    )  # fmt: skip
    trainer.fit(student, DataLoader(TensorDataset(X), batch_size=4))
    torch.testing.assert_close(student.net.weight.detach(), expected)
    assert all(member.weight.grad is None for member in ensemble.teachers)
