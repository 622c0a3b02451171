"""Optimizers that go on with two weights where they had one, and with one where they had two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_compress.factorization.factors import Factored

__all__ = ["Replacement", "by_factors", "by_products", "follow"]


@dataclass(frozen=True)
class Replacement:
    """Parameters in place of one, and the ends of its name before and after.

    Args:
        end: of the old name, such as "weight".
        new: ends of the new names and the parameters; empty if it is part of another replacement.
    """

    end: str
    new: tuple[tuple[str, nn.Parameter], ...]


def by_factors(gone: Mapping[str, Tensor], layers: Mapping[str, Factored]) -> dict[Tensor, Replacement]:
    """Say which two weights follow one, and that the bias goes along. Runs once layers are two.

    Args:
        gone: the weights that were replaced, by layer.
        layers: by the same names.
    """
    moved = {gone[name]: Replacement("weight", tuple(_factors(layer))) for name, layer in layers.items()}
    return moved | {
        layer.bias: Replacement("bias", (("up.bias", layer.bias),))
        for layer in layers.values()
        if isinstance(layer.bias, nn.Parameter)
    }


def by_products(factors: Mapping[str, tuple[nn.Parameter, ...]], module: nn.Module) -> dict[Tensor, Replacement]:
    """Say which weight follows two. Runs once layers are one again.

    Args:
        factors: weights of `down` and `up` that were replaced, by layer.
        module: holds the layers by these names.
    """
    moved: dict[Tensor, Replacement] = {}
    for name, (down, up) in factors.items():
        layer = module.get_submodule(name)
        weight, bias = layer.get_parameter("weight"), layer.bias
        if isinstance(bias, nn.Parameter):
            moved[bias] = Replacement("up.bias", (("bias", bias),))
        moved |= {down: Replacement("down.weight", (("weight", weight),)), up: Replacement("up.weight", ())}
    return moved


def _factors(layer: Factored) -> Iterator[tuple[str, nn.Parameter]]:
    for part in ("down", "up"):
        yield f"{part}.weight", layer.get_submodule(part).get_parameter("weight")


def follow(optimizers: Sequence[Optimizer], moved: Mapping[Tensor, Replacement]) -> None:
    """Put new parameters where the old ones were, in the same groups. Runs between optimizer steps.

    Their state begins anew: moments of a product are not moments of its factors.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            names = group.get("param_names")  # there if the user gave named parameters
            pairs = [
                pair
                for name, old in zip(names or [""] * len(group["params"]), group["params"], strict=True)
                for pair in _after(name, old, moved.get(old))
            ]
            group["params"] = [parameter for _, parameter in pairs]
            if names is not None:
                group["param_names"] = [name for name, _ in pairs]
        for old, replacement in moved.items():
            if all(new is not old for _, new in replacement.new):
                optimizer.state.pop(old, None)


def _after(name: str, old: Tensor, replacement: Replacement | None) -> list[tuple[str, Tensor]]:
    if replacement is None:
        return [(name, old)]
    return [(name.removesuffix(replacement.end) + end, parameter) for end, parameter in replacement.new]
