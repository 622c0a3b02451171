"""Embeddings in int8 files: stored as codes, looked up as trained."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_compress.export.onnx import export_onnx, run_onnx
from lightning_compress.quantization.attach import fake_quantized
from lightning_compress.quantization.grid import FLOAT_BITS, Range
from lightning_compress.quantization.learned_steps import LSQ
from lightning_compress.quantization.lowbit import Ternary

WORDS, WIDTH = 300, 16


class Tagger(nn.Module):
    """Words and places, added, through a Linear; the second look-up in the words is by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.places = nn.Embedding(8, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.register_buffer("positions", torch.arange(8))

    def forward(self, ids: Tensor, others: Tensor) -> Tensor:
        found = self.words(ids) + self.places(self.positions[: ids.shape[1]]) - 0.5 * self.words(others)
        return self.head(torch.relu(self.layer(found)))


@pytest.fixture
def tagger() -> nn.Module:
    torch.manual_seed(0)
    return Tagger().eval()


def tokens(batch: int = 3, length: int = 6) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    return tuple(torch.randint(0, WORDS, (batch, length), generator=source) for _ in range(2))


TABLES = {"words": Range(0.0, 0.0, FLOAT_BITS), "places": Range(0.0, 0.0, FLOAT_BITS)}
LAYERS = {"layer": Range(-4.0, 4.0), "head": Range(0.0, 3.0)}


def test_rows_are_stored_as_codes_and_computed_as_trained(tagger, tmp_path):
    path = export_onnx(tagger, tmp_path / "tagger.onnx", tokens(), ranges={**TABLES, **LAYERS}, dynamic_sequence=True)
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    codes, scale = stored["words.weight:int"], stored["words.weight:scale"]
    assert codes.dtype == np.int8
    assert not [each.shape for each in stored.values() if each.dtype == np.float32 and each.shape[1:] == (WIDTH,)]
    rows = tagger.words.weight.detach().numpy()
    step = np.abs(rows).max(1, keepdims=True) / 127
    np.testing.assert_allclose(scale[1:], step[1:], rtol=1e-6)
    np.testing.assert_array_equal(codes[1:], np.rint(rows[1:] / step[1:]).astype(np.int8))
    for length in (6, 4):
        ids = tokens(5, length)
        with torch.no_grad(), fake_quantized(tagger, {**TABLES, **LAYERS}):
            expected = tagger(*ids)
        (got,) = run_onnx(path, *(each.numpy() for each in ids))
        assert float(np.abs(got - expected.numpy()).max()) < 0.02 * float(expected.abs().max())


def test_only_embeddings_may_have_ranges(tagger, tmp_path):
    path = export_onnx(tagger, tmp_path / "tagger.onnx", tokens(), ranges={"words": TABLES["words"]})
    with torch.no_grad(), fake_quantized(tagger, {"words": TABLES["words"]}):
        expected = tagger(*tokens())
    (got,) = run_onnx(path, *(each.numpy() for each in tokens()))
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)
    plain = export_onnx(tagger, tmp_path / "plain.onnx", tokens())
    assert plain.stat().st_size - path.stat().st_size > 0.9 * (3 * WORDS * WIDTH - 4 * WORDS)


@pytest.mark.parametrize("grid", [LSQ(4, per_channel=True), LSQ(8), Ternary()], ids=["by row", "one step", "ternary"])
def test_other_grids_with_codes(grid, tagger, tmp_path):
    trained = {"words": Range(0.0, 0.0, FLOAT_BITS, 8, grid, None, grid.learned(tagger.words.weight.detach()))}
    path = export_onnx(tagger, tmp_path / "tagger.onnx", tokens(), ranges=trained)
    with torch.no_grad(), fake_quantized(tagger, trained):
        expected = tagger(*tokens())
    (got,) = run_onnx(path, *(each.numpy() for each in tokens()))
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_a_look_up_that_became_a_constant_is_named(tagger, tmp_path):
    with pytest.raises(ValueError, match=r"nothing in the ONNX graph looks up \['places'\].*dynamic_sequence=True"):
        export_onnx(tagger, tmp_path / "tagger.onnx", tokens(), ranges=TABLES)
    assert not list(tmp_path.iterdir())
