"""The command line: the demo, and Lightning's own commands for people who have no training script of their own."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["COMMANDS", "main"]

PROGRAM = "python -m lightning_compress"
COMMANDS = {
    "demo": "prune, quantize and distil a small CNN on real images in one run, and print what it gained",
    "report": "compare two model files, dense and compressed: table, Markdown, JSON and an HTML page",
    "pack": "write a checkpoint's weights into one file near their entropy",
    "unpack": "write a packed file's weights as a checkpoint or safetensors file",
    "inspect": "say how each tensor of a packed file is kept, and in how many bytes",
    "fit": "train a LightningModule and LightningDataModule that YAML files name (LightningCLI)",
    "validate": "validate it",
    "test": "test it",
    "predict": "predict with it",
    "plan": "say what a fit with these files would prune, round and leave alone, and what would become of the sizes",
    "search": "find the recipe of the smallest file that keeps a metric, by trials of such a run",
}
USAGE_ERROR = 2


def main() -> int:
    """Run the command in `sys.argv`; return the exit status.

    The arguments are not a parameter, because Lightning starts the other processes of a run from `sys.argv`.
    """
    command, *arguments = sys.argv[1:] or [""]
    if command in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if command == "demo":
        from lightning_compress.demo import main as demo  # each command pays for its own imports only

        return demo(arguments)
    if command == "report":
        from lightning_compress.reporting import main as report

        return report(arguments)
    if command in ("pack", "unpack", "inspect"):
        from lightning_compress.packing_command import main as packing

        return packing(command, arguments)
    if command == "search":
        from lightning_compress.search_command import main as search

        return search(arguments)
    if command in COMMANDS:
        return _lightning_command()
    got = f"got {command!r}" if command else "got none"
    return _failed(f"expected a command, one of {', '.join(COMMANDS)}; {got}; --help says what they do")


def _failed(message: str) -> int:
    sys.stderr.write(f"{PROGRAM}: {message}\n")
    return USAGE_ERROR


def _help() -> str:
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND ...\n\n{commands}\n\n"
        f"  {PROGRAM} demo --help\n"
        f"  {PROGRAM} report dense.onnx compressed.onnx --out report\n"
        f"  {PROGRAM} fit -c yours.yaml -c configs/prune.yaml -c configs/qat_int8.yaml\n"
    )


def _lightning_command() -> int:
    missing = [name for name in ("jsonargparse", "docstring_parser") if importlib.util.find_spec(name) is None]
    if missing:
        return _failed(f"YAML files need {', '.join(missing)}; pip install 'lightning-compress[cli]'")
    from lightning.pytorch.cli import LightningCLI

    # Trials of a search may share a logger's folder, where LightningCLI refuses to write a second config.
    saving = {"overwrite": "LIGHTNING_COMPRESS_TRIAL" in os.environ}
    try:
        if sys.argv[1] == "plan":
            from lightning_compress.callbacks.plan_command import main as plan

            del sys.argv[1]
            return plan(PROGRAM)
        LightningCLI(parser_kwargs={"prog": PROGRAM}, save_config_kwargs=saving)
    except (ValueError, TypeError) as error:
        # jsonargparse buries what a constructor said under some sixty lines of its own.
        cause = _root(error)
        if not _raised_by_an_option(cause.__traceback__):
            raise
        return _failed(str(cause))
    return 0


def _root(error: BaseException) -> BaseException:
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _raised_by_an_option(traceback: TracebackType | None) -> bool:
    """Say whether an error comes from the constructor of one of our callbacks."""
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "__init__" and frame.f_globals["__name__"].startswith(
            "lightning_compress.callbacks"
        ):
            return True
        traceback = traceback.tb_next
    return False
