"""The projections inside `nn.MultiheadAttention` as layers that are called, so that hooks can round them.

`nn.MultiheadAttention` hands its weights to `torch.nn.functional.multi_head_attention_forward`, which multiplies with
them by `linear`. While an attention runs, such a call goes to a `Projection` instead, a layer outside of the module's
tree that holds the same parameter: no class, key or parameter changes. The fast paths of torch for evaluation, which
read the weights elsewhere, see the hooks or the mode and stand back.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_compress.sharding import clean_name

__all__ = [
    "PROJECTIONS", "WEIGHTS", "Projection", "projections_in", "projections_of", "unguarded_attention", "weight_names",
]  # fmt: skip

PROJECTIONS = "_fake_quant_projections"
WEIGHTS = {
    "in_proj": "in_proj_weight",
    "q_proj": "q_proj_weight",
    "k_proj": "k_proj_weight",
    "v_proj": "v_proj_weight",
    "out_proj": "out_proj.weight",
}


class Projection(nn.Module):
    """One weight of an `nn.MultiheadAttention` as a linear layer. Runs in place of `linear` with that weight.

    Args:
        attention: the module that the weight belongs to.
        name: "in_proj" or, where queries, keys and values have widths of their own, "q_proj", "k_proj", "v_proj"; and
            "out_proj".

    Its `weight` is the attention's own parameter; a reparametrized attention has none, and neither has this.
    """

    attention: nn.MultiheadAttention
    weight: nn.Parameter

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        super().__init__()
        self.__dict__["attention"] = attention  # not registered as a child
        self.name, self.weight_name = name, WEIGHTS[name]
        owner, _, own = self.weight_name.rpartition(".")
        parameters = dict(attention.get_submodule(owner).named_parameters(recurse=False))
        self.register_parameter("weight", parameters.get(own))

    def forward(self, input: Tensor, rows: slice = slice(None), bias: Tensor | None = None) -> Tensor:
        """Return the product with these rows of the weight: all, or only the query's, the key's, the value's."""
        whole = rows in (slice(None), slice(0, len(self.weight)))
        return functional.linear(input, self.weight if whole else self.weight[rows], bias)

    @property
    def bias_rows(self) -> Tensor | None:
        """The rows of the attention's own bias that are added to this product, a view; None without a bias."""
        if self.name == "out_proj":
            return self.attention.out_proj.bias
        whole, first = self.attention.in_proj_bias, ("q_proj", "k_proj", "v_proj")
        if whole is None or self.name not in first:
            return whole
        return whole.chunk(3)[first.index(self.name)]

    def rows_of(self, weight: Tensor) -> slice | None:
        """Return which rows of the projection a weight is, whole or a view of it; None if it is something else."""
        own = self.weight
        if weight.untyped_storage().data_ptr() != own.untyped_storage().data_ptr():
            return None
        first = (weight.storage_offset() - own.storage_offset()) // own.stride(0)
        return slice(first, first + len(weight)) if 0 <= first <= len(own) - len(weight) else None

    def route(self) -> None:
        """Let the attention call this projection from now on. Runs when fake-quantization is attached."""
        attention = self.attention
        routes: _Routes = attention.__dict__.setdefault(PROJECTIONS, _Routes())
        routes.parts[self.name] = self
        if not routes.handles:
            routes.handles = [
                attention.register_forward_pre_hook(_before_forward, with_kwargs=True),
                attention.register_forward_hook(_after_forward, always_call=True, prepend=True),
            ]

    def unroute(self) -> None:
        """Let the attention compute by itself again. Runs when fake-quantization is detached."""
        attention = self.attention
        routes: _Routes = attention.__dict__[PROJECTIONS]
        del routes.parts[self.name]
        if not routes.parts:
            for handle in routes.handles:
                handle.remove()
            del attention.__dict__[PROJECTIONS]


@dataclass
class _Routes:
    """What is attached to one attention."""

    parts: dict[str, Projection] = field(default_factory=dict)
    running: list[_Routing] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)


def _unguarded(whole: types.FunctionType) -> types.FunctionType:
    names = {**whole.__globals__, "has_torch_function": lambda _: False}
    return types.FunctionType(whole.__code__, names, whole.__name__, whole.__defaults__, whole.__closure__)


# A mode is off while it handles a call. This one does not ask to be handled as a whole, so that the mode can be
# entered again to see the calls inside.
unguarded_attention = _unguarded(functional.multi_head_attention_forward)  # type: ignore[arg-type]


class _Routing(TorchFunctionMode):
    """Sends products with an attention's weights to its projections; entered for one forward of it."""

    def __init__(self, parts: dict[str, Projection]) -> None:
        super().__init__()
        self.parts = parts
        self.lengths: list[int] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.multi_head_attention_forward:
            with self:
                return unguarded_attention(*args, **(kwargs or {}))
        if func is functional.linear:
            return self.linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        """Multiply as `torch.nn.functional.linear` does, by the projection that the weight belongs to."""
        for part in self.parts.values():
            rows = part.rows_of(weight)
            if rows is not None:
                return part(input, rows, bias)
        return functional.linear(input, weight, bias)


def _before_forward(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    routes: _Routes = attention.__dict__[PROJECTIONS]
    mode = _Routing(routes.parts)
    query = args[0] if args else kwargs.get("query")
    if isinstance(query, Tensor) and query.is_nested:
        # nn.TransformerEncoder packs padded batches in evaluation, for a fast path that would pass the projections by.
        mode.lengths = [len(row) for row in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        steps, ends = torch.arange(padded.shape[1]), torch.tensor(mode.lengths)[:, None]
        others = {name: value for name, value in kwargs.items() if name not in ("query", "key", "value")}
        args, kwargs = (padded,) * 3, {**others, "key_padding_mask": (steps >= ends).to(padded.device)}
    mode.__enter__()  # type: ignore[no-untyped-call]
    routes.running.append(mode)
    return args, kwargs


def _after_forward(attention: nn.Module, args: Any, output: Any) -> Any:
    running: list[_Routing] = attention.__dict__[PROJECTIONS].running
    if not running:  # an earlier pre-hook raised before ours ran
        return None
    mode = running.pop()
    mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    if output is None or not mode.lengths:
        return None
    rows = zip(output[0].unbind(), mode.lengths, strict=True)
    return (torch.nested.as_nested_tensor([row[:length] for row, length in rows]), *output[1:])


def projections_of(attention: nn.MultiheadAttention) -> dict[str, Projection]:
    """Return the projections of an attention: those that are attached, and new ones of the others.

    >>> list(projections_of(nn.MultiheadAttention(4, 2))), list(projections_of(nn.MultiheadAttention(4, 2, kdim=3)))
    (['in_proj', 'out_proj'], ['q_proj', 'k_proj', 'v_proj', 'out_proj'])
    """
    routes: _Routes | None = attention.__dict__.get(PROJECTIONS)
    attached = routes.parts if routes else {}
    inner = ("q_proj", "k_proj", "v_proj") if attention.in_proj_weight is None else ("in_proj",)
    return {name: attached.get(name) or Projection(attention, name) for name in (*inner, "out_proj")}


def projections_in(module: nn.Module) -> dict[str, Projection]:
    """Return the projections of all attentions inside a module, by clean name.

    >>> list(projections_in(nn.ModuleDict({"self": nn.MultiheadAttention(4, 2)})))
    ['self.in_proj', 'self.out_proj']
    """
    return {
        f"{clean_name(name)}.{own}".lstrip("."): projection
        for name, attention in module.named_modules(remove_duplicate=False)
        if isinstance(attention, nn.MultiheadAttention)
        for own, projection in projections_of(attention).items()
    }


def weight_names(module: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Return the name of the parameter that is the weight of each layer, projections among them.

    >>> net = nn.ModuleDict({"self": nn.MultiheadAttention(4, 2), "in_proj": nn.Linear(4, 4)})
    >>> weight_names(net, ["self.in_proj", "in_proj"])
    {'self.in_proj': 'self.in_proj_weight', 'in_proj': 'in_proj.weight'}
    """
    inside = {name: name.removesuffix(each.name) + each.weight_name for name, each in projections_in(module).items()}
    return {name: inside.get(name, f"{name}.weight") for name in layers}
