"""Distillation losses of input gradients: how the outputs change with the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.distillation.comparing import kept_mean, paired, unit

__all__ = ["gradient_matching", "input_gradient", "likeliest"]


def input_gradient(outputs: Tensor, inputs: Tensor, direction: Tensor, *, create_graph: bool = True) -> Tensor:
    """Return the gradient of sum(outputs * direction) by the inputs: one row of the Jacobian. Runs in each step.

    Srinivas & Fleuret 2018, "Knowledge Transfer with Jacobian Matching", section 3: a row stands for the whole
    Jacobian, that of the class in `direction`; random directions see all rows in turn. Take the same for both models.
    A batch norm in training mode mixes the examples, and their gradients.

    Args:
        outputs: (batch, ...) of a model called with `inputs`.
        inputs: (batch, ...), with requires_grad set before the call.
        direction: the outputs' shape; one-hot rows take a class, such as the teacher's most likely one.
        create_graph: True for the student, whose weights learn from it; False for the teacher.

    Returns:
        the inputs' shape and dtype.

    Raises:
        ValueError: another shape of direction, or inputs that the outputs do not depend on.

    >>> inputs = torch.ones(1, 2, requires_grad=True)
    >>> input_gradient(inputs * torch.tensor([3.0, 4.0]), inputs, torch.tensor([[0.0, 1.0]]), create_graph=False)
    tensor([[0., 4.]])
    """
    if direction.shape != outputs.shape:
        raise ValueError(
            f"expected a direction of the outputs' shape {tuple(outputs.shape)}, got {tuple(direction.shape)}; "
            f"make it with torch.nn.functional.one_hot(classes, {outputs.shape[-1] if outputs.dim() else 1})"
        )
    if not (inputs.requires_grad and outputs.requires_grad):
        raise ValueError(
            "expected outputs with a graph back to the inputs, got none; set inputs.requires_grad_() before the model "
            "is called, and call it (the teacher too) with gradients enabled"
        )
    (gradient,) = torch.autograd.grad(outputs, inputs, direction.to(outputs.dtype), create_graph=create_graph)
    return gradient


def likeliest(logits: Tensor) -> Tensor:
    """Return the direction of each example's (or token's) most likely class, for `input_gradient`. Runs in each step.

    Args:
        logits: (batch, classes) or (batch, tokens, classes), the teacher's; of (batch,) it is 1 everywhere.

    Returns:
        the same shape and dtype.

    >>> likeliest(torch.tensor([[1.0, 3.0, 2.0]]))
    tensor([[0., 1., 0.]])
    """
    if logits.dim() < 2:
        return torch.ones_like(logits)
    return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)


def gradient_matching(student: Tensor, teacher: Tensor, *, normalize: bool = True) -> Tensor:
    """Return the squared distance of input gradients, averaged over examples. Runs in each step.

    Srinivas & Fleuret 2018, "Knowledge Transfer with Jacobian Matching", section 3; scaled to length 1, section 4, it
    compares directions. The derivative by the student's weights is a second one: its layers must be smooth enough
    (a ReLU is), and attention needs the "math" kernel.

    Args:
        student: (batch, ...) gradients, from `input_gradient`.
        teacher: the same shape.
        normalize: scale each example's gradients to length 1; one that is all zeros has no direction.

    Returns:
        () float32.

    Raises:
        ValueError: other shapes.

    >>> gradient_matching(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 9.0]]))
    tensor(2.)
    """
    student, teacher = paired(student, teacher, cure="give student and teacher the same inputs")
    got, wanted = (value.reshape(len(value), -1) for value in (student, teacher))
    if normalize:
        got, wanted = unit(got), unit(wanted)
    return kept_mean((got - wanted).square().sum(dim=-1))
