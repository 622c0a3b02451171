"""What the monitor has seen of a run, kept in checkpoints so that a resumed run has the whole of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_compress.callbacks.looking import Look
from lightning_compress.measure.layer_states import LayerState

__all__ = ["Notes"]

_COLUMNS = ("step", "layer", "sparsity", "bits", "sqnr_db")


@dataclass
class Notes:
    """Rows of all looks, and what was seen when.

    Args:
        rows: one a weight and look.
        trade_off: (step, metric, sparsity over all parameters, estimated bytes) of each validation.
        seen: how many mask updates there had been at the last look, and whether compression was complete.
        pictured: the step of the last histograms.
    """

    rows: list[LayerState] = field(default_factory=list)
    trade_off: list[tuple[int, float, float, int]] = field(default_factory=list)
    seen: tuple[int, bool] = (0, False)
    pictured: int = -1

    @property
    def last(self) -> int | None:
        """The step of the last look."""
        return self.rows[-1].step if self.rows else None

    def add(self, look: Look) -> list[LayerState]:
        """Keep the rows of a look, over those of an earlier one at its step: one fit ends where the next begins."""
        if self.last == look.step:
            self.rows = [row for row in self.rows if row.step != look.step]
        states = look.states()
        self.rows += states
        return states

    def state_dict(self) -> dict[str, Any]:
        """Return everything as primitives, rows by column."""
        columns = {name: [getattr(row, name) for row in self.rows] for name in _COLUMNS}
        trade_off = [list(row) for row in self.trade_off]
        return {"rows": columns, "trade_off": trade_off, "seen": list(self.seen), "pictured": self.pictured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        columns: Mapping[str, Sequence[Any]] = state["rows"]
        self.rows = [LayerState(*row) for row in zip(*(columns[name] for name in _COLUMNS), strict=True)]
        self.trade_off = [(int(s), float(m), float(z), int(b)) for s, m, z, b in state["trade_off"]]
        self.seen = int(state["seen"][0]), bool(state["seen"][1])
        self.pictured = int(state["pictured"])
