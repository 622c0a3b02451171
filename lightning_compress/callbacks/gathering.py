"""When what criteria ask for is gathered: at each step's final gradients, before anybody masks or clips them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.callbacks.masking import MaskKeeper
from lightning_compress.pruning.statistics import Statistics

__all__ = ["Gathering"]


class Gathering:
    """Feeds a callback's statistics. Weights that may come back are remembered while they are out."""

    def __init__(self, statistics: Statistics, keeper: MaskKeeper) -> None:
        self.statistics, self.keeper = statistics, keeper
        self.last_values: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def start(self, trainer: L.Trainer, pl_module: L.LightningModule, layers: Mapping[str, nn.Module]) -> None:
        """Attach what is needed. Runs at `on_fit_start`."""
        self.stop()
        self.statistics.attach(layers)
        # Raw optimizers and those stepped by hand have no other moment; with a closure this hook would be too early.
        for optimizer in trainer.optimizers if self._steps_by_hand(pl_module) else ():
            self._handles.append(optimizer.register_step_pre_hook(self._by_hand))

    def _steps_by_hand(self, pl_module: L.LightningModule) -> bool:
        return bool(self.statistics.gradients) and not pl_module.automatic_optimization

    def _by_hand(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._gather(optimizer)
        self.keeper.before_optimizer_step(optimizer)

    def before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Gather this step's gradients, then let them be masked."""
        if self._steps_by_hand(pl_module):
            return
        if self.statistics.gradients and not _overflowed(trainer, optimizer):
            self._gather(optimizer)
        self.keeper.before_optimizer_step(optimizer)

    def after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let gradients be masked where no later moment is sure, unless they are still to be gathered."""
        if not self._steps_by_hand(pl_module):
            self.keeper.after_backward(trainer, pl_module)

    @torch.no_grad()
    def _gather(self, optimizer: Optimizer) -> None:
        for name in self.keeper.owned(optimizer):
            weight = self.keeper.weights[name]
            if weight.grad is not None:
                self.statistics.add_gradient(name, self._live(name), weight.grad)

    def _live(self, name: str) -> Tensor:
        weight, mask, last = self.keeper.weights[name], self.keeper.masks.get(name), self.last_values.get(name)
        return weight.detach() if mask is None or last is None else torch.where(mask, weight.detach(), last)

    @torch.no_grad()
    def remembering(self, masks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass new masks on; under movement pruning each weight gets back its last value before its mask is applied."""
        for name, mask in zip(self.keeper.weights, masks, strict=True):
            if "movement" in self.statistics.gradients:
                live = self._live(name).clone()
                self.last_values[name] = live
                self.keeper.weights[name].copy_(live)
            yield mask

    def stop(self) -> None:
        """Leave no hook behind."""
        self.statistics.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """Return sums and remembered values; every process calls it. Empty if nothing is gathered."""
        if not (self.statistics.gradients or self.statistics.activations):
            return {}
        return {"sums": self.statistics.state_dict(), "last_values": dict(self.last_values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was saved. Runs at `on_train_start`."""
        if state:
            weights = self.keeper.weights
            self.statistics.load_state_dict(state["sums"], weights)
            self.last_values = {n: value.to(weights[n].device) for n, value in state["last_values"].items()}


def _overflowed(trainer: L.Trainer, optimizer: Optimizer) -> bool:
    # A gradient scaler is about to skip this step; a sum would never forget its infinities.
    if getattr(trainer.precision_plugin, "scaler", None) is None:
        return False
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in parameters)
