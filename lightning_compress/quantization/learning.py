"""What grids learn besides the weights, such as a step: tensors of ours with an Adam of ours, stepped with the user's.

Nothing of it is in the module's parameters or the user's optimizers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam

from lightning_compress.sharding import all_reduce_sum, world_size

__all__ = ["LearnedValues"]


class LearnedValues:
    """Learned values of some layers by clean name, "weight.step" or "input.step" in each; an Adam a layer.

    The learning rate is relative: at first a step of Adam moves a value by about `learning_rate` of its tensor's mean
    magnitude at the start, whatever its unit. A tensor that starts at zero goes by the largest of its layer's.
    """

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.parameters: dict[str, dict[str, Tensor]] = {}
        self._optimizers: dict[str, Adam] = {}

    def of(self, layer: str, kind: str) -> dict[str, Tensor]:
        """Return what a layer's "weight" or "input" grid has learned; empty before `add`."""
        own = self.parameters.get(layer, {})
        return {key.removeprefix(f"{kind}."): value for key, value in own.items() if key.startswith(f"{kind}.")}

    def add(self, layer: str, kind: str, start: Mapping[str, Tensor]) -> None:
        """Begin to learn from start values. Runs when a layer begins to round."""
        sizes = {key: float(value.abs().mean()) for key, value in start.items()}
        for key, value in start.items():
            size = sizes[key] or max(sizes.values()) or 1.0
            self._add(layer, f"{kind}.{key}", value.detach().float(), self.learning_rate * size)

    def _add(self, layer: str, key: str, value: Tensor, rate: float) -> None:
        parameter = value.clone().requires_grad_()
        self.parameters.setdefault(layer, {})[key] = parameter
        if layer in self._optimizers:
            self._optimizers[layer].add_param_group({"params": [parameter], "lr": rate})
        else:
            self._optimizers[layer] = Adam([{"params": [parameter], "lr": rate}])

    def forget_stale_gradients(self, layers: Iterable[str]) -> None:
        """Clear the gradients of layers whose weights' gradients were cleared. Runs before each backward."""
        for layer in layers:
            for parameter in self.parameters.get(layer, {}).values():
                parameter.grad = None

    def step(self, layers: Iterable[str]) -> None:
        """Step these layers' values by gradients averaged over processes. Runs inside the step of their weights."""
        learning = [layer for layer in layers if layer in self._optimizers]
        if learning and world_size() > 1:
            average_gradients([value for layer in learning for value in self.parameters[layer].values()])
        for layer in learning:
            self._optimizers[layer].step()
            self._optimizers[layer].zero_grad()

    def freeze(self) -> None:
        """Keep the values and forget how to go on. Runs when ranges are frozen."""
        self._optimizers = {}
        for parameter in (value for own in self.parameters.values() for value in own.values()):
            parameter.grad = None

    def clear(self) -> None:
        """Forget everything."""
        self.parameters, self._optimizers = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return copies of values and optimizers' states, as plain containers of tensors."""
        values = {n: {k: v.detach().cpu().clone() for k, v in own.items()} for n, own in self.parameters.items()}
        return {"values": values, "optimizers": copy.deepcopy({n: o.state_dict() for n, o in self._optimizers.items()})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, on the CPU."""
        self.clear()
        for layer, own in state["values"].items():
            for key, value in own.items():
                self._add(layer, key, value, 0.0)
            if layer in state["optimizers"]:
                self._optimizers[layer].load_state_dict(state["optimizers"][layer])
            else:
                del self._optimizers[layer]

    def move(self, layer: str, device: torch.device) -> None:
        """Move a layer's values, and the state of their Adam, to a device; nothing happens if they are there."""
        own = self.parameters.get(layer, {})
        if all(value.device == device for value in own.values()):
            return
        optimizer = self._optimizers.pop(layer, None)
        for key, value in own.items():
            self._add(layer, key, value.detach().to(device), 0.0)
        if optimizer is None:
            del self._optimizers[layer]
        else:
            self._optimizers[layer].load_state_dict(optimizer.state_dict())


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
