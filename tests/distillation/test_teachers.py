"""Teachers are built once, never share the student's weights, and teach without a graph."""

from __future__ import annotations

import copy

import lightning.pytorch as L
import pytest
import torch
from torch import nn

from lightning_compress.distillation.teachers import TeacherCheckpoint, build_teacher, call_teacher


class Small(L.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(width, 2)

    def forward(self, x):
        return self.net(x)


class Other(Small):
    pass


@pytest.fixture
def checkpoint(tmp_path):
    module = Other(width=5)
    content = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": L.__version__,
    }
    torch.save(content, tmp_path / "teacher.ckpt")
    return tmp_path / "teacher.ckpt", module


def test_a_module_is_taken_as_it_is_and_a_callable_is_called_once():
    module, calls = nn.Linear(3, 2), []
    assert build_teacher(module, Small()) is module
    assert build_teacher(lambda: calls.append(1) or module, Small()) is module
    assert calls == [1]


@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_a_path_is_a_checkpoint_of_the_students_class(checkpoint, as_type):
    path, saved = checkpoint
    teacher = build_teacher(as_type(path), Small())
    assert type(teacher) is Small
    assert torch.equal(teacher.net.weight, saved.net.weight)


def test_a_checkpoint_of_another_class(checkpoint):
    path, saved = checkpoint
    teacher = build_teacher(TeacherCheckpoint(str(path), Other), Small())
    assert type(teacher) is Other
    assert torch.equal(teacher.net.weight, saved.net.weight)


def test_a_missing_checkpoint_is_named(tmp_path):
    missing = str(tmp_path / "none.ckpt")
    with pytest.raises(FileNotFoundError, match=r"the teacher's checkpoint .*none.ckpt' does not exist"):
        build_teacher(missing, Small())
    with pytest.raises(FileNotFoundError, match=r"give a .ckpt file"):
        TeacherCheckpoint(missing, Other)()


def test_a_callable_that_builds_no_module_is_named():
    with pytest.raises(TypeError, match=r"torch.nn.Module, got dict"):
        build_teacher(lambda: {1: 2}, Small())


@pytest.mark.parametrize("given", [Small, None])
def test_a_class_or_nothing_as_teacher_is_named(given):
    with pytest.raises(TypeError, match="pass an instance of it, or TeacherCheckpoint"):
        build_teacher(given, Small())


def test_a_checkpoint_of_another_class_names_the_cure(tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"strange.weight": torch.zeros(1)}, "pytorch-lightning_version": "2.6.6"}, path)
    with pytest.raises(ValueError, match=r"does not load into Small; .*TeacherCheckpoint"):
        build_teacher(str(path), Small())


def test_shared_parameters_are_refused_and_a_copy_is_not():
    student = Small()
    for teacher in (student, student.net, nn.Sequential(student.net)):
        with pytest.raises(ValueError, match=r"copy.deepcopy\(model\)"):
            build_teacher(teacher, student)
    assert build_teacher(copy.deepcopy(student), student) is not student


def test_outputs_have_no_graph_and_can_be_saved_for_a_backward():
    teacher = nn.Linear(3, 2)
    student = torch.randn(4, 3, requires_grad=True)
    output = call_teacher(teacher, (student,), {})
    assert output.grad_fn is None
    assert not output.requires_grad
    assert torch.is_grad_enabled()
    (output * student[:, :2]).sum().backward()  # fails on tensors of inference mode
    assert teacher.weight.grad is None


class Strict(nn.Module):
    def forward(self, input_ids, attention_mask):
        return input_ids * attention_mask


def test_labels_stay_with_the_student():
    ids = torch.ones(2, 3)
    batch = {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros(2)}
    assert torch.equal(call_teacher(Strict(), (), batch), ids)
    assert "labels" in batch


def test_inputs_the_teacher_does_not_take_are_named_with_shapes_and_cure():
    with pytest.raises(
        TypeError,
        match=r"Strict cannot be called .*\(\(2, 3\), token_type_ids=\(2, 3\)\).*Details\(inputs=",
    ):
        call_teacher(Strict(), (torch.ones(2, 3),), {"token_type_ids": torch.ones(2, 3)})
    with pytest.raises(TypeError, match=r"missing a required argument: 'attention_mask'"):
        call_teacher(Strict(), (torch.ones(2, 3),), {})


def test_an_error_inside_the_teacher_is_its_own():
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        call_teacher(nn.Linear(5, 2), (torch.ones(2, 3),), {})
