"""Which channels of a module are left: still in it (`present`), and of these not zero (`kept`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.errors import CheckpointMismatch
from lightning_compress.parts import Part
from lightning_compress.pruning.channels import masks_of, remaining, unit_scores
from lightning_compress.pruning.dependency import Group
from lightning_compress.pruning.masks import pack_mask, unpack_mask

__all__ = ["Survivors"]


class Survivors:
    """The units of each group of a module as it was first traced, and which of them are present and kept."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.present = {group.name: torch.ones(group.units, dtype=torch.bool) for group in self.groups}
        self.kept = {name: units.clone() for name, units in self.present.items()}

    @property
    def shrunken(self) -> bool:
        """Whether channels have been taken out."""
        return any(not bool(units.all()) for units in self.present.values())

    @property
    def masked(self) -> bool:
        """Whether channels are zero that are still in the module."""
        return any(not torch.equal(self.kept[name], units) for name, units in self.present.items())

    def groups_now(self) -> list[Group]:
        """Return the groups with positions as they are in the module now."""
        return remaining(self.groups, self.present)

    def kept_now(self) -> dict[str, Tensor]:
        """Return which of the present units are kept."""
        return {name: self.kept[name][units] for name, units in self.present.items()}

    def scores(
        self, by_weight: Mapping[str, Tensor], relative: bool, parts: Mapping[str, Part] | None = None
    ) -> dict[str, Tensor]:
        """Return a score for each unit ever; -inf for those that have gone.

        Args:
            by_weight: scores of each weight, or of this process's piece of it.
            relative: to the mean of each weight.
            parts: which piece that is; then every process calls this.
        """
        return unit_scores(self.groups, self.present, self.kept, by_weight, relative, parts)

    def masks(self, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Return a mask for each tensor of these shapes."""
        return masks_of(self.groups_now(), self.kept_now(), shapes)

    def taken_out(self) -> None:
        """Note that only what is kept is present. Runs after channels were removed."""
        self.present = {name: units.clone() for name, units in self.kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return both at one bit a unit."""
        return {name: [pack_mask(self.present[name]), pack_mask(self.kept[name])] for name in self.present}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what was saved.

        Raises:
            CheckpointMismatch: of other groups.
        """
        if state.keys() != self.present.keys():
            differing = sorted(state.keys() ^ self.present.keys())
            raise CheckpointMismatch(
                f"the checkpoint has channels of other groups than this model; first difference: '{differing[0]}'; "
                f"resume with the model and include/exclude that made it"
            )
        for name, (present, kept) in state.items():
            shape = self.present[name].shape
            self.present[name], self.kept[name] = unpack_mask(present.cpu(), shape), unpack_mask(kept.cpu(), shape)
