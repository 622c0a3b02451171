"""Every criterion with every pattern in a real fit, schedules in turn; the table in the docs is this one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import GradualPruning, schedule
from lightning_compress.pruning import criteria, patterns, regrowth, scopes
from lightning_compress.pruning.criteria import magnitude
from lightning_compress.pruning.patterns import NM, Blocks, Columns, Heads, Kernels, Layers, Rows, Unstructured
from lightning_compress.pruning.regrowth import SET, RigL
from lightning_compress.pruning.statistics import ACTIVATIONS, GRADIENTS
from lightning_compress.pruning.targets import asks_for
from lightning_compress.schedule import (
    Alternating,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    OneCycle,
    Steps,
)
from tests.conformance.modules import Small
from tests.conformance.running import Do, build, differing, train
from tests.pruning.groups_by_loops import groups_of, units_of

TABLE = Path(__file__).parents[2] / "docs" / "pruning_table.md"
KNOWN = GRADIENTS | ACTIVATIONS | {"weight", "name", "step"}
CRITERIA = [getattr(criteria, name) for name in criteria.__all__]
SCOPES = [scopes.globally, scopes.uniform, scopes.erk, scopes.lamp, scopes.by_output]
PATTERNS = [
    *(Unstructured(scope) for scope in SCOPES),
    NM(2, 4),
    NM(1, 4),
    Blocks(2, 2),
    Rows(),
    Columns(),
    Kernels(),
    Heads(2),
    Layers(),
    RigL(),
    SET(),
]
SCHEDULES = [
    Constant,
    Linear,
    Cubic,
    Cosine,
    Exponential,
    OneCycle,
    lambda final: Steps(((0.0, final / 2), (0.5, final))),
    lambda final: Alternating(final, cycles=1),
]
BEGIN, END, STEPS = 1, 7, 8


class Tiny(L.LightningModule):
    """A convolution, a grouped transposed one and a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        convolutions = (nn.Conv2d(4, 8, 2), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, groups=2), nn.ReLU())
        self.net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(72, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@dataclass(frozen=True)
class Watched:
    """A pattern that notes what it was given at its last call."""

    pattern: Any
    last: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["pattern"], name)

    def __call__(self, targets: Any, sparsity: float, progress: float) -> Any:
        self.last.update({t.name: (t.layer, t.scores().clone().double().numpy()) for t in targets})
        return self.pattern(targets, sparsity, progress)


@pytest.fixture(scope="module")
def data() -> DataLoader[Any]:
    source = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(16, 4, 3, 3, generator=source), torch.randint(0, 3, (16,), generator=source)
    return DataLoader(TensorDataset(inputs, labels), batch_size=4)


def fit(data: DataLoader[Any], callback: L.Callback) -> Tiny:
    torch.manual_seed(0)
    module = Tiny()
    trainer = L.Trainer(
        max_steps=STEPS, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return module


def final_sparsity(pattern: Any) -> float:
    return 1 - pattern.keep / pattern.of if isinstance(pattern, NM) else 0.6


def described(pattern: Any) -> str:
    scope = getattr(pattern, "scope", None)
    return (
        f"{type(pattern).__name__} {scope.__name__}"
        if isinstance(pattern, Unstructured)
        else re.sub(r",? ?scope=<[^>]*>", "", repr(pattern))
    )


def schedules_of(pattern: Any) -> list[Any]:
    """All of them; what grows as much as it drops has one sparsity."""
    final = final_sparsity(pattern)
    return [Constant(final)] if hasattr(pattern, "growth") else [make(final) for make in SCHEDULES]


def competitors(pattern: Any, layer: nn.Module, shape: tuple[int, ...]) -> np.ndarray | None:
    """For each weight the group within which it competes, where that is not all layers together."""
    scope = getattr(pattern, "scope", None)
    if isinstance(pattern, NM):
        group = np.empty(shape, dtype=int)
        for number, places in enumerate(groups_of(layer, group, pattern.of)):
            for place in places:
                group[place] = number
        return group
    if scope in (scopes.uniform, scopes.erk):
        return np.zeros(shape, dtype=int)
    return units_of(Rows(), layer, shape) if scope is scopes.by_output else None


def check_survivors(pattern: Any, watched: Watched, masks: dict[str, np.ndarray]) -> None:
    """Within each group of competitors nothing that went scored higher than what stayed."""
    kept: list[float] = []
    dropped: list[float] = []
    for name, (layer, scores) in watched.last.items():
        groups = competitors(pattern, layer, scores.shape)
        if groups is None:
            values = scores
            if not isinstance(pattern, Unstructured):
                units = units_of(pattern, layer, scores.shape)
                _, place = np.unique(units, return_inverse=True)
                values = (np.bincount(place.ravel(), scores.ravel()) / np.bincount(place.ravel()))[place].reshape(
                    scores.shape
                )
            kept += values[masks[name]].tolist()
            dropped += values[~masks[name]].tolist()
            continue
        for group in np.unique(groups):
            inside, mask = scores[groups == group], masks[name][groups == group]
            assert not mask.any() or mask.all() or inside[~mask].max() <= inside[mask].min()
    if kept and dropped:
        assert max(dropped) <= min(kept) + 1e-6 * abs(min(kept))


def check_shape(pattern: Any, watched: Watched, masks: dict[str, np.ndarray], sparsity: float) -> None:
    """The zeros are of the pattern, and as many as were asked for."""
    asked = round(sparsity * sum(mask.size for mask in masks.values()))
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    whole = isinstance(pattern, (Blocks, Rows, Columns, Kernels, Heads, Layers))
    kept_sizes, every_size = [], []
    for name, (layer, _) in watched.last.items():
        mask = masks[name]
        if isinstance(pattern, NM):
            assert all(sum(mask[p] for p in group) == pattern.keep for group in groups_of(layer, mask, pattern.of))
        units = units_of(pattern, layer, mask.shape) if whole else np.arange(mask.size).reshape(mask.shape)
        for unit in np.unique(units) if whole else ():
            inside = mask[units == unit]
            assert inside.all() or not inside.any()
            every_size.append(inside.size)
            kept_sizes += [inside.size] if inside.any() else []
    if len(set(every_size)) > 1:
        assert 0 <= asked - zeros < min(kept_sizes)
    else:
        assert abs(zeros - asked) <= (every_size[0] / 2 if every_size else 0)


def chosen(criterion: int, pattern: int) -> list[Any]:
    """Schedules for one criterion and pattern: in turn, so that any two of the three meet; all of them on request."""
    known = schedules_of(PATTERNS[pattern])
    return known if WHOLE else [known[(criterion + pattern) % len(known)]]


WHOLE = os.environ.get("LIGHTNING_COMPRESS_WHOLE_MATRIX") == "1"  # seven times as many
CELLS = [
    pytest.param(
        criterion, pattern, sparsity, id=f"{criterion.__name__}-{described(pattern)}-{type(sparsity).__name__}"
    )
    for i, criterion in enumerate(CRITERIA)
    for j, pattern in enumerate(PATTERNS)
    for sparsity in chosen(i, j)
]


def test_any_two_of_criterion_pattern_and_schedule_meet() -> None:
    met = [(c, described(p), type(s)) for c, p, s in (cell.values for cell in CELLS)]
    growing = {described(pattern) for pattern in PATTERNS if hasattr(pattern, "growth")}
    patterns_of_schedules = {(pattern, kind) for _, pattern, kind in met if pattern not in growing}
    assert len({(criterion, pattern) for criterion, pattern, _ in met}) == len(CRITERIA) * len(PATTERNS)
    assert len({(criterion, kind) for criterion, _, kind in met}) == len(CRITERIA) * len(SCHEDULES)
    assert len(patterns_of_schedules) == (len(PATTERNS) - len(growing)) * len(SCHEDULES)


@pytest.mark.parametrize(("criterion", "pattern", "sparsity"), CELLS)
def test_a_criterion_a_pattern_and_a_schedule_in_a_fit(
    criterion: Any, pattern: Any, sparsity: Any, data: DataLoader[Any]
) -> None:
    watched = Watched(pattern)
    callback = GradualPruning(sparsity, window=(BEGIN, END), frequency=2, criterion=criterion, pattern=watched)
    module = fit(data, callback)
    masks = {name: mask.numpy() for name, mask in callback.masks.items()}
    assert list(masks) == ["net.0.weight", "net.2.weight", "net.5.weight"]
    assert [step for step, _, _ in callback.history] == [1, 3, 5, 7]
    check_shape(pattern, watched, masks, final_sparsity(pattern))
    for name, mask in masks.items():
        assert not module.get_parameter(name).detach().numpy()[~mask].any()
    # LAMP has its own scores (test_scopes); RigL and SET compare nothing at the window's end (test_regrowth), and
    # where units differ in size a small one may go in place of a lower one that no longer fits.
    unequal = isinstance(pattern, (Rows, Columns, Kernels, Heads, Layers))
    if getattr(pattern, "scope", None) is not scopes.lamp and not hasattr(pattern, "growth") and not unequal:
        check_survivors(pattern, watched, masks)


# Resuming

STATEFUL = [c for c in CRITERIA if asks_for(c, KNOWN) & (GRADIENTS | ACTIVATIONS)]
RESUMED = [(c, Unstructured()) for c in STATEFUL] + [
    (magnitude, RigL()),
    (magnitude, SET()),
    (criteria.movement, NM(2, 4)),
]


@pytest.mark.parametrize(
    ("criterion", "pattern"), RESUMED, ids=lambda item: getattr(item, "__name__", None) or described(item)
)
def test_a_run_resumed_between_two_updates_is_the_uninterrupted_one(
    criterion: Any, pattern: Any, tmp_path: Path
) -> None:
    def callback() -> GradualPruning:
        excluded = ["model.0"] if isinstance(pattern, NM) else None  # it has one input
        return GradualPruning(0.5, window=(2, 14), frequency=6, criterion=criterion, pattern=pattern, exclude=excluded)

    def save(trainer: L.Trainer, module: L.LightningModule, batches: int) -> None:
        if batches == 6:
            trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = train(build(Small, dropout=0.0), [callback()], tmp_path, extra=[Do(save)])
    resumed = train(build(Small, dropout=0.0), [callback()], tmp_path, ckpt_path=tmp_path / "middle.ckpt")
    assert differing(resumed.weights, whole.weights) == []
    one, other = (run.of(GradualPruning) for run in (resumed, whole))
    assert one.history == other.history
    assert len(one.history) == 3
    assert differing(one.masks, other.masks) == []
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)["callbacks"][one.state_key]["gathered"]
    between = [*saved["sums"]["gradients"].values(), *saved["sums"]["activity"].values()] if saved else []
    assert any(between) or isinstance(pattern, SET), "the checkpoint lies between updates; SET alone gathers nothing"
    assert flat(one) == flat(other)


def flat(callback: GradualPruning) -> dict[str, bytes]:
    """Gathered gradients, to the bit."""
    sums = callback.gathering.statistics.sums
    return {f"{kind} {name}": total.numpy().tobytes() for kind, one in sums.items() for name, total in one.items()}


# The table in the docs


def rows_of(heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading of the docs' page, by their first cell."""
    section = TABLE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {cells[0].strip().strip("`"): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_docs_list_every_criterion_and_what_it_needs() -> None:
    assert set(rows_of("What a criterion may ask for")) == KNOWN
    rows = rows_of("Criteria")
    assert list(rows) == [criterion.__name__ for criterion in CRITERIA]
    for criterion in CRITERIA:
        needs = ", ".join(f"`{name}`" for name in sorted(asks_for(criterion, KNOWN)))
        assert rows[criterion.__name__][0] == needs


def test_the_docs_list_every_pattern_scope_and_schedule() -> None:
    exported = {*patterns.__all__, *regrowth.__all__} - {"MaskPattern", "fresh_random", "regrow"}
    assert {type(pattern).__name__ for pattern in PATTERNS} == set(rows_of("Patterns")) == exported
    assert {scope.__name__ for scope in SCOPES} == set(rows_of("Scopes"))
    assert {scope.__name__ for scope in SCOPES} == {n for n in scopes.__all__ if n[0].islower()} - {"erk_densities"}
    made = {type(make(0.5)).__name__ for make in SCHEDULES}
    assert made == set(rows_of("Schedules"))
    assert made == {n for n in schedule.__all__ if isinstance(getattr(schedule, n), type) and n != "Moment"}
