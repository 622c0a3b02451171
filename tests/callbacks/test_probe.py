"""The trial run of a step finds the student's first call and leaves no sign that it happened."""

from __future__ import annotations

import random
import sys
from typing import ClassVar

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_compress.callbacks import probe
from lightning_compress.callbacks.probe import first_student_call


class Module(L.LightningModule):
    """Counts what must not happen in a trial: reaching the loss, moving statistics, logging."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)
        self.reached = 0

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.reached += 1
        return functional.cross_entropy(logits, batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


ROWS = TensorDataset(torch.arange(30.0).view(10, 3), torch.zeros(10, dtype=torch.long))


class Stream(IterableDataset):
    taken: ClassVar[list[int]] = []

    def __iter__(self):
        for index, row in enumerate(ROWS):
            self.taken.append(index)
            yield row


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), len(Stream.taken)


class AskedError(Exception):
    pass


def probed(module, data=None, student=None):
    found = []

    class Asking(L.Callback):
        def setup(self, trainer, pl_module, stage):
            trainer.fit_loop.setup_data()  # Lightning's own, which fetches ahead from a stream
            before = states()
            found.append(first_student_call(trainer, pl_module, student))
            assert states() == before
            raise AskedError  # the run itself is not wanted

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", callbacks=[Asking()], max_steps=1, **quiet)
    with pytest.raises(AskedError):
        trainer.fit(module, DataLoader(ROWS, batch_size=4) if data is None else data)
    return found[0]


def test_two_examples_and_the_call():
    batch, call = probed(Module())
    assert torch.equal(batch[0], ROWS[:2][0])
    assert call.name == ""
    assert torch.equal(call.args[0], batch[0])
    assert call.output.shape == (2, 2)


@pytest.mark.parametrize(("student", "shape"), [("body", (2, 4)), ("head", (2, 2))])
def test_a_named_student(student, shape):
    _, call = probed(Module(), student=student)
    assert call.name == student
    assert call.output.shape == shape


def test_nothing_of_it_stays():
    module = Module()
    module.head.eval()  # as a user may freeze a part
    modes = [part.training for part in module.modules()]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    _, call = probed(module)
    assert call is not None
    assert module.reached == 0
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


class Failing(Module):
    def training_step(self, batch, batch_idx):
        torch.rand(1)
        raise RuntimeError("broken")


def test_a_step_that_fails_leaves_nothing_either():
    module = Failing()
    assert probed(module) is None
    assert all(part.training for part in module.modules())


class Probing(L.Callback):
    def setup(self, trainer, pl_module, stage):
        assert first_student_call(trainer, pl_module, None) is not None


@pytest.mark.parametrize("callbacks", [[Probing()], [Probing(), Probing()]])
def test_the_run_afterwards_sees_the_batches_and_dropout_of_a_plain_run(callbacks):
    def run(callbacks):
        torch.manual_seed(0)
        module, loader = Module(), DataLoader(ROWS, batch_size=5, shuffle=True)
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        L.Trainer(accelerator="cpu", callbacks=callbacks, max_epochs=2, **quiet).fit(module, loader)
        return module.state_dict()

    plain, probed_first = run([]), run(callbacks)
    assert all(torch.equal(value, probed_first[name]) for name, value in plain.items())


def test_a_stream_is_not_consumed():
    assert probed(Module(), DataLoader(Stream())) is None
    assert len(Stream.taken) <= 2


def test_data_of_an_unknown_kind_are_not_read():
    assert probed(Module(), [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))]) is None


def test_several_loaders_give_their_collection():
    class Two(Module):
        def training_step(self, batch, batch_idx):
            return self(batch["left"][0]).sum()

    loaders = {"left": DataLoader(ROWS, batch_size=4), "right": DataLoader(ROWS, batch_size=2)}
    batch, call = probed(Two(), loaders)
    assert set(batch) == {"left", "right"}
    assert call.output.shape == (2, 2)


def test_a_step_without_batch_index_and_with_hooks_of_the_transfer():
    class Own(Module):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] * 0, batch[1]]

        def training_step(self, batch):
            return self(batch[0]).sum()

    _, call = probed(Own())
    assert not call.args[0].any()


@pytest.mark.filterwarnings("ignore:(You are using the|Found) `dataloader_iter`")
def test_a_step_that_reads_the_loader_itself_is_left_alone():
    class Reads(Module):
        def training_step(self, dataloader_iter):
            raise AssertionError("called")

    assert probed(Reads()) is None


def test_a_step_that_calls_no_student_gives_nothing():
    class Bare(Module):
        def training_step(self, batch, batch_idx):
            return functional.linear(self.body[0](batch[0]).detach(), self.head.weight).sum()

    assert probed(Bare(), student="head") is None


def test_a_model_too_large_to_try_is_not_tried(monkeypatch):
    monkeypatch.setattr(probe, "MOST_PARAMETERS", 3)
    assert probed(Module()) is None


def test_a_compiled_student_is_tried_uncompiled():
    module, compiled = Module(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    module.body = torch.compile(module.body, backend=backend)
    assert "torch._dynamo" in sys.modules
    _, call = probed(module, student="head")
    assert call.output.shape == (2, 2)
    assert compiled == []
