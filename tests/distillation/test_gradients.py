"""Input gradients are rows of the Jacobian, and matching them teaches the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_compress.distillation.gradients import gradient_matching, input_gradient


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def inputs():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def test_a_one_hot_direction_takes_a_row_of_the_jacobian():
    model, given = network(0), inputs()
    classes = torch.tensor([0, 1, 2, 3, 0, 1])
    gradient = input_gradient(model(given), given, nn.functional.one_hot(classes, 4))
    jacobians = torch.func.vmap(torch.func.jacrev(model))(given.detach())
    torch.testing.assert_close(gradient, jacobians[torch.arange(6), classes])


def test_the_loss_reaches_the_students_weights_by_the_second_derivative():
    model, given = network(0), inputs()
    direction = torch.ones(6, 4, dtype=torch.float64)
    teacher = input_gradient(network(1)(given), given, direction, create_graph=False)
    assert not teacher.requires_grad

    def loss(weight):
        output = torch.func.functional_call(model, {"0.weight": weight}, (given,))
        return gradient_matching(input_gradient(output, given, direction), teacher)

    assert torch.autograd.gradcheck(loss, [model[0].weight.detach().requires_grad_()])


def test_gradient_descent_on_it_turns_the_students_gradients_to_the_teachers():
    student, teacher, given = network(0), network(1), inputs()
    direction = nn.functional.one_hot(teacher(given).argmax(dim=1), 4)
    wanted = input_gradient(teacher(given), given, direction, create_graph=False)
    optimizer, losses = torch.optim.Adam(student.parameters(), lr=0.05), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = gradient_matching(input_gradient(student(given), given, direction), wanted)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_lengths_are_seen_only_on_request():
    gradient = inputs().detach()
    assert float(gradient_matching(3 * gradient, gradient)) == pytest.approx(0.0, abs=1e-15)
    wanted = 4 * gradient.square().sum(dim=1).mean()
    torch.testing.assert_close(gradient_matching(3 * gradient, gradient, normalize=False), wanted)


def test_a_dead_gradient_has_no_direction():
    student = torch.zeros(2, 3, requires_grad=True)
    loss = gradient_matching(student, torch.ones(2, 3))
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    assert torch.equal(student.grad, torch.zeros(2, 3))


def test_bad_input_is_named_with_its_cure():
    model, given = network(0), inputs()
    with pytest.raises(ValueError, match=r"outputs' shape \(6, 4\), got \(6,\); make it with .*one_hot\(classes, 4\)"):
        input_gradient(model(given), given, torch.zeros(6))
    with pytest.raises(ValueError, match=r"set inputs.requires_grad_\(\) before the model is called"):
        input_gradient(model(given.detach()), given.detach(), torch.zeros(6, 4))
    with torch.no_grad():
        outputs = model(given)
    with pytest.raises(ValueError, match="with gradients enabled"):
        input_gradient(outputs, given, torch.zeros(6, 4))
