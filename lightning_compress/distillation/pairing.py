"""Which layer of the student learns from which of the teacher: by depth, or by the size of feature maps."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_compress.distillation.taps import Call, first_tensor, unwrapped
from lightning_compress.pruning.calibration import evaluating, run
from lightning_compress.sharding import clean_name

__all__ = ["blocks_of", "output_shapes", "pair_by_depth", "pair_by_size", "pair_called", "pair_layers"]

Shape = tuple[int, ...]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def pair_layers(student: nn.Module, teacher: nn.Module, batch: Any, teacher_batch: Any = None) -> list[tuple[str, str]]:
    """Return (student layer, teacher layer) pairs, found by running both once. Runs at `setup`.

    Models made of equal blocks whose outputs are no feature maps (transformers) pair their blocks by depth; others,
    such as CNNs, the last layer of each spatial size that both have.

    Args:
        student: run in eval mode, without gradient.
        teacher: the same.
        batch: inputs as `calibration.run` takes them: a dict, a tuple, or one tensor.
        teacher_batch: the teacher's inputs; None is the student's.

    Raises:
        ValueError: neither way finds a pair.
    """
    models = [unwrapped(student), unwrapped(teacher)]
    batches = [batch, batch if teacher_batch is None else teacher_batch]
    shapes = [output_shapes(model, inputs) for model, inputs in zip(models, batches, strict=True)]
    blocks = [
        [name for name in blocks_of(model) if len(found.get(name, ())) in (2, 3)]
        for model, found in zip(models, shapes, strict=True)
    ]
    pairs = pair_by_depth(*blocks) if all(blocks) else pair_by_size(*shapes)
    if not pairs:
        raise ValueError(
            f"expected {type(models[0]).__name__} and {type(models[1]).__name__} to have blocks of one kind or feature "
            f"maps of one spatial size, found {len(blocks[0])} and {len(blocks[1])} blocks and no common size; name "
            f"the pairs of layers yourself"
        )
    return pairs


def pair_called(
    module: nn.Module, call: Call | None, teacher: nn.Module, part: str, inputs: Arguments | None
) -> list[tuple[str, str]]:
    """Return `pair_layers` of a student in its module, and of a part of the teacher, by their names there.

    Args:
        module: the LightningModule.
        call: of the student, on a few examples; None where none can be had.
        teacher: the teacher.
        part: name of the submodule of it that is called; "" is itself.
        inputs: its arguments.

    Raises:
        ValueError: there is no call, or no pair.
    """
    if call is None or inputs is None:
        raise ValueError(
            "layers without names are paired by running both models on two examples, but none can be read from this "
            "training data before the first batch (or the model is large); name them: LayerTerm(loss, student=...)"
        )
    student, other = _part(module, call.name), _part(teacher, part)
    own = call.args, {name: value for name, value in call.kwargs.items() if name != "labels"}
    pairs = pair_layers(student, other, _bound(student, *own), _bound(other, *inputs))
    return [(f"{call.name}.{one}".lstrip("."), f"{part}.{two}".lstrip(".")) for one, two in pairs]


def _part(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name) if name else module


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not kwargs:
        return args
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments) if args else kwargs


def pair_by_depth(student: Sequence[str], teacher: Sequence[str]) -> list[tuple[str, str]]:
    """Pair each of S student layers, the i-th, with the teacher's at i T / S, rounded: the last with the last.

    Jiao et al. 2020, "TinyBERT", section 4.2 (the uniform mapping). Runs at `setup`.

    >>> pair_by_depth(["a", "b"], ["0", "1", "2", "3", "4", "5"])
    [('a', '2'), ('b', '5')]
    """
    if not teacher:
        return []
    ratio = len(teacher) / len(student) if student else 1.0
    places = [max(math.floor(depth * ratio + 0.5), 1) for depth in range(1, len(student) + 1)]
    return [(name, teacher[place - 1]) for name, place in zip(student, places, strict=True)]


def pair_by_size(student: Mapping[str, Shape], teacher: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """Pair the last layers that give feature maps of a spatial size which both models have. Runs at `setup`.

    Zagoruyko & Komodakis 2017, section 3: a network's stages end where the size changes. Maps of a single position are
    left out.

    Args:
        student: shapes (batch, channels, height, width, ...) by layer, in the order of the calls' ends.
        teacher: the same.

    >>> pair_by_size({"a": (1, 8, 4, 4), "b": (1, 8, 4, 4), "c": (1, 8)}, {"x": (1, 2, 4, 4), "y": (1, 2, 2, 2)})
    [('b', 'x')]
    """
    last, other = ({shape[2:]: name for name, shape in side.items() if len(shape) > 3} for side in (student, teacher))
    return [(name, other[size]) for size, name in last.items() if size in other and math.prod(size) > 1]


def blocks_of(module: nn.Module) -> list[str]:
    """Return the names of a model's blocks: the children, all of one class, of the list that has most parameters.

    Of an encoder and a decoder it finds the larger, or the first.

    >>> blocks_of(nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 4), 3, enable_nested_tensor=False))
    ['layers.0', 'layers.1', 'layers.2']
    """
    found: list[str] = []
    most = 0
    for name, container in module.named_modules():
        children = dict(container.named_children())
        kinds = {type(child) for child in children.values()}
        listed = isinstance(container, nn.ModuleList) or (isinstance(container, nn.Sequential) and len(children) > 1)
        count = sum(parameter.numel() for parameter in container.parameters())
        if listed and len(kinds) == 1 and count > most:
            found, most = [clean_name(f"{name}.{child}" if name else child) for child in children], count
    return found


def output_shapes(module: nn.Module, batch: Any) -> dict[str, Shape]:
    """Return the shape of what each submodule gives, in the order in which the calls end; of several, the last.

    Runs at `setup`: one forward in eval mode, without gradient.

    >>> import torch
    >>> output_shapes(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), [torch.zeros(1, 1, 4, 4)])
    {'0': (1, 2, 2, 2), '1': (1, 8)}
    """
    shapes: dict[str, Shape] = {}

    def note(name: str, layer: nn.Module, args: Any, output: Any) -> None:
        value = first_tensor(output)
        if value is not None:
            shapes.pop(name, None)
            shapes[name] = tuple(value.shape)

    handles = [
        layer.register_forward_hook(functools.partial(note, clean_name(name)))
        for name, layer in module.named_modules()
        if clean_name(name)
    ]
    try:
        with evaluating(module):
            run(module, [batch])
    finally:
        for handle in handles:
            handle.remove()
    return shapes
