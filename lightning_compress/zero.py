"""The only file that knows how DeepSpeed keeps weights under ZeRO stages 1 and 2; it does not import the package.

Every process computes with whole weights. The optimizer moves flat pieces in full precision (masters), each on one
process, and a step ends with whole weights made of them: what is changed in a weight has to be changed in its master.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_compress.pruning.masks import apply_mask

__all__ = ["Handle", "is_zero", "mask_master", "moved_by", "on_step", "skipped", "why_not"]

STAGES = (1, 2)
StepHook = Callable[[Any, Any, Any], None]


class Handle(Protocol):
    """What takes a hook off again."""

    def remove(self) -> None:
        """Take it off."""
        ...


def is_zero(optimizer: object) -> bool:
    """Say whether an optimizer is DeepSpeed's of stages 1 and 2, around one of torch."""
    return hasattr(optimizer, "bit16_groups") and hasattr(optimizer, "overflow")


def why_not(config: Mapping[str, Any] | None) -> str:
    """Return why a configuration of DeepSpeed cannot be followed, and the cure; "" if it can. Runs at `setup`.

    >>> why_not({"zero_optimization": {"stage": 2}})
    ''
    >>> why_not({"zero_optimization": {"stage": 3}})
    'of ZeRO stage 3: weights are empty between forwards; set stage=2, or stage=1'
    """
    zero = (config or {}).get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in STAGES:
        reason = "weights are empty between forwards" if stage == 3 else "its optimizers keep masters in other places"
        return f"of ZeRO stage {stage}: {reason}; set stage=2, or stage=1"
    for option in ("offload_optimizer", "offload_param"):
        if zero.get(option, {}).get("device", "none") != "none":
            return f"with {option}, under which masters are not where they are looked for; leave it out"
    return ""


def moved_by(optimizer: Any) -> list[nn.Parameter]:
    """Return the parameters of the module that an optimizer moves; ZeRO's own groups hold flat pieces of them."""
    if is_zero(optimizer):
        return [parameter for group in optimizer.bit16_groups for parameter in group]
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def skipped(optimizer: Any) -> bool:
    """Say whether the last call of an optimizer's step was none, for gradients overflowed."""
    # A fused optimizer of torch is called even on overflow and skips the step itself.
    return bool(optimizer.overflow) if is_zero(optimizer) else bool(getattr(optimizer, "found_inf", None) or 0.0)


class _Stepping:
    """Stands in for one optimizer's `step`, and then calls the hooks."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.original = optimizer, optimizer.step
        self.hooks: dict[int, StepHook] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        returned = self.original(*args, **kwargs)
        for hook in list(self.hooks.values()):
            hook(self.optimizer, args, kwargs)
        return returned


def on_step(optimizer: Optimizer, hook: StepHook) -> Handle:
    """Call `hook(optimizer, args, kwargs)` after each step from now on. Runs at `on_fit_start`.

    ZeRO's optimizer has no hooks, and calls the one inside once for each of its groups, before weights are made anew.
    """
    if not is_zero(optimizer):
        return optimizer.register_step_post_hook(hook)
    stepping: Any = optimizer.step
    if not isinstance(stepping, _Stepping):
        stepping = _Stepping(optimizer)
        optimizer.step = stepping  # type: ignore[method-assign]
    handle = RemovableHandle(stepping.hooks)
    stepping.hooks[handle.id] = hook
    return handle


@torch.no_grad()
def mask_master(weight: Tensor, mask: Tensor) -> None:
    """Zero what a whole mask drops in this process's piece of a weight's master; nothing where it has none."""
    fragment = getattr(weight, "_hp_mapping", None)
    if fragment is not None:
        place, master = fragment.lp_fragment_address, fragment.hp_fragment
        apply_mask(master, mask.reshape(-1).narrow(0, place.start, place.numel).to(master.device))
