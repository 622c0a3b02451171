"""A trial run of `training_step` up to its first call of the student, so that a wrong teacher is named at `setup`."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_debug
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress.distillation.taps import Call, StudentSeen, Tap
from lightning_compress.sharding import is_flattened

__all__ = ["first_student_call", "uncompiled"]

# A trial forward on the CPU of a larger model would cost more than failing in the first step.
MOST_PARAMETERS = 300_000_000


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models eagerly in the block: Dynamo cannot trace the global hooks that look for the student."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
        yield


class _NoExamplesError(Exception):
    """The training data cannot be read without consuming it."""


def _examples(loader: DataLoader[Any]) -> Any:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or loader.batch_sampler is None or not hasattr(dataset, "__len__"):
        raise _NoExamplesError
    return loader.collate_fn([dataset[index] for index in range(min(2, len(dataset)))])


def _example_batch(trainer: L.Trainer) -> Any:
    batch = apply_to_collection(trainer.train_dataloader, DataLoader, _examples)
    if batch is trainer.train_dataloader:  # not a torch DataLoader
        raise _NoExamplesError
    return batch


def _run_step(pl_module: L.LightningModule, batch: Any) -> None:
    names = inspect.signature(pl_module.training_step).parameters
    if "dataloader_iter" in names:
        raise _NoExamplesError
    batch = pl_module.transfer_batch_to_device(pl_module.on_before_batch_transfer(batch, 0), pl_module.device, 0)
    batch = pl_module.on_after_batch_transfer(batch, 0)
    # As Lightning decides it: a second argument is the batch's index, whatever it is called.
    pl_module.training_step(batch, *([0] if "batch_idx" in names or len(names) >= 2 else []))


def _call_student(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
    # Nothing may leave: isolate_rng puts the generators back only after a block without an exception.
    batch = None
    try:
        batch = _example_batch(trainer)
        pl_module.eval()
        _run_step(pl_module, batch)
    except StudentSeen:
        pass
    except Exception as error:  # noqa: BLE001 - the same code runs again, unguarded, in the first step
        rank_zero_debug(f"teacher and student are compared in the first step, the trial run failed: {error!r}")
    return batch


def first_student_call(
    trainer: L.Trainer, pl_module: L.LightningModule, student: str | None
) -> tuple[Any, Call] | None:
    """Return two examples as a batch and the step's first call of its student; None if that cannot be found out.

    Runs at `setup`, on the CPU, in eval mode, with all random generators put back; the step is left as soon as the
    student returns.

    Args:
        trainer: its training data are read by index, not through their loader.
        pl_module: not yet moved or wrapped, if it is built before `configure_model`.
        student: name of the submodule; None is the outermost trainable one.
    """
    if sum(parameter.numel() for parameter in pl_module.parameters()) > MOST_PARAMETERS:
        return None
    if is_flattened(trainer.strategy.model or pl_module):  # FSDP1 runs from its root alone
        return None
    tap = Tap(open=True, stop=True)
    remove = tap.attach_outermost(pl_module) if student is None else tap.attach(pl_module, student)
    modes = [(module, module.training) for module in pl_module.modules()]
    learned = [(parameter, parameter.requires_grad) for parameter in pl_module.parameters()]
    try:
        trainer.fit_loop.setup_data()  # what it draws stays drawn: the run will not load its data again
        with isolate_rng(), torch.enable_grad(), uncompiled():
            batch = _call_student(trainer, pl_module)
    finally:
        remove()
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in learned:  # a step may have been left between toggle and untoggle
            parameter.requires_grad_(requires_grad)
    return (batch, tap.calls[0]) if tap.calls else None
