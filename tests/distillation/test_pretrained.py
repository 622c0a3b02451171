"""Teachers from folders that save_pretrained wrote: the saved weights, offline, and nothing that was not saved."""

from __future__ import annotations

import pickle
import socket

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.utils import logging

from lightning_compress.distillation.ensembles import Ensemble
from lightning_compress.distillation.teachers import Builder, PretrainedTeacher, build_teacher, call_teacher

CLASS = "lightning_compress.distillation.teachers.PretrainedTeacher"


def bert(**options):
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, **options,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def saved(tmp_path):
    model = bert(num_labels=3)
    model.save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher"), model.eval()


IDS = torch.arange(8).reshape(2, 4)


@pytest.mark.parametrize("model_class", [AutoModelForSequenceClassification, BertForSequenceClassification])
def test_the_saved_model_comes_back_in_eval_mode_without_network(saved, model_class, monkeypatch):
    path, model = saved
    monkeypatch.setattr(socket, "socket", None)
    teacher = build_teacher(PretrainedTeacher(path, model_class), nn.Linear(1, 1))
    assert not any(module.training for module in teacher.modules())
    assert torch.equal(call_teacher(teacher, (), {"input_ids": IDS}).logits, model(IDS).logits)


def test_weights_saved_in_half_precision_become_float32(tmp_path):
    bert().bfloat16().save_pretrained(tmp_path)
    teacher = PretrainedTeacher(str(tmp_path), AutoModelForSequenceClassification)()
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}


class Own(nn.Linear):
    """No class of transformers, but with from_pretrained, which takes no options."""

    @classmethod
    def from_pretrained(cls, path):
        layer = cls(2, 1).half()
        layer.path = path
        return layer


class Picky(Own):
    @classmethod
    def from_pretrained(cls, path, *, local_files_only=False):
        layer = super().from_pretrained(path)
        layer.offline = local_files_only
        return layer


class NoModule:
    @classmethod
    def from_pretrained(cls, path):
        return path


def test_any_class_with_from_pretrained_will_do(tmp_path):
    own, picky = (PretrainedTeacher(str(tmp_path), kind)() for kind in (Own, Picky))
    assert (own.path, own.weight.dtype, own.training) == (str(tmp_path), torch.float32, False)
    assert picky.offline is True


def test_it_is_frozen_and_pickles(saved):
    teacher = PretrainedTeacher(saved[0], BertForSequenceClassification)
    with pytest.raises(AttributeError):
        teacher.path = "other"
    assert pickle.loads(pickle.dumps(teacher)) == teacher


@pytest.mark.parametrize("missing", ["none", "bert-base-uncased"])
def test_a_missing_folder_is_named_and_not_looked_up(tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(FileNotFoundError, match=rf"folder '{missing}' does not exist; give one that save_pretrained"):
        PretrainedTeacher(missing, AutoModelForSequenceClassification)()


@pytest.mark.parametrize("left", ["nothing", "config"])
@pytest.mark.parametrize("model_class", [AutoModelForSequenceClassification, BertForSequenceClassification])
def test_a_folder_without_weights_is_named(tmp_path, left, model_class):
    if left == "config":
        bert().config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"does not load into {model_class.__name__}; it needs the config and the"):
        PretrainedTeacher(str(tmp_path), model_class)()


def test_weights_that_were_not_saved_would_teach_noise(tmp_path):
    bert().bert.save_pretrained(tmp_path)
    assert PretrainedTeacher(str(tmp_path), AutoModel)()
    with pytest.raises(ValueError, match=r"no weights for classifier.bias, classifier.weight of BertForSequence"):
        PretrainedTeacher(str(tmp_path), AutoModelForSequenceClassification)()


def test_weights_of_another_shape_are_named(saved):
    path, _ = saved
    BertConfig.from_pretrained(path, hidden_size=16).save_pretrained(path)
    with pytest.raises(ValueError, match=r"does not load into AutoModelForSequenceClassification"):
        PretrainedTeacher(path, AutoModelForSequenceClassification)()


@pytest.mark.parametrize("given", [nn.Linear, "transformers.AutoModel"])
def test_a_class_that_loads_no_folder_is_named(given):
    with pytest.raises(TypeError, match=r"expected model_class to have from_pretrained, .*TeacherCheckpoint"):
        PretrainedTeacher("folder", given)


def test_a_class_that_loads_no_module_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"expected NoModule to load a torch.nn.Module, got str"):
        PretrainedTeacher(str(tmp_path), NoModule)()


class Taking:
    """Takes a teacher as a callback does."""

    def __init__(self, teacher: nn.Module | Builder | str) -> None:
        self.teacher = teacher


def from_yaml(teacher):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Taking, "taking")
    return parser.instantiate(parser.parse_object({"taking": {"teacher": teacher}})).taking.teacher


def test_yaml_files_name_it_alone_and_in_an_ensemble(saved):
    path, model = saved
    options = {"path": path, "model_class": "transformers.AutoModelForSequenceClassification"}
    one = {"class_path": CLASS, "init_args": options}
    assert from_yaml(one) == PretrainedTeacher(path, AutoModelForSequenceClassification)
    both = {"teachers": [one, one], "weights": [1, 3], "by_agreement": True}
    ensemble = from_yaml({"class_path": "lightning_compress.distillation.ensembles.Ensemble", "init_args": both})
    assert isinstance(ensemble, Ensemble)
    assert (ensemble.weights, ensemble.by_agreement) == ((0.25, 0.75), True)
    torch.testing.assert_close(ensemble(IDS), model(IDS).logits)
