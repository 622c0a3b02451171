"""The numbers that layers remember about their parameters' shapes: set right after a change, written down, restored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.errors import CheckpointMismatch
from lightning_compress.sharding import clean_name

__all__ = ["describe_shapes", "fit_attributes", "owners", "restore_shapes", "set_tensor"]

# Attributes of user's modules that count heads, or their channels; scaled with the heads that stay.
PER_HEAD = (
    "num_heads", "n_heads", "n_head", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "heads", "nhead",
    "all_head_size", "split_size", "embed_dim", "inner_dim",
)  # fmt: skip
OF_LAYERS = (
    "in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "num_channels",
    "num_groups", "normalized_shape", "embedding_dim", "num_parameters", "nf", "nx",
)  # fmt: skip


def owners(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Return, for each parameter and buffer by clean name, the layers and attributes that hold it; ties share a list.

    >>> {name: len(places) for name, places in owners(nn.Linear(2, 1)).items()}
    {'weight': 1, 'bias': 1}
    """
    by_identity: dict[int, list[tuple[nn.Module, str]]] = {}
    named: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, layer in module.named_modules():
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            places = by_identity.setdefault(id(tensor), [])
            if (layer, name) not in places:
                places.append((layer, name))
            named[clean_name(f"{prefix}.{name}".removeprefix("."))] = places
    return named


def set_tensor(places: list[tuple[nn.Module, str]], data: Tensor) -> Tensor:
    """Put new data where a parameter or buffer is; returns the new tensor, which all the places share."""
    layer, name = places[0]
    old = getattr(layer, name)
    new = nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data
    for layer, name in places:
        setattr(layer, name, new)
    return new


def fit_attributes(layer: nn.Module, groups: int | None = None) -> None:
    """Set a layer's attributes to its parameters' shapes; `groups` is the new number of a convolution or group norm."""
    tensors = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
    weight = next((tensors[name] for name in ("weight", "running_mean") if name in tensors), None)
    if weight is None:
        return
    shape = tuple(weight.shape)
    for name, value in _attributes(layer, shape, groups).items():
        if hasattr(layer, name):
            setattr(layer, name, value)


def _attributes(layer: nn.Module, shape: tuple[int, ...], groups: int | None) -> dict[str, Any]:
    count = groups if groups is not None else getattr(layer, "groups", 1)
    match layer:
        case nn.Linear():
            return {"out_features": shape[0], "in_features": shape[1]}
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            return {"in_channels": shape[0], "out_channels": shape[1] * count, "groups": count}
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            return {"out_channels": shape[0], "in_channels": shape[1] * count, "groups": count}
        case nn.GroupNorm():
            return {"num_channels": shape[0], "num_groups": groups or layer.num_groups}
        case nn.LayerNorm() | nn.RMSNorm():
            return {"normalized_shape": shape}
        case nn.Embedding() | nn.EmbeddingBag():
            return {"embedding_dim": shape[1]}
        case nn.PReLU():
            return {"num_parameters": shape[0]}
    if hasattr(layer, "nf") and len(shape) == 2:  # transformers' Conv1D, a linear layer of inputs x outputs
        return {"nx": shape[0], "nf": shape[1]}
    return {"num_features": shape[0]}


def describe_shapes(module: nn.Module) -> dict[str, Any]:
    """Write down shapes of parameters and buffers and the attributes that follow them, as primitives. Runs on saving.

    >>> describe_shapes(nn.Linear(2, 1))["tensors"]
    {'weight': [1, 2], 'bias': [1]}
    """
    attributes: dict[str, dict[str, Any]] = {}
    for name, layer in module.named_modules():
        found = {key: vars(layer)[key] for key in (*OF_LAYERS, *PER_HEAD) if key in vars(layer)}
        kept = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
        simple = {key: value for key, value in kept.items() if type(value) is int or _integers(value)}
        if simple:
            attributes[clean_name(name)] = simple
    tensors = {name: list(getattr(*places[0]).shape) for name, places in owners(module).items()}
    return {"tensors": tensors, "attributes": attributes}


def _integers(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) is int for part in value)


@torch.no_grad()
def restore_shapes(module: nn.Module, described: Mapping[str, Any]) -> None:
    """Give a module the shapes that `describe_shapes` wrote down, so that a state dict of them loads strictly.

    Parameters of another shape become new, uninitialised ones; all else stays. Runs before weights are loaded.

    Raises:
        CheckpointMismatch: the module has other parameters than the described one.
    """
    named, shapes = owners(module), described["tensors"]
    if named.keys() != shapes.keys():
        first = min(named.keys() ^ shapes.keys())
        where = "the module" if first in named else "the checkpoint"
        raise CheckpointMismatch(
            f"the shapes are of another module than {type(module).__name__}: only {where} has '{first}'; build the "
            f"module with the arguments it was trained with"
        )
    for name, shape in shapes.items():
        old = getattr(*named[name][0])
        if list(old.shape) != list(shape):
            set_tensor(named[name], old.new_empty(tuple(shape)))
    for name, layer in module.named_modules():
        for key, value in described["attributes"].get(clean_name(name), {}).items():
            if getattr(layer, key, value) != value:
                setattr(layer, key, tuple(value) if isinstance(value, list) else value)
