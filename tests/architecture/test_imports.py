"""Arrows point inward, and each foreign thing is known in one place."""

from __future__ import annotations

import pytest

from tests.architecture.sources import ROOT, Source, package_sources, within

OWNERS = {  # what may be imported only where: files, or folders with a slash at the end
    "lightning": ("callbacks/", "cli.py", "demo.py", "__main__.py"),
    "pytorch_lightning": (),
    "wandb": ("tracking.py",),
    "torch.distributed": ("sharding.py",),
}
INNER_RINGS = (
    "pruning/", "quantization/", "distillation/", "measure/", "export/", "search/",
    "schedule.py", "window.py", "select.py", "errors.py", "sharding.py",
)  # fmt: skip
OUTER_RING = ("callbacks", "cli", "demo", "tracking", "__main__")


def offences(source: Source) -> list[str]:
    used = source.imports() | {name for name in source.attributes() if name.startswith("torch.")}
    found = [
        f"{source} uses {name}; only {', '.join(owners) or 'nobody'} may"
        for foreign, owners in OWNERS.items()
        for name in sorted(used)
        if within(name, foreign) and not source.name.startswith(owners)
    ]
    if source.name.startswith(INNER_RINGS):
        outer = [f"lightning_compress.{name}" for name in OUTER_RING]
        found += [
            f"{source} imports {name}, which lies in an outer ring"
            for name in sorted(used)
            if any(within(name, room) for room in outer)
        ]
    return found


@pytest.mark.parametrize("source", package_sources(), ids=str)
def test_each_file_keeps_to_its_ring(source: Source) -> None:
    assert offences(source) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pruning/masks.py", "import lightning as L"),
        ("measure/size.py", "def f():\n    from lightning.pytorch import Trainer"),
        ("callbacks/clock.py", "import pytorch_lightning"),
        ("callbacks/monitor.py", "import wandb"),
        ("callbacks/pruning.py", "from torch import distributed"),
        ("callbacks/pruning.py", "import torch\ntorch.distributed.barrier()"),
        ("pruning/masks.py", "from ..callbacks.clock import Clock"),
        ("pruning/masks.py", "from lightning_compress import callbacks"),
        ("select.py", "from .callbacks import clock"),
    ],
)
def test_the_check_sees_an_offence(name: str, text: str) -> None:
    assert offences(Source(name, text)) != []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("callbacks/clock.py", "import lightning as L\nfrom lightning_compress.pruning import masks"),
        ("tracking.py", "def f():\n    import wandb"),
        ("sharding.py", "import torch.distributed as dist"),
        (
            "pruning/masks.py",
            "from lightning_compress.errors import CompressError\nimport wandb_x",
        ),
    ],
)
def test_the_check_lets_the_owner_pass(name: str, text: str) -> None:
    assert offences(Source(name, text)) == []


def test_nothing_reads_beside_the_repository() -> None:
    beside = "../" + "shared"  # in two parts, or this file would be found
    folders = ("lightning_compress", "configs", "docs", "examples", "benchmarks", "tests", "tools")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*")] + list(ROOT.glob("*.*"))
    text = [p for p in paths if p.is_file() and p.suffix in {".py", ".md", ".yaml", ".toml", ".txt"}]
    assert [p.name for p in text if beside in p.read_text(encoding="utf-8")] == []
