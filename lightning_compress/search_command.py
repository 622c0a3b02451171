"""`python -m lightning_compress search`: trials of a LightningCLI run, and the winner as an overlay."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_compress.errors import CompressError
from lightning_compress.search import strategies
from lightning_compress.search.command_trial import RESULT, CommandTrial
from lightning_compress.search.early import Median
from lightning_compress.search.objective import Smallest, checked_result
from lightning_compress.search.overlay import filled, space_of
from lightning_compress.search.searching import Report, Worker, search

if TYPE_CHECKING:
    from lightning_compress.search.found import Found

__all__ = ["main"]

PROGRAM = "python -m lightning_compress search"
STRATEGIES = ("random", "annealing", "evolution", "bayes")
FAILED, USAGE_ERROR = 1, 2


def main(arguments: list[str]) -> int:
    """Search as the arguments say; what is not known here goes to `fit`. Return the exit status."""
    options, of_fit = _parser().parse_known_args(arguments)
    missing = [name for name in ("optuna", "yaml", "jsonargparse") if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"{PROGRAM}: a search needs {', '.join(missing)}; pip install 'lightning-compress[search,cli]'\n"
        )
        return USAGE_ERROR
    logging.basicConfig(format="%(message)s")
    try:
        found = _searched(options, of_fit)
        sys.stdout.write(found.table() + "\n")
        _written(found, options, of_fit)
    except (CompressError, ValueError, OSError) as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--space", required=True, type=Path, help="an overlay with ranges in it: configs/search.yaml")
    parser.add_argument("--metric", required=True, help="that the module logs in validation and that is to be kept")
    parser.add_argument("--mode", choices=("max", "min"), default="max", help="which way the metric is better")
    parser.add_argument("--drop", type=float, default=0.01, help="how much of it may be lost, in its own units")
    parser.add_argument("--dense", type=float, help="its value without compression; without this, one run measures it")
    parser.add_argument("--size", default="size_bytes", metavar="METRIC", help="what gets small; default: bytes")
    parser.add_argument("--trials", type=int, default=20, help="of all workers and all earlier calls together")
    parser.add_argument("--storage", type=Path, default=Path("search.db"), help="to go on from; .db is SQLite")
    parser.add_argument("--out", type=Path, default=Path("best.yaml"), help="the winner, as an overlay")
    parser.add_argument("--strategy", choices=STRATEGIES, default="bayes")
    parser.add_argument("--seed", type=int, default=0, help="of the strategy's choices")
    parser.add_argument("--workers", type=int, default=1, help="trials at a time")
    parser.add_argument("--prune-early", action="store_true", help="stop trials below the median of the others")
    parser.add_argument("--script", help="your own LightningCLI script, instead of -m lightning_compress")
    parser.add_argument("--folder", type=Path, help="for the trials; default: beside the storage")
    return parser


def _searched(options: argparse.Namespace, of_fit: Sequence[str]) -> Found:
    overlay = _read(options.space)
    folder = options.folder or options.storage.with_suffix("").with_name(f"{options.storage.stem}-trials")
    trial = CommandTrial(tuple(of_fit), options.script, folder, options.metric, f"search-{options.storage.stem}")
    about = _about(of_fit, options.script)
    sign = 1.0 if options.mode == "max" else -1.0
    kept = options.metric if options.mode == "max" else f"-{options.metric}"
    dense = options.dense if options.dense is not None else _dense(trial, options, about)
    objective = Smallest(options.size, kept, options.drop, sign * dense)

    def run(recipe: Mapping[str, Any], report: Report) -> dict[str, float]:
        found = trial.run(filled(overlay, recipe), lambda step, value: report(step, sign * value))
        return found | ({kept: -found[options.metric]} if options.mode == "min" and options.metric in found else {})

    def one(index: int) -> Found:
        early = Median() if options.prune_early else None
        worker = Worker(options.seed, index, prune_early=early, catch=(CompressError,))
        strategy = getattr(strategies, options.strategy)
        return search(run, space_of(overlay), objective, strategy, options.trials, options.storage, worker, about)

    if options.workers == 1:  # in this thread, which gets the interrupt of a Ctrl-C
        return one(0)
    with ThreadPoolExecutor(options.workers) as pool:
        return list(pool.map(one, range(options.workers)))[-1]


def _read(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped, unused-ignore]

    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(read, dict):
        raise ValueError(  # noqa: TRY004 - what is wrong is what the file holds
            f"a space is an overlay with ranges in it, as configs/search.yaml; got {read!r} in '{path}'"
        )
    return read


def _dense(trial: CommandTrial, options: argparse.Namespace, about: Mapping[str, Any]) -> float:
    """Return the metric of a run without compression; it is run once for the same command and files."""
    name = f"dense-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}"
    known = trial.folder / name / RESULT
    if known.exists():
        result = json.loads(known.read_text(encoding="utf-8"))
    else:
        result = trial.run({}, lambda step, value: None, name)
    checked = checked_result(Smallest("size_bytes", options.metric), result)
    return checked[options.metric]


def _about(of_fit: Sequence[str], script: str | None) -> dict[str, Any]:
    """Return what makes trials comparable: the command, and what is in the files that it names."""
    files = {part: Path(part) for argument in [*of_fit, script or ""] for part in [argument.rpartition("=")[2]]}
    digests = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for name, path in files.items()
        if name and path.is_file()
    }
    return {"arguments": list(of_fit), "script": script, "files": digests}


def _written(found: Found, options: argparse.Namespace, of_fit: Sequence[str]) -> None:
    import yaml

    best = found.best
    given = ", ".join(
        f"{metric} {value:.6g}" for metric, value in sorted((best.result or {}).items()) if not metric.startswith("-")
    )
    program = f"python {options.script}" if options.script else "python -m lightning_compress"
    header = (
        f"# Found by {PROGRAM}: trial {best.number} of {len(found.trials)}, strategy {options.strategy}, seed "
        f"{options.seed}.\n#\n#   {program} fit {' '.join(of_fit)} -c {options.out}\n#\n# It gave: {given}\n"
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    overlay = filled(_read(options.space), best.recipe)
    options.out.write_text(header + yaml.safe_dump(overlay, sort_keys=False), encoding="utf-8")
    said = [f"best: trial {best.number}, {given}", f"its overlay: {options.out}"]
    if importlib.util.find_spec("matplotlib") is not None:
        said.append(f"front: {found.plot(options.out.with_suffix('.png'))}")
    sys.stdout.write("\n".join(said) + "\n")
