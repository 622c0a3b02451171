"""`python -m lightning_compress plan -c ...`: the plan of a run that YAML files describe, without the run."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import LightningCLI

from lightning_compress.callbacks.clock import ENDLESS, run_length
from lightning_compress.callbacks.planning import plan
from lightning_compress.callbacks.probe import first_student_call
from lightning_compress.errors import CompressError
from lightning_compress.planning.example import ExampleCall
from lightning_compress.planning.table import Plan

__all__ = ["main"]

USAGE_ERROR = 2


class _PlanMadeError(Exception):
    """The plan is there; nothing of the run is to happen."""


class _Planning(L.Callback):
    """Makes the plan at `setup`, where module, data and run length are known, and ends the run there."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: Plan | None = None
        self.error: Exception | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        length = run_length(trainer, ())
        steps = None if length == ENDLESS else length
        callbacks = [each for each in trainer.callbacks if each is not self]  # type: ignore[attr-defined]
        try:
            self.plan = plan(pl_module, callbacks, _example(trainer, pl_module), steps=steps)
        except (CompressError, ValueError) as error:
            self.error = error
        raise _PlanMadeError


def _example(trainer: L.Trainer, pl_module: L.LightningModule) -> ExampleCall | None:
    if pl_module.example_input_array is not None:
        return None
    found = first_student_call(trainer, pl_module, None)
    return None if found is None else ExampleCall(found[1].name, found[1].args, found[1].kwargs)


class _PlannedCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument("--out", type=str, default="", help="a folder for plan.md and plan.json")
        parser.add_argument("--every_layer", type=bool, default=False, help="a row for each layer, however many")


def main(program: str) -> int:
    """Read the files, build module, data and callbacks, print the plan; return the exit status.

    The arguments are those of `fit`, and `--out FOLDER`, `--every_layer true`. Nothing is trained and no logger is
    started: the Trainer is left at its `setup`, once the run's length is known and two examples have been read.
    """
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    cli = _PlannedCLI(
        run=False, parser_kwargs={"prog": f"{program} plan"}, trainer_defaults=quiet, save_config_callback=None
    )
    planning = _Planning()
    cli.trainer.callbacks.insert(0, planning)  # type: ignore[attr-defined]
    cli.trainer.loggers = []
    with suppress(_PlanMadeError):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if planning.plan is None:
        sys.stderr.write(f"{program} plan: {planning.error}\n")
        return USAGE_ERROR
    sys.stdout.write(planning.plan.text(every_layer=cli.config["every_layer"]) + "\n")
    for path in planning.plan.save(cli.config["out"]).values() if cli.config["out"] else ():
        sys.stdout.write(f"wrote {path}\n")
    return 0
