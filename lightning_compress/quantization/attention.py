"""Round what products of two activations read: in attention the query, the key, the probabilities and the value.

Such products are no module's work, so a mode that sees torch's functions is entered before the forward of the module
that computes them and left after it, by two hooks. `scaled_dot_product_attention` is then written out, because its
probabilities exist nowhere else. Which modules these are is seen in one watched forward.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_compress.quantization.dataflow import Flow
from lightning_compress.quantization.projections import unguarded_attention

__all__ = [
    "PRODUCTS", "Operand", "attach_products", "attention", "count_products", "detach_products", "is_product_key",
    "operand_names", "product_key",
]  # fmt: skip

PRODUCTS = "_fake_quant_products"
SIDES = ("left", "right")
FUSED = "_scaled_dot_product"  # how the names of its kernels begin
FUNCTIONS = (
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm,
    torch.baddbmm, torch.Tensor.baddbmm, torch.einsum,
)  # fmt: skip
Rounding = Callable[[Tensor, Tensor], Sequence[Tensor]]


class Operand(Protocol):
    """What is done with one operand of one product in each forward."""

    def passed(self, value: Tensor) -> Tensor:
        """Observe the operand, and return what the product shall read."""


def operand_names(products: int) -> list[str]:
    """Return the names of the operands of a forward's products, in the order in which they are computed.

    >>> operand_names(2)
    ['product0.left', 'product0.right', 'product1.left', 'product1.right']
    """
    return [f"product{index}.{side}" for index in range(products) for side in SIDES]


def product_key(module: str, operand: str) -> str:
    """Return the key of an operand's range among ranges.

    >>> product_key("layer.0.attention", "product0.left")
    'layer.0.attention:product0.left'
    """
    return f"{module}:{operand}"


def is_product_key(key: str) -> bool:
    """Say whether a key among ranges is that of a product's operand.

    >>> is_product_key("layer.0:product1.right"), is_product_key("layer.0:output")
    (True, False)
    """
    return ":product" in key


def attention(  # noqa: PLR0913 - the arguments are torch's
    rounding: Rounding,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention` in torch's own plain form, both products rounded.

    `rounding` gives the operands that a product reads for those it would read; it is called for query and key, then
    for probabilities (behind dropout) and value. The other arguments are torch's. Half types are computed in float32.

    Raises:
        RuntimeError: both `attn_mask` and `is_causal` are given.

    >>> query = torch.ones(1, 1, 2)
    >>> attention(lambda left, right: (left, right), query, query, torch.tensor([[[3.0, 4.0]]]))
    tensor([[[3., 4.]]])
    """
    if is_causal and attn_mask is not None:
        raise RuntimeError("scaled_dot_product_attention takes attn_mask or is_causal=True, got both; leave one out")
    factor = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(factor))  # on query and key, as torch does: the product of large values stays smaller
    with torch.autocast(query.device.type, enabled=False):
        left, right = rounding(_wide(query), _wide(key))
        right = _repeated(right, query.shape[-3]) if enable_gqa else right
        scores = (left * math.copysign(root, factor)) @ (right.transpose(-2, -1) * root)
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril() if is_causal else attn_mask
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        shares = torch.ops.aten._safe_softmax(scores, -1)  # 0 where a whole row is masked
        shares = functional.dropout(shares, dropout_p) if dropout_p > 0.0 else shares
        shares, right = rounding(shares, _wide(value))
        right = _repeated(right, query.shape[-3]) if enable_gqa else right
        return (shares @ right).to(query.dtype)


def _repeated(value: Tensor, heads: int) -> Tensor:
    return value.repeat_interleave(heads // value.shape[-3], -3)


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


class _Rounding(TorchFunctionMode):
    """Rounds the operands of products; entered for one forward of a module."""

    def __init__(self, operands: Mapping[str, Operand]) -> None:
        super().__init__()
        self.operands, self.products = operands, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            # Always the written-out form, whose query is scaled before the product: one range serves both.
            with self:
                output, shares = unguarded_attention(*args, **{**kwargs, "need_weights": True})
            return output, shares if kwargs.get("need_weights", True) else None
        if func is functional.scaled_dot_product_attention:
            with torch._C.DisableTorchFunction():  # nor shall the mode of a module around this one round again
                return attention(self.rounded, *args, **kwargs)
        if func in FUNCTIONS:
            with torch._C.DisableTorchFunction():
                return self.product(func, args, kwargs)
        return func(*args, **kwargs)

    def product(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function makes of its last two tensors, rounded where both are batches of activations."""
        flat = (args[0], *args[1]) if func is torch.einsum and isinstance(args[1], list | tuple) else args
        values: dict[Any, Any] = {**dict(enumerate(flat)), **kwargs}
        tensors = [place for place, value in values.items() if isinstance(value, Tensor)]
        added = func in (torch.baddbmm, torch.Tensor.baddbmm)
        if len(tensors) != 2 + added or not all(map(_is_batch, (values[place] for place in tensors[-2:]))):
            return func(*args, **kwargs)
        values.update(zip(tensors[-2:], self.rounded(*(values[place] for place in tensors[-2:])), strict=True))
        return func(*[values.pop(place) for place in range(len(flat))], **values)

    def rounded(self, left: Tensor, right: Tensor) -> list[Tensor]:
        """Return the operands of the next product."""
        index, self.products = self.products, self.products + 1
        found = [self.operands.get(f"product{index}.{side}") for side in SIDES]
        return [value if each is None else each.passed(value) for each, value in zip(found, (left, right), strict=True)]


def _is_batch(value: Tensor) -> bool:
    return value.dim() > 2 and value.is_floating_point() and not isinstance(value, nn.Parameter)


@dataclass
class _Products:
    """What is attached to one module."""

    operands: dict[str, Operand]
    running: list[_Rounding] = field(default_factory=list)
    handles: list[RemovableHandle] = field(default_factory=list)


def _before_forward(module: nn.Module, args: Any) -> None:
    products: _Products = module.__dict__[PRODUCTS]
    mode = _Rounding(products.operands)
    mode.__enter__()  # type: ignore[no-untyped-call]
    products.running.append(mode)


def _after_forward(module: nn.Module, args: Any, output: Any) -> None:
    running: list[_Rounding] = module.__dict__[PRODUCTS].running
    if running:  # otherwise an earlier pre-hook raised before ours ran
        running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


def attach_products(module: nn.Module, operands: Mapping[str, Operand]) -> None:
    """Pass these operands of a module's products on; in place of those that are attached. Runs before its forwards.

    Args:
        module: the module whose own forward computes the products.
        operands: by `operand_names`.
    """
    detach_products(module)
    products = module.__dict__[PRODUCTS] = _Products(dict(operands))
    products.handles = [
        module.register_forward_pre_hook(_before_forward),
        module.register_forward_hook(_after_forward, always_call=True, prepend=True),
    ]


def detach_products(module: nn.Module) -> None:
    """Let a module's products read what they would; a module without rounding is left as it is."""
    products: _Products | None = module.__dict__.pop(PRODUCTS, None)
    for handle in products.handles if products else ():
        handle.remove()


def count_products(flow: Flow, layers: Mapping[str, bool]) -> dict[str, int]:
    """Return how many products of activations each module computes in one forward. Runs once, after `watched`.

    Those whose operands come from rounded layers: products with positions, or behind layers left in floating point,
    are not among them.

    Args:
        flow: of a forward.
        layers: name of each module that has weights of its own to multiply with -> whether it is rounded.
    """
    from_rounded: list[bool] = []
    found: Counter[str] = Counter()
    for step in flow.steps:
        owner = next((name for name in reversed(step.modules) if name in layers), None)
        from_rounded.append(any(from_rounded[i] for i in step.inputs) if owner is None else layers[owner])
        fused = step.operator.startswith(FUSED)
        operands = step.inputs[:3] if fused else step.inputs[-2:] if step.operator in ("bmm", "baddbmm") else ()
        if step.modules and len(operands) == 2 + fused and all(from_rounded[i] for i in operands):
            found[step.modules[-1]] += 1 + fused
    return {name: max(1, count // max(1, flow.calls[name])) for name, count in found.items()}
