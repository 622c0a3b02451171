"""The command on a real LightningCLI run: trials in processes of their own, the winner as an overlay, run again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_compress.cli import main
from lightning_compress.search.command_trial import CommandTrial, TrialFailed
from tests import wandb_offline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    config = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False,
        },
        "model": {"class_path": "tests.user_project.Net"},
        "data": {"class_path": "tests.user_project.Data"},
    }  # fmt: skip
    (tmp_path / "user.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    pruning = {"class_path": "lightning_compress.GradualPruning", "init_args": {"sparsity": {"low": 0.5, "high": 0.9}}}
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [pruning]}}), encoding="utf-8")
    return tmp_path


def searched(monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    command = ["lightning_compress", "search", "-c", "user.yaml", "--space", "space.yaml", "--mode", "min", *more]
    monkeypatch.setattr(sys, "argv", command)
    return main()


def group_of(log: Path) -> str:
    """Return the group of an offline W&B run."""
    records = (wandb_offline.protocol.Record.FromString(e) for e in wandb_offline._entries(log.read_bytes()))
    return next(record.run.run_group for record in records if record.WhichOneof("record_type") == "run")


@pytest.mark.slow
def test_the_winner_is_an_overlay_that_gives_the_same_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((folder / "user.yaml").read_text(encoding="utf-8"))
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"offline": True, "project": "p"}}
    config["trainer"]["logger"] = logger
    (folder / "user.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    options = ["--metric", "val_loss", "--dense", "0.9", "--drop", "1", "--trials", "2", "--workers", "2"]
    assert searched(monkeypatch, *options) == 0
    said = capsys.readouterr().out
    assert "its overlay: best.yaml" in said
    assert (folder / "best.png").exists()
    text = (folder / "best.yaml").read_text(encoding="utf-8")
    assert "python -m lightning_compress fit -c user.yaml -c best.yaml" in text
    trials = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("search-trials/*/result.json")]
    best = min(trials, key=lambda result: result["size_bytes"])
    assert f"val_loss {best['val_loss']:.6g}" in text

    assert [group_of(log) for log in (folder / "wandb").rglob("run-*.wandb")] == ["search-search"] * 2

    again = CommandTrial(("-c", "user.yaml"), None, folder / "again", "val_loss", "group")
    reports = []
    result = again.run(yaml.safe_load(text), lambda step, value: reports.append((step, value)), "best")
    assert result == best
    assert [step for step, _ in reports] == [8, 16]
    assert reports[-1][1] == result["val_loss"]

    # Another objective is another study; a finished one runs nothing.
    assert searched(monkeypatch, *options[:4], "--drop", "2", "--trials", "2") == 1
    assert "is another one" in capsys.readouterr().err
    monkeypatch.setattr(CommandTrial, "run", None)
    assert searched(monkeypatch, *options) == 0


def test_a_trial_that_fails_tells_the_end_of_its_output(folder: Path) -> None:
    (folder / "train.py").write_text("print('about to fail')\nraise OSError('no data here')\n", encoding="utf-8")
    trial = CommandTrial((), "train.py", folder / "trials", "val_loss", "group")
    with pytest.raises(TrialFailed, match=r"ended with status 1 .*about to fail .*no data here"):
        trial.run({}, lambda step, value: None)


def test_a_script_of_the_users_gets_the_overlays_the_group_and_is_stopped_with_its_trial(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SERVICE", "of a run in this process")  # where a trial's files must not go
    script = (
        "import json, os, sys, time\n"
        "watch = json.load(open(sys.argv[-1]))['trainer']['callbacks+'][0]['init_args']\n"
        "told = [os.environ.get(name) for name in ('WANDB_RUN_GROUP', 'WANDB_NAME', 'WANDB_SERVICE')]\n"
        "seen = [sys.argv[1:], *told, os.getpid()]\n"
        "json.dump(seen, open('seen.json', 'w'))\n"
        "open(watch['folder'] + '/progress.jsonl', 'w').write(json.dumps({'step': 3, 'value': 0.25}) + '\\n')\n"
        "time.sleep(600)\n"
    )
    (folder / "train.py").write_text(script, encoding="utf-8")
    trial = CommandTrial(("-c", "user.yaml"), "train.py", folder / "trials", "val_loss", "group")

    def stop(step: int, value: float) -> None:
        raise InterruptedError((step, value))

    with pytest.raises(InterruptedError, match=r"\(3, 0.25\)"):
        trial.run({"trainer": {"max_epochs": 1}}, stop)
    arguments, group, name, service, pid = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
    assert arguments[:4] == ["fit", "-c", "user.yaml", "-c"]
    assert json.loads(Path(arguments[4]).read_text(encoding="utf-8")) == {"trainer": {"max_epochs": 1}}
    assert group == "group"
    assert service is None
    assert name.startswith("trial-")
    assert not Path(f"/proc/{pid}").exists()


def test_a_space_without_ranges_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "space.yaml").write_text("trainer: {max_epochs: 1}\n", encoding="utf-8")
    assert searched(monkeypatch, "--metric", "val_loss", "--dense", "1") == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "a space leaves options open" in said
