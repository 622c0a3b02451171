"""What criteria ask for besides the weight: sums of gradients, and of what flows through a layer, between updates.

Sums are in float32 or wider. Those of a layer's inputs and outputs are gathered by two hooks, plain functions that
read their state from the layer they are called with, so that copies and pickles of the module work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.errors import CompressError
from lightning_compress.parts import Part
from lightning_compress.pruning.targets import TRANSPOSED
from lightning_compress.sharding import all_reduce_sum, cut, process_rank, whole

__all__ = ["ACTIVATIONS", "GRADIENTS", "Statistics"]

GRADIENTS = frozenset({"gradient", "squared_gradient", "movement"})
ACTIVATIONS = frozenset({"input_norm", "activation", "positive_share"})
STATE = "_activity"


@dataclass
class Activity:
    """Sums over what a layer saw: squares of each input channel, sizes and signs of each output channel."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)

    def add(self, what: str, values: Tensor, channel: int) -> None:
        """Add values, summed over all dimensions but the channel's, and their number."""
        others = [axis for axis in range(values.dim()) if axis != channel % values.dim()]
        total = values.sum(dim=others, dtype=torch.float32) if others else values.float()
        count = torch.full((), values.numel() / max(1, total.numel()), device=values.device)
        self.sums[what] = self.sums[what] + total if what in self.sums else total
        self.sums[f"{what}/n"] = self.sums[f"{what}/n"] + count if f"{what}/n" in self.sums else count


def _channel(layer: nn.Module) -> int:
    return -1 if isinstance(layer, nn.Linear) else -len(layer.kernel_size) - 1  # type: ignore[arg-type]


def _gathers(layer: nn.Module) -> bool:
    # By whether gradients are wanted: fine-tuned modules may well train in eval mode (Hugging Face's do). A tracer's
    # tensors hold no numbers.
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return STATE in layer.__dict__ and torch.is_grad_enabled() and not traced


def _see_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    value = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
    if value is not None and _gathers(layer):
        layer.__dict__[STATE].add("input", value.detach().float().square(), _channel(layer))


def _see_output(layer: nn.Module, args: Any, output: Tensor) -> None:
    if _gathers(layer):
        layer.__dict__[STATE].add("output", output.detach().abs(), _channel(layer))
        layer.__dict__[STATE].add("positive", (output.detach() > 0).float(), _channel(layer))


class Statistics:
    """Gathers what criteria ask for about some weights; means are since the last `reset`, movement is of all steps."""

    def __init__(self, asked: Iterable[str]) -> None:
        asked = frozenset(asked)
        self.gradients, self.activations = asked & GRADIENTS, asked & ACTIVATIONS
        self.sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in sorted(self.gradients)}
        self.steps: dict[str, int] = {}
        self.layers: dict[str, nn.Module] = {}

    def check_seen_whole(self, together: bool) -> None:
        """Raise if activations are asked for where no process sees all of them. Runs at `on_fit_start`.

        Args:
            together: whether several processes compute a layer together, each with a part of its channels.

        Raises:
            CompressError: they are, under tensor parallelism.
        """
        if self.activations and together:
            raise CompressError(
                f"the criterion asks for {', '.join(sorted(self.activations))}, of which a process sees a part under "
                f"tensor parallelism; take a criterion of weights or gradients, or tensor_parallel_size=1"
            )

    def check(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Raise if activations are asked for of a layer that is used without being called. Runs at `setup`.

        Raises:
            CompressError: the output projection of an `nn.MultiheadAttention`.
        """
        attentions = (child for child in module.modules() if isinstance(child, nn.MultiheadAttention))
        uncalled = {id(attention.out_proj.weight) for attention in attentions}
        names = [name.removesuffix(".weight") for name, weight in weights.items() if id(weight) in uncalled]
        if self.activations and names:
            raise CompressError(
                f"the criterion asks for {', '.join(sorted(self.activations))}, which nobody sees of an "
                f"nn.MultiheadAttention's output projection: it is used without being called; exclude={names}"
            )

    # Gathering

    def attach(self, layers: Mapping[str, nn.Module]) -> None:
        """Watch layers (by their weight's name) if the criterion asks for activations. Runs at `on_fit_start`."""
        self.detach()
        self.layers = dict(layers)
        for layer in {id(layer): layer for layer in self.layers.values()}.values() if self.activations else ():
            activity = layer.__dict__[STATE] = Activity()
            if "input_norm" in self.activations:
                activity.handles.append(layer.register_forward_pre_hook(_see_input, with_kwargs=True, prepend=True))
            if self.activations - {"input_norm"}:
                activity.handles.append(layer.register_forward_hook(_see_output))

    def detach(self) -> None:
        """Leave no hook and no attribute behind."""
        for layer in self.layers.values():
            activity = layer.__dict__.pop(STATE, None)
            for handle in activity.handles if activity is not None else ():
                handle.remove()
        self.layers = {}

    @torch.no_grad()
    def add_gradient(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Add one step's gradient (scaled and averaged as the optimizer sees it) and the weight it was taken at."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        self.steps[name] = self.steps.get(name, 0) + 1
        for kind, sums in self.sums.items():
            total = sums.setdefault(name, torch.zeros_like(gradient, dtype=wide))
            if kind == "gradient":
                total.add_(gradient)
            else:
                factor, sign = (gradient, 1) if kind == "squared_gradient" else (weight, -1)
                total.addcmul_(gradient.to(wide), factor.detach().to(wide), value=sign)

    def cut(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
        """Keep of each sum of gradients what is kept of its weight. Runs after channels were removed.

        Args:
            masks: of the weights as they were, False along the rows and columns that have gone.
            weights: as they are now.
        """
        for sums in self.sums.values():
            for name in sums.keys() & masks.keys():
                sums[name] = sums[name][masks[name]].view(weights[name].shape)

    def clear(self) -> None:
        """Forget everything; for a fresh run with the same callback object."""
        self.sums = {kind: {} for kind in sorted(self.gradients)}
        self.reset()

    def reset(self) -> None:
        """Start the means anew. Runs after each update."""
        for kind in self.gradients - {"movement"}:
            self.sums[kind] = {}
        self.steps = {}
        for layer in self.layers.values():
            if STATE in layer.__dict__:
                layer.__dict__[STATE].sums = {}

    # Asking

    def values(self, name: str) -> dict[str, Callable[[], Any]]:
        """Return what a criterion may ask for about a weight, each made when it is called."""
        own = {kind: partial(self._gradient, kind, name) for kind in self.gradients}
        return {**own, **{kind: partial(self._activation, kind, name) for kind in self.activations}}

    def reduce(self) -> None:
        """Sum activations over processes; gradients are averaged already. All processes call it, before an update."""
        for layer in {id(layer): layer for layer in self.layers.values()}.values() if self.activations else ():
            sums = layer.__dict__[STATE].sums
            for what in sorted(sums):
                sums[what] = all_reduce_sum(sums[what].clone())

    def _gradient(self, kind: str, name: str) -> Tensor:
        total = self.sums[kind].get(name)
        if total is None:
            raise CompressError(
                f"the criterion asks for the {kind} of '{name}', which has had none since the last update: it took "
                f"no part in the loss, or no backward came before; exclude it, or begin the window later"
            )
        return total if kind == "movement" else total / self.steps[name]

    def _activation(self, kind: str, name: str) -> Tensor:
        layer = self.layers[name]
        sums = layer.__dict__[STATE].sums
        what = {"input_norm": "input", "activation": "output", "positive_share": "positive"}[kind]
        if what not in sums:
            raise CompressError(
                f"the criterion asks for {kind} of '{name}', which has not run in training since the last update; "
                f"exclude it, or begin the window later"
            )
        mean = sums[what] / sums[f"{what}/n"]
        return _broadcast_input(layer, mean.sqrt()) if kind == "input_norm" else _broadcast_output(layer, mean)

    # Checkpoints

    def state_dict(self, parts: Mapping[str, Part] | None = None) -> dict[str, Any]:
        """Return the sums as tensors and primitives, those of all processes together: every process calls it.

        Args:
            parts: what this process holds of each weight; without one it is the whole.
        """
        parts = parts or {}
        activity: dict[str, dict[str, Tensor]] = {}
        for name, layer in self.layers.items() if self.activations else ():
            sums = layer.__dict__[STATE].sums
            activity[name] = {what: all_reduce_sum(sums[what].clone()) for what in sorted(sums)}
        gradients = {
            kind: {name: whole(total, parts.get(name)).to("cpu", copy=True) for name, total in sums.items()}
            for kind, sums in self.sums.items()
        }
        return {"gradients": gradients, "steps": dict(self.steps), "activity": activity}

    def load_state_dict(
        self, state: Mapping[str, Any], weights: Mapping[str, Tensor], parts: Mapping[str, Part] | None = None
    ) -> None:
        """Take over saved sums, onto the weights' devices. Runs at `on_train_start`."""
        parts = parts or {}
        self.steps = {name: int(count) for name, count in state["steps"].items()}
        for kind, sums in state["gradients"].items():
            self.sums[kind] = {n: cut(total, parts.get(n)).to(weights[n].device) for n, total in sums.items()}
        for name, sums in state["activity"].items():
            # They were saved as the sum over processes: one of them goes on with it.
            mine = {what: value.to(weights[name].device) * (process_rank() == 0) for what, value in sums.items()}
            self.layers[name].__dict__[STATE].sums = mine


def _broadcast_input(layer: nn.Module, values: Tensor) -> Tensor:
    """Shape a value for each input channel so that it broadcasts to the weight."""
    if isinstance(layer, nn.Linear):
        return values.unsqueeze(0)
    spatial = [1] * len(layer.kernel_size)  # type: ignore[arg-type]
    if isinstance(layer, TRANSPOSED):
        return values.view(-1, 1, *spatial)
    groups, outputs = int(layer.groups), int(layer.out_channels)  # type: ignore[arg-type]
    return values.view(groups, -1).repeat_interleave(outputs // groups, dim=0).view(outputs, -1, *spatial)


def _broadcast_output(layer: nn.Module, values: Tensor) -> Tensor:
    """Shape a value for each output channel so that it broadcasts to the weight."""
    if isinstance(layer, nn.Linear):
        return values.unsqueeze(1)
    spatial = [1] * len(layer.kernel_size)  # type: ignore[arg-type]
    if not isinstance(layer, TRANSPOSED):
        return values.view(-1, 1, *spatial)
    groups, inputs = int(layer.groups), int(layer.in_channels)  # type: ignore[arg-type]
    return values.view(groups, -1).repeat_interleave(inputs // groups, dim=0).view(inputs, -1, *spatial)
