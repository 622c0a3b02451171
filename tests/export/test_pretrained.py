"""Folders that transformers itself reads back: the same answers as the model that was trained, and fewer bytes."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lightning_compress import CompressError, NothingToCompress, fake_quantized
from lightning_compress.export import pretrained
from lightning_compress.export.pretrained import export_pretrained
from lightning_compress.export.schemes import pack_codes
from lightning_compress.quantization.grid import FLOAT_BITS, Range
from lightning_compress.quantization.inputs import PerToken
from lightning_compress.quantization.lowbit import Binary, Ternary
from lightning_compress.quantization.outputs import OutputRange
from lightning_compress.quantization.posttraining import quantize_post_training
from lightning_compress.quantization.weight_only import quantize_weights, weight_ranges
from lightning_compress.quantization.weights import Symmetric

packing = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
IDS = torch.arange(14).view(2, 7) * 3
NO_POOLER = {"add_pooling_layer": False}


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def llama(tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=50, use_cache=False, tie_word_embeddings=tied)
    ).eval()


class Reader(L.LightningModule):
    """A user's module around an encoder."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.encoder = BertModel(BertConfig(**sizes, vocab_size=50), **NO_POOLER).eval()
        self.head = nn.Linear(64, 2)

    def forward(self, ids):
        return self.head(self.encoder(ids).last_hidden_state[:, 0])


def read_logits(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


def logits(model, ranges):
    with torch.no_grad(), fake_quantized(model, ranges):
        return model(IDS).logits


def bytes_of(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31))
def test_codes_are_packed_as_the_layouts_own_package_does(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator, dtype=torch.int8)
    assert torch.equal(pack_codes(codes, bits), packing.pack_to_int32(codes, bits))


def per_channel(weights, inputs=None, bits=FLOAT_BITS):
    return lambda trained: Range(trained.low, trained.high, bits, weights.bits, weights, inputs)


KINDS = {
    "W8A8": lambda trained: trained,
    "W4A8": lambda trained: Range(trained.low, trained.high, 8, 4),
    "W8A4": lambda trained: Range(trained.low, trained.high, 4, 8),
    "W8": per_channel(Symmetric(8)),
    "W5": per_channel(Symmetric(5)),
    "W4 by 32": per_channel(Symmetric(4, 32)),
    "W8 one scale": per_channel(Symmetric(8, "tensor")),
    "ternary": per_channel(Ternary()),
    "binary": per_channel(Binary()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_trained_model_to_the_bit(kind, tmp_path):
    model = llama()
    ranges = {name: KINDS[kind](trained) for name, trained in quantize_post_training(model, [IDS]).items()}
    folder = export_pretrained(model, tmp_path / "files", (IDS,), ranges=ranges)
    assert torch.equal(read_logits(folder), logits(model, ranges))
    assert not torch.equal(logits(model, ranges), model(IDS).logits)  # rounding is seen in the answers


def test_inputs_rounded_a_token_at_a_time(tmp_path):
    model = llama()
    found = quantize_post_training(model, [IDS])
    ranges = {name: Range(r.low, r.high, 8, 8, None, PerToken()) for name, r in found.items()}
    read = read_logits(export_pretrained(model, tmp_path / "files", (IDS,), ranges=ranges))
    torch.testing.assert_close(read, logits(model, ranges), rtol=0.0, atol=0.02 * float(read.abs().max()))


def test_widths_and_formats_may_differ_from_layer_to_layer(tmp_path):
    model = llama()
    found = quantize_post_training(model, [IDS])
    kinds = list(KINDS.values())[:6]
    ranges = {name: kinds[number % len(kinds)](trained) for number, (name, trained) in enumerate(found.items())}
    folder = export_pretrained(model, tmp_path / "files", (IDS,), ranges=ranges)
    assert torch.equal(read_logits(folder), logits(model, ranges))


@pytest.mark.parametrize(("bits", "group", "most"), [(8, None, 0.30), (4, 32, 0.21)])
def test_weights_alone_by_error_feedback(bits, group, most, tmp_path):
    model = llama(tied=True)
    plain = tmp_path / "plain"
    model.save_pretrained(plain)
    scales = quantize_weights(model, [IDS], bits, group)
    rounded = model(IDS).logits
    ranges = weight_ranges(scales, bits, group)
    folder = export_pretrained(model, tmp_path / "files", (IDS,), ranges=ranges)
    torch.testing.assert_close(read_logits(folder), rounded, rtol=0.0, atol=1e-6)
    layers = sum(4 * model.get_submodule(name).weight.numel() for name in scales)
    saved = (plain / "model.safetensors").stat().st_size - (folder / "model.safetensors").stat().st_size
    assert 1 - saved / layers < most  # 2 % for keys and shapes beside codes and scales


def test_the_encoder_of_a_users_module_pruned_and_rounded(tmp_path):
    module = Reader()
    for layer in module.encoder.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data *= torch.rand_like(layer.weight) > 0.8
    ranges = quantize_post_training(module, [IDS], exclude=["head"])
    folder = export_pretrained(module, tmp_path / "files", (IDS,), ranges=ranges, model="encoder", options=NO_POOLER)
    read = BertModel.from_pretrained(folder, **NO_POOLER).eval()
    own = {name.removeprefix("encoder."): trained for name, trained in ranges.items()}
    with torch.no_grad(), fake_quantized(module.encoder, own):
        expected = module.encoder(IDS).last_hidden_state
    assert torch.equal(read(IDS).last_hidden_state, expected)
    name = "encoder.layer.0.intermediate.dense"
    assert not read.get_submodule(name).weight[module.encoder.get_submodule(name).weight == 0].any()
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_the_module_is_left_as_it_was_and_trains_on(tmp_path):
    module = Reader().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    ranges = quantize_post_training(module, [IDS], exclude=["head"])
    export_pretrained(module, tmp_path / "files", {"input_ids": IDS}, ranges=ranges, model="encoder", options=NO_POOLER)
    assert module.training
    assert module.encoder.config.to_dict().get("quantization_config") is None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def refused(error, words, tmp_path, module, ranges, **options):
    with pytest.raises(error, match=words):
        export_pretrained(module, tmp_path / "files", (IDS,), ranges=ranges, **options)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_named_and_leaves_nothing(tmp_path):
    model, good = llama(), Range(-1.0, 1.0)
    name = "model.layers.0.mlp.up_proj"
    refused(NothingToCompress, "empty.*save_pretrained", tmp_path, model, {})
    refused(TypeError, "Sequential.*none in it", tmp_path, nn.Sequential(nn.Linear(2, 2)), {"0": good})
    refused(TypeError, 'Reader.*model="encoder"', tmp_path, Reader(), {"head": good})
    refused(ValueError, "'head'.*'encoder'", tmp_path, Reader(), {"head": good}, model="encoder", options=NO_POOLER)
    refused(CompressError, "pooler.dense.bias.*add_pooling_layer", tmp_path, Reader(), {"head": good}, model="encoder")
    refused(ValueError, "output.*outputs=False", tmp_path, model, {f"{name}:output": OutputRange(0.0, 1.0)})
    refused(ValueError, "Embedding.*embed_tokens.*exclude", tmp_path, model, {"model.embed_tokens": good})
    refused(ValueError, "groups of 32.*up_proj", tmp_path, model, {name: Range(-1.0, 1.0, 8, 4, Symmetric(4, 32))})
    refused(ValueError, "lm_head.*tied.*embed_tokens", tmp_path, llama(tied=True), {"lm_head": good})
    refused(ValueError, "float32.*float", tmp_path, llama().bfloat16(), {name: good})


def test_a_folder_with_files_is_kept(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="new or empty"):
        export_pretrained(llama(), tmp_path / "files", (IDS,), ranges={"lm_head": Range(-1.0, 1.0)})
    assert (tmp_path / "files" / "mine.txt").read_text() == "kept"


def test_a_folder_that_answers_otherwise_is_not_kept(tmp_path, monkeypatch):
    written = pretrained.layer_tensors

    def broken(name, *rest):
        tensors = written(name, *rest)
        return {**tensors, "weight": -tensors["weight"]} if name.endswith("up_proj") else tensors

    monkeypatch.setattr(pretrained, "layer_tensors", broken)
    model = llama()
    refused(CompressError, r"dB, expected at least 20", tmp_path, model, quantize_post_training(model, [IDS]))
