"""What a check finds of a file, against figures worked out by hand; and files that appear only together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.errors import CompressError
from lightning_compress.export.checked import Checked, File, checked
from lightning_compress.export.replacing import written_at_the_end
from lightning_compress.quantization.grid import Range

INPUTS = (torch.tensor([[3.0, 4.0], [1.0, 0.0]]),)


class Same(nn.Linear):
    """Returns what it is given; its grid of whole numbers leaves these inputs as they are."""

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        nn.init.eye_(self.weight)


def rounding(bits: int = 8) -> dict[str, Range]:
    return {"0": Range(0.0, 2.0**bits - 1, bits)}


def same() -> nn.Module:
    return nn.Sequential(Same()).requires_grad_(False)


class Called:
    """A file that adds a fixed error, and notes how many rows it is run on."""

    def __init__(self, error: list[list[float]]) -> None:
        self.error, self.rows = np.array(error, np.float32), []

    def __call__(self, inputs: tuple[Tensor]) -> list[np.ndarray]:
        self.rows.append(len(inputs[0]))
        return [inputs[0].numpy() + self.error[: len(inputs[0])]]


def found(run: Called, **options: object) -> Checked:
    return checked(File("made file", Path("a.x"), 7, run), same(), INPUTS, rounding(), **options)


def test_figures_by_hand() -> None:
    result = found(Called([[0.1, 0.0], [-0.1, 0.2]]))  # 26 of signal, 0.06 of noise
    assert result.sqnr_db == pytest.approx(10 * np.log10(26 / 0.06), rel=1e-4)
    assert result.agreement == 1.0
    assert result.size_bytes == 7


def test_another_class_is_counted() -> None:
    run = Called([[0.0, 0.0], [-1.5, 0.0]])
    close = (torch.tensor([[30.0, 40.0], [4.0, 3.0]]),)
    result = checked(File("made file", Path("a.x"), 7, run), same(), close, rounding())
    assert result.agreement == 0.5


def test_one_row_is_timed_and_all_are_compared() -> None:
    run = Called([[0.0, 0.0], [0.0, 0.0]])
    found(run, timed_rows=1)
    assert run.rows == [2] + 22 * [1]


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def run(inputs: tuple[Tensor]) -> list[np.ndarray]:
        seen.append(torch.get_num_threads())
        return [inputs[0].numpy()]

    torch.set_num_threads(2)
    try:
        checked(File("made file", Path("a.x"), 7, run), same(), INPUTS, None)
        assert set(seen[1:]) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_differs_is_refused_by_name() -> None:
    run = Called([[1.0, 0.0], [0.0, 0.0]])
    with pytest.raises(CompressError, match=r"int8 made file is not the fake-quantized module: .* 14\.1 dB"):
        found(run)
    with pytest.raises(CompressError, match=r"made file is not the module: output 0 differs by 0\.25"):
        checked(File("made file", Path("a.x"), 7, run), same(), INPUTS, None)
    with pytest.raises(CompressError, match=r"shapes \[\(2, 2\)\] from the made file, got \[\]"):
        checked(File("made file", Path("a.x"), 7, lambda _: []), same(), INPUTS, rounding(4))


def test_it_may_be_given_as_a_path(tmp_path: Path) -> None:
    result = found(Called([[0.0, 0.0], [0.0, 0.0]]))
    assert Path(result) == Path("a.x")
    assert result.text().startswith("a.x: 7 bytes, inf dB, 100.0 % of rows agree, ")


def test_parts_of_a_file_appear_together_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "a.xml"

    def interrupted() -> None:
        with written_at_the_end(path, ".xml", beside=[".bin"]) as unfinished:
            unfinished.write_text("graph")
            unfinished.with_suffix(".bin").write_text("weights")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert list(path.parent.iterdir()) == []
    with written_at_the_end(path, ".xml", beside=[".bin"]) as unfinished:
        unfinished.write_text("graph")
        unfinished.with_suffix(".bin").write_text("weights")
        assert not path.exists()
    assert {each.name: each.read_text() for each in path.parent.iterdir()} == {"a.xml": "graph", "a.bin": "weights"}
