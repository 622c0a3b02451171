"""Replace a module's weights by codebooks, in place, after training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.select import Pattern, layers_of, patterns_or_none, select_weights
from lightning_compress.weight_sharing.codebook import MOST_ENTRIES, Start, linear, shared_values

__all__ = ["SHAREABLE", "entries_of", "share_weights"]

SHAREABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def share_weights(
    module: nn.Module,
    entries: int | Mapping[str, int] = 16,
    start: Start = linear,
    include: Iterable[Pattern] | Pattern | None = None,
    exclude: Iterable[Pattern] | Pattern | None = None,
) -> dict[str, Tensor]:
    """Let the weights of each layer share a few values, in place. Runs when a user calls it, after training.

    Zeros of pruning stay zeros, so that `pack` writes such a module in a few bits a weight: codes of log2(entries) bits
    at most before entropy coding.

    Args:
        module: in any mode.
        entries: values a layer, 2 to 256, that of zeros counted; or class name of a layer -> entries, such as
            {"Conv2d": 256, "Linear": 32}.
        start: where k-means begins: `codebook.linear`, `density`, `plus_plus`, or a function of yours.
        include: names, globs, class names or types; None is every Linear and Conv but the output head.
        exclude: the same, left as they are.

    Returns:
        Name of a weight -> its values, ascending.

    Raises:
        ValueError: entries out of range or more than a weight has values, a class without entries.
        NothingToCompress: nothing is selected.
        CompressError: NaN or infinite weights; no weight has been changed.

    >>> net = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2))
    >>> {name: len(book) for name, book in share_weights(net, 8).items()}
    {'0.weight': 8}
    """
    weights = select_weights(module, SHAREABLE, patterns_or_none(include), patterns_or_none(exclude))
    wanted = {name: entries_of(name, layer, entries) for name, layer in layers_of(module, weights).items()}
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise CompressError(f"expected finite weights, got NaN or infinity in '{name}'")
    books = {}
    for name, weight in weights.items():
        weight.data.copy_(shared_values(weight.data, wanted[name], start))
        books[name] = torch.unique(weight)
    return books


def entries_of(name: str, layer: nn.Module, entries: int | Mapping[str, int]) -> int:
    """Return how many values the weight of a layer is to have, checked. Runs before any weight is changed.

    Args:
        name: of the weight, for the message.
        layer: that has it.
        entries: as `share_weights` takes them.

    Raises:
        ValueError: out of range or more than the weight has values, a class without entries.

    >>> entries_of("0.weight", nn.Linear(4, 4), {"Linear": 8})
    8
    """
    kind, count = type(layer).__name__, layer.get_parameter("weight").numel()
    if isinstance(entries, Mapping) and kind not in entries:
        raise ValueError(f"entries has {', '.join(entries)}, but '{name}' is of a {kind}; add it, or exclude the layer")
    found = entries[kind] if isinstance(entries, Mapping) else entries
    if not 2 <= found <= MOST_ENTRIES:
        raise ValueError(f"a codebook has 2 to {MOST_ENTRIES} entries, got {found} for '{name}'")
    if found > count:
        raise ValueError(f"a codebook of {found} entries is larger than '{name}', which has {count} weights")
    return found
