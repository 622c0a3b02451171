"""DKM against numpy, its gradients, what it leaves alone, and a fit that ends with few values a layer."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import GradualPruning, QuantizationAwareTraining, load_packed, pack
from lightning_compress.packing.reading import packed_tensors
from lightning_compress.quantization.clustered import DKM, soft_clusters
from lightning_compress.quantization.outputs import rounded_as_trained


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_clusters_are_those_of_numpy():
    values, book = drawn(40), torch.tensor([-1.0, 0.0, 2.0]).double()
    counted = torch.arange(40) % 5 != 0
    attention, found = soft_clusters(values, book, torch.tensor(0.3), counted, steps=3)
    w, c = values.numpy(), book.numpy()

    def assigned(centers: np.ndarray) -> np.ndarray:
        powers = np.exp(-np.abs(w[:, None] - centers[None]) / 0.3)
        return powers / powers.sum(1, keepdims=True)

    for _ in range(3):
        a = assigned(c)[counted.numpy()]
        c = (a * w[counted.numpy(), None]).sum(0) / a.sum(0)
    np.testing.assert_allclose(found, c, rtol=1e-6)
    np.testing.assert_allclose(attention, assigned(c), rtol=1e-5)


def test_gradients_flow_through_the_clustering():
    book, width, counted = torch.tensor([-1.0, 0.5, 2.0]).double(), torch.tensor(0.5), torch.ones(12, dtype=torch.bool)

    def mixtures(values: torch.Tensor) -> torch.Tensor:
        attention, centers = soft_clusters(values, book, width, counted, steps=2)
        return attention @ centers

    assert torch.autograd.gradcheck(mixtures, (drawn(12).requires_grad_(),))
    weight = drawn(6, 8).requires_grad_()
    DKM(4).rounded(weight, {}).square().sum().backward()
    assert int((weight.grad != 0).sum()) == weight.numel()


def test_without_gradients_each_weight_is_its_nearest_center_and_zeros_stay():
    weight = drawn(20, 30)
    weight[weight.abs() < 0.5] = 0
    with torch.no_grad():
        hard = DKM(8).rounded(weight, {})
    values = hard.unique()
    assert len(values) == 8
    assert torch.equal(hard == 0, weight == 0)
    others = values[values != 0]
    nearest = others[(weight.flatten()[:, None] - others).abs().argmin(1)].view_as(weight)
    assert torch.equal(hard[weight != 0], nearest[weight != 0])
    soft = DKM(8, temperature=1e-3).rounded(weight.requires_grad_(), {})
    between = (soft.detach() - hard).abs() > 0.01  # weights in the middle of two centers
    assert float(between.double().mean()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edges(dtype):
    weight = torch.zeros(4, 4, dtype=dtype)
    assert torch.equal(DKM(4).rounded(weight, {}), weight)
    weight[0, 0] = torch.nan
    assert bool(DKM(4).rounded(weight, {})[0, 0].isnan())
    assert DKM(4).rounded(drawn(4, 4).to(dtype), {}).dtype is dtype
    assert [DKM(entries).bits for entries in (3, 4, 5, 256)] == [2, 2, 3, 8]


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="3 to 256, got 2"):
        DKM(2)
    with pytest.raises(ValueError, match="temperature"):
        DKM(4, temperature=0.0)
    with pytest.raises(ValueError, match="steps"):
        DKM(4, steps=0)
    with pytest.raises(ValueError, match="16 values of a layer that has 4"):
        DKM().learned(torch.ones(2, 2))


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head = nn.Linear(32, 4)

    def training_step(self, batch, batch_idx):
        return functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def test_a_fit_ends_with_few_values_which_a_packed_file_keeps_as_a_codebook(tmp_path):
    inputs = drawn(256, 16, seed=1).float()
    labels = inputs[:, :4].argmax(1)
    data = DataLoader(TensorDataset(inputs, labels), batch_size=32)
    model = Classifier()
    qat = QuantizationAwareTraining(DKM(5), None, window=(8, 12, 60))
    pruning = GradualPruning(0.5, window=(0, 8), frequency=2)
    options = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    L.Trainer(accelerator="cpu", max_epochs=10, callbacks=[pruning, qat], **options).fit(model, data)
    with torch.no_grad(), rounded_as_trained(model, qat.ranges()):
        accuracy = float((model.head(model.body(inputs)).argmax(1) == labels).float().mean())
        rounded = DKM(5).rounded(model.body[2].weight, {})
    assert accuracy > 0.8
    assert len(rounded.unique()) <= 5
    path = pack(model, tmp_path / "model.packed", qat.ranges())
    assert torch.equal(load_packed(Classifier(), path).body[2].weight, rounded)
    way = next(each.way for each in packed_tensors(path) if each.name == "body.2.weight")
    assert "code" in way
