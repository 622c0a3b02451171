"""Histograms that training gathers while ranges are observed, until a rule makes the ranges of them.

Each forward counts into its own process's `counts`; after each optimizer step they are summed over processes, so that
every process holds, and every checkpoint has, the same totals. A recomputation under activation checkpointing counts
again what it sees again: all counts of a layer double, and its shares, which are all that a rule reads, stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_compress.quantization.histograms import BINS
from lightning_compress.quantization.ranges import RangeRule, Seen, range_by, reads_counts
from lightning_compress.sharding import all_reduce_sum

__all__ = ["Gathered", "Gathering"]


class Gathering(Protocol):
    """What a layer's input or a module's output keeps while a rule waits for it to be observed."""

    extremes: Tensor
    counts: Tensor | None
    settled: bool

    @property
    def bits(self) -> int:
        """Width of its code."""
        ...

    @property
    def observed(self) -> bool:
        """Whether it has a range."""
        ...


class Gathered:
    """What a rule will read, by name: nothing without a rule, and no more of a name once its range is made.

    Args:
        rule: makes the ranges; None leaves them to the moving average.
    """

    def __init__(self, rule: RangeRule | None) -> None:
        self.rule = rule
        self.counted = rule is not None and reads_counts(rule)
        self.clear()

    def clear(self) -> None:
        """Forget all; for a fresh run with the same object."""
        self.totals: dict[str, Tensor] = {}
        self.settled: set[str] = set()

    def start(self, name: str, state: Gathering, counting: bool = True) -> None:
        """Let a state count from now on, unless its range is made already. Runs when it is attached."""
        state.settled = name in self.settled
        counts = self.counted and counting and not state.settled
        state.counts = torch.zeros(BINS, dtype=torch.int64, device=state.extremes.device) if counts else None

    @torch.no_grad()
    def fold(self, states: Mapping[str, Gathering]) -> None:
        """Add what the step counted on all processes. Runs once after each optimizer step, on every process.

        As for extremes, a step that held NaN or infinity is left out.
        """
        counting = {name: state.counts for name, state in states.items() if state.counts is not None}
        if not counting:
            return
        rows = all_reduce_sum(torch.stack(list(counting.values())))
        rows = torch.where(rows[:, -1:] > 0, 0, rows)
        seen = dict(zip(counting, rows.unbind(), strict=True))
        self.totals = {n: row + self.totals[n].to(row.device) if n in self.totals else row for n, row in seen.items()}
        for counts in counting.values():
            counts.zero_()

    def settle(self, states: Mapping[str, Gathering]) -> None:
        """Make the ranges of what was gathered; they stay from now on. Runs when rounding begins.

        An input that has the range of the output that it reads counts nothing, and keeps that.

        Raises:
            CompressError: as `range_by`.
        """
        for name, state in states.items():
            ready = state.observed and not state.settled and (state.counts is not None or not self.counted)
            if self.rule is not None and ready:
                seen = Seen([torch.stack([-state.extremes[0], state.extremes[1]])])
                seen.counts = self.totals.pop(name, seen.counts)
                low, high = range_by(self.rule, name, seen, state.bits)
                state.extremes.copy_(torch.tensor([-low, high]))
                state.counts, state.settled = None, True
                self.settled.add(name)

    def state_dict(self) -> dict[str, Any]:
        """Return totals, and whose range is made; the same on every process."""
        return {"totals": {n: total.cpu() for n, total in self.totals.items()}, "settled": sorted(self.settled)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what a checkpoint kept; `start` then lets its states count on."""
        self.totals, self.settled = dict(state["totals"]), set(state["settled"])
