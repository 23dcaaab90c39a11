"""Stored maps may move with the image only where the teacher would have followed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kd.errors import UserError
from kd.problems.objects.data import ObjectsDataset, open_objects
from kd.problems.recipes import data_config
from kd.runs.build import make_accelerator
from kd.runs.load_teacher import TrainedTeacher, load_teacher
from kd.teacher_cache.cache import CacheOptions, open_cache
from kd.teacher_cache.equivariance import check_moved_maps, moved_map_errors

OFF = dict.fromkeys(("rgb_shift", "shuffle", "grey", "blur", "jitter"), 0.5)


class Mapped(nn.Module):
    """A teacher whose one map says of each place what is there, or also where it is."""

    def __init__(self, *, placed: float) -> None:
        super().__init__()
        self.map = nn.Sequential(nn.AvgPool2d(4), nn.Conv2d(4, 6, 1), Placed(placed))
        self.flat = nn.Flatten()
        self.head = nn.Linear(6, 22)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.flat(self.map(images)).unflatten(1, (6, -1)).mean(dim=2))
        return logits


class Placed(nn.Module):
    """Adds to each place what only says where it is, as position embeddings do."""

    def __init__(self, fraction: float) -> None:
        super().__init__()
        self.register_buffer("places", fraction * torch.linspace(-1, 1, 8).expand(1, 6, 8, 8))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.places  # type: ignore[operator]


@pytest.fixture
def opened(
    small_data: list[str], small_teacher: Path, tmp_path: Path
) -> tuple[Path, ObjectsDataset]:
    data = open_objects(data_config("scenes", [text for text in small_data if text != "--set"]))
    return small_teacher, data


def errors_of(
    opened: tuple[Path, ObjectsDataset],
    tmp_path: Path,
    placed: float,
    limit: float = 1.0,
    mirrored: bool = False,
    outputs: tuple[str, ...] = ("map",),
    top_k: int = 0,
    **moves: float,
) -> dict[str, float]:
    """Errors by move of a teacher that knows places so well."""
    folder, data = opened
    still = dict.fromkeys(("flip", "shift", "rotate", "crop"), 0.0)
    section = data.section.model_copy(update={"augment": {**OFF, **still, **moves}})
    data = ObjectsDataset(section, data.train, data.val)
    torch.manual_seed(0)
    loaded = load_teacher(folder, 22)
    teacher = TrainedTeacher(tmp_path, loaded.recipe, Mapped(placed=placed).eval(), loaded.task)
    accelerator = make_accelerator("fp32")
    options = CacheOptions(outputs=("posterior", *outputs), mirrored=mirrored, top_k=top_k)
    kept = open_cache(teacher, data, accelerator, options)
    check_moved_maps(teacher, data, kept, accelerator, limit=limit)
    found = moved_map_errors(teacher, data, kept, accelerator)
    assert set(found) == set(outputs)  # posteriors belong to the object
    return found[outputs[-1]]


def test_a_map_that_says_what_is_there_follows_a_mirror(
    opened: tuple[Path, ObjectsDataset], tmp_path: Path
) -> None:
    errors = errors_of(opened, tmp_path, 0.0, flip=0.5)
    assert set(errors) == {"flip"}
    # Boxes that end on the middle of a pixel hide it on one side and not on the other.
    assert errors["flip"] < 0.05


def test_every_move_that_may_come_is_measured(
    opened: tuple[Path, ObjectsDataset], tmp_path: Path
) -> None:
    errors = errors_of(opened, tmp_path, 0.0, flip=0.1, shift=0.01, rotate=0.3, crop=1.0)
    assert list(errors) == ["flip", "shift", "rotate", "crop"]
    assert 0.01 < errors["crop"] < 0.6  # a coarse map is no image
    assert errors_of(opened, tmp_path, 0.0) == {}


def test_a_map_that_says_where_it_is_is_refused_with_its_error(
    opened: tuple[Path, ObjectsDataset], tmp_path: Path
) -> None:
    message = r"maps of 'map' do not follow the image.*by flip \d+\.\d% \(limit 10%.*0 for flip,"
    with pytest.raises(UserError, match=message):
        errors_of(opened, tmp_path, 2.0, limit=0.1, flip=0.5)
    assert errors_of(opened, tmp_path, 2.0, limit=9.0, flip=0.5)["flip"] > 0.1


def test_what_was_said_of_the_mirrored_image_is_exact(
    opened: tuple[Path, ObjectsDataset], tmp_path: Path
) -> None:
    errors = errors_of(opened, tmp_path, 2.0, mirrored=True, flip=0.5, shift=0.5)
    assert errors["flip"] < 1e-3  # of float16
    assert errors["shift"] > 0.05


def test_what_has_no_places_is_compared_as_it_is(
    opened: tuple[Path, ObjectsDataset], tmp_path: Path
) -> None:
    flat = errors_of(opened, tmp_path, 0.0, outputs=("flat",), flip=0.5)
    assert flat["flip"] > 0.1  # the same map, laid flat: nothing moves it
    mirrored = errors_of(opened, tmp_path, 0.0, mirrored=True, outputs=("flat",), flip=0.5)
    assert mirrored["flip"] < 1e-3


def test_the_likeliest_classes_are_compared_with_log_probabilities(
    opened: tuple[Path, ObjectsDataset], tmp_path: Path
) -> None:
    errors = errors_of(opened, tmp_path, 0.0, outputs=("logits",), top_k=21, flip=0.5)
    assert errors["flip"] < 0.05
