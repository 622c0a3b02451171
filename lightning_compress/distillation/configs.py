"""What a model with fewer blocks must know: how many there are, what each was, and at which place each is."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lightning_compress.sharding import clean_name

__all__ = ["check_rebuilds", "correct_configs", "renumber"]

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "num_encoder_layers")
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
PLACES = ("layer_idx", "layer_id", "layer_index")  # what blocks call their own place

Facts = dict[tuple[str, str], Any]


def renumber(blocks: Sequence[nn.Module], kept: Sequence[int]) -> None:
    """Tell the kept blocks, and all inside them, their new places.

    >>> blocks = [nn.ReLU(), nn.ReLU()]
    >>> blocks[1].layer_idx = 1
    >>> renumber(blocks, [1])
    >>> blocks[1].layer_idx
    0
    """
    for place, old in enumerate(kept):
        for layer in blocks[old].modules():
            for name in PLACES:
                if vars(layer).get(name) == old:
                    setattr(layer, name, place)


def correct_configs(model: nn.Module, container: str, count: int, kept: Sequence[int]) -> None:
    """Correct the counts of blocks, and lists of one entry a block, that the container's parents and configs hold.

    Args:
        model: with the kept blocks only.
        container: the clean name of the list that holds them.
        count: of blocks before.
        kept: their places.
    """
    for inside, holder in _holders(model, container):
        shared = "decoder" in inside and any(hasattr(holder, name) for name in DECODER_COUNTS)
        names = (DECODER_COUNTS if "decoder" in container.split(".") else ()) + (() if shared else COUNTS)
        for name in names:
            if getattr(holder, name, None) == count:
                setattr(holder, name, len(kept))
        for name, value in list(vars(holder).items()):
            if type(value) in (list, tuple) and len(value) == count and ("layer" in name or "block" in name):
                setattr(holder, name, type(value)(value[place] for place in kept))


def _holders(model: nn.Module, container: str) -> Iterator[tuple[list[str], Any]]:
    """Return the container's parents and their transformers configs, each with the container's name from there."""
    named = {clean_name(name): layer for name, layer in model.named_modules()}
    parts = container.split(".") if container else []
    seen: set[int] = set()
    for depth in range(len(parts)):
        parent = named[".".join(parts[:depth])]
        for holder in (parent, getattr(parent, "config", None)):
            known = holder is parent or hasattr(holder, "to_dict")
            if known and id(holder) not in seen:  # a config that several share is the outermost one's
                seen.add(id(holder))
                yield parts[depth:], holder


def check_rebuilds(model: nn.Module, container: str, before: Sequence[nn.Module]) -> None:
    """Refuse a transformers model whose config does not build these blocks: it would not load what it has saved.

    Builds it on the meta device, and compares what differed among the teacher's blocks: only that depends on places.

    Raises:
        ValueError: it builds others.
    """
    named = {clean_name(name): layer for name, layer in model.named_modules()}
    parts = container.split(".")
    prefixes = [".".join(parts[:depth]) for depth in range(len(parts))]
    outermost = next((prefix for prefix in prefixes if _is_pretrained(named[prefix])), None)
    if outermost is None:
        return
    owner: Any = named[outermost]
    trouble = _difference(owner, container[len(outermost) :].removeprefix("."), before)
    if trouble:
        raise ValueError(
            f"these layers of {type(owner).__name__} cannot be kept: what from_pretrained builds from the student's "
            f"config would not be the student: {trouble}; keep other layers, such as the first one too"
        )


def _is_pretrained(module: nn.Module) -> bool:
    if "transformers" not in sys.modules:  # then it is none of its models
        return False
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _difference(owner: Any, container: str, before: Sequence[nn.Module]) -> str:
    """Say how the blocks that the config builds differ; "" if they do not."""
    try:
        with torch.device("meta"):
            rebuilt = type(owner)(type(owner.config).from_dict(owner.config.to_dict()))
    except ValueError as error:
        return f"the config is refused, {error}"
    wanted, found = (list(model.get_submodule(container).children()) for model in (owner, rebuilt))
    if len(found) != len(wanted):
        return f"'{container}' has {len(found)} blocks, and {len(wanted)} in the student"
    teacher = [_facts(block) for block in before]
    keys = sorted({key for facts in teacher for key in facts})
    depending = [key for key in keys if any(facts.get(key) != teacher[0].get(key) for facts in teacher)]
    for place, (block, other) in enumerate(zip(wanted, found, strict=True)):
        mine, its = _facts(block), _facts(other)
        for key in depending:
            if mine.get(key) != its.get(key):
                name = ".".join(part for part in key if part)
                values = [facts.get(key, "nothing") for facts in (its, mine)]
                return f"'{name}' of block {place} is {values[0]}, and {values[1]} in the student"
    return ""


def _facts(block: nn.Module) -> Facts:
    """Return the shapes of a block's tensors and the simple attributes of all inside it, without modes."""
    facts: Facts = {("", name): tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    for name, layer in block.named_modules():
        simple = {key: value for key, value in vars(layer).items() if type(value) in (int, float, bool, str)}
        facts |= {(name, key): value for key, value in simple.items() if key != "training" and key[0] != "_"}
    return facts
