"""What is special to LowRank: what it gathers, when it acts, whom it meets, and checkpoints of layers that are two."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_compress import (
    CheckpointMismatch,
    CompressError,
    Distillation,
    GradualPruning,
    IncompatibleCallbacks,
    LotteryRewinding,
    LowRank,
    NothingToCompress,
    QuantizationAwareTraining,
    Steps,
    StructuredPruning,
    WeightSharing,
    load_from_checkpoint,
    plan,
)
from lightning_compress.distillation.own_teachers import MeanTeacher
from lightning_compress.factorization.factors import Factored, factored_layers, unfactor
from lightning_compress.factorization.lowrank import factorize
from lightning_compress.factorization.ranks import Budget, Energy
from lightning_compress.factorization.svd import activation_weighted_svd, fisher_weighted_svd, svd
from tests.conformance.modules import Small
from tests.conformance.running import Do, build, differing, train

ROUNDS = Steps(((0.0, 0.4), (0.5, 0.8)))


def still(**options):
    return build(Small, dropout=0.0, norm=False, **options)


def product(layer):
    return (layer.weight if isinstance(layer, Factored) else layer.get_parameter("weight")).detach().clone()


@pytest.mark.parametrize("decompose", [svd, activation_weighted_svd, fisher_weighted_svd])
def test_layers_become_what_the_gathered_steps_say(decompose, tmp_path):
    """Against the same decomposition of moments and squared gradients that are computed here from the batches."""
    module, seen = still(shuffle=False), {}
    gradients, inputs, now = [], [], {}

    def note(trainer, pl_module, batches):
        if batches == 3:
            now["before"] = product(pl_module.model[4])
        if 4 <= batches <= 6:
            now[f"weight {batches}"] = product(pl_module.model[4])

    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step in (3, 4, 5):
                gradients.append(pl_module.model[4].weight.grad.clone())

    handle = module.model[4].register_forward_hook(
        lambda layer, args, _: inputs.append(args[0].detach().double()) if torch.is_grad_enabled() else None
    )
    callback = LowRank(3, at=6, batches=3, decompose=decompose, include=["model.4"])

    class Before(L.Callback):  # after the step, before LowRank looks
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 6:
                seen["weight"] = product(pl_module.model[4])

    train(module, [Before(), callback, Do(note)], tmp_path, extra=[Gradients()])
    handle.remove()
    rows = torch.cat(inputs[3:6])
    known = {
        svd: {},
        activation_weighted_svd: {"moment": rows.T @ rows},
        fisher_weighted_svd: {"fisher": torch.stack(gradients).double().square().mean(0)},
    }[decompose]
    left, right = decompose(seen["weight"], **known).truncated(3)
    torch.testing.assert_close(now["weight 6"], (left @ right).float(), atol=1e-5, rtol=1e-4)
    assert callback.ranks == {"model.4": 3}


def test_names_stay_two_until_the_run_ends_and_no_hook_is_left(tmp_path):
    module, names = still(), []
    callback = LowRank(3, at=6)
    train(module, [callback], tmp_path, extra=[Do(lambda _, m, batches: names.append(set(m.state_dict())))])
    plain = set(still().state_dict())
    assert names[4] == plain
    two = {"model.4.down.weight", "model.4.up.weight", "model.4.up.bias"}
    assert two <= names[5] == names[-1] == set(module.state_dict())
    assert set(callback.ranks) == set(factored_layers(module)) == {"model.4", "model.7"}
    assert not any(layer._forward_pre_hooks for layer in module.modules())


@pytest.mark.parametrize("momentum", ["sgd", "adamw"])
def test_optimizers_move_the_two_in_the_groups_of_the_one(momentum, tmp_path):
    module = still(optimizer=momentum)
    run = train(module, [LowRank(3, at=6)], tmp_path)
    (optimizer,) = run.trainer.optimizers
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in module.parameters()]
    assert set(optimizer.state) <= set(module.parameters())


class Named(Small):
    def configure_optimizers(self):
        named = list(self.named_parameters())
        groups = [{"params": [p for p in named if p[1].dim() > 1]}, {"params": [p for p in named if p[1].dim() == 1]}]
        return torch.optim.AdamW(groups, lr=1e-2)


def test_names_that_the_optimizer_was_given_follow(tmp_path):
    module = build(Named, dropout=0.0, norm=False)
    run = train(module, [LowRank(3, at=6)], tmp_path)
    for group in run.trainer.optimizers[0].param_groups:
        pairs = zip(group["param_names"], group["params"], strict=True)
        assert all(dict(module.named_parameters())[name] is parameter for name, parameter in pairs)


# Checkpoints


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_checkpoint_is_loaded_resumed_and_refused_plainly(tmp_path):
    module = still()
    run = train(module, [LowRank(Budget(0.6), at=6)], tmp_path)
    path = tmp_path / "two.ckpt"
    run.trainer.save_checkpoint(path)
    hook = Small.__dict__.get("on_load_checkpoint")
    loaded = load_from_checkpoint(path, Small)
    assert type(loaded) is Small
    assert Small.__dict__.get("on_load_checkpoint") is hook
    assert differing(loaded.state_dict(), module.state_dict()) == []
    with pytest.raises(RuntimeError, match="load_from_checkpoint"):
        Small.load_from_checkpoint(path)
    fresh = Small(dropout=0.0, norm=False)
    resumed = train(fresh, [LowRank(Budget(0.6), at=6)], tmp_path, ckpt_path=path, max_epochs=5)
    assert resumed.of(LowRank).ranks == run.of(LowRank).ranks
    with pytest.raises(CheckpointMismatch, match="rank="):
        train(Small(dropout=0.0, norm=False), [LowRank(3, at=6)], tmp_path, ckpt_path=path, max_epochs=5)


def test_more_epochs_go_on_with_the_two(tmp_path):
    options = {"optimizer": "sgd", "shuffle": False}
    module, fresh = still(**options), still(**options)
    run = train(module, [LowRank(3, at=6)], tmp_path, max_epochs=3)
    run.trainer.fit_loop.max_epochs = 4
    run.trainer.fit(module)
    whole = train(fresh, [LowRank(3, at=6)], tmp_path, max_epochs=4)
    assert differing(run.weights, whole.weights) == []


def test_merged_layers_are_two_again_in_one_more_fit(tmp_path):
    module = still()
    run = train(module, [LowRank(3, at=6, merge=True)], tmp_path)
    assert factored_layers(module) == {}
    merged, kinds = product(module.model[4]), []
    run.trainer.save_checkpoint(tmp_path / "merged.ckpt")
    Small.load_from_checkpoint(tmp_path / "merged.ckpt")
    first = Do(lambda _, m, batches: kinds.append(type(m.model[4])))
    again = train(
        still(),
        [LowRank(3, at=6, merge=True)],
        tmp_path,
        ckpt_path=tmp_path / "merged.ckpt",
        max_epochs=5,
        extra=[first],
    )
    assert set(kinds) == {Factored}
    assert float(torch.linalg.svdvals(again.module.model[4].weight.detach())[3]) < 1e-5
    assert not torch.equal(product(again.module.model[4]), merged)


def test_a_run_that_breaks_leaves_two_layers_and_no_hook(tmp_path):
    def spoil(trainer, pl_module, batches):
        if batches == 8:
            raise RuntimeError("broken on purpose")

    module = still()
    with pytest.raises(RuntimeError, match="on purpose"):
        train(module, [LowRank(3, at=6)], tmp_path, extra=[Do(spoil)])
    assert len(factored_layers(module)) == 2
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in module.modules())


# Before the first step, and in company


def at_once(rank=3, **options):
    return LowRank(rank, at=0.0, decompose=svd, **options)


def test_at_once_it_acts_before_the_optimizer_is_made(tmp_path):
    module = still()
    weight = product(module.model[4])
    run = train(module, [at_once()], tmp_path, max_epochs=1, extra=[Do(lambda *_: None)])
    _, right = svd(weight).truncated(3)
    assert module.model[4].down.weight.shape == right.shape
    assert {id(p) for p in run.trainer.optimizers[0].param_groups[0]["params"]} == {id(p) for p in module.parameters()}


LOOK_FIRST = (StructuredPruning, Distillation)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "other",
    [
        lambda: GradualPruning(0.5, window=(2, 8), frequency=2),
        lambda: QuantizationAwareTraining(window=(2, 4, 10)),
        lambda: WeightSharing(4, at=9),
        lambda: StructuredPruning(0.3, window=(2, 8), frequency=2),
        lambda: Distillation(MeanTeacher()),
    ],
    ids=["pruning", "quantization", "sharing", "structured", "mean teacher"],
)
def test_at_once_the_others_work_on_the_two(other, first, tmp_path):
    module, callback = still(), other()
    if isinstance(callback, LOOK_FIRST) and not first:
        with pytest.raises(IncompatibleCallbacks, match="put LowRank before it"):
            train(module, [callback, at_once()], tmp_path)
        return
    run = train(module, [at_once(), callback] if first else [callback, at_once()], tmp_path)
    assert callback.complete
    assert len(run.of(LowRank).ranks) == 2
    if isinstance(callback, GradualPruning):
        assert {"model.4.down.weight", "model.4.up.weight"} <= set(callback.masks)
    run.trainer.save_checkpoint(tmp_path / "together.ckpt")
    again = train(still(), [at_once(), other()], tmp_path, ckpt_path=tmp_path / "together.ckpt", max_epochs=5)
    assert len(factored_layers(again.module)) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda: [GradualPruning(0.5, window=(2, 8), frequency=2)],
        lambda: [QuantizationAwareTraining(window=(2, 4, 10))],
        lambda: [WeightSharing(4, at=9)],
        lambda: [StructuredPruning(0.3, window=(2, 8), frequency=2)],
        lambda: [
            GradualPruning(Steps(((0.0, 0.4), (0.5, 0.8))), window=(2, 8), include=["model.9"]),
            LotteryRewinding(to=1),
        ],
        lambda: [Distillation(MeanTeacher())],
    ],
    ids=["pruning", "quantization", "sharing", "structured", "lottery", "mean teacher"],
)
def test_in_the_middle_nobody_may_hold_on_to_a_weight(other, tmp_path):
    with pytest.raises(IncompatibleCallbacks, match=r"LowRank replaces .*at=0\.0"):
        train(still(), [LowRank(3, at=6), *other()], tmp_path)


def test_other_layers_may_be_pruned_in_the_same_run(tmp_path):
    pruning = GradualPruning(0.5, window=(2, 8), frequency=2, include=["model.9"])
    run = train(still(), [LowRank(3, at=6), pruning], tmp_path)
    assert pruning.complete
    assert len(factored_layers(run.module)) == 2


def test_layers_that_lost_channels_are_merged_to_what_is_left(tmp_path):
    module = still()
    structured = StructuredPruning(0.3, window=(2, 8), frequency=2, include=["model.0"])
    run = train(module, [at_once(6, merge=True, include=["model.4"]), structured], tmp_path)
    assert run.of(LowRank).ranks["model.4"] == 6
    layer = module.model[4]
    assert type(layer) is nn.Linear
    assert layer.in_features == layer.weight.shape[1] < 64
    assert module(torch.zeros(2, 1, 6, 6)).shape == (2, 3)


# Bad input


class Broyden(Small):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


def test_bad_input_is_named_before_the_first_batch(tmp_path):
    for bad in (0, -1, True, 2.5, "half"):
        with pytest.raises(ValueError, match="rank is a number"):
            LowRank(bad)
    for bad in (0, True, 1.5):
        with pytest.raises(ValueError, match="batches is a number"):
            LowRank(batches=bad)
    with pytest.raises(TypeError, match="decompose must be a function"):
        LowRank(decompose="svd")
    with pytest.raises(TypeError, match="by these names"):
        LowRank(decompose=lambda weight, hessian: None)
    with pytest.raises(ValueError, match=r"at=0\.0 is optimizer step 0, before which there were no inputs"):
        train(still(), [LowRank(3, at=0.0)], tmp_path)
    with pytest.raises(ValueError, match="at is step 99"):
        train(still(), [LowRank(3, at=99)], tmp_path)
    with pytest.raises(NothingToCompress, match=r"at rank=200; the largest ranks that save: model\.0 2, model\.4 12"):
        train(still(), [LowRank(200)], tmp_path)
    with pytest.raises(ValueError, match="fewer weights than rank 1"):
        train(still(), [LowRank(Budget(0.99))], tmp_path)
    with pytest.raises(NothingToCompress, match="would get smaller"):
        train(still(), [at_once(3, include=["model.9"])], tmp_path)
    with pytest.raises(CompressError, match="LBFGS"):
        train(build(Broyden), [LowRank(3, at=6)], tmp_path)


class Uncalled(Small):
    def __init__(self, **options):
        super().__init__(**options)
        self.spare = nn.Linear(40, 40)
        self.head = nn.Linear(3, 3)


def test_layers_that_nobody_calls_or_that_are_frozen_are_passed_over_unless_named(tmp_path):
    module = build(Uncalled)
    module.model[7].weight.requires_grad_(False)
    run = train(module, [LowRank(3, at=6)], tmp_path)
    assert set(run.of(LowRank).ranks) == {"model.4"}
    with pytest.raises(CompressError, match=r"'spare' was not called in training.* in the 6 steps before"):
        train(build(Uncalled), [LowRank(3, at=6, include=["spare", "model.4"])], tmp_path)


def test_another_weight_than_the_one_that_was_made_two_is_not_cut(tmp_path):
    module = still()
    run = train(module, [LowRank(3, at=6)], tmp_path)
    for layer in factored_layers(module).values():
        unfactor(layer)
        nn.init.normal_(layer.weight)
    run.trainer.fit_loop.max_epochs = 5
    with pytest.raises(CompressError, match=r"made 'model\.4' two of rank 3 in this run, but the module holds another"):
        run.trainer.fit(module)


def test_one_more_fit_asks_for_the_same_rank_or_is_refused(tmp_path):
    module = still()
    train(module, [LowRank(3, at=6)], tmp_path)
    train(module, [LowRank(3, at=6)], tmp_path)
    with pytest.raises(CompressError, match=r"found 'model\.4' to be two of rank 3 already"):
        train(module, [LowRank(2, at=6, include=["model.4", "model.7"])], tmp_path)


# In company of itself and of what users do


def two_of_them(**options):
    return [LowRank(3, at=4, include=["model.4"]), LowRank(3, at=8, include=["model.7"], **options)]


def test_two_of_them_and_an_average(tmp_path):
    module = still()
    train(module, [EMAWeightAveraging(decay=0.9), *two_of_them()], tmp_path)
    assert set(factored_layers(module)) == {"model.4", "model.7"}


def test_each_merges_its_own(tmp_path):
    module = still()
    run = train(module, two_of_them(merge=True), tmp_path)
    assert set(factored_layers(module)) == {"model.4"}
    moved = {id(p) for group in run.trainer.optimizers[0].param_groups for p in group["params"]}
    assert moved == {id(parameter) for parameter in module.parameters()}


class ByLayer(Small):
    """A group for each parameter, the last one first, and one is named by its layer."""

    def configure_optimizers(self):
        first = self.model[4].weight
        assert first.is_leaf
        rest = [p for p in self.parameters() if p is not first]
        return torch.optim.AdamW([{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate([first, *rest[::-1]])])


@pytest.mark.parametrize("step", [3, 6, 9])
def test_groups_of_any_kind_resume(step, tmp_path):
    def save(trainer, *_):
        if trainer.global_step == step:
            trainer.save_checkpoint(tmp_path / "middle.ckpt")

    options = {"dropout": 0.0, "norm": False}
    whole = train(build(ByLayer, **options), [LowRank(3, at=6)], tmp_path, extra=[Do(save)])
    torch.manual_seed(7)
    resumed = train(ByLayer(**options), [LowRank(3, at=6)], tmp_path, ckpt_path=tmp_path / "middle.ckpt")
    assert differing(resumed.weights, whole.weights) == []


def test_at_once_a_run_goes_on_in_a_module_that_starts_from_other_weights(tmp_path):
    module = still()
    with torch.no_grad():
        for index in (4, 7):
            left, right = svd(module.model[index].weight).truncated(2)
            module.model[index].weight.copy_(left @ right)
    run = train(module, [at_once(Energy(0.999))], tmp_path)
    assert set(run.of(LowRank).ranks.values()) == {2}
    run.trainer.save_checkpoint(tmp_path / "low.ckpt")
    fresh = still()
    with torch.no_grad():
        nn.init.orthogonal_(fresh.model[4].weight)
        nn.init.orthogonal_(fresh.model[7].weight)
    again = train(fresh, [at_once(Energy(0.999))], tmp_path, ckpt_path=tmp_path / "low.ckpt", max_epochs=5)
    assert set(again.of(LowRank).ranks.values()) == {2}


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_run_goes_on_from_a_plain_checkpoint(tmp_path):
    plain = train(still(), [], tmp_path)
    plain.trainer.save_checkpoint(tmp_path / "plain.ckpt")
    for callback in (at_once(), LowRank(3, at=6)):
        run = train(still(), [callback], tmp_path, ckpt_path=tmp_path / "plain.ckpt", max_epochs=8)
        assert set(run.of(LowRank).ranks.values()) == {3}
        assert len(factored_layers(run.module)) == 2


def test_weights_alone_can_be_loaded_too(tmp_path):
    module = still()
    run = train(module, [LowRank(3, at=6)], tmp_path)
    run.trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded = load_from_checkpoint(tmp_path / "weights.ckpt", Small)
    assert differing(loaded.state_dict(), module.state_dict()) == []


# plan


def test_plan_says_what_will_be_two():
    expected = plan(still(), [LowRank(3, at=6)], torch.zeros(1, 1, 6, 6))
    assert "makes each of 2 layers two of rank 3" in str(expected)
    module = still()
    factorize(module, rank=3)
    assert expected.expects("parameters") == sum(parameter.numel() for parameter in module.parameters())
