"""README and docs are run, and what they name exists."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
import yaml

import lightning_compress.callbacks
from lightning_compress.cli import COMMANDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.name != "sweep.yaml")  # tests/test_sweep.py
CALLBACKS = lightning_compress.callbacks.__all__
LANGUAGES = {"python", "yaml", "text"}


def blocks(document: Path, language: str) -> Iterator[tuple[int, str]]:
    """Yield the first line's number and the text of each block of a language."""
    text = document.read_text(encoding="utf-8")
    for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield text[: match.start(1)].count("\n"), match.group(1)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if list(blocks(d, "python"))], ids=name)
def test_python_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, in an empty folder; the traceback points into the document."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": document.stem}
    for line, text in blocks(document, "python"):
        exec(compile("\n" * line + text, str(document), "exec"), namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_every_block_says_its_language(document: Path) -> None:
    fences = re.findall(r"^```(.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("http") and not (document.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z]+)\b(?=[ `;]|$)", "\n".join(code(text)), re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)] == []
    assert set(re.findall(r"-m lightning_compress ([a-z]+)", text)) <= COMMANDS.keys()
    paths = re.findall(r"\b(?:configs|examples|benchmarks|docs)/\w+\.\w+", text)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def code(text: str) -> list[str]:
    """The parts of a document that are commands: indented lines and `inline code`."""
    return re.findall(r"^    (.+)$", text, re.MULTILINE) + re.findall(r"`([^`\n]+)`", text)


def overlays() -> list[tuple[str, str]]:
    written = [(name(path), path.read_text(encoding="utf-8")) for path in CONFIGS]
    return written + [(f"{name(d)}:{line}", text) for d in DOCUMENTS for line, text in blocks(d, "yaml")]


@pytest.mark.parametrize(("where", "text"), overlays(), ids=[where for where, _ in overlays()])
def test_yaml_names_callbacks_and_options_that_exist(where: str, text: str) -> None:
    parsed = yaml.safe_load(text)
    added = parsed["trainer"].get("callbacks+", [])
    assert "callbacks" not in parsed["trainer"], "an overlay of ours always appends"
    for callback in added:
        module, _, kind = callback["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module), kind)
        assert issubclass(cls, L.Callback)
        assert callback.get("init_args", {}).keys() <= inspect.signature(cls).parameters.keys()


@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_card_lists_every_option_with_its_default(callback: str) -> None:
    """Rows such as "| `sparsity` | `0.9` | ..." in the card that names the callback in its title."""
    (card,) = (d for d in DOCUMENTS if d.read_text(encoding="utf-8").startswith(f"# {callback}\n"))
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`|required) \|", card.read_text(encoding="utf-8"), re.MULTILINE))
    parameters = inspect.signature(getattr(lightning_compress, callback)).parameters.values()
    assert rows == {parameter.name: default(parameter) for parameter in parameters}


def default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return ""
    return getattr(parameter.default, "__name__", None) or repr(parameter.default)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_a_config_begins_with_what_it_is_and_its_command(config: Path) -> None:
    header = config.read_text(encoding="utf-8").partition("trainer:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"-c {name(config)}" in header


def test_the_readme_is_short_and_names_every_public_callback() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    assert [callback for callback in CALLBACKS if callback not in text] == []
    assert text.index("<!-- demo-table -->") < text.index("<!-- /demo-table -->")
