"""What only Weights & Biases can show: tables of layers, histograms, curves, charts, trade-offs, artifacts.

The only file that knows wandb, which it imports inside its functions. All of it works on an offline run too.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning_compress.measure.layer_states import LayerState
from lightning_compress.measure.size import LayerRow

if TYPE_CHECKING:
    from wandb import Run

__all__ = [
    "define_axis",
    "log_artifact",
    "log_config",
    "log_histograms",
    "log_image",
    "log_layer_history",
    "log_layer_table",
    "log_outcome",
    "log_schedule_curve",
    "log_summary",
    "log_trade_off",
    "wandb_run",
]

# The x axis that Lightning's WandbLogger defines. Rows carry it as a value: `run.log(step=...)` would drop
# every row whose step is behind wandb's own counter.
_STEP = "trainer/global_step"
_MOST_ROWS = 10_000  # of a table; wandb cuts what is longer
_with_axis: weakref.WeakSet[object] = weakref.WeakSet()


def wandb_run(loggers: Iterable[object]) -> Run | None:
    """The first W&B run among a Trainer's loggers or plain runs; None without one, as on a worker rank.

    Asking a logger for its experiment starts it, so ask once the fit has begun.
    """
    for logger in loggers:
        experiment = getattr(logger, "experiment", logger)
        wandb_run_module = sys.modules.get("wandb.sdk.wandb_run")  # without it no run can exist
        if wandb_run_module is not None and isinstance(experiment, wandb_run_module.Run):
            return cast("Run", experiment)
    return None


def define_axis(run: Run) -> None:
    """Draw `compress/*` over the Trainer's step, whatever the run's own steps are. Runs once a run and process."""
    if run not in _with_axis:
        _with_axis.add(run)
        run.define_metric(_STEP)
        run.define_metric("compress/*", step_metric=_STEP)


def log_config(run: Run, values: Mapping[str, object]) -> None:
    """Set options of the run, over those of an earlier fit in it."""
    run.config.update(dict(values), allow_val_change=True)  # type: ignore[no-untyped-call]


def log_layer_table(
    run: Run, rows: Sequence[LayerRow], step: int, sqnr_db: Mapping[str, float | None] | None = None
) -> None:
    """Log one row a layer as the table `compress/layers`, at optimizer step `step`.

    Args:
        run: The run of `wandb_run`.
        rows: Of the layers.
        step: The optimizer step.
        sqnr_db: By name, of the layers that are rounded.
    """
    import wandb

    table = wandb.Table(columns=[*(field.name for field in fields(LayerRow)), "sqnr_db"])
    for row in rows:
        name, shape, *numbers = astuple(row)
        table.add_data(name, "x".join(map(str, shape)) or "scalar", *numbers, (sqnr_db or {}).get(name))
    run.log({"compress/layers": table, _STEP: step})


def log_layer_history(run: Run, rows: Sequence[LayerState], step: int) -> None:
    """Log all moments' rows as the one table `compress/layers_over_time`, for panels of layers by steps.

    A table holds 10 000 rows: of longer histories, moments are left out evenly, the last one never.
    """
    import wandb

    steps = sorted({row.step for row in rows}, reverse=True)
    kept = set(steps[:: max(1, math.ceil(len(rows) / _MOST_ROWS))])
    table = wandb.Table(columns=[field.name for field in fields(LayerState)])
    for row in rows:
        if row.step in kept:
            table.add_data(*astuple(row))
    run.log({"compress/layers_over_time": table, _STEP: step})


def log_histograms(run: Run, histograms: Mapping[str, tuple[Sequence[int], Sequence[float]]], step: int) -> None:
    """Log counts and edges of each layer's values as `compress/weights/<layer>`; no weight itself is copied."""
    import wandb

    made = {f"compress/weights/{n}": wandb.Histogram(np_histogram=pair) for n, pair in histograms.items()}  # type: ignore[arg-type]
    run.log({**made, _STEP: step})


def log_trade_off(run: Run, metric: str, rows: Sequence[tuple[int, float, float, int]], step: int) -> None:
    """Log what the metric was at which size during this run, as the scatter plot `compress/trade_off`.

    Args:
        run: The run of `wandb_run`.
        metric: Its name.
        rows: (optimizer step, metric, sparsity, estimated bytes) of each validation.
        step: The optimizer step.
    """
    import wandb

    table = wandb.Table(columns=["step", metric, "sparsity", "stored_bytes"], data=[list(row) for row in rows])
    title = f"{metric} against estimated bytes, each validation"
    run.log({"compress/trade_off": wandb.plot.scatter(table, "stored_bytes", metric, title=title), _STEP: step})


def log_outcome(run: Run, values: Mapping[str, float | None], step: int) -> None:
    """Log where this run ended as the table `compress/outcome` of one row, which a chart over runs puts together."""
    import wandb

    table = wandb.Table(columns=["run", *values], data=[[run.id, *values.values()]])
    run.log({"compress/outcome": table, _STEP: step})


def log_schedule_curve(run: Run, history: Sequence[tuple[int, float, float]]) -> None:
    """Log target and actual sparsity by step as the line chart `compress/schedule`.

    Args:
        run: The run of `wandb_run`.
        history: (optimizer step, target sparsity, actual sparsity), in order.

    Raises:
        ValueError: `history` is empty.
    """
    import wandb

    if not history:
        raise ValueError("a schedule curve needs at least one (step, target, actual), got none")
    steps, targets, actuals = (list(column) for column in zip(*history, strict=True))
    chart = wandb.plot.line_series(
        xs=steps,
        ys=[targets, actuals],
        keys=["target", "actual"],
        title="Sparsity by optimizer step",
        xname="optimizer step",
    )
    run.log({"compress/schedule": chart, _STEP: steps[-1]})


def log_image(run: Run, key: str, path: str | Path, step: int) -> None:
    """Log the picture at `path` under `key`, at optimizer step `step`."""
    import wandb

    run.log({key: wandb.Image(str(path)), _STEP: step})


def log_artifact(run: Run, name: str, kind: str, files: Iterable[str | Path]) -> None:
    """Keep files with the run as an artifact of type `kind` ("report", "model"), each under its own name.

    Raises:
        ValueError: A path that is no file, or a `name` of more than letters, digits and `._-`.
    """
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    for file in map(Path, files):
        artifact.add_file(str(file), name=file.name)
    run.log_artifact(artifact)


def log_summary(run: Run, values: Mapping[str, float | str | None]) -> None:
    """Set final values of the run, those that its table of runs shows, over whatever was logged last."""
    run.summary.update(dict(values))
