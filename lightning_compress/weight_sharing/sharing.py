"""Replace a module's weights by codebooks, in place, after training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.select import Pattern, patterns_or_none, select_weights
from lightning_compress.weight_sharing.codebook import MOST_ENTRIES, Start, linear, shared_values

__all__ = ["share_weights"]

SHARED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


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
    weights = select_weights(module, SHARED, patterns_or_none(include), patterns_or_none(exclude))
    wanted = {name: _entries(name, module, weight, entries) for name, weight in weights.items()}
    books = {}
    for name, weight in weights.items():
        weight.data.copy_(shared_values(weight.data, wanted[name], start))
        books[name] = torch.unique(weight)
    return books


def _entries(name: str, module: nn.Module, weight: Tensor, entries: int | Mapping[str, int]) -> int:
    """The entries of one weight, checked."""
    kind = type(module.get_submodule(name.rpartition(".")[0])).__name__
    if isinstance(entries, Mapping) and kind not in entries:
        raise ValueError(f"entries has {', '.join(entries)}, but '{name}' is of a {kind}; add it, or exclude the layer")
    found = entries[kind] if isinstance(entries, Mapping) else entries
    if not 2 <= found <= MOST_ENTRIES:
        raise ValueError(f"a codebook has 2 to {MOST_ENTRIES} entries, got {found} for '{name}'")
    if found > weight.numel():
        raise ValueError(f"a codebook of {found} entries is larger than '{name}', which has {weight.numel()} weights")
    if not bool(weight.isfinite().all()):
        raise CompressError(f"expected finite weights, got NaN or infinity in '{name}'")
    return found
