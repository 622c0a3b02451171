"""What second-order pruning knows of a layer: the mean of 2 x x^T over its inputs, the Hessian of its output error.

It is gathered by a pre-hook, a plain function that reads its state from the layer it is called with, so that copies
and pickles of the module work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_compress.sharding import all_reduce_sum, process_rank

__all__ = [
    "RECONSTRUCTIBLE",
    "Hessian",
    "InputHessians",
    "add_inputs",
    "as_matrices",
    "as_weight",
    "empty_hessian",
    "layer_inputs",
    "watching",
]

RECONSTRUCTIBLE: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d)
STATE = "_input_hessian"
CHUNK = 1 << 22  # elements of unfolded images held at a time


@dataclass
class Hessian:
    """Sums of 2 x x^T, one matrix a group of a Conv (one in all for a Linear): groups x inputs x inputs numbers.

    Args:
        sums: float32, or float64 for float64 weights; shape (groups, inputs, inputs).
        samples: int64 scalar; the number of inputs x: rows of a Linear's input, positions of a Conv's output.
    """

    sums: Tensor
    samples: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over all inputs; zeros before the first."""
        return self.sums / self.samples.clamp_min(1)


def as_matrices(layer: nn.Module, weight: Tensor) -> Tensor:
    """View a weight as one matrix a group: (groups, outputs, inputs). Input channels of one position lie side by side.

    >>> as_matrices(nn.Conv1d(4, 6, 3, groups=2), torch.zeros(6, 2, 3)).shape
    torch.Size([2, 3, 6])
    """
    if isinstance(layer, nn.Linear):
        return weight.unsqueeze(0)
    outputs, groups = weight.shape[0], int(layer.groups)  # type: ignore[arg-type]
    return weight.flatten(2).transpose(1, 2).reshape(groups, outputs // groups, -1)


def as_weight(layer: nn.Module, matrices: Tensor, shape: torch.Size) -> Tensor:
    """Return the weight of the given shape from its matrices.

    >>> layer = nn.Conv2d(4, 6, 3, groups=2)
    >>> torch.equal(as_weight(layer, as_matrices(layer, layer.weight), layer.weight.shape), layer.weight)
    True
    """
    if isinstance(layer, nn.Linear):
        return matrices.view(shape)
    return matrices.reshape(shape[0], -1, shape[1]).transpose(1, 2).reshape(shape)


def empty_hessian(layer: nn.Module, weight: Tensor) -> Hessian:
    """Return a Hessian of no inputs for a layer, on its weight's device.

    >>> empty_hessian(nn.Linear(3, 5), torch.zeros(5, 3)).sums.shape
    torch.Size([1, 3, 3])
    """
    groups, _, inputs = as_matrices(layer, weight).shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    sums = torch.zeros(groups, inputs, inputs, dtype=dtype, device=weight.device)
    return Hessian(sums, torch.zeros((), dtype=torch.int64, device=weight.device))


@torch.no_grad()
def add_inputs(hessian: Hessian, inputs: Tensor) -> None:
    """Add 2 x x^T of each input. Runs in each forward that is gathered, in the sums' precision under autocast too.

    Args:
        hessian: added to in place.
        inputs: (groups, samples, inputs), any floating dtype.

    >>> hessian = empty_hessian(nn.Linear(2, 1), torch.zeros(1, 2))
    >>> add_inputs(hessian, torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))
    >>> hessian.mean
    tensor([[[10.,  2.],
             [ 2.,  4.]]])
    """
    with torch.autocast(inputs.device.type, enabled=False):
        wide = inputs.to(hessian.sums.dtype)
        hessian.sums.baddbmm_(wide.transpose(1, 2), wide, alpha=2.0)
    hessian.samples += inputs.shape[1]


def _padding(layer: nn.Module) -> list[int]:
    """Return how far a Conv pads its input, as `F.pad` takes it: last dimension first."""
    kernel, dilation, padding = (getattr(layer, name) for name in ("kernel_size", "dilation", "padding"))
    sides: list[int] = []
    for axis in reversed(range(len(kernel))):
        if isinstance(padding, str):
            both = dilation[axis] * (kernel[axis] - 1) if padding == "same" else 0
            sides += [both // 2, both - both // 2]
        else:
            sides += [padding[axis]] * 2
    return sides


def _unfolded(layer: nn.Module, value: Tensor) -> Tensor:
    """Return what a Conv multiplies its weight with: (groups, images times positions, inputs of a group)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    value = F.pad(value, _padding(layer), mode=mode)  # type: ignore[arg-type]
    sizes = [tuple(getattr(layer, name)) for name in ("kernel_size", "dilation", "stride")]
    if isinstance(layer, nn.Conv1d):
        value, sizes = value.unsqueeze(2), [(1, *size) for size in sizes]
    kernel, dilation, stride = sizes
    columns = F.unfold(value, kernel, dilation, 0, stride)
    groups, positions = int(layer.groups), kernel[0] * kernel[1]  # type: ignore[arg-type]
    split = columns.view(len(value), groups, -1, positions, columns.shape[-1])
    return split.permute(1, 0, 4, 3, 2).reshape(groups, -1, positions * split.shape[2])


def layer_inputs(layer: nn.Module, value: Tensor) -> Iterator[Tensor]:
    """Yield the inputs x that a layer's weight is multiplied with, in pieces: (groups, samples, inputs).

    >>> [piece.shape for piece in layer_inputs(nn.Conv1d(4, 6, 3, groups=2), torch.zeros(5, 4, 7))]
    [torch.Size([2, 25, 6])]
    """
    if value.is_nested:  # nn.TransformerEncoder packs padded batches so in evaluation
        value = torch.cat([row.reshape(-1, row.shape[-1]) for row in value.unbind()])
    if isinstance(layer, nn.Linear):
        yield value.reshape(1, -1, value.shape[-1])
        return
    spatial: Sequence[int] = layer.kernel_size  # type: ignore[assignment]
    images = value.reshape(-1, *value.shape[-len(spatial) - 1 :])
    images = images if images.dtype == torch.float64 else images.float()
    each = images[0].numel()
    for size in spatial:
        each *= size
    for piece in torch.split(images, max(1, CHUNK // max(1, each))):
        yield _unfolded(layer, piece)


@dataclass
class Watching:
    """State of one watched layer: where its inputs are added; None is nowhere."""

    handle: RemovableHandle | None = None
    hessian: Hessian | None = None
    in_evaluation: bool = False


def _see_inputs(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    watching: Watching = layer.__dict__[STATE]
    # Gradients are off in validation, while a frozen body may train in eval mode.
    if watching.hessian is None or not (watching.in_evaluation or torch.is_grad_enabled()):
        return
    value = args[0] if args else next((v for v in kwargs.values() if isinstance(v, Tensor)), None)
    if value is not None:
        for inputs in layer_inputs(layer, value.detach()):
            add_inputs(watching.hessian, inputs)


class InputHessians:
    """Gathers the Hessians of some weights while switched on; a weight in several layers has one of all inputs."""

    def __init__(self) -> None:
        self.layers: dict[str, list[nn.Module]] = {}

    def attach(self, module: nn.Module, weights: Mapping[str, Tensor], in_evaluation: bool = False) -> None:
        """Watch the layers that compute with these weights, switched off; their inputs before anybody rounds them."""
        self.detach()
        for name, weight in weights.items():
            own = [m for m in module.modules() if dict(m.named_parameters(recurse=False)).get("weight") is weight]
            self.layers[name] = [layer for layer in own if isinstance(layer, RECONSTRUCTIBLE)]
            for layer in self.layers[name]:
                handle = layer.register_forward_pre_hook(_see_inputs, with_kwargs=True, prepend=True)
                layer.__dict__[STATE] = Watching(handle, in_evaluation=in_evaluation)

    def detach(self) -> None:
        """Leave no hook and no attribute behind."""
        for layers in self.layers.values():
            for layer in layers:
                watching = layer.__dict__.pop(STATE, None)
                if watching is not None and watching.handle is not None:
                    watching.handle.remove()
        self.layers = {}

    def start(self, names: Iterable[str]) -> None:
        """Gather anew for these weights."""
        for name in names:
            weight: Tensor = self.layers[name][0].get_parameter("weight")
            self._set(name, empty_hessian(self.layers[name][0], weight))

    def stop(self, names: Iterable[str]) -> None:
        """Gather no more for these weights, and forget."""
        for name in names:
            self._set(name, None)

    def _set(self, name: str, hessian: Hessian | None) -> None:
        for layer in self.layers[name]:
            layer.__dict__[STATE].hessian = hessian

    def __getitem__(self, name: str) -> Hessian:
        """Return what was gathered for a weight since `start`."""
        hessian: Hessian = self.layers[name][0].__dict__[STATE].hessian
        return hessian

    # Checkpoints

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return what was gathered by all processes together: every process calls it."""
        return {
            name: {
                "sums": all_reduce_sum(self[name].sums.clone()),
                "samples": all_reduce_sum(self[name].samples.clone()),
            }
            for name in self.layers
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from what was saved, on one process for all. Runs after `start`."""
        for name, saved in state.items() if process_rank() == 0 else ():
            self[name].sums.copy_(saved["sums"])
            self[name].samples.copy_(saved["samples"])


@contextmanager
def watching(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[InputHessians]:
    """Watch, inside the block, what a module in evaluation gives to the layers of some weights.

    >>> layer = nn.Linear(2, 1)
    >>> with torch.no_grad(), watching(layer, {"weight": layer.weight}) as hessians:
    ...     hessians.start(["weight"])
    ...     _ = layer(torch.ones(3, 2))
    ...     int(hessians["weight"].samples)
    3
    """
    hessians = InputHessians()
    try:
        hessians.attach(module, weights, in_evaluation=True)
        yield hessians
    finally:
        hessians.detach()
