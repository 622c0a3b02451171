"""Keys of cached logits: what an example and a teacher are, by their content, so that neither is taken for another."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["KEY_BYTES", "example_keys", "fingerprint"]

KEY_BYTES = 16
# Hashing lets other threads run; below this size an example is hashed sooner than handed over.
THREADED_BYTES = 65536
PLAIN = (type(None), bool, int, float, complex, str, bytes, type, Enum, torch.dtype, torch.device)

MASK = repr("attention_mask")

Path = tuple[str, ...]


class _Part(NamedTuple):
    """One tensor's bytes, a row an example (or one row for all), and how many of them count in each."""

    rows: NDArray[np.uint8]
    counts: list[int] | None

    def feed(self, digest: Any, example: int) -> None:
        row = self.rows[example if len(self.rows) > 1 else 0]
        if self.counts is not None:
            row = row[: self.counts[example if len(self.counts) > 1 else 0]]
            digest.update(len(row).to_bytes(8, "little"))
        digest.update(row)


def example_keys(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[bytes]:
    """Return a key of each example in a model's call, from all that the teacher is given. Runs in each step.

    A key is the hash (BLAKE2b, 128 bits) of the example's bytes in each tensor, of their shapes and dtypes, and of the
    arguments that are no tensors. It does not depend on the rest of the batch, the device or the order of keywords.
    `labels`, which a teacher is not given, is left out.

    Beside an `attention_mask` of zeros and ones, (batch, tokens), only tokens up to the last 1 count, in it and in the
    integer tensors of its shape: padding to the right changes no key. Padding to the left moves the tokens, so it does.

    Args:
        args: positional arguments; tensors in tuples, lists and mappings are found. All share their first dimension,
            the batch; one with 1 there, or without dimensions, belongs to each example.
        kwargs: keyword arguments.

    Returns:
        16 bytes for each example.

    Raises:
        ValueError: no tensor with a batch, or tensors of several batch sizes.
        TypeError: an argument whose content cannot be read.

    >>> first, second = example_keys((torch.eye(2),), {})
    >>> first == second, first == example_keys((torch.eye(2)[:1],), {"labels": torch.zeros(1)})[0]
    (False, True)
    >>> short = {"input_ids": torch.tensor([[7, 8]]), "attention_mask": torch.tensor([[1, 1]])}
    >>> long = {"input_ids": torch.tensor([[7, 8, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> example_keys((), short) == example_keys((), long)
    True
    """
    given = {name: value for name, value in kwargs.items() if name != "labels"}
    leaves = sorted(_leaves((args, given), ()), key=lambda leaf: leaf[0])
    tensors = {path: value for path, value in leaves if isinstance(value, Tensor)}
    batch = _batch_size(tensors)
    seen, parts = blake2b(digest_size=KEY_BYTES), []
    for path, value in leaves:
        if isinstance(value, Tensor):
            mask = tensors.get((*path[:-1], MASK), tensors.get(("1", MASK)))  # of its own mapping, or the call's
            described, part = _part(value, mask)
            parts.append(part)
        else:
            described = _described(path, value)
        seen.update(f"{path} {described}\n".encode())
    return _digests(functools.partial(_key, seen, parts), batch, sum(part.rows.shape[1] for part in parts))


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        inside = [(repr(key), child) for key, child in value.items()]
    elif isinstance(value, (tuple, list)):
        inside = [(str(index), child) for index, child in enumerate(value)]
    else:
        yield path, value
        return
    yield path, type(value)  # an empty container is not no argument
    for name, child in inside:
        yield from _leaves(child, (*path, name))


def _batch_size(tensors: Mapping[Path, Tensor]) -> int:
    sizes = {len(tensor) for tensor in tensors.values() if tensor.dim() > 0}
    if len(sizes - {1}) > 1 or not sizes:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors.values()) or "no tensor"
        raise ValueError(
            f"a cache of logits needs the teacher's inputs to be tensors whose first dimension is the batch, got "
            f"{shapes}; pass inputs=a function from the batch to such inputs, or leave the cache out"
        )
    return next(iter(sizes - {1}), 1)


def _described(path: Path, value: Any) -> str:
    if not isinstance(value, PLAIN):
        raise TypeError(
            f"a cache of logits tells examples apart by the teacher's inputs: tensors, numbers and strings, in tuples, "
            f"lists and mappings; got {type(value).__name__} at {'.'.join(path)}, whose content it cannot read; pass "
            f"inputs=a function from the batch to such inputs, or leave the cache out"
        )
    return f"{type(value).__name__} {value!r}"


def _part(tensor: Tensor, mask: Tensor | None) -> tuple[str, _Part]:
    rows = _bytes_of(tensor if tensor.dim() > 0 else tensor.unsqueeze(0))
    ends = None if mask is None else _ends(mask, tensor)
    if ends is None:
        return f"{tensor.dtype} {tuple(tensor.shape[1:])}", _Part(rows, None)
    return f"{tensor.dtype} tokens", _Part(rows, [end * tensor.element_size() for end in ends])


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    rows: NDArray[np.uint8] = flat.view(len(flat), math.prod(flat.shape[1:])).view(torch.uint8).numpy()
    return rows


def _ends(mask: Tensor, tensor: Tensor) -> list[int] | None:
    """Where the tokens of each example end; None where the mask says nothing of this tensor's padding."""
    of_tokens = tensor is mask or not (tensor.is_floating_point() or tensor.is_complex())
    if mask.dim() != 2 or mask.shape != tensor.shape or not mask.numel() or not of_tokens:
        return None
    mask = mask.detach().cpu()
    kept = mask == 1
    if not bool((kept | (mask == 0)).all()):  # added to the scores, for one
        return None
    ends: list[int] = (kept * torch.arange(1, mask.shape[1] + 1)).amax(dim=1).tolist()
    return ends


def _key(seen: Any, parts: list[_Part], example: int) -> bytes:
    digest = seen.copy()
    for part in parts:
        part.feed(digest, example)
    key: bytes = digest.digest()
    return key


def _digests(key: Callable[[int], bytes], batch: int, example_bytes: int) -> list[bytes]:
    threads = min(8, batch, os.cpu_count() or 1)
    if example_bytes < THREADED_BYTES or threads < 2:
        return list(map(key, range(batch)))
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(key, range(batch)))


def fingerprint(teacher: nn.Module) -> str:
    """Return a hash of a teacher: the classes of its modules, and its state's names, shapes, dtypes and bytes.

    Runs once, when a cache is opened; the teacher comes to the CPU tensor by tensor. What is in neither, such as the
    stride of a convolution or the precision of autocast, is not seen.

    Returns:
        32 hexadecimal digits.

    >>> layer = nn.Linear(2, 1)
    >>> before = fingerprint(layer)
    >>> _ = nn.init.zeros_(layer.bias)
    >>> fingerprint(layer) == before
    False
    """
    digest = blake2b(digest_size=KEY_BYTES)
    for name, module in teacher.named_modules():
        digest.update(f"{name} {type(module).__qualname__}\n".encode())
    for name, value in teacher.state_dict().items():
        if not isinstance(value, Tensor):  # a module's extra state
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(_bytes_of(value.reshape(1, -1)).data)
    return digest.hexdigest()
