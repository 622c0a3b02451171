"""What files will weigh, from the rehearsed copy: real bytes where they can be written now, sums where they cannot."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_compress.measure.size import file_bytes, zipped_bytes
from lightning_compress.planning.example import ExampleCall
from lightning_compress.planning.rehearsal import Rehearsal
from lightning_compress.planning.table import Expected
from lightning_compress.sharding import clean_name

__all__ = ["expected_sizes", "onnx_bytes", "weights_bytes"]

# Names, nodes and shapes of a file, for each layer with a weight: 0.8 kB in a plain CNN's, 1.6 in MobileNetV2's, 2.5
# in BERT's, whose weights are so large that the difference does not matter.
GRAPH_BYTES_A_LAYER = 1000
# A channel's scale and bias in float32 and int32, with the scale of the bias and two zero points.
QUANTIZED_CHANNEL_BYTES = 18


def expected_sizes(before: nn.Module, acting: Rehearsal, call: ExampleCall | None, files: bool) -> tuple[Expected, ...]:
    """Return the sizes of the whole module, now and as the rehearsal left it.

    Args:
        before: the module as it is.
        acting: the rehearsal, once every callback was acted out.
        call: by which multiply-accumulates are counted, if it is known.
        files: write weights to temporary files and measure these.
    """
    after = acting.module
    found = [
        Expected("parameters", _numbers(before), _numbers(after), "counted"),
        Expected("weights that are not zero", _nonzero(before), _nonzero(after), "counted on a copy pruned once"),
    ]
    if call is not None:
        found.append(Expected("MACs of the example", call.total(before), call.total(after), "counted by running it"))
        left = sum(call.macs(before).values()), sum(call.macs(after).values())
        found.append(Expected("MACs with weights that are not zero", *left, "counted on a copy pruned once"))
    if files:
        for what, one, other in zip(("", ", zipped"), weights_bytes(before), weights_bytes(after), strict=True):
            found.append(Expected(f"weights file{what}, bytes", one, other, "written and measured now"))
    if files and acting.codes:
        for what, one, other in zip(
            ("", " zipped"), onnx_bytes(before, {}), onnx_bytes(after, acting.codes), strict=True
        ):
            found.append(Expected(f"int8 ONNX file{what}, bytes", one, other, "summed; codes as weights are now"))
    return tuple(found)


def _numbers(module: nn.Module) -> float:
    return float(sum(parameter.numel() for parameter in module.parameters()))


def _nonzero(module: nn.Module) -> float:
    # Biases and norms begin at zero and are not pruned: training moves them.
    counts = (int(torch.count_nonzero(p)) if p.dim() > 1 else p.numel() for p in module.parameters())
    return float(sum(counts))


def weights_bytes(module: nn.Module) -> tuple[int, int]:
    """Return the bytes of the module's weights as `torch.save` writes them, and of that file in a zip archive."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pt"
        torch.save(module.state_dict(), path)
        return file_bytes(path), zipped_bytes(path)


def onnx_bytes(module: nn.Module, codes: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Return the expected bytes of an ONNX file, and of that file in a zip archive.

    Weights with codes take a byte each and 18 bytes a channel (4 a row of an embedding), other parameters four bytes a
    number; batch norms are folded away; names and nodes are taken at 1 kB a layer, a quarter of that when zipped.

    Args:
        module: whose parameters stay in float32 unless they have codes.
        codes: int8 codes and scales by parameter name.
    """
    layers = 0
    tables = {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, nn.Embedding)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "initializers"
        with path.open("wb") as file:
            for name, parameter in _kept_parameters(module).items():
                layers += parameter.dim() > 1
                if name in codes:
                    file.write(codes[name][0].contiguous().numpy().tobytes())
                    file.write(codes[name][1].float().contiguous().numpy().tobytes())
                    file.write(bytes((QUANTIZED_CHANNEL_BYTES - 4) * len(codes[name][1]) * (name not in tables)))
                else:
                    file.write(parameter.detach().float().cpu().contiguous().numpy().tobytes())
            if not codes:  # a norm that is folded leaves a bias; those of codes are counted with their channels
                file.write(bytes(4 * sum(norm.num_features for norm in module.modules() if isinstance(norm, _FOLDED))))
        graph = GRAPH_BYTES_A_LAYER * layers
        return file_bytes(path) + graph, zipped_bytes(path) + graph // 4


def _kept_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that an exported file holds, a shared one once; a batch norm's go into the layer before."""
    folded = {id(p) for layer in module.modules() if isinstance(layer, _FOLDED) for p in layer.parameters()}
    return {clean_name(name): p for name, p in module.named_parameters() if id(p) not in folded}


_FOLDED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
