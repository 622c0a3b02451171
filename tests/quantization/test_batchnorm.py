"""Batch norm statistics against numpy, and everything else as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_compress.errors import NothingToCompress
from lightning_compress.quantization.batchnorm import freeze_batch_norm, reestimate_batch_norm, unfreeze_batch_norm


def test_statistics_are_the_means_over_batches_by_numpy() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)).train()
    net[1].running_mean.fill_(9.0)
    batches = [torch.randn(5, 3, 6, 6) * (1 + index) for index in range(3)]
    with torch.no_grad():
        seen = [net[0](batch).numpy().transpose(1, 0, 2, 3).reshape(4, -1) for batch in batches]
    state = torch.get_rng_state()
    assert reestimate_batch_norm(net, batches) == 3
    assert torch.equal(torch.get_rng_state(), state), "dropout was off"
    np.testing.assert_allclose(net[1].running_mean, np.mean([rows.mean(1) for rows in seen], 0), atol=1e-6)
    np.testing.assert_allclose(net[1].running_var, np.mean([rows.var(1, ddof=1) for rows in seen], 0), rtol=1e-5)


def test_modes_momentum_weights_and_uncalled_norms_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2, momentum=0.3), nn.BatchNorm1d(2)
            self.still = nn.BatchNorm1d(2, track_running_stats=False)

        def forward(self, first: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
            return self.still(self.used(first * scale))

    net = Net().train()
    net.unused.running_mean.fill_(7.0)
    net.used.eval()
    weights = [parameter.clone() for parameter in net.parameters()]
    reestimate_batch_norm(net, [{"first": torch.randn(8, 2), "scale": 2.0}, {"first": torch.randn(8, 2)}])
    assert net.unused.running_mean.tolist() == [7.0, 7.0]
    assert (net.used.momentum, net.used.training, net.unused.training, net.training) == (0.3, False, True, True)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    reestimate_batch_norm(net, [(torch.randn(8, 2),)])


@pytest.mark.parametrize(
    ("batches", "words"),
    [([], "no batch"), ([torch.full((4, 2), float("nan"))], "batch norm '0' are not finite")],
)
def test_after_bad_batches_the_old_statistics_are_back(batches: list[torch.Tensor], words: str) -> None:
    net = nn.Sequential(nn.BatchNorm1d(2))
    net(torch.randn(16, 2))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        reestimate_batch_norm(net, batches)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert net[0].momentum == 0.1


def test_a_module_without_batch_norm_is_named() -> None:
    with pytest.raises(NothingToCompress, match="Linear has no batch norm"):
        reestimate_batch_norm(nn.Linear(2, 2), [torch.randn(2, 2)])


def test_a_frozen_norm_computes_with_running_statistics_and_learns_its_weight() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())
    value = torch.randn(8, 2) * 3
    frozen = freeze_batch_norm(net)
    assert frozen == [net[0]]
    got = net(value)
    torch.testing.assert_close(got, value / (1 + 1e-5))
    got.sum().backward()
    assert net[0].weight.grad is not None
    assert net[0].num_batches_tracked == 0
    unfreeze_batch_norm(frozen)
    assert (net[0].training, net[1].training) == (True, False)
