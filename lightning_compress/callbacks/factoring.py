"""Layers that become two, and one again, within a run: with what steps, averages and synchronizes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_compress.callbacks.averages import averaged_modules, restart_averages
from lightning_compress.callbacks.step import intercept
from lightning_compress.errors import CompressError, NothingToCompress
from lightning_compress.factorization.factors import FACTORABLE, as_plain, factored_layers, unfactor
from lightning_compress.factorization.following import by_factors, by_products, follow
from lightning_compress.factorization.lowrank import Decompose, decomposed
from lightning_compress.factorization.ranks import Rank
from lightning_compress.factorization.svd import svd
from lightning_compress.pruning.hessians import as_matrices
from lightning_compress.pruning.shrink import check_optimizers
from lightning_compress.sharding import clean_name

__all__ = [
    "PlainOptimizers", "check_followers", "check_found", "factor_again", "factor_layers", "merge_layers", "seen",
    "shapes_of",
]  # fmt: skip

LOST_AT_MOST = 1e-6  # share of a layer's energy that rounding may leave beyond its rank


def shapes_of(layers: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of each layer's matrix. Runs at `setup`."""
    matrices = {name: as_matrices(layer, layer.get_parameter("weight"))[0] for name, layer in layers.items()}
    return {name: (matrix.shape[0], matrix.shape[1]) for name, matrix in matrices.items()}


def check_found(found: Mapping[str, int], rank: Rank) -> None:
    """Raise if layers are two already, of another rank than the one that is asked for. Runs at `setup`.

    Raises:
        CompressError: with the first of them.
    """
    for name, own in found.items():
        if isinstance(rank, int) and own != rank:
            raise CompressError(
                f"LowRank(rank={rank}) found '{name}' to be two of rank {own} already; make it one again with "
                f"lightning_compress.factorization.lowrank.merge(module), or take LowRank out of the list"
            )


def seen(
    layers: Mapping[str, nn.Module], known: Mapping[str, object], named: bool, steps: int | None
) -> dict[str, nn.Module]:
    """Return the layers that were seen in training; others are passed over, unless the user has named them.

    Raises:
        CompressError: a named one was not.
        NothingToCompress: none was.
    """
    missing = [name for name in layers if name not in known]
    if missing and (named or len(missing) == len(layers)):
        kind = CompressError if named else NothingToCompress
        raise kind(
            f"'{missing[0]}' was not called in training, or had no gradient, in the {steps} steps before; exclude it, "
            f"or act later"
        )
    return {name: layer for name, layer in layers.items() if name in known}


@torch.no_grad()
def factor_layers(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    layers: Mapping[str, nn.Module],
    known: Mapping[str, Mapping[str, Tensor]],
    decompose: Decompose,
    rank: Rank,
) -> dict[str, int]:
    """Turn layers into two, where they get smaller; returns their ranks. Runs between batches, and at `setup`.

    Raises:
        ValueError, NothingToCompress: as `decomposed`; nothing has been changed.
    """
    gone = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    ranks = decomposed(layers, known, decompose, rank)
    now = {name: layer for name, layer in factored_layers(pl_module).items() if name in ranks}
    follow(trainer.optimizers, by_factors(gone, now))
    restart_averages(trainer, now)
    _synchronize_anew(trainer, pl_module)
    return ranks


def _synchronize_anew(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, DistributedDataParallel):
        # It holds on to the old parameters' gradients; the new one gives all processes the weights of the first.
        strategy.model = pl_module
        strategy.configure_ddp()


def factor_again(trainer: L.Trainer, pl_module: L.LightningModule, ranks: Mapping[str, int]) -> None:
    """Turn layers into two that the last fit has merged, which loses nothing: they are of these ranks.

    Runs at `on_train_start`.

    Raises:
        CompressError: a layer is not of its rank, or an optimizer cannot follow.
    """
    plain = {clean_name(name): layer for name, layer in pl_module.named_modules() if isinstance(layer, FACTORABLE)}
    layers = {name: plain[name] for name in ranks if name in plain}
    if layers:
        check_followers(trainer.optimizers)
        factor_layers(trainer, pl_module, layers, {}, svd, partial(_lossless, ranks))


def _lossless(ranks: Mapping[str, int], values: Mapping[str, Tensor], shapes: object) -> dict[str, int]:
    """The ranks of before, if nothing is lost by them."""
    for name, each in values.items():
        energy = each.square()
        if float(energy[ranks[name] :].sum()) > LOST_AT_MOST * float(energy.sum()):
            raise CompressError(
                f"LowRank has made '{name}' two of rank {ranks[name]} in this run, but the module holds another weight "
                f"now, of a checkpoint from before; fit with a new callback, or load a checkpoint from after"
            )
    return {name: ranks[name] for name in values}


def check_followers(optimizers: Sequence[Optimizer]) -> None:
    """Raise on optimizers in which no weight can be replaced by two. Runs before the first step.

    Raises:
        CompressError: LBFGS.
    """
    check_optimizers(optimizers, "in which no weight can be replaced by two", "at=0.0")


def merge_layers(trainer: L.Trainer, pl_module: L.LightningModule, names: Mapping[str, int]) -> None:
    """Turn layers into one again. Runs at `on_train_end`."""
    factors = {name: layer for name, layer in factored_layers(pl_module).items() if name in names}
    pairs = {
        name: (layer.down.get_parameter("weight"), layer.up.get_parameter("weight")) for name, layer in factors.items()
    }
    for module in (pl_module, *averaged_modules(trainer)):
        for name, layer in factored_layers(module).items():
            if name in pairs:
                unfactor(layer)
    follow(trainer.optimizers, by_products(pairs, pl_module))


class PlainOptimizers:
    """Lets `configure_optimizers` find the layers as they were when the run began, where it runs after that.

    Groups by name, order or layer are then the ones of the checkpoint; the factors take their place in them before the
    checkpoint's states come.

    Args:
        pl_module: the module.
        names: says which layers are two by the time.
    """

    def __init__(self, pl_module: L.LightningModule, names: Callable[[], Iterable[str]]) -> None:
        self.names, self.pl_module = names, pl_module
        self._stood_for: dict[str, nn.Parameter] = {}
        self.stop = intercept(pl_module, "configure_optimizers", self._client)

    def _client(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = set(self.names())
        layers = {name: layer for name, layer in factored_layers(self.pl_module).items() if name in wanted}
        with as_plain(layers) as self._stood_for:
            return original(*args, **kwargs)

    def follow(self, trainer: L.Trainer) -> None:
        """Put the factors in. Runs at `on_fit_start`."""
        layers = factored_layers(self.pl_module)
        follow(trainer.optimizers, by_factors(self._stood_for, {name: layers[name] for name in self._stood_for}))
        self._stood_for = {}
