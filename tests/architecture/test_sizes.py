"""A file fits on a few screens, a function on one."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.architecture.sources import PACKAGE, Source, package_sources

FILE_LINES = 300
FUNCTION_LINES = 60
CONSTRUCTOR_ARGUMENTS = 8
FORBIDDEN = {"utils", "util", "helpers", "helper", "common", "base", "manager", "core", "misc"}


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)


def offences(source: Source) -> list[str]:
    length = len(source.text.splitlines())
    found = [f"{source} has {length} lines, at most {FILE_LINES}"] if length > FILE_LINES else []
    for node in functions(source):
        if lines(node) > FUNCTION_LINES:
            found.append(f"{source}:{node.name} has {lines(node)} lines, at most {FUNCTION_LINES}")
        if node.name == "__init__" and arguments(node) - 1 > CONSTRUCTOR_ARGUMENTS:
            found.append(f"{source}:{node.lineno} takes {arguments(node) - 1} arguments besides self")
    return found


@pytest.mark.parametrize("source", package_sources(), ids=str)
def test_sizes_hold(source: Source) -> None:
    assert offences(source) == []


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n" * (FILE_LINES + 1),
        "def f():\n" + "    x = 1\n" * FUNCTION_LINES,
        "class A:\n    def __init__(self, a, b, c, d, e, f, g, *, h, i): ...",
    ],
    ids=["file", "function", "constructor"],
)
def test_the_check_sees_an_offence(text: str) -> None:
    assert len(offences(Source("x.py", text))) == 1


def test_names_say_what_is_inside() -> None:
    names = {p.relative_to(PACKAGE).as_posix(): p.stem for p in PACKAGE.rglob("*")}
    assert [path for path, stem in names.items() if stem in FORBIDDEN] == []
