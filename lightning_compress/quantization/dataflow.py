"""One forward as a list of steps: which operator read which values, inside which modules, and whose outputs they are.

Operators are watched while they run, so that any forward will do, branches on values included, in training too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress.sharding import clean_name

__all__ = ["Flow", "Step", "watched"]

SAME_VALUE = ("alias", "detach")  # autograd puts them between a value and its readers
Key = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Step:
    """One operator that ran.

    Its place in `Flow.steps` is also the name of the value that it made. `inputs` are the steps whose values it read;
    weights and the forward's own inputs are not among them, views of them are. `numbers` are its plain arguments.
    """

    operator: str
    inputs: tuple[int, ...]
    modules: tuple[str, ...]
    numbers: tuple[float, ...]


@dataclass
class Flow:
    """The steps of one forward.

    `made_by` names, for a step's value, the modules inside which it was made and whose output it is, innermost first;
    `calls` counts the calls of each module; `outputs` are the values that the outermost module returned.
    """

    steps: list[Step] = field(default_factory=list)
    made_by: dict[int, list[str]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    outputs: set[int] = field(default_factory=set)

    def readers(self) -> list[list[int]]:
        """Return, for each step, the steps that read its value."""
        found: list[list[int]] = [[] for _ in self.steps]
        for index, step in enumerate(self.steps):
            for value in dict.fromkeys(step.inputs):
                found[value].append(index)
        return found


class _Watch(TorchDispatchMode):
    """Notes each operator. Values are known by their memory, which is kept until the watch ends.

    Not by the tensor object: under autograd a view is handed on as another object.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = Flow()
        self.known: dict[Key, int] = {}
        self.alive: list[Tensor] = []
        self.running: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        keys = [_key(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        read = tuple(self.known[key] for key in keys if key in self.known)
        result = func(*args, **(kwargs or {}))
        numbers = tuple(float(leaf) for leaf in leaves if isinstance(leaf, int | float))
        name = func.overloadpacket.__name__.removesuffix("_")  # in place or not is all the same
        if name in SAME_VALUE:
            return result
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]
        self.flow.steps.append(Step(name, read, tuple(self.running), numbers))
        for leaf in made:
            self.known[_key(leaf)] = len(self.flow.steps) - 1
        self.alive += made
        return result

    def value(self, output: Any) -> int | None:
        """Return the value that a tensor holds now."""
        return self.known.get(_key(output)) if isinstance(output, Tensor) else None


def _key(tensor: Tensor) -> Key:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if strided else (id(tensor), (), ())


@contextmanager
def watched(module: nn.Module) -> Iterator[Flow]:
    """Watch the forwards inside the block. Runs once, around one forward; holds all its values until the end.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> with torch.no_grad(), watched(net) as flow:
    ...     _ = net(torch.zeros(1, 2))
    >>> [(step.operator, step.modules) for step in flow.steps][-2:]
    [('addmm', ('', '0')), ('relu', ('', '1'))]
    """
    watch = _Watch()
    handles = []
    for name, part in module.named_modules():
        # First in and last out: what other hooks compute belongs to the module, and what they return is its output.
        handles.append(part.register_forward_pre_hook(_entering(watch, clean_name(name)), prepend=True))
        handles.append(part.register_forward_hook(_leaving(watch, clean_name(name)), always_call=True))
    try:
        with watch:
            yield watch.flow
    finally:
        for handle in handles:
            handle.remove()


def _entering(watch: _Watch, name: str) -> Any:
    def enter(module: nn.Module, args: Any) -> None:
        watch.running.append(name)

    return enter


def _leaving(watch: _Watch, name: str) -> Any:
    def leave(module: nn.Module, args: Any, output: Any) -> None:
        watch.running.pop()
        watch.flow.calls[name] += 1
        value = watch.value(output)
        if value is not None and name in watch.flow.steps[value].modules:
            watch.flow.made_by.setdefault(value, []).append(name)
        if not watch.running:
            found = (watch.value(leaf) for leaf in pytree.tree_leaves(output))
            watch.flow.outputs.update(leaf for leaf in found if leaf is not None)

    return leave
