"""The overlays that set a strategy: what they ask for, and that they combine with those that add callbacks."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_compress import Distillation, GradualPruning, QuantizationAwareTraining
from tests.distributed.strategies import OnCPU

ROOT = Path(__file__).parents[1]
OVERLAYS = [str(ROOT / "configs" / f"{name}.yaml") for name in ("prune", "qat_int8", "distill")]
OURS = [GradualPruning, QuantizationAwareTraining, Distillation]
STRATEGIES = ("ddp", "fsdp", "fsdp2", "deepspeed")


def config(name: str) -> Path:
    return ROOT / "configs" / f"{name}.yaml"


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The user's own config, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    own = {
        "seed_everything": 1,
        "trainer": {"accelerator": "cpu", "logger": False, "enable_model_summary": False},
        "model": {"class_path": "examples.many_devices.Classifier"},
    }
    (tmp_path / "user.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    return "user.yaml"


def cli_for(monkeypatch: pytest.MonkeyPatch, *configs: str, options: tuple[str, ...] = ()) -> LightningCLI:
    monkeypatch.setattr(sys, "argv", ["train.py", *(part for path in configs for part in ("-c", path)), *options])
    return LightningCLI(save_config_callback=None, run=False)


@pytest.mark.parametrize("first", [True, False], ids=["before the callbacks", "after them"])
def test_ddp_combines_with_all_callbacks(users: str, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    ddp = str(config("ddp"))
    configs = [ddp, *OVERLAYS] if first else [*OVERLAYS, ddp]
    trainer = cli_for(monkeypatch, users, *configs, options=("--trainer.devices=2",)).trainer
    assert type(trainer.strategy) is DDPStrategy
    assert trainer.num_devices == 2
    assert [type(callback) for callback in trainer.callbacks if isinstance(callback, tuple(OURS))] == OURS


def test_fsdp2_combines_with_all_callbacks(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = cli_for(monkeypatch, users, *OVERLAYS, str(config("fsdp2"))).trainer
    assert type(trainer.strategy) is ModelParallelStrategy
    assert trainer.num_devices == trainer.strategy._data_parallel_size == 8
    assert trainer.strategy._tensor_parallel_size == 1
    assert trainer.strategy._save_distributed_checkpoint is False
    assert [type(callback) for callback in trainer.callbacks if isinstance(callback, tuple(OURS))] == OURS


def test_fsdp2_on_two_processes_is_two_options(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    two = ("--trainer.devices=2", "--trainer.strategy.init_args.data_parallel_size=2")
    trainer = cli_for(monkeypatch, users, str(config("fsdp2")), options=two).trainer
    assert trainer.num_devices == trainer.strategy._data_parallel_size == 2


def test_fsdp_is_built_and_refused_by_lightning_on_a_cpu(users: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="strategy `fsdp` requires a GPU accelerator"):
        cli_for(monkeypatch, users, *OVERLAYS, str(config("fsdp")), options=("--trainer.devices=2",))


@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "with the policy of its comment"])
def test_fsdp_on_a_cpu_by_the_subclass_of_the_tests(users: str, monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    text = config("fsdp").read_text(encoding="utf-8")
    text = text.replace("lightning.pytorch.strategies.FSDPStrategy", f"{OnCPU.__module__}.OnCPU")
    text = text.replace("# auto_wrap_policy:", "auto_wrap_policy:") if wrapped else text
    Path("cpu.yaml").write_text(text, encoding="utf-8")
    trainer = cli_for(monkeypatch, users, *OVERLAYS, "cpu.yaml", options=("--trainer.devices=2",)).trainer
    assert type(trainer.strategy) is OnCPU
    assert trainer.strategy._state_dict_type == "full"
    assert trainer.strategy.kwargs["use_orig_params"]
    assert ("auto_wrap_policy" in trainer.strategy.kwargs) == wrapped
    assert [type(callback) for callback in trainer.callbacks if isinstance(callback, tuple(OURS))] == OURS


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_overlay_sets_the_strategy_and_the_devices_only(name: str) -> None:
    parsed = yaml.safe_load(config(name).read_text(encoding="utf-8"))
    assert parsed.keys() == {"trainer"}
    assert parsed["trainer"].keys() == {"strategy", "devices"}


def test_deepspeed_is_built_and_refused_by_lightning_where_it_is_missing(
    users: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("DeepSpeed is installed: tests/distributed/test_deepspeed.py runs it")
    with pytest.raises(ValueError, match="you must have DeepSpeed installed"):
        cli_for(monkeypatch, users, *OVERLAYS, str(config("deepspeed")), options=("--trainer.devices=2",))
