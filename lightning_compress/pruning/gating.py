"""Attach gates to layers by two forward hooks, so that no class, key or parameter changes, and let them learn.

The pre-hook puts the gated weight into the module's `__dict__`, where it shadows the registered parameter; the
forward hook takes it away again. Both are plain functions that read their state from the module they are called with,
so copies and pickles of the module work. They run outside those of fake-quantization, whichever was attached first:
what is rounded is the gated weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.hooks import RemovableHandle

from lightning_compress.errors import CheckpointMismatch, NothingToCompress
from lightning_compress.pruning.gates import Gate
from lightning_compress.shadowing import remember, restore
from lightning_compress.sharding import all_reduce_sum, world_size

__all__ = ["Gated", "LearnedGates", "attach_gate", "called_weights", "detach_gate"]

STATE = "_gate"


@dataclass
class Gated:
    """State of one attached layer."""

    gate: Gate
    parameter: Tensor
    values: Tensor  # the same memory without gradient: an exporter would warn of the parameter
    noise: Tensor | None = None
    shadowed: list[Any] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)


def _before_forward(module: nn.Module, args: Any) -> None:
    state: Gated = module.__dict__[STATE]
    remember(module, state.shadowed)
    weight: Tensor = module.weight  # type: ignore[assignment]
    # A frozen or toggled weight learns nothing now, and neither does its gate.
    learns = weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_exporting()
    noise = state.noise if module.training else None
    module.__dict__["weight"] = state.gate(weight, state.parameter if learns else state.values, noise)


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    restore(module, module.__dict__[STATE].shadowed)


def attach_gate(module: nn.Module, gate: Gate, parameter: Tensor) -> Gated:
    """Let a layer compute with its gated weight from now on: with noise in training mode, without in evaluation."""
    state = Gated(gate, parameter, parameter.detach())
    module.__dict__[STATE] = state
    state.handles = [
        module.register_forward_pre_hook(_before_forward, prepend=True),
        module.register_forward_hook(_after_forward, always_call=True),
    ]
    return state


def detach_gate(module: nn.Module) -> None:
    """Take the gate off one layer; a layer without it is left as it is."""
    state: Gated | None = module.__dict__.pop(STATE, None)
    for handle in state.handles if state else ():
        handle.remove()


class LearnedGates:
    """The gates of some weights by clean name: a parameter and an optimizer each, and the layers that compute with it.

    Nothing of it is in the module's parameters or the user's optimizers.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.parameters: dict[str, Tensor] = {}
        self._optimizers: dict[str, Adam] = {}
        self._layers: dict[str, list[nn.Module]] = {}

    @property
    def attached(self) -> bool:
        """Whether layers compute with gated weights now."""
        return bool(self._layers)

    def attach(self, module: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        """Attach to every layer that holds one of the weights; gates that are there already go on learning."""
        for name, weight in weights.items():
            if name not in self.parameters:
                self._add(name, self.gate.initial(weight.detach()))
            self._layers[name] = [layer for layer in module.modules() if _own_weight(layer) is weight]
            for layer in self._layers[name]:
                attach_gate(layer, self.gate, self.parameters[name])

    def _add(self, name: str, value: Tensor) -> None:
        self.parameters[name] = value.detach().clone().requires_grad_()
        self._optimizers[name] = Adam([self.parameters[name]], lr=float(self.gate.learning_rate))

    def draw(self, step: int) -> None:
        """Draw the noise of the step to come. A backward through the last one's forward still finds the old tensors."""
        for name, layers in self._layers.items():
            noise = self.gate.noise(self.parameters[name].detach(), name, step)
            for layer in layers:
                layer.__dict__[STATE].noise = noise

    def penalties(self, weights: Mapping[str, nn.Parameter]) -> list[Tensor]:
        """Return the penalty of each gate; without gradient where the weight has none."""
        learning = (p if weights[name].requires_grad else p.detach() for name, p in self.parameters.items())
        return [self.gate.penalty(parameter) for parameter in learning]

    def forget_stale_gradients(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Clear the gradients of gates whose weights' gradients were cleared. Runs before each backward."""
        for name, parameter in self.parameters.items():
            if weights[name].grad is None:
                parameter.grad = None

    def step(self, names: Iterable[str]) -> None:
        """Step the gates of these weights by gradients averaged over processes; every process calls it."""
        for name in names:
            parameter = self.parameters[name]
            if world_size() > 1:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = all_reduce_sum(gradient).div_(world_size())
            self._optimizers[name].step()
            parameter.grad = None

    @torch.no_grad()
    def fold(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Put the gated weights of evaluation in the place of the weights."""
        for name, parameter in self.parameters.items():
            if name in weights:
                weight = weights[name]
                weight.copy_(self.gate(weight.detach(), parameter.to(weight.device), None))

    def scores(self, name: str, weight: Tensor) -> Tensor:
        """Return the keep scores of one weight."""
        return self.gate.scores(weight.detach(), self.parameters[name].detach())

    def detach(self) -> None:
        """Take the gates off the layers; what they learned stays."""
        for layers in self._layers.values():
            for layer in layers:
                detach_gate(layer)
        self._layers = {}

    def clear(self) -> None:
        """Forget everything."""
        self.detach()
        self.parameters, self._optimizers = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and optimizers' states as plain containers of tensors."""
        parameters = {name: parameter.detach() for name, parameter in self.parameters.items()}
        return {"parameters": parameters, "optimizers": {n: o.state_dict() for n, o in self._optimizers.items()}}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, nn.Parameter]) -> None:
        """Take over saved gates. Runs at `on_train_start`.

        Raises:
            CheckpointMismatch: they are of other weights.
        """
        self.clear()
        differing = sorted(state["parameters"].keys() ^ weights.keys()) if state["parameters"] else []
        if differing:
            raise CheckpointMismatch(
                f"the checkpoint has gates for other weights than this model's selection; first difference: "
                f"'{differing[0]}'; resume with the model and include/exclude that made it"
            )
        for name, value in state["parameters"].items():
            self._add(name, value.to(weights[name].device))
            self._optimizers[name].load_state_dict(state["optimizers"][name])


def _own_weight(layer: nn.Module) -> nn.Parameter | None:
    return dict(layer.named_parameters(recurse=False)).get("weight")


def called_weights(module: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Leave out weights of layers that are used without being called, which hooks never see. Runs at `setup`.

    These are the output projections of `nn.MultiheadAttention`.

    Raises:
        NothingToCompress: nothing is left.

    >>> block = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    >>> inside = {"attention.out_proj.weight": block["attention"].out_proj.weight}
    >>> list(called_weights(block, {**inside, "linear.weight": block["linear"].weight}))
    ['linear.weight']
    """
    attentions = (child for child in module.modules() if isinstance(child, nn.MultiheadAttention))
    uncalled = {id(attention.out_proj.weight) for attention in attentions}
    called = {name: weight for name, weight in weights.items() if id(weight) not in uncalled}
    if not called:
        raise NothingToCompress(
            f"gates work in layers that are called, and of {', '.join(weights)} none is; include other layers, or use "
            f"a penalty such as term=l1"
        )
    return called
