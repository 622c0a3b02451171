"""What grids learn besides the weights, such as a step: tensors of ours with an Adam of ours, stepped with the user's.

Nothing of it is in the module's parameters or the user's optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.divergence import check_same
from lightning_compress.sharding import all_reduce_sum, world_size

__all__ = ["LearnedValues", "adam_step"]

BETAS, EPSILON = (0.9, 0.999), 1e-8  # as torch.optim.Adam
COMPARED_EVERY = 100  # steps: whether all processes have learned the same


class LearnedValues:
    """Learned values of some layers by clean name, "weight.step" or "input.step" in each, and Adam's moments of each.

    The learning rate is relative: at first a step of Adam moves a value by about `learning_rate` of its tensor's mean
    magnitude at the start, whatever its unit. A tensor that starts at zero goes by the largest of its layer's.
    """

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate, self._steps = learning_rate, 0
        self.parameters: dict[str, dict[str, Tensor]] = {}
        self._moments: dict[str, dict[str, Tensor]] = {}  # (4, values) each: see `adam_step`; none once frozen

    def of(self, layer: str, kind: str) -> dict[str, Tensor]:
        """Return what a layer's "weight" or "input" grid has learned; empty before `add`."""
        own = self.parameters.get(layer, {})
        return {key.removeprefix(f"{kind}."): value for key, value in own.items() if key.startswith(f"{kind}.")}

    def add(self, layer: str, kind: str, start: Mapping[str, Tensor]) -> None:
        """Begin to learn from start values. Runs when a layer begins to round."""
        sizes = {key: float(value.abs().mean()) for key, value in start.items()}
        for key, value in start.items():
            size = sizes[key] or max(sizes.values()) or 1.0
            moments = torch.zeros(4, value.numel(), dtype=torch.float32, device=value.device)
            moments[0] = self.learning_rate * size
            self._put(layer, f"{kind}.{key}", value.detach().float().clone(), moments)

    def _put(self, layer: str, key: str, value: Tensor, moments: Tensor | None) -> None:
        self.parameters.setdefault(layer, {})[key] = value.requires_grad_()
        if moments is not None:
            self._moments.setdefault(layer, {})[key] = moments

    def forget_stale_gradients(self, layers: Iterable[str]) -> None:
        """Clear the gradients of layers whose weights' gradients were cleared. Runs before each backward."""
        for layer in layers:
            for parameter in self.parameters.get(layer, {}).values():
                parameter.grad = None

    def step(self, layers: Iterable[str]) -> None:
        """Step these layers' values by gradients averaged over processes. Runs inside the step of their weights.

        One all-reduce of its own, at another moment than that of the ranges. As in torch's Adam, a value without a
        gradient and its moments stay as they are.
        """
        learning = [(layer, key) for layer in layers for key in self._moments.get(layer, ())]
        self._steps += 1
        if learning and world_size() > 1:
            average_gradients([self.parameters[layer][key] for layer, key in learning])
        if self._steps % COMPARED_EVERY == 0:
            check_same(
                {f"{layer}.{key}": self.parameters[layer][key] for layer, key in learning}, "learned value", self._steps
            )
        moving = [(layer, key) for layer, key in learning if self.parameters[layer][key].grad is not None]
        if not moving:
            return
        values = [self.parameters[layer][key] for layer, key in moving]
        moments = adam_step(values, [self._moments[layer][key] for layer, key in moving])
        for (layer, key), value, row in zip(moving, values, moments, strict=True):
            self._moments[layer][key], value.grad = row, None

    def freeze(self) -> None:
        """Keep the values and forget how to go on. Runs when ranges are frozen."""
        self._moments = {}
        self.forget_stale_gradients(self.parameters)

    def clear(self) -> None:
        """Forget everything."""
        self.parameters, self._moments = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return copies of values and moments, as plain containers of tensors."""
        return {"values": _copied(self.parameters), "moments": _copied(self._moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, on the CPU."""
        self.clear()
        values, moments = _copied(state["values"]), _copied(state["moments"])
        for layer, own in values.items():
            for key, value in own.items():
                self._put(layer, key, value, moments.get(layer, {}).get(key))

    def move(self, layer: str, device: torch.device) -> None:
        """Move a layer's values, and their moments, to a device; nothing happens if they are there."""
        moments = self._moments.get(layer, {})
        for key, value in self.parameters.get(layer, {}).items():
            if value.device != device:
                kept = moments[key].to(device) if key in moments else None
                self._put(layer, key, value.detach().to(device), kept)


def _copied(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {layer: {key: t.detach().cpu().clone() for key, t in own.items()} for layer, own in tensors.items()}


@torch.no_grad()
def adam_step(values: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Tensor]:
    """Step values by their gradients, in place, and return their new moments. Runs inside an optimizer's step.

    Kingma & Ba 2015, "Adam", algorithm 1, with the defaults of `torch.optim.Adam`: all tensors in one vector, each
    with a learning rate of its own, where torch would need a group of parameters for each.

    Args:
        values: float32, each with a gradient.
        moments: (4, values) float32 for each tensor: learning rate, number of steps, first and second moment.

    >>> value, moments = torch.tensor(1.0, requires_grad=True), torch.tensor([[0.1], [0.0], [0.0], [0.0]])
    >>> value.square().backward()
    >>> _ = adam_step([value], [moments])
    >>> value.detach()
    tensor(0.9000)
    """
    sizes = [value.numel() for value in values]
    gradient = torch.cat([value.grad.flatten() for value in values])  # type: ignore[union-attr]
    together = torch.cat(list(moments), dim=1)
    rate, count, first, second = together.unbind()
    count += 1
    first.lerp_(gradient, 1 - BETAS[0])
    second.lerp_(gradient.square(), 1 - BETAS[1])
    # 1 - beta^count, exact in float32 for a small count too
    bias, square_bias = (-torch.expm1(count * math.log(beta)) for beta in BETAS)
    change = rate * (first / bias) / ((second / square_bias).sqrt() + EPSILON)
    for value, part in zip(values, torch.split(change, sizes), strict=True):
        value.sub_(part.view_as(value))
    return list(torch.split(together, sizes, dim=1))


@torch.no_grad()
def average_gradients(parameters: list[Tensor]) -> None:
    """Replace each gradient by its mean over processes; every process calls it with the same tensors.

    A gradient that no process has stays None, as where one process trains on all the batches.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    has = gradients[0].new_tensor([float(p.grad is not None) for p in parameters])
    flat = all_reduce_sum(torch.cat([*(gradient.flatten() for gradient in gradients), has]))
    *means, counts = torch.split(flat / world_size(), [*(p.numel() for p in parameters), len(parameters)])
    for parameter, mean, count in zip(parameters, means, counts.tolist(), strict=True):
        parameter.grad = mean.view_as(parameter).clone() if count else None
