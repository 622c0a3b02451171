"""`python -m lightning_compress report A B` on files of every kind, and on files that are none."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import export_onnx, quantize_post_training
from lightning_compress.cli import main
from lightning_compress.measure.stored import measure_file, stored_layers
from lightning_compress.measure.terminal import show
from lightning_compress.reporting import report_of_files
from tests.measure.test_report import DENSE, SMALL, compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two networks, one with zeros, in files of every kind, and data for them."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    small = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)).eval()
    small.load_state_dict(dense.state_dict())
    with torch.no_grad():
        small[0].weight[:, :6] = 0.0
    inputs = torch.randn(100, 8)
    labels = dense(inputs).argmax(1)
    torch.save({"inputs": inputs, "labels": labels}, folder / "data.tensors")
    export_onnx(dense, folder / "dense.onnx", (inputs,))
    export_onnx(small, folder / "small.onnx", (inputs,), ranges=quantize_post_training(small, [(inputs,)]))
    torch.save({"state_dict": dense.state_dict(), "epoch": 3}, folder / "dense.ckpt")
    torch.save(small.state_dict(), folder / "small.pt")
    pytest.importorskip("safetensors.torch").save_file(small.state_dict(), folder / "small.safetensors")
    (folder / "my_data.py").write_text(
        "import torch\n\ndef test_set():\n"
        "    data = torch.load('data.tensors')\n    return data['inputs'], data['labels']\n\n"
        "def wrong():\n    return 1, 2, 3\n"
    )
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command in the folder; returns its exit status, what it said, and its errors."""

    def command(*arguments):
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setattr(sys, "argv", ["lightning_compress", "report", *map(str, arguments)])
        try:
            status = main()
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr()
        return status, said.out, " ".join(said.err.split())

    return command


def test_two_onnx_files_are_run_on_the_data(run, folder, tmp_path):
    options = ("--data", "my_data:test_set", "--out", tmp_path, "--names", "fp32,pruned int8", "--batch-size", 50)
    status, said, _ = run("dense.onnx", "small.onnx", *options)
    assert status == 0
    got = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert got["before"]["accuracy"] == {"ONNX file": 1.0}
    assert got["after"]["accuracy"]["ONNX file"] == 1 - got["differences"]["right_to_wrong"] / 100
    assert got["before"]["latency"]["threads"] == 1
    assert got["after"]["size_bytes"] == (folder / "small.onnx").stat().st_size
    assert 0 < got["after"]["entropy_bytes"] < got["before"]["entropy_bytes"]
    rows = {row["name"]: (row["bits_before"], row["bits_after"], row["sparsity_after"]) for row in got["layers"]}
    assert rows == {"0.weight": (32, 8, 0.75), "2.weight": (32, 32, 0.0)}
    assert "fp32" in said.splitlines()[0]
    assert all(str(tmp_path / f"report.{kind}") in said for kind in ("md", "json", "html"))
    assert "Sparsity and bits, 1 to 2 of 2." in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("after", ["small.pt", "small.safetensors"])
def test_checkpoints_are_compared_weight_by_weight(run, folder, tmp_path, after):
    status, said, _ = run("dense.ckpt", after, "--out", tmp_path)
    assert status == 0
    got = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert (got["before"]["nonzero"], got["after"]["nonzero"]) == (8 * 32 + 32 * 3, 2 * 32 + 32 * 3)
    assert [row["sparsity_after"] for row in got["layers"]] == [0.75, 0.0]
    assert "2 are in both files by name" in " ".join(said.split())
    # Nothing was run: nothing but what the files hold is claimed.
    assert (got["before"]["accuracy"], got["after"]["latency"], got["differences"]) == ({}, None, None)


def test_an_onnx_file_and_a_checkpoint_count_the_same_weights(folder):
    files = [measure_file(folder / name, "x") for name in ("small.onnx", "small.pt", "small.safetensors")]
    assert len({(each.nonzero, each.total) for each in files}) == 1
    assert [row.name for row in stored_layers(folder / "small.onnx")] == ["2.weight", "0.weight"]


def test_products_of_tokens_have_the_names_of_the_checkpoint(tmp_path):
    """The exporter folds the transposed weight of a product of three dimensions into a constant that it numbers."""
    torch.manual_seed(0)
    net, tokens = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval(), torch.randn(4, 5, 8)
    export_onnx(net, tmp_path / "float.onnx", (tokens,))
    export_onnx(net, tmp_path / "int8.onnx", (tokens,), ranges=quantize_post_training(net, [(tokens,)]))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    names = [{row.name for row in stored_layers(tmp_path / name)} for name in ("float.onnx", "int8.onnx", "net.pt")]
    assert names == [{"0.weight", "2.weight"}] * 3


def test_what_only_one_file_has_is_said(run, folder, tmp_path):
    other = {
        "0.weight": torch.ones(32, 8),
        **{f"more.{i}": torch.ones(2, 2) for i in range(8)},
        "step": torch.tensor(1),
    }
    torch.save(other, tmp_path / "other.pt")
    report = report_of_files(folder / "dense.ckpt", tmp_path / "other.pt")
    assert [layer.name for layer in report.layers] == ["0.weight"]
    assert report.about["weights"] == (
        "1 are in both files by name and are compared one by one; only in dense: 2.weight; only in compressed: "
        "more.0, more.1, more.2, more.3, more.4 and 3 more"
    )


WRONG = [
    (("nowhere.onnx", "small.onnx"), "expected a model file at 'nowhere.onnx', where there is none"),
    (("dense.onnx", "my_data.py"), "one of .onnx, .safetensors, .packed, .ckpt, .pt, .pth, .bin, got 'my_data.py'"),
    (("text.onnx", "small.onnx"), "expected an ONNX file, but 'text.onnx' is none"),
    (("text.pt", "small.pt"), "cannot be read as one without running code from it"),
    (("text.safetensors", "small.pt"), "expected a safetensors file, but 'text.safetensors' is none"),
    (("empty.pt", "small.pt"), "expected a state_dict, or a checkpoint that holds one, in 'empty.pt', got dict"),
    (("biases.pt", "small.pt"), "expected weights of two or more dimensions in 'biases.pt', found none"),
    (("dense.ckpt", "small.pt", "--data", "my_data:test_set"), "expected ONNX files to run on the data"),
    (("dense.onnx", "small.onnx", "--data", "my_data:wrong"), "expected (inputs, labels) from my_data:wrong, got 3"),
    (("dense.onnx", "small.onnx", "--data", "my_data:none"), "expected a function 'none' in my_data, found none"),
    (("dense.onnx", "small.onnx", "--data", "nowhere_at_all:f"), "No module named 'nowhere_at_all'"),
    (("dense.onnx", "small.onnx", "--data", "my_data"), "--data takes module:function"),
    (("dense.onnx", "small.onnx", "--names", "one"), "--names takes two names with a comma between them, got 'one'"),
    (("dense.onnx", "small.onnx", "--threads", "0"), "expected a whole number from 1, got '0'"),
]


@pytest.mark.parametrize(("arguments", "named"), WRONG, ids=[named for _, named in WRONG])
def test_wrong_input_is_one_line(run, folder, arguments, named):
    for kind in ("onnx", "pt", "safetensors"):
        (folder / f"text.{kind}").write_text("this is no model, but long enough to be read as the head of one")
    torch.save({"epoch": 1}, folder / "empty.pt")
    torch.save({"bias": torch.ones(3)}, folder / "biases.pt")
    status, said, error = run(*arguments)
    assert (status, said) == (2, "")
    assert named in error
    assert "Traceback" not in error
    assert not (folder / "report").exists()


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("hit"),))


def test_code_in_a_checkpoint_is_not_run(run, folder):
    torch.save({"state_dict": {"w": torch.ones(2, 2)}, "extra": Bomb()}, folder / "bomb.ckpt")
    with (folder / "bomb.pt").open("wb") as file:
        pickle.dump(Bomb(), file, protocol=2)
    for name in ("bomb.ckpt", "bomb.pt"):
        status, _, error = run(name, "small.pt")
        assert status == 2
        assert "without running code from it" in error
    assert not (folder / "hit").exists()


class Terminal:
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_terminal_gets_the_same_cells_and_no_markup(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")
    report, stream = compare(DENSE, SMALL, about={"data": "[red]1000[/red] images"}), Terminal()
    show(report, stream)
    assert all(cell in stream.text for row in report.rows() for cell in row.cells)
    assert "data: [red]1000[/red] images" in stream.text
