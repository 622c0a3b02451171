"""A compressed model's weights in one zipped file: codes where weights are rounded, with their scales.

What is measured as the size of a trial is a file that can be read back.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.outputs import Ranges, outputs_of
from lightning_compress.quantization.projections import weight_names

__all__ = ["load_weights", "save_weights"]

HEADER = "header.json"


def save_weights(module: nn.Module, path: str | Path, ranges: Ranges | None = None) -> int:
    """Write a module's state as a zip archive (deflate, level 9), and return its bytes. Runs at the end of a trial.

    The weight of each layer in `ranges` is written as int8 codes and a float32 scale an output channel, where its grid
    has such a form; all else as it is. Deflate finds zeros and what codes below 8 bits do not use.

    Args:
        module: as it is after training.
        path: the file.
        ranges: what `QuantizationAwareTraining.ranges()` returned; None rounds nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_weights(nn.Linear(64, 64), f"{folder}/weights.zip") > 64 * 64 * 3
    True
    """
    layers = outputs_of(ranges or {})[0]
    names = weight_names(module, layers)
    rounded = {names[layer]: trained for layer, trained in layers.items()}
    header: dict[str, Any] = {}
    written: dict[int, str] = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) in written:  # tied: written once
                header[name] = {"same": written[id(tensor)]}
                continue
            written[id(tensor)] = name
            found = rounded[name].codes(tensor) if name in rounded else None
            parts = [tensor] if found is None else list(found)
            header[name] = [{"dtype": str(p.dtype).removeprefix("torch."), "shape": list(p.shape)} for p in parts]
            for index, part in enumerate(parts):
                archive.writestr(f"{name}.{index}", _bytes(part))
        archive.writestr(HEADER, json.dumps(header))
    return Path(path).stat().st_size


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state that `save_weights` wrote; rounded weights are codes x scale in float32."""
    with zipfile.ZipFile(path) as archive:
        header: Mapping[str, Any] = json.loads(archive.read(HEADER))
        state: dict[str, Tensor] = {}
        for name, parts in header.items():
            if isinstance(parts, Mapping):
                state[name] = state[parts["same"]]
                continue
            read = [_tensor(archive.read(f"{name}.{index}"), part) for index, part in enumerate(parts)]
            state[name] = read[0] if len(read) == 1 else _times(*read)
    return state


def _times(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.float() * scale.view(-1, *[1] * (codes.dim() - 1))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, part: Mapping[str, Any]) -> Tensor:
    dtype = getattr(torch, part["dtype"])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(part["shape"])
