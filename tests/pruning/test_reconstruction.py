from __future__ import annotations

import copy
import pickle

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import CompressError, Constant, GradualPruning, NothingToCompress
from lightning_compress.pruning.hessians import InputHessians, add_inputs, as_matrices, empty_hessian, layer_inputs
from lightning_compress.pruning.reconstruction import output_error, reconstruct, reconstruct_weight

# By hand, in float64


def correlated(seed: int, samples: int, inputs: int) -> Tensor:
    """Inputs whose channels share a few causes and differ in size."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((samples, max(2, inputs // 3))) @ rng.standard_normal((max(2, inputs // 3), inputs))
    return torch.from_numpy((causes + 0.3 * rng.standard_normal((samples, inputs))) * rng.uniform(0.3, 3.0, inputs))


def obs(weight: np.ndarray, hessian: np.ndarray, sparsity: float, block: int, damping: float):
    """OBS with the exact inverse of what is left of the Hessian, made anew for each column."""
    rows, columns = weight.shape
    damped = hessian + damping * hessian.diagonal().mean() * np.eye(columns)
    inverses = [np.linalg.inv(damped[column:, column:]) for column in range(columns)]
    weight, kept = weight.copy(), np.ones(weight.shape, dtype=bool)
    for column in range(columns):
        if column % block == 0:
            group = range(column, min(column + block, columns))
            cost = np.stack([weight[:, j] ** 2 / inverses[j][0, 0] for j in group], axis=1)
            count = round(sparsity * rows * (column + len(group))) - round(sparsity * rows * column)
            part = np.ones(cost.size, dtype=bool)
            part[np.argsort(cost.ravel(), kind="stable")[:count]] = False
            kept[:, list(group)] = part.reshape(cost.shape)
        for row in range(rows):
            if not kept[row, column]:
                weight[row, column:] -= weight[row, column] / inverses[column][0, 0] * inverses[column][:, 0]
                weight[row, column] = 0.0
    return weight, kept


@given(
    st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 12), st.floats(0.0, 0.95), st.sampled_from([1, 4, 128])
)
@settings(max_examples=40, deadline=None)
def test_it_is_optimal_brain_surgery(seed: int, rows: int, columns: int, sparsity: float, block: int) -> None:
    inputs = correlated(seed, 64, columns)
    weight = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((rows, columns)))
    hessian = 2 * inputs.T @ inputs
    new, kept = reconstruct_weight(weight, hessian, sparsity, block=block)
    expected, mask = obs(weight.numpy(), hessian.numpy(), sparsity, block, 0.01)
    assert np.array_equal(kept.numpy(), mask)
    np.testing.assert_allclose(new.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert int((~kept).sum()) == round(sparsity * weight.numel())


def dropped_lowest(scores: Tensor, count: int) -> Tensor:
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept.view(-1)[scores.flatten().argsort(stable=True)[:count]] = False
    return kept


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_the_error_is_below_magnitude_and_wanda(sparsity: float, seed: int) -> None:
    inputs = correlated(seed, 256, 64)
    weight = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((16, 64)))
    new, _ = reconstruct_weight(weight, inputs.T @ inputs, sparsity)
    ours = (inputs @ (weight - new).T).norm()
    count = round(sparsity * weight.numel())
    wanda = weight.abs() * inputs.norm(dim=0)
    by_row = torch.stack([dropped_lowest(row, round(sparsity * 64)) for row in wanda])
    for kept in (dropped_lowest(weight.abs(), count), dropped_lowest(wanda, count), by_row):
        assert ours < (inputs @ (weight * ~kept).T).norm()


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_the_update_lies_between_the_optimum_of_its_mask_and_no_update(seed: int) -> None:
    inputs = correlated(seed, 128, 20)
    weight = torch.from_numpy(np.random.default_rng(seed + 1).standard_normal((8, 20)))
    new, kept = reconstruct_weight(weight, inputs.T @ inputs, 0.5)
    for row in range(8):
        columns = kept[row].nonzero().flatten()
        target = inputs @ weight[row]
        best = np.linalg.lstsq(inputs[:, columns].numpy(), target.numpy(), rcond=None)[0]
        optimum = np.linalg.norm(target.numpy() - inputs[:, columns].numpy() @ best)
        ours = float((target - inputs @ new[row]).norm())
        assert optimum <= ours * (1 + 1e-6)
    assert (inputs @ (weight - new).T).norm() < (inputs @ (weight * ~kept).T).norm()


def test_one_weight_of_a_row_goes_as_hassibi_and_stork_say() -> None:
    """Pruning the first column alone is their equation 5, the optimum for its mask."""
    inputs = correlated(0, 64, 6)
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 6)))
    weight[0, 0] = 1e-3
    new, kept = reconstruct_weight(weight, inputs.T @ inputs, 1 / 6, damping=0.0)
    assert kept.tolist() == [[False, True, True, True, True, True]]
    best = np.linalg.lstsq(inputs[:, 1:].numpy(), (inputs @ weight[0]).numpy(), rcond=None)[0]
    np.testing.assert_allclose(new[0, 1:].numpy(), best, rtol=1e-8)


# Counts, patterns and precisions


@given(
    st.integers(0, 1000),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.floats(0.0, 0.99),
    st.integers(1, 16),
)
@settings(max_examples=60, deadline=None)
def test_counts_are_exact(seed: int, groups: int, rows: int, columns: int, sparsity: float, block: int) -> None:
    inputs = torch.randn(groups, 10, columns, generator=torch.Generator().manual_seed(seed))  # singular too
    weight = torch.randn(groups, rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    before = weight.clone()
    new, kept = reconstruct_weight(weight, inputs.mT @ inputs, sparsity, block=block)
    assert int((~kept).sum()) == round(sparsity * weight.numel())
    assert not new[~kept].any()
    assert torch.isfinite(new).all()
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("pattern", "block"), [((2, 4), 128), ((1, 4), 8), ((2, 3), 8), ((4, 8), 1)])
def test_n_of_m_is_exact(pattern: tuple[int, int], block: int) -> None:
    keep, of = pattern
    inputs = correlated(0, 200, 24)
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((10, 24)))
    new, kept = reconstruct_weight(weight, inputs.T @ inputs, 1 - keep / of, pattern, block=block)
    assert (kept.view(10, -1, of).sum(dim=-1) == keep).all()
    assert torch.equal(new != 0, kept)
    magnitude = weight.abs().view(10, -1, of).argsort(dim=-1)[..., : of - keep]
    lowest = torch.ones(10, 24 // of, of, dtype=torch.bool).scatter_(-1, magnitude, False).view(10, 24)
    assert (inputs @ (weight - new).T).norm() < (inputs @ (weight * ~lowest).T).norm()


def test_a_block_changes_what_is_chosen_but_not_how_it_is_made_up_for() -> None:
    inputs = correlated(3, 200, 12)
    weight = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, kept = reconstruct_weight(weight, inputs.T @ inputs, 0.5, (2, 4), block=12)
    pieces, same = reconstruct_weight(weight, inputs.T @ inputs, 0.5, (2, 4), block=4)
    assert torch.equal(kept, same)
    torch.testing.assert_close(whole, pieces)


def test_bfloat16_is_computed_in_float32() -> None:
    inputs = correlated(0, 200, 16).float()
    weight = torch.randn(8, 16).bfloat16()
    new, kept = reconstruct_weight(weight, inputs.T @ inputs, 0.5)
    exact, mask = reconstruct_weight(weight.float(), inputs.T @ inputs, 0.5)
    assert new.dtype == torch.bfloat16
    assert torch.equal(kept, mask)
    assert torch.equal(new, exact.bfloat16())


def test_dead_inputs_go_first_and_move_nothing() -> None:
    inputs = correlated(0, 100, 8)
    inputs[:, [2, 5]] = 0.0
    weight = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[:, [2, 5]] += 10.0
    new, kept = reconstruct_weight(weight, inputs.T @ inputs, 0.25)
    assert kept.all(dim=0).tolist() == [True, True, False, True, True, False, True, True]
    torch.testing.assert_close(new, weight * kept, rtol=0, atol=0)
    fewer, kept = reconstruct_weight(weight, inputs.T @ inputs, 0.125)
    assert torch.equal(fewer, weight * kept)
    assert kept[:, [2, 5]].sum() == 6


@pytest.mark.parametrize("damping", [0.0, 1e-9, 0.01])
def test_a_singular_hessian(damping: float) -> None:
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))  # rank 3
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    new, kept = reconstruct_weight(weight, inputs.T @ inputs, 0.5, damping=damping)
    assert int((~kept).sum()) == 128
    assert torch.isfinite(new).all()
    assert output_error(weight, new, inputs.T @ inputs) < 0.1


def test_what_cannot_be_solved_is_named() -> None:
    weight = torch.randn(2, 2)
    with pytest.raises(CompressError, match=r"not positive definite even with damping 10 .*more inputs"):
        reconstruct_weight(weight, torch.tensor([[1.0, 50.0], [50.0, 1.0]]))
    with pytest.raises(CompressError, match="Hessian of the inputs hold NaN"):
        reconstruct_weight(weight, torch.full((2, 2), float("inf")))
    with pytest.raises(CompressError, match="weights hold NaN"):
        reconstruct_weight(weight * float("nan"), torch.eye(2))
    with pytest.raises(ValueError, match=r"needs a Hessian \(1, 2, 2\), got \(1, 3, 3\)"):
        reconstruct_weight(weight, torch.eye(3))
    with pytest.raises(ValueError, match=r"multiple of 4, got 2"):
        reconstruct_weight(weight, torch.eye(2), 0.5, (2, 4))
    with pytest.raises(ValueError, match=r"1 <= keep < of, got \(4, 4\)"):
        reconstruct_weight(weight, torch.eye(2), 0.0, (4, 4))
    with pytest.raises(ValueError, match=r"2:4 gives sparsity 0\.5, got 0\.6"):
        reconstruct_weight(weight, torch.eye(2), 0.6, (2, 4))


# Inputs of layers

CONVOLUTIONS = [
    (nn.Conv2d(4, 6, 3, padding=1), (5, 4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(2, 0)), (3, 4, 9, 8)),
    (nn.Conv2d(4, 4, 3, groups=4, padding="same", padding_mode="reflect"), (3, 4, 6, 6)),
    (nn.Conv2d(6, 4, (3, 1), dilation=(2, 1), groups=2, padding="same"), (3, 6, 5, 5)),
    (nn.Conv1d(4, 6, 3, padding=2, groups=2, padding_mode="circular"), (5, 4, 9)),
    (nn.Conv1d(4, 6, 4, padding="valid", stride=3), (5, 4, 11)),
    (nn.Conv2d(4, 6, 3), (4, 6, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda value: str(value))
def test_a_convolution_is_a_linear_of_its_unfolded_inputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    outputs = layer(value) - layer.bias.view(-1, *[1] * len(layer.kernel_size))
    (inputs,) = layer_inputs(layer, value)
    products = inputs @ as_matrices(layer, layer.weight).mT  # groups, images x positions, outputs
    images = outputs if outputs.dim() == len(layer.kernel_size) + 2 else outputs.unsqueeze(0)
    by_group = images.flatten(2).transpose(1, 2).reshape(-1, layer.groups, layer.out_channels // layer.groups)
    torch.testing.assert_close(products.transpose(0, 1), by_group, atol=1e-5, rtol=1e-5)


def test_images_are_unfolded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, value = nn.Conv2d(3, 4, 3), torch.randn(7, 3, 8, 8)
    (whole,) = layer_inputs(layer, value)
    monkeypatch.setitem(layer_inputs.__globals__, "CHUNK", 2 * 3 * 64 * 9)
    pieces = list(layer_inputs(layer, value))
    assert [piece.shape[1] for piece in pieces] == [72, 72, 72, 36]
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_the_mean_is_of_all_inputs_in_float32() -> None:
    layer = nn.Linear(5, 3).bfloat16()
    hessian = empty_hessian(layer, layer.weight)
    batches = [torch.randn(2, 4, 5).bfloat16(), torch.randn(9, 5).bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        for batch in batches:
            add_inputs(hessian, batch.reshape(1, -1, 5))
    rows = torch.cat([batch.reshape(-1, 5) for batch in batches]).double()
    assert hessian.sums.dtype == torch.float32
    torch.testing.assert_close(hessian.mean[0].double(), 2 * rows.T @ rows / 17, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_of_a_watched_layer_are_their_own() -> None:
    layer, hessians = nn.Linear(3, 2), InputHessians()
    hessians.attach(layer, {"weight": layer.weight})
    hessians.start(["weight"])
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other(torch.ones(4, 3))
    with torch.no_grad():
        layer(torch.ones(4, 3))
    assert int(hessians["weight"].samples) == 0
    layer(input=torch.ones(4, 3))
    assert int(hessians["weight"].samples) == 4
    hessians.detach()
    assert not layer._forward_pre_hooks
    assert not [name for name in layer.__dict__ if "hessian" in name]


# Modules


def network(**options: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8 * 4 * 4, 24),
        nn.Tanh(),
        nn.Linear(24, 3),
    )


def images(count: int = 64, seed: int = 1) -> Tensor:
    noise = torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 3, 1, 1) + 0.1 * noise


def modes(module: nn.Module) -> list[bool]:
    return [child.training for child in module.modules()]


@pytest.mark.parametrize("sequential", [True, False])
def test_a_module_is_pruned_in_place(sequential: bool) -> None:
    net = network()
    net[3].eval()
    before, mode = copy.deepcopy(net.state_dict()), modes(net)
    masks = reconstruct(net, images().split(16), 0.7, sequential=sequential)
    assert list(masks) == ["0.weight", "3.weight", "7.weight"]
    weights = {name: net.get_parameter(name) for name in masks}
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == round(
        0.7 * sum(weight.numel() for weight in weights.values())
    )
    for name, weight in weights.items():
        assert torch.equal(weight != 0, masks[name])
        assert abs(int((weight == 0).sum()) - 0.7 * weight.numel()) <= 1.5
    assert [n for n in before if n not in masks and not torch.equal(before[n], net.state_dict()[n])] == []
    assert modes(net) == mode
    assert not any(child._forward_pre_hooks or "_input_hessian" in child.__dict__ for child in net.modules())


@torch.no_grad()
def moved(net: nn.Module, dense: nn.Module) -> float:
    return float((net.eval()(images(256, 2)) - dense(images(256, 2))).norm())


def test_outputs_move_less_than_under_magnitude_and_less_with_the_order_kept() -> None:
    dense, value = network().eval(), images(256)
    errors = {}
    for name, options in {"sequential": {}, "at once": {"sequential": False}}.items():
        net = network()
        reconstruct(net, value.split(64), 0.6, **options)
        errors[name] = moved(net, dense)
    net = network()
    for index in (0, 3, 7):
        weight = net[index].weight
        with torch.no_grad():
            weight *= dropped_lowest(weight.abs(), round(0.6 * weight.numel()))
    errors["magnitude"] = moved(net, dense)
    assert errors["sequential"] < errors["at once"] < 0.75 * errors["magnitude"]


def test_later_layers_are_calibrated_on_pruned_earlier_ones() -> None:
    """The last selected layer's weight is that of `reconstruct_weight` on what it is given once the others are done."""
    net = network()
    reconstruct(net, images().split(16), 0.5)
    given = network().eval()
    given[0].weight.data.copy_(net[0].weight)
    given[3].weight.data.copy_(net[3].weight)
    rows = given[:7](images()).detach()
    expected, _ = reconstruct_weight(given[7].weight, 2 * rows.T @ rows / 64, 0.5)
    torch.testing.assert_close(net[7].weight.detach(), expected, rtol=1e-3, atol=1e-4)


def test_n_of_m_runs_along_input_channels() -> None:
    net = network()
    masks = reconstruct(net, [images()], pattern=(2, 4), exclude=["0"])
    assert (masks["3.weight"].movedim(1, -1).sum(dim=-1) == 2).all()
    assert (masks["7.weight"].view(24, -1, 4).sum(dim=-1) == 2).all()


class Shared(nn.Module):
    """Forward order differs from registration; one weight serves twice, one layer never."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 2)
        self.last, self.first, self.never, self.twin = (nn.Linear(6, 6) for _ in range(4))
        self.twin.weight = self.first.weight
        self.norm = nn.LayerNorm(6)

    def forward(self, value: Tensor, scale: float = 1.0) -> Tensor:
        value = self.first(value * scale)
        return self.head(self.last(self.norm(self.twin(input=torch.tanh(value)))))


def test_shared_weights_keyword_batches_and_layers_that_never_run() -> None:
    net = Shared()
    dense = net.never.weight.detach().clone()
    value = torch.randn(40, 6)
    masks = reconstruct(net, [value, (value, 2.0), [value], {"value": value, "scale": 0.5}], 0.5, exclude=["head"])
    assert list(masks) == ["last.weight", "first.weight", "never.weight"]
    assert torch.equal(masks["never.weight"], dropped_lowest(dense.abs(), 18))
    assert torch.equal(net.never.weight, dense * masks["never.weight"])
    assert net.twin.weight is net.first.weight


def test_a_compiled_module_is_seen_too() -> None:
    plain, compiled = network(), network()
    compiled.compile(backend="eager")
    compiled(images())
    plain(images())
    expected = reconstruct(plain, [images()])
    masks = reconstruct(compiled, [images()])
    assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict())


def test_bad_input_is_named() -> None:
    net = network()
    with pytest.raises(ValueError, match="at least one batch"):
        reconstruct(net, [])
    with pytest.raises(ValueError, match=r"fraction of zeros in \[0, 1\), got 1\.5"):
        reconstruct(net, [images()], 1.5)
    with pytest.raises(ValueError, match=r"2:4 needs dimension 1 of '0\.weight'.*got 2; exclude.*exclude=\['0'\]"):
        reconstruct(net, [images()], pattern=(2, 4))
    with pytest.raises(CompressError, match=r"'0\.weight' cannot be reconstructed: the Hessian of the inputs hold NaN"):
        reconstruct(net, [images() * float("nan")])
    with pytest.raises(NothingToCompress, match=r"none of the selected layers runs.*never"):
        reconstruct(Shared(), [torch.randn(4, 6)], include=["never"])
    assert modes(net) == [True] * 11
    assert not any(child._forward_pre_hooks for child in net.modules())


def test_a_fine_tune_with_constant_magnitude_pruning_keeps_the_zeros() -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    module, labels = Module(), torch.arange(64) % 3
    masks = reconstruct(module.net, images().split(16), 0.8)
    pruning = GradualPruning(Constant(0.8), window=(0, 2))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=[pruning], **quiet)
    before = {name: module.net.get_parameter(name).detach().clone() for name in masks}
    trainer.fit(module, DataLoader(TensorDataset(images(), labels), batch_size=8))
    for name, mask in masks.items():
        weight = module.net.get_parameter(name)
        assert torch.equal(weight != 0, mask)
        assert not torch.equal(weight, before[name])
