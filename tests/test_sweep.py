"""configs/sweep.yaml: what W&B's agent makes of it, and that this command trains."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_compress import GradualPruning, QuantizationAwareTraining, cli
from tests.wandb_offline import read_run

pytest.importorskip("wandb")
from wandb.apis.public import sweeps
from wandb.sdk.launch.sweeps import utils

ROOT = Path(__file__).parents[1]
SWEEP = yaml.safe_load((ROOT / "configs" / "sweep.yaml").read_text(encoding="utf-8"))
ENDS = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 1, "log_every_n_steps": 1}


def agents_command(values: dict[str, Any]) -> list[str]:
    """As `wandb agent` builds it: macros of the list replaced by what W&B's own functions make of the values."""
    made = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    made |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [SWEEP["program"]]}
    parts = (made[c[2:-1]] if c.startswith("${") else [c] for c in utils.create_sweep_command(list(SWEEP["command"])))
    return list(itertools.chain.from_iterable(parts))


def test_wandb_takes_the_parameters_as_they_are() -> None:
    """W&B checks bounds on its own machines; here are the rules that its documentation gives."""
    filled = sweeps._validate_config_and_fill_distribution(SWEEP)
    assert filled["method"] in ("grid", "random", "bayes")
    assert filled["metric"]["goal"] in ("maximize", "minimize")
    known = {"values", "value", "min", "max", "distribution"}
    for name, parameter in filled["parameters"].items():
        assert parameter.keys() <= known, name
        assert parameter.get("values") or 0 < parameter["min"] < parameter["max"], name


def test_the_agents_first_command_trains_and_logs_its_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {n: p["values"][-1] if "values" in p else p["max"] for n, p in SWEEP["parameters"].items()}
    command = agents_command(values)
    assert command[:5] == ["/usr/bin/env", "python", "-m", "lightning_compress", "fit"]
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(ROOT)
    ends = [f"--trainer.{name}={value}" for name, value in ENDS.items()]
    places = [f"--trainer.logger.save_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path}"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    # Four steps hold no window, so pruning begins at the first; all else is the agent's.
    monkeypatch.setattr(sys, "argv", [*command[3:], *ends, *places, *quiet, "--trainer.callbacks.window=[0.0, 0.5]"])
    assert cli.main() == 0
    import wandb

    wandb.finish()
    run = read_run(tmp_path)
    assert run.column(SWEEP["metric"]["name"])
    pruning = run.config[f"compress/{GradualPruning.__name__}"]
    assert pruning["schedule"] == "Cubic(final=0.95, initial=0.0)"
    assert pruning["frequency"] == values["trainer.callbacks.frequency"]
    assert run.config["learning_rate"] == values["model.init_args.learning_rate"]
    assert f"compress/{QuantizationAwareTraining.__name__}" in run.config
    assert run.summary["compress/size_bytes"] > 0
