"""A space as people write it, an overlay with ranges in it; and a recipe as an overlay that a run takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning_compress.search.space import Range, Space

__all__ = ["filled", "space_of"]

Place = tuple[Any, ...]


def space_of(overlay: Mapping[str, Any]) -> Space:
    """Return what an overlay leaves open: values {low: ..., high: ...} (step, log) and {choices: [...]}; pure.

    An option of a callback is named by the callback's class, numbered where several have it; others by their path.

    Args:
        overlay: as read from YAML.

    Raises:
        ValueError: nothing is left open.

    >>> pruning = {"class_path": "my.GradualPruning", "init_args": {"sparsity": {"low": 0.5, "high": 0.9}}}
    >>> space_of({"trainer": {"callbacks+": [pruning]}})
    {'GradualPruning.sparsity': Range(low=0.5, high=0.9, step=None, log=False)}
    """
    space = {path: options for path, _, options in _open(overlay)}
    if not space:
        raise ValueError(
            "a space leaves options open, as in sparsity: {low: 0.5, high: 0.95} or weights: {choices: [8, 4]}; "
            "got an overlay without one"
        )
    return space


def filled(overlay: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overlay with a recipe's values where it left options open; pure.

    >>> filled({"model": {"rate": {"choices": [0.1, 0.2]}}}, {"model.rate": 0.2})
    {'model': {'rate': 0.2}}
    """
    places = {place: recipe[path] for path, place, _ in _open(overlay)}
    made = _replaced(overlay, (), places)
    return dict(made)


def _replaced(node: Any, place: Place, places: Mapping[Place, Any]) -> Any:
    if place in places:
        return places[place]
    if isinstance(node, Mapping):
        return {key: _replaced(value, (*place, key), places) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, (*place, index), places) for index, value in enumerate(node)]
    return node


def _open(overlay: Mapping[str, Any]) -> Iterator[tuple[str, Place, Range | list[Any]]]:
    """Yield (name, place, options) of each value that is left open."""
    found = [(_named(overlay, place), place, options) for place, options in _walk(overlay, ())]
    seen: dict[str, int] = {}
    owners: dict[tuple[str, Place], int] = {}
    for (owner, option), place, options in found:
        callback = _callback(place)
        if (owner, callback) not in owners:
            seen[owner] = owners[owner, callback] = seen.get(owner, 0) + 1
        number = owners[owner, callback]
        yield f"{owner}{f'#{number}' if owner and number > 1 else ''}{'.' if owner else ''}{option}", place, options


def _walk(node: Any, place: Place) -> Iterator[tuple[Place, Range | list[Any]]]:
    if isinstance(node, Mapping):
        if set(node) == {"choices"}:
            yield place, list(node["choices"])
        elif {"low", "high"} <= set(node) <= {"low", "high", "step", "log"}:
            yield place, Range(**node)
        else:
            for key, value in node.items():
                yield from _walk(value, (*place, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, (*place, index))


def _callback(place: Place) -> Place:
    """Return the place of the callback that a place lies in; () outside of callbacks."""
    numbers = [index for index, key in enumerate(place) if isinstance(key, int)]
    return place[: numbers[0] + 1] if numbers and place[:1] == ("trainer",) else ()


def _named(overlay: Any, place: Place) -> tuple[str, str]:
    callback = _callback(place)
    node = overlay
    for key in callback:
        node = node[key]
    inner = place[len(callback) :]
    if callback and isinstance(node, Mapping) and "class_path" in node:
        return str(node["class_path"]).rpartition(".")[2], ".".join(str(key) for key in inner if key != "init_args")
    return "", ".".join(str(key) for key in place if key != "init_args")
