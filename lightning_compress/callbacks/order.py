"""Which callbacks cannot meet: pure functions on a list.

No order is imposed, because none is needed: masks are applied inside the optimizer's step, fake-quantization inside
the forward and the teacher inside `training_step`, so any order of the Trainer's list gives the same run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol, runtime_checkable

from lightning.pytorch.callbacks import ModelPruning

from lightning_compress.callbacks.timetable import Timetable
from lightning_compress.errors import IncompatibleCallbacks
from lightning_compress.pruning.channels import Removal
from lightning_compress.quantization.layers import QuantizedLayers
from lightning_compress.window import Moment

__all__ = [
    "Claim",
    "Claiming",
    "check_channels",
    "check_claims",
    "check_factored",
    "check_shared",
    "check_together",
    "check_zeros",
]


@dataclass(frozen=True)
class Claim:
    """What one callback does to which parameters or modules, by clean name."""

    owner: str
    action: str
    names: frozenset[str]


@runtime_checkable
class Claiming(Protocol):
    """A callback that says what it will change."""

    def claims(self) -> list[Claim]:
        """Return the claims; empty when off or before `setup`."""
        ...


@runtime_checkable
class Quantizing(Protocol):
    """A callback that rounds layers; at which optimizer steps it begins to observe and to round, and freezes ranges."""

    quantized: QuantizedLayers
    steps: tuple[int, int, int]


@runtime_checkable
class Removing(Claiming, Protocol):
    """A callback that takes channels out of layers, the last ones when its window ends."""

    removal: Removal
    times: Timetable


@runtime_checkable
class Following(Protocol):
    """A callback that compares the model's shapes with those of a teacher, or averages them."""

    @property
    def follows(self) -> str:
        """Say what of it cannot follow a model whose channels go; "" is nothing."""
        ...


@runtime_checkable
class Sharing(Claiming, Protocol):
    """A callback that lets weights share values; at which optimizer step it begins."""

    at_step: int

    def step_of(self, moment: Moment) -> int:
        """Return a moment of this run as an optimizer step."""
        ...


def check_zeros(claims: Iterable[Claim], without_zero: Iterable[str]) -> None:
    """Raise if a weight is pruned whose grid has no zero: what was pruned would come back in each forward.

    Args:
        claims: of all callbacks.
        without_zero: names of layers with such a grid.

    >>> check_zeros([Claim("GradualPruning", "prune", frozenset({"a.weight"}))], ["b"])
    """
    weights = {f"{name}.weight": name for name in without_zero}
    for claim in claims:
        shared = sorted(claim.names & weights.keys()) if claim.action == "prune" else []
        if shared:
            layer = weights[shared[0]]
            raise IncompatibleCallbacks(
                f"{claim.owner} prunes {shared[0]}, which Binary rounds to -s and s: without a zero, pruned weights "
                f"would come back; give '{layer}' Ternary in per_layer, or exclude it in one of the two callbacks"
            )


def check_channels(removed: Iterable[Claim], last: int, by_channel: Iterable[str], rounding: int) -> None:
    """Raise if channels go when a grid learns a value for each of them: they could not go with its values.

    Args:
        removed: whose weights lose channels.
        last: the optimizer step after which the last ones go.
        by_channel: names of layers whose weights' grid learns such values.
        rounding: the optimizer step after which it begins to.

    >>> claim = Claim("StructuredPruning", "prune", frozenset({"a.weight"}))
    >>> check_channels([claim], 5, ["a"], 6)
    >>> check_channels([claim], 6, ["a"], 6)
    Traceback (most recent call last):
    ...
    lightning_compress.errors.IncompatibleCallbacks: StructuredPruning takes channels out of 'a' until step 6, but its \
grid learns a value for each of them from step 6 on; end the pruning's window before that step, round later, or give \
'a' another grid in per_layer, such as LSQ(per_channel=False)
    """
    for claim in removed:
        layer = next((name for name in sorted(by_channel) if f"{name}.weight" in claim.names), None)
        if layer is not None and last >= rounding:
            raise IncompatibleCallbacks(
                f"{claim.owner} takes channels out of '{layer}' until step {last}, but its grid learns a value for "
                f"each of them from step {rounding} on; end the pruning's window before that step, round later, or "
                f"give '{layer}' another grid in per_layer, such as LSQ(per_channel=False)"
            )


def check_shared(sharing: Iterable[Claim], others: Iterable[Claim], at: int, last: int) -> None:
    """Raise if a weight is pruned when it already shares its value: zeros would pull the value of the others to 0.

    Args:
        sharing: of the callback that lets weights share.
        others: of another one.
        at: the optimizer step after which weights share.
        last: the optimizer step after which the other one changes them the last time.

    >>> share, prune = Claim("S", "share", frozenset({"a.weight"})), Claim("P", "prune", frozenset({"a.weight"}))
    >>> check_shared([share], [prune], at=6, last=5)
    >>> check_shared([share], [prune], at=5, last=5)
    Traceback (most recent call last):
    ...
    lightning_compress.errors.IncompatibleCallbacks: P prunes a.weight until step 5, but S lets its values be shared \
from step 5 on; end the pruning before that step, or share later
    """
    for claim in sharing:
        for other in others:
            both = sorted(claim.names & other.names) if other.action == "prune" else []
            if both and last >= at:
                raise IncompatibleCallbacks(
                    f"{other.owner} prunes {both[0]} until step {last}, but {claim.owner} lets its values be shared "
                    f"from step {at} on; end the pruning before that step, or share later"
                )


def check_factored(claims: Iterable[Claim]) -> None:
    """Raise if a weight is to become two in the run that another callback holds on to.

    >>> factor = Claim("LowRank", "factor", frozenset({"a.weight"}))
    >>> check_factored([factor, Claim("GradualPruning", "prune", frozenset({"b.weight"}))])
    >>> check_factored([factor, Claim("GradualPruning", "prune", frozenset({"a.weight"}))])
    Traceback (most recent call last):
    ...
    lightning_compress.errors.IncompatibleCallbacks: LowRank replaces a.weight by two weights in the middle of the \
run, but GradualPruning has its own part in it; let LowRank act at=0.0 with decompose=svd, so that GradualPruning sees \
the two, or exclude the layer in one of them
    """
    listed = list(claims)
    for claim in (each for each in listed if each.action == "factor"):
        layers = frozenset(name.removesuffix(".weight") for name in claim.names)
        for other in (each for each in listed if each.action not in ("factor", "distil")):
            both = sorted(claim.names if other.action == "rewind" else other.names & (claim.names | layers))
            if both:
                raise IncompatibleCallbacks(
                    f"{claim.owner} replaces {both[0]} by two weights in the middle of the run, but {other.owner} has "
                    f"its own part in it; let {claim.owner} act at=0.0 with decompose=svd, so that {other.owner} sees "
                    f"the two, or exclude the layer in one of them"
                )


def check_first(who: object, callbacks: Iterable[object]) -> None:
    """Raise if a callback before this one has already looked at shapes that this one is about to change, at `setup`.

    Args:
        who: replaces layers at `setup`.
        callbacks: of the run, in order.

    Raises:
        IncompatibleCallbacks: channels have been traced, or a mean teacher copied.
    """
    for callback in takewhile(lambda each: each is not who, callbacks):
        removing = isinstance(callback, Removing) and callback.removal.times > 0
        averaging = isinstance(callback, Following) and callback.follows == "MeanTeacher"
        if removing or averaging:
            what = "traced the module's channels" if removing else "copied the module for its MeanTeacher"
            raise IncompatibleCallbacks(
                f"{type(callback).__name__} has {what} before {type(who).__name__} could replace layers; put "
                f"{type(who).__name__} before it in the list of callbacks"
            )


def check_claims(claims: Iterable[Claim]) -> None:
    """Raise if two claims do the same to one name.

    >>> prune = Claim("A", "prune", frozenset({"0.weight"}))
    >>> check_claims([prune, Claim("B", "quantize", frozenset({"0.weight"}))])
    >>> check_claims([prune, prune])
    Traceback (most recent call last):
    ...
    lightning_compress.errors.IncompatibleCallbacks: A and A both prune 0.weight; give each its own include/exclude \
or remove one
    """
    seen: list[Claim] = []
    for claim in claims:
        for other in seen:
            shared = sorted(claim.names & other.names) if claim.action == other.action else []
            if shared:
                more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
                raise IncompatibleCallbacks(
                    f"{other.owner} and {claim.owner} both {claim.action} {shared[0]}{more}; give each its own "
                    f"include/exclude or remove one"
                )
        seen.append(claim)


def check_together(callbacks: Iterable[object]) -> None:
    """Raise if callbacks of this run cannot meet. Runs when each callback knows its targets.

    Raises:
        IncompatibleCallbacks: two of ours claim the same, a weight becomes two that another one holds, a pruned weight
            is binarized, channels go that a grid learns values for, weights are pruned that share values, or
            Lightning's ModelPruning is in the list as well.
    """
    listed = list(callbacks)
    claims = [claim for callback in listed if isinstance(callback, Claiming) for claim in callback.claims()]
    check_claims(claims)
    check_factored(claims)
    removing = [callback for callback in listed if isinstance(callback, Removing) and callback.removal.times]
    factoring = [claim.owner for claim in claims if claim.action == "factor"]
    for callback in listed:
        if isinstance(callback, Following) and callback.follows == "MeanTeacher" and factoring:
            raise IncompatibleCallbacks(
                f"{factoring[0]} replaces weights in the middle of the run, which MeanTeacher cannot follow; let "
                f"{factoring[0]} act at=0.0 with decompose=svd, or teach with StartingModel()"
            )
        if isinstance(callback, Following) and callback.follows and any(isinstance(c, Removing) for c in listed):
            raise IncompatibleCallbacks(
                f"StructuredPruning takes channels out of the model while it trains, which {callback.follows} cannot "
                f"follow; teach the logits, or layers with a loss that takes any width, by a teacher of its own"
            )
        if isinstance(callback, Quantizing):
            check_zeros(claims, callback.quantized.without_zero)
            for other in removing:
                check_channels(other.claims(), other.times.end, callback.quantized.by_channel, callback.steps[1])
        if isinstance(callback, Sharing):
            for pruning in (each for each in listed if isinstance(each, Claiming)):
                last = getattr(pruning, "window", (getattr(pruning, "at", 0),))[-1]
                check_shared(callback.claims(), pruning.claims(), callback.at_step, callback.step_of(last))
    if any(isinstance(callback, ModelPruning) for callback in listed) and any(c.action != "distil" for c in claims):
        raise IncompatibleCallbacks(
            "Lightning's ModelPruning renames parameters while it trains, so nothing else can prune or quantize them; "
            "remove it and use GradualPruning"
        )
