"""A Linear as two smaller Linears, and back."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = [
    "LowRankLinear",
    "factored",
    "merged",
]


class LowRankLinear(nn.Module):
    """``up(down(x))`` in place of a Linear: weight = up.weight @ down.weight, the bias on ``up``."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's outputs, (..., outputs), for inputs (..., inputs)."""
        outputs: Tensor = self.up(self.down(inputs))
        return outputs


def factored(linear: nn.Linear, left: Tensor, right: Tensor) -> LowRankLinear:
    """The Linear's replacement by ``left`` (outputs, rank) and ``right`` (rank, inputs).

    Keeps dtype, device, bias, training mode and whether the weight learns; ``linear`` is unchanged.
    Raises ValueError where the factors do not fit the layer.
    """
    outputs, inputs = linear.weight.shape
    rank = left.shape[-1]
    if left.shape != (outputs, rank) or right.shape != (rank, inputs):
        raise ValueError(
            f"expected factors (outputs, rank) and (rank, inputs) of a weight {(outputs, inputs)}, "
            f"got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    down = _linear(right, linear.weight, None)
    up = _linear(left, linear.weight, linear.bias)
    return LowRankLinear(down, up).train(linear.training)


def merged(layer: LowRankLinear) -> nn.Linear:
    """One plain Linear with the product of the two factors as its weight, under a Linear's own keys."""
    up, down = layer.up.weight, layer.down.weight
    dense = _linear((up.double() @ down.double()).to(up.dtype), up, layer.up.bias)
    return dense.train(layer.training)


def _linear(weight: Tensor, like: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(like, copy=True), like.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
    return layer
