"""Edit an ONNX graph: constants and nodes with names of their own, and who reads a value."""

from __future__ import annotations

import ast
from collections.abc import Callable, Container
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.convenience import replace_all_uses_with
from torch import Tensor

__all__ = ["Editor", "array_of", "input_of", "name_folded_weights", "only_reader", "scopes_of", "vector_of"]

SCOPES = "pkg.torch.onnx.name_scopes"  # the exporter's note on a node: the modules it lies in, then its own name

Attribute = int | list[int]


@dataclass
class Editor:
    """Adds nodes and constants to one graph, each under a name that was free."""

    graph: ir.Graph
    names: set[str | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.names.update(value.name for node in self.graph for value in node.outputs)
        self.names.update(value.name for value in self.graph.inputs)

    def constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        """Return an initializer; the same one for the same name and content."""
        while (known := self.graph.initializers.get(name)) is not None:
            stored = array_of(known)
            if stored.dtype == array.dtype and np.array_equal(stored, array):
                return known
            name += "'"
        value = ir.Value(name=name, const_value=ir.tensor(np.asarray(array), name=name))
        self.graph.register_initializer(value)
        return value

    def before(self, node: ir.Node) -> Adding:
        """Return a function that adds nodes in front of a node."""
        return Adding(self, lambda new: self.graph.insert_before(node, new))

    def behind(self, value: ir.Value) -> Adding:
        """Return a function that adds nodes right where a value is made, in the order of its calls."""
        producer = value.producer()
        if producer is None:
            return self.before(next(iter(self.graph)))
        last = [producer]

        def insert(new: ir.Node) -> None:
            self.graph.insert_after(last[-1], new)
            last.append(new)

        return Adding(self, insert)

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """Let `value` take the place, and the name, of the node's output."""
        old = node.outputs[0]
        value.name, value.shape, value.type = old.name, old.shape, old.type
        replace_all_uses_with(old, value, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def drop_unused_constants(self) -> None:
        """Take out initializers that nothing reads any more: the float copies of integer weights."""
        for value in list(self.graph.initializers.values()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[str(value.name)]


@dataclass(frozen=True)
class Adding:
    """Adds nodes at one place of a graph."""

    editor: Editor
    insert: Callable[[ir.Node], None]

    def __call__(self, op: str, name: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """Insert a node and return its output."""
        while name in self.editor.names:
            name += "'"
        self.editor.names.add(name)
        node = ir.node(op, inputs, attributes, name=name)
        node.outputs[0].name = name
        self.insert(node)
        return node.outputs[0]


def scopes_of(node: ir.Node) -> list[str]:
    """Return the names of the modules that a node of the exporter lies in, outermost first."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return scopes[:-1]


def name_folded_weights(graph: ir.Graph, known: Container[str]) -> None:
    """Name the transposed weight of a product after the module it lies in; the exporter numbers what it folds.

    A weight then has one name in a model's float32 file, its int8 file and its checkpoint. Runs at the end of an
    export, while the nodes still say where they come from.

    Args:
        graph: changed in place.
        known: names of the module's parameters; any other name would be made up.
    """
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or only_reader(weight) is not node:
            continue
        name = ".".join([*scopes_of(node)[-1:], "weight"])
        if weight.name not in known and name in known and name not in graph.initializers:
            del graph.initializers[str(weight.name)]
            weight.name = name
            graph.register_initializer(weight)


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the node that alone reads a value, None where there are more or the graph returns it."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Return an input that the operator cannot do without."""
    value = node.inputs[index]
    if value is None:
        raise ValueError(f"expected {node.op_type} '{node.name}' to have an input {index}, got none")
    return value


def array_of(value: ir.Value) -> np.ndarray:
    """Return a constant."""
    if value.const_value is None:
        raise ValueError(f"expected '{value.name}' to be a constant of the graph")
    return value.const_value.numpy()


def vector_of(value: ir.Value | None, size: int) -> Tensor | None:
    """Return a constant of shape (size,), None if the value is anything else."""
    if value is None or value.const_value is None or array_of(value).shape != (size,):
        return None
    return torch.from_numpy(array_of(value).copy())
