"""Layers that become two, and one again, within a run: with what steps, averages and synchronizes them."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_compress.callbacks.averages import averaged_modules, restart_averages
from lightning_compress.factorization.factors import FACTORABLE, factored_layers
from lightning_compress.factorization.following import by_factors, by_products, check_followers, follow
from lightning_compress.factorization.lowrank import Decompose, decomposed, merge
from lightning_compress.factorization.ranks import Rank
from lightning_compress.factorization.svd import svd
from lightning_compress.sharding import clean_name

__all__ = ["factor_again", "factor_layers", "merge_layers"]


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
        CompressError: an optimizer cannot follow.
    """
    plain = {clean_name(name): layer for name, layer in pl_module.named_modules() if isinstance(layer, FACTORABLE)}
    layers = {name: plain[name] for name in ranks if name in plain}
    if layers:
        check_followers(trainer.optimizers)
        factor_layers(trainer, pl_module, layers, {}, svd, lambda *_: {name: ranks[name] for name in layers})


def merge_layers(trainer: L.Trainer, pl_module: L.LightningModule, names: Mapping[str, int]) -> None:
    """Turn layers into one again. Runs at `on_train_end`."""
    pairs = {
        name: (layer.down.get_parameter("weight"), layer.up.get_parameter("weight"))
        for name, layer in factored_layers(pl_module).items()
        if name in names
    }
    for module in (pl_module, *averaged_modules(trainer)) if pairs else ():
        merge(module)
    follow(trainer.optimizers, by_products(pairs, pl_module))
