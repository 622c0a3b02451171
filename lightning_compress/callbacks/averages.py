"""Averaged copies of the model that Lightning's own callbacks keep: SWA, EMA, WeightAveraging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import lightning.pytorch as L
import torch
from torch import nn

from lightning_compress.factorization.factors import Factored, factored_layers, take_factors
from lightning_compress.sharding import clean_name

__all__ = ["averaged_models", "averaged_modules", "restart_averages"]


def averaged_modules(trainer: L.Trainer) -> Iterator[nn.Module]:
    """Yield each averaged copy of the model that Lightning's callbacks keep (SWA, EMA).

    Reads their private `_average_model`: without it an average of dense and masked weights would be dense.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            # AveragedModel keeps the copy under `module.`, SWA keeps the copy itself.
            yield average.module if isinstance(average, torch.optim.swa_utils.AveragedModel) else average


def averaged_models(trainer: L.Trainer) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the parameters of each averaged copy by clean name."""
    for average in averaged_modules(trainer):
        yield {clean_name(name): parameter for name, parameter in average.named_parameters()}


def restart_averages(trainer: L.Trainer, factored: Mapping[str, Factored]) -> None:
    """Let averages of layers that became two be their factors: those of an average are no average of theirs.

    Args:
        trainer: of this run.
        factored: the layers by clean name; others of an average stay.
    """
    for average in averaged_modules(trainer):
        take_factors(average, {name: layer.rank for name, layer in factored.items()})
        copies = factored_layers(average)
        for name, layer in factored.items():
            for part in ("down", "up"):
                weight = layer.get_submodule(part).get_parameter("weight")
                copies[name].get_submodule(part).get_parameter("weight").copy_(weight)
