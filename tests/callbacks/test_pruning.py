from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress.callbacks.masking as masking_module
from lightning_compress import CompressError, Constant, GradualPruning
from lightning_compress.callbacks.masking import ELEMENTWISE
from lightning_compress.pruning.criteria import wanda
from lightning_compress.pruning.masks import apply_mask


class Net(L.LightningModule):
    """Counts masked weights that its forward saw as non-zero."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.make_optimizer = make_optimizer
        self.pruning: GradualPruning | None = None
        self.violations = 0

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.pruning is not None:
            for name, mask in self.pruning.masks.items():
                self.violations += int((self.get_parameter(name)[~mask] != 0).sum())
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class GradientNoise(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(torch.randn_like(parameter.grad))


def fit(module: Net, callbacks: list[L.Callback], **options: Any) -> None:
    torch.manual_seed(0)
    module.pruning = next(c for c in callbacks if isinstance(c, GradualPruning))
    data = TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))
    trainer = L.Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, DataLoader(data, batch_size=8))


def pruning() -> GradualPruning:
    return GradualPruning(0.7, window=(4, 20), frequency=4)


OPTIMIZERS = [
    pytest.param(lambda p, kind=kind: kind(p, lr=0.05, weight_decay=0.1), id=kind.__name__)
    for kind in sorted(ELEMENTWISE, key=lambda kind: kind.__name__)
] + [
    pytest.param(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True), id="nesterov"),
    pytest.param(lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True, fused=True), id="fused"),
    pytest.param(lambda p: torch.optim.Adafactor(p, lr=0.05), id="Adafactor"),
    pytest.param(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4), id="LBFGS"),
]


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_no_forward_sees_a_masked_weight(make_optimizer: Any) -> None:
    callback, module = pruning(), Net(make_optimizer)
    fit(module, [callback], max_steps=-1)
    assert module.violations == 0
    zeros = sum(int((module.get_parameter(name) == 0).sum()) for name in callback.masks)
    assert zeros == round(0.7 * (8 * 16 + 16 * 16))


@pytest.mark.parametrize("place", [0, 1])
def test_gradients_changed_by_others_do_not_bring_weights_back(place: int) -> None:
    module = Net(lambda p: torch.optim.AdamW(p, lr=0.05))
    callbacks: list[L.Callback] = [pruning()]
    callbacks.insert(place, GradientNoise())
    fit(module, callbacks)
    assert module.violations == 0


@pytest.mark.parametrize(
    ("others", "options", "passes"),
    [
        ([], {}, 1),
        ([GradientNoise()], {}, 2),
        ([], {"gradient_clip_val": 1.0}, 2),
    ],
    ids=["weights alone", "a hook reads gradients", "clipping reads gradients"],
)
def test_gradients_are_masked_only_where_somebody_reads_them(
    others: list[L.Callback], options: dict[str, Any], passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def counting(value: torch.Tensor, mask: torch.Tensor) -> None:
        counted.append(1)
        apply_mask(value, mask)

    monkeypatch.setattr(masking_module, "apply_mask", counting)
    callback = GradualPruning(Constant(0.5), window=(0, 32), frequency=32)
    fit(Net(lambda p: torch.optim.AdamW(p, lr=0.05)), [callback, *others], **options)
    layers, at_start, at_update = 2, 2, 1  # the first masks are applied when made and once more
    assert len(counted) == layers * (32 * passes + at_start + at_update)


def test_masking_gradients_changes_no_kept_weight() -> None:
    class Reads(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            pass

    trained = []
    for others in ([], [Reads()]):
        torch.manual_seed(1)
        module = Net(lambda p: torch.optim.AdamW(p, lr=0.05))
        fit(module, [pruning(), *others])
        trained.append(module.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_masked_weights_are_not_clipped_for() -> None:
    """Clipping by norm must see only what can move: the update equals the one of the kept weights alone."""
    norms: list[float] = []

    class Reads(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                norms.append(float(torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))))

    callback = GradualPruning(Constant(0.9), window=(0, 32))
    module = Net(lambda p: torch.optim.SGD(p, lr=0.01))
    fit(module, [callback, Reads()], gradient_clip_val=1e-3)
    for name, mask in callback.masks.items():
        gradient = module.get_parameter(name).grad
        assert gradient is not None
        assert bool((gradient[~mask] == 0).all())
    # had dead weights taken part, the live ones would be left with less than the whole norm
    assert norms[-1] == pytest.approx(1e-3, rel=1e-3)


def test_a_run_stopped_before_the_windows_end_warns() -> None:
    module = Net(lambda parameters: torch.optim.SGD(parameters, 0.1))
    stop = type(
        "Stop", (L.Callback,), {"on_train_batch_end": lambda self, trainer, *_: setattr(trainer, "should_stop", True)}
    )
    with pytest.warns(UserWarning, match="GradualPruning did not finish"):
        fit(module, [GradualPruning(), stop()])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": "0.9"}, TypeError, "sparsity must be a function or a number, got '0.9'"),
        ({"criterion": "magnitude"}, TypeError, "criterion must be a function, got 'magnitude'"),
        ({"window": (0, 1)}, ValueError, r"\(0, 1\) is optimizer steps 0 and 1; write \(0\.0, 1\.0\)"),
    ],
)
def test_what_users_write_by_mistake_is_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fit(Net(lambda p: torch.optim.AdamW(p, lr=0.05)), [GradualPruning(**options)])


def test_a_layer_whose_activations_nobody_sees_is_named_before_the_first_step() -> None:
    module = Net(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    module.attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(CompressError, match=r"exclude=\['attention.out_proj'\]"):
        fit(module, [GradualPruning(0.5, window=(1, 3), include=["*"], criterion=wanda)])
    fit(module, [GradualPruning(0.5, (1, 3), include=["*"], exclude=["attention.out_proj"], criterion=wanda)])
