"""ExecuTorch programs, run by ExecuTorch itself with XNNPACK: what they compute, and when none is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.export import executorch as ours
from lightning_compress.export.checked import Checked
from lightning_compress.export.executorch import ExecuTorchModel, executorch_operators, export_executorch
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.grid import Range
from lightning_compress.quantization.outputs import rounded_as_trained
from tests.export.models import seen_ranges, structured_images

pytestmark = pytest.mark.optional
INSTALL = 'pip install "lightning-compress[executorch]"'


@pytest.fixture(scope="module")
def int8_file(convnet: nn.Module, ranges: dict[str, Range], tmp_path_factory: pytest.TempPathFactory) -> Checked:
    pytest.importorskip("executorch", reason=INSTALL)
    path = tmp_path_factory.mktemp("int8") / "made" / "convnet.pte"
    return export_executorch(convnet, path, (structured_images(30),), ranges=ranges)


def rounded(module: nn.Module, ranges: dict[str, Range], *args: Tensor, **kwargs: Tensor) -> np.ndarray:
    with torch.no_grad(), rounded_as_trained(module, ranges):
        return module(*args, **kwargs).numpy()


def test_an_int8_program_computes_what_was_trained(
    convnet: nn.Module, ranges: dict[str, Range], int8_file: Checked
) -> None:
    assert [each.name for each in int8_file.path.parent.iterdir()] == ["convnet.pte"]
    model, images = ExecuTorchModel(int8_file), structured_images(40)
    got = np.concatenate([model(image[None])[0] for image in images])
    assert sqnr_db(rounded(convnet, ranges, images), got) > 35
    assert np.array_equal(model.in_pieces((images,), 1)[0], got)
    assert int8_file.agreement == (got.argmax(1) == rounded(convnet, ranges, images).argmax(1))[:30].mean()


def test_all_of_it_is_xnnpacks_and_holds_integers(convnet: nn.Module, int8_file: Checked) -> None:
    assert executorch_operators(int8_file) == {"XnnpackBackend": 1}
    integers = sum(convnet.get_parameter(f"{name}.weight").numel() for name in ("body.0", "body.4", "body.8", "hidden"))
    assert integers < int8_file.path.stat().st_size == int8_file.size_bytes < integers + 12_000


def test_linears_that_stay_float_and_several_rows_at_once(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason=INSTALL)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.hidden, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 4)

        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            hidden = nn.functional.gelu(self.hidden(self.embedding(ids))) * mask[..., None]
            return self.head(hidden.sum(1))

    torch.manual_seed(0)
    module = Words().eval()
    batch = {"ids": torch.randint(50, (6, 9)), "mask": torch.ones(6, 9)}
    ranges = seen_ranges(module, skip=(), **batch)
    file = export_executorch(module, tmp_path / "words.pte", batch, ranges=ranges, batch=2)
    other = {"ids": torch.randint(50, (4, 9)), "mask": torch.rand(4, 9).round()}
    got = ExecuTorchModel(file).in_pieces(other, 2)[0]
    assert sqnr_db(rounded(module, ranges, **other), got) > 25
    assert file.size_bytes < 4 * 50 * 64 + 64 * 64 + 25_000  # embeddings are floats, the hidden weight is not
    assert "aten::embedding.out" in executorch_operators(file)


def test_a_program_of_floats(convnet: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason=INSTALL)
    images = structured_images(3)
    file = export_executorch(convnet.train(), tmp_path / "a.pte", (images,))
    assert convnet.training
    with torch.no_grad():
        expected = convnet.eval()(images).numpy()
    np.testing.assert_allclose(
        ExecuTorchModel(file).in_pieces((images,), 1)[0], expected, atol=1e-5 * np.abs(expected).max()
    )
    assert file.agreement == 1.0


def test_a_program_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("executorch", reason=INSTALL)
    right = ours.as_xnnpack_fuses

    def wrong(graph: torch.fx.GraphModule) -> None:
        right(graph)
        graph.get_buffer("0.scales").mul_(2)

    monkeypatch.setattr(ours, "as_xnnpack_fuses", wrong)
    module = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(CompressError, match="ExecuTorch file is not the fake-quantized module"):
        export_executorch(module, tmp_path / "a.pte", (torch.randn(3, 8),), ranges={"0": Range(-3, 3)})
    assert list(tmp_path.iterdir()) == []


class Sorted(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.sort(-1).values


def test_an_operator_that_executorch_lacks_is_named(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason=INSTALL)
    with pytest.raises(CompressError, match=r"no kernel for aten::sort\.values; write that part of forward"):
        export_executorch(Sorted(), tmp_path / "a.pte", (torch.randn(3, 4),))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("inputs", "options", "text"),
    [
        ((torch.ones(3, 2),), {"batch": 2}, r"got sizes \[3\] with batch=2"),
        ((torch.ones(3, 2), torch.ones(1)), {}, r"got sizes \[1, 3\] with batch=1"),
        ((torch.ones(3, 2),), {"ranges": {"0": Range(0.0, 1.0, 4)}}, "rounds to 8 bits, got 4 for '0' and 0 more"),
    ],
)
def test_refusals_name_the_cure(
    inputs: tuple[Tensor, ...], options: dict, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_require", lambda: None)
    with pytest.raises(ValueError, match=text):
        export_executorch(nn.Sequential(nn.Linear(2, 2)), "a.pte", inputs, **options)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lightning-compress\[executorch\]"):
        ExecuTorchModel("a.pte")
