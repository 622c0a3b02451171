"""The conformance table: one row a callback. A new callback is one more row here, and nothing else.

A row that cannot keep a promise says so, with the reason, in `excused`; a promise is never skipped in silence.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    CompressionMonitor,
    Distillation,
    GradualPruning,
    LotteryRewinding,
    LowRank,
    QuantizationAwareTraining,
    ReadyGate,
    Reconstruction,
    SparsityRegularization,
    Steps,
    StructuredPruning,
    WeightSharing,
    callbacks,
    fake_quantized,
)
from lightning_compress.distillation.details import Details as Teaching
from lightning_compress.distillation.features import feature_mse
from lightning_compress.distillation.gradient_terms import GradientTerm
from lightning_compress.distillation.own_teachers import MeanTeacher
from lightning_compress.distillation.terms import LayerTerm
from lightning_compress.pruning.gates import HardConcrete
from lightning_compress.quantization.details import Details
from lightning_compress.quantization.noise import Noise
from lightning_compress.quantization.ranges import percentile
from tests.conformance.modules import Adversaries, Bert, Causal, LateSetup, Small, network
from tests.conformance.running import Run
from tests.learned_grids import Bounds as LearnedBounds
from tests.learned_grids import Step as LearnedStep

Make = Callable[[L.LightningModule], list[L.Callback]]

# The table's promises, so that a typo in a row's excuses or in a test is an error.
PROMISES = (
    "acts on any module",
    "keys, names and classes stay",
    "no trace after fit",
    "no trace after an exception",
    "checkpoints are plain",
    "a killed run resumes exactly",
    "resumes exactly from any step",
    "accumulation counts optimizer steps",
    "accumulation equals the larger batch",
    "manual equals automatic",
    "copies, pickles and exports between batches",
    "pickles after fit",
    "torch.compile",
    "precisions",
    "two processes equal one",
    "every order is the same",
    "weight averaging",
    "off is plain",
    "val_loss is clean",
    "a second fit",
    "more epochs with the same Trainer",
    "logs",
    "any kind of Trainer",
    "evaluation sees the compressed model",
    "clipping sees masked gradients",
    "NaN weights are named",
)


def _nothing(run: Run) -> dict[str, Tensor]:
    return {}


def _as_it_is(run: Run) -> AbstractContextManager[Any]:
    return nullcontext()


@dataclass(frozen=True)
class Row:
    """One callback in the table.

    Args:
        name: how the row is called in the tests' names.
        callback: its class.
        make: module -> fresh callbacks of this row, with windows that fit 16 optimizer steps.
        default: module -> the same with the callback's default options.
        off: the same switched off, each way there is.
        acted: raises unless a run shows that the callback did its work.
        memory: what of its state a resumed run must have again, to the bit.
        compressed: makes a trained module compute, in the block, as in the run's own validation.
        logs: names of numbers that reach every logger.
        phases: number of programs the forward runs through; each may be compiled once.
        excused: promise -> why it says nothing about this callback.
    """

    name: str
    callback: type[L.Callback]
    make: Make
    default: Make
    off: tuple[Make, ...]
    acted: Callable[[Run], None]
    logs: frozenset[str]
    memory: Callable[[Run], dict[str, Tensor]] = _nothing
    compressed: Callable[[Run], AbstractContextManager[Any]] = _as_it_is
    phases: int = 1
    excused: Mapping[str, str] = field(default_factory=dict)


# What is true of every callback that looks at no weight.
NO_DECISION = {"NaN weights are named": "it takes no decision from weights; the loss is NaN, as without it"}


# Pruning


def pruned(run: Run, sparsity: float = 0.8, by: type[L.Callback] = GradualPruning) -> None:
    masks: dict[str, Tensor] = run.of(by).masks
    weights = run.weights
    total = sum(mask.numel() for mask in masks.values())
    zeros = sum(int((weights[name] == 0).sum()) for name in masks)
    assert total > 0
    assert zeros == round(sparsity * total)
    assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())
    for name, seen in run.seen.items():  # the last forward already had the zeros
        assert f"{name}.weight" not in masks or not seen.weight[~masks[f"{name}.weight"]].any()


def masks(run: Run) -> dict[str, Tensor]:
    return dict(run.of(GradualPruning).masks)


def pruning(module: L.LightningModule) -> list[L.Callback]:
    return [GradualPruning(0.8, window=(2, 8), frequency=2)]


# Lottery

ROUNDS = Steps(((0.0, 0.4), (0.5, 0.8)))  # at steps 2 and 6


def lottery(module: L.LightningModule) -> list[L.Callback]:
    return [LotteryRewinding(to=1), GradualPruning(ROUNDS, window=(2, 8), frequency=2)]


def rewound(run: Run) -> None:
    pruned(run)
    assert [step for step, _ in run.of(LotteryRewinding).rounds] == [2, 6]


# Reconstruction


def reconstructed(run: Run) -> None:
    pruned(run, 0.5, by=Reconstruction)
    done = run.of(Reconstruction)
    assert [step for step, *_ in done.history] == [6]
    assert all(0.0 <= error < 1.0 for error in done.errors.values())
    assert max(done.errors.values()) > 0.0


def reconstruction(module: L.LightningModule) -> list[L.Callback]:
    return [Reconstruction(0.5, at=6, batches=4)]


# Regularization


def regularized(run: Run) -> None:
    pruned(run, by=SparsityRegularization)
    assert [step for step, *_ in run.of(SparsityRegularization).history] == [6]


def regularization(module: L.LightningModule) -> list[L.Callback]:
    return [SparsityRegularization(HardConcrete(), weight=1e-3, sparsity=0.8, window=(2, 6))]


# Structured pruning


def shrunken(run: Run) -> None:
    callback = run.of(StructuredPruning)
    assert callback.complete
    assert callback.history[-1][2] >= 0.4
    full, weights = callback.traced.shapes, run.weights
    assert all(weights[name].dim() == len(shape) for name, shape in full.items())
    assert sum(weights[name].numel() for name in full) < sum(shape.numel() for shape in full.values())


def survivors(run: Run) -> dict[str, Tensor]:
    return dict(run.of(StructuredPruning).traced.survivors.kept)


def structured(module: L.LightningModule) -> list[L.Callback]:
    return [StructuredPruning(0.4, window=(2, 8), frequency=2)]


# Low rank


def of_rank_three(run: Run) -> None:
    """Plain layers again, by the end of the run, each of the rank that it was trained at."""
    callback, weights = run.of(LowRank), run.weights
    assert callback.ranks
    assert set(callback.ranks.values()) == {3}
    for name in callback.ranks:
        weight = weights[f"{name}.weight"]
        values = torch.linalg.svdvals(weight.double().flatten(1))
        assert float(values[2]) > 1e-3
        assert float(values[3]) < {torch.bfloat16: 2**-5}.get(weight.dtype, 1e-5) * float(values[0])


def low_rank(module: L.LightningModule) -> list[L.Callback]:
    return [LowRank(3, at=6, batches=4, merge=True)]


# Quantization

RULED = Details(observer=functools.partial(percentile, share=0.98), noise=Noise(weights=True))
EXACTNESS = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2**-7}


def rounded(parameter: Tensor) -> Tensor:
    """Each output channel in whole multiples of its largest magnitude / 127, computed here once more."""
    rows = parameter.float().flatten(1)
    step = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return ((rows / step).round() * step).view_as(parameter)


def quantized(run: Run) -> None:
    ranges = run.of(QuantizationAwareTraining).ranges()
    assert ranges
    for name, seen in run.seen.items():
        if name in ranges:
            torch.testing.assert_close(
                seen.weight.float(), rounded(seen.parameter), atol=1e-6, rtol=EXACTNESS[seen.weight.dtype]
            )
            assert not torch.equal(seen.weight, seen.parameter), "the parameter itself is not rounded"
            assert seen.value.unique().numel() <= 256, name


def extremes(run: Run) -> dict[str, Tensor]:
    ranges = run.of(QuantizationAwareTraining).ranges()
    return {name: torch.tensor([trained.low, trained.high]) for name, trained in ranges.items()}


def quantization(module: L.LightningModule) -> list[L.Callback]:
    return [QuantizationAwareTraining(window=(2, 4, 10))]


# Quantization whose grids learn


def quantized_as_learned(run: Run) -> None:
    ranges = run.of(QuantizationAwareTraining).ranges()
    assert ranges
    for name, seen in run.seen.items():
        if name in ranges:
            trained, exact = ranges[name], EXACTNESS[seen.weight.dtype]
            step = trained.weights_learned["step"]
            assert step != LearnedStep().learned(seen.parameter)["step"], "it started so, and has learned since"
            torch.testing.assert_close(
                seen.weight.float(), (seen.parameter.float() / step).clamp(-7, 7).round() * step, atol=1e-6, rtol=exact
            )
            assert seen.value.unique().numel() <= 256, name
            assert trained.inputs_learned["high"] != trained.high


def everything_learned(run: Run) -> dict[str, Tensor]:
    ranges = run.of(QuantizationAwareTraining).ranges()
    learned = {f"{n} {k}": v for n, r in ranges.items() for k, v in {**r.weights_learned, **r.inputs_learned}.items()}
    return {**extremes(run), **learned}


def learned_quantization(module: L.LightningModule) -> list[L.Callback]:
    return [QuantizationAwareTraining(LearnedStep(), LearnedBounds(), window=(2, 4, 10))]


# Quantization whose ranges a rule makes, and whose weights are rounded at random


def quantized_by_a_rule(run: Run) -> None:
    quantized(run)
    callback = run.of(QuantizationAwareTraining)
    assert callback.quantized.gathered.settled == set(callback.ranges())
    assert not callback.quantized.gathered.totals


def ruled_quantization(module: L.LightningModule) -> list[L.Callback]:
    return [QuantizationAwareTraining(window=(2, 4, 10), details=RULED)]


# Distillation


def teacher_of(module: L.LightningModule) -> nn.Module:
    """A teacher of the same architecture and other weights."""
    fresh = copy.deepcopy(module)
    if isinstance(module, LateSetup):
        LateSetup.setup(fresh, "fit")
    teacher: nn.Module = getattr(fresh.model, "_orig_mod", fresh.model)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.3)
    if type(module).forward is not Small.forward and isinstance(module, Small):  # the forward is more than the model
        return fresh
    return teacher


def distillation(module: L.LightningModule, **options: Any) -> list[L.Callback]:
    student = "model" if isinstance(module, Adversaries) else None
    return [Distillation(teacher_of(module), student=student, **options)]


def taught(run: Run) -> None:
    logged = run.trainer.logged_metrics | run.trainer.callback_metrics
    assert logged["compress/loss/kd"] > 0
    assert torch.isfinite(logged["compress/loss/task"])


# Distillation of layers, with a projection that learns


def layered_distillation(module: L.LightningModule) -> list[L.Callback]:
    names = called_linears(module)
    return distillation(module, layers=LayerTerm(feature_mse, names, project=True))


def called_linears(module: L.LightningModule) -> list[str]:
    """The plain Linear layers of the model, but for those that an attention multiplies with without a call."""
    model = network() if isinstance(module, LateSetup) else module.model
    model = getattr(model, "_orig_mod", model)
    attentions = [f"{name}." for name, part in model.named_modules() if isinstance(part, nn.MultiheadAttention)]
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return [f"model.{name}" for name in linears if not name.startswith(tuple(attentions))]


def taught_by_layers(run: Run) -> None:
    taught(run)
    logged = run.trainer.logged_metrics | run.trainer.callback_metrics
    assert logged["compress/loss/feature_mse"] > 0


def projections(run: Run) -> dict[str, Tensor]:
    state = run.of(Distillation).state_dict()["projections"]["feature_mse"]
    return {f"{name} {key}": value for name, own in state.items() for key, value in own["module"].items()}


# Distillation of input gradients


def gradient_distillation(module: L.LightningModule, **options: Any) -> list[L.Callback]:
    return distillation(module, layers=GradientTerm(0.1, EMBEDDINGS.get(type(module))), **options)


EMBEDDINGS = {Causal: "model.embedding", Bert: "model.bert.embeddings.word_embeddings"}  # tokens have no gradient


def taught_by_gradients(run: Run) -> None:
    taught(run)
    logged = run.trainer.logged_metrics | run.trainer.callback_metrics
    assert logged["compress/loss/gradient_matching"] > 0


# Distillation whose terms are weighed by their gradients, and from a teacher of int8 weights


def sizes_of_terms(run: Run) -> dict[str, Tensor]:
    sizes = run.of(Distillation).state_dict()["sizes"]
    assert sizes
    return {str(name): torch.as_tensor(value) for name, value in sizes.items()}


def teaching_row(name: str, details: Teaching, memory: Callable[[Run], dict[str, Tensor]], **excused: str) -> Row:
    """A row of Distillation from another model, which differs by its details alone."""
    make = functools.partial(distillation, details=details)
    return Row(
        name,
        Distillation,
        make=make,
        default=make,
        off=(functools.partial(make, enabled=False),),
        acted=taught,
        memory=memory,
        logs=frozenset({"compress/loss/task", "compress/loss/kd"}),
        excused={**NO_DECISION, **{promise.replace("_", " "): why for promise, why in excused.items()}},
    )


# Distillation from the student's own average


def mean_teacher(module: L.LightningModule) -> list[L.Callback]:
    student = "model" if isinstance(module, Adversaries) else None
    return [Distillation(MeanTeacher(0.8), student=student)]


def taught_by_the_average(run: Run) -> None:
    logged = run.trainer.logged_metrics | run.trainer.callback_metrics
    assert logged["compress/loss/kd"] >= 0
    own = run.of(Distillation).state_dict()["teacher"]
    assert any(not torch.equal(value, own[name].to(value)) for name, value in run.module.named_parameters())


def averages(run: Run) -> dict[str, Tensor]:
    return dict(run.of(Distillation).state_dict()["teacher"])


# Weight sharing


def shared(run: Run) -> None:
    books = run.of(WeightSharing).codes
    assert books
    for name, codes in books.items():
        weight, before = run.weights[name], run.before.get(name)
        values = [weight[codes.entry == entry].unique() for entry in range(len(codes.counts))]
        assert all(len(value) <= 1 for value in values), name
        assert len(weight.unique()) <= 8
        assert before is None or before.shape != weight.shape or len(before.unique()) > 8


def sharing(module: L.LightningModule) -> list[L.Callback]:
    return [WeightSharing(8, at=9)]  # after the windows of the rows that prune


# Monitor


def monitor(module: L.LightningModule) -> list[L.Callback]:
    return [GradualPruning(0.5, enabled=False), CompressionMonitor()]


def reported(run: Run) -> None:
    watching: CompressionMonitor = run.of(CompressionMonitor)
    if not run.trainer.is_global_zero:  # one process writes
        return
    assert watching.report is not None
    assert all(path.stat().st_size for path in watching.files.values())


# Gate


def gate(module: L.LightningModule) -> list[L.Callback]:
    return [*pruning(module), ReadyGate()]


def opened(run: Run) -> None:
    pruned(run)
    assert run.of(ReadyGate).open


ROWS: tuple[Row, ...] = (
    Row(
        "pruning",
        GradualPruning,
        make=pruning,
        default=lambda module: [GradualPruning(0.8)],
        off=(lambda module: [GradualPruning(0.0)], lambda module: [GradualPruning(0.8, enabled=False)]),
        acted=pruned,
        memory=masks,
        logs=frozenset({"compress/sparsity", "compress/sparsity_target", "compress/threshold"}),
    ),
    Row(
        "lottery",
        LotteryRewinding,
        make=lottery,
        default=lambda module: [LotteryRewinding(), GradualPruning(ROUNDS)],
        off=(lambda module: [LotteryRewinding(enabled=False), GradualPruning(ROUNDS, enabled=False)],),
        acted=rewound,
        memory=lambda run: {**masks(run), **run.of(LotteryRewinding).snapshot},
        logs=frozenset({"compress/rounds"}),
    ),
    Row(
        "reconstruction",
        Reconstruction,
        make=reconstruction,
        default=lambda module: [Reconstruction()],
        off=(lambda module: [Reconstruction(0.0)], lambda module: [Reconstruction(enabled=False)]),
        acted=reconstructed,
        memory=lambda run: dict(run.of(Reconstruction).masks),
        logs=frozenset({"compress/sparsity", "compress/reconstruction_error"}),
        phases=2,
    ),
    Row(
        "regularization",
        SparsityRegularization,
        make=regularization,
        default=lambda module: [SparsityRegularization()],
        off=(
            lambda module: [SparsityRegularization(weight=0.0, sparsity=0.0)],
            lambda module: [SparsityRegularization(enabled=False)],
        ),
        acted=regularized,
        memory=lambda run: dict(run.of(SparsityRegularization).masks),
        logs=frozenset({"compress/sparsity", "compress/loss/HardConcrete"}),
        phases=3,
    ),
    Row(
        "structured",
        StructuredPruning,
        make=structured,
        default=lambda module: [StructuredPruning(0.4)],
        off=(lambda module: [StructuredPruning(0.0)], lambda module: [StructuredPruning(enabled=False)]),
        acted=shrunken,
        memory=survivors,
        logs=frozenset({"compress/removed_macs", "compress/parameters"}),
        phases=3,
        excused={
            "checkpoints are plain": "they carry their shapes: tests/callbacks/test_structured.py",
        },
    ),
    Row(
        "low-rank",
        LowRank,
        make=low_rank,
        default=lambda module: [LowRank()],
        off=(lambda module: [LowRank(enabled=False)],),
        acted=of_rank_three,
        memory=lambda run: {name: torch.tensor(rank) for name, rank in run.of(LowRank).ranks.items()},
        logs=frozenset({"compress/parameters", "compress/factored_layers"}),
        phases=3,
        excused={
            "checkpoints are plain": "they carry their ranks: tests/callbacks/test_low_rank.py",
            "keys, names and classes stay": "layers become two until the end: tests/callbacks/test_low_rank.py",
            "no trace after an exception": "layers stay two, without a hook: tests/callbacks/test_low_rank.py",
            "more epochs with the same Trainer": "merged layers start anew: tests/callbacks/test_low_rank.py",
            "clipping sees masked gradients": "it masks nothing",
        },
    ),
    Row(
        "quantization",
        QuantizationAwareTraining,
        make=quantization,
        default=lambda module: [QuantizationAwareTraining()],
        off=(lambda module: [QuantizationAwareTraining(enabled=False)],),
        acted=quantized,
        memory=extremes,
        compressed=lambda run: fake_quantized(run.module, run.of(QuantizationAwareTraining).ranges()),
        logs=frozenset({"compress/bits"}),
        phases=4,
        excused=NO_DECISION,
    ),
    Row(
        "quantization-learned",
        QuantizationAwareTraining,
        make=learned_quantization,
        default=lambda module: [QuantizationAwareTraining(LearnedStep(), LearnedBounds())],
        off=(lambda module: [QuantizationAwareTraining(LearnedStep(), LearnedBounds(), enabled=False)],),
        acted=quantized_as_learned,
        memory=everything_learned,
        compressed=lambda run: fake_quantized(run.module, run.of(QuantizationAwareTraining).ranges()),
        logs=frozenset({"compress/bits"}),
        phases=4,
        excused=NO_DECISION,
    ),
    Row(
        "quantization-ruled",
        QuantizationAwareTraining,
        make=ruled_quantization,
        default=lambda module: [QuantizationAwareTraining(details=RULED)],
        off=(lambda module: [QuantizationAwareTraining(details=RULED, enabled=False)],),
        acted=quantized_by_a_rule,
        memory=extremes,
        compressed=lambda run: fake_quantized(run.module, run.of(QuantizationAwareTraining).ranges()),
        logs=frozenset({"compress/bits"}),
        phases=4,
        excused=NO_DECISION,
    ),
    Row(
        "distillation",
        Distillation,
        make=distillation,
        default=distillation,
        off=(lambda module: distillation(module, weight=0.0), lambda module: distillation(module, enabled=False)),
        acted=taught,
        logs=frozenset({"compress/loss/task", "compress/loss/kd"}),
        excused=NO_DECISION,
    ),
    Row(
        "distillation-layers",
        Distillation,
        make=layered_distillation,
        default=layered_distillation,
        off=(lambda module: distillation(module, layers=LayerTerm(), enabled=False),),
        acted=taught_by_layers,
        memory=projections,
        logs=frozenset({"compress/loss/task", "compress/loss/kd", "compress/loss/feature_mse"}),
        excused={
            **NO_DECISION,
            "checkpoints are plain": "it holds projections and their Adam: tests/callbacks/test_distillation_layers.py",
        },
    ),
    Row(
        "distillation-jacobian",
        Distillation,
        make=gradient_distillation,
        default=gradient_distillation,
        off=(functools.partial(gradient_distillation, enabled=False),),
        acted=taught_by_gradients,
        logs=frozenset({"compress/loss/task", "compress/loss/kd", "compress/loss/gradient_matching"}),
        excused=NO_DECISION,
    ),
    teaching_row("distillation-gradient", Teaching(balanced="gradient"), sizes_of_terms),
    teaching_row("distillation-int8", Teaching(precision="int8"), _nothing),
    Row(
        "mean-teacher",
        Distillation,
        make=mean_teacher,
        default=mean_teacher,
        off=(lambda module: [Distillation(MeanTeacher(), enabled=False)],),
        acted=taught_by_the_average,
        memory=averages,
        logs=frozenset({"compress/loss/task", "compress/loss/kd"}),
        excused={
            **NO_DECISION,
            "checkpoints are plain": "it holds the average: tests/callbacks/test_distillation_layers.py",
        },
    ),
    Row(
        "sharing",
        WeightSharing,
        make=sharing,
        default=lambda module: [WeightSharing()],
        off=(lambda module: [WeightSharing(enabled=False)],),
        acted=shared,
        memory=lambda run: {name: codes.entry for name, codes in run.of(WeightSharing).codes.items()},
        logs=frozenset({"compress/sharing_error"}),
        excused={
            "checkpoints are plain": "they hold log2(entries) bits a weight: tests/callbacks/test_weight_sharing.py",
            "NaN weights are named": "it looks at its own step, 9: tests/callbacks/test_weight_sharing.py",
        },
    ),
    Row(
        "monitor",
        CompressionMonitor,
        make=monitor,
        default=lambda module: [GradualPruning(0.8), CompressionMonitor()],
        off=(monitor,),
        acted=reported,
        logs=frozenset({"compress/ready", "compress/size_bytes"}),
        excused={"NaN weights are named": "it counts and reports weights, whatever they are"},
    ),
    Row(
        "gate",
        ReadyGate,
        make=gate,
        default=lambda module: [GradualPruning(0.8), ReadyGate()],
        off=(lambda module: [GradualPruning(0.0), ReadyGate(enabled=False)],),
        acted=opened,
        memory=masks,
        logs=frozenset({"compress/sparsity"}),
    ),
)


def without_row(rows: Iterable[Row], classes: Iterable[object] | None = None) -> list[str]:
    """Names of the package's callback classes that no row is about."""
    known = [getattr(callbacks, name) for name in callbacks.__all__] if classes is None else classes
    exported = [item for item in known if isinstance(item, type) and issubclass(item, L.Callback)]
    return sorted(item.__name__ for item in {*exported} - {row.callback for row in rows})


def promise(name: str) -> pytest.MarkDecorator:
    """Run a test once for each row that is not excused from this promise."""
    if name not in PROMISES:
        raise ValueError(f"expected one of the table's promises, got {name!r}")
    rows = [pytest.param(row, id=row.name) for row in ROWS if name not in row.excused]

    def decorate(test: Any) -> Any:
        test.promise = name
        return pytest.mark.parametrize("row", rows)(test)

    return decorate  # type: ignore[return-value]
