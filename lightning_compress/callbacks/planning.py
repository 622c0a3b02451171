"""plan: what callbacks will do to a module, before any step of training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass
from functools import singledispatch
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lightning_compress.callbacks.distillation import Distillation
from lightning_compress.callbacks.lottery import LotteryRewinding
from lightning_compress.callbacks.low_rank import LowRank
from lightning_compress.callbacks.pruning import GradualPruning
from lightning_compress.callbacks.quantization import QuantizationAwareTraining
from lightning_compress.callbacks.reconstruction import Reconstruction
from lightning_compress.callbacks.regularization import SparsityRegularization
from lightning_compress.callbacks.reshaping import traced_call
from lightning_compress.callbacks.structured import StructuredPruning
from lightning_compress.callbacks.weight_sharing import WeightSharing
from lightning_compress.errors import NothingToCompress
from lightning_compress.planning.example import Example, ExampleCall, example_call
from lightning_compress.planning.rehearsal import Rehearsal, weighted_layers
from lightning_compress.planning.second_looks import second_looks
from lightning_compress.planning.sizes import expected_sizes
from lightning_compress.planning.table import Plan, Stage
from lightning_compress.pruning.hessians import RECONSTRUCTIBLE
from lightning_compress.quantization.choosing import Grids, select_quantizable
from lightning_compress.select import select_layers
from lightning_compress.weight_sharing.sharing import share_weights
from lightning_compress.window import Moment, resolve_window

__all__ = ["plan", "rehearsed"]

_POINTS = 20
# What changes shapes comes first, then what zeroes, then what looks at the zeros.
_ORDER = (
    LowRank, StructuredPruning, SparsityRegularization, Reconstruction, GradualPruning, WeightSharing,
    QuantizationAwareTraining,
)  # fmt: skip


def plan(
    module: nn.Module,
    callbacks: Iterable[L.Callback] | L.Callback,
    example: Example = None,
    *,
    steps: int | None = None,
    sizes: bool = True,
) -> Plan:
    """Find out what a run with these callbacks will do to a module; nothing is trained or changed. Runs before `fit`.

    On a copy, weights are pruned once to the final sparsity by the scores they have now, channels are removed once,
    codes are computed once. What training will decide differently is how the zeros spread over layers; totals are
    those of the end. The same selections and checks run as at `setup`, and raise the same errors.

    Args:
        module: a LightningModule or any other, with the weights that training starts from.
        callbacks: those of the run; others than this package's are passed over.
        example: what its forward takes: a tensor, a tuple, or a dict of keywords; a LightningModule's
            `example_input_array` if None. Without one MACs are unknown, and channels cannot be traced.
        steps: optimizer steps of the run: moments are then steps, else fractions of the run.
        sizes: write the weights to a temporary file to measure it; False for models too large for that.

    Raises:
        NothingToCompress: no callback of this package is there, or one of them selects nothing.
        ValueError: an option that does not fit the module, or channels are to go without an example.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> plan(net, GradualPruning(0.9)).expects("weights that are not zero")
    734.0
    """
    given = [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks)
    ours = [each for each in given if isinstance(each, _PLANNED) and each.enabled]
    if not ours:
        raise NothingToCompress(
            "expected callbacks of this package that are enabled, such as GradualPruning(0.9), got "
            f"{[type(each).__name__ for each in given]}; there is nothing to plan"
        )
    call = example_call(module, example)
    with torch.no_grad():
        before = copy.deepcopy(module).eval()
        acting = Rehearsal(copy.deepcopy(before), weighted_layers(before, None if call is None else call.macs(before)))
        stages = {id(each): rehearsed(each, acting, call, steps) for each in sorted(ours, key=_place)}
        expected = expected_sizes(before, acting, call, sizes)
        if call is not None:
            for name, left in call.macs(acting.module).items():
                acting.note(name.removesuffix(".weight"), macs_left=left)
    second_looks(acting)
    warnings = tuple(dict.fromkeys(acting.warnings))
    return Plan(tuple(acting.rows.values()), tuple(stages[id(each)] for each in ours), expected, warnings, steps)


def _place(callback: L.Callback) -> int:
    return next((index for index, kind in enumerate(_ORDER) if isinstance(callback, kind)), len(_ORDER))


@singledispatch
def rehearsed(callback: L.Callback, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    """Act a callback out on the copy, and say what it does when."""
    raise TypeError(f"no plan is known for {type(callback).__name__}")


def _moments(window: Iterable[Moment], names: tuple[str, ...], steps: int | None) -> tuple[tuple[str, float], ...]:
    """Name the moments of a window: as steps where the run's length is known, else as they were given."""
    options = ("begin", "end") if len(names) == 2 else ("observe", "round", "freeze")
    moments = tuple(window) if steps is None else resolve_window(tuple(window), steps, options)
    return tuple(zip(names, moments, strict=True))


def _curve(schedule: Callable[[float], float], window: tuple[Moment, Moment], steps: int | None) -> tuple[float, ...]:
    begin, end = window if steps is None else resolve_window(window, steps, ("begin", "end"))
    if steps is None and not (isinstance(begin, float) and isinstance(end, float)):
        return ()
    last = float(steps or 1)
    places = [last * index / _POINTS for index in range(_POINTS + 1)]
    return tuple(0.0 if at < begin else schedule(min(1.0, (at - begin) / max(end - begin, 1e-9))) for at in places)


@rehearsed.register
def _(callback: GradualPruning, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    final = callback.schedule(1.0)
    count = acting.prune(final, callback.include, callback.exclude, callback.criterion, callback.pattern)
    does = f"zeroes {final:.1%} of {count:,} weights, by {_named(callback.criterion)}, {_named(callback.pattern)}"
    moments = _moments(callback.window, ("from", "to"), steps)
    return Stage(type(callback).__name__, does, moments, _curve(callback.schedule, callback.window, steps))


def _named(thing: Any) -> str:
    """A function's name; of a frozen object what it prints, with the functions in it by name."""
    if is_dataclass(thing) and not isinstance(thing, type):
        options = [(each.name, getattr(thing, each.name)) for each in fields(thing)]
        return f"{type(thing).__name__}({', '.join(f'{name}={_named(value)}' for name, value in options)})"
    return str(getattr(thing, "__name__", None) or thing)


@rehearsed.register
def _(callback: SparsityRegularization, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    moments = _moments(callback.window, ("from", "to"), steps)
    does = f"adds {_named(callback.term)} to the loss"
    if callback.sparsity:
        count = acting.prune(callback.sparsity, callback.include, callback.exclude)
        does += f"; at its end zeroes {callback.sparsity:.1%} of {count:,} weights"
    return Stage(type(callback).__name__, does, moments)


@rehearsed.register
def _(callback: Reconstruction, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    count = acting.prune(callback.sparsity, callback.include, callback.exclude, kinds=RECONSTRUCTIBLE)
    does = f"zeroes {callback.sparsity:.1%} of {count:,} weights at once and lets the others make up for it"
    return Stage(type(callback).__name__, does, (("at", _step(callback.at, steps)),))


def _step(at: Moment, steps: int | None) -> Moment:
    return at if steps is None or isinstance(at, int) else round(at * steps)


@rehearsed.register
def _(callback: WeightSharing, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    books = share_weights(acting.module, callback.entries, callback.start, callback.include, callback.exclude)
    fewest, most = min(map(len, books.values())), max(map(len, books.values()))
    values = f"{most}" if fewest == most else f"{fewest} to {most}"
    does = f"lets the weights of {len(books)} layers share {values} values a layer, which are then trained"
    return Stage(type(callback).__name__, does, (("at", _step(callback.at, steps)),))


@rehearsed.register
def _(callback: LowRank, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    ranks = acting.factor(callback.rank, callback.decompose, callback.include, callback.exclude)
    acting.rows = weighted_layers(acting.module, None if call is None else call.macs(acting.module))
    fewest, most = min(ranks.values()), max(ranks.values())
    rank = f"rank {most}" if fewest == most else f"ranks {fewest} to {most}"
    does = f"makes each of {len(ranks)} layers two of {rank}, which are then trained"
    does += ", and one again at the end" if callback.merge else ""
    return Stage(type(callback).__name__, does, (("at", _step(callback.at, steps)),))


@rehearsed.register
def _(callback: StructuredPruning, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    if call is None:
        raise ValueError(
            "StructuredPruning finds the channels that go together by running the module once: give plan an example "
            "of its input, plan(module, callbacks, example), or set example_input_array"
        )
    final = callback.schedule(1.0)
    traced = traced_call(
        acting.module, call.name, call.args, dict(call.kwargs), callback.include, callback.exclude, callback.removal
    )
    kept = acting.remove(traced.groups, traced.share, final, callback.removal, relative=True)
    gone = sum(int((~units).sum()) for units in kept.values())
    units = sum(len(units) for units in kept.values())
    does = f"takes out {gone:,} of {units:,} channels or heads: {final:.1%} of {callback.removal.of}"
    for group, reason in traced.skipped.items():
        acting.note(group, dense_because=reason)
    moments = _moments(callback.window, ("from", "to"), steps)
    return Stage(type(callback).__name__, does, moments, _curve(callback.schedule, callback.window, steps))


@rehearsed.register
def _(callback: QuantizationAwareTraining, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    layers = select_quantizable(acting.module, callback.include, callback.exclude)
    choices = callback.quantized.recipe.choices(acting.module, layers)
    for name, layer in layers.items():
        grids = callback.quantized.recipe.grids(choices[name])
        acting.note(name, bits=grids.weights.bits, float_because="")
        _code(acting, name, layer, grids)
    skipped = select_layers(acting.module, tuple({type(each) for each in layers.values()}), None, None).skipped
    for name, row in acting.rows.items():
        if row.bits is None:
            kind = "norm" if "Norm" in row.kind else "embedding" if row.kind == "Embedding" else "not selected"
            acting.note(name, float_because=skipped.get(name, kind))
    grids = callback.quantized.recipe.default
    inputs = "inputs in floating point" if grids.inputs is None else f"inputs to {grids.inputs.bits} bits"
    does = f"rounds {len(layers)} layers: weights to {grids.weights.bits} bits, {inputs}"
    return Stage(type(callback).__name__, does, _moments(callback.window, ("observes", "rounds", "freezes"), steps))


def _code(acting: Rehearsal, name: str, layer: nn.Module, grids: Grids) -> None:
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or (grids.inputs is None and not isinstance(layer, nn.Embedding)):
        return
    weight = weight.detach()
    coded = grids.weights.codes(weight, grids.weights.learned(weight))
    if coded is not None:
        acting.codes[f"{name}.weight"] = coded


@rehearsed.register
def _(callback: Distillation, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    source = callback.source
    teacher = type(source).__name__ if isinstance(source, nn.Module) else str(source)
    terms = [_named(callback.loss)] * (callback.weight != 0.0) + [term.name for term in callback.layers]
    return Stage(type(callback).__name__, f"teaches by {teacher}: {', '.join(terms)}")


@rehearsed.register
def _(callback: LotteryRewinding, acting: Rehearsal, call: ExampleCall | None, steps: int | None) -> Stage:
    return Stage(type(callback).__name__, "puts the weights that are left back to early values at each round")


_PLANNED = tuple(kind for kind in rehearsed.registry if kind is not object and kind is not L.Callback)
