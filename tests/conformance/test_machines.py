"""torch.compile, precisions, and the kinds of Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_compress.pruning.shrink import describe_shapes, restore_shapes
from tests.conformance.cases import Row, promise
from tests.conformance.modules import Small
from tests.conformance.running import Do, build, identity, train

STILL = {"dropout": 0.0, "norm": False}


class Counting:
    """A compiler that runs the graph as it is and counts how often it was asked."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        return graph.forward


def wrapped(module: Small, backend: Any) -> None:
    module.model = torch.compile(module.model, backend=backend)


def in_place(module: Small, backend: Any) -> None:
    module.model.compile(backend=backend)


@pytest.fixture
def fresh_compiler() -> Any:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", [wrapped, in_place], ids=lambda function: function.__name__)
@promise("torch.compile")
def test_a_compiled_model_trains_the_same(row: Row, compiled: Any, fresh_compiler: None, tmp_path: Path) -> None:
    eager = build(Small, **STILL)
    expected = train(eager, row.make(eager), tmp_path)
    callbacks = row.make(eager)

    def compiled_run(with_callbacks: bool) -> tuple[Any, int]:
        torch.compiler.reset()
        backend = Counting()
        module = build(Small, **STILL)
        compiled(module, backend)
        run = train(module, callbacks if with_callbacks else [], tmp_path)
        return run, backend.graphs

    _, plain_graphs = compiled_run(with_callbacks=False)
    run, graphs = compiled_run(with_callbacks=True)
    assert plain_graphs > 0
    assert dict(torch._dynamo.utils.counters["graph_break"]) == {}
    assert graphs <= plain_graphs * row.phases
    row.acted(run)
    torch.testing.assert_close(run.weights, expected.weights, rtol=0, atol=1e-5)


@promise("torch.compile")
def test_a_compiled_model_may_be_fitted_twice(row: Row, fresh_compiler: None, tmp_path: Path) -> None:
    """Dynamo does not guard on hooks: code compiled in the first fit must not serve the second one, nor a plain one."""
    eager, module = build(Small, **STILL), build(Small, **STILL)
    start, shapes = build(Small, **STILL).state_dict(), describe_shapes(build(Small, **STILL))
    in_place(module, "eager")
    for make in (row.make, row.make, None):
        expected, again = [], []
        for target, runs in ((eager, expected), (module, again)):
            restore_shapes(target, shapes)  # the fit before may have removed channels
            target.load_state_dict(start)
            runs.append(train(target, make(eager) if make else [], tmp_path))
        if make:
            row.acted(again[0])
        torch.testing.assert_close(again[0].weights, expected[0].weights, rtol=0, atol=1e-5)


@promise("torch.compile")
def test_aot_autograd_trains_the_same(row: Row, fresh_compiler: None, tmp_path: Path) -> None:
    eager, traced = build(Small, **STILL), build(Small, **STILL)
    expected = train(eager, row.make(eager), tmp_path)
    in_place(traced, "aot_eager")
    run = train(traced, row.make(traced), tmp_path)
    row.acted(run)
    torch.testing.assert_close(run.weights, expected.weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@promise("precisions")
def test_acts_in_every_precision(row: Row, precision: str, tmp_path: Path) -> None:
    module = build(Small)
    run = train(module, row.make(module), tmp_path, watched=True, precision=precision)
    row.acted(run)
    dtype = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert all(torch.isfinite(value).all() for value in run.weights.values() if value.is_floating_point())
    assert identity(module) == identity(build(Small))


# Loggers and Trainers


@promise("logs")
def test_names_reach_a_csv_logger(row: Row, tmp_path: Path) -> None:
    module = build(Small)
    logger = CSVLogger(tmp_path, name="", version="")
    run = train(module, row.make(module), tmp_path, logger=logger, log_every_n_steps=1)
    logger.save()
    row.acted(run)
    header = set((tmp_path / "metrics.csv").read_text().splitlines()[0].split(","))
    names = {name.removesuffix("_step") for name in header}
    assert row.logs <= names
    assert {name for name in names if "/" in name and not name.startswith("compress/")} == set()


@promise("logs")
def test_nothing_is_needed_to_log_to(row: Row, tmp_path: Path) -> None:
    module = build(Small)
    row.acted(train(module, row.make(module), tmp_path, logger=False))


@pytest.mark.filterwarnings("ignore:.*barebones")
@pytest.mark.parametrize(
    "options",
    [
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"overfit_batches": 1, "max_epochs": 16},
        {"limit_train_batches": 2, "limit_val_batches": 0, "max_epochs": 8},
        {"max_epochs": -1, "max_steps": 16},
        {"num_sanity_val_steps": 0, "val_check_interval": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"detect_anomaly": True},
        {"inference_mode": False},
    ],
    ids=lambda options: next(iter(options)),
)
@promise("any kind of Trainer")
def test_runs_under_any_kind_of_trainer(row: Row, options: dict[str, Any], tmp_path: Path) -> None:
    module = build(Small, shuffle="overfit_batches" not in options)
    quick = "fast_dev_run" in options
    run = train(module, row.default(module) if quick else row.make(module), tmp_path, **options)
    if not quick:
        row.acted(run)


@promise("any kind of Trainer")
def test_runs_barebones(row: Row, tmp_path: Path) -> None:
    class Silent(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    module = build(Silent)
    options = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    train(module, row.make(module), tmp_path, barebones=True, **options)


class Checkpointed(Small):
    """Recomputes its network's activations in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)


@promise("acts on any module")
def test_activation_checkpointing_changes_nothing(row: Row, tmp_path: Path) -> None:
    import torch.utils.checkpoint

    one, other = build(Checkpointed, **STILL), build(Small, **STILL)
    recomputed = train(one, row.make(other), tmp_path)
    stored = train(other, row.make(other), tmp_path)
    row.acted(recomputed)
    # To rounding: what is gathered from forwards is summed up twice.
    torch.testing.assert_close(recomputed.weights, stored.weights, rtol=0, atol=1e-5)
    assert isinstance(one.model, nn.Sequential)


@promise("any kind of Trainer")
def test_a_trainer_may_stop_and_validate_between(row: Row, tmp_path: Path) -> None:
    """`trainer.validate` after a fit, then one more fit, leaves nothing behind that stops the second."""
    module = build(Small)
    run = train(module, row.make(module), tmp_path, extra=[Do(lambda *_: None)])
    run.trainer.validate(module, verbose=False)
    run.trainer.fit_loop.max_epochs = 5
    run.trainer.fit(module)
    row.acted(run)
