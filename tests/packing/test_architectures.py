"""The state dicts of many architectures come back bit for bit, also through the command line."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lightning_compress import load_packed, pack, unpack
from lightning_compress.cli import main
from lightning_compress.measure.stored import measure_file
from lightning_compress.packing.tensors import bits_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 40}
GPT = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 40}
CONFIGS = {
    "Bert": SMALL, "Roberta": SMALL, "Llama": {**SMALL, "num_key_value_heads": 2},
    "Mistral": {**SMALL, "num_key_value_heads": 1},
    "Qwen2": {**SMALL, "num_key_value_heads": 2}, "Electra": {**SMALL, "embedding_size": 16}, "GPT2": GPT,
    "GPTNeoX": SMALL, "DistilBert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "vocab_size": 40},
    "Albert": {**SMALL, "embedding_size": 16},
    "T5": {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2, "vocab_size": 40},
    "ViT": {**{k: v for k, v in SMALL.items() if k != "vocab_size"}, "image_size": 16, "patch_size": 8},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "MobileNetV2": {"depth_multiplier": 0.1, "min_depth": 4},
}  # fmt: skip


def of_transformers(name):
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    return getattr(transformers, f"{name}Model")(config)


LAYERS = {
    "LSTM": lambda: nn.LSTM(8, 16, 2, bidirectional=True),
    "GRU": lambda: nn.GRU(8, 16),
    "Transformer": lambda: nn.Transformer(16, 2, 1, 1, 24, batch_first=True),
    "Conv3d": lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.PReLU()),
    "EmbeddingBag": lambda: nn.EmbeddingBag(30, 8),
    "Bilinear": lambda: nn.Bilinear(4, 5, 6).double(),
    "half": lambda: nn.Linear(30, 30).half(),
    "bfloat16": lambda: nn.Linear(30, 30).bfloat16(),
}


@pytest.mark.parametrize("name", [*CONFIGS, *LAYERS])
def test_state_dicts_of_many_architectures(name, tmp_path):
    torch.manual_seed(0)
    module = LAYERS[name]() if name in LAYERS else of_transformers(name)
    for parameter in module.parameters():  # pruned by half, as masks do
        parameter.data *= torch.rand_like(parameter) < 0.5
    path = pack(module, tmp_path / "model.packed", signed_zeros=True)
    state = unpack(path)
    assert state.keys() == module.state_dict().keys()
    for key, tensor in module.state_dict().items():
        assert state[key].dtype == tensor.dtype
        assert np.array_equal(bits_of(state[key]), bits_of(tensor))
    load_packed(module, path)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lightning_compress", *map(str, arguments)])
    return main()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt"])
def test_from_a_checkpoint_to_a_packed_file_and_back(suffix, tmp_path, monkeypatch, capsys):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(1, 9, (64, 64), generator=generator).float()
    weight *= torch.rand(64, 64, generator=generator) < 0.1
    state = {"layer.weight": weight, "layer.bias": torch.randn(64, generator=generator)}
    checkpoint = tmp_path / f"dense{suffix}"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(state, checkpoint)
    else:
        torch.save({"state_dict": state, "epoch": 3} if suffix == ".ckpt" else state, checkpoint)
    assert run(monkeypatch, "pack", checkpoint, tmp_path / "a.packed") == 0
    size = (tmp_path / "a.packed").stat().st_size
    assert f"{size:,} bytes, {4160 * 4 / size:.2f}x smaller" in capsys.readouterr().out
    assert run(monkeypatch, "inspect", tmp_path / "a.packed") == 0
    said = capsys.readouterr().out
    assert "64 x 64" in said
    assert "codebook" in said
    assert f"{size:,} bytes, of which" in said
    assert run(monkeypatch, "unpack", tmp_path / "a.packed", tmp_path / "back.pt") == 0
    assert run(monkeypatch, "unpack", tmp_path / "a.packed", tmp_path / "back.safetensors") == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    measured = measure_file(tmp_path / "a.packed", "packed")
    assert (measured.size_bytes, measured.total) == (size, weight.numel())
    assert measured.nonzero == int(weight.count_nonzero())


def test_mistakes_on_the_command_line_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.packed").write_bytes(b"nothing of ours")
    assert run(monkeypatch, "inspect", tmp_path / "a.packed") == 1
    assert "expected a packed file" in capsys.readouterr().err
    assert run(monkeypatch, "pack", tmp_path / "missing.pt", tmp_path / "b") == 1
    assert "missing.pt" in capsys.readouterr().err
    torch.save({"w": torch.zeros(9, 9)}, tmp_path / "w.pt")
    assert run(monkeypatch, "pack", tmp_path / "w.pt", tmp_path / "b.packed") == 0
    assert run(monkeypatch, "unpack", tmp_path / "b.packed", tmp_path / "c.pt", "--most-bytes", "10") == 1
    assert "claims 324 bytes" in capsys.readouterr().err
    assert not (tmp_path / "c.pt").exists()
