"""From sections of a recipe to datasets, models, terms and adapters."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from kd.config.recipes import Model, TaskSection
from kd.errors import UserError
from kd.problems import problem
from kd.problems.objects.data import ObjectsDataset, open_objects
from kd.problems.objects.problem import PROBLEM
from kd.problems.objects.task import Context
from kd.problems.recipes import data_config
from kd.registry import Entry
from kd.runs.build import (
    make_accelerator,
    make_loader,
)
from students import STUDENTS


@pytest.fixture(scope="module")
def data(small_data: list[str]) -> ObjectsDataset:
    section = data_config(
        "scenes", [text.removeprefix("data.") for text in small_data if text != "--set"]
    )
    return open_objects(section)


def test_the_prior_counts_the_objects_that_may_be_hidden(data: ObjectsDataset) -> None:
    whole = data.prior()
    assert whole.sum() == pytest.approx(1)
    counts = np.bincount(data.train.labels, minlength=data.num_classes) + 1.0
    assert whole == pytest.approx(counts / counts.sum())
    assert not np.allclose(whole, data.prior(data.train.image_ids[:5]))


def test_the_ceiling_is_there_for_the_scenes_alone(data: ObjectsDataset) -> None:
    ceiling = data.ceiling()
    assert ceiling is not None
    assert set(ceiling["object_ids"]) == set(data.val.object_ids)
    other = ObjectsDataset(data.section.model_copy(update={"generate": None}), data.train, data.val)
    assert other.ceiling() is None


def test_data_that_is_nowhere_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("KD_DATA", str(tmp_path))
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(UserError, match=r"dataset coco_mini: not found in .*data\.root=DIR"):
        open_objects(data_config("coco_mini"))


def test_evaluation_leaves_no_image_out_and_training_fills_its_batches(
    data: ObjectsDataset,
) -> None:
    accelerator = make_accelerator("fp32")
    val = make_loader(data.samples("val"), accelerator, batch_size=3, workers=0)
    assert sum(len(batch["images"]) for batch in val) == len(val.dataset) == 8
    dataset = data.samples("train", train=True)
    train = make_loader(dataset, accelerator, batch_size=7, workers=0, train=True)
    assert [len(batch["images"]) for batch in train] == [7, 7, 7]


def test_options_are_checked_against_the_builders(data: ObjectsDataset) -> None:
    prior = data.prior()
    with pytest.raises(UserError, match=r"teacher 'cnn'.*widht.*width"):
        PROBLEM.build_teacher(Model(name="cnn", options={"widht": 4}), 5)
    with pytest.raises(UserError, match=r"dropuot.*dropout"):
        PROBLEM.build_student(Model(name="resnet18", options={"dropuot": 0.1}), 5)
    with pytest.raises(UserError, match=r"'pspnet' is for segmentation, not objects; .*resnet18"):
        PROBLEM.build_student(Model(name="pspnet", options={}), 5)
    with pytest.raises(UserError, match=r"classificaton.*classification"):
        PROBLEM.task(TaskSection(name="classificaton", weights={}), data.section, 5)
    section = TaskSection(name="context", weights={})
    fractions = PROBLEM.class_fractions(section, data)
    task = PROBLEM.task(section, data.section, 5, fractions=fractions)
    assert isinstance(task, Context)
    assert task.shape == data.section.shape and task.prior == pytest.approx(tuple(prior))
    student = PROBLEM.build_student(Model(name="squeezenet1_1"), 5, context=False)
    assert student.context is None


class Own(nn.Module):
    def __init__(self, *, width: int = 1) -> None:
        super().__init__()
        self.width = width


@pytest.mark.parametrize("name", ["own", f"{__name__}:Own"])
def test_an_added_student_is_built_by_its_name(
    name: str, data: ObjectsDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDENTS, "own", Entry(f"{__name__}:Own", "one of the user's"))
    model = Model(name=name, options={"width": 2})
    for built in (
        PROBLEM.build_student(model, 3),
        problem("segmentation").named_student(name, model.options, num_classes=3),
        problem("detection").build_student(model, 3),
    ):
        assert isinstance(built, Own) and built.width == 2
