"""From a module to the exporter's ONNX graph, silently, with the module left as it was."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.errors import CompressError

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Inputs", "OpenSizes", "evaluating", "inputs_beside", "open_shapes", "quiet", "strip", "traced"]

OPSET = 20  # fixed, so that a newer exporter writes the same file
CHATTY = (
    "torch.onnx._internal.exporter._registration",  # "torchvision is not installed", once for each operator
    "onnxscript.optimizer._constant_folding",  # "Evaluation failed", where a node just stays as it is
)
# Of torch 2.13: its own tree specifications copied; one name for the batch of several inputs, which is what we want;
# inputs that are no tensors, which become constants.
OF_THE_EXPORTER = (
    (r"`isinstance\(treespec, LeafSpec\)`", FutureWarning),
    ("# The axis name: (batch|sequence) will not be used", UserWarning),
    ("# ONNX model has different number of inputs", UserWarning),
)
Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class OpenSizes:
    """Which sizes of the inputs a file leaves open: the first of each, the second of each with two or more."""

    batch: bool = True
    sequence: bool = False

    @property
    def names(self) -> dict[int, str]:
        """Dimension -> what it is called."""
        wanted = ((0, "batch", self.batch), (1, "sequence", self.sequence))
        return {dim: name for dim, name, is_open in wanted if is_open}

    def of(self, leaf: Any) -> list[int]:
        """Return the open dimensions of a leaf of the inputs."""
        return [dim for dim in self.names if isinstance(leaf, Tensor) and leaf.dim() > dim]


def inputs_beside(module: nn.Module, inputs: Inputs) -> Inputs:
    """Return the inputs on the device of the module's first parameter, without their gradients."""
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    moved: Inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), inputs)
    return moved


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set eval mode and no gradients inside the block, and let compiled parts run plain; undo it after.

    `train()` is not called: a module may have overridden it to do more.
    """
    modes = {layer: layer.training for layer in module.modules()}
    try:
        for layer in modes:
            layer.training = False
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, mode in modes.items():
            layer.training = mode


def traced(
    module: nn.Module,
    inputs: Inputs,
    open_sizes: OpenSizes,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> ir.Model:
    """Return the float32 graph of a module in eval mode, batch norms folded, each node noted with its module.

    Raises:
        ValueError: a size is to be open in which the inputs differ.
        CompressError: the exporter cannot trace or translate `forward`.
    """
    inputs, shapes = open_shapes(inputs, open_sizes)
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, None)
    try:
        with quiet(CHATTY, OF_THE_EXPORTER):
            program = torch.onnx.export(
                module, args, kwargs=kwargs, dynamo=True, verbose=False, opset_version=OPSET,
                dynamic_shapes=shapes, input_names=input_names, output_names=output_names,
            )  # fmt: skip
    except torch.onnx.OnnxExporterError as error:
        options = ", ".join(f"dynamic_{name}=False" for name in open_sizes.names.values())
        cure = f"; if forward fixes such a size, pass {options}" if options else ""
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise CompressError(f"torch.onnx.export cannot export {type(module).__name__}: {reason}{cure}") from error
    if program is None:
        raise CompressError("torch.onnx.export returned no program; it needs torch 2.8 or newer")
    return program.model


def open_shapes(inputs: Inputs, open_sizes: OpenSizes) -> tuple[Inputs, Any]:
    """Return inputs to trace with, and the sizes that torch.export is to leave open, None for none.

    Raises:
        ValueError: the inputs differ in a size that is to be open.
    """
    if not open_sizes.names:
        return inputs, None
    inputs = _with_open_sizes(inputs, open_sizes)
    sizes = {dim: torch.export.Dim(name) for dim, name in open_sizes.names.items()}
    return inputs, pytree.tree_map(lambda leaf: {dim: sizes[dim] for dim in open_sizes.of(leaf)} or None, inputs)


def _with_open_sizes(inputs: Inputs, open_sizes: OpenSizes) -> Inputs:
    """Check that all inputs have one size where it is to be open, and double a size of 1: the tracer would fix it."""
    for dim, name in open_sizes.names.items():
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if dim in open_sizes.of(leaf)]
        sizes = {leaf.shape[dim] for leaf in leaves}
        if len(sizes) > 1:
            raise ValueError(
                f"dynamic_{name}=True needs inputs of one {('first', 'second')[dim]} size, got {sorted(sizes)}; pass "
                f"dynamic_{name}=False"
            )
        if sizes == {1}:
            inputs = _doubled(inputs, dim)
    return inputs


def _doubled(inputs: Inputs, dim: int) -> Inputs:
    def doubled(leaf: Any) -> Any:
        return torch.cat([leaf, leaf], dim) if isinstance(leaf, Tensor) and leaf.dim() > dim else leaf

    twice: Inputs = pytree.tree_map(doubled, inputs)
    return twice


@contextmanager
def quiet(names: Iterable[str], ignored: Iterable[tuple[str, type[Warning]]]) -> Iterator[None]:
    """Keep out, inside the block, what an exporter says about itself and not about the module.

    Args:
        names: of its loggers.
        ignored: starts of its warnings, as regular expressions, and their classes.
    """
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            for message, category in ignored:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def strip(model: ir.Model) -> None:
    """Take out what only a debugger reads: stack traces, module scopes, signatures, shapes inside the graph.

    Without the inner shapes ONNX Runtime infers its own, and was not slower for it (a small BERT: 1.15x faster).
    """
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    model.doc_string = graph.doc_string = None
    nodes = list(graph.all_nodes())
    for node in nodes:
        node.metadata_props.clear()
        node.doc_string = None
    inner = [*graph.initializers.values(), *(value for node in nodes for value in node.outputs)]
    for value in (*graph.inputs, *inner):
        value.metadata_props.clear()
        value.doc_string = None
    for value in inner:
        if not value.is_graph_output():
            value.shape = value.type = None
