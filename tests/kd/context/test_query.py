"""Asking a teacher about regions gives what evaluation gives, however they are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.config.datasets import Split
from kd.config.recipes import Model, TaskSection, TeacherRecipe
from kd.context.query import Question, expectations, teacher_input
from kd.data.loader import Sample, collate
from kd.problems.base import Batch, named
from kd.problems.objects.data import ObjectsDataset, open_objects
from kd.problems.objects.problem import PROBLEM
from kd.problems.objects.schema import ObjectsSection
from kd.problems.recipes import data_config
from kd.runs.load_teacher import TrainedTeacher, fold_models, load_teacher
from kd.utils.images import read_image

CPU = torch.device("cpu")
TINY: dict[str, Model] = {
    "cnn": Model(name="cnn", options={"width": 4, "downs": 2, "hidden": 8, "region": True}),
    "unet": Model(name="unet", options={"width": 4, "depth": 2}),
    "trunk": Model(name="trunk", options={"name": "shufflenet_v2_x0_5", "levels": 2}),
    "map": Model(name="resnet_pixel"),
    "labels": Model(name="resnet_multilabel"),
    "tokens": Model(name="scene_transformer", options={"width": 8, "depth": 1, "heads": 2}),
    "patches": Model(
        name="scene_transformer",
        options={"width": 8, "depth": 1, "heads": 2, "pixels": "patches", "dense": True},
    ),
}


@pytest.fixture
def photographs(tiny_coco: Callable[..., Path]) -> ObjectsSection:
    """Images neither square nor of the teacher's size, and less than twice that."""
    return ObjectsSection(
        name="tiny",
        root=str(tiny_coco(images=3, size=(50, 70))),
        train=Split(annotations="annotations/instances_train2017.json", images="train2017"),
        val=Split(annotations="annotations/instances_val2017.json", images="val2017"),
        size=40,
    )


def untrained(section: ObjectsSection, name: str = "cnn", shape: str = "box") -> TrainedTeacher:
    section = section.model_copy(update={"shape": shape})
    model = PROBLEM.build_teacher(TINY[name], 4).eval().requires_grad_(False)
    for part, parameter in model.named_parameters():
        # Many heads begin near 0, and would answer the same to all; a deep trunk would not bear it.
        if "head" in part or "resnet" not in TINY[name].name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    task = TaskSection(name=str(model.task), weights={})
    recipe = TeacherRecipe(data=section, task=task, teacher=TINY[name])
    built = PROBLEM.task(task, section, 4, model=model)
    return TrainedTeacher(Path("."), recipe, model, built)


def questions_of(data: ObjectsDataset) -> tuple[list[Question], list[Sample]]:
    """Each val image with all its usable objects asked about, and the dataset's own samples."""
    dataset = data.samples("val")
    samples = [dataset[0, place] for place in range(len(dataset))]
    questions = []
    for position, sample in enumerate(samples):
        image = int(dataset.images[position])
        index = data.val
        rows = slice(int(index.first[image]), int(index.first[image + 1]))
        questions.append(
            Question(
                image=read_image(index.path(image), None),
                boxes=torch.from_numpy(np.array(index.boxes[rows])),
                labels=torch.from_numpy(index.labels[rows].astype(np.int64)),
                hidden=sample["hidden"],
            )
        )
    return questions, samples


def answers(teacher: TrainedTeacher, questions: list[Question], **options: Any) -> list[Tensor]:
    return list(expectations(teacher, questions, device=CPU, **options))


@dataclasses.dataclass(frozen=True)
class Watched:
    """A task that keeps the batches it is shown."""

    task: Any
    seen: list[Batch]
    num_classes: int = 4
    shape: str = "box"

    def inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        self.seen.append(batch)
        return dataclasses.replace(self.task, shape=self.shape).inputs(batch)  # type: ignore[no-any-return]

    def outputs_per_region(self, size: int) -> int:
        return int(self.task.outputs_per_region(size))

    def decode(self, output: Any, batch: Batch) -> Tensor:
        return self.task.decode(output, batch)  # type: ignore[no-any-return]


def test_val_objects_get_the_answers_of_the_run(small_teacher: Path, small_data: list[str]) -> None:
    data = open_objects(data_config("scenes", [text for text in small_data if text != "--set"]))
    teacher = load_teacher(small_teacher, data.num_classes)
    questions, samples = questions_of(data)
    with np.load(small_teacher / "predictions.npz") as stored:
        known = dict(zip(stored["object_ids"].tolist(), stored["log_probs"], strict=True))
    asked = torch.cat(answers(teacher, questions, most_inputs=7))
    ids = torch.cat([sample["object_ids"][sample["hidden"]] for sample in samples]).tolist()
    assert len(asked) == len(known)
    wanted = torch.from_numpy(np.stack([known[one] for one in ids]))
    torch.testing.assert_close(asked, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("shape", ["box", "ellipse"])
def test_every_kind_of_teacher_answers_as_for_the_datasets_batch(
    name: str, shape: str, photographs: ObjectsSection
) -> None:
    teacher = untrained(photographs, name, shape)
    questions, samples = questions_of(open_objects(photographs.model_copy(update={"shape": shape})))
    batch = collate(samples)
    with torch.no_grad():
        output = named(teacher.model(*teacher.task.inputs(batch)))
    wanted = teacher.task.decode(output, batch)
    asked = torch.cat(answers(teacher, questions))
    assert wanted.std(dim=0).max() > 1e-3
    torch.testing.assert_close(asked, wanted, atol=1e-5, rtol=0)
    assert asked.exp().sum(dim=1).allclose(torch.ones(len(asked)))


def test_a_teacher_that_reads_no_images_is_shown_none(photographs: ObjectsSection) -> None:
    section = photographs.model_copy(update={"images": False})
    teacher = untrained(section)
    questions, samples = questions_of(open_objects(section))
    batch = collate(samples)
    with torch.no_grad():
        output = named(teacher.model(*teacher.task.inputs(batch)))
    asked = torch.cat(answers(teacher, questions))
    wanted = teacher.task.decode(output, batch)
    torch.testing.assert_close(asked, wanted, atol=1e-5, rtol=0)
    seen, _ = teacher_input(untrained(photographs, "tokens"), questions[0])
    assert (seen == 128).all()


def test_the_others_names_count_for_a_teacher_that_reads_them(photographs: ObjectsSection) -> None:
    boxes = torch.tensor([[0.0, 0.0, 20.0, 20.0], [30.0, 10.0, 50.0, 40.0]])
    picture = torch.zeros(3, 50, 70, dtype=torch.uint8)
    labels = [torch.tensor(one) for one in ([0, -1], [0, 3], [1, 3], [-1, 3])]
    questions = [Question(picture, boxes, one, torch.tensor([1])) for one in labels]
    first, itself, other, none = answers(untrained(photographs, "tokens"), questions)
    torch.testing.assert_close(first, itself)  # its own class is not for it to know
    assert not torch.allclose(first, other, atol=1e-4)
    assert not torch.allclose(first, none, atol=1e-4)


def test_the_batch_is_the_data_sets(photographs: ObjectsSection) -> None:
    seen: list[Batch] = []
    teacher = untrained(photographs)
    watched: Any = Watched(teacher.task, seen)
    questions, samples = questions_of(open_objects(photographs))
    answers(dataclasses.replace(teacher, task=watched), questions)
    wanted = collate(samples)
    (batch,) = seen
    for key in ("images", "sizes", "boxes", "labels", "image_of", "hidden", "hide_fraction"):
        torch.testing.assert_close(batch[key], wanted[key], atol=0, rtol=0)
    torch.testing.assert_close(batch["area_fractions"], wanted["area_fractions"])
    assert batch.keys() == wanted.keys()


@pytest.mark.parametrize("most", [1, 2, 3, 64])
def test_passes_hold_no_more_than_asked_and_change_nothing(
    most: int, photographs: ObjectsSection
) -> None:
    seen: list[Batch] = []
    teacher = untrained(photographs)
    questions, _ = questions_of(open_objects(photographs))
    nothing = dataclasses.replace(questions[0], hidden=torch.empty(0, dtype=torch.int64))
    mixed = [nothing, questions[0], nothing, *questions[1:], nothing]
    watched: Any = Watched(teacher.task, seen)
    asked = answers(dataclasses.replace(teacher, task=watched), mixed, most_inputs=most)
    assert all(1 <= len(batch["hidden"]) <= most for batch in seen)
    assert [tuple(rows.shape) for rows in asked] == [(len(q.hidden), 4) for q in mixed]
    alone = [answers(teacher, [question])[0] for question in mixed]
    for rows, wanted in zip(asked, alone, strict=True):
        torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=0)


def test_answers_come_before_all_questions_are_there(photographs: ObjectsSection) -> None:
    questions, _ = questions_of(open_objects(photographs))
    taken = []

    def source() -> Any:
        for question in questions:
            taken.append(question)
            yield question

    stream = expectations(untrained(photographs), source(), device=CPU, most_inputs=1)
    next(stream)
    assert len(taken) < len(questions)


def test_a_mask_of_the_boxs_pixels_answers_as_the_box(photographs: ObjectsSection) -> None:
    teacher = untrained(photographs)
    picture = torch.randint(256, (3, 30, 40), dtype=torch.uint8)
    boxes = torch.tensor([[4.0, 6.0, 20.0, 15.0], [22.0, 10.0, 39.0, 28.0]])
    masks = torch.zeros(2, 30, 40, dtype=torch.bool)
    masks[0, 6:15, 4:20] = True
    half = masks.clone()
    half[0, 6:10] = False
    question = Question(picture, boxes, torch.tensor([-1, -1]), torch.tensor([0, 1]))
    by_box, by_mask, by_half = answers(
        teacher, [question, *(dataclasses.replace(question, masks=m) for m in (masks, half))]
    )
    torch.testing.assert_close(by_mask, by_box)  # the second mask is empty: its box is hidden
    assert not torch.allclose(by_half[0], by_box[0], atol=1e-6)
    segments = dataclasses.replace(teacher, task=dataclasses.replace(teacher.task, shape="segment"))  # type: ignore[type-var]
    torch.testing.assert_close(answers(segments, [question])[0], by_box)


def test_masks_are_scaled_by_their_pixels_centres(photographs: ObjectsSection) -> None:
    seen: list[Batch] = []
    teacher = untrained(photographs)
    watched: Any = Watched(teacher.task, seen)
    masks = torch.zeros(1, 60, 80, dtype=torch.bool)
    masks[0, 20:40, 30:50] = True
    picture = torch.full((3, 60, 80), 90, dtype=torch.uint8)
    question = Question(
        picture, torch.tensor([[30.0, 20, 50, 40]]), torch.tensor([-1]), torch.tensor([0]), masks
    )
    answers(dataclasses.replace(teacher, task=watched), [question])
    wanted = torch.zeros(40, 40, dtype=torch.bool)
    wanted[10:20, 15:25] = True  # 80 x 60 becomes 40 x 30, padded below
    assert torch.equal(seen[0]["segments"][0], wanted)


def test_another_model_takes_the_teachers_place(small_teacher: Path, small_data: list[str]) -> None:
    data = open_objects(data_config("scenes", [text for text in small_data if text != "--set"]))
    teacher = load_teacher(small_teacher, data.num_classes)
    folds = fold_models(teacher, data.num_classes)
    question = questions_of(data)[0][0]
    own, first, second = (answers(teacher, [question], model=model)[0] for model in (None, *folds))
    assert not torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(first, own, atol=1e-6)
