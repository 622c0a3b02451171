"""Cross-layer equalization: channels of neighbouring layers scaled so that their weights have one range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.chains import Chain, find_chains

__all__ = ["equalize", "equalizing_scale", "relu6_between", "replace_relu6"]

ROUNDS = 100
SETTLED = 1e-4


def equalizing_scale(first: Tensor, second: Tensor) -> Tensor:
    """Return s = sqrt(r1 r2) / r2, by which the first layer's channels are divided and the second's multiplied; pure.

    Both ranges become sqrt(r1 r2). Nagel et al. 2019, equation 11. A channel that one side does not use has s = 1.

    Args:
        first: largest magnitude of each output channel of the first layer, (channels,).
        second: of each input channel of the second, (channels,).

    >>> equalizing_scale(torch.tensor([8.0, 0.0]), torch.tensor([2.0, 1.0]))
    tensor([2., 1.])
    """
    used = (first > 0) & (second > 0)
    return torch.where(
        used, (first / torch.where(used, second, torch.ones_like(second))).sqrt(), torch.ones_like(first)
    )


def _by_input(layer: nn.Module, repeats: int) -> Tensor:
    """View a layer's weight as (groups, outputs, channels, entries of a channel); writing to it writes the weight."""
    weight = layer.get_parameter("weight").detach()
    groups = int(getattr(layer, "groups", 1))
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1] // repeats, -1)


def _gain(module: nn.Module, norm: str | None, layer: nn.Module) -> Tensor:
    """Return the size of what folding a layer's batch norm multiplies each of its output channels by, (out,)."""
    weight = layer.get_parameter("weight").detach()
    if norm is None:
        return weight.new_ones(len(weight))
    found = module.get_submodule(norm)
    variance, eps = found.get_buffer("running_var"), float(found.eps)  # type: ignore[arg-type]
    gain = found.weight.abs() if isinstance(found.weight, Tensor) else torch.ones_like(variance)
    return gain / (variance + eps).sqrt()


def _equalize_pair(module: nn.Module, chain: Chain) -> float:
    """Scale one pair in place; return how far its scales were from 1, as a largest logarithm."""
    first, second = module.get_submodule(chain.first), module.get_submodule(chain.second)
    norm = module.get_submodule(chain.norm) if chain.norm is not None else None
    outputs = first.get_parameter("weight").flatten(1).abs().amax(1) * _gain(module, chain.norm, first)
    inputs = _by_input(second, chain.repeats)
    gain = _gain(module, chain.norm_after, second).view(inputs.shape[0], -1, 1, 1)
    scale = equalizing_scale(outputs, (inputs.abs() * gain).amax((1, 3)).flatten())
    holder = first if norm is None else norm
    holder.get_parameter("weight").div_(scale.view(-1, *[1] * (holder.get_parameter("weight").dim() - 1)))
    if holder.bias is not None:
        holder.get_parameter("bias").div_(scale)
    inputs.mul_(scale.view(inputs.shape[0], 1, -1, 1))
    return float(scale.log().abs().max())


@torch.no_grad()
def equalize(module: nn.Module, batch: Any) -> list[Chain]:
    """Equalize all pairs of neighbouring layers, in place, until nothing moves. Runs before calibration.

    A pair is a Linear or Conv whose output goes, through an optional batch norm and ReLU, leaky ReLU, dropout, pooling
    or flattening, to one other Linear or Conv and nowhere else; depthwise layers are in two pairs. Channel i of the
    first is divided by s_i, and what the second reads of it is multiplied by it (`equalizing_scale`), again and again
    over all pairs (Nagel et al. 2019, section 4.1). Ranges are those of weights with their batch norms folded in, but
    the norms stay: the first layer's is divided in its place. The module's function stays the same up to rounding,
    zeros stay zero, and no key changes. High biases are not absorbed (section 4.1.3).

    ReLU6 does not commute with a scale: a pair around one is left as it is. `replace_relu6` makes it a ReLU first.

    Args:
        module: any module that `torch.export` can trace in eval mode.
        batch: one batch of inputs, for the trace: a tensor, a tuple, a list or a dict.

    Returns:
        The pairs, in forward order.

    Raises:
        CompressError: the forward cannot be traced.

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    >>> _ = net[0].weight.data.fill_(8.0), net[2].weight.data.fill_(2.0)
    >>> [chain.second for chain in equalize(net, torch.zeros(1, 1))], net[0].weight.item(), net[2].weight.item()
    (['2'], 4.0, 4.0)
    """
    chains = [chain for chain in find_chains(module, batch) if not chain.clamps and _scalable(module, chain)]
    for _ in range(ROUNDS):
        if max((_equalize_pair(module, chain) for chain in chains), default=0.0) < SETTLED:
            break
    return chains


def _scalable(module: nn.Module, chain: Chain) -> bool:
    return chain.norm is None or isinstance(module.get_submodule(chain.norm).weight, Tensor)


def relu6_between(module: nn.Module, batch: Any) -> list[str]:
    """Return the names of the ReLU6 modules that keep pairs from being equalized.

    >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU6(), nn.Linear(1, 1))
    >>> relu6_between(net, torch.zeros(1, 1))
    ['1']
    """
    return list(dict.fromkeys(name for chain in find_chains(module, batch) for name in chain.clamps))


def replace_relu6(module: nn.Module, batch: Any) -> list[str]:
    """Put a ReLU in the place of each ReLU6 between a pair, and return their names. Runs before `equalize`, if wanted.

    As Nagel et al. 2019, section 5.1.1, do. This changes the module's function wherever a value passes 6: measure what
    it costs on real inputs. Only `nn.ReLU6` modules are found, not `torch.nn.functional.relu6`.

    >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU6(), nn.Linear(1, 1))
    >>> replace_relu6(net, torch.zeros(1, 1)), net[1]
    (['1'], ReLU())
    """
    names = relu6_between(module, batch)
    for name in names:
        parent, _, own = name.rpartition(".")
        old = module.get_submodule(name)
        setattr(module.get_submodule(parent), own, nn.ReLU(bool(getattr(old, "inplace", False))))
    return names
