"""A copy of the module on which the plan is acted out: pruned once, shrunk once, its codes looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.factorization.lowrank import Decompose, decomposed, select_factorable, wants
from lightning_compress.factorization.ranks import Rank
from lightning_compress.factorization.svd import svd
from lightning_compress.planning.table import LayerPlan
from lightning_compress.pruning.channels import Removal, choose
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.dependency import Group
from lightning_compress.pruning.patterns import Unstructured
from lightning_compress.pruning.shrink import shrink
from lightning_compress.pruning.statistics import ACTIVATIONS, GRADIENTS
from lightning_compress.pruning.survivors import Survivors
from lightning_compress.pruning.targets import PRUNABLE, Criterion, Target, asks_for, described_function
from lightning_compress.select import Pattern, layers_of, select_layers, select_weights
from lightning_compress.sharding import clean_name

__all__ = ["Rehearsal", "weighted_layers"]

KNOWN_NOW = frozenset({"weight", "name", "step"})  # what a criterion can be given before there was a step
NORMS = ("Norm",)


@dataclass
class Rehearsal:
    """The state of the copy while callbacks are read one after another.

    Args:
        module: the copy, changed in place.
        rows: one for each weight, by the layer's name.
        codes: codes and scales of weights that will be integers, by parameter name.
        warnings: sentences for the user.
    """

    module: nn.Module
    rows: dict[str, LayerPlan]
    codes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def note(self, name: str, **changes: Any) -> None:
        """Change what a layer's row says."""
        if name in self.rows:
            self.rows[name] = replace(self.rows[name], **changes)

    def prune(
        self,
        sparsity: float,
        include: Sequence[Pattern] | None,
        exclude: Sequence[Pattern] | None,
        criterion: Criterion = magnitude,
        pattern: Callable[..., Any] | None = None,
        kinds: tuple[type[nn.Module], ...] = PRUNABLE,
    ) -> int:
        """Zero the lowest scores of the copy, all at once; returns how many weights are selected.

        Raises:
            ValueError: a pattern of names matches nothing, or the mask pattern does not fit a weight.
            NothingToCompress: nothing is selected.
        """
        weights = select_weights(self.module, kinds, include, exclude)
        skipped = select_layers(self.module, kinds, include, exclude).skipped
        pattern = self._stated(pattern or Unstructured())
        criterion = self._criterion(criterion)
        layers = layers_of(self.module, weights)
        values = {"step": lambda: 0}
        targets = [Target(name, weights[name].detach(), layers[name], None, criterion, values) for name in weights]
        if hasattr(pattern, "check"):
            pattern.check(targets, sparsity)
        masks, _ = pattern(targets, sparsity, 1.0)
        for (name, weight), mask in zip(weights.items(), masks, strict=True):
            weight.data.mul_(mask)
            layer = name.removesuffix(".weight")
            self.note(layer, sparsity=1.0 - float(mask.float().mean()), dense_because="")
            if not bool(mask.any()):
                self.warnings.append(
                    f"every weight of '{layer}' would be zero as the weights are now; exclude it, or let layers "
                    f"compete less: pattern=Unstructured(scope=uniform)"
                )
        self._reasons(skipped, {name.removesuffix(".weight") for name in weights}, kinds)
        return sum(weight.numel() for weight in weights.values())

    def _stated(self, pattern: Callable[..., Any]) -> Callable[..., Any]:
        if not hasattr(pattern, "growth"):
            return pattern
        self.warnings.append(
            f"{type(pattern).__name__} grows weights by what steps will show; sparsities of layers are those of a "
            f"single pruning by magnitude"
        )
        return Unstructured(getattr(pattern, "scope", Unstructured().scope))

    def _criterion(self, criterion: Criterion) -> Criterion:
        asked = asks_for(criterion, KNOWN_NOW | _GATHERED)
        if asked <= KNOWN_NOW:
            return criterion
        self.warnings.append(
            f"{described_function(criterion)} needs {', '.join(sorted(asked - KNOWN_NOW))}, which steps will show; "
            f"sparsities of layers are those by magnitude"
        )
        return magnitude

    def _reasons(self, skipped: Mapping[str, str], pruned: Iterable[str], kinds: tuple[type[nn.Module], ...]) -> None:
        chosen = set(pruned)
        for name, row in self.rows.items():
            if name in chosen or row.sparsity is not None:
                continue
            self.note(name, dense_because=skipped.get(name) or _reason(self.layer(name), row.kind, kinds))

    def layer(self, name: str) -> nn.Module | None:
        """Return the copy's layer of that name."""
        return self._layers.get(name)

    @cached_property
    def _layers(self) -> dict[str, nn.Module]:
        # Channels leave layers; no layer comes or goes, but in `factor`.
        return {clean_name(name): each for name, each in self.module.named_modules()}

    def factor(
        self,
        rank: Rank,
        decompose: Decompose,
        include: tuple[Pattern, ...] | None,
        exclude: tuple[Pattern, ...] | None,
    ) -> dict[str, int]:
        """Turn layers of the copy into two each, by their weights alone; returns the ranks. Comes first: rows change.

        Raises:
            ValueError: a rank that a layer does not have, or a budget that cannot be met.
            NothingToCompress: nothing is selected, or no layer would get smaller.
        """
        gathered = sorted(wants(decompose) - {"weight"})
        if gathered:
            self.warnings.append(
                f"{described_function(decompose)} needs {', '.join(gathered)}, which steps will show; ranks are those "
                f"of the weights alone"
            )
        layers, _ = select_factorable(self.module, include, exclude, frozen=False)
        ranks = decomposed(layers, {}, svd if gathered else decompose, rank)
        self.__dict__.pop("_layers", None)
        return ranks

    def remove(
        self, groups: Sequence[Group], share: Callable[..., float], amount: float, removal: Removal, relative: bool
    ) -> dict[str, Tensor]:
        """Take the channels of lowest magnitude out of the copy; returns which units stay, by group.

        Raises:
            ValueError: the limits do not allow that much.
        """
        before = {name: _outputs(self.layer(name)) for name in self.rows}
        parameters = {clean_name(name): weight for name, weight in self.module.named_parameters()}
        scores = {name: magnitude(weight.detach()) for name, weight in parameters.items() if weight.dim() > 1}
        kept = choose(Survivors(groups).scores(scores, relative), share, amount, removal)
        shrink(self.module, kept, groups)
        for name, outputs in before.items():
            layer = self.layer(name)
            weight = getattr(layer, "weight", None)
            if isinstance(weight, Tensor) and outputs is not None:
                self.note(name, channels=(outputs, len(weight)) if len(weight) != outputs else None)
        return kept


_GATHERED = GRADIENTS | ACTIVATIONS


def _outputs(layer: nn.Module | None) -> int | None:
    weight = getattr(layer, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() else None


def _reason(layer: nn.Module | None, kind: str, kinds: tuple[type[nn.Module], ...]) -> str:
    if any(word in kind for word in NORMS):
        return "norm"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, kinds):
        return "its weight is tied to an embedding, shared or reparametrized"
    return f"{kind} has no such form"


@torch.no_grad()
def weighted_layers(module: nn.Module, macs: Mapping[str, float] | None = None) -> dict[str, LayerPlan]:
    """Return a row for each layer with a weight of its own, in registration order; a shared weight comes once.

    Args:
        module: whose layers.
        macs: multiply-accumulates at each weight's positions, by parameter name (`macs_per_weight` x weights).
    """
    rows: dict[str, LayerPlan] = {}
    seen: set[int] = set()
    for name, layer in module.named_modules():
        for own, parameter in layer.named_parameters(recurse=False):
            if not own.endswith("weight") or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            label = clean_name(name if own == "weight" else f"{name}.{own.removesuffix('_weight')}")
            count = None if macs is None else macs.get(clean_name(f"{name}.{own}".removeprefix(".")), 0.0)
            rows[label] = LayerPlan(label, type(layer).__name__, parameter.numel(), macs=count)
    return rows
