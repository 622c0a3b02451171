"""Train a small module with a row's callbacks, and keep what the promises look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

EPOCHS = 4  # of 4 batches each: 16 optimizer steps
SEED = 7
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks_always_called",
    "_global_forward_hooks_with_kwargs",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_module_registration_hooks",
    "_global_parameter_registration_hooks",
)
OPTIMIZER_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Seen:
    """What a layer's own forward was last given in training, and the parameter that stood behind the weight."""

    weight: Tensor
    value: Tensor
    parameter: Tensor


@dataclass
class Run:
    """A finished fit: the module, its callbacks, and what the layers' forwards last saw in training."""

    module: L.LightningModule
    callbacks: Sequence[L.Callback]
    trainer: L.Trainer
    before: Mapping[str, Tensor]
    seen: Mapping[str, Seen] = field(default_factory=dict)

    def of(self, kind: type) -> Any:
        """The enabled callback of a kind."""
        return next(callback for callback in self.callbacks if isinstance(callback, kind))

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers, by the names that the user wrote, whether compiled or not."""
        state = self.module.state_dict()
        return {name.replace("_orig_mod.", ""): value.detach().clone() for name, value in state.items()}


class Watch(L.Callback):
    """Notes the weight and the input that each layer's own forward sees in training."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.handles: list[Any] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, layer in pl_module.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                self.handles.append(layer.register_forward_pre_hook(self.note(name), with_kwargs=True))

    def note(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any) -> None:
            if layer.training and torch.is_grad_enabled():
                value = args[0] if args else kwargs["input"]
                parameter = dict(layer.named_parameters()).get("weight", layer.weight)
                self.seen[name] = Seen(*(t.detach().clone() for t in (layer.weight, value, parameter)))

        return hook

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for handle in self.handles:
            handle.remove()


class Do(L.Callback):
    """Calls a function between batches: `action(trainer, module, batches so far)`."""

    def __init__(self, action: Callable[[L.Trainer, L.LightningModule, int], None]) -> None:
        self.action, self.batches = action, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.batches += 1
        self.action(trainer, pl_module, self.batches)


class KeepRandomness(L.Callback):
    """Saves the global random state and puts it back before the first batch after a resume: a user's duty."""

    def __init__(self) -> None:
        self.restored: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.restored = state["state"]

    def on_train_batch_start(self, *_: Any) -> None:
        if self.restored is not None:
            torch.set_rng_state(self.restored)
            self.restored = None


def build(kind: type[L.LightningModule], **options: Any) -> L.LightningModule:
    """The same module each time."""
    torch.manual_seed(SEED)
    return kind(**options)


def trainer_for(folder: Path, callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain = {"enable_checkpointing": False, "max_epochs": EPOCHS, "accelerator": "cpu", "devices": 1}
    return L.Trainer(callbacks=list(callbacks), default_root_dir=folder, **{**quiet, **plain, **options})


def train(
    module: L.LightningModule,
    callbacks: Sequence[L.Callback],
    folder: Path,
    extra: Sequence[L.Callback] = (),
    ckpt_path: Path | None = None,
    watched: bool = False,
    **options: Any,
) -> Run:
    """Fit `module` with a row's callbacks and, after them in the list, the test's own."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    watch = Watch()
    trainer = trainer_for(folder, [*callbacks, *extra, *([watch] if watched else [])], **options)
    torch.manual_seed(SEED)
    trainer.fit(module, ckpt_path=ckpt_path)
    return Run(module, callbacks, trainer, before, watch.seen)


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Names whose tensors are not the same to the bit (a NaN equals itself)."""
    names = sorted({*one, *other})
    return [n for n in names if n not in one or n not in other or not same_bits(one[n], other[n])]


def same_bits(one: Tensor, other: Tensor) -> bool:
    raw = [value.detach().contiguous().view(-1).view(torch.uint8) for value in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*raw)


def traces(module: nn.Module, optimizers: Sequence[Any] = ()) -> dict[str, Any]:
    """Everything that an attached callback could have left behind, as plain values."""
    found: dict[str, Any] = {"globals": [len(getattr(nn.modules.module, name)) for name in GLOBAL_HOOKS]}
    for name, child in module.named_modules():
        found[f"module {name}"] = (
            type(child).__qualname__,
            sorted(child.__dict__),
            [len(child.__dict__.get(hooks) or ()) for hooks in HOOKS],
            sorted(child._parameters),
            sorted(child._buffers),
        )
    for name, parameter in module.named_parameters():
        hooks = (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        found[f"parameter {name}"] = ([len(h or ()) for h in hooks], sorted(vars(parameter)), parameter.requires_grad)
    for index, optimizer in enumerate(optimizers):
        found[f"optimizer {index}"] = [len(getattr(optimizer, name, ())) for name in OPTIMIZER_HOOKS]
    return found


def identity(module: nn.Module) -> dict[str, Any]:
    """What a user calls the module's own: classes, forwards, parameter names and state_dict keys."""
    return {
        "keys": list(module.state_dict()),
        "parameters": [name for name, _ in module.named_parameters()],
        "buffers": [name for name, _ in module.named_buffers()],
        "classes": [type(child) for child in module.modules()],
        "forwards": [(type(child).forward, "forward" in child.__dict__) for child in module.modules()],
    }
