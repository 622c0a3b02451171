"""`python -m lightning_compress plan`: from the files of a run to its plan, and nothing of the run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_compress.cli import main

ROOT = Path(__file__).parents[2]
RUN = ("-c", str(ROOT / "examples/images.yaml"))
PRUNE, QAT = ("-c", str(ROOT / "configs/prune.yaml")), ("-c", str(ROOT / "configs/qat_int8.yaml"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lightning_compress", "plan", *arguments])
    return main()


def test_it_prints_the_plan_and_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *RUN, *PRUNE, *QAT, "--out", "plan", "--trainer.max_epochs", "4") == 0
    printed = capsys.readouterr().out
    assert "body.5  Linear   73,728" in printed
    assert "MACs of the example" in printed  # of two examples, that the step was tried with
    assert "of 252 steps" in " ".join(printed.split())
    assert "output head" in printed
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["plan.json", "plan.md"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (RUN, "expected callbacks of this package that are enabled"),
        ((*RUN, *PRUNE, "--trainer.callbacks.exclude", "[bodi]"), "exclude pattern 'bodi' matches no module"),
        ((*RUN, *PRUNE, "--trainer.callbacks.sparsity", "1.5"), "sparsity"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 2
    assert says in capsys.readouterr().err
