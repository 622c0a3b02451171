from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples import many_devices

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "lightning": ([], ["--processes", "2"]),
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_prune_round_and_teach_and_one_reads_the_file(tmp_path: Path, launcher: str) -> None:
    before, options = LAUNCHERS[launcher]
    script = [str(ROOT / "examples" / "many_devices.py"), *options, "--epochs", "1", "--output", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *before, *script], capture_output=True, text=True, check=False, timeout=300, env=environment,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "All distributed processes registered. Starting with 2 processes" in done.stderr
    said = dict(re.findall(r"^(sparsity|accuracy, .+): ([\d.]+)%$", done.stdout, re.MULTILINE))
    assert set(said) == {"sparsity", "accuracy, dense", "accuracy, zeros", "accuracy, zeros and int8"}
    assert done.stdout.count("sparsity") == 1
    assert said["sparsity"] == "90.0"
    assert float(said["accuracy, dense"]) > 50.0

    module = many_devices.Classifier.load_from_checkpoint(tmp_path / "compressed.ckpt")
    pruned = [layer.weight for layer in module.model.modules() if isinstance(layer, torch.nn.Linear)]
    total = sum(weight.numel() for weight in pruned)
    assert sum(int((weight == 0).sum()) for weight in pruned) == round(0.9 * total)
    assert all(type(parameter) is torch.nn.Parameter for parameter in module.parameters())


def test_without_a_mesh_the_module_is_a_plain_one() -> None:
    module = many_devices.Classifier(width=16, blocks=1)
    module.configure_model()
    assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert all(type(parameter) is torch.nn.Parameter for parameter in module.parameters())
