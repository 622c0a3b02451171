"""When what criteria ask for is gathered: at each step's final gradients, before anybody masks or clips them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.callbacks.contract import is_tensor_parallel
from lightning_compress.callbacks.masking import MaskKeeper
from lightning_compress.pruning.statistics import Statistics
from lightning_compress.pruning.targets import Criterion, Target
from lightning_compress.sharding import all_reduce_max, cut, local, whole

__all__ = ["Gathering"]


class Gathering:
    """Feeds a callback's statistics. Weights that may come back are remembered while they are out."""

    def __init__(self, statistics: Statistics, keeper: MaskKeeper) -> None:
        self.statistics, self.keeper = statistics, keeper
        self.last_values: dict[str, Tensor] = {}
        self._told: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def start(self, trainer: L.Trainer, pl_module: L.LightningModule, layers: Mapping[str, nn.Module]) -> None:
        """Attach what is needed. Runs at `on_fit_start`."""
        self.stop()
        self.statistics.check_seen_whole(is_tensor_parallel(trainer))
        self.statistics.attach(layers)
        by_hand = bool(self.statistics.gradients) and not pl_module.automatic_optimization
        for optimizer in trainer.optimizers if by_hand else ():
            self._handles.append(optimizer.register_step_pre_hook(self._before_raw_step))

    def _before_raw_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Torch's own optimizers, stepped by hand. Lightning's tell us in `on_before_optimizer_step`: before this hook
        # where gradients are scaled, else from within the closure that they bring.
        brings_closure = any(argument is not None for argument in (*args[1:], kwargs.get("closure")))
        if not brings_closure and id(optimizer) not in self._told:
            if not float(getattr(optimizer, "found_inf", None) or 0.0):
                self._gather(optimizer, float(getattr(optimizer, "grad_scale", None) or 1.0))
            self.keeper.before_optimizer_step(optimizer)
        self._told.discard(id(optimizer))

    def before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Gather this step's gradients, then let them be masked."""
        if self.statistics.gradients:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is None:
                self._gather(optimizer)
            else:
                self._told.add(id(optimizer))
                if not _overflowed(optimizer, bool(self.keeper.parts)):
                    # Fused optimizers undo the scale themselves, later.
                    scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
                    self._gather(optimizer, scaler.get_scale() if scaled else 1.0)
        self.keeper.before_optimizer_step(optimizer)

    def after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let gradients be masked where no later moment is sure, unless they are still to be gathered."""
        if not self.statistics.gradients:
            self.keeper.after_backward(trainer, pl_module)

    @torch.no_grad()
    def _gather(self, optimizer: Optimizer, scale: float = 1.0) -> None:
        for name in self.keeper.owned(optimizer):
            weight = self.keeper.weights[name]
            if weight.grad is None and weight.numel():
                continue
            # A process whose slice of a weight is empty has no gradient, and takes part all the same.
            gradient = local(weight if weight.grad is None else weight.grad)
            gradient = gradient if scale == 1.0 else gradient.float() / scale
            self.statistics.add_gradient(name, self._live(name), gradient)

    def _live(self, name: str) -> Tensor:
        weight, mask, last = local(self.keeper.weights[name]), self.keeper.masks.get(name), self.last_values.get(name)
        return weight if mask is None or last is None else torch.where(mask, weight, last)

    def targets(
        self, layers: Mapping[str, nn.Module], criterion: Criterion, step: int, comes_back: bool = False
    ) -> list[Target]:
        """Return what a criterion scores at a step, by layers' weights: this process's piece of each."""
        keeper = self.keeper
        return [
            Target(
                name,
                local(keeper.weights[name]),
                layer,
                keeper.masks.get(name),
                criterion,
                {**self.statistics.values(name), "step": lambda: step},
                comes_back,
                part=keeper.parts.get(name),
            )
            for name, layer in layers.items()
        ]

    @torch.no_grad()
    def remembering(self, masks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass new masks on; under movement pruning each weight gets back its last value before its mask is applied."""
        for name, mask in zip(self.keeper.weights, masks, strict=True):
            if "movement" in self.statistics.gradients:
                live = self._live(name).clone()
                self.last_values[name] = live
                local(self.keeper.weights[name]).copy_(live)
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
        parts = self.keeper.parts
        last = {name: whole(value, parts.get(name)).cpu() for name, value in self.last_values.items()}
        return {"sums": self.statistics.state_dict(parts), "last_values": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was saved. Runs at `on_train_start`."""
        if state:
            weights, parts = self.keeper.weights, self.keeper.parts
            self.statistics.load_state_dict(state["sums"], weights, parts)
            last = state["last_values"]
            self.last_values = {n: cut(value, parts.get(n)).to(weights[n].device) for n, value in last.items()}


def _overflowed(optimizer: Optimizer, sharded: bool) -> bool:
    # The gradient scaler is about to skip this step; a sum would never forget its infinities.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = any(p.grad is not None and not bool(torch.isfinite(local(p.grad)).all()) for p in parameters)
    if sharded:  # one process's infinity is in a piece that the others do not see
        return bool(all_reduce_max(torch.tensor(int(found), device=parameters[0].device)))
    return found
