"""From sections of a recipe to data sets, models, terms and adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kd.build import (
    OpenData,
    adapt_student,
    build_student,
    build_task,
    build_teacher,
    build_terms,
    make_accelerator,
    make_dataset,
    make_loader,
    open_data,
)
from kd.config import Adapter, Data, Model, TaskSection, Term
from kd.config_reader import data_config
from kd.errors import UserError
from kd.nn.regions import roi_features
from kd.soft_targets import LiveTeacher
from kd.tasks.classification import Classification
from kd.tasks.context import Context
from teachers.cnn import cnn


@pytest.fixture(scope="module")
def data(small_data: list[str]) -> OpenData:
    section: Data = data_config(
        "scenes", [text.removeprefix("data.") for text in small_data if text != "--set"]
    )
    return open_data(section)


def test_the_prior_counts_the_objects_that_may_be_hidden(data: OpenData) -> None:
    whole = data.prior()
    assert whole.sum() == pytest.approx(1)
    counts = np.bincount(data.train.labels, minlength=data.num_classes) + 1.0
    assert whole == pytest.approx(counts / counts.sum())
    assert not np.allclose(whole, data.prior(data.train.image_ids[:5]))


def test_the_ceiling_is_there_for_the_scenes_alone(data: OpenData) -> None:
    ceiling = data.ceiling()
    assert ceiling is not None
    assert set(ceiling["object_ids"]) == set(data.val.object_ids)
    other = OpenData(data.section.model_copy(update={"generate": None}), data.train, data.val)
    assert other.ceiling() is None


def test_data_that_is_nowhere_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("KD_DATA", str(tmp_path))
    monkeypatch.chdir(str(tmp_path))
    with pytest.raises(UserError, match=r"data set coco_mini: not found in .*data\.root=DIR"):
        open_data(data_config("coco_mini"))


def test_evaluation_leaves_no_image_out_and_training_fills_its_batches(data: OpenData) -> None:
    accelerator = make_accelerator("fp32")
    val = make_loader(make_dataset(data, "val", train=False), accelerator, batch_size=3, workers=0)
    assert sum(len(batch["images"]) for batch in val) == len(val.dataset) == 8
    dataset = make_dataset(data, "train", train=True)
    train = make_loader(dataset, accelerator, batch_size=7, workers=0, train=True)
    assert [len(batch["images"]) for batch in train] == [7, 7, 7]


def test_options_are_checked_against_the_builders(data: OpenData) -> None:
    prior = data.prior()
    with pytest.raises(UserError, match=r"teacher 'cnn'.*widht.*width"):
        build_teacher(Model(name="cnn", options={"widht": 4}), 5)
    with pytest.raises(UserError, match=r"dropuot.*dropout"):
        build_student(Model(name="resnet18", options={"dropuot": 0.1}), prior)
    with pytest.raises(UserError, match=r"classificaton.*classification"):
        build_task(TaskSection(name="classificaton", weights={}), data.section, 5)
    task = build_task(TaskSection(name="context", weights={}), data.section, 5, prior)
    assert isinstance(task, Context)
    assert task.shape == data.section.shape and task.prior == pytest.approx(tuple(prior))
    assert build_student(Model(name="squeezenet1_1"), prior, context=False).context is None


class Seer(nn.Module):
    """A student with a layer to tap, dropout and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.BatchNorm2d(6))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor, rois: Tensor) -> dict[str, Tensor]:
        """Classify objects."""
        seen = roi_features(self.trunk(images), rois, 4).flatten(1)
        return {"logits": self.head(self.dropout(seen))}


def term(student: str, teacher: str) -> list[Term]:
    return [Term(name="context_features", weight=1.0, student=student, teacher=teacher)]


def teacher_of(layer: str) -> LiveTeacher:
    model = cnn(5, width=4, downs=3, hidden=8)
    return LiveTeacher(model, Context(num_classes=5), [layer])


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {
        "images": torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8),
        "sizes": torch.tensor([[32, 32], [32, 32]]),
        "boxes": torch.tensor([[4.0, 4, 20, 20], [8, 8, 24, 30], [0, 0, 9, 9]]),
        "labels": torch.tensor([0, 1, 2]),
        "image_of": torch.tensor([0, 1, 1]),
        "hidden": torch.tensor([0, 1, 2]),
        "hide_share": torch.ones(3),
    }


def test_adapters_get_their_shapes_from_a_batch_and_nothing_else_changes(
    batch: dict[str, Tensor],
) -> None:
    student, task = Seer().train(), Classification(num_classes=5)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    teacher = LiveTeacher(
        cnn(5, width=4, downs=3, hidden=8), Context(num_classes=5), ["features.2"]
    )
    stream = torch.get_rng_state()
    adapters = {"trunk": Adapter(kind="conv1x1", to="features.2")}
    model = adapt_student(
        student, build_terms(term("trunk", "features.2")), adapters, teacher, task, batch
    )
    adapter = model.adapters["trunk"]
    assert isinstance(adapter, nn.Conv2d)
    assert (adapter.in_channels, adapter.out_channels) == (6, 16)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())
    assert all(module.training for module in student.modules())
    torch.set_rng_state(stream)
    expected = nn.Conv2d(6, 16, 1)  # nothing else was drawn
    assert torch.equal(adapter.weight, expected.weight)
    _, features = model(*task.inputs(batch))
    assert features["trunk"].shape == (2, 16, 8, 8)


def test_adapters_that_lead_nowhere_are_refused(batch: dict[str, Tensor]) -> None:
    task, terms = Classification(num_classes=5), build_terms(term("trunk", "features.2"))
    teacher = LiveTeacher(
        cnn(5, width=4, downs=3, hidden=8), Context(num_classes=5), ["features.2"]
    )
    wrong = {"trunk": Adapter(to="features.1")}
    with pytest.raises(UserError, match=r"no term reads teacher layer 'features\.1'"):
        adapt_student(Seer(), terms, wrong, teacher, task, batch)
    with pytest.raises(UserError, match=r"soft_targets\.kind=live"):
        adapt_student(Seer(), terms, {}, None, task, batch)
    student = Seer()
    with pytest.raises(UserError, match=r"trank.*trunk"):
        adapt_student(student, build_terms(term("trank", "features.2")), {}, teacher, task, batch)
    assert not student.trunk._forward_hooks
