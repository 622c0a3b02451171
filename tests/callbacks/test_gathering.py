"""Criteria are given the gradients that the optimizer was to follow, and nothing else, whoever steps it and how."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_compress import Constant, GradualPruning
from lightning_compress.errors import CompressError
from lightning_compress.pruning.criteria import fisher, magnitude, movement, random, taylor, wanda
from lightning_compress.pruning.patterns import Unstructured
from lightning_compress.pruning.regrowth import SET, RigL
from tests.conformance.running import traces, train, trainer_for

ROOT = Path(__file__).parents[2]
WORLD, ROWS, BATCH = 2, 48, 8  # 6 steps an epoch


def data() -> TensorDataset:
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, 6, generator=source)
    return TensorDataset(inputs, inputs[:, :3].argmax(dim=1))


class Plain(L.LightningModule):
    """Two layers under SGD, whose every gradient is noted before anybody changes it."""

    batch = BATCH

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, value: Tensor) -> Tensor:
        return self.net(value)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_dataloader(self) -> DataLoader[Any]:
        rows = data()
        part = DistributedSampler(rows, shuffle=False) if torch.distributed.is_initialized() else None
        return DataLoader(rows, batch_size=self.batch, sampler=part)

    def expected(self, weight: Tensor, rows: slice) -> Tensor:
        """The gradient of the first layer's weight, from the data and the other parameters alone."""
        inputs, labels = (tensor[rows] for tensor in data().tensors)
        leaf = weight.clone().requires_grad_()
        hidden = torch.tanh(inputs @ leaf.T + self.net[0].bias.detach())
        loss = cross_entropy(hidden @ self.net[2].weight.detach().T + self.net[2].bias.detach(), labels)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient


class Manual(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = Plain.training_step(self, batch, 0)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Raw(Manual):
    def optimizers(self, use_pl_optimizer: bool = False) -> Any:
        return super().optimizers(use_pl_optimizer=False)


class Closure(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class RawScaled(Manual):
    """A gradient scaler of the user's own around a raw fused optimizer."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.scaler = getattr(self, "scaler", None) or torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.scaler.scale(self.loss(batch)).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5, fused=True)


class TwoOptimizers(Manual):
    """Each layer has its own; they take turns."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[index].parameters(), lr=0.5) for index in (0, 2)], []


def following(module: Plain, callback: GradualPruning) -> L.Callback:
    """Notes, before each batch, the gradient that the batch will give, by `expected`."""

    class Follows(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            weight = module.net[0].weight.detach().clone()
            start = batch_idx * module.batch
            module.seen.append((weight, module.expected(weight, slice(start, start + module.batch))))

    return Follows()


def gathering(criterion: Any, begin: int = 20, **options: Any) -> GradualPruning:
    """A callback whose window begins after the run's 6 steps: it only gathers."""
    return GradualPruning(Constant(0.5), (begin, begin + 1), include=["net.0"], criterion=criterion, **options)


def sums(callback: GradualPruning, kind: str) -> Tensor:
    return callback.gathering.statistics.sums[kind]["net.0.weight"]


def fit(module: L.LightningModule, callbacks: list[L.Callback], folder: Path, **options: Any) -> None:
    train(module, callbacks, folder, **{"max_epochs": 1, "fast_dev_run": ROWS // module.batch, **options})


def seeded(kind: type[Plain]) -> Plain:
    torch.manual_seed(3)
    return kind()


@pytest.mark.parametrize("kind", [Plain, Manual, Raw, Closure, RawScaled, TwoOptimizers])
def test_the_gathered_gradient_is_that_of_every_step(kind: type[Plain], tmp_path: Path) -> None:
    for criterion, name, of in (
        (taylor, "gradient", lambda w, g: g),
        (fisher, "squared_gradient", lambda w, g: g * g),
        (movement, "movement", lambda w, g: -w * g),
    ):
        module, callback = seeded(kind), gathering(criterion)
        fit(module, [callback, following(module, callback)], tmp_path)
        steps = 3 if kind is TwoOptimizers else 6  # Lightning ends the run after six steps of any optimizer
        assert len(module.seen) == steps
        assert callback.gathering.statistics.steps == {"net.0.weight": steps}
        torch.testing.assert_close(sums(callback, name), sum(of(w, g) for w, g in module.seen), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"gradient_clip_val": 1e-3}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}]
)
def test_it_is_not_clipped(options: dict[str, Any], tmp_path: Path) -> None:
    module, callback = seeded(Plain), gathering(movement)
    fit(module, [callback, following(module, callback)], tmp_path, **options)
    torch.testing.assert_close(sums(callback, "movement"), sum(-w * g for w, g in module.seen), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [None, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=1)], ids=["clipped", "LBFGS"])
def test_it_is_not_masked_even_where_masks_are_applied_to_gradients(make: Any, tmp_path: Path) -> None:
    """What is out goes on being scored, or could never come back."""
    module = seeded(Plain)
    if make is not None:
        module.configure_optimizers = lambda: make(module.parameters())
    callback = GradualPruning(
        Constant(0.75), window=(1, 12), frequency=11, include=["net.0"], criterion=magnitude, pattern=RigL()
    )
    fit(module, [callback], tmp_path, **({} if make else {"gradient_clip_val": 1e-3}))
    gathered, mask = sums(callback, "gradient"), callback.masks["net.0.weight"]
    assert bool((gathered[~mask] != 0).all())
    assert not module.net[0].weight.grad[~mask].any()


def test_accumulated_batches_are_one_gradient(tmp_path: Path) -> None:
    class Half(Plain):
        batch = BATCH // 2

    whole, halves = gathering(fisher), gathering(fisher)
    fit(seeded(Plain), [whole], tmp_path)
    fit(seeded(Half), [halves], tmp_path, accumulate_grad_batches=2)
    assert halves.gathering.statistics.steps == whole.gathering.statistics.steps == {"net.0.weight": 6}
    torch.testing.assert_close(sums(halves, "squared_gradient"), sums(whole, "squared_gradient"))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("base", [Plain, Manual])
def test_a_gradient_scaler_leaves_neither_its_scale_nor_an_overflow(
    base: type[Plain], fused: bool, tmp_path: Path
) -> None:
    """Lightning's own fp16 path, on the CPU: the third batch overflows and its step is skipped."""

    class Overflows(base):  # type: ignore[misc, valid-type]
        batches = 0

        def forward(self, value: Tensor) -> Tensor:
            self.batches += 1
            return self.net(value) * (float("inf") if self.batches == 3 else 1.0)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5, fused=fused)

    class Full(MixedPrecision):
        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)  # exact gradients, so that the scale can be told

    module, callback = seeded(Overflows), gathering(movement)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    plugin = Full("16-mixed", "cpu", scaler)
    fit(module, [callback, following(module, callback)], tmp_path, plugins=[plugin])
    kept = [pair for batch, pair in enumerate(module.seen) if batch != 2]
    assert callback.gathering.statistics.steps == {"net.0.weight": 5}
    torch.testing.assert_close(sums(callback, "movement"), sum(-w * g for w, g in kept), rtol=1e-4, atol=1e-6)


def test_a_weight_that_is_out_is_scored_with_the_value_it_had(tmp_path: Path) -> None:
    module = seeded(Plain)
    callback = GradualPruning(Constant(0.5), window=(1, 12), frequency=11, include=["net.0"], criterion=movement)
    fit(module, [callback, following(module, callback)], tmp_path)
    mask, last = callback.masks["net.0.weight"], callback.gathering.last_values["net.0.weight"]
    score, live = torch.zeros_like(last), module.seen[0][0]
    for step, (weight, gradient) in enumerate(module.seen):
        live = weight if step < 2 else torch.where(mask, weight, last)
        score -= (weight if step == 0 else live if step > 1 else torch.where(mask, weight, last)) * gradient
    torch.testing.assert_close(sums(callback, "movement"), score, rtol=1e-4, atol=1e-6)
    assert bool(last[~mask].all())


def test_a_weight_that_movement_brings_back_has_its_last_value_and_no_moments(tmp_path: Path) -> None:
    def alternate(movement: Tensor, step: int) -> Tensor:  # the first half goes, then the second
        ascending = torch.arange(float(movement.numel())).view(movement.shape)
        return ascending if step < 4 else -ascending

    class Watches(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if callback.clock.steps == 1:
                self.last = callback.gathering.last_values["net.0.weight"].clone()
            if callback.clock.steps == 4:
                self.weight = pl_module.net[0].weight.detach().clone()
                self.moments = trainer.optimizers[0].state[pl_module.net[0].weight]["exp_avg"].clone()

    module, watches = seeded(Plain), Watches()
    module.configure_optimizers = lambda: torch.optim.Adam(module.parameters(), lr=0.01)
    callback = GradualPruning(Constant(0.5), window=(1, 4), frequency=3, include=["net.0"], criterion=alternate)
    fit(module, [callback, watches], tmp_path, fast_dev_run=False)
    assert torch.equal(watches.weight.flatten()[:24], watches.last.flatten()[:24])
    assert not watches.weight.flatten()[24:].any()
    assert not watches.moments.flatten()[:24].any()


@pytest.mark.parametrize("kind", [Plain, Raw])
def test_no_trace_is_left(kind: type[Plain], tmp_path: Path) -> None:
    module = seeded(kind)
    before = traces(module.net)
    callback = gathering(lambda weight, gradient, input_norm: weight)
    trainer = trainer_for(tmp_path, [callback], max_epochs=1, fast_dev_run=2)
    trainer.fit(module)
    assert callback.gathering.statistics.steps == {"net.0.weight": 2}
    after = traces(module.net, trainer.optimizers)
    assert not any(after.pop("optimizer 0"))
    assert after == before


@pytest.mark.slow
def test_activations_are_gathered_from_a_compiled_model(tmp_path: Path) -> None:
    """Without a graph break; one program more, for the first batch after an update."""
    masks = []
    for compiled in (False, True):
        module = seeded(Plain)
        if compiled:
            module.net = torch.compile(module.net, backend="eager", fullgraph=True)
        callback = GradualPruning(Constant(0.5), (2, 4), 2, include=["*0"], criterion=wanda)
        fit(module, [callback], tmp_path, fast_dev_run=False)
        masks.append(callback.masks["net.0.weight"])
    assert torch.equal(*masks)
    torch._dynamo.reset()


# What cannot work


@pytest.mark.parametrize("criterion", [taylor, fisher, movement, wanda], ids=lambda c: c.__name__)
def test_what_needs_steps_cannot_score_at_the_start(criterion: Any, tmp_path: Path) -> None:
    callback = GradualPruning(Constant(0.5), window=(0, 3), criterion=criterion)
    with pytest.raises(ValueError, match=r"needs .*, which no step has given yet .* step 0; .* window=\(1, 3\)"):
        fit(seeded(Plain), [callback], tmp_path, fast_dev_run=False)


def test_an_unknown_parameter_is_refused_at_construction() -> None:
    with pytest.raises(TypeError, match=r"asks for hessian; .* activation, gradient, input_norm, .* weight"):
        GradualPruning(criterion=lambda weight, hessian: weight)


@pytest.mark.parametrize(
    ("criterion", "error", "message"),
    [
        (lambda weight: weight.sum(), ValueError, r"float scores of shape \(8, 6\) for 'net.0.weight', got .* \(\)"),
        (lambda weight: weight > 0, ValueError, "got torch.bool"),
        (lambda weight: weight / 0, CompressError, "NaN or infinite scores for 'net.0.weight' at optimizer step 2"),
        (lambda weight: torch.rand_like(weight), CompressError, "same scores each time it is called in one update"),
    ],
    ids=["shape", "bool", "infinite", "other scores at each call"],
)
def test_scores_that_decide_nothing_are_refused(criterion: Any, error: type, message: str, tmp_path: Path) -> None:
    callback = GradualPruning(Constant(0.5), window=(2, 4), criterion=criterion)
    with pytest.raises(error, match=message):
        fit(seeded(Plain), [callback], tmp_path, fast_dev_run=False)
    assert callback.masks == {}


def test_a_frozen_weight_is_named(tmp_path: Path) -> None:
    module = seeded(Plain)
    module.net[0].weight.requires_grad_(False)
    with pytest.raises(CompressError, match=r"the gradient of 'net.0.weight', which has had none .* exclude it"):
        fit(module, [GradualPruning(Constant(0.5), (2, 4), criterion=taylor)], tmp_path, fast_dev_run=False)


# Two processes

CASES: dict[str, tuple[Any, Any]] = {
    "taylor": (taylor, Unstructured()),
    "fisher": (fisher, Unstructured()),
    "wanda": (wanda, Unstructured()),
    "movement": (movement, Unstructured()),
    "random": (random, Unstructured()),
    "RigL": (magnitude, RigL()),
    "SET": (magnitude, SET()),
}


def masks_by(processes: int, folder: Path) -> dict[str, dict[str, Tensor]]:
    from lightning.pytorch.strategies import DDPStrategy

    results = {}
    for name, (criterion, pattern) in CASES.items():
        module = seeded(Plain)
        module.batch = BATCH // processes
        callback = GradualPruning(
            Constant(0.5), (2, 6), frequency=2, include=["net.0", "net.2"], criterion=criterion, pattern=pattern
        )
        parallel = (
            {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": processes} if processes > 1 else {}
        )
        train(module, [callback], folder, max_epochs=1, **parallel)
        results[name] = {**callback.masks, "history": torch.tensor(callback.history)}
    return results


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.save(masks_by(WORLD, folder), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """Every case in turn, in one launch of two processes."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD), "NODE_RANK": "0"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.test_gathering", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    texts = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(texts)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.distributed
def test_two_processes_make_the_masks_of_one(two_ranks: Any, tmp_path: Path) -> None:
    one, (first, second) = masks_by(1, tmp_path), two_ranks
    for name in CASES:
        assert len(one[name]["history"]) == 3
        for key, value in one[name].items():
            assert torch.equal(first[name][key], second[name][key]), (name, key)
            assert torch.equal(first[name][key], value), (name, key)


if __name__ == "__main__":
    work(int(os.environ["LOCAL_RANK"]), Path(sys.argv[1]))
