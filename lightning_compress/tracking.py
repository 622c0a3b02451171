"""What only Weights & Biases can show: the table of layers, the schedule's curve, the chart, the report.

The only file that knows wandb, which it imports inside its functions. All of it works on an offline run too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning_compress.measure.size import LayerRow

if TYPE_CHECKING:
    from wandb import Run

__all__ = [
    "log_artifact",
    "log_config",
    "log_image",
    "log_layer_table",
    "log_schedule_curve",
    "log_summary",
    "wandb_run",
]

# The x axis that Lightning's WandbLogger defines. Rows carry it as a value: `run.log(step=...)` would drop
# every row whose step is behind wandb's own counter.
_STEP = "trainer/global_step"


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


def log_config(run: Run, values: Mapping[str, object]) -> None:
    """Set options of the run, over those of an earlier fit in it."""
    run.config.update(dict(values), allow_val_change=True)  # type: ignore[no-untyped-call]


def log_layer_table(run: Run, rows: Sequence[LayerRow], step: int) -> None:
    """Log one row a layer as the table `compress/layers`, at optimizer step `step`."""
    import wandb

    table = wandb.Table(columns=[field.name for field in fields(LayerRow)])
    for row in rows:
        name, shape, *numbers = astuple(row)
        table.add_data(name, "x".join(map(str, shape)) or "scalar", *numbers)
    run.log({"compress/layers": table, _STEP: step})


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
