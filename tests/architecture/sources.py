"""The source files of the package, read without importing them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lightning_compress"


@dataclass(frozen=True)
class Source:
    """One Python file: its path below the package, with slashes, and its text."""

    name: str
    text: str

    def __str__(self) -> str:
        return self.name

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.name)

    @property
    def package(self) -> list[str]:
        """Dotted parts of the package a relative import starts from."""
        return ["lightning_compress", *self.name.split("/")[:-1]]

    def imports(self) -> set[str]:
        """Dotted names of everything imported, at any depth, lazily or for types only."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parts = self.package[: len(self.package) - node.level + 1] if node.level else []
                prefix = ".".join([*parts, *([node.module] if node.module else [])])
                found |= {f"{prefix}.{alias.name}" for alias in node.names}
        return found

    def attributes(self) -> set[str]:
        """Dotted names used in the code, such as ``torch.distributed.all_reduce``."""
        return {ast.unparse(node) for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}


def package_sources() -> list[Source]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [Source(p.relative_to(PACKAGE).as_posix(), p.read_text(encoding="utf-8")) for p in paths]


def within(dotted: str, parent: str) -> bool:
    """Tells whether `dotted` is `parent` or something inside it."""
    return dotted == parent or dotted.startswith(f"{parent}.")
