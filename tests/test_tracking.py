"""What reaches W&B, read back from the offline run on disk."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from lightning_compress import tracking
from lightning_compress.measure import Measurement, compare, per_layer, plot_pruning_curve
from tests.wandb_offline import read_run

wandb = pytest.importorskip("wandb")
HISTORY = [(2, 0.1, 0.05), (4, 0.4, 0.4), (6, 0.9, 0.9)]


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """Lets wandb write below a temporary folder only, and to no network."""
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in {
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
            "WANDB_DATA_DIR": str(folder / "data"),
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_CONFIG_DIR": str(folder / "config"),
        }.items():
            patch.setenv(variable, value)
        yield folder


def sparse_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1:] = 0.0
    return model


@pytest.fixture(scope="module")
def logged(offline):
    """One finished run that went through every function, between metrics that Lightning's logger wrote."""
    from lightning.pytorch.loggers import CSVLogger, WandbLogger

    folder = offline / "all"
    folder.mkdir()
    logger = WandbLogger(project="tests", save_dir=folder, offline=True)
    run = tracking.wandb_run([CSVLogger(folder / "csv"), logger])
    logger.log_metrics({"compress/sparsity": 0.4}, step=4)
    tracking.log_layer_table(run, per_layer(sparse_model()), step=4)
    tracking.log_layer_table(run, per_layer(sparse_model(), ["1.bias"], bits={"1.bias": 8}), 2, {"1.bias": 30.5})
    tracking.log_schedule_curve(run, HISTORY)
    chart = plot_pruning_curve(HISTORY, folder / "curve.png")
    tracking.log_image(run, "compress/chart", chart, step=6)
    report = compare(Measurement("a"), Measurement("b"))
    tracking.log_artifact(run, "report", "report", [*report.save(folder).values(), chart])
    logger.log_metrics({"compress/sparsity": 0.9}, step=6)
    tracking.log_summary(run, {"compress/size_bytes": 1234, "compress/machine": "x86_64", "compress/sparsity": 0.5})
    run.finish()
    return read_run(folder), chart


def table(run, value):
    content = json.loads(run.media(value).read_text())
    return content["columns"], content["data"]


def test_no_row_is_lost_and_each_has_its_step(logged):
    run, _ = logged
    assert run.exit_code == 0
    assert run.column("compress/sparsity") == [0.4, 0.9]
    assert run.column("trainer/global_step") == [4, 4, 2, 6, 6, 6]


def test_the_table_of_layers(logged):
    run, _ = logged
    first, second = (table(run, value) for value in run.column("compress/layers"))
    assert first[0] == ["name", "shape", "total", "nonzero", "sparsity", "bits", "sqnr_db"]
    assert first[1][0] == ["0.weight", "3x4", 12, 4, pytest.approx(2 / 3), 32, None]
    assert [row[0] for row in first[1]] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert second[1] == [["1.bias", "2", 2, 2, 0.0, 8, 30.5]]


def test_the_curve_of_the_schedule(logged):
    run, _ = logged
    columns, data = table(run, run.column("compress/schedule_table")[0])
    lines = {name: [(row[0], row[2]) for row in data if row[1] == name] for name in ("target", "actual")}
    assert columns == ["step", "lineKey", "lineVal"]
    assert lines["target"] == [(step, target) for step, target, _ in HISTORY]
    assert lines["actual"] == [(step, actual) for step, _, actual in HISTORY]
    assert run.config["_wandb"]["visualize"]["compress/schedule"]["panel_config"]["panelDefId"] == "wandb/lineseries/v0"


def test_the_chart(logged):
    run, chart = logged
    (value,) = run.column("compress/chart")
    assert value["format"] == "png"
    assert run.media(value).read_bytes() == chart.read_bytes()


def test_the_report_as_an_artifact(logged):
    run, _ = logged
    assert run.artifacts["report"] == ("report", {"report.md", "report.json", "report.html", "curve.png"})


def test_the_summary_has_the_last_word(logged):
    run, _ = logged
    assert run.summary["compress/size_bytes"] == 1234
    assert run.summary["compress/machine"] == "x86_64"
    assert run.summary["compress/sparsity"] == 0.5


def test_a_plain_run_and_a_run_of_many_blocks(offline):
    """Two thousand rows cross the 32 KiB blocks of the file; none is torn."""
    folder = offline / "long"
    folder.mkdir()
    with wandb.init(project="tests", dir=folder, mode="offline") as run:
        assert tracking.wandb_run([object(), None, run]) is run
        for step in range(2000):
            run.log({"value": step * 0.5, "trainer/global_step": step})
    assert read_run(folder).column("value") == [step * 0.5 for step in range(2000)]


def test_no_run_among_other_loggers(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    assert tracking.wandb_run([]) is None
    assert tracking.wandb_run([CSVLogger(tmp_path), object()]) is None


def test_without_wandb_there_is_no_run(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    assert tracking.wandb_run([object()]) is None
    assert "wandb" not in sys.modules


def test_an_empty_curve_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        tracking.log_schedule_curve(None, [])


def test_a_run_that_never_finished_is_told_apart(tmp_path):
    (tmp_path / "run-x.wandb").write_bytes(b":W&B" + b"\0" * 3)
    with pytest.raises(TimeoutError, match="no exit record"):
        read_run(tmp_path, timeout_s=0.2)
