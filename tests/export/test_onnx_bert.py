"""A transformer with a dictionary of inputs: every Linear layer in an integer kernel, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_compress.export.onnx import export_onnx, kernel_counts, run_onnx
from lightning_compress.export.verify import sqnr_db
from lightning_compress.quantization.attach import fake_quantized
from tests.export.models import seen_ranges

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=4,
    )  # fmt: skip
    module = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # as from training: at the start all logits are alike
    return module


def sentences(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 13, (count, 1), generator=generator)
    return {
        "input_ids": torch.randint(0, 50, (count, 12), generator=generator),
        "attention_mask": (torch.arange(12) < lengths).long(),
    }


def test_bert_runs_in_integer_kernels_and_agrees(bert: nn.Module, tmp_path: Path) -> None:
    batch = sentences(500)
    ranges = seen_ranges(bert, **batch, skip=("classifier",))
    assert len(ranges) == 13
    few = {name: value[:3] for name, value in batch.items()}
    path = export_onnx(bert, tmp_path / "bert.onnx", few, ranges=ranges)
    kernels = kernel_counts(path)
    assert kernels["QGemm"] == 13
    assert kernels["Gemm"] == 1  # the classifier
    with torch.no_grad(), fake_quantized(bert, ranges):
        reference = bert(**batch).logits.numpy()
    output = run_onnx(path, *(value.numpy() for value in batch.values()))[0]
    assert len(np.unique(reference.argmax(1))) > 1
    assert (reference.argmax(1) == output.argmax(1)).mean() >= 0.995
    assert sqnr_db(reference - reference.mean(0), output - reference.mean(0)) > 30
    # queries, keys and values read one tensor: one rounding for the three
    assert kernels["QuantizeLinear"] == 9


def test_bert_as_floats(bert: nn.Module, tmp_path: Path) -> None:
    batch = sentences(5)
    path = export_onnx(bert, tmp_path / "bert.onnx", batch)
    one = {name: value[:1] for name, value in batch.items()}
    output = run_onnx(path, *(value.numpy() for value in one.values()))[0]
    np.testing.assert_allclose(output, bert(**one).logits.detach().numpy(), atol=1e-4)
