"""Chains of layers found in a traced forward: a layer whose every output channel reaches one next layer, and only it.

Between them may lie a batch norm and operations that keep channels apart and commute with a positive factor, such as
ReLU and pooling.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from lightning_compress.pruning.tracing import traced
from lightning_compress.sharding import clean_name

__all__ = ["Chain", "find_chains", "layers_with_norm"]

POSITIVE = {  # op(factor * x) = factor * op(x) for factors > 0, channel by channel
    "alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "leaky_relu", "leaky_relu_", "prelu",
    "relu", "relu_",
}  # fmt: skip
SPATIAL = {  # the same, for images whose channels are dimension 1
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "max_pool1d", "max_pool2d", "max_pool3d",
}  # fmt: skip
FLATTENED = {"flatten", "view", "reshape", "_unsafe_view"}
CLAMPED = {"hardtanh", "hardtanh_", "relu6", "relu6_"}
LAYERS = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}


@dataclass(frozen=True)
class Chain:
    """Two layers by name, what lies between, and the batch norm right behind the second.

    `repeats` inputs of the second read each output of the first.
    """

    first: str
    second: str
    norm: str | None = None
    clamps: tuple[str, ...] = ()
    repeats: int = 1
    norm_after: str | None = None


@dataclass
class _Graph:
    """A traced forward, and which module each parameter in it belongs to."""

    program: ExportedProgram
    module: nn.Module
    owners: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        signature = self.program.graph_signature
        inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        every = {
            clean_name(name): tensor
            for name, tensor in (
                *self.module.named_parameters(remove_duplicate=False),
                *self.module.named_buffers(remove_duplicate=False),
            )
        }
        uses = Counter(id(tensor) for tensor in every.values())
        for node, path in inputs.items():
            name = clean_name(path).removeprefix("module.")
            if name in every and uses[id(every[name])] == 1:  # a tied one belongs to nobody
                self.owners[node] = name

    def owner(self, argument: Any, of: str) -> str | None:
        """Return the module whose parameter or buffer `of` this argument is, and is only here."""
        if not isinstance(argument, Node) or argument.op != "placeholder" or len(argument.users) != 1:
            return None
        name = self.owners.get(argument.name)
        return name[: -len(of) - 1] if name is not None and name.endswith(f".{of}") else None

    def layer(self, node: Node) -> str | None:
        """Return the name of the Linear or Conv that a node computes, if nothing else uses its weight."""
        spatial = LAYERS.get(_name(node))
        if spatial is None:
            return None
        name = self.owner(node.args[1], "weight")
        images = _shape(node.args[0])
        return name if not spatial or len(images) == spatial + 2 else None

    def norm_of(self, layer: Node) -> str | None:
        """Return the batch norm, with running statistics, that alone reads a layer's output, channel by channel."""
        node, rows = _only_user(layer), _name(layer) == "linear" and len(_shape(layer)) > 2
        if node is None or rows or _name(node) != "batch_norm" or node.args[5]:
            return None
        return self.owner(node.args[3], "running_mean")


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0] if node.op == "call_function" else ""


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].args and users[0].args[0] is node else None


def _repeats(node: Node, channels: int, repeats: int) -> int | None:
    """Return how many entries of the channel dimension each channel has after an operation; None if they mix."""
    before, after, name = _shape(node.args[0]), _shape(node), _name(node)
    if name in POSITIVE or (name in FLATTENED and before == after):
        return repeats
    if len(before) < 3:
        return None
    if name in FLATTENED:
        flat = len(after) == 2 and after[0] == before[0] and after[1] % channels == 0
        return after[1] // channels if flat else None
    return repeats if name in SPATIAL or _of_images(node, name, len(before)) else None


def _of_images(node: Node, name: str, dims: int) -> bool:
    """Whether an operation is a mean over, or a padding with zeros (or with the image) of, spatial dimensions only."""
    if name == "mean":
        over = node.args[1] if len(node.args) > 1 else None
        return isinstance(over, (list, tuple)) and all(int(dim) % dims >= 2 for dim in over)
    if name not in ("constant_pad_nd", "pad"):
        return False
    value = node.args[2:] if name == "constant_pad_nd" else node.args[3:]
    return len(node.args[1]) <= 2 * (dims - 2) and not any(value)  # type: ignore[arg-type]


def _clamp(node: Node, module: nn.Module) -> str | None:
    """Return the name of the ReLU6 module that a node computes."""
    if _name(node) not in CLAMPED:
        return None
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name = clean_name(stack[-1][0]).removeprefix("module.") if stack else ""
    found = dict(module.named_modules(remove_duplicate=False)).get(name)
    return name if isinstance(found, nn.ReLU6) else None


def _from(graph: _Graph, node: Node, first: str) -> Chain | None:
    """Follow what one layer gives to the layer that reads it; None where something else does, or mixes channels."""
    linear = _name(node) == "linear"
    channels, repeats = _shape(node)[-1 if linear else 1], 1
    norm: str | None = None
    clamps: list[str] = []
    current = _only_user(node)
    while current is not None:
        second = graph.layer(current)
        if second is not None:
            flat = linear or len(_shape(current.args[0])) == 2
            if (_name(current) == "linear") != flat:
                return None
            return Chain(first, second, norm, tuple(clamps), repeats, graph.norm_of(current))
        found = graph.norm_of(node) if current.args[0] is node else None
        clamp = _clamp(current, graph.module)
        now = _repeats(current, channels, repeats) if not linear or _name(current) in POSITIVE else None
        if found is not None:
            norm = found
        elif clamp is not None:
            clamps.append(clamp)
        elif now is not None:
            repeats = now
        else:
            return None
        current = _only_user(current)
    return None


def _graph(module: nn.Module, batch: Any) -> _Graph:
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (batch, {})
    args = args if isinstance(args, (tuple, list)) else (args,)
    return _Graph(traced(module, args, kwargs), module)


def find_chains(module: nn.Module, batch: Any) -> list[Chain]:
    """Return the chains of a module, in forward order. Runs once, before equalization.

    Args:
        module: any module that `torch.export` can trace in eval mode.
        batch: one batch of inputs: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.

    Raises:
        CompressError: the forward cannot be traced.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
    >>> find_chains(net, torch.zeros(2, 1, 8, 8))
    [Chain(first='0', second='3', norm='1', clamps=(), repeats=1, norm_after=None)]
    """
    graph = _graph(module, batch)
    found: list[Chain] = []
    for node in graph.program.graph.nodes:
        first = graph.layer(node)
        chain = _from(graph, node, first) if first is not None else None
        if chain is not None:
            found.append(chain)
    return found


def layers_with_norm(module: nn.Module, batch: Any) -> dict[str, str]:
    """Return each Conv or Linear whose output goes to a batch norm and nowhere else: layer name -> norm name.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4))
    >>> layers_with_norm(net, torch.zeros(2, 1, 8, 8))
    {'0': '1'}
    """
    graph = _graph(module, batch)
    found: dict[str, str] = {}
    for node in graph.program.graph.nodes:
        first = graph.layer(node)
        norm = graph.norm_of(node) if first is not None else None
        if first is not None and norm is not None:
            found[first] = norm
    return found
