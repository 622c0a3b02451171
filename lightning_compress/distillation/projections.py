"""Learned projections from the student's width to the teacher's: modules of ours, with an Adam of ours."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CheckpointMismatch
from lightning_compress.sharding import all_reduce_sum, world_size

__all__ = ["Projections", "channel_dim", "projection"]

FEATURE_MAP_DIMS = 4


def channel_dim(value: Tensor) -> int:
    """Return where a value's channels are: dimension 1 of a feature map (batch, channels, height, width), else last.

    >>> channel_dim(torch.zeros(2, 8, 4, 4)), channel_dim(torch.zeros(2, 16, 8))
    (1, -1)
    """
    return 1 if value.dim() >= FEATURE_MAP_DIMS else -1


def projection(name: str, student: int, teacher: int) -> nn.Linear:
    """Return a linear map between widths, the same in each process and run: its start is drawn by its name.

    Romero et al. 2015, "FitNets", section 2.2 (the regressor; of a feature map one of 1 x 1); TinyBERT's W_h.

    >>> torch.equal(projection("a", 2, 3).weight, projection("a", 2, 3).weight)
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        return nn.Linear(student, teacher)


class Projections:
    """The projections of one fit by name, made when a pair of widths is first seen.

    Nothing of them is in the module's parameters or the user's optimizers: an Adam of their own steps with the user's.

    Args:
        learning_rate: of that Adam.
    """

    def __init__(self, learning_rate: float = 1e-3) -> None:
        self.learning_rate = learning_rate
        self.modules: dict[str, nn.Linear] = {}
        self._optimizers: dict[str, torch.optim.Adam] = {}
        self._restored: dict[str, Any] = {}

    def __call__(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the student's value in the teacher's width. Runs in each step, in float32 under autocast too."""
        dim = channel_dim(student)
        if name not in self.modules:
            self._add(name, student.shape[dim], teacher.shape[dim], student.device)
        module = self.modules[name]
        value = student if dim == -1 else student.movedim(dim, -1)
        with torch.autocast(student.device.type, enabled=False):
            projected: Tensor = module(value.to(module.weight.dtype))
        return projected if dim == -1 else projected.movedim(-1, dim)

    def _add(self, name: str, student: int, teacher: int, device: torch.device) -> None:
        module = projection(name, student, teacher).to(device)
        self.modules[name] = module
        self._optimizers[name] = torch.optim.Adam(module.parameters(), lr=self.learning_rate)
        saved = self._restored.pop(name, None)
        if saved is None:
            return
        shapes = [tuple(saved["module"]["weight"].shape), tuple(module.weight.shape)]
        if shapes[0] != shapes[1]:
            raise CheckpointMismatch(
                f"the checkpoint has a projection of shape {shapes[0]} for {name}, this run needs {shapes[1]}; resume "
                f"with the models that made it"
            )
        module.load_state_dict(saved["module"])
        self._optimizers[name].load_state_dict(saved["optimizer"])

    def step(self, scale: float = 1.0) -> None:
        """Step by gradients averaged over processes; every process calls it. Runs inside the user's optimizer step.

        Args:
            scale: what a gradient scaler multiplied the loss by.
        """
        for name in sorted(self.modules):
            for parameter in self.modules[name].parameters():
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = all_reduce_sum(gradient) if world_size() > 1 else gradient
                parameter.grad.div_(world_size() * scale)
            self._optimizers[name].step()
            self._optimizers[name].zero_grad()

    def clear(self) -> None:
        """Forget everything."""
        self.modules, self._optimizers, self._restored = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return copies of weights and optimizers' states as plain containers of tensors."""
        own = {
            name: {"module": _copied(module.state_dict()), "optimizer": _copied(self._optimizers[name].state_dict())}
            for name, module in self.modules.items()
        }
        return {**self._restored, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a saved state for the moment when each projection is made."""
        self.clear()
        self._restored = dict(state)


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda value: value.detach().cpu().clone(), tree)
