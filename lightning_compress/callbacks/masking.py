"""Keep masks on weights through a fit: after each optimizer step, in averaged copies, in gradients, in checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_compress.callbacks.averages import averaged_models
from lightning_compress.callbacks.contract import gradients_are_read
from lightning_compress.errors import CheckpointMismatch
from lightning_compress.parts import Part
from lightning_compress.pruning.masks import apply_mask, pack_mask, unpack_mask
from lightning_compress.sharding import all_reduce_sum, cut, local, sharded_parts_of, sum_of_pieces
from lightning_compress.zero import mask_master, moved_by

__all__ = ["ELEMENTWISE", "MaskKeeper"]

# These move each weight by its own gradient alone: what a masked weight's gradient is cannot matter to the others, and
# the weight is zeroed again after the step. Masking it anyway would cost a pass, and zero second moments make Adam's
# square root 15 times slower (Intel MKL). Others (Muon, Adafactor, LBFGS) mix entries.
ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ("Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD")
)


class MaskKeeper:
    """The weights and masks of one callback, by clean name, and what is done to them at Lightning's moments.

    Where the strategy shards weights, masks are of this process's parts; otherwise there are no parts.
    """

    def __init__(self) -> None:
        self.weights: dict[str, nn.Parameter] = {}
        self.masks: dict[str, Tensor] = {}
        self.parts: dict[str, Part] = {}
        self._gradients_are_read = True

    def find_parts(self, root: nn.Module) -> None:
        """Find out what this process holds of each weight; every process calls it. Runs at `on_fit_start`."""
        self.parts = sharded_parts_of(root, self.weights)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each whole weight."""
        return {n: self.parts[n].shape if n in self.parts else weight.shape for n, weight in self.weights.items()}

    def start(self, who: L.Callback, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find out who reads gradients. Runs at `on_fit_start`."""
        self._gradients_are_read = gradients_are_read(who, trainer, pl_module)

    def owned(self, optimizer: Optimizer) -> list[str]:
        """Names of the weights that an optimizer moves."""
        ids = {id(parameter) for parameter in moved_by(optimizer)}
        return [name for name, weight in self.weights.items() if id(weight) in ids]

    def apply(self, names: Iterable[str] | None = None, weights: Mapping[str, nn.Parameter] | None = None) -> None:
        """Zero what the masks drop, in these weights (all of ours). Runs after each optimizer step."""
        for name in (self.masks if names is None else names) if self.masks else ():
            weight = (weights or self.weights).get(name)
            if weight is not None:
                mask = self.masks[name].to(weight.device)  # SWA keeps its average on the CPU
                apply_mask(local(weight), mask)
                mask_master(weight, mask)

    def mask_gradients(self, names: Iterable[str]) -> None:
        """Zero the gradients of what the masks drop."""
        for name in names if self.masks else ():
            gradient = self.weights[name].grad
            if gradient is not None:
                apply_mask(local(gradient), self.masks[name])

    @torch.no_grad()
    def replace(self, trainer: L.Trainer, masks: Iterator[Tensor]) -> None:
        """Take over new masks, one weight at a time, and apply them wherever a copy of the weights is."""
        for name, mask in zip(self.weights, masks, strict=True):
            old = self.masks.get(name)
            if old is None:
                self.masks[name] = mask.to(self.weights[name].device)
                continue
            grown = mask.to(old.device) & ~old
            if bool(grown.any()):
                _forget(trainer.optimizers, self.weights[name], grown)
            old.copy_(mask)
        self.apply()
        for average in averaged_models(trainer):
            self.apply(self.masks, average)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LBFGS):  # its curvature pairs belong to a loss with other weights in it
                optimizer.state.clear()

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Mask gradients if somebody reads them; before clipping: weights that are out held most of a layer's norm."""
        if self.masks and (self._gradients_are_read or type(optimizer) not in ELEMENTWISE):
            self.mask_gradients(self.owned(optimizer))

    def after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mask gradients where no hook may follow: manual optimization may clip, LBFGS asks several times."""
        mixed = any(isinstance(optimizer, LBFGS) for optimizer in trainer.optimizers)
        if self.masks and (mixed or not pl_module.automatic_optimization):
            self.mask_gradients(self.weights)

    def sparsity(self) -> float:
        """Share of weights that the masks hold at zero."""
        counted = [mask for name, mask in self.masks.items() if name not in self.parts or self.parts[name].counted]
        counts = [sum(int(torch.count_nonzero(mask)) for mask in counted), sum(mask.numel() for mask in counted)]
        if self.parts:
            device = next(iter(self.masks.values())).device
            counts = all_reduce_sum(torch.tensor(counts, device=device)).tolist()
        return 1.0 - counts[0] / counts[1]

    def packed(self) -> dict[str, Tensor]:
        """Return the whole masks at one bit a weight; every process calls it."""
        return {name: self._packed(mask, self.parts.get(name)) for name, mask in self.masks.items()}

    def _packed(self, mask: Tensor, part: Part | None) -> Tensor:
        if part is None or part.replicated:
            return pack_mask(mask)
        # Each bit is one process's, so that sums of bytes put them together: an eighth of a byte is sent for a weight.
        return sum_of_pieces(pack_mask(part.placed(mask)).to(mask.device), part).cpu()

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Take over packed masks. Runs at `on_train_start`.

        Raises:
            CheckpointMismatch: they are of other weights.
        """
        if packed and packed.keys() != self.weights.keys():
            differing = sorted(packed.keys() ^ self.weights.keys())
            raise CheckpointMismatch(
                f"the checkpoint has masks for other weights than this model's selection; first difference: "
                f"'{differing[0]}'; resume with the model and include/exclude that made it"
            )
        shapes = self.shapes
        self.masks = {
            name: cut(unpack_mask(packed[name].cpu(), shapes[name]), self.parts.get(name)).to(weight.device)
            for name, weight in self.weights.items()
            if packed
        }


def _forget(optimizers: Iterable[Any], weight: nn.Parameter, grown: Tensor) -> None:
    # Moments of a weight that comes back are of gradients it did not follow.
    for optimizer in optimizers:
        raw = getattr(optimizer, "optimizer", optimizer)
        for value in raw.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                local(value).masked_fill_(grown, 0)
