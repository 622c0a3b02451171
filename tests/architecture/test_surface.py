"""What users import: it is all there, documented, and costs no optional package."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator

import lightning.pytorch as pl
import pytest

import lightning_compress
from tests.architecture.sources import Source, package_sources

HOOKS = set(dir(pl.Callback))  # Lightning documents its own hooks
OPTIONAL = (
    "wandb",
    "transformers",
    "datasets",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "executorch",
    "matplotlib",
    "jsonargparse",
    "optuna",
    "constriction",
    "zstandard",
    "compressed_tensors",
)

# Lightning itself imports some optional packages when they are installed, so who imports counts.
PROBE = """
import builtins, sys
import lightning
real, seen, before = builtins.__import__, set(), set(sys.modules)
def spy(name, globals=None, *rest, **named):
    if (globals or {}).get("__name__", "").startswith("lightning_compress"):
        seen.add(name.partition(".")[0])
    return real(name, globals, *rest, **named)
builtins.__import__ = spy
import lightning_compress
print(*(seen | (set(sys.modules) - before)))
"""


@pytest.mark.parametrize("name", sorted(lightning_compress.__all__))
def test_every_public_name_imports_and_is_documented(name: str) -> None:
    value = getattr(lightning_compress, name)
    if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
        assert (value.__doc__ or "").strip()


def test_importing_the_package_imports_no_optional_package() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "lightning_compress" in imported
    assert imported.isdisjoint(OPTIONAL)


def undocumented(source: Source) -> list[str]:
    missing = [] if ast.get_docstring(source.tree) or not source.text.strip() else [f"{source}"]
    return missing + [f"{source}:{name}" for name, node in public(source.tree) if not ast.get_docstring(node)]


def public(
    tree: ast.Module | ast.ClassDef,
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") or (isinstance(tree, ast.ClassDef) and node.name in HOOKS):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public(node)


@pytest.mark.parametrize("source", package_sources(), ids=str)
def test_everything_public_has_a_docstring(source: Source) -> None:
    assert undocumented(source) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ('"""M."""\ndef f(): ...', ["x.py:f"]),
        ('"""M."""\nclass A:\n    """A."""\n    def b(self): ...', ["x.py:b"]),
        ("X = 1", ["x.py"]),
        ('"""M."""\nclass A:\n    """A."""\n    def on_fit_start(self): ...\n    def _c(self): ...', []),
    ],
)
def test_the_check_sees_what_is_missing(text: str, missing: list[str]) -> None:
    assert undocumented(Source("x.py", text)) == missing
