"""Tokens: open batch and sequence, layer norms as vector operations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.export.onnx import export_onnx, kernel_counts, run_onnx
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.outputs import rounded_as_trained
from tests.export.models import seen_ranges


class Encoder(nn.Module):
    """Embeddings, two Linear layers beside a residual, attention by hand, layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.norm, self.last = nn.LayerNorm(16), nn.LayerNorm(16, eps=1e-3, bias=False)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.words(tokens))
        heads = [layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = self.last(x + self.down(nn.functional.gelu(self.up(mixed))))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def encoder() -> nn.Module:
    torch.manual_seed(0)
    module = Encoder()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    return module.eval()


def tokens(count: int, length: int) -> Tensor:
    return torch.randint(0, 40, (count, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("profile", ["cpu", "mobile", "tensorrt"])
def test_open_batch_and_sequence(encoder: nn.Module, tmp_path: Path, profile: str) -> None:
    ranges = seen_ranges(encoder, tokens(200, 12))
    path = export_onnx(
        encoder, tmp_path / "a.onnx", (tokens(2, 12),), ranges=ranges, profile=profile, dynamic_sequence=True
    )
    if profile == "cpu":
        assert kernel_counts(path)["QGemm"] == 5
    for count, length in ((1, 1), (5, 7), (3, 12), (2, 30)):
        batch = tokens(count, length)
        if profile != "tensorrt":  # whose grids are others
            with torch.no_grad(), rounded_as_trained(encoder, ranges):
                reference = encoder(batch).numpy()
            assert sqnr_db(reference, run_onnx(path, batch.numpy())[0]) > 30
        assert run_onnx(path, batch.numpy())[0].shape == (count, 3)


def test_the_float_file_has_open_sizes_too(encoder: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(encoder, tmp_path / "a.onnx", (tokens(1, 12),), dynamic_sequence=True)
    batch = tokens(4, 9)
    np.testing.assert_allclose(run_onnx(path, batch.numpy())[0], encoder(batch).detach(), atol=1e-5)


def test_inputs_of_two_lengths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dynamic_sequence=True needs inputs of one second size, got \[3, 4\]"):
        export_onnx(
            nn.Bilinear(3, 4, 2), tmp_path / "a.onnx", (torch.rand(2, 3), torch.rand(2, 4)), dynamic_sequence=True
        )


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, value: Tensor) -> Tensor:
        return self.linear(value.reshape(-1, 6))


def test_a_forward_that_fixes_the_length(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="dynamic_sequence=False"):
        export_onnx(Fixed(), tmp_path / "a.onnx", (torch.rand(4, 6),), dynamic_sequence=True)


def test_layer_norms_are_vector_operations_for_the_cpu_alone(encoder: nn.Module, tmp_path: Path) -> None:
    operators = {}
    for profile in ("cpu", "tensorrt"):
        path = export_onnx(encoder, tmp_path / f"{profile}.onnx", (tokens(2, 12),), profile=profile)
        operators[profile] = [node.op_type for node in onnx.load(path).graph.node]
        batch = tokens(5, 12)
        np.testing.assert_allclose(run_onnx(path, batch.numpy())[0], encoder(batch).detach(), atol=1e-5)
    assert operators["tensorrt"].count("LayerNormalization") == 2
    assert operators["cpu"].count("LayerNormalization") == 0
    kernels = kernel_counts(tmp_path / "cpu.onnx")  # and the runtime does not put them together again
    assert not {"LayerNormalization", "SkipLayerNormalization"} & set(kernels)
