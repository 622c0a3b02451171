"""One forward of a module as a graph, and the labels of its parameters run through it."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressError
from lightning_compress.pruning.calls import Call
from lightning_compress.pruning.labels import Labels, Value
from lightning_compress.pruning.propagation import propagate
from lightning_compress.sharding import clean_name

__all__ = ["Place", "evaluated_copy", "label", "named_tensors", "plain_forward", "tensors_of", "traced"]

ALONE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)  # layers whose forward has numbers of its own


@dataclass(frozen=True)
class Place:
    """The labels along one dimension of one parameter or buffer."""

    tensor: str
    dim: int
    labels: Tensor


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and saved floating-point buffers by clean name; a tied one once, under its first name.

    Buffers that are not saved (tables of positions, masks) are made by the forward's own numbers.

    >>> list(named_tensors(nn.BatchNorm1d(2)))
    ['weight', 'bias', 'running_mean', 'running_var']
    """
    saved = module.state_dict(keep_vars=True)
    named = [*module.named_parameters(), *((name, buffer) for name, buffer in module.named_buffers() if name in saved)]
    return {clean_name(name): tensor for name, tensor in named if tensor.is_floating_point()}


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors in what a forward returned: nested tuples, lists, dicts and dataclasses."""
    found = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += tensors_of(list(leaf.values()))
        elif is_dataclass(leaf):
            found += tensors_of([getattr(leaf, field.name) for field in fields(leaf)])
    return found


class _TensorsOnly(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        output = self.module(*args, **kwargs)
        tensors = tensors_of(output)
        if not tensors:
            raise TypeError(f"forward returns {type(output).__name__}, in which no tensor was found")
        return tensors


def evaluated_copy(module: nn.Module, share: bool) -> nn.Module:
    """Return a copy in eval mode; `share`: with the very same parameters and buffers."""
    shared = {id(t): t for t in (*module.parameters(), *module.buffers())} if share else {}
    clone: nn.Module = copy.deepcopy(module, shared)
    for layer in clone.modules():
        layer.training = False  # not eval(), which a module may have overridden
    return clone


@contextmanager
def plain_forward() -> Iterator[None]:
    """Run forwards without gradients, operation by operation: no fused transformer layers. Runs for tracing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def traced(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    """Return the graph of one forward in eval mode.

    Raises:
        CompressError: it cannot be traced; says what stood in the way.
    """
    wrapped = _TensorsOnly(evaluated_copy(module, share=True))
    try:
        with plain_forward(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer, about a copy that is thrown away
            return torch.export.export(wrapped, tuple(args), dict(kwargs), strict=False)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise CompressError(
            f"the forward of {type(module).__name__} cannot be traced: {type(error).__name__}: "
            f"{' '.join(lines[:2])}. Channels are only removed from a forward that torch.export can trace: replace "
            f"branches and loops that depend on tensors' values, or use GradualPruning, which needs no graph"
        ) from error


def label(module: nn.Module, program: ExportedProgram) -> tuple[Labels, list[Place]]:
    """Run labels through a graph; returns them, and the places they stand for."""
    labels, places = Labels(), []
    values = {}
    for name, tensor in named_tensors(module).items():
        own = [Place(name, dim, labels.new(size)) for dim, size in enumerate(tensor.shape) if size > 1]
        places += own
        shaped = [place.labels.reshape([-1 if d == place.dim else 1 for d in range(tensor.dim())]) for place in own]
        values[name] = Value(tuple(tensor.shape), tuple(shaped))
    _leave_alone(module, labels, values)
    _interpret(program, labels, _by_node(module, program, values))
    labels.straighten()
    return labels, places


def _leave_alone(module: nn.Module, labels: Labels, values: Mapping[str, Value]) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, ALONE):
            own = [f"{clean_name(name)}.{n}".removeprefix(".") for n, _ in layer.named_parameters()]
            reason = f"belongs to {type(layer).__name__} '{clean_name(name)}', whose forward has sizes of its own"
            labels.freeze_all([values[n] for n in own if n in values], reason)


def _by_node(module: nn.Module, program: ExportedProgram, values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the labelled values by the names of the graph's inputs."""
    first = {id(tensor): name for name, tensor in named_tensors(module).items()}
    every = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    canonical = {clean_name(name): first[id(tensor)] for name, tensor in every if id(tensor) in first}
    signature = program.graph_signature
    inputs = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = {node: clean_name(name).removeprefix("module.") for node, name in inputs.items()}
    return {node: values[canonical[name]] for node, name in names.items() if name in canonical}


def _shape(result: Any) -> Any:
    if isinstance(result, (list, tuple)):
        return [_shape(part) for part in result]
    return result.shape if isinstance(result, Tensor) else None


def _interpret(program: ExportedProgram, labels: Labels, known: Mapping[str, Value]) -> None:
    results: dict[torch.fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            shape = _shape(node.meta.get("val"))
            results[node] = known.get(node.name) or (Value(tuple(shape)) if shape is not None else None)
            continue
        args = torch.fx.node.map_arg(node.args, results.__getitem__)
        if node.op == "output":
            leaves = pytree.tree_leaves(args, is_leaf=lambda leaf: isinstance(leaf, Value))
            outputs = [leaf for leaf in leaves if isinstance(leaf, Value)]
            labels.freeze_all(outputs, "is an output of the forward")
        elif node.op == "get_attr":
            results[node] = None
        elif node.target is operator.getitem:
            results[node] = args[0][args[1]]
        else:
            kwargs = torch.fx.node.map_arg(node.kwargs, results.__getitem__)
            name = str(node.target).removeprefix("aten.").partition(".")[0]
            results[node] = propagate(labels, Call(name, node.target, args, kwargs, _shape(node.meta.get("val"))))
